"""Projectors: how many rows, in which order, and the same numbers as the references' layers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest
import torch
from hypothesis import settings
from torch import nn

from siglane.config.projector import (
    ActivationLayer,
    LinearLayer,
    NormLayer,
    ProjectorConfig,
    llava_projector,
    pixel_shuffle_projector,
    vila_projector,
)
from siglane.errors import ConfigError
from siglane.nn.linear import ShardedModule
from siglane.projector.downsample import concatenate_blocks, merge_patches
from siglane.projector.mlp import Projector
from siglane.types import Grid

C, H = 6, 10  # channels per patch, width of the language model
PROPERTY = settings(max_examples=100, deadline=None, database=None)

# formats.md 5.3: kind -> the reference's nn.Sequential after the merge, by tensor index
Table = dict[int, nn.Module]
GELU = nn.GELU  # the exact one


def linear(before: int, after: int) -> nn.Module:
    return nn.Linear(before, after)


VILA: dict[str, tuple[int, Table]] = {
    "mlp2x_gelu": (1, {0: linear(C, H), 1: GELU(), 2: linear(H, H)}),
    "mlp3x_gelu": (1, {0: linear(C, H), 1: GELU(), 2: linear(H, H), 3: GELU(), 4: linear(H, H)}),
    "mlp_downsample": (2, {1: nn.LayerNorm(4 * C), 2: linear(4 * C, H), 3: GELU(), 4: linear(H, H)}),
    "mlp_downsample_2x2_fix": (2, {1: nn.LayerNorm(4 * C), 2: linear(4 * C, H), 3: GELU(), 4: linear(H, H)}),
    "mlp_downsample_3x3_fix": (
        3,
        {1: nn.LayerNorm(9 * C), 2: linear(9 * C, 3 * C), 3: GELU(), 4: nn.LayerNorm(3 * C), 5: linear(3 * C, H)}
        | {6: GELU(), 7: linear(H, H)},
    ),
    "mlp_downsample_3x3_s2": (
        3,
        {1: nn.LayerNorm(9 * C), 2: linear(9 * C, 3 * C), 3: GELU(), 4: nn.LayerNorm(3 * C), 5: linear(3 * C, C)}
        | {6: GELU(), 7: nn.LayerNorm(C), 8: linear(C, C // 3), 9: GELU(), 10: nn.LayerNorm(C // 3)}
        | {11: linear(C // 3, H), 12: GELU(), 13: linear(H, H)},
    ),
    "mlp_downsample_3x3_s2_new": (
        3,
        {1: nn.LayerNorm(9 * C), 2: linear(9 * C, 4 * C), 3: GELU(), 4: nn.LayerNorm(4 * C), 5: linear(4 * C, 2 * C)}
        | {6: GELU(), 7: nn.LayerNorm(2 * C), 8: linear(2 * C, C), 9: GELU(), 10: nn.LayerNorm(C)}
        | {11: linear(C, C // 3), 12: GELU(), 13: nn.LayerNorm(C // 3), 14: linear(C // 3, H), 15: GELU()}
        | {16: linear(H, H)},
    ),
}


def vila(kind: str, *, column_major: bool = False) -> ProjectorConfig:
    return vila_projector(kind, input_size=C, output_size=H, column_major=column_major)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Every parameter, norms and biases included: ones and zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.3)


def load(projector: Projector, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Fills `projector` from checkpoint tensors by the names in its config; returns the names that were used."""
    used = set()
    for number, layer in enumerate(projector.config.layers):
        if isinstance(layer, ActivationLayer):
            continue
        module = projector.layers[str(number)]
        for name, parameter in module.named_parameters():
            tensor = tensors[f"{layer.name}.{name}"]
            used.add(f"{layer.name}.{name}")
            if isinstance(module, ShardedModule):
                module.load_part(name, "", tensor)
            else:
                parameter.data.copy_(tensor)
    return used


def index_map(grid: Grid, channels: int) -> torch.Tensor:
    """`[1, h, w, c]` whose values say where they stand: row, column and channel as decimal digits."""
    rows, columns, depth = torch.arange(1, grid.h + 1), torch.arange(1, grid.w + 1), torch.arange(channels)
    return (rows[:, None, None] * 10000 + columns[None, :, None] * 100 + depth).float()[None]


def blocks_by_hand(maps: torch.Tensor, factor: int) -> torch.Tensor:
    """`[h, w, c]` -> `[H, W, factor * factor * c]`, one element at a time."""
    height, width, channels = maps.shape
    rows, columns = -(-height // factor), -(-width // factor)
    merged = torch.zeros(rows, columns, factor * factor * channels)
    for row, column, dr, dc in product(range(rows), range(columns), range(factor), range(factor)):
        y, x = row * factor + dr, column * factor + dc
        if y < height and x < width:  # beyond it: zeros
            start = (dr * factor + dc) * channels
            merged[row, column, start : start + channels] = maps[y, x]
    return merged


class TestRows:
    """The numbers the project was started with."""

    @pytest.mark.parametrize(
        ("side", "kind", "rows"),
        [
            (24, "mlp2x_gelu", 576),
            (24, "mlp_downsample", 144),
            (24, "mlp_downsample_3x3_fix", 64),
            (27, "mlp2x_gelu", 729),
            (27, "mlp_downsample", 196),
            (27, "mlp_downsample_3x3_fix", 81),
            (32, "mlp2x_gelu", 1024),
            (32, "mlp_downsample", 256),
            (32, "mlp_downsample_3x3_fix", 121),
            (32, "mlp_downsample_3x3_s2", 121),
            (32, "mlp_downsample_3x3_s2_new", 121),
            (24, "identity", 576),
        ],
    )
    @pytest.mark.parametrize("images", [1, 3])
    def test_so400m_features_become_rows_of_the_model(self, side: int, kind: str, rows: int, images: int) -> None:
        config = vila_projector(kind, input_size=1152, output_size=1536)
        with torch.device("meta"):  # the shapes of the real model, without its memory
            projector, features = Projector(config), torch.empty(images * side * side, 1152)
        width = 1152 if kind == "identity" else 1536
        assert projector(features, [Grid(side, side)] * images).shape == (images * rows, width)

    @pytest.mark.parametrize(("side", "factor", "rows"), [(32, 4, 64), (32, 2, 256), (16, 4, 16), (24, 3, 64)])
    def test_pixel_shuffle(self, side: int, factor: int, rows: int) -> None:
        config = pixel_shuffle_projector(factor, input_size=768, output_size=576)
        with torch.device("meta"):
            assert Projector(config)(torch.empty(side * side, 768), [Grid(side, side)]).shape == (rows, 576)


class TestOrder:
    @pytest.mark.parametrize("grid", [Grid(27, 27), Grid(32, 32), Grid(24, 24), Grid(5, 7), Grid(1, 1)])
    @pytest.mark.parametrize(("kind", "factor"), [("mlp_downsample", 2), ("mlp_downsample_3x3_fix", 3)])
    def test_neighbours_stand_side_by_side_and_missing_ones_are_zero(self, grid: Grid, kind: str, factor: int) -> None:
        maps = index_map(grid, C)
        merged = concatenate_blocks(maps, vila(kind))
        assert torch.equal(merged[0], blocks_by_hand(maps[0], factor).flatten(0, 1))

    def test_the_padding_is_at_the_bottom_and_right(self) -> None:
        last = concatenate_blocks(torch.ones(1, 27, 27, 1), vila("mlp_downsample"))[0, -1]
        assert last.tolist() == [1, 0, 0, 0]  # the corner block: its own patch, then right, below, both

    def test_the_order_is_row_column_channel(self) -> None:
        first = concatenate_blocks(index_map(Grid(4, 6), 2), vila("mlp_downsample"))[0, 0]
        assert first.tolist() == [10100, 10101, 10200, 10201, 20100, 20101, 20200, 20201]

    def test_column_major_rows_run_down_the_columns(self) -> None:
        maps = index_map(Grid(27, 24), C)
        by_rows = concatenate_blocks(maps, vila("mlp_downsample"))
        by_columns = concatenate_blocks(maps, vila("mlp_downsample", column_major=True))
        assert torch.equal(by_columns[0].unflatten(0, (12, 14)), by_rows[0].unflatten(0, (14, 12)).transpose(0, 1))
        assert not torch.equal(by_columns, by_rows)

    def test_pixel_shuffle_is_blocks_without_padding(self) -> None:
        maps = index_map(Grid(8, 12), C)
        config = pixel_shuffle_projector(4, input_size=C, output_size=H)
        assert torch.equal(merge_patches(maps, config)[0], blocks_by_hand(maps[0], 4).flatten(0, 1))
        with pytest.raises(ValueError, match="does not divide a grid of 9x12"):
            merge_patches(index_map(Grid(9, 12), C), config)


class TestLayers:
    @pytest.mark.parametrize("kind", VILA)
    def test_a_vila_projector_is_the_references_sequential(self, kind: str) -> None:
        factor, table = VILA[kind]
        reference = nn.Sequential(*table.values())
        randomise(reference)
        tensors = {
            f"layers.{index}.{name}": value
            for index, module in table.items()
            for name, value in module.named_parameters()
        }
        projector = Projector(vila(kind))
        assert load(projector, tensors) == set(tensors)
        maps = torch.randn(2, 7, 5, C, generator=torch.Generator().manual_seed(1))
        merged = torch.cat([blocks_by_hand(image, factor).flatten(0, 1) for image in maps])
        with torch.no_grad():
            ours = projector(maps.flatten(0, 2), [Grid(7, 5)] * 2)
            torch.testing.assert_close(ours, reference(merged), atol=2e-5, rtol=1e-5)

    def test_a_norm_uses_the_references_eps(self) -> None:
        """1e-5: with rows whose variance is as small, 1e-6 gives other numbers."""
        norms = [layer for layer in vila("mlp_downsample_3x3_fix").layers if isinstance(layer, NormLayer)]
        assert [(norm.name, norm.size, norm.eps) for norm in norms] == [
            ("layers.1", 9 * C, nn.LayerNorm(1).eps),
            ("layers.4", 3 * C, nn.LayerNorm(1).eps),
        ]

    @pytest.mark.parametrize(
        ("config", "names"),
        [
            (vila("identity"), []),
            (vila("linear"), ["layers"]),
            (llava_projector(input_size=C, output_size=H), ["linear_1", "linear_2"]),
            (pixel_shuffle_projector(2, input_size=C, output_size=H, name="MP.proj"), ["MP.proj"]),
        ],
    )
    def test_layers_have_the_checkpoints_names(self, config: ProjectorConfig, names: list[str]) -> None:
        assert [layer.name for layer in config.layers if isinstance(layer, LinearLayer)] == names

    def test_llavas_gelu_is_exact(self) -> None:
        config = llava_projector(input_size=C, output_size=H)
        assert config.layers[1] == ActivationLayer("gelu_erf")
        assert all(layer.bias for layer in config.layers if isinstance(layer, LinearLayer))

    def test_pixel_shuffle_has_no_bias(self) -> None:
        config = pixel_shuffle_projector(2, input_size=C, output_size=H)
        assert [name for name, _ in Projector(config).named_parameters()] == ["layers.0.weight"]

    @pytest.mark.parametrize(
        "kind",
        ["", "mlp", "mlp0x_gelu", "mlp17x_gelu", "mlp-1x_gelu", "mlp²x_gelu", "mlp٣x_gelu", "mlp2x_relu", "resampler"],
    )
    def test_an_unknown_kind_is_refused(self, kind: str) -> None:
        with pytest.raises(ConfigError, match="is not known; siglane knows identity, linear") as caught:
            vila(kind)
        assert repr(kind) in str(caught.value)


class TestPacking:
    @pytest.mark.parametrize(
        "config",
        [
            *(vila(kind) for kind in ("identity", "linear", *VILA)),
            vila("mlp_downsample", column_major=True),
        ],
        ids=lambda config: f"{config.merge}-{len(config.layers)}",
    )
    def test_mixed_grids_in_one_call_equal_each_alone(self, config: ProjectorConfig) -> None:
        projector = Projector(config)
        randomise(projector)
        grids = [Grid(4, 9), Grid(6, 6), Grid(6, 6), Grid(9, 4), Grid(1, 1), Grid(6, 6)]
        images = [torch.randn(grid.area, C, generator=torch.Generator().manual_seed(n)) for n, grid in enumerate(grids)]
        with torch.no_grad():
            together = projector(torch.cat(images), grids)
            alone = torch.cat([projector(image, [grid]) for image, grid in zip(images, grids, strict=True)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("grids", [[Grid(2, 2)], [Grid(2, 2), Grid(2, 3), Grid(1, 1)], []])
    def test_features_that_do_not_fill_the_grids_are_refused(self, grids: list[Grid]) -> None:
        with pytest.raises(ValueError, match="patches, got 10 rows"):
            Projector(vila("mlp2x_gelu"))(torch.zeros(10, C), grids)
