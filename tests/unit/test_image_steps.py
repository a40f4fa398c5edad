"""Tiles drawn in several steps: resizing in float, padding, shared steps drawn once, frames of clips, mixed types."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from siglane.config.preprocess import PreprocessConfig
from siglane.config.projector import vila_projector
from siglane.config.vision import PatchLayout, VisionConfig
from siglane.families.stack import VisionEncoderModel
from siglane.image import tile as tile_module
from siglane.image.patchify import normalisation, patchify, to_patches
from siglane.image.resize import resize, resize_in_float
from siglane.image.tile import render_tiles
from siglane.tiling.rule import PatchGeometry
from siglane.tiling.squash import Squash
from siglane.tiling.vila import VilaTiling
from siglane.types import (
    Box,
    DecodedImage,
    DecodedVideo,
    Grid,
    ImageLayout,
    ImagePatches,
    ImagePlaceholder,
    Pad,
    Resize,
    Size,
    Step,
    Tile,
    VideoSize,
    digest_of,
)

Rgb = npt.NDArray[np.uint8]
PATCH = 4
BLACK = (0, 0, 0)


def picture(width: int, height: int, seed: int = 0) -> Rgb:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def layout_of(source: Size, tiles: tuple[Tile, ...], *, frames: int = 0) -> ImageLayout:
    projected = tuple(tile.grid for tile in tiles)
    pieces = (ImagePlaceholder(sum(grid.area for grid in projected)),)
    return ImageLayout(source, tiles, pieces, Grid(1, len(tiles)), frames=frames, projected=projected)


def cut(steps: tuple[Step, ...], left: int = 0, top: int = 0, side: int = 8, frame: int = 0) -> Tile:
    return Tile(steps, Box(left, top, left + side, top + side), Grid(side // PATCH, side // PATCH), frame)


# --- resizing in float ----------------------------------------------------------------------------------------------


def filtered(x: float, resample: str) -> float:
    """Pillow's and torch's antialiasing filters: a triangle, and Keys' cubic with a = -0.5."""
    x = abs(x)
    if resample == "bilinear":
        return max(0.0, 1.0 - x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def weights(before: int, after: int, resample: str) -> npt.NDArray[np.float64]:
    """`[after, before]`: every output pixel is a weighted mean of the inputs below its filter, which is as wide as the
    output pixel where the picture shrinks."""
    ratio = before / after
    stretch, radius = max(ratio, 1.0), 1 if resample == "bilinear" else 2
    found = np.zeros((after, before))
    for place in range(after):
        centre = (place + 0.5) * ratio
        first = max(0, math.floor(centre - radius * stretch + 0.5))
        last = min(before, math.floor(centre + radius * stretch + 0.5))
        for source in range(first, last):
            found[place, source] = filtered((source + 0.5 - centre) / stretch, resample)
        found[place] /= found[place].sum()
    return found


SIZES = [Size(8, 8), Size(31, 5), Size(5, 40), Size(64, 48), Size(3, 100), Size(100, 3)]


class TestResizeInFloat:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("source", [Size(17, 23), Size(40, 9)])
    @pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
    def test_is_the_filters_definition(self, source: Size, size: Size, resample: Any) -> None:
        pixels = picture(*source)
        down, across = weights(source.height, size.height, resample), weights(source.width, size.width, resample)
        expected = np.einsum("ay,bx,yxc->abc", down, across, pixels.astype(np.float64))
        found = resize_in_float(pixels, size, resample)
        assert found.dtype == np.float32
        assert found.shape == (size.height, size.width, 3)
        np.testing.assert_allclose(found, expected, atol=1e-3)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
    def test_is_torchvisions_resize_of_a_float_tensor(self, size: Size, resample: Any) -> None:
        """`torchvision.transforms.v2.functional.resize` hands `[C, H, W]` to interpolate, antialiased, in one batch;
        neither rounded nor cut off. Its callers scale to 0..1 first, which commutes."""
        pixels = picture(37, 29)
        unit = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        reference = F.interpolate(
            unit[None], size=[size.height, size.width], mode=resample, align_corners=False, antialias=True
        )[0]
        found = torch.from_numpy(resize_in_float(pixels, size, resample)).permute(2, 0, 1) / 255
        torch.testing.assert_close(found, reference, atol=2e-6, rtol=0)

    def test_is_not_pillows(self) -> None:
        """Pillow rounds after each axis: the difference is below a grey level and a half, and it is there."""
        pixels = picture(64, 64)
        difference = np.abs(
            resize_in_float(pixels, Size(20, 20), "bilinear") - resize(pixels, Size(20, 20), "bilinear")
        )
        assert 0.1 < difference.max() < 1.5

    def test_shrinking_is_antialiased(self) -> None:
        """formats.md trap 21: without it a picture of one-pixel stripes would not become grey."""
        stripes = np.zeros((64, 64, 3), np.uint8)
        stripes[:, ::2] = 255
        found = resize_in_float(stripes, Size(16, 16), "bilinear")
        assert np.abs(found[:, 1:-1] - 127.5).max() < 1

    def test_float_pixels_keep_their_values(self) -> None:
        pixels = picture(9, 7).astype(np.float32) + 0.25
        same = resize_in_float(pixels, Size(9, 7), "bicubic")
        assert np.array_equal(same, pixels)
        assert not np.shares_memory(same, pixels)

    def test_a_read_only_picture_is_taken(self) -> None:
        pixels = picture(9, 7)
        pixels.flags.writeable = False
        assert np.array_equal(resize_in_float(pixels, Size(9, 7), "bilinear"), pixels)

    def test_filters_torch_does_not_have_are_refused(self) -> None:
        with pytest.raises(ValueError, match="bilinear or bicubic filters, not lanczos"):
            resize_in_float(picture(4, 4), Size(2, 2), "lanczos")

    def test_pillow_does_not_resize_float_pixels(self) -> None:
        with pytest.raises(ValueError, match="Pillow resizes 8-bit pixels"):
            resize(picture(4, 4).astype(np.float32), Size(2, 2), "bilinear")


# --- steps ----------------------------------------------------------------------------------------------------------

SMALL, LARGE = Resize(Size(12, 8), "bicubic"), Resize(Size(16, 16), "bilinear")
LETTERBOX = Pad(Size(16, 16), left=2, top=4, fill=(1, 2, 3))
IN_FLOAT = Resize(Size(8, 8), "bilinear", in_float=True)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the drawing functions in the order of their calls; they still draw."""
    calls: list[str] = []

    def watch(name: str) -> None:
        original = getattr(tile_module, name)
        monkeypatch.setattr(tile_module, name, lambda *given: calls.append(name) or original(*given))

    for name in ("resize", "resize_in_float", "pad"):
        watch(name)
    return calls


class TestSteps:
    def test_each_step_works_on_the_one_before(self) -> None:
        """Resized, put on a canvas, the canvas resized in float: by hand with Pillow and torch."""
        source = picture(30, 20)
        steps = (SMALL, LETTERBOX, IN_FLOAT)
        (found,) = render_tiles((source,), layout_of(Size(30, 20), (cut(steps),)))
        canvas = Image.new("RGB", (16, 16), (1, 2, 3))
        canvas.paste(Image.fromarray(source).resize((12, 8), Image.Resampling.BICUBIC), (2, 4))
        planes = torch.from_numpy(np.array(canvas, np.float32)).permute(2, 0, 1)[None]
        expected = F.interpolate(planes, size=(8, 8), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4)

    def test_pillow_may_pad_first(self) -> None:
        source = picture(10, 6)
        steps = (Pad(Size(10, 10), 0, 2, (9, 8, 7)), LARGE)
        (found,) = render_tiles((source,), layout_of(Size(10, 6), (cut(steps, side=16),)))
        canvas = Image.new("RGB", (10, 10), (9, 8, 7))
        canvas.paste(Image.fromarray(source), (0, 2))
        assert np.array_equal(found, np.asarray(canvas.resize((16, 16), Image.Resampling.BILINEAR)))

    def test_a_float_canvas_is_padded_as_float(self) -> None:
        steps = (IN_FLOAT, Pad(Size(12, 12), 2, 2, (10, 20, 30)))
        source = picture(33, 21)
        (found,) = render_tiles((source,), layout_of(Size(33, 21), (cut(steps, side=12),)))
        assert found.dtype == np.float32
        assert np.array_equal(found[2:10, 2:10], resize_in_float(source, Size(8, 8), "bilinear"))
        assert (found[:2] == (10, 20, 30)).all()
        assert (found[:, 10:] == (10, 20, 30)).all()

    def test_tiles_without_steps_are_cut_from_the_picture_itself(self) -> None:
        source = picture(16, 8)
        tiles = (cut((), 0), cut((), 8))
        found = render_tiles((source,), layout_of(Size(16, 8), tiles))
        assert np.array_equal(np.concatenate(found, axis=1), source)
        assert all(np.shares_memory(one, source) for one in found)

    def test_shared_steps_are_drawn_once(self, drawn: list[str]) -> None:
        """nanoVLM: tiles of the resized picture, and the whole of it resized once more."""
        whole, framed = (LARGE, IN_FLOAT), replace(LETTERBOX, size=Size(24, 24))
        tiles = (
            cut(whole),
            *(cut((LARGE,), x, y) for y in (0, 8) for x in (0, 8)),
            cut(whole),
            cut((LARGE, framed)),
        )
        source = picture(30, 20)
        found = render_tiles((source,), layout_of(Size(30, 20), tiles))
        assert drawn == ["resize", "resize_in_float", "pad"]
        canvas = np.asarray(Image.fromarray(source).resize((16, 16), Image.Resampling.BILINEAR))
        quarters = (canvas[:8, :8], canvas[:8, 8:], canvas[8:, :8], canvas[8:, 8:])
        assert all(np.array_equal(*pair) for pair in zip(found[1:5], quarters, strict=True))
        assert np.array_equal(found[0], resize_in_float(canvas, Size(8, 8), "bilinear"))
        assert np.array_equal(found[0], found[5])

    def test_steps_that_differ_in_anything_are_drawn_apart(self, drawn: list[str]) -> None:
        variants = (
            LARGE,
            Resize(Size(16, 16), "bicubic"),
            Resize(Size(16, 24), "bilinear"),
            Resize(Size(16, 16), "bilinear", in_float=True),
        )
        source = picture(30, 20)
        found = render_tiles((source,), layout_of(Size(30, 20), tuple(cut((step,)) for step in variants)))
        assert sorted(drawn) == ["resize", "resize", "resize", "resize_in_float"]
        for one, step in zip(found, variants, strict=True):
            function = resize_in_float if step.in_float else resize
            assert np.array_equal(one, function(source, step.size, step.resample)[:8, :8])


class TestFrames:
    def test_tiles_show_their_own_frame(self, drawn: list[str]) -> None:
        frames = [picture(20, 10, seed) for seed in range(3)]
        order = (2, 0, 1, 0)
        tiles = tuple(cut((SMALL,), frame=frame) for frame in order)
        found = render_tiles(frames, layout_of(Size(20, 10), tiles, frames=3))
        assert len(drawn) == 3  # frame 0 once
        for one, frame in zip(found, order, strict=True):
            assert np.array_equal(one, resize(frames[frame], SMALL.size, "bicubic")[:8, :8])
        assert not np.array_equal(found[0], found[1])

    @pytest.mark.parametrize(("frames", "count"), [(3, 2), (3, 4), (2, 1), (0, 2)])
    def test_another_number_of_frames_is_refused(self, frames: int, count: int) -> None:
        layout = layout_of(Size(20, 10), (cut((SMALL,)),), frames=frames)
        with pytest.raises(ValueError, match=f"{count} frames"):
            render_tiles([picture(20, 10)] * count, layout)

    def test_a_clip_becomes_patches_frame_after_frame(self) -> None:
        rule = VilaTiling(
            tile=Size(8, 8), resample="bicubic", tiling="dynamic", min_tiles=1, max_tiles=6, s2_scales=(), fill=BLACK
        )
        images = [DecodedImage.from_rgb(picture(30, 20, seed)) for seed in range(3)]
        geometry = PatchGeometry(PATCH, vila_projector("identity", input_size=8, output_size=8))
        layout = rule.video(VideoSize(Size(30, 20), 3), geometry)
        patches = to_patches(DecodedVideo.of(images), layout, preprocess(), vision())
        alone = [patchify([resize(image.rgb, Size(8, 8), "bicubic")], PATCH, "channel_first") for image in images]
        assert torch.equal(patches.pixels, torch.cat(alone))
        turned = to_patches(DecodedVideo.of(images[::-1]), layout, preprocess(), vision())
        assert turned.digest != patches.digest
        assert to_patches(DecodedVideo.of(images), layout, preprocess(), vision()).digest == patches.digest


# --- bytes beside floats --------------------------------------------------------------------------------------------


def vision(patch_layout: PatchLayout = "channel_first") -> VisionConfig:
    raw = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "num_hidden_layers": 1}
    config = VisionConfig.from_hf({**raw, "image_size": 8, "patch_size": PATCH}, feature_layer=-1, post_norm=True)
    return replace(config, patch_layout=patch_layout, use_head=False)


def preprocess() -> PreprocessConfig:
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    return PreprocessConfig(rule=Squash(tile=Size(8, 8), resample="bicubic"), mean=mean, std=std, rescale=1 / 255)


def patches_by_hand(tile: npt.NDArray[Any], patch_layout: PatchLayout) -> torch.Tensor:
    rows = []
    for top in range(0, tile.shape[0], PATCH):
        for left in range(0, tile.shape[1], PATCH):
            patch = tile[top : top + PATCH, left : left + PATCH]
            rows.append((patch.transpose(2, 0, 1) if patch_layout == "channel_first" else patch).flatten())
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("patch_layout", ["channel_first", "channel_last"])
class TestMixedTypes:
    def test_one_float_tile_makes_the_image_float(self, patch_layout: PatchLayout) -> None:
        byte, real = picture(8, 12), picture(12, 4).astype(np.float32) + 0.37
        expected = [patches_by_hand(tile, patch_layout) for tile in (byte, real)]
        mixed = patchify([byte, real, byte], PATCH, patch_layout)
        assert mixed.dtype == torch.float32
        assert torch.equal(mixed, torch.cat((expected[0].float(), expected[1], expected[0].float())))
        assert patchify([byte, byte], PATCH, patch_layout).dtype == torch.uint8
        assert torch.equal(patchify([real], PATCH, patch_layout), expected[1])

    def test_packing_takes_bytes_and_floats_in_any_order(self, patch_layout: PatchLayout) -> None:
        """Values by hand: (pixel / 255 - mean) / std of the pixel's channel, in float64."""
        model = VisionEncoderModel(vision(patch_layout), preprocess())
        byte, real = picture(8, 8), picture(8, 8, seed=1).astype(np.float32) + 0.37
        images = {
            "byte": image_patches(byte, patch_layout),
            "float": image_patches(real, patch_layout),
            "other byte": image_patches(picture(8, 8, seed=2), patch_layout),
        }
        assert images["byte"].pixels.dtype == torch.uint8
        assert images["float"].pixels.dtype == torch.float32
        for order in (["byte"], ["float"], ["byte", "float", "other byte"], ["float", "byte", "float"]):
            packed = model.pack([images[name] for name in order])
            assert packed.pixels.dtype == torch.float32
            assert packed.grids == (Grid(2, 2),) * len(order)
            exact = [normalised(images[name].pixels, patch_layout) for name in order]
            torch.testing.assert_close(packed.pixels.double(), torch.cat(exact), atol=1e-6, rtol=0)
            alone = [model.pack([images[name]]).pixels for name in order]
            assert torch.equal(packed.pixels, torch.cat(alone))

    def test_half_precision_is_rounded_once(self, patch_layout: PatchLayout) -> None:
        model = VisionEncoderModel(vision(patch_layout), preprocess())
        images = [image_patches(tile, patch_layout) for tile in (picture(8, 8), picture(8, 8, 1).astype(np.float32))]
        exact = model.pack(images).pixels
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.equal(model.to(dtype).pack(images).pixels, exact.to(dtype))


def image_patches(tile: npt.NDArray[Any], patch_layout: PatchLayout) -> ImagePatches:
    pixels = patchify([tile], PATCH, patch_layout)
    return ImagePatches(pixels, layout_of(Size(8, 8), (cut(()),)), digest_of(pixels.numpy().tobytes()))


def normalised(pixels: torch.Tensor, patch_layout: PatchLayout) -> torch.Tensor:
    shape = (-1, 3, PATCH, PATCH) if patch_layout == "channel_first" else (-1, PATCH, PATCH, 3)
    channel = 1 if patch_layout == "channel_first" else 3
    planes = pixels.double().reshape(shape).movedim(channel, -1)
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (preprocess().mean, preprocess().std))
    return ((planes / 255 - mean) / std).movedim(-1, channel).flatten(1)


def test_normalisation_covers_both() -> None:
    scale, shift = normalisation(preprocess(), vision())
    pixels = patchify([picture(8, 8)], PATCH, "channel_first")
    torch.testing.assert_close(
        (pixels * scale + shift).double(), normalised(pixels, "channel_first"), atol=1e-6, rtol=0
    )
