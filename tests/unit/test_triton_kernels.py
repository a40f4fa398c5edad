"""The Triton kernels without a GPU: their numbers in Triton's interpreter, their code by its compiler.

`make test-triton`. With a GPU the same numbers are asked of it.

The interpreter computes products of bfloat16 wrongly, so that dtype is compiled only.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from siglane.engine.sampling.cuda import keep_in_torch
from siglane.engine.sampling.noise import gumbel_noise, noise_key
from siglane.nn.act import swiglu
from siglane.nn.cuda.fp8 import rows_in_torch
from siglane.nn.cuda.low_bits import GROUP, eight_bits, four_bits, product_in_torch
from siglane.nn.experts import Mixing, Routing
from siglane.nn.norm import InputRMSNorm, RMSNorm
from siglane.nn.rope import NormedRotation, rotary_tables, rotate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined, in Triton too: by the imports below
pytest.importorskip("triton", reason="needs Triton, which torch brings for CUDA; `make test-triton`")

from siglane.nn.cuda import best_token as choosing  # noqa: E402
from siglane.nn.cuda import coded_product as coded  # noqa: E402
from siglane.nn.cuda import experts as mixing  # noqa: E402
from siglane.nn.cuda import fixed_product as fixed  # noqa: E402
from siglane.nn.cuda import fp8_rows as narrowing  # noqa: E402
from siglane.nn.cuda import mask as masking  # noqa: E402
from siglane.nn.cuda import paged_decode as decode  # noqa: E402
from siglane.nn.cuda import pointwise  # noqa: E402

PAGE = 16
Products = Callable[..., torch.Tensor]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3} | ({torch.bfloat16: 1e-2} if DEVICE.type == "cuda" else {})
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
SCRIPT = Path(__file__).with_name("compiled_kernels.py")


def close(ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    """By the size of the values: the last bit of half precision alone is 1e-3 of them. roundings: one after another."""
    assert ours.dtype == dtype
    torch.testing.assert_close(
        ours.double(), expected.double(), atol=TOLERANCE[dtype], rtol=roundings * TOLERANCE[dtype], check_device=False
    )


def spread(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """The heads of a token beside others, as in the product that made them. Loud."""
    tokens, heads, head_dim = shape
    rows = 2 * torch.randn(tokens, heads + 3, head_dim, generator=torch.Generator().manual_seed(seed))
    return rows.to(DEVICE, dtype)[:, :heads]


class Cache:
    """Sequences of `lengths` in pages in no order; every number that is no sequence's is NaN."""

    def __init__(self, lengths: Sequence[int], kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(1)
        columns = -(-max(lengths) // PAGE)
        pages = torch.randperm(len(lengths) * columns, generator=generator) + 1
        self.lengths = torch.tensor(lengths, device=DEVICE)
        self.table = pages.view(len(lengths), columns).int().to(DEVICE)
        keys, values = torch.full((2, (len(pages) + 1) * PAGE, kv_heads, head_dim), torch.nan)
        self.slots = []
        for row, length in zip(pages.view(len(lengths), columns), lengths, strict=True):
            self.slots.append((row[:, None] * PAGE + torch.arange(PAGE)).flatten()[:length])
            for cache in (keys, values):
                cache[self.slots[-1]] = torch.randn(length, kv_heads, head_dim, generator=generator)
        self.keys, self.values = keys.to(DEVICE, dtype), values.to(DEVICE, dtype)

    def attend(self, q: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        places = torch.tensor(rows, device=DEVICE)
        scale = q.shape[-1] ** -0.5
        return decode.paged_decode(q, self.keys, self.values, self.table, places, self.lengths[places], PAGE, scale)

    def expected(self, q: torch.Tensor) -> torch.Tensor:
        """In float64, a sequence after the other."""
        rows = []
        for own, slots in zip(q.double(), self.slots, strict=True):
            repeats = q.shape[1] // self.keys.shape[1]
            k, v = (x[slots.to(DEVICE)].double().repeat_interleave(repeats, 1) for x in (self.keys, self.values))
            weights = (torch.einsum("hd,shd->hs", own, k) * q.shape[-1] ** -0.5).softmax(-1)
            rows.append(torch.einsum("hs,shd->hd", weights, v))
        return torch.stack(rows)


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel allocates is NaN before it writes there."""
    empty = torch.empty

    def poisoned(*size: Any, **how: Any) -> torch.Tensor:
        made: torch.Tensor = empty(*size, **how)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 64, 72, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7])
def test_decode_is_attention_over_pages(group: int, head_dim: int, dtype: torch.dtype) -> None:
    lengths = [1, PAGE, PAGE + 1, 257]
    cache = Cache(lengths, 2, head_dim, dtype)
    q = spread(len(lengths), 2 * group, head_dim, dtype=dtype)
    close(cache.attend(q, range(len(lengths))), cache.expected(q), dtype)


@pytest.mark.filterwarnings("ignore:invalid value")
@DTYPES
def test_a_row_of_padding_sees_slot_0_and_harms_nobody(dtype: torch.dtype) -> None:
    """It has length 1 and a row of the table that is all zeros; what earlier padding left there may be NaN."""
    lengths = [PAGE + 1, 1]
    cache = Cache(lengths, 2, 72, dtype)
    q = spread(2, 12, 72, dtype=dtype)
    alone = cache.attend(q[:1], [0])
    cache.table[1] = 0
    for left in (torch.nan, 3.0):
        cache.values[:PAGE], cache.keys[:PAGE] = left, left
        cache.keys[1:PAGE], cache.values[1:PAGE] = torch.nan, torch.nan
        found = cache.attend(q, [0, 1])
        assert torch.equal(found[:1], alone)
        assert torch.equal(found[1], torch.full_like(found[1], left)) or left != left


@DTYPES
def test_parts_grow_with_the_sequence(dtype: torch.dtype) -> None:
    """From 8,192 tokens on; the last part of one is a single token."""
    lengths = [decode.PARTS * decode.LEAST, decode.PARTS * decode.LEAST + 1, 26 * 320 + 1]
    cache = Cache(lengths, 1, 32, dtype)
    q = spread(len(lengths), 3, 32, dtype=dtype)
    close(cache.attend(q, range(len(lengths))), cache.expected(q), dtype)


@DTYPES
def test_a_row_alone_is_the_same_beside_others(dtype: torch.dtype) -> None:
    lengths = [255, 1, 577, 256, PAGE - 1]
    cache = Cache(lengths, 2, 64, dtype)
    q = spread(len(lengths), 12, 64, dtype=dtype)
    together = cache.attend(q, range(len(lengths)))
    for row in range(len(lengths)):
        assert torch.equal(cache.attend(q[row : row + 1], [row])[0], together[row])


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 64, 72, 128])
@pytest.mark.parametrize("heads", [1, 5, 9])
def test_rotation(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    x = spread(4, heads, head_dim, dtype=dtype)
    tables = rotary_tables(torch.tensor([0, 1, 77, 30_000], device=DEVICE), head_dim, 1e4, dtype)
    close(pointwise.rotate(x, *tables), rotate(x, *tables), dtype)


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 64, 72, 128])
def test_rotation_behind_norms(head_dim: int, dtype: torch.dtype) -> None:
    """Five heads of queries, two of keys, each kind with gains of its own."""
    module, norms = NormedRotation(head_dim, 5), [RMSNorm(head_dim, 1e-6).to(DEVICE, dtype) for _ in range(2)]
    with torch.no_grad():
        for number, norm in enumerate(norms):
            norm.weight.copy_(torch.linspace(0.5 + number, 2, head_dim))
    x = spread(4, 7, head_dim, dtype=dtype)
    tables = rotary_tables(torch.tensor([0, 1, 77, 30_000], device=DEVICE), head_dim, 1e4, dtype)
    found = pointwise.rotate(x, *tables, norms[0].weight, norms[1].weight, 5, 1e-6)
    with torch.no_grad():
        close(found, module(x, *tables, *norms), dtype, roundings=6)


@pytest.mark.filterwarnings("ignore:overflow")
@DTYPES
@pytest.mark.parametrize("size", [8, 1024, 1500])
def test_swiglu(size: int, dtype: torch.dtype) -> None:
    """Gates of any size: exp overflows beyond 88."""
    x = spread(3, 1, 2 * size, dtype=dtype).flatten(1).contiguous()
    x[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -0.0])
    close(pointwise.swiglu(x), swiglu(x.clone()), dtype)


@DTYPES
@pytest.mark.parametrize("kind", [RMSNorm, InputRMSNorm])
@pytest.mark.parametrize("heads", [0, 5])
def test_rms_norm(kind: type[RMSNorm], heads: int, dtype: torch.dtype) -> None:
    """Of rows, and of the heads of rows that hold others too."""
    norm = kind(72, 1e-6).to(DEVICE, dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 72))
    x = spread(4, heads or 1, 72, dtype=dtype)
    x = x if heads else x[:, 0]
    close(pointwise.rms_norm(x, norm.weight, norm.eps, kind is RMSNorm), norm(x), dtype, roundings=3)


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 64, 72, 128])
def test_store_writes_its_slots_alone(head_dim: int, dtype: torch.dtype) -> None:
    """Padding shares slot 0, whatever is left there."""
    k, v = spread(4, 3, head_dim, dtype=dtype), spread(4, 3, head_dim, dtype=dtype, seed=1)
    slots = torch.tensor([17, 5, 0, 0], device=DEVICE)
    keys, values = torch.full((2, 20, 3, head_dim), 9.0, dtype=dtype, device=DEVICE)
    pointwise.store(k, v, keys, values, slots)
    for cache, rows in ((keys, k), (values, v)):
        assert torch.equal(cache[[17, 5]], rows[:2])
        untouched = [slot for slot in range(20) if slot not in (17, 5, 0)]
        assert bool((cache[untouched] == 9).all())


@DTYPES
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 33), (17, 200, 40), (70, 72, 70)])
def test_products_with_codes(rows: int, inputs: int, outputs: int, bits: int, dtype: torch.dtype) -> None:
    """With a bias and without; rows lie in a wider tensor."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(rows, inputs + 8, generator=generator).to(DEVICE, dtype)
    x = wide[:, :inputs]
    shapes = (outputs, inputs), (outputs,)
    weight, bias = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    codes, scales, lows = (eight_bits if bits == 8 else four_bits)(weight * inputs**-0.5)
    for added in (bias, None):
        found = coded.coded_product(x, codes, scales, lows, added)
        close(found, product_in_torch(x, codes, scales, lows, added), dtype, roundings=3)


@DTYPES
@pytest.mark.parametrize(("rows", "inputs", "width"), [(1, 64, 64), (17, 200, 208), (40, 1152, 1152), (3, 1, 16)])
def test_rows_of_8_bit_floats(rows: int, inputs: int, width: int, dtype: torch.dtype) -> None:
    """The nearest, of loud and quiet rows and one of zeros, which lie in a wider tensor. What becomes a power of two by
    rounding up is left out where the interpreter rounds: it forgets the carry."""
    x = torch.randn(rows, inputs + 8, generator=torch.Generator().manual_seed(0))
    x = (x * torch.logspace(-2, 2, rows)[:, None]).to(DEVICE, dtype)[:, :inputs]
    x[-1] = 0
    (codes, scales), (expected, shares) = narrowing.fp8_rows(x, width), rows_in_torch(x, width)
    assert codes.dtype == torch.float8_e4m3fn
    assert torch.equal(scales, shares)
    exact = torch.nn.functional.pad(x.double() / scales.double(), (0, width - inputs))
    carried = (expected.view(torch.uint8) & 7 == 0) & (expected.float() != 0) & (DEVICE.type == "cpu")
    further = (codes.double() - exact).abs() > (expected.double() - exact).abs() * (1 + 1e-5)
    assert not bool((further & ~carried).any())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_of_8_bit_floats_that_is_not_finite_is_found_out(bad: float) -> None:
    """Its own numbers, or their scale; nobody else's."""
    x = torch.ones(3, 40, device=DEVICE)
    x[1, 7] = bad
    codes, scales = narrowing.fp8_rows(x, 48)
    assert (codes.float() * scales).isfinite().all(1).tolist() == [True, False, True]


@DTYPES
def test_a_row_of_a_product_that_is_cut_alike_is_the_same_beside_others(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right, and to the bit: alone, at another place, and in tiles that are full or nearly empty. The interpreter's
    `tl.dot` is numpy's, whose BLAS rounds a row by its place in a tile on some processors, einsum does not."""
    monkeypatch.setattr(np, "matmul", lambda one, other, *, dtype: np.einsum("ik,kj->ij", one, other, dtype=dtype))
    rows, inputs, outputs = 2 * fixed.BLOCK_M + 5, 200, 70
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs + 8, generator=generator).to(DEVICE, dtype)[:, :inputs]
    weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).to(DEVICE, dtype)
    bias = torch.randn(outputs, generator=generator).to(DEVICE, dtype)
    whole = fixed.fixed_product(x, weight, bias)
    close(whole, torch.nn.functional.linear(x.double(), weight.double(), bias.double()).to(dtype), dtype, roundings=3)
    for first, last in ((0, 1), (7, 8), (rows - 1, rows), (3, 3 + fixed.BLOCK_M), (60, 131)):
        assert torch.equal(fixed.fixed_product(x[first:last], weight, bias), whole[first:last])


@DTYPES
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("experts", "top"), [(3, 1), (5, 3), (128, 8)])
def test_routing(experts: int, top: int, normalised: bool, dtype: torch.dtype) -> None:
    logits = spread(9, 1, experts, dtype=dtype).flatten(1).contiguous()
    weights, chosen = mixing.route(logits, top, normalised)
    expected, numbers = Routing(top, normalised)(logits)
    close(weights, expected, dtype)
    assert torch.equal(logits.gather(1, chosen), logits.gather(1, numbers))  # equals have no order
    assert all(len(set(row)) == top for row in chosen.tolist())


@DTYPES
@pytest.mark.parametrize("products", [mixing.expert_products, mixing.sorted_products])
@pytest.mark.parametrize(("tokens", "top"), [(1, 1), (20, 1), (7, 3), (64, 4)])
def test_experts_get_their_tokens(tokens: int, top: int, products: Products, dtype: torch.dtype) -> None:
    """All of them to one expert, some to others, none to the last; none of the sizes is a block's."""
    count, size, width = 6, 72, 40
    generator = torch.Generator().manual_seed(0)
    rows = [(tokens, size), (count * 2 * width, size), (count * size, width), (tokens, top)]
    x, gate_up, down, weights = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in rows)
    gate_up, down = gate_up * size**-0.5, down * width**-0.5
    others = torch.rand(tokens, count - 2, generator=generator).argsort(1)[:, : top - 1] + 1
    chosen = torch.cat((torch.zeros(tokens, 1, dtype=torch.int64), others), 1).to(DEVICE)
    hidden = pointwise.swiglu(products(x, gate_up, chosen, count))
    found = products(hidden, down, chosen, count, weights).view(tokens, top, size).sum(1)
    close(found, Mixing(count)(x, gate_up, down, weights, chosen), dtype, roundings=4)


@pytest.mark.parametrize("size", [1, 40, choosing.BLOCK, 2 * choosing.BLOCK + 7])
def test_a_token_is_chosen_with_the_noise_of_its_row(size: int) -> None:
    """Hot and cold rows, of equals the first; another row's keys would choose others."""
    temperatures = torch.tensor([1.0, 0.0, 2.0, 1e-3, 1.0], device=DEVICE)
    for place in range(8):
        scores = (3 * torch.randn(5, size, generator=torch.Generator().manual_seed(place))).to(torch.bfloat16).float()
        scores[4] = 0.0
        keys = [noise_key(seed, place) for seed in range(5)]
        words = torch.tensor(keys).T.contiguous().to(DEVICE)
        found = choosing.best_token(scores.to(DEVICE), scores.amax(-1).to(DEVICE), temperatures, words).cpu()
        tokens = torch.arange(size, dtype=torch.int32)
        for row, key in enumerate(keys):
            own, temperature = scores[row] - scores[row].max(), float(temperatures[row])
            noisy = own / temperature + gumbel_noise(tokens, key) if temperature else own
            assert int(found[row]) == int(noisy.argmax()) or noisy.max() - noisy[found[row]] < 1e-5


def test_a_row_of_nan_names_a_token_that_is_there() -> None:
    scores = torch.full((2, choosing.BLOCK + 3), torch.nan, device=DEVICE)
    zeros = torch.zeros(2, device=DEVICE)
    words = torch.ones(2, 2, dtype=torch.int64, device=DEVICE)
    found = choosing.best_token(scores, zeros, zeros + 1, words)
    assert bool(((found >= 0) & (found < scores.shape[1])).all())


@pytest.mark.parametrize("size", [1, 31, 64, masking.BLOCK, masking.BLOCK + 65])
def test_what_a_mask_has_no_bit_for_becomes_the_least(size: int) -> None:
    """Of two of four rows; scores of the others, and those that are allowed, stay to the bit."""
    generator = torch.Generator().manual_seed(size)
    scores, rows = torch.randn(4, size, generator=generator), torch.tensor([3, 0])
    words = torch.randint(-(2**63), 2**63 - 1, (1 + 2 * -(-size // 64),), generator=generator)
    masks = words[1:].view(torch.int32).view(2, -1)  # eight bytes behind where memory begins
    expected = scores.clone()
    keep_in_torch(expected, masks, rows)
    found = scores.to(DEVICE)
    masking.mask_scores(found, words.to(DEVICE)[1:].view(torch.int32).view(2, -1), rows.to(DEVICE))
    assert torch.equal(found.cpu(), expected)
    banned = [(int(masks[0, token // 32]) >> token % 32) & 1 == 0 for token in range(size)]
    assert [value == -torch.inf for value in expected[3].tolist()] == banned


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """In a process of its own: kernels that are interpreted cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-W", "ignore", SCRIPT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_kernel_compiles_for_every_gpu(compiled: list[dict[str, Any]]) -> None:
    kernels = {
        name
        for module in (choosing, coded, decode, fixed, masking, mixing, narrowing, pointwise)
        for name in kernels_of(module)
    }
    inlined, absent = {"part_size", "mixed", "gain", "multiply_pairs"}, {80: {"code_row"}}  # which has no 8-bit floats
    for architecture in (80, 90, 100):
        for dtype in ("fp32", "fp16", "bf16"):
            names = {one["kernel"] for one in compiled if (one["architecture"], one["dtype"]) == (architecture, dtype)}
            assert names == kernels - inlined - absent.get(architecture, set())
    assert all(one["bytes"] > 0 for one in compiled)


def kernels_of(module: ModuleType) -> set[str]:
    tree = ast.parse(inspect.getsource(module))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {one.name for one in functions if "triton.jit" in " ".join(map(ast.unparse, one.decorator_list))}


def test_what_lies_anywhere_in_memory_compiles_no_kernel_anew() -> None:
    """Numbers of a step are views into one tensor, aligned to eight bytes."""
    views = {
        decode: {"attend_part": {"rows", "lengths"}, "join_parts": {"lengths"}},
        pointwise: {"store_token": {"slots"}},
        choosing: {"best_of_block": {"keys"}},
        masking: {"mask_block": {"masks", "rows"}},
    }
    for module, kernels in views.items():
        for tree in ast.parse(inspect.getsource(module)).body:
            if isinstance(tree, ast.FunctionDef) and tree.name in kernels:
                (options,) = [one for one in tree.decorator_list if isinstance(one, ast.Call)]
                stated = {word.arg: set(ast.literal_eval(word.value)) for word in options.keywords}
                assert stated == {"do_not_specialize_on_alignment": kernels.pop(tree.name)}
        assert not kernels


def test_a_product_that_is_cut_alike_is_compiled_alike() -> None:
    """For one row, too: Triton would make a kernel of its own for a number that is 1, or a multiple of 16."""
    (kernel,) = [
        tree
        for tree in ast.parse(inspect.getsource(fixed)).body
        if isinstance(tree, ast.FunctionDef) and tree.decorator_list
    ]
    (options,) = [one for one in kernel.decorator_list if isinstance(one, ast.Call)]
    assert {word.arg: ast.literal_eval(word.value) for word in options.keywords} == {
        "do_not_specialize": ["rows", "stride"]
    }


def test_both_sides_mean_the_same_groups() -> None:
    assert coded.GROUP == GROUP


def test_noise_takes_exact_logarithms(compiled: list[dict[str, Any]]) -> None:
    """The quick one is wrong next to 1, where the greatest noise is: it would be NaN, or anybody's."""
    found = [one for one in compiled if one["kernel"] == "best_of_block"]
    assert found
    assert not [one for one in found if "lg2.approx" in one["quick"]]


def test_attention_uses_tensor_cores_and_fits_into_shared_memory(compiled: list[dict[str, Any]]) -> None:
    """99 KiB: the least of the GPUs of these generations (compute capability 8.6, 8.9, 12.0)."""
    found = [one for one in compiled if one["kernel"] == "attend_part"]
    assert found
    for one in found:
        assert one["tensor_cores"]
        assert one["shared_memory"] <= 99 << 10
