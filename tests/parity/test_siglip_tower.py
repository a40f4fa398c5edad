"""The tower against transformers' SiglipVisionModel: every intermediate, not only the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from checkpoints import randomise
from parity_kit import assert_parity, filled
from transformers import SiglipVisionConfig
from transformers import SiglipVisionModel as SiglipReference

from siglane.config.vision import PositionResize, VisionConfig
from siglane.types import Grid, PackedPatches
from siglane.vision.position import PositionEmbedding
from siglane.vision.tower import SiglipVisionModel, tower_plan

ReferenceTower = Any  # transformers leaves it untyped


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    inner: int
    layers: int
    image: int
    patch: int
    act: str = "gelu_pytorch_tanh"
    channels: int = 3


SHAPES = {
    "head_dim 16": Shape(hidden=64, heads=4, inner=96, layers=3, image=32, patch=8),
    "head_dim 72, image not a multiple": Shape(hidden=144, heads=2, inner=269, layers=2, image=48, patch=14),
    "head_dim 5, odd widths": Shape(hidden=15, heads=3, inner=7, layers=4, image=29, patch=3),
    "one head, one channel": Shape(hidden=24, heads=1, inner=48, layers=2, image=16, patch=4, channels=1),
    "exact gelu": Shape(hidden=32, heads=4, inner=64, layers=2, image=16, patch=8, act="gelu"),
    "quick gelu": Shape(hidden=32, heads=4, inner=64, layers=2, image=16, patch=8, act="quick_gelu"),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def reference_tower(shape: Shape, seed: int, *, layer_norm_eps: float = 1e-6) -> ReferenceTower:
    config = SiglipVisionConfig(
        hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_channels=shape.channels, image_size=shape.image, patch_size=shape.patch,
        hidden_act=shape.act, layer_norm_eps=layer_norm_eps,
    )  # fmt: skip
    model: ReferenceTower = SiglipReference(config)
    model.eval()
    model.set_attn_implementation("eager")
    randomise(model, seed, by_width=True)
    return model


def our_tower(reference: ReferenceTower, *, feature_layer: int = -1, post_norm: bool = True) -> SiglipVisionModel:
    raw = reference.config.to_dict()
    config = VisionConfig.from_hf(raw, feature_layer=feature_layer, post_norm=post_norm)
    tower, unused = filled(SiglipVisionModel(config), tower_plan(config), reference)
    assert unused == set()
    return tower


def pictures(shape: Shape, count: int, seed: int) -> torch.Tensor:
    """`[count, channels, image, image]` in -1..1; the last picture is nearly flat, which shows a wrong eps."""
    pixels = torch.rand(count, shape.channels, shape.image, shape.image, generator=torch.Generator().manual_seed(seed))
    pixels = pixels * 2 - 1
    pixels[-1] *= 1e-3
    return pixels


def patchify(pixels: torch.Tensor, patch: int) -> PackedPatches:
    """Cuts `[B, c, H, W]` into patches by strides alone: rows of patches, then columns; channel, y, x inside."""
    grid = Grid(pixels.shape[2] // patch, pixels.shape[3] // patch)
    cut = pixels[:, :, : grid.h * patch, : grid.w * patch].unflatten(3, (grid.w, patch)).unflatten(2, (grid.h, patch))
    return PackedPatches(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2), (grid,) * len(pixels))


@EVERY_SHAPE
@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_every_tap_is_the_references(shape: Shape, seed: int) -> None:
    reference = reference_tower(shape, seed)
    tower = our_tower(reference)
    pixels = pictures(shape, 3, seed)
    packed = patchify(pixels, shape.patch)
    taps: dict[str, torch.Tensor] = {}
    features = tower(packed, taps)
    theirs = reference(pixels, output_hidden_states=True)

    expected = {"patch_embedding": reference.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)}
    names = ["positions", *(f"block.{number}" for number in range(shape.layers))]
    expected |= dict(zip(names, theirs.hidden_states, strict=True))
    expected["features"] = theirs.last_hidden_state
    assert list(taps) == list(expected)
    for name, value in expected.items():
        assert_parity(name, taps[name], value.flatten(0, 1))
    assert_parity("pooled", tower.pool(features, packed.grids), theirs.pooler_output)


@EVERY_SHAPE
@pytest.mark.parametrize("layer", [-1, -2])
@torch.no_grad()
def test_features_of_a_layer_are_the_references_hidden_states(shape: Shape, layer: int) -> None:
    reference = reference_tower(shape, seed=3)
    raw = reference.config.to_dict() | {"vision_use_head": False}
    config = VisionConfig.from_hf(raw, feature_layer=layer, post_norm=False)
    tower, unused = filled(SiglipVisionModel(config), tower_plan(config), reference)
    pixels = pictures(shape, 2, seed=3)
    theirs = reference(pixels, output_hidden_states=True).hidden_states[layer]
    assert_parity("features", tower(patchify(pixels, shape.patch)), theirs.flatten(0, 1))
    not_run = ("head.", "post_layernorm.", *([f"encoder.layers.{shape.layers - 1}."] if layer == -2 else []))
    assert unused == {name for name in reference.state_dict() if name.startswith(not_run)}


@torch.no_grad()
def test_the_pixels_beyond_the_last_whole_patch_are_not_read() -> None:
    shape = SHAPES["head_dim 72, image not a multiple"]
    reference = reference_tower(shape, seed=4)
    pixels = pictures(shape, 1, seed=4)
    changed = pixels.clone()
    changed[:, :, 42:] = changed[:, :, :, 42:] = 9.0  # 48 = 3 * 14 + 6
    assert torch.equal(patchify(pixels, 14).pixels, patchify(changed, 14).pixels)
    assert_parity("features", our_tower(reference)(patchify(pixels, 14)), reference(changed).last_hidden_state[0])


@torch.no_grad()
def test_a_patch_may_be_stored_with_its_channels_last() -> None:
    """The same convolution read from (y, x, channel) patches, as NaFlex processors give them."""
    shape = SHAPES["head_dim 16"]
    reference = reference_tower(shape, seed=5)
    first = our_tower(reference)
    config = replace(first.config, patch_layout="channel_last")
    last, _ = filled(SiglipVisionModel(config), tower_plan(config), reference)
    packed = patchify(pictures(shape, 2, seed=5), shape.patch)
    turned = packed.pixels.unflatten(1, (3, 8, 8)).permute(0, 2, 3, 1).flatten(1)
    assert_parity("features", last(PackedPatches(turned, packed.grids)), first(packed))


@torch.no_grad()
def test_the_norms_use_the_eps_of_the_config() -> None:
    shape = SHAPES["head_dim 16"]
    reference = reference_tower(shape, seed=6, layer_norm_eps=0.5)
    pixels = pictures(shape, 2, seed=6)
    ours = our_tower(reference)(patchify(pixels, shape.patch))
    assert_parity("features", ours, reference(pixels).last_hidden_state.flatten(0, 1))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 24), (16, 64), (24, 40), (8, 80)])
@torch.no_grad()
def test_bicubic_positions_are_the_references_interpolation(height: int, width: int) -> None:
    """(16, 64) has as many patches as the table, on another grid."""
    shape = SHAPES["head_dim 16"]
    reference = reference_tower(shape, seed=7)
    native = our_tower(reference)
    config = replace(native.config, position_resize="bicubic")
    tower, _ = filled(SiglipVisionModel(config), tower_plan(config), reference)
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(7))
    packed = patchify(pixels, shape.patch)
    theirs = reference(pixels, interpolate_pos_encoding=True)
    assert_parity("features", tower(packed), theirs.last_hidden_state.flatten(0, 1))
    if packed.grids[0] != native.config.position_grid:
        with pytest.raises(ValueError, match="positions for a grid of 4x4, not"):
            native(packed)


@pytest.mark.parametrize("grid", [Grid(8, 8), Grid(20, 12), Grid(3, 29), Grid(16, 16), Grid(1, 1)])
@torch.no_grad()
def test_antialiased_positions_are_naflexs(grid: Grid) -> None:
    from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

    table = torch.randn(256, 8, generator=torch.Generator().manual_seed(8))
    positions = position_embedding(Grid(16, 16), "bilinear_antialias", table)
    resize: Any = Siglip2VisionEmbeddings.resize_positional_embeddings
    theirs = resize(table.unflatten(0, (16, 16)), torch.tensor([grid]), grid.area)
    assert_parity("positions", positions.table(grid), theirs[0])


def position_embedding(grid: Grid, rule: PositionResize, table: torch.Tensor) -> PositionEmbedding:
    raw = {"hidden_size": 8, "num_attention_heads": 1, "image_size": 16 * grid.h}
    config = VisionConfig.from_hf(raw, feature_layer=-1, post_norm=True)
    positions = PositionEmbedding(replace(config, position_resize=rule))
    positions.load_part("weight", "", table)
    return positions


@torch.no_grad()
def test_the_three_gelus_are_told_apart() -> None:
    """A tower that ignored the name would give one answer, not three."""
    shape = SHAPES["head_dim 16"]
    reference = reference_tower(shape, seed=9)
    packed = patchify(pictures(shape, 1, seed=9), shape.patch)
    answers = []
    for activation in ("gelu_tanh", "gelu_erf", "quick_gelu"):
        config = replace(our_tower(reference).config, hidden_act=activation)
        tower, _ = filled(SiglipVisionModel(config), tower_plan(config), reference)
        answers.append(tower(packed))
    assert (answers[0] - answers[1]).abs().max() > 2e-4
    assert (answers[0] - answers[2]).abs().max() > 1e-2


@torch.no_grad()
def test_a_tower_without_a_head_does_not_pool() -> None:
    reference = reference_tower(SHAPES["exact gelu"], seed=10)
    config = replace(our_tower(reference).config, use_head=False)
    with pytest.raises(ValueError, match="no pooling head"):
        SiglipVisionModel(config).pool(torch.zeros(4, 32), [Grid(2, 2)])


@pytest.mark.parametrize(
    ("name", "part", "shape"),
    [
        ("patch_embedding.weight", "", (64, 3, 8, 7)),
        ("patch_embedding.weight", "", (64, 191)),
        ("patch_embedding.bias", "", (63,)),
        ("position_embedding.weight", "", (17, 64)),
        ("blocks.0.attention.qkv.weight", "q", (64, 63)),
        ("blocks.0.attention.qkv.bias", "v", (192,)),
        ("blocks.0.attention.out_proj.weight", "", (32, 64)),
        ("blocks.0.attention.out_proj.bias", "", (1,)),
        ("blocks.0.mlp.fc1.weight", "", (64, 96)),
        ("blocks.0.mlp.fc2.weight", "", (96, 64)),
    ],
)
def test_a_tensor_of_another_shape_is_refused(name: str, part: str, shape: tuple[int, ...]) -> None:
    tower = our_tower(reference_tower(SHAPES["head_dim 16"], seed=11))
    path, _, leaf = name.rpartition(".")
    owner = tower.get_submodule(path)
    with pytest.raises(ValueError, match=r"has shape \[.*\], the model needs \["):
        owner.load_part(leaf, part, torch.zeros(shape))
