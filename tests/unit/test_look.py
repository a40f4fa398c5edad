"""`siglane look`: every kind of layout can be drawn, and what is drawn is what the tower gets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint, write_relative
from llava_qwen_checkpoint import write_llava_qwen_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint, write_ovis2_6_checkpoint
from PIL import Image
from siglip2_checkpoint import write_siglip2_checkpoint
from video_llama_3_checkpoint import write_video_llama_3_checkpoint

from siglane.cli.main import main
from siglane.config.vision import VisionConfig
from siglane.image.patchify import patchify
from siglane.image.tile import render_tiles
from siglane.look.drawing import FOLD_GAP, PAPER, flow, folded, folds
from siglane.look.legend import chips, token_lines
from siglane.look.page import draw
from siglane.look.tiles import canvas_in_source
from siglane.look.view import COLUMN, GUTTER, MARGIN, View, unpatchify
from siglane.types import (
    AnyRes,
    Box,
    Grid,
    ImageLayout,
    ImagePlaceholder,
    Indicator,
    Marker,
    MergedFirst,
    MergedScales,
    Newline,
    NewlinePlace,
    Pad,
    Piece,
    Resize,
    Size,
    Step,
    Tile,
    Token,
)

PATCH = 16
LINE_FEED = (Marker("\n", isolated=True), Marker("\n", isolated=False))


def picture(size: Size, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth colours, so that a wrong fold or crop is seen."""
    y, x = np.mgrid[0 : size.height, 0 : size.width]
    wave = np.sin(x / (11 + seed)) + np.cos(y / 17)
    colours = np.stack([255 * x / size.width, 255 * y / size.height, 127 + 60 * wave], axis=-1)
    return np.clip(colours, 0, 255).astype(np.uint8)


def cut(columns: int, rows: int, side: int, steps: Sequence[Step], frame: int = 0) -> list[Tile]:
    grid = Grid(side // PATCH, side // PATCH)
    return [
        Tile(tuple(steps), Box(x * side, y * side, (x + 1) * side, (y + 1) * side), grid, frame)
        for y in range(rows)
        for x in range(columns)
    ]


def native(size: Size, grid: Grid) -> ImageLayout:
    """One tile of any shape between two learned rows, as Ovis2.5's."""
    canvas = Size(grid.w * PATCH, grid.h * PATCH)
    tile = Tile((Resize(canvas, "bilinear"),), Box(0, 0, *canvas), grid)
    pieces = (Indicator(0), ImagePlaceholder(max(1, grid.area // 4)), Indicator(1))
    return ImageLayout(size, (tile,), pieces, Grid(1, 1), projected=())


def anyres(size: Size, columns: int, rows: int) -> ImageLayout:
    """The whole picture, then tiles of a padded canvas, as LLaVA-OneVision's."""
    side, n = 64, 4
    canvas = Size(columns * side, rows * side)
    scale = min(canvas.width / size.width, canvas.height / size.height)
    inner = Size(max(1, int(size.width * scale)), max(1, int(size.height * scale)))
    left, top = (canvas.width - inner.width) // 2, (canvas.height - inner.height) // 2
    steps = (Resize(inner, "bicubic"), Pad(canvas, left, top, (0, 0, 0)))
    tiles = cut(1, 1, side, [Resize(Size(side, side), "bicubic")]) + cut(columns, rows, side, steps)
    crop = Box(0, 0, columns * n, rows * n)
    tokens = n * n + rows * n * (columns * n + 1)
    pieces = (ImagePlaceholder(tokens),)
    return ImageLayout(size, tuple(tiles), pieces, Grid(rows, columns), AnyRes(crop, None), projected=())


def row_tokens(size: Size, columns: int, rows: int) -> ImageLayout:
    """A global tile and tiles with a token each, as nanoVLM's."""
    side = 64
    big = Resize(Size(columns * side, rows * side), "bicubic")
    whole = [big, Resize(Size(side, side), "bilinear", in_float=True)]
    pieces: list[Piece] = [Token("<|global_image|>"), ImagePlaceholder(4)]
    for row in range(rows):
        for column in range(columns):
            pieces += [Token(f"<row_{row + 1}_col_{column + 1}>"), ImagePlaceholder(4)]
    tiles = cut(1, 1, side, whole) + cut(columns, rows, side, [big])
    return ImageLayout(size, tuple(tiles), tuple(pieces), Grid(rows, columns), projected=())


def scales(size: Size) -> ImageLayout:
    side = 64
    tiles = [
        tile
        for columns, rows in ((1, 1), (2, 2), (4, 3))
        for tile in cut(columns, rows, side, [Resize(Size(columns * side, rows * side), "bicubic")])
    ]
    pieces = (ImagePlaceholder(48), LINE_FEED[0])
    return ImageLayout(size, tuple(tiles), pieces, Grid(3, 4), MergedScales((1, 2), 3), projected=())


def thumbnail(size: Size) -> ImageLayout:
    tiles = cut(4, 3, 64, [Resize(Size(256, 192), "bicubic")]) + cut(1, 1, 64, [Resize(Size(64, 64), "bicubic")])
    return ImageLayout(size, tuple(tiles), (ImagePlaceholder(4), *LINE_FEED) * 13, Grid(3, 4), projected=())


def video(size: Size, frames: int) -> ImageLayout:
    tiles = [cut(1, 1, 64, [Resize(Size(64, 64), "bicubic")], frame)[0] for frame in range(frames)]
    pieces = (ImagePlaceholder(4 * frames + 1),)
    return ImageLayout(
        size, tuple(tiles), pieces, Grid(1, 1), Newline(Grid(2, 2)), frames, projected=(Grid(4, 4),) * frames
    )


def film(size: Size, frames: int, grid: Grid) -> ImageLayout:
    """Frames of any shape in one run, as Ovis2.5's."""
    (tile,) = native(size, grid).tiles
    tiles = tuple(replace(tile, frame=frame) for frame in range(frames))
    pieces = (Indicator(2), ImagePlaceholder(frames * grid.area // 4), Indicator(3))
    return ImageLayout(size, tiles, pieces, Grid(1, 1), frames=frames, projected=())


LAYOUTS = {
    "one pixel": native(Size(1, 1), Grid(7, 7)),
    "a long strip, one row of patches": native(Size(4000, 17), Grid(1, 236)),
    "a tall strip, one column of patches": native(Size(17, 4000), Grid(236, 1)),
    "native resolution": native(Size(640, 480), Grid(30, 40)),
    "anyres with bars": anyres(Size(640, 200), 2, 2),
    "anyres, 37 tiles": anyres(Size(900, 900), 6, 6),
    "anyres of a strip": anyres(Size(2000, 20), 6, 1),
    "row and column tokens": row_tokens(Size(640, 480), 4, 3),
    "row and column tokens, 65 tiles": row_tokens(Size(300, 300), 8, 8),
    "scales": scales(Size(640, 480)),
    "tiles and a thumbnail": thumbnail(Size(640, 480)),
    "a video": video(Size(320, 180), 8),
    "a video between learned rows": film(Size(90, 80), 6, Grid(6, 6)),
    "a video of one frame": video(Size(30, 180), 1),
}


VISION = VisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_channels=3,
    patch_size=PATCH,
    position_grid=Grid(16, 16),
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
    patch_layout="channel_first",
    position_resize="bicubic",
    rope_theta=10_000.0,
    depth=1,
    post_norm=True,
    use_head=False,
)


def view_of(layout: ImageLayout, **changes: object) -> View:
    """Drawn from the layout itself, without a model."""
    frames = tuple(picture(layout.source, seed) for seed in range(max(1, layout.frames)))
    tiles = tuple(np.clip(np.rint(tile), 0, 255).astype(np.uint8) for tile in render_tiles(frames, layout))
    found = View("picture.png", "model", frames, layout, tiles, VISION, True)
    return replace(found, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_kind_of_layout_can_be_drawn(layout: ImageLayout) -> None:
    page = draw(view_of(layout))
    assert page.width == 2 * (MARGIN + COLUMN) + GUTTER
    assert 400 < page.height < 4000
    margin = np.asarray(page)[:, -MARGIN + 4 :]
    assert (margin == PAPER).all()  # nothing is drawn beyond the columns


def test_names_with_other_letters_are_drawn() -> None:
    layout = replace(LAYOUTS["one pixel"], pieces=(Marker("\n<row ä>", isolated=False), ImagePlaceholder(4)))
    assert draw(view_of(layout, name="ü\n.png", model="модель")).width > 1000


def test_the_chips_say_what_stands_in_the_prompt() -> None:
    texts = [chip.text for chip in chips(view_of(LAYOUTS["row and column tokens"]))]
    assert texts[:4] == ["<|global_image|>", "tile 1: 4 tokens", "<row_1_col_1>", "tile 2: 4 tokens"]
    assert texts[-2:] == ["<row_3_col_4>", "tile 13: 4 tokens"]
    texts = [chip.text for chip in chips(view_of(LAYOUTS["tiles and a thumbnail"]))]
    assert texts[:4] == ["tile 1: 4 tokens", "\n", "\n", "tile 2: 4 tokens"]
    texts = [chip.text for chip in chips(view_of(LAYOUTS["native resolution"]))]
    assert texts == ["learned row 0", "300 tokens", "learned row 1"]
    marker = replace(LAYOUTS["one pixel"], pieces=(Marker("a\n\tb", isolated=True), ImagePlaceholder(4)))
    assert chips(view_of(marker))[0].text == "a\n\\tb"


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("tiles and a thumbnail", "13 tiles x 4 = 52"),
        ("scales", "12 tiles of the last scale x 4 = 48, all scales in each"),
        ("anyres with bars", "16 of the whole picture + 8 rows of 8 and a newline = 88"),
        ("a video", "8 frames x 4 + a newline = 33"),
        ("a video between learned rows", "6 frames x 9 = 54"),
        ("one pixel", "12"),
        ("native resolution", "300"),
    ],
)
def test_the_token_line_adds_up(name: str, line: str) -> None:
    assert token_lines(LAYOUTS[name])[0] == line


@pytest.mark.parametrize(
    ("place", "tokens", "line"),
    [
        ("tile", 40, "8 frames x 4 + 8 newlines = 40"),
        ("row", 48, "8 frames x 4 + 16 newlines = 48"),
        ("nowhere", 32, "8 frames x 4 = 32"),
    ],
)
def test_newlines_are_counted_where_they_stand(place: NewlinePlace, tokens: int, line: str) -> None:
    ends = Newline(Grid(2, 2), "average", place)
    layout = replace(LAYOUTS["a video"], assembly=ends, pieces=(ImagePlaceholder(tokens),))
    assert token_lines(layout)[0] == line


def test_rows_that_were_left_out_are_told() -> None:
    still = MergedFirst(drops_still=True, kept=bytes((1,) * 29 + (0,) * 3))
    layout = replace(LAYOUTS["a video"], assembly=still, pieces=(ImagePlaceholder(29),))
    assert token_lines(layout)[0] == "8 frames x 4, 3 that stand still left out = 29"


def test_the_picture_lies_on_its_canvas_where_the_steps_put_it() -> None:
    layout = LAYOUTS["anyres with bars"]
    width, height, box = canvas_in_source(layout.tiles[1], layout.source)
    assert (width, height) == (640, 640)
    assert box == (0, 220, 640, 420)
    squashed = LAYOUTS["scales"].tiles[0]
    assert canvas_in_source(squashed, Size(640, 480)) == (640, 480, (0, 0, 640, 480))


def test_a_fold_keeps_every_pixel() -> None:
    strip = Image.fromarray(picture(Size(100, 3)))
    page = np.asarray(folded(strip, 40))
    rows = [page[at : at + 3] for at in range(0, page.shape[0], 3 + FOLD_GAP)]
    assert np.array_equal(np.concatenate(rows, axis=1)[:, :100], np.asarray(strip))
    turned = np.asarray(folded(strip.transpose(Image.Transpose.TRANSPOSE), 40))
    assert np.array_equal(turned, page.transpose(1, 0, 2))


@pytest.mark.parametrize(("size", "pieces"), [((640, 480), 1), ((1000, 60), 1), ((4000, 17), 12), ((17, 2000), 7)])
def test_only_strips_are_folded(size: tuple[int, int], pieces: int) -> None:
    assert folds(*size, 760) == pieces


def test_boxes_flow_into_rows() -> None:
    places, height = flow([(50, 10), (40, 30), (20, 5)], 100, 5)
    assert places == [(0, 0), (55, 0), (0, 35)]
    assert height == 40


@pytest.mark.parametrize("order", ["channel_first", "channel_last"])
def test_a_view_shows_the_pixels_the_tower_gets(order: str) -> None:
    tiles = [picture(Size(42, 28), seed) for seed in range(2)]
    pixels = patchify(tiles, 14, order).numpy()  # type: ignore[arg-type]
    found = unpatchify(pixels, [Grid(2, 3)] * 2, 14, order == "channel_first")
    assert all(np.array_equal(*pair) for pair in zip(tiles, found, strict=True))


@pytest.fixture(scope="module")
def strip(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "strip.png"
    Image.fromarray(picture(Size(4000, 17))).save(path)
    return str(path)


@pytest.fixture(scope="module")
def film_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "film.gif"
    frames = [Image.fromarray(picture(Size(60, 40), seed)) for seed in range(12)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return str(path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "siglip": write_siglip_checkpoint,
    "naflex": write_siglip2_checkpoint,
    "nvila": write_nvila_checkpoint,
    "nvila s2": lambda folder: write_nvila_checkpoint(folder, lite=False),
    "ovis2.5": write_ovis2_5_checkpoint,
    "ovis2.6": write_ovis2_6_checkpoint,
    "ovis2.6 with experts": partial(write_ovis2_6_checkpoint, moe=True),
    "llava-onevision": write_llava_onevision_checkpoint,
    "llava original": write_llava_qwen_checkpoint,
    "r-4b": partial(write_relative, name="r_4b"),
    "bee": partial(write_relative, name="bee"),
    "varco": partial(write_relative, name="varco of patches of 16"),
    "nanovlm": write_nanovlm_checkpoint,
    "smolvlm2": partial(write_idefics3_checkpoint, processor={"video_sampling": {"fps": 10, "max_frames": 12}}),
    "docling": partial(write_idefics3_checkpoint, kind="docling"),
    "videollama3": partial(write_video_llama_3_checkpoint, videos={"fps": 10, "max_frames": 12}),
    "videollama3, the authors'": partial(write_video_llama_3_checkpoint, layout="authors"),
}


@pytest.mark.few(
    "siglip", "naflex", "nvila s2", "ovis2.6 with experts", "llava-onevision", "llava original", "bee", "nanovlm",
    "smolvlm2", "videollama3, the authors'",
)  # fmt: skip
@pytest.mark.parametrize("name", WRITERS)
def test_every_family_looks_at_a_strip(
    name: str, strip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS[name](tmp_path / "model")
    assert main(["look", str(tmp_path / "model"), strip, "-o", str(tmp_path / "view.png"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["tokens", str(tmp_path / "model"), strip, "--json"]) == 0
    (expected,) = json.loads(capsys.readouterr().out)
    assert found == expected | {"view": str(tmp_path / "view.png")}
    assert Image.open(tmp_path / "view.png").width > 1000


@pytest.mark.few("ovis2.5-8", "llava original-12", "smolvlm2-12", "videollama3-12")
@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("ovis2.5", 8),
        ("ovis2.6", 8),
        ("llava-onevision", 12),
        ("llava original", 12),
        ("nvila", 8),
        ("smolvlm2", 12),
        ("videollama3", 12),
    ],
)
def test_a_video_is_looked_at_as_the_model_sees_it(
    name: str, frames: int, film_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS[name](tmp_path / "model")
    words = ["look", str(tmp_path / "model"), film_file, "--video", "-o", str(tmp_path / "view.png")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiles"] == frames
    assert main([*words, "--num-frames", "3"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'view.png'}: 3 tiles, ")


@pytest.mark.parametrize(
    ("name", "words", "complaint"),
    [
        ("siglip", ["--video"], "this model reads images, not videos"),
        ("nanovlm", ["--video"], "this model reads images, not videos"),
        ("nvila", ["--num-frames", "3"], "--num-frames is about a video"),
        ("nvila", ["--video", "--num-frames", "0"], "num_frames 0 is not between 1 and"),
    ],
)
def test_videos_that_cannot_be_looked_at(
    name: str, words: list[str], complaint: str, film_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS[name](tmp_path / "model")
    assert main(["look", str(tmp_path / "model"), film_file, "-o", str(tmp_path / "view.png"), *words]) == 2
    assert complaint in capsys.readouterr().err
