"""Learned positions on other grids: the references' interpolation, and a cache that nobody notices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from siglane.config.vision import PositionResize, VisionConfig
from siglane.types import Grid, PackedPatches
from siglane.vision import position
from siglane.vision.position import PositionEmbedding
from siglane.vision.tower import SiglipVisionModel

LEARNED, SMALL = Grid(16, 16), Grid(4, 6)
GRIDS = [Grid(8, 8), Grid(20, 12), Grid(1, 236), Grid(236, 1), Grid(17, 16), LEARNED]
RULES: tuple[PositionResize, ...] = ("bilinear_antialias", "bicubic")


def config_of(rule: PositionResize, grid: Grid = LEARNED, width: int = 8) -> VisionConfig:
    raw = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 1}
    config = VisionConfig.from_hf({**raw, "image_size": 16, "patch_size": 2}, feature_layer=-1, post_norm=True)
    return replace(config, position_resize=rule, position_grid=grid, use_head=False)


def embedding(rule: PositionResize, grid: Grid = LEARNED, dtype: torch.dtype = torch.float32) -> PositionEmbedding:
    """Frozen, as `weights/load.py` leaves it."""
    module = PositionEmbedding(config_of(rule, grid)).to(dtype).requires_grad_(False)
    fill(module, seed=0)
    return module


def fill(module: PositionEmbedding, seed: int) -> None:
    with torch.no_grad():
        module.weight.copy_(torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(seed)))


def interpolated(weight: torch.Tensor, rule: PositionResize, learned: Grid, grid: Grid) -> torch.Tensor:
    """As transformers' Siglip2 and AIDC-AI's Ovis2.5 call torch; a grid of one column by way of its transpose, because
    torch's antialiasing on CPUs is wrong there (`test_is_the_filters_definition` says what is right)."""
    picture = weight.detach().float().reshape(learned.h, learned.w, -1).permute(2, 0, 1).unsqueeze(0)
    if rule == "bilinear_antialias" and grid.w == 1:
        picture, grid = picture.transpose(2, 3), Grid(1, grid.h)
    if rule == "bilinear_antialias":
        resized = F.interpolate(picture, (grid.h, grid.w), mode="bilinear", align_corners=False, antialias=True)
    else:
        resized = F.interpolate(picture, (grid.h, grid.w), mode="bicubic", align_corners=False)
    return resized.reshape(weight.shape[1], grid.area).transpose(0, 1).to(weight.dtype)


def axis(before: int, after: int, rule: PositionResize) -> torch.Tensor:
    """The weights `[after, before]` of one axis, by the filters' definitions, in float64."""
    ratio = before / after
    weights = torch.zeros(after, before, dtype=torch.float64)
    for place in range(after):
        centre = (place + 0.5) * ratio - 0.5
        if rule == "bilinear_antialias":
            width = max(ratio, 1.0)
            for source in range(before):
                weights[place, source] = max(0.0, 1 - abs(source - centre) / width)
            weights[place] /= weights[place].sum()
            continue
        first = int(centre // 1)
        for source in range(first - 1, first + 3):  # Keys' kernel with a = -0.75; the border is repeated
            x = abs(source - centre)
            near, far = 1.25 * x**3 - 2.25 * x**2 + 1, -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[place, min(max(source, 0), before - 1)] += near if x <= 1 else far
    return weights


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("rule", RULES)
class TestResize:
    def test_is_the_references_call(self, rule: PositionResize, grid: Grid) -> None:
        module = embedding(rule)
        expected = interpolated(module.weight, rule, LEARNED, grid)
        with torch.no_grad():
            torch.testing.assert_close(module.table(grid), expected, atol=1e-6, rtol=0)

    def test_is_the_filters_definition(self, rule: PositionResize, grid: Grid) -> None:
        learned = Grid(5, 9)
        module = embedding(rule, learned)
        down, across = axis(learned.h, grid.h, rule), axis(learned.w, grid.w, rule)
        table = module.weight.detach().double().unflatten(0, learned)
        expected = torch.einsum("ay,bx,yxc->abc", down, across, table).flatten(0, 1)
        with torch.no_grad():
            torch.testing.assert_close(module.table(grid).double(), expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_runs_in_float32_whatever_the_dtype(self, rule: PositionResize, grid: Grid, dtype: torch.dtype) -> None:
        module = embedding(rule, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(module.table(grid), interpolated(module.weight, rule, LEARNED, grid))


def test_the_two_rules_differ_where_it_matters() -> None:
    """Antialiasing counts where the grid is smaller than the table."""
    with torch.no_grad():
        small, large = ([embedding(rule).table(grid) for rule in RULES] for grid in (Grid(8, 8), Grid(32, 32)))
    assert (small[0] - small[1]).abs().max() > 0.5
    assert (large[0] - large[1]).abs().max() > 0.1


@pytest.mark.parametrize("grids", [[Grid(3, 5), Grid(3, 5), LEARNED, Grid(5, 3), Grid(3, 5)], [Grid(1, 1)]])
def test_every_image_gets_its_own_positions(grids: list[Grid]) -> None:
    module = embedding("bilinear_antialias")
    x = torch.randn(sum(grid.area for grid in grids), 8)
    expected = x.clone()
    start = 0
    for grid in grids:
        table = interpolated(module.weight, "bilinear_antialias", LEARNED, grid)
        for row, column in product(range(grid.h), range(grid.w)):
            expected[start + row * grid.w + column] += table[row * grid.w + column]
        start += grid.area
    with torch.no_grad():
        torch.testing.assert_close(module(x, grids), expected, atol=1e-6, rtol=0)


def test_a_family_that_never_resizes_refuses_other_grids() -> None:
    module = embedding("never")
    assert torch.equal(module.table(LEARNED), module.weight)
    with pytest.raises(ValueError, match="positions for a grid of 16x16, not 16x17"):
        module.table(Grid(16, 17))


def by_load_part(module: PositionEmbedding) -> None:
    module.load_part("weight", "", torch.randn(module.weight.shape))


def by_state_dict(module: PositionEmbedding) -> None:
    module.load_state_dict({"weight": torch.randn(module.weight.shape)})


def by_replacing(module: PositionEmbedding) -> None:
    module.weight = torch.nn.Parameter(torch.randn(module.weight.shape), requires_grad=False)


def by_dtype(module: PositionEmbedding) -> None:
    module.to(torch.bfloat16)


def by_dtypes_there_and_back(module: PositionEmbedding) -> None:
    """The values are rounded, and torch may give the new ones the address of the old."""
    module.to(torch.bfloat16).to(torch.float32)


def by_optimiser(
    optimiser: type[torch.optim.Optimizer], *, grid: Grid, **options: bool
) -> Callable[[PositionEmbedding], None]:
    def step(module: PositionEmbedding) -> None:
        module.requires_grad_(True)
        taker = optimiser(module.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
        module.table(grid).square().sum().backward()
        with torch.no_grad():
            module.table(Grid(7, 9))
        taker.step()

    return step


CHANGES: dict[str, Callable[[PositionEmbedding], None]] = {
    "load_part": by_load_part,
    "load_state_dict": by_state_dict,
    "another parameter": by_replacing,
    "dtype": by_dtype,
    "dtypes there and back": by_dtypes_there_and_back,
    "SGD": by_optimiser(torch.optim.SGD, grid=SMALL),
    "AdamW": by_optimiser(torch.optim.AdamW, grid=SMALL),
    "foreach AdamW": by_optimiser(torch.optim.AdamW, grid=SMALL, foreach=True),
    "fused AdamW": by_optimiser(torch.optim.AdamW, grid=SMALL, fused=True),
    "fused AdamW on the learned grid": by_optimiser(torch.optim.AdamW, grid=LEARNED, fused=True),
}


class TestCache:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_a_second_call_gives_the_same_table(self, mode: Callable[[], torch.no_grad]) -> None:
        module = embedding("bicubic")
        with mode():
            first = module.table(Grid(7, 9))
            assert module.table(Grid(7, 9)) is first
            assert module.table(Grid(9, 7)) is not first
        assert torch.equal(first, interpolated(module.weight, "bicubic", LEARNED, Grid(7, 9)))

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
    @pytest.mark.parametrize("freeze", [True, False])
    def test_other_values_give_another_table(
        self, change: Callable[[PositionEmbedding], None], mode: Callable[[], torch.no_grad], freeze: bool
    ) -> None:
        """Also while the parameter is still being trained, and when it is frozen again afterwards."""
        module = embedding("bilinear_antialias")
        with mode():
            before = module.table(Grid(7, 9)).clone()
        change(module)
        if freeze:
            module.requires_grad_(False)
        with mode():
            after = module.table(Grid(7, 9))
        assert torch.equal(after, interpolated(module.weight, "bilinear_antialias", LEARNED, Grid(7, 9)))
        assert not torch.equal(before.float(), after.float())

    def test_weights_made_in_inference_mode_are_never_remembered(self) -> None:
        """torch counts no versions of them, so nothing would tell that they changed."""
        with torch.inference_mode():
            module = embedding("bicubic")
            for seed in range(3):
                fill(module, seed)
                expected = interpolated(module.weight, "bicubic", LEARNED, Grid(7, 9))
                assert torch.equal(module.table(Grid(7, 9)), expected)

    def test_the_least_recently_used_tables_go_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(position, "KEPT_PATCHES", 100)
        module = embedding("bicubic")
        with torch.no_grad():
            small, other = module.table(Grid(5, 6)), module.table(Grid(6, 5))
            assert module.table(Grid(5, 6)) is small
            module.table(Grid(5, 9))  # 30 + 30 + 45 rows
            assert module.table(Grid(5, 6)) is small
            assert module.table(Grid(6, 5)) is not other
            for height in range(1, 40):
                module.table(Grid(height, 7))
                assert sum(grid.area for grid in module._tables) <= 100
            large = module.table(Grid(11, 11))  # larger than all that may be kept
            assert torch.equal(large, interpolated(module.weight, "bicubic", LEARNED, Grid(11, 11)))
            assert not module._tables

    def test_training_gets_gradients_whatever_was_remembered(self) -> None:
        module = embedding("bilinear_antialias")
        with torch.no_grad():
            module.table(Grid(7, 9))
        module.requires_grad_(True)
        twin = module.weight.detach().clone().requires_grad_()
        grids = [Grid(7, 9), LEARNED, Grid(7, 9)]
        x = torch.randn(sum(grid.area for grid in grids), 8)
        with torch.no_grad():
            module(x, grids)
        with torch.inference_mode():
            module(x, grids)
        module(x, grids).square().sum().backward()
        picture = twin.unflatten(0, LEARNED).permute(2, 0, 1)[None]
        resized = F.interpolate(picture, (7, 9), mode="bilinear", align_corners=False, antialias=True)
        table = resized[0].flatten(1).T
        (x + torch.cat((table, twin, table))).square().sum().backward()
        assert module.weight.grad is not None
        assert twin.grad is not None
        torch.testing.assert_close(module.weight.grad, twin.grad, atol=1e-4, rtol=1e-5)

    @pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
    def test_a_table_made_in_one_mode_serves_in_the_other(
        self, modes: tuple[Callable[[], torch.no_grad], Callable[[], torch.no_grad]]
    ) -> None:
        tower = SiglipVisionModel(config_of("bilinear_antialias")).requires_grad_(False)
        for number, parameter in enumerate(tower.parameters()):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        packed = PackedPatches(torch.randn(35, 12), (Grid(5, 7),))
        found = []
        for mode in modes:
            with mode():
                found.append(tower(packed).clone())
        found.append(tower(packed))  # and with gradients on, as in a model whose tower is frozen
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])

    def test_a_frozen_table_does_not_stop_gradients(self) -> None:
        module = embedding("bicubic").requires_grad_(False)
        x = torch.randn(63, 8, requires_grad=True)
        with torch.inference_mode():
            module.table(Grid(7, 9))
        module(x, [Grid(7, 9)]).square().sum().backward()
        assert x.grad is not None
        torch.testing.assert_close(x.grad, 2 * (x + interpolated(module.weight, "bicubic", LEARNED, Grid(7, 9))))

    def test_a_copy_has_its_own(self) -> None:
        module = embedding("bicubic")
        with torch.no_grad():
            module.table(Grid(7, 9))
        other = copy.deepcopy(module)
        fill(other, seed=1)
        with torch.no_grad():
            for one in (module, other):
                assert torch.equal(one.table(Grid(7, 9)), interpolated(one.weight, "bicubic", LEARNED, Grid(7, 9)))
