"""Attention of packed segments in bfloat16, against plain products in float64."""

from __future__ import annotations

import pytest
import torch

from siglane.nn.attention import Segments, packed_attention
from siglane.nn.cpu.attention import compiled_attention
from siglane.nn.cpu.jit.entrance import segments

CPU = torch.device("cpu")
LENGTHS = (1, 5, 16, 70, 33)
LONG = (64, 3, 1024, 1150)  # more keys than are brought into order together, and more queries than one part has


@pytest.fixture(autouse=True)
def compiled() -> None:
    if segments(72) is None:
        pytest.skip("needs llvmlite, AVX512-BF16 and no AMX")


def heads(rows: int, count: int, size: int, factor: float = 1.0) -> list[torch.Tensor]:
    """q, k and v as they are cut out of one product's rows."""
    rows_of = torch.randn(rows, 3, count, size, generator=torch.Generator().manual_seed(1))
    rows_of[:, 0] *= factor
    return list(rows_of.bfloat16().unbind(1))


def attended(lengths: tuple[int, ...], *parts: torch.Tensor) -> torch.Tensor:
    assert compiled_attention(*parts) is not None
    return packed_attention(*parts, Segments.of(lengths, CPU), scale=0.15, backend="onednn")


@torch.no_grad()
@pytest.mark.parametrize("lengths", [LENGTHS, LONG, (576,)])
@pytest.mark.parametrize("size", [64, 72, 128, 8])
@pytest.mark.parametrize("factor", [1.0, 30.0])  # weights of one key alone
def test_it_is_attention(lengths: tuple[int, ...], size: int, factor: float) -> None:
    q, k, v = heads(sum(lengths), 3, size, factor)
    expected = packed_attention(
        q.double(), k.double(), v.double(), Segments.of(lengths, CPU), scale=0.15, backend="eager"
    )
    found = attended(lengths, q, k, v)
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() <= 0.003 * expected.norm()
    assert torch.allclose(found.double(), expected, rtol=0.01, atol=0.01)


@torch.no_grad()
def test_neighbours_and_threads_change_nothing() -> None:
    q, k, v = heads(sum(LENGTHS), 4, 72)
    clean = attended(LENGTHS, q, k, v)
    start = sum(LENGTHS[:3])
    alone = attended(LENGTHS[3:4], *(x[start : start + LENGTHS[3]] for x in (q, k, v)))
    assert torch.equal(alone, clean[start : start + LENGTHS[3]])
    long, before = heads(576, 4, 72), torch.get_num_threads()
    one = attended((576,), *long)  # enough for several threads
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(attended((576,), *long), one)
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_undefined_values_stay_in_their_segment(bad: float) -> None:
    q, k, v = heads(sum(LENGTHS), 4, 72)
    clean = attended(LENGTHS, q, k, v)
    q[2, 1, 3] = bad  # of the second segment's second query
    k[8, 2, 0], v[30, 0, 5] = bad, bad  # the third and fourth segments
    found = attended(LENGTHS, q, k, v)
    assert not found[2, 1].isfinite().any()
    assert not found[22:92, 0, 5].isfinite().any()
    assert torch.equal(found[:2], clean[:2])
    assert torch.equal(found[3:6], clean[3:6])
    assert torch.equal(found[92:], clean[92:])
    assert torch.equal(found[6:22, :2], clean[6:22, :2])


def test_who_wants_gradients_asks_torch() -> None:
    q, k, v = heads(5, 2, 64)
    assert compiled_attention(q, k, v) is not None
    assert compiled_attention(q.requires_grad_(), k, v) is None
    assert compiled_attention(q.float().detach(), k.float(), v.float()) is None
