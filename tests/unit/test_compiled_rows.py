"""Few rows of 8-bit and 4-bit layers in one compiled call, against the same arithmetic in float64."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from llvmlite import binding

from siglane.nn.cpu import int8_packing, memory
from siglane.nn.cpu.int4 import Int4Codes, Int4Linear, int4_codes, unpacked
from siglane.nn.cpu.int8 import CentredInt8Linear, Int8Codes, Int8Weight, WideInt8Linear
from siglane.nn.cpu.jit.entrance import compiled_layer, compiles
from siglane.nn.cpu.memory import in_large_pages
from siglane.nn.cpu.onednn import is_exact

SHAPES = [(64, 64), (130, 100), (1, 7), (256, 192)]
TOP = {CentredInt8Linear: 127, WideInt8Linear: 2**15 - 129}  # a row whose peak this is has its own numbers as codes


@pytest.fixture(autouse=True)
def compiled() -> None:
    if compiled_layer() is None:
        pytest.skip("needs llvmlite and AVX2")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["widest", "plain", "avxvnni", "avx2"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this processor, those without tiles and bfloat16, and those of lesser ones."""
    from siglane.nn.cpu.jit import layer
    from siglane.nn.cpu.jit.processor import DOTS, Processor

    own = layer.this_processor()
    if request.param == "widest":
        return
    chosen = Processor(own.dot if request.param == "plain" else request.param)
    features = binding.get_host_cpu_features()
    if chosen == own or not all(features.get(name) for name in DOTS[chosen.dot]):
        pytest.skip(f"needs more than this processor has: {chosen}")
    monkeypatch.setattr(layer, "this_processor", lambda: chosen)


def numbers(*shape: int, top: int, seed: int = 0) -> torch.Tensor:
    """Whole ones, in every row the greatest."""
    drawn = torch.randint(-top, top + 1, shape, generator=torch.Generator().manual_seed(seed)).float()
    drawn[:, -1] = top
    return drawn


def layer(
    kind: type[Int8Weight], outputs: int, inputs: int, *, bias: bool = False, **options: float
) -> tuple[Int8Weight, torch.Tensor]:
    """And its weight, float64."""
    codes = numbers(outputs, inputs, top=127, seed=1).to(torch.int8)
    scale = torch.rand(outputs, generator=torch.Generator().manual_seed(2)) + 0.5
    shift = torch.linspace(-5, 5, outputs) if bias else None
    made = kind(Int8Codes(codes, scale), shift, **options)  # type: ignore[arg-type]
    assert made.compiled is not None
    return made, codes.double() * scale.double()[:, None]


@pytest.mark.few("widest-*", "avx2-*", "*-shape0-*", "*-shape1-*", "*-shape2-*", "*-shape3-*")
@torch.no_grad()
@pytest.mark.usefixtures("threads", "instructions")
@pytest.mark.parametrize("kind", TOP)
@pytest.mark.parametrize("shape", [*SHAPES, (2048, 512)])
def test_it_is_integer_arithmetic(kind: type[Int8Weight], shape: tuple[int, int]) -> None:
    made, weight = layer(kind, *shape, bias=True)
    assert made.compiled is not None
    most = numbers(99, shape[1], top=TOP[kind])
    products = F.linear(most.double(), weight, made.bias.double())  # type: ignore[union-attr]
    sums = most.double().abs() @ weight.abs().T
    for rows in (0, 1, 2, 4, 7, 40, 99):
        x, residual, expected = most[:rows], torch.randn(rows, shape[0]), products[:rows]
        tolerance = 1e-6 * sums[:rows].amax() if rows else 0.0
        assert (made(x) - expected).abs().le(tolerance).all()
        assert (made.added(x, residual) - (residual + expected)).abs().le(tolerance).all()
        wide = torch.stack((x, x), 1)
        assert torch.equal(made(wide[:, 0]), made(x))  # rows that do not lie together


@torch.no_grad()
def test_a_norm_and_a_gate() -> None:
    made, weight = layer(CentredInt8Linear, 256, 192, eps=0.5)
    assert made.compiled is not None
    assert made.compiled.gates
    for rows in (1, 5, 40):
        x = numbers(rows, 192, top=127)
        gate, up = F.linear(F.rms_norm(x.double(), (192,), eps=0.5) * 0.02, weight * 50).chunk(2, 1)
        assert torch.allclose(made.gated(x).double(), F.silu(gate) * up, rtol=1e-5, atol=1e-3)
    assert torch.allclose(made.gated(x.bfloat16()).float(), made.gated(x), rtol=2e-2, atol=1e-2)
    more = numbers(made.compiled.most + 1, 192, top=127)
    assert torch.allclose(made.gated(more)[:-1], made.gated(more[:-1]), rtol=1e-4, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("value", [-200.0, -90.0, -1.0, 0.0, 1e-3, 30.0, 200.0])
def test_silu_of_small_and_of_large_numbers(value: float) -> None:
    codes = torch.zeros(128, 64, dtype=torch.int8)
    codes[:, 0] = 127
    made = CentredInt8Linear(Int8Codes(codes, torch.ones(128) / 127), None)
    x = torch.zeros(1, 64)
    x[0, 0] = value
    assert torch.allclose(made.gated(x), F.silu(x[0, 0]) * x[0, 0], rtol=1e-5, atol=1e-30)


@torch.no_grad()
@pytest.mark.parametrize("kind", TOP)
def test_an_undefined_value_stays_in_its_row(kind: type[Int8Weight]) -> None:
    made, _ = layer(kind, 256, 192)
    x, residual = torch.randn(6, 192), torch.zeros(6, 256)
    expected = made.added(x, residual)
    x[1, 3], x[4, 191] = torch.nan, torch.inf
    found = made.added(x, residual)
    assert not found[[1, 4]].isfinite().any()
    assert torch.equal(found[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])
    assert torch.equal(made(x[:1])[0], expected[0])  # nor does a row know how many there are


@torch.no_grad()
@pytest.mark.usefixtures("threads")
def test_several_threads_may_use_one_layer() -> None:
    made, _ = layer(WideInt8Linear, 2048, 512)
    inputs = [torch.randn(1 + number % 5, 512) for number in range(40)]
    expected = [made(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(made, inputs), expected))


@cache
def four_bits(shape: tuple[int, int], group_size: int) -> Int4Codes:
    """The same for all instructions; looking for them takes longer than everything else here."""
    return int4_codes(torch.randn(shape, generator=torch.Generator().manual_seed(3)), group_size=group_size)


@pytest.mark.few("*-shape0-32", "*-shape1-64", "*-shape2-32", "widest-*")
@torch.no_grad()
@pytest.mark.usefixtures("threads", "instructions")
@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("shape", [(64, 64), (130, 100), (1024, 544)])
def test_four_bits_are_a_float_product(shape: tuple[int, int], group_size: int) -> None:
    outputs, inputs = shape
    made = Int4Linear(four_bits(shape, group_size), torch.randn(outputs), eps=0.25)
    assert made.compiled is not None
    weight = unpacked(made.codes, made.scales, group_size).double()[:inputs, :outputs]
    for rows in (1, 3, 4, 9, made.compiled.most):
        x, residual = torch.randn(rows, inputs), torch.randn(rows, outputs)
        normed = F.rms_norm(x, (inputs,), eps=0.25).bfloat16().double()
        expected = normed @ weight
        tolerance = 2**-8 * expected.abs() + 0.05  # a value between two of bfloat16 may become either
        assert (made.added(x, residual) - (residual + expected + made.bias)).abs().le(tolerance).all()
        if outputs % 128 == 0:
            gate, up = (expected + made.bias).chunk(2, 1)
            assert torch.allclose(made.gated(x).double(), F.silu(gate) * up, rtol=0.05, atol=0.5)
    x[1] = torch.nan
    found = made(x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()
    assert torch.equal(made(x[2:3])[0], found[2])


def test_gradients_are_refused() -> None:
    made, _ = layer(CentredInt8Linear, 256, 192)
    x = torch.randn(2, 192, requires_grad=True)
    for call in (made, made.gated, lambda rows: made.added(rows, torch.zeros(2, 256))):
        with pytest.raises(ValueError, match="no gradient"):
            call(x)


@torch.no_grad()
def test_what_it_needs_may_be_missing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if not is_exact():
        pytest.skip("oneDNN's products are not exact here, so there are none without compiled loops")
    made, _ = layer(WideInt8Linear, 128, 64)
    x, residual = numbers(3, 64, top=TOP[WideInt8Linear]), torch.ones(3, 128)
    with monkeypatch.context() as without, caplog.at_level(logging.INFO, logger="siglane"):
        without.setattr(importlib.util, "find_spec", lambda name: None)
        compiles.cache_clear()
        plain = WideInt8Linear(made.stored, None)
        compiles.cache_clear()
    assert plain.compiled is None
    assert "pip install 'siglane[cpu]'" in caplog.text
    assert torch.allclose(plain.added(x, residual), made.added(x, residual), rtol=1e-5, atol=1e-2)
    monkeypatch.setattr(int8_packing, "holds", lambda packed, codes: False)
    monkeypatch.setattr(int8_packing, "_known", {})
    assert WideInt8Linear(made.stored, None).compiled is None  # of an order that is not known


def test_large_pages_hold_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3 << 20)
    expected = weight.clone()
    in_large_pages(weight)
    assert torch.equal(weight, expected)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    in_large_pages(weight)
