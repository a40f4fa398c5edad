"""4-bit layers against their own arithmetic written down, and against float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from siglane.nn.cpu import int4
from siglane.nn.cpu.int4 import BLOCK, Int4Codes, Int4Linear, group_codes, int4_codes


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def values(codes: Int4Codes) -> torch.Tensor:
    """The weights that codes stand for, one group after another."""
    pairs = codes.pairs.int()
    numbers = torch.stack((pairs % 16, pairs // 16), -1).flatten(1).unflatten(1, (-1, codes.group_size))
    weights = (numbers - codes.zero.int()[..., None]) * codes.scale.double()[..., None]
    return weights.flatten(1)[: codes.outputs, : codes.inputs]


@pytest.mark.parametrize(("outputs", "inputs"), [(64, 32), (640, 96), (1024, 32)])
def test_codes_are_packed_as_torch_packs_them(outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int4, "_run", int4._torch_run)  # of loops' order on AVX2 torch knows nothing
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    assert torch.equal(int4.pack_pairs(int4.paired(codes)), int4.pack_codes(codes))


@settings(max_examples=25, deadline=None)
@given(
    outputs=st.integers(1, 200),
    inputs=st.integers(1, 200),
    group_size=st.sampled_from(int4.GROUP_SIZES),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]),
)
@torch.no_grad()
def test_what_is_packed_comes_back(outputs: int, inputs: int, group_size: int, size: float) -> None:
    codes = int4_codes(drawn(outputs, inputs) * size, group_size=group_size)
    layer = Int4Linear(codes, None)
    for kept, made in zip(layer.stored, codes, strict=True):
        assert torch.equal(kept, made) if isinstance(made, torch.Tensor) else kept == made
    dense = int4.unpacked(layer.codes, layer.scales, group_size).T[:outputs, :inputs]
    assert torch.equal(dense.double(), values(codes))  # a weight is a bfloat16 number, nothing is rounded twice


@torch.no_grad()
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 33, 70), (200, 96, 64), (1, 172, 130)])
def test_a_layer_is_the_product_of_its_codes(shape: tuple[int, int, int], with_bias: bool) -> None:
    rows, inputs, outputs = shape
    x, bias = drawn(rows, inputs), drawn(outputs, seed=2) if with_bias else None
    codes = int4_codes(drawn(outputs, inputs, seed=1))
    found = Int4Linear(codes, bias)(x)
    product = x.bfloat16().double() @ values(codes).T
    expected = product if bias is None else product + bias
    # sums are float32 and then bfloat16
    assert ((found - expected).abs() <= product.abs() * 2**-8 + 1e-4).all()


@torch.no_grad()
def test_few_rows_and_many_are_the_same() -> None:
    x, layer = drawn(int4.FEW_ROWS + 5, 96), Int4Linear(drawn(80, 96, seed=1), None)
    many, alone = layer(x), torch.cat([layer(row) for row in x.split(1)])
    assert ((many - alone).norm(dim=1) / many.norm(dim=1)).max() < 2**-8
    assert (many != alone).float().mean() < 0.01  # where a sum lies between two bfloat16 numbers
    assert torch.equal(alone[:7], layer(x[:7]))


@torch.no_grad()
def test_a_row_does_not_touch_its_neighbours() -> None:
    for count in (4, int4.FEW_ROWS):
        x, layer = drawn(count, 64), Int4Linear(drawn(64, 64, seed=1), None)
        before = layer(x)
        x[1, 2], x[2, 2] = torch.nan, torch.inf
        after = layer(x)
        assert torch.equal(after[[0, *range(3, count)]], before[[0, *range(3, count)]])
        assert not after[1:3].isfinite().any()


@torch.no_grad()
@pytest.mark.parametrize(("group_size", "bound"), [(32, 0.082), (64, 0.091), (128, 0.1)])
def test_groups_of_normal_weights(group_size: int, bound: float) -> None:
    """The relative error; llama.cpp's Q4_0 has 0.086 in groups of 32."""
    weight = drawn(256, 1024)
    found = values(int4_codes(weight, group_size=group_size))
    assert (found - weight).norm() / weight.norm() < bound


@torch.no_grad()
def test_the_search_never_loses_to_a_groups_whole_range() -> None:
    weight = drawn(64, 1024)
    groups = weight.unflatten(1, (-1, 32))
    codes, scale, zero = group_codes(weight, 32)
    error = ((codes.unflatten(1, (-1, 32)) - zero[..., None]) * scale[..., None] - groups).norm(dim=-1)
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
    step = int4._short((high - low) / 15)
    middle = (-low / step).round().clamp(0, 15)
    plain = (groups / step[..., None]).round().clamp(-middle[..., None], 15 - middle[..., None]) * step[..., None]
    whole = (plain - groups).norm(dim=-1)
    assert (error <= whole * (1 + 1e-6)).all()
    assert error.norm() < 0.98 * whole.norm()


@torch.no_grad()
def test_a_norm_before_a_layer() -> None:
    x, weight = drawn(5, 96) * 3, drawn(64, 96, seed=1)
    expected = Int4Linear(weight, None)(F.rms_norm(x, (96,), eps=0.3))
    assert torch.equal(Int4Linear(weight, None, eps=0.3)(x), expected)


def test_zeros_stay_zeros() -> None:
    weight = torch.zeros(3, 64)
    weight[1, 5] = 2.0
    found = values(int4_codes(weight))
    assert torch.equal(found[[0, 2]], torch.zeros(2, 64, dtype=torch.float64))
    assert (found[1] != 0).sum() == 1


def test_memory_and_refusals() -> None:
    layer = Int4Linear(drawn(4 * BLOCK, 256), None)
    assert layer.nbytes == 4 * BLOCK * 256 * 5 // 8  # four bits, and one of scales and zero points
    with pytest.raises(ValueError, match="a 4-bit layer has no gradient"):
        layer(drawn(2, 256).requires_grad_())
    with pytest.raises(ValueError, match="a 4-bit layer cannot be saved"):
        layer.state_dict()
    with pytest.raises(ValueError, match="a 4-bit layer cannot be moved or cast"):
        layer.bfloat16()
