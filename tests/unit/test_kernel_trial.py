"""Kernels are taken for their numbers: those that raise and those that lie are passed over, with their reason."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from test_paged_attention import language

from siglane.engine.attention import by_rows as by_rows_module
from siglane.engine.attention.by_rows import PREFILLS_ALIKE, STEPS_ALIKE, RowKernels, each_token
from siglane.engine.attention.cuda import TriedKernels, TritonKernels, packed_slots, tried_kernels
from siglane.engine.attention.kernels import DecodeAttention, DecodeRows, Kernels, PrefillAttention, PrefillRows
from siglane.engine.attention.plain import EagerKernels, TorchKernels
from siglane.engine.attention.trial import Shape, decoded, prefilled, stored
from siglane.engine.cache.kv import PagedKV
from siglane.errors import EngineError
from siglane.nn.act import SwiGLU
from siglane.nn.attention import packed_attention, tried_backend
from siglane.nn.cuda.invariant import try_fixed_product
from siglane.nn.cuda.optimise import optimise_on_cuda, use_kernels
from siglane.nn.experts import Mixing, Routing
from siglane.nn.norm import InputRMSNorm, RMSNorm
from siglane.nn.rope import NormedRotation, Rotation
from siglane.nn.trial import fault, first_right
from siglane.types import AttentionBackend

CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def shape(heads: int = 6, kv_heads: int = 2, head_dim: int = 64, dtype: torch.dtype = torch.float32) -> Shape:
    config = replace(language(), num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    return Shape(config, heads, kv_heads, 16, dtype, CPU)


class WrongScale(TorchKernels):
    def decode(self, rows: DecodeRows) -> DecodeAttention:
        attend = super().decode(rows)
        return lambda layer, q: attend(layer, q * (72 / 64) ** 0.5)

    def prefill(self, rows: PrefillRows) -> PrefillAttention:
        attend = super().prefill(rows)
        return lambda layer, q, k, v: attend(layer, q * (72 / 64) ** 0.5, k, v)


class OneTooMany(TorchKernels):
    """Sees a token behind the end, where it is not at the end of a page."""

    def decode(self, rows: DecodeRows) -> DecodeAttention:
        longer = torch.where(rows.lengths % 16 == 0, rows.lengths, rows.lengths + 1)
        return super().decode(rows._replace(lengths=longer))


class TopLeft(TorchKernels):
    """The first query sees the first key only, wherever a sequence goes on."""

    def prefill(self, rows: PrefillRows) -> PrefillAttention:
        attend = EagerKernels(self.kv).prefill(rows)

        def wrong(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out, first = attend(layer, q, k, v), 0
            for chunk in rows.chunks:
                own = rows.table[chunk.sequence.table_row, 0]
                out[first] = self.kv.values[layer, own, 0].repeat_interleave(q.shape[1] // k.shape[1], 0)
                first += chunk.tokens
            return out

        return wrong


class Neighbour(TorchKernels):
    def store(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().store(layer, slots, k, v)
        super().store(layer, slots[:1] - 1, k[:1], v[:1])


class Exchanged(TorchKernels):
    def store(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().store(layer, slots, v, k)


class Missing(TorchKernels):
    def decode(self, *args: object) -> NoReturn:
        raise ImportError("No module named 'triton'")

    prefill = store = decode


@DTYPES
@pytest.mark.parametrize("head_dim", [32, 64, 72])
@pytest.mark.parametrize("kernels", [TorchKernels, EagerKernels])
def test_honest_kernels_pass(kernels: Callable[[PagedKV], Kernels], head_dim: int, dtype: torch.dtype) -> None:
    wanted = shape(14, 2, head_dim, dtype)
    for run, expected in (stored(wanted), decoded(wanted), prefilled(wanted)):
        assert fault(lambda run=run: run(kernels), expected) is None  # type: ignore[misc]


@DTYPES
@pytest.mark.parametrize(
    ("kernels", "trial"),
    [
        (WrongScale, decoded),
        (WrongScale, prefilled),
        (OneTooMany, decoded),
        (TopLeft, prefilled),
        (Neighbour, stored),
        (Exchanged, stored),
    ],
)
def test_lies_are_found(kernels: type[TorchKernels], trial: Callable[[Shape], object], dtype: torch.dtype) -> None:
    run, expected = trial(shape(dtype=dtype))  # type: ignore[misc]
    reason = fault(lambda: run(kernels), expected)
    assert reason is not None
    assert reason.endswith(" off")


def test_the_first_that_is_right_is_taken_and_the_others_are_named(caplog: pytest.LogCaptureFixture) -> None:
    wanted = shape()
    kv = wanted.cache(8)
    with caplog.at_level(logging.INFO, "siglane"):
        steps = {"absent": Missing, "too many": OneTooMany, "wrong place": Neighbour, "torch": TorchKernels}
        chosen = tried_kernels(wanted, kv, steps, {"absent": Missing, "scaled": WrongScale, "eager": EagerKernels})
    assert isinstance(chosen.prefilling, EagerKernels)
    assert type(chosen.storing) is OneTooMany  # whose store is right
    assert type(chosen.decoding) is Neighbour
    assert chosen.storing.kv is kv
    assert not chosen.records
    text = caplog.text
    assert "decoding, 6 heads of 64 over 2 in torch.float32: absent is not used here: ImportError: No module" in text
    assert "too many is not used here: is nan off" in text
    assert "prefill, 6 heads of 64 over 2 in torch.float32: scaled is not used here: is 0." in text
    assert "prefill, 6 heads of 64 over 2 in torch.float32: eager" in text


def test_kernels_of_a_gpu_are_refused_on_a_cpu_and_torch_is_left() -> None:
    """Triton's operators have no CPU form, torch's packed attention neither: both fail their trial, nothing else."""
    wanted = shape()
    chosen = tried_kernels(wanted, wanted.cache(8))
    assert [type(part) for part in (chosen.storing, chosen.decoding, chosen.prefilling)] == [TorchKernels] * 3
    assert TriedKernels(*[TritonKernels(wanted.cache(1))] * 3).records


def by_rows(kv: PagedKV) -> Kernels:
    return RowKernels(TorchKernels(kv, records=True))


@DTYPES
def test_a_prefill_of_tokens_by_themselves_is_a_prefill(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that begin a sequence and that go on with one, of more tokens than are computed at a time."""
    monkeypatch.setattr(by_rows_module, "ROWS", 10)
    wanted = shape(14, 2, 64, dtype)
    for run, expected in (stored(wanted), decoded(wanted), prefilled(wanted)):
        assert fault(lambda run=run: run(by_rows), expected) is None  # type: ignore[misc]
    assert len(prefilled(wanted)[1]) > 10
    assert by_rows(wanted.cache(1)).records


def test_each_token_of_a_prefill_sees_what_stands_before_it() -> None:
    """Three tokens behind two, one that begins, two behind four."""
    table, chunks = torch.zeros(9, 4, dtype=torch.int32), [Tokens(3), Tokens(1), Tokens(2)]
    starts = torch.tensor([0, 3, 4, 6]), torch.tensor([0, 5, 6, 12])
    rows = PrefillRows(table, torch.tensor([7, 2, 5]), *starts, chunks)  # type: ignore[arg-type]
    every = each_token(rows)
    assert every.rows.tolist() == [7, 7, 7, 2, 5, 5]
    assert every.lengths.tolist() == [3, 4, 5, 1, 5, 6]


class Tokens(NamedTuple):
    """Of a chunk."""

    tokens: int


def test_what_goes_by_the_number_of_rows_is_not_taken_where_that_is_not_wanted() -> None:
    """Here no kernel of a GPU runs, and torch's operations are not among what may stand for them."""
    wanted = shape()
    with pytest.raises(EngineError, match=r"^storing keys and values: no kernel .* \(Triton: "):
        tried_kernels(wanted, wanted.cache(8), STEPS_ALIKE, PREFILLS_ALIKE)
    with pytest.raises(EngineError, match=r"^RMSNorm of 64: no kernel .* \(Triton: "):
        use_kernels(torch.nn.ModuleList([RMSNorm(64, 1e-6)]), torch.float32, CPU, alone=True)
    with pytest.raises(EngineError, match=r"^products that are cut alike: no kernel .* \(Triton: "):
        try_fixed_product(torch.float32, CPU)


def test_no_kernel_left_is_one_line_with_every_reason() -> None:
    wanted = shape()
    with pytest.raises(
        EngineError, match=r"(?s)^decoding.*absent: ImportError: No.*scaled: is 0\.\d+ off\)$"
    ) as caught:
        first_right("decoding", {"absent": Missing, "scaled": WrongScale}, *decoded(wanted))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (torch.zeros(2, 3), None),
        (torch.zeros(3, 2), "gives [3, 2] instead of [2, 3]"),
        (torch.full((2, 3), torch.nan), "is nan off"),
        (torch.full((2, 3), torch.inf), "is inf off"),
        (torch.ones(2, 3, dtype=torch.int64), "gives torch.int64"),
    ],
)
def test_what_is_wrong_with_a_result(result: torch.Tensor, reason: str | None) -> None:
    assert fault(lambda: result, torch.zeros(2, 3)) == reason


def test_packed_slots_are_those_of_the_pages() -> None:
    run, _ = prefilled(shape())
    seen: list[PrefillRows] = []

    class Spy(TorchKernels):
        def prefill(self, rows: PrefillRows) -> PrefillAttention:
            seen.append(rows)
            return super().prefill(rows)

    run(Spy)
    (rows,) = seen
    expected = [
        int(rows.table[chunk.sequence.table_row, place // 16]) * 16 + place % 16
        for chunk in rows.chunks
        for place in range(chunk.stop)
    ]
    assert packed_slots(rows, 16).tolist() == expected


class Doubled(RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Half(Rotation):
    """Pairs neighbours."""

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        other = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return x * cos + other * sin


class Gated(SwiGLU):
    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return gate * gate.sigmoid() * up


class SameRouting(Routing):
    """Another name."""


class SameMixing(Mixing):
    """Another name."""


class SameRotation(NormedRotation):
    """Another name."""


class LastRouting(Routing):
    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = super().forward(logits)
        return weights, logits.shape[1] - 1 - chosen


class EqualMixing(Mixing):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        *others, weights, chosen = args
        return super().forward(*others, torch.full_like(weights, 0.5), chosen)


class Exchange(NormedRotation):
    def forward(self, *args: Any) -> torch.Tensor:
        *others, q_norm, k_norm = args
        return super().forward(*others, k_norm, q_norm)


HONEST: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    Routing: SameRouting, Mixing: SameMixing, NormedRotation: SameRotation,
}  # fmt: skip
LYING: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    Routing: LastRouting, Mixing: EqualMixing, NormedRotation: Exchange,
}  # fmt: skip


class TestModules:
    @DTYPES
    def test_those_whose_kernels_are_right_take_them(
        self, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
    ) -> None:
        norms = [RMSNorm(72, 1e-6), RMSNorm(72, 1e-6), InputRMSNorm(48, 1e-5)]
        for norm in norms:
            torch.nn.init.uniform_(norm.weight, 0.5, 2)
        decoder = torch.nn.ModuleList([*norms, Rotation(64), SwiGLU()]).to(dtype)
        with caplog.at_level(logging.INFO, "siglane"):
            use_kernels(decoder, dtype, CPU, {RMSNorm: Doubled, Rotation: Half, SwiGLU: Gated})
        assert [type(module) for module in decoder] == [RMSNorm, RMSNorm, InputRMSNorm, Rotation, Gated]
        assert caplog.text.count("Triton is not used here: is ") == 2  # once for each kind and size

    @DTYPES
    def test_experts_and_normed_heads_are_tried_too(self, dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
        """Routers that choose others and mixtures without their weights are found, honest ones are taken."""
        for kernels in (HONEST, LYING):
            parts = [Routing(3, normalised=True), Mixing(5), NormedRotation(64, 4)]
            decoder = torch.nn.ModuleList(parts).to(dtype)
            with caplog.at_level(logging.INFO, "siglane"):
                use_kernels(decoder, dtype, CPU, kernels)
            types = [type(module) for module in decoder]
            assert types == ([*HONEST.values()] if kernels is HONEST else [*HONEST])
        assert caplog.text.count("Triton is not used here: is ") == 3

    def test_triton_needs_a_gpu(self) -> None:
        norm = RMSNorm(72, 1e-6)
        torch.nn.init.ones_(norm.weight)
        decoder = torch.nn.ModuleList([norm, Rotation(64), SwiGLU()])
        optimise_on_cuda(decoder)
        use_kernels(decoder, torch.float32, CPU)
        assert [type(module) for module in decoder] == [RMSNorm, Rotation, SwiGLU]


class TestTower:
    @DTYPES
    def test_a_backend_is_tried(self, dtype: torch.dtype) -> None:
        assert tried_backend(("torch_varlen", "sdpa"), CPU, dtype, 4, 72) == "sdpa"

    @DTYPES
    def test_a_wrong_scale_is_found(self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
        def lying(*args: torch.Tensor, scale: float, backend: AttentionBackend) -> torch.Tensor:
            return packed_attention(*args, scale=scale * (72 / 80) ** 0.5, backend=backend)  # type: ignore[arg-type]

        monkeypatch.setattr("siglane.nn.attention.packed_attention", lying)
        with pytest.raises(EngineError, match=r"^vision attention, 4 heads of 72 in .*sdpa: is 0\.\d+ off"):
            tried_backend(("sdpa",), CPU, dtype, 4, 72)
