"""2-D rotary positions: the formula written out, and what follows from it for a whole tower."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError
from siglane.nn import encoder
from siglane.nn.rope import rotary_tables_2d, rotate
from siglane.types import Grid, PackedPatches
from siglane.vision.tower import SiglipVisionModel

CPU = torch.device("cpu")
WIDE, TALL = Grid(2, 5), Grid(5, 2)


def angles_by_hand(grids: list[Grid], head_dim: int, theta: float) -> list[list[float]]:
    """One patch and one frequency at a time: row angles, column angles, and both once more."""
    frequencies = [theta ** (-2 * number / (head_dim // 2)) for number in range(head_dim // 4)]
    rows = []
    for grid in grids:
        for row in range(grid.h):
            for column in range(grid.w):
                half = [row * one for one in frequencies] + [column * one for one in frequencies]
                rows.append(half + half)
    return rows


def vision(rope_theta: float | None) -> VisionConfig:
    raw = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 3}
    config = VisionConfig.from_hf({**raw, "image_size": 16, "patch_size": 2}, feature_layer=-1, post_norm=False)
    return replace(config, position_resize="bicubic", rope_theta=rope_theta, use_head=False)


def tower(rope_theta: float | None = 10000.0, *, learned: bool = True) -> SiglipVisionModel:
    """Random weights; not `learned`: without learned positions, so that only the rotation tells places apart."""
    model = SiglipVisionModel(vision(rope_theta)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        norm = "norm" in name and name.endswith("weight")
        parameter.copy_(1 + 0.3 * noise if norm else noise * (0.3 if parameter.ndim == 1 else 0.25))
    if not learned:
        model.position_embedding.weight.zero_()
    return model


def picture(grid: Grid, seed: int = 0) -> torch.Tensor:
    return torch.randn(grid.area, 12, generator=torch.Generator().manual_seed(seed))


def transposed(rows: torch.Tensor, grid: Grid) -> torch.Tensor:
    return rows.unflatten(0, grid).transpose(0, 1).flatten(0, 1)


@pytest.mark.parametrize("head_dim", [4, 8, 72])
@pytest.mark.parametrize("theta", [10000.0, 100.0])
@pytest.mark.parametrize("grids", [[WIDE], [WIDE, TALL, WIDE], [Grid(1, 1), Grid(1, 236), Grid(7, 3)]])
def test_tables_are_the_formula(head_dim: int, theta: float, grids: list[Grid]) -> None:
    cos, sin = rotary_tables_2d(grids, head_dim, theta, CPU)
    angles = angles_by_hand(grids, head_dim, theta)
    assert cos.shape == sin.shape == (len(angles), 1, head_dim)
    assert cos.dtype == sin.dtype == torch.float32
    for found, function in ((cos, math.cos), (sin, math.sin)):
        exact = torch.tensor([[function(angle) for angle in row] for row in angles])
        if function is math.sin:
            exact[:, : head_dim // 2] *= -1
        torch.testing.assert_close(found[:, 0], exact, atol=5e-5, rtol=0)


def test_rotation_is_a_rotation_of_pairs() -> None:
    """Pair (i, i + d/2) turns by angle i: by hand, as complex numbers."""
    head_dim, heads = 8, 3
    cos, sin = rotary_tables_2d([WIDE], head_dim, 100.0, CPU)
    x = torch.randn(WIDE.area, heads, head_dim, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, cos, sin)
    for patch, angles in enumerate(angles_by_hand([WIDE], head_dim, 100.0)):
        for head in range(heads):
            for i in range(head_dim // 2):
                pair = complex(x[patch, head, i], x[patch, head, i + head_dim // 2])
                expected = pair * complex(math.cos(angles[i]), math.sin(angles[i]))
                assert turned[patch, head, i].item() == pytest.approx(expected.real, abs=1e-5)
                assert turned[patch, head, i + head_dim // 2].item() == pytest.approx(expected.imag, abs=1e-5)


def test_swapping_rows_and_columns_swaps_the_halves() -> None:
    wide, _ = rotary_tables_2d([WIDE], 8, 10000.0, CPU)
    tall, _ = rotary_tables_2d([TALL], 8, 10000.0, CPU)
    swapped = transposed(wide[:, 0], WIDE)[:, [2, 3, 0, 1, 6, 7, 4, 5]]
    assert torch.equal(tall[:, 0], swapped)
    assert not torch.equal(tall, wide)


def test_a_tower_tells_rows_from_columns() -> None:
    """The same patches on 2x5, on 5x2 and mirrored at the diagonal are three pictures."""
    model, pixels = tower(learned=False), picture(WIDE)
    wide = model(PackedPatches(pixels, (WIDE,)))
    tall = model(PackedPatches(pixels, (TALL,)))
    mirrored = transposed(model(PackedPatches(transposed(pixels, WIDE), (TALL,))), TALL)
    assert (wide - tall).abs().max() > 1e-2
    assert (wide - mirrored).abs().max() > 1e-2


def test_without_the_rotation_nothing_tells_them_apart() -> None:
    """What the test above measures is the rotation alone."""
    model, pixels = tower(None, learned=False), picture(WIDE)
    wide = model(PackedPatches(pixels, (WIDE,)))
    torch.testing.assert_close(model(PackedPatches(pixels, (TALL,))), wide, atol=1e-5, rtol=0)


def test_both_kinds_of_positions_count() -> None:
    packed = PackedPatches(picture(WIDE), (WIDE,))
    both, rotary, learned = (model(packed) for model in (tower(), tower(learned=False), tower(None)))
    assert (both - rotary).abs().max() > 1e-2
    assert (both - learned).abs().max() > 1e-2


def test_identical_frames_have_identical_features() -> None:
    """Frames never see each other and all begin at position 0, whatever stands between them."""
    model = tower()
    frame, other = picture(Grid(4, 6)), picture(TALL, seed=1)
    grids = (Grid(4, 6), TALL, Grid(4, 6), Grid(4, 6))
    features = model(PackedPatches(torch.cat((frame, other, frame, frame)), grids)).split([24, 10, 24, 24])
    alone = model(PackedPatches(frame, (Grid(4, 6),)))
    for number in (0, 2, 3):
        torch.testing.assert_close(features[number], alone, atol=1e-5, rtol=0)


def test_q_and_k_turn_in_float32_whatever_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """q and k of a bfloat16 tower are what complex numbers in float64 give, rounded once."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    attend = encoder.packed_attention

    def watched(q: torch.Tensor, k: torch.Tensor, *rest: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append((q, k))
        return attend(q, k, *rest, **options)

    monkeypatch.setattr(encoder, "packed_attention", watched)
    grid = Grid(3, 50)
    packed = PackedPatches(picture(grid).bfloat16(), (grid,))
    tower(learned=False).to(torch.bfloat16)(packed)
    tower(None, learned=False).to(torch.bfloat16)(packed)
    turned, still = seen[0], seen[len(seen) // 2]  # of the first block, with and without rotation
    angles = torch.tensor(angles_by_hand([grid], 8, 10000.0), dtype=torch.float64)[:, None, :4]
    for found, plain in zip(turned, still, strict=True):
        assert found.dtype == torch.bfloat16
        pairs = torch.complex(plain[..., :4].double(), plain[..., 4:].double()) * torch.polar(
            torch.ones(()).double(), angles
        )
        exact = torch.cat((pairs.real, pairs.imag), dim=-1)
        assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()
        assert (found == exact.bfloat16()).float().mean() > 0.99


def test_a_head_must_divide_by_four() -> None:
    raw = {"hidden_size": 12, "num_attention_heads": 2, "image_size": 16, "patch_size": 2}
    config = VisionConfig.from_hf(raw, feature_layer=-1, post_norm=False)
    with pytest.raises(ConfigError, match="head_dim 6 must be a multiple of 4"):
        replace(config, rope_theta=10000.0)
