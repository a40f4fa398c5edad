"""SigLIP2 NaFlex against transformers' Siglip2VisionModel, on pictures of awkward shapes and several budgets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_siglip_checkpoint
from parity_kit import assert_parity, patches_of, picture
from PIL import Image
from siglip2_checkpoint import PATCH, write_siglip2_checkpoint
from transformers.models.siglip2.image_processing_pil_siglip2 import (
    Siglip2ImageProcessorPil,
    get_image_size_for_max_num_patches,
)

from siglane import VisionEncoder, convert_from_packing_format, convert_to_packing_format, encode_packed
from siglane.errors import ConfigError
from siglane.families.model import load_vision
from siglane.tiling.rule import ImageBudget
from siglane.types import Grid, PackedPatches
from siglane.verify.references.siglip2 import Siglip2
from siglane.weights.hub import open_checkpoint

SIZES = [(1, 1), (17, 400), (400, 17), (64, 48), (123, 77), (640, 480), (224, 224), (31, 33)]


def reference_outputs(tower, images, budget):
    """last_hidden_state per image without padding, and pooler_output; pixels by the reference's own processor."""
    processor = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=budget)
    inputs = processor(images=images, return_tensors="pt")
    with torch.no_grad():
        out = tower(**inputs)
    shapes = inputs["spatial_shapes"].tolist()
    return (
        [rows[: h * w] for rows, (h, w) in zip(out.last_hidden_state, shapes, strict=True)],
        out.pooler_output,
        shapes,
    )


@pytest.mark.few("False-64", "True-16", "True-256")
@pytest.mark.parametrize("budget", [16, 64, 256])
@pytest.mark.parametrize("full", [False, True])
def test_features_and_pooled_vectors_are_the_references(tmp_path: Path, budget: int, full: bool) -> None:
    tower = write_siglip2_checkpoint(tmp_path, budget=budget, full=full)
    images = [picture(*size, seed=number) for number, size in enumerate(SIZES)]
    expected, pooled, shapes = reference_outputs(tower, images, budget)
    for ours, reference in zip(VisionEncoder(tmp_path).encode(images), expected, strict=True):
        assert_parity("rows", ours, reference)
    model, processor = load_vision(open_checkpoint(tmp_path), device="cpu", dtype=torch.float32, head=True)
    patches = patches_of(processor, images)
    assert [list(one.layout.grids[0]) for one in patches] == shapes
    with torch.no_grad():
        assert_parity("rows", model.embeddings(patches), pooled)


def test_every_tap(tmp_path: Path) -> None:
    write_siglip2_checkpoint(tmp_path)
    model, _ = load_vision(open_checkpoint(tmp_path), device="cpu", dtype=torch.float32, head=True)
    torch.manual_seed(0)
    pixels = [torch.randn(3, h * PATCH, w * PATCH) for h, w in ((3, 5), (4, 4), (7, 2), (1, 9))]
    expected = Siglip2(tmp_path, torch.device("cpu"), torch.float32).encoded(pixels)
    hidden_states, grid_thw = convert_to_packing_format(pixels, PATCH)
    taps = {"preprocessing": hidden_states}
    with torch.no_grad():
        features = encode_packed(model.tower, hidden_states, grid_thw, taps)
        taps["pooled"] = model.tower.pool(features, [Grid(h, w) for _, h, w in grid_thw.tolist()])
    assert set(expected) == set(taps)
    for name, rows in expected.items():
        assert_parity(name, taps[name], rows)


def test_alone_packed_and_reordered_agree(tmp_path: Path) -> None:
    write_siglip2_checkpoint(tmp_path)
    model, _ = load_vision(open_checkpoint(tmp_path), device="cpu", dtype=torch.float32)
    torch.manual_seed(1)
    grids = [(4, 9), (6, 6), (9, 4), (6, 6), (1, 1), (1, 36), (2, 3)]  # equal counts with different grids
    pixels = [torch.randn(3, h * PATCH, w * PATCH) for h, w in grids]

    def encode(order: list[int]) -> dict[int, torch.Tensor]:
        hidden_states, grid_thw = convert_to_packing_format([pixels[number] for number in order], PATCH)
        with torch.no_grad():
            features = encode_packed(model.tower, hidden_states, grid_thw)
        return dict(zip(order, features.split([h * w for _, h, w in grid_thw.tolist()]), strict=True))

    every = list(range(len(grids)))
    together, backwards = encode(every), encode(every[::-1])
    for number in every:
        alone = encode([number])[number]
        assert (together[number] - alone).abs().max() <= 1e-5
        assert (backwards[number] - alone).abs().max() <= 1e-5


def test_frames_are_pictures_of_their_own(tmp_path: Path) -> None:
    write_siglip2_checkpoint(tmp_path)
    model, _ = load_vision(open_checkpoint(tmp_path), device="cpu", dtype=torch.float32)
    torch.manual_seed(2)
    clip = torch.randn(3, 3, 2 * PATCH, 5 * PATCH)
    clip[2] = clip[0]
    packed, grid_thw = convert_to_packing_format([clip], PATCH)
    assert grid_thw.tolist() == [[3, 2, 5]]
    frames, grids = convert_to_packing_format(clip, PATCH)
    assert grids.tolist() == [[1, 2, 5]] * 3
    with torch.no_grad():
        features = encode_packed(model.tower, packed, grid_thw)
        assert torch.equal(packed, frames)
        assert (features - encode_packed(model.tower, frames, grids)).abs().max() <= 1e-6
    first, second, third = features.split(10)
    assert (first - third).abs().max() <= 1e-6
    assert (first - second).abs().max() > 1e-2


def test_the_learned_grid_equals_the_fixed_resolution_model(tmp_path: Path) -> None:
    """formats.md 2.2: the same weights, the convolution as a linear layer, at the grid the table was learned on."""
    reference = write_siglip_checkpoint(tmp_path / "fixed", image_size=56)
    state = {name.removeprefix("vision_model."): value for name, value in reference.tower.state_dict().items()}
    folder = tmp_path / "naflex"
    folder.mkdir()
    config = json.loads((tmp_path / "fixed/config.json").read_text())
    config |= {"model_type": "siglip2_vision_model", "num_patches": 16}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 14, "max_num_patches": 16}))
    weight = state["embeddings.patch_embedding.weight"]
    state["embeddings.patch_embedding.weight"] = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    from safetensors.torch import save_file

    save_file(
        {name: value.detach().contiguous().clone() for name, value in state.items()}, folder / "model.safetensors"
    )
    image = picture(56, 56)
    fixed, naflex = VisionEncoder(tmp_path / "fixed").encode([image]), VisionEncoder(folder).encode([image])
    assert (fixed[0] - naflex[0]).abs().max() <= 1e-5


def test_packing_format_is_row_major_and_channel_last() -> None:
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(4.0), indexing="ij")
    image = torch.stack((y, x, 10 * y + x))
    hidden_states, grid_thw = convert_to_packing_format([image], 2)
    assert grid_thw.tolist() == [[1, 3, 2]]
    for row, patch in enumerate(hidden_states):
        for position, (dy, dx) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
            top, left = row // 2 * 2 + dy, row % 2 * 2 + dx
            assert patch[3 * position : 3 * position + 3].tolist() == [top, left, 10 * top + left]
    assert torch.equal(convert_from_packing_format(hidden_states, grid_thw, 2)[0][0], image)


def test_round_trip_of_pictures_of_any_shape() -> None:
    torch.manual_seed(0)
    pictures = [torch.randn(3, 4, 10), torch.randn(2, 3, 6, 2), torch.randn(3, 2, 2)]
    back = convert_from_packing_format(*convert_to_packing_format(pictures, 2), 2)
    for picture_, again in zip(pictures, back, strict=True):
        assert torch.equal(again, picture_ if picture_.ndim == 4 else picture_[None])


def test_a_channel_first_tower_reads_the_same_format(tmp_path: Path) -> None:
    reference = write_siglip_checkpoint(tmp_path)
    model, _ = load_vision(open_checkpoint(tmp_path), device="cpu", dtype=torch.float32)
    torch.manual_seed(3)
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = reference.tower(pixel_values=pixels).last_hidden_state.flatten(0, 1)
        assert_parity("rows", encode_packed(model.tower, *convert_to_packing_format(pixels, 14)), expected)


@pytest.mark.parametrize(
    ("grid_thw", "complaint"),
    [
        ([[1, 2, 2]], "grid_thw holds 4 patches"),
        ([[1, 2]], r"\[n, 3\]"),
        ([], r"\[n, 3\]"),
        ([[1, 3, 0]], "positive"),
        ([[1, 3.0, 2]], "positive"),
        (torch.tensor([[[1, 3, 2]]]), r"\[n, 3\]"),
    ],
)
def test_grids_that_do_not_fit_are_refused(tmp_path: Path, grid_thw, complaint: str) -> None:
    write_siglip2_checkpoint(tmp_path)
    encoder = VisionEncoder(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        encoder.encode_packed(torch.zeros(6, 3 * PATCH**2), grid_thw)
    with pytest.raises(ValueError, match="values per patch"):
        encoder.encode_packed(torch.zeros(6, 5), [[1, 2, 3]])


@pytest.mark.parametrize("shape", [(3, 17, 16), (1, 16, 16), (16, 16)])
def test_pictures_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images"):
        convert_to_packing_format([torch.zeros(shape)], PATCH)


def test_budgets(tmp_path: Path) -> None:
    write_siglip2_checkpoint(tmp_path, budget=64)
    image = picture(640, 480)

    def patches(**budget) -> int:
        return len(VisionEncoder(tmp_path, budget=ImageBudget(**budget)).encode([image])[0])

    for most, budget in (
        (64, {}), (16, {"detail": "low"}), (256, {"detail": "high"}), (100, {"max_num_patches": 100}),
        (30, {"detail": "high", "max_num_patches": 30}), (200, {"detail": "original", "max_num_patches": 200}),
    ):  # fmt: skip
        height, width = get_image_size_for_max_num_patches(480, 640, PATCH, most)
        assert patches(**budget) == height * width // PATCH**2, budget
    assert patches(detail="original") == 40 * 30


def test_packed_api_is_a_class_of_the_tower(tmp_path: Path) -> None:
    """`VisionEncoder.encode` and `encode_packed` are one forward."""
    write_siglip2_checkpoint(tmp_path)
    encoder = VisionEncoder(tmp_path)
    image = picture(64, 48)
    features = encoder.encode([image])[0]
    target = get_image_size_for_max_num_patches(48, 64, PATCH, 64)
    resized = np.array(image.resize(target[::-1], Image.Resampling.BILINEAR))
    pixels = (torch.from_numpy(resized).permute(2, 0, 1).float() / 255 - 0.5) / 0.5
    packed = encoder.encode_packed(*convert_to_packing_format([pixels], PATCH))
    assert (packed - features).abs().max() <= 1e-5
    grid = Grid(target[0] // PATCH, target[1] // PATCH)
    assert PackedPatches(convert_to_packing_format([pixels], PATCH)[0], (grid,)).grids == (grid,)


@pytest.mark.parametrize(
    ("file", "changes", "complaint"),
    [
        ("config.json", {"num_patches": 15}, "num_patches 15 is not a square"),
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size 14 is not the tower's 16"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize false"),
        ("preprocessor_config.json", {"max_num_patches": 0}, "max_num_patches"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, file: str, changes: dict[str, object], complaint: str) -> None:
    write_siglip2_checkpoint(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=complaint):
        VisionEncoder(tmp_path)
