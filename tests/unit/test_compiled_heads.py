"""What compiled loops do between two products, against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_quantised_language import language

from siglane.engine.attention.compiled import compiled_kernels
from siglane.engine.cache.kv import PagedKV
from siglane.nn.cpu.jit.entrance import compiled_layer, heads
from siglane.nn.norm import RMSNorm
from siglane.nn.rope import NormedRotation, rotary_tables, rotate

PAGE, PAGES = 16, 60
LENGTHS = (1, 16, 33, 200)


@pytest.fixture(autouse=True)
def compiled() -> None:
    if compiled_layer() is None:
        pytest.skip("needs llvmlite and AVX2")


def cache(kv_heads: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(PAGES * PAGE, kv_heads, size, generator=generator).to(dtype) for _ in range(2))
    return keys, values


def paged(kept: torch.Tensor) -> torch.Tensor:
    return kept.unflatten(0, (-1, PAGE))


@torch.no_grad()
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "size"), [(14, 2, 64), (9, 3, 64), (4, 4, 32), (6, 1, 128), (20, 20, 32)]
)
@pytest.mark.parametrize("factor", [1.0, 40.0])  # scores of one token alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_over_pages(query_heads: int, kv_heads: int, size: int, factor: float, dtype: torch.dtype) -> None:
    from siglane.nn.cpu.jit.calls import PagedStep

    made = heads(size)
    assert made is not None
    keys, values = cache(kv_heads, size, dtype)
    table = torch.randperm(PAGES, generator=torch.Generator().manual_seed(2))[:52].view(4, 13).int()
    rows, lengths = torch.tensor([2, 0, 3, 1]), torch.tensor(LENGTHS)
    q = factor * torch.randn(4, query_heads + 3, size)[:, :query_heads]  # as q is cut out of q, k and v
    seen = [
        (table[row].long()[:, None] * PAGE + torch.arange(PAGE)).flatten()[:length]
        for row, length in zip(rows, LENGTHS, strict=True)
    ]
    unseen = torch.ones(len(keys), dtype=torch.bool).index_fill_(0, torch.cat(seen), False)
    keys[unseen], values[unseen] = torch.nan, torch.nan  # what others left
    found = made.attend(PagedStep(table, rows, lengths, paged(keys)), q, keys, values)
    for number, own in enumerate(seen):
        k, v = (x[own].double().transpose(0, 1)[None] for x in (keys, values))
        one = q[number].double()[None, :, None]
        expected = F.scaled_dot_product_attention(one, k, v, enable_gqa=True)[0, :, 0]
        assert torch.allclose(found[number].double(), expected, rtol=0, atol=2e-5 * factor)
    alone = PagedStep(table, rows[1:2], lengths[1:2], paged(keys))
    assert torch.equal(made.attend(alone, q[1:2], keys, values)[0], found[1])
    q[2, 0, 5] = torch.nan
    again = made.attend(PagedStep(table, rows, lengths, paged(keys)), q, keys, values)
    assert again[2, 0].isnan().all()
    assert torch.equal(again[[0, 1, 3]], found[[0, 1, 3]])


def test_too_many_heads_for_one_are_refused() -> None:
    from siglane.nn.cpu.jit.calls import PagedStep

    made, (keys, values) = heads(32), cache(1, 32)
    assert made is not None
    step = PagedStep(torch.zeros(1, 1).int(), torch.zeros(1).long(), torch.ones(1).long(), paged(keys))
    with pytest.raises(ValueError, match="33 query heads share one"):
        made.attend(step, torch.zeros(1, 33, 32), keys, values)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_and_values_are_stored(dtype: torch.dtype) -> None:
    made, qkv, slots = heads(64), torch.randn(5, 18, 64), torch.tensor([70, 0, 3, 959, 16])
    assert made is not None
    keys, values = cache(2, 64, dtype)
    k, v = (x.to(dtype) for x in (qkv[:, 14:16], qkv[:, 16:]))
    expected = keys.clone().index_copy_(0, slots, k), values.clone().index_copy_(0, slots, v)
    made.store(slots, qkv[:, 14:16], qkv[:, 16:], keys, values)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


@torch.no_grad()
def test_what_16_bits_cannot_hold_is_the_most_they_can() -> None:
    made, (keys, values) = heads(32), cache(1, 32, torch.float16)
    assert made is not None
    k = torch.full((1, 1, 32), 1e5)
    k[..., 5], k[..., 6], k[..., 7] = -1e6, 1e-9, torch.nan
    made.store(torch.tensor([3]), k, -k, keys, values)
    assert keys[3, 0, :7].tolist() == [65504.0] * 5 + [-65504.0, 0.0]
    assert values[3, 0, :6].tolist() == [-65504.0] * 5 + [65504.0]
    assert keys[3, 0, 7].isnan()


@pytest.mark.parametrize("size", [32, 64, 128])
def test_few_rows_turn_as_many_do(size: int) -> None:
    positions = torch.arange(0, 4000, 50)
    cos, sin = rotary_tables(positions, size, 1e5, torch.float32)
    x = torch.randn(80, 7, size)[:, :5]
    many = rotate(x, cos, sin)
    few = torch.cat([rotate(*some) for some in zip(x.split(3), cos.split(3), sin.split(3), strict=True)])
    assert torch.allclose(few, many, rtol=0, atol=1e-6)
    learning = x[:3].clone().requires_grad_()
    rotate(learning, cos[:3], sin[:3]).sum().backward()
    assert learning.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])  # eps counts, or does not
@pytest.mark.parametrize("size", [32, 64, 128])
def test_heads_are_normed_and_turned(size: int, scale: float) -> None:
    rotation, norms = NormedRotation(size, 5), [RMSNorm(size, 1e-6) for _ in range(2)]
    for norm in norms:
        norm.weight.copy_(torch.randn(size))
    x = scale * torch.randn(9, 10, size)[:, :8]  # as q and k lie before v
    cos, sin = rotary_tables(torch.arange(9) * 411, size, 1e6, torch.float32)
    made = heads(size)
    assert made is not None
    found = rotation(x, cos, sin, *norms)
    assert torch.equal(found, made.turn(x, cos, sin, rotation.norms(*norms)))
    parts = zip(norms, x.double().split([5, 3], 1), strict=True)
    own = [F.rms_norm(part, (size,), norm.weight.double(), norm.eps) for norm, part in parts]
    expected = rotate(torch.cat(own, 1), cos.double(), sin.double())
    assert torch.allclose(found.double(), expected, rtol=0, atol=3e-6)
    every = zip(x.split(1), cos.split(1), sin.split(1), strict=True)
    assert torch.equal(torch.cat([rotation(*one, *norms) for one in every]), found)


def test_norms_that_differ_are_left_to_torch() -> None:
    rotation, norm = NormedRotation(32, 5), RMSNorm(32, 1e-6)
    assert rotation.norms(norm, RMSNorm(32, 1e-6)) is not None
    assert rotation.norms(norm, RMSNorm(32, 1e-5)) is None
    assert rotation.norms(norm, RMSNorm(32, 1e-6).bfloat16()) is None


def test_heads_that_are_no_whole_registers_are_left_to_torch() -> None:
    assert heads(24) is None
    assert heads(512) is None


@pytest.mark.parametrize(
    ("query_heads", "dtype", "known"),
    [(64, torch.float32, True), (66, torch.float32, False), (64, torch.float16, True), (64, torch.bfloat16, False)],
)
def test_what_is_left_to_torch(query_heads: int, dtype: torch.dtype, known: bool) -> None:
    model = language(
        {"model_type": "qwen2", "num_attention_heads": query_heads, "num_key_value_heads": 2, "head_dim": 32}
    )
    kv = PagedKV(model.config, 2, pages=2, page_size=PAGE, dtype=dtype, device=torch.device("cpu"))
    assert (compiled_kernels(kv, model) is not None) == known
    assert compiled_kernels(kv, model.to(dtype=torch.float16)) is None
