"""Tiles and patches against the reference's steps: Pillow's resize and crop, then transformers' SigLIP processor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from siglane.config.preprocess import RESAMPLES, PreprocessConfig
from siglane.config.projector import ProjectorConfig
from siglane.config.vision import PatchLayout, VisionConfig
from siglane.errors import ConfigError
from siglane.image.patchify import normalisation, patchify, to_patches
from siglane.image.resize import resize
from siglane.image.tile import render_tiles
from siglane.tiling.rule import ImageContext, PatchGeometry
from siglane.tiling.vila import VilaTiling
from siglane.types import DecodedImage, Grid, ImageLayout, Size

TILE, PATCH = 56, 14
RULE = VilaTiling(
    tile=Size(TILE, TILE),
    resample="bicubic",
    tiling="squash",
    min_tiles=1,
    max_tiles=12,
    s2_scales=(TILE, 2 * TILE, 3 * TILE),
    fill=(122, 116, 104),
)
PREPROCESS = PreprocessConfig(
    rule=RULE,
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    rescale=1 / 255,
)
VISION = VisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_channels=3,
    patch_size=PATCH,
    position_grid=Grid(4, 4),
    hidden_act="gelu_tanh",
    layer_norm_eps=1e-6,
    patch_layout="channel_first",
    position_resize="never",
    rope_theta=None,
    depth=1,
    post_norm=True,
    use_head=False,
)
PROJECTOR = ProjectorConfig(merge="blocks", factor=2, column_major=False, layers=(), input_size=8, output_size=8)
SIZES = [(56, 56), (64, 48), (48, 64), (192, 108), (300, 30), (31, 300), (1, 1), (7, 3), (100, 100)]


def picture(width: int, height: int, seed: int = 0) -> DecodedImage:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1)
    return DecodedImage.from_rgb(((smooth + rng.integers(0, 256, (height, width, 3))) // 2).astype(np.uint8))


def tiled(**changes: object) -> PreprocessConfig:
    return replace(PREPROCESS, rule=replace(RULE, **changes))


def layout_of(image: DecodedImage, preprocess: PreprocessConfig, *, alone: bool = True) -> ImageLayout:
    return preprocess.rule.image(image.size, PatchGeometry(PATCH, PROJECTOR), ImageContext(0, 1 if alone else 2))


# --- the reference, step by step ----------------------------------------------------------------------------------


def reference_tiling(image: Image.Image, columns: int, rows: int) -> list[Image.Image]:
    canvas = image.resize((columns * TILE, rows * TILE))  # Pillow's default filter, as VILA calls it
    crops = []
    for row in range(rows):
        for column in range(columns):
            crops.append(canvas.crop((column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE)))
    return crops


def reference_pad(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(value * 255) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def reference_patches(tiles: list[Image.Image], preprocess: PreprocessConfig) -> torch.Tensor:
    """f32 [patches, 3 * p * p], channel first; `unfold` is how a convolution reads its input."""
    processor = SiglipImageProcessorPil(
        size={"width": preprocess.rule.tile.width, "height": preprocess.rule.tile.height},
        resample=Image.Resampling[preprocess.rule.resample.upper()],
        image_mean=list(preprocess.mean),
        image_std=list(preprocess.std),
        rescale_factor=preprocess.rescale,
    )
    pixel_values = processor(tiles, return_tensors="pt")["pixel_values"].float()
    return torch.nn.functional.unfold(pixel_values, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)


def normalised(image: DecodedImage, layout: ImageLayout, preprocess: PreprocessConfig) -> torch.Tensor:
    scale, shift = normalisation(preprocess, VISION)
    return to_patches(image, layout, preprocess, VISION).pixels * scale + shift


def assert_same(ours: torch.Tensor, reference: torch.Tensor) -> None:
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() <= 1e-6


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "nearest"])
def test_squash(size: tuple[int, int], resample: str) -> None:
    image, preprocess = picture(*size), tiled(resample=resample)
    expected = reference_patches([Image.fromarray(image.rgb)], preprocess)
    assert_same(normalised(image, layout_of(image, preprocess), preprocess), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_pad(size: tuple[int, int], resample: str) -> None:
    image, preprocess = picture(*size), tiled(tiling="pad", resample=resample)
    expected = reference_patches([reference_pad(Image.fromarray(image.rgb), preprocess.mean)], preprocess)
    assert_same(normalised(image, layout_of(image, preprocess), preprocess), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_dynamic(size: tuple[int, int], resample: str) -> None:
    image, preprocess = picture(*size), tiled(tiling="dynamic", resample=resample, min_tiles=2)
    layout, pil = layout_of(image, preprocess), Image.fromarray(image.rgb)
    tiles = [*reference_tiling(pil, layout.arrangement.w, layout.arrangement.h), *reference_tiling(pil, 1, 1)]
    assert_same(normalised(image, layout, preprocess), reference_patches(tiles, preprocess))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_dynamic_s2(size: tuple[int, int], resample: str) -> None:
    image, preprocess = picture(*size), tiled(tiling="dynamic_s2", resample=resample)
    layout, pil = layout_of(image, preprocess), Image.fromarray(image.rgb)
    grids = [(1, 1), (2, 2), (layout.arrangement.w, layout.arrangement.h)]
    tiles = [tile for columns, rows in grids for tile in reference_tiling(pil, columns, rows)]
    assert_same(normalised(image, layout, preprocess), reference_patches(tiles, preprocess))


@pytest.mark.parametrize("tiling", ["dynamic", "dynamic_s2"])
@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_one_of_several_pictures_takes_the_processors_own_resize(tiling: str, resample: str) -> None:
    image, preprocess = picture(120, 50), tiled(tiling=tiling, resample=resample)
    expected = reference_patches([Image.fromarray(image.rgb)], preprocess)
    assert_same(normalised(image, layout_of(image, preprocess, alone=False), preprocess), expected)


@pytest.mark.parametrize("resample", RESAMPLES)
def test_resize_is_pillows(resample: str) -> None:
    rgb = picture(50, 37).rgb
    expected = Image.fromarray(rgb).resize((21, 80), Image.Resampling[resample.upper()])
    assert (resize(rgb, Size(21, 80), resample) == np.asarray(expected)).all()
    assert resize(rgb, Size(50, 37), resample) is rgb


def test_each_canvas_is_resized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[Size] = []
    monkeypatch.setattr(
        "siglane.image.tile.resize", lambda rgb, size, *how: sizes.append(size) or resize(rgb, size, *how)
    )
    image = picture(64, 48)
    render_tiles((image.rgb,), layout_of(image, tiled(tiling="dynamic_s2")))
    assert sizes == [Size(56, 56), Size(112, 112), Size(224, 168)]


def test_a_layout_of_another_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="the layout is for"):
        to_patches(picture(9, 8), layout_of(picture(8, 9), PREPROCESS), PREPROCESS, VISION)


# --- patches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_layout", ["channel_first", "channel_last"])
def test_patch_layout(patch_layout: PatchLayout) -> None:
    """A picture whose three channels hold its row, its column and its patch number."""
    height, width, p = 6, 9, 3
    y, x = np.mgrid[:height, :width]
    tile = np.stack([y, x, y // p * (width // p) + x // p], -1).astype(np.uint8)
    patches = patchify([tile], p, patch_layout)
    assert patches.dtype == torch.uint8
    assert patches.shape == (6, 27)
    for number, patch in enumerate(patches):
        cube = patch.reshape(3, p, p) if patch_layout == "channel_first" else patch.reshape(p, p, 3).permute(2, 0, 1)
        top, left = number // 3 * p, number % 3 * p
        assert cube[0].tolist() == [[top + dy] * p for dy in range(p)]
        assert cube[1].tolist() == [[left + dx for dx in range(p)]] * p
        assert (cube[2] == number).all()


@pytest.mark.parametrize("patch_layout", ["channel_first", "channel_last"])
def test_pixels_beyond_the_last_whole_patch_are_never_read(patch_layout: PatchLayout) -> None:
    tile = picture(384, 384).rgb
    changed = tile.copy()
    changed[378:], changed[:, 378:] = 0, 255
    patches = patchify([tile], 14, patch_layout)
    assert patches.shape == (27 * 27, 588)
    assert (patches == patchify([changed], 14, patch_layout)).all()
    changed[377, 377] ^= 255
    assert (patches != patchify([changed], 14, patch_layout)).any()


def test_tiles_of_different_sizes_follow_each_other() -> None:
    first, second = picture(28, 14).rgb, picture(14, 42).rgb
    together = patchify([first, second], 14, "channel_last")
    apart = [patchify([tile], 14, "channel_last") for tile in (first, second)]
    assert (together == torch.cat(apart)).all()
    assert together.shape == (5, 588)


@pytest.mark.parametrize("patch_layout", ["channel_first", "channel_last"])
def test_normalisation_in_patch_layout(patch_layout: PatchLayout) -> None:
    vision = replace(VISION, patch_layout=patch_layout)
    scale, shift = normalisation(PREPROCESS, vision)
    assert scale.shape == shift.shape == (vision.patch_dim,)
    assert scale.dtype == shift.dtype == torch.float32
    tile = picture(TILE, TILE).rgb
    mean, std = np.array(PREPROCESS.mean), np.array(PREPROCESS.std)
    exact = torch.from_numpy((tile / 255 - mean) / std)
    patches = exact.reshape(4, PATCH, 4, PATCH, 3)
    order = (0, 2, 4, 1, 3) if patch_layout == "channel_first" else (0, 2, 1, 3, 4)
    assert_same(patchify([tile], PATCH, patch_layout) * scale + shift, patches.permute(order).reshape(16, -1).float())


def test_towers_of_other_channels_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_channels 4"):
        normalisation(PREPROCESS, replace(VISION, num_channels=4))


# --- properties ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    tiling=st.sampled_from(["squash", "pad", "dynamic", "dynamic_s2"]),
    alone=st.booleans(),
)
def test_pixels_fit_every_layout(width: int, height: int, tiling: str, alone: bool) -> None:
    image = DecodedImage.from_rgb(np.full((height, width, 3), 77, np.uint8))
    preprocess = tiled(tiling=tiling)
    layout = layout_of(image, preprocess, alone=alone)
    patches = to_patches(image, layout, preprocess, VISION)
    assert patches.pixels.shape == (layout.patches, VISION.patch_dim)
    for tile, placed in zip(render_tiles((image.rgb,), layout), layout.tiles, strict=True):
        assert tile.shape == (TILE, TILE, 3)
        assert (tile.shape[0] // PATCH, tile.shape[1] // PATCH) == placed.grid
    if tiling != "pad":
        assert (patches.pixels == 77).all()


def test_same_input_same_output() -> None:
    preprocess = tiled(tiling="dynamic")
    first, second = (
        to_patches(image, layout_of(image, preprocess), preprocess, VISION) for image in (picture(90, 60),) * 2
    )
    assert (first.pixels == second.pixels).all()
    assert first.digest == second.digest


def test_every_option_changes_the_digest() -> None:
    image = picture(90, 60)
    flat_wide, flat_tall = (DecodedImage.from_rgb(np.full(shape, 9, np.uint8)) for shape in ((4, 16, 3), (16, 4, 3)))
    variants = [
        (image, PREPROCESS, VISION, True),
        (picture(90, 60, seed=1), PREPROCESS, VISION, True),
        (flat_wide, PREPROCESS, VISION, True),
        (flat_tall, PREPROCESS, VISION, True),
        (image, tiled(resample="bilinear"), VISION, True),
        (image, tiled(tiling="pad"), VISION, True),
        (image, tiled(tiling="dynamic"), VISION, True),
        (image, tiled(tiling="dynamic"), VISION, False),
        (image, replace(PREPROCESS, mean=(0.5, 0.5, 0.5)), VISION, True),
        (image, tiled(tile=Size(70, 70)), VISION, True),
        (image, PREPROCESS, replace(VISION, patch_layout="channel_last"), True),
        (image, replace(PREPROCESS, rescale=1 / 256), VISION, True),
    ]
    digests = [
        to_patches(image, layout_of(image, preprocess, alone=alone), preprocess, vision).digest
        for image, preprocess, vision, alone in variants
    ]
    assert len(set(digests)) == len(variants)
    assert {len(digest) for digest in digests} == {32}
