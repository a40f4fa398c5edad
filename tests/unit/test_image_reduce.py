"""JPEGs at a fraction of their size: when, how near to the whole ones, and never mixed up with them."""

from __future__ import annotations

import base64
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_spectra import photograph
from PIL import Image
from two_tower_checkpoint import write_two_tower_checkpoint

from siglane import Tagger, VisionEncoder
from siglane.cli.main import main
from siglane.config.preprocess import LOCAL_DECODE, PreprocessConfig
from siglane.config.vision import VisionConfig
from siglane.errors import ImageError
from siglane.families import pipeline
from siglane.families.pipeline import MediaPipeline
from siglane.families.registry import image_facts
from siglane.hosts.settings import SglangHostConfig
from siglane.image.decode import decode, decode_for
from siglane.image.patchify import to_patches
from siglane.image.reduce import FILTERS, LEFT_OVER, shrink_of
from siglane.image.tile import render_tiles
from siglane.media.item import MediaItem
from siglane.settings.options import read_environment
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import ImageBudget
from siglane.tiling.squash import Squash
from siglane.types import Box, DecodedImage, Grid, ImageLayout, Pad, ReducedImage, Resize, Size, Step, Tile
from siglane.weights.hub import Checkpoint

FAST = replace(LOCAL_DECODE, jpeg="fast")
MEAN = 0.5  # of 255, at most


def layout_of(source: Size, *steps: Step, frames: int = 0) -> ImageLayout:
    """One tile that shows all of the last canvas."""
    canvas = steps[-1].size if steps else source
    grid = Grid(canvas.height // 8, canvas.width // 8)
    tile = Tile(steps, Box(0, 0, *canvas), grid)
    return ImageLayout(source, (tile,), (), Grid(1, 1), frames=frames, projected=(grid,))


def jpeg(image: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=90, exif=exif, **options)
    return buffer.getvalue()


def difference(data: bytes, layout: ImageLayout) -> float:
    """Mean over all pixels of the tiles, of 255; the second way decoded fewer pixels."""
    exact, fast = decode(data, LOCAL_DECODE), decode_for(data, layout, FAST)
    assert isinstance(fast, ReducedImage)
    assert fast.rgb.size < exact.rgb.size / 3
    pairs = zip(render_tiles((exact.rgb,), layout), render_tiles((fast.rgb,), layout, fast.region), strict=True)
    return float(np.mean([np.abs(one.astype(float) - other).mean() for one, other in pairs]))


SMALL = Resize(Size(32, 32), "bicubic")
PREPROCESS = PreprocessConfig(
    rule=Squash(tile=SMALL.size, resample="bicubic"), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), rescale=1 / 255
)
VISION = VisionConfig.from_hf(
    {"image_size": 32, "patch_size": 8}, feature_layer=-1, post_norm=True, head=False, name="vision_config"
)


@pytest.mark.parametrize(
    ("source", "steps", "frames", "shrink"),
    [
        (Size(4000, 3000), (Resize(Size(384, 384), "bicubic"),), 0, 2),
        (Size(4000, 3000), (Resize(Size(224, 224), "bilinear"),), 0, 2),
        (Size(4000, 3000), (Resize(Size(200, 200), "lanczos"),), 0, 4),
        (Size(900, 900), (SMALL,), 0, 8),
        (Size(896, 223), (SMALL,), 0, 1),  # the side that shrinks least decides
        (Size(223, 896), (SMALL,), 0, 1),
        (Size(224, 224), (SMALL,), 0, 2),
        (Size(4000, 3000), (Resize(Size(384, 384), "box"),), 0, 1),
        (Size(4000, 3000), (Resize(Size(384, 384), "nearest"),), 0, 1),
        (Size(4000, 3000), (Resize(Size(384, 384), "bilinear", in_float=True),), 0, 1),
        (Size(4000, 3000), (Pad(Size(4000, 4000), 0, 500, (1, 2, 3)), SMALL), 0, 1),
        (Size(4000, 3000), (SMALL, Pad(Size(64, 64), 0, 0, (1, 2, 3))), 0, 8),
        (Size(4000, 3000), (), 0, 1),
        (Size(4000, 3000), (SMALL,), 1, 1),  # a video's frame
    ],
)
def test_when(source: Size, steps: tuple[Step, ...], frames: int, shrink: int) -> None:
    assert shrink_of(layout_of(source, *steps, frames=frames)) == shrink


def test_the_largest_of_several_tiles_decides() -> None:
    large, small = (layout_of(Size(900, 900), Resize(Size(side, side), "bicubic")).tiles[0] for side in (128, 32))
    both = replace(layout_of(Size(900, 900), SMALL), tiles=(small, large))
    assert shrink_of(both) == 2


@pytest.mark.few("0-2-bilinear", "0-8-lanczos", "2-4-bicubic", "2-8-hamming")
@pytest.mark.parametrize("resample", FILTERS)
@pytest.mark.parametrize("shrink", [2, 4, 8])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_how_near(resample: Any, shrink: int, subsampling: int) -> None:
    """At the least shrinking at which it is done, the worst case."""
    width, height = 1203, 901
    size = Size(int(width / shrink / LEFT_OVER), int(height / shrink / LEFT_OVER))
    layout = layout_of(Size(width, height), Resize(size, resample))
    assert shrink_of(layout) == shrink
    found = difference(jpeg(photograph(width, height), subsampling=subsampling), layout)
    assert 0 < found <= MEAN


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("width", "height"), [(453, 331), (450, 336), (449, 330)])
def test_whichever_way_up(orientation: int, width: int, height: int) -> None:
    """Also where the last blocks reach beyond the picture, whatever side they are turned to."""
    data = jpeg(photograph(width, height), orientation)
    source = decode(data, LOCAL_DECODE).size
    layout = layout_of(source, Resize(Size(source.width // 8, source.height // 8), "bicubic"))
    assert difference(data, layout) <= MEAN


@pytest.mark.parametrize("mode", ["L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_every_kind_of_jpeg(mode: str, progressive: bool) -> None:
    data = jpeg(photograph(600, 450).convert(mode), progressive=progressive)
    assert difference(data, layout_of(Size(600, 450), Resize(Size(64, 56), "bilinear"))) <= MEAN


def test_what_is_not_reduced_is_what_it_was() -> None:
    picture = photograph(600, 450)
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    much, little = (Resize(Size(side, side), "bicubic") for side in (32, 200))
    for data, step, config in (
        (buffer.getvalue(), much, FAST),
        (jpeg(picture), little, FAST),
        (jpeg(picture), much, LOCAL_DECODE),
    ):
        found = decode_for(data, layout_of(Size(600, 450), step), config)
        assert isinstance(found, DecodedImage)
        assert found.digest == decode(data, LOCAL_DECODE).digest


def test_a_damaged_one_is_refused_all_the_same() -> None:
    data, layout = jpeg(photograph(600, 450)), layout_of(Size(600, 450), SMALL)
    with pytest.raises(ImageError) as caught:
        decode_for(data[: len(data) // 2], layout, FAST)
    assert caught.value.code == "image_decode_failed"
    with pytest.raises(ImageError) as caught:
        decode_for(data, layout, replace(FAST, max_pixels=1000))
    assert caught.value.code == "image_too_large"
    whole = decode_for(data, layout, FAST)
    assert decode_for(data[:-2], layout, FAST).digest == whole.digest  # only the end marker is missing


def test_caches_never_take_one_for_the_other() -> None:
    """Patches are known by what they were made of: even of one grey, where all pixels are equal."""
    data, layout = jpeg(Image.new("RGB", (600, 450), (90, 90, 90))), layout_of(Size(600, 450), SMALL)
    exact, fast = (
        to_patches(decode_for(data, layout, one), layout, PREPROCESS, VISION) for one in (LOCAL_DECODE, FAST)
    )
    assert bool((exact.pixels == fast.pixels).all())
    assert exact.digest != fast.digest
    with pytest.raises(ValueError, match="the layout is for"):
        to_patches(decode_for(data, layout, FAST), layout_of(Size(450, 600), SMALL), PREPROCESS, VISION)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A SigLIP with both towers of 56 x 56 pixels, and a JPEG of ten times that."""
    folder = tmp_path_factory.mktemp("reduced")
    write_two_tower_checkpoint(folder / "siglip")
    (folder / "picture.jpg").write_bytes(jpeg(photograph(640, 560)))
    return folder / "siglip", folder / "picture.jpg"


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How each picture was decoded for its layout, in order."""
    kinds: list[str] = []

    def seen(*arguments: Any) -> DecodedImage | ReducedImage:
        found = decode_for(*arguments)
        kinds.append(type(found).__name__)
        return found

    monkeypatch.setattr(pipeline, "decode_for", seen)
    return kinds


@pytest.mark.parametrize("rule", ["exact", "fast"])
def test_every_way_in_obeys(
    rule: Any, paths: tuple[Path, Path], reduced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python, the commands, a server's settings and a host's environment."""
    model, file = paths
    config = replace(LOCAL_DECODE, jpeg=rule)
    VisionEncoder(model, device="cpu", decode=config).encode([file])
    Tagger(model, device="cpu", decode=config).tag([file], ["a cat"])
    words = ["--device", "cpu", "--image-decode", rule]
    (tmp_path / "labels.txt").write_text("a cat")
    assert main(["tag", str(model), str(file), "--labels", str(tmp_path / "labels.txt"), *words]) == 0
    assert main(["embed", str(model), str(file), "-o", str(tmp_path / "rows.jsonl"), *words]) == 0
    assert main(["encode", str(model), str(file), "-o", str(tmp_path / "rows.safetensors"), *words]) == 0
    assert main(["look", str(model), str(file), "-o", str(tmp_path / "look.png"), "--image-decode", rule]) == 0
    facts = image_facts(Checkpoint(model))
    monkeypatch.setenv("SIGLANE_IMAGE_DECODE", rule)
    for settings in (
        ServerConfig(image_decode=rule),
        read_environment(SglangHostConfig),
    ):
        item = MediaItem(data_url(file.read_bytes()), "messages[0]")
        MediaPipeline.for_clients(settings, facts, ImageBudget()).prepare([item])
    assert reduced == ["ReducedImage"] * (8 if rule == "fast" else 0)


def test_another_way_is_another_job(paths: tuple[Path, Path], tmp_path: Path, capsys: Any) -> None:
    """Rows that were begun with one are not continued with the other."""
    model, file = paths
    words = ["embed", str(model), str(file), "-o", str(tmp_path / "rows.jsonl"), "--device", "cpu", "--image-decode"]
    assert main([*words, "exact"]) == 0
    assert main([*words, "fast"]) == 2
    assert "image_decode was" in capsys.readouterr().err


def data_url(data: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
