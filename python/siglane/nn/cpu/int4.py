"""Products of 4-bit weights on CPUs: weight-only, rows in bfloat16.

Each output's weights are cut into groups of inputs with a scale and a zero point each, found without data: of a few
ranges inside the group's own, the one with the least squared error. Scales have four significant bits and zero points
are codes, so that a weight is a bfloat16 number exactly. Few rows are multiplied by torch's kernel for packed codes;
many by a float product of weights that are unpacked some outputs at a time. Both then multiply the same numbers, and
how many rows come together changes the order of a sum, nothing else.
"""

from __future__ import annotations

import functools
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from siglane.nn.act import swiglu
from siglane.nn.cpu.few_rows import LEAST
from siglane.nn.cpu.int8 import Turn
from siglane.nn.cpu.jit.entrance import compiled_layer, compiles
from siglane.nn.cpu.memory import in_large_pages
from siglane.nn.cpu.sealed import Sealed

if TYPE_CHECKING:
    from siglane.nn.cpu.jit.layer import CompiledLayer

GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 32
TOP = 15  # the largest code
MIDDLE = 8  # the code that torch's kernel subtracts
SCALE_BITS = 4  # significant ones of a scale: times those of a difference of codes they are bfloat16's eight
SHRINK = (1.0, 0.9, 0.8)  # of a group's least and greatest value
BLOCK = 64  # outputs that the kernel keeps together: all rows of codes of one block, then the next
CODED_VALUES = 1 << 18  # weights whose codes are looked for at a time: they stay in the cache
PACKED_ROWS = 8 * BLOCK  # of codes that are wide at a time
SLICE = 8  # blocks that are unpacked at a time
RUN = 32  # outputs of a run, as compiled loops take them
FEW_ROWS = 96  # from here on unpacking costs less than the kernel for packed codes


class Int4Codes(NamedTuple):
    """A weight `[N, K]`, both sides filled up with zeros to multiples of BLOCK and of the size of a group.

    pairs: u8 `[N, K / 2]`, the codes of two neighbours, the first in the low half; scale: bfloat16 and zero: u8,
    `[N, K / group_size]`. A weight is (code - zero) * scale.
    """

    pairs: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    outputs: int
    inputs: int

    @property
    def group_size(self) -> int:
        return 2 * self.pairs.shape[1] // self.scale.shape[1]


def int4_codes(weight: torch.Tensor, turn: Turn | None = None, *, group_size: int = GROUP_SIZE) -> Int4Codes:
    """turn: as of `int8_codes`."""
    outputs, inputs = weight.shape
    count = max(1, CODED_VALUES // inputs // BLOCK) * BLOCK
    made = []
    for rows in weight.detach().split(count):
        wide = (rows if turn is None else turn(rows)).float()
        codes, scale, zero = group_codes(F.pad(wide, (0, -inputs % group_size, 0, -len(rows) % BLOCK)), group_size)
        made.append((paired(codes), scale.bfloat16(), zero.to(torch.uint8)))
    pairs, scales, zeros = (torch.cat(one) for one in zip(*made, strict=True))
    return Int4Codes(pairs, scales, zeros, outputs, inputs)


def paired(codes: torch.Tensor) -> torch.Tensor:
    """u8 `[N, K]` of codes -> `[N, K / 2]`."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def pair_codes(pairs: torch.Tensor) -> torch.Tensor:
    """The reverse."""
    return torch.stack((pairs & TOP, pairs >> 4), -1).flatten(1)


class Int4Linear(Sealed):
    """`y = x W^T + b` with W of 4 bits: x `[..., K]` of any float dtype -> `[..., N]` in the same one, rounded to
    bfloat16 on the way.

    eps: of an RMSNorm without gain that stands before the layer. turn: as of `Int8Weight`, whose promises it keeps.
    """

    sealed, sealed_by, refusal = "a 4-bit layer", "quantise", ValueError

    def __init__(
        self,
        weight: torch.Tensor | Int4Codes,
        bias: torch.Tensor | None,
        turn: Turn | None = None,
        *,
        eps: float | None = None,
        group_size: int = GROUP_SIZE,
    ) -> None:
        """group_size: of weights that are no codes yet."""
        super().__init__()
        made = weight if isinstance(weight, Int4Codes) else int4_codes(weight, turn, group_size=group_size)
        self.outputs, self.inputs, self.group_size, self.eps = made.outputs, made.inputs, made.group_size, eps
        self.bias = None if bias is None else bias.detach().float()
        self.codes = torch.empty_like(made.pairs)
        for pairs, into in zip(made.pairs.split(PACKED_ROWS), self.codes.split(PACKED_ROWS), strict=True):
            into.copy_(pack_pairs(pairs))
        in_large_pages(self.codes)
        scale, zero = made.scale.T, made.zero.T
        self.scales = torch.stack((scale, (MIDDLE - zero.bfloat16()) * scale), -1)  # [groups, N, 2]
        in_large_pages(self.scales)
        self.compiled: CompiledLayer | None = None  # in one call, where this machine can
        if _run() == RUN and (kind := compiled_layer()) is not None:
            self.compiled = kind.four(self.codes, self.scales, self.bias, self.outputs, self.inputs, eps)

    @property
    def stored(self) -> Int4Codes:
        """What it was made of, a copy."""
        codes = torch.cat([unpack_codes(some).transpose(1, 2).flatten(0, 1) for some in self.codes.split(PACKED_ROWS)])
        scale, middle = self.scales.float().unbind(-1)
        zero = MIDDLE - middle / scale
        return Int4Codes(
            paired(codes),
            scale.T.bfloat16().contiguous(),
            zero.T.to(torch.uint8).contiguous(),
            self.outputs,
            self.inputs,
        )

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._refuse_gradient(x)
        if self.compiled is not None and self.compiled.takes(x):
            return self.compiled(x)
        rows = x.reshape(-1, self.inputs).float()
        if self.eps is not None:
            rows = F.rms_norm(rows, (self.inputs,), eps=self.eps)
        narrow = rows.bfloat16()
        if padding := len(self.scales) * self.group_size - self.inputs:
            narrow = F.pad(narrow, (0, padding))
        few = len(narrow) < FEW_ROWS and _run() == _torch_run()
        y = (self._few if few else self._many)(narrow)[:, : self.outputs].float()
        if self.bias is not None:
            y += self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.outputs)

    def added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)`"""
        if self.compiled is not None and self.compiled.takes(x, residual):
            self._refuse_gradient(x)
            return self.compiled(x, residual)
        return residual + self(x)

    def gated(self, x: torch.Tensor) -> torch.Tensor:
        """`swiglu(self(x))`: `[..., N / 2]`"""
        if self.compiled is not None and self.compiled.gates and self.compiled.takes(x):
            self._refuse_gradient(x)
            return self.compiled.gated(x)
        return swiglu(self(x))

    def _refuse_gradient(self, x: torch.Tensor) -> None:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("a 4-bit layer has no gradient; use torch.no_grad(), or train the model in float32")

    def _few(self, x: torch.Tensor) -> torch.Tensor:
        return packed_product(x, self.codes, self.group_size, self.scales)

    def _many(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_empty(len(x), len(self.codes))
        rows, dense = SLICE * BLOCK, _dense_dtype()
        wide = x.to(dense)
        for codes, scales, into in zip(
            self.codes.split(rows), self.scales.split(rows, 1), y.split(rows, 1), strict=True
        ):
            into.copy_(wide @ unpacked(codes, scales, self.group_size).to(dense))
        return y


def group_codes(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x float32 `[N, K]` -> codes u8 `[N, K]`, scale and zero point float32 `[N, K / group_size]`: x is about
    (code - zero) * scale. Zero has a code of its own."""
    groups = x.unflatten(-1, (-1, group_size))
    low, high = groups.amin(-1).clamp_max_(0), groups.amax(-1).clamp_min_(0)
    scale, zero, least = (torch.full_like(low, value) for value in (1.0, 0.0, torch.inf))
    for below, above in product(SHRINK, SHRINK):
        step = _short((high * above - low * below).clamp_min_(LEAST) / TOP)
        none = (low * below / -step).round_().clamp_(0, TOP)
        rounded = (groups / step[..., None]).round_().clamp_(-none[..., None], TOP - none[..., None])
        error = torch.linalg.vector_norm(rounded.mul_(step[..., None]).sub_(groups), dim=-1)
        better = error < least
        for kept, new in ((scale, step), (zero, none), (least, error)):
            torch.where(better, new, kept, out=kept)
    codes = (groups / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, TOP)
    return codes.flatten(-2).to(torch.uint8), scale, zero


def _short(scale: torch.Tensor) -> torch.Tensor:
    """Rounded to SCALE_BITS significant bits."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp((mantissa * 2**SCALE_BITS).round_() / 2**SCALE_BITS, exponent)


def packed_product(x: torch.Tensor, codes: torch.Tensor, group_size: int, scales: torch.Tensor) -> torch.Tensor:
    """torch's kernel: x bfloat16 `[M, K]`, packed codes `[N, K / 2]`, scales `[K / group_size, N, 2]` -> `[M, N]`."""
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group_size, scales)
    return y


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Codes u8 `[N, K]`, N a multiple of BLOCK -> as the kernel reads them, u8 `[N, K / 2]`."""
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed


def pack_pairs(pairs: torch.Tensor) -> torch.Tensor:
    """The same of `paired` codes, u8 `[N, K / 2]`, without widening them: the reverse of `unpack_codes`."""
    if not (run := _run()):
        return pack_codes(pair_codes(pairs))
    low, high = pairs.view(-1, 2, run, pairs.shape[1]).unbind(1)  # [blocks, run, K / 2], two inputs in a byte
    packed = pairs.new_empty(len(low), pairs.shape[1], 2, run)
    packed[:, :, 0] = (low & TOP | high << 4).transpose(1, 2)
    packed[:, :, 1] = (low >> 4 | high & TOP << 4).transpose(1, 2)
    return packed.view(pairs.shape)


def unpack_codes(packed: torch.Tensor, run: int | None = None) -> torch.Tensor:
    """The reverse, block by block and inputs first: u8 `[N, K / 2]` -> `[N / B, K, B]`. A block's bytes are its
    inputs', one after another, each two runs of outputs, the second in the high halves; a run is as long as two
    registers of the kernel."""
    run = run or _run()
    pairs = packed.view(len(packed) // (2 * run), -1, run)
    codes = pairs.new_empty(*pairs.shape[:2], 2 * run)
    torch.bitwise_and(pairs, TOP, out=codes[..., :run])
    torch.bitwise_right_shift(pairs, 4, out=codes[..., run:])
    return codes


def unpacked(packed: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """Weights bfloat16 `[K, N]`, exactly what the kernel multiplies with."""
    codes = unpack_codes(packed).bfloat16().unflatten(1, (-1, group_size))  # [blocks, groups, group_size, B]
    scale, middle = scales.unflatten(1, (-1, codes.shape[-1])).permute(3, 1, 0, 2)[:, :, :, None]
    weights = codes.new_empty(*codes.shape[1:3], len(codes), codes.shape[-1])
    torch.addcmul(middle - MIDDLE * scale, codes, scale, out=weights.permute(2, 0, 1, 3))
    return weights.flatten(2).flatten(0, 1)


def _run() -> int:
    """Outputs of one run: 32 where loops are compiled. 0: torch, whose kernel is used elsewhere, keeps codes in another
    order here."""
    return RUN if compiles() else _torch_run()


@functools.cache
def _torch_run() -> int:
    """Of torch's kernel: 32 with AVX-512, 16 with AVX2, 0 where it keeps codes in another order."""
    codes = torch.arange(BLOCK * 32, dtype=torch.int32).remainder_(TOP + 1).mul_(7).remainder_(13).view(BLOCK, 32)
    packed = pack_codes(codes)
    for run in (RUN, 16):
        if torch.equal(unpack_codes(packed, run).transpose(1, 2).flatten(0, 1), codes.to(torch.uint8)):
            return run
    return 0


def has_packed_products() -> bool:
    """Whether there is a fast product of 4-bit weights here, a compiled one or torch's."""
    return compiles() or (torch.backends.mkldnn.is_available() and _torch_run() > 0)


@functools.cache
def _dense_dtype() -> torch.dtype:
    """What unpacked weights are multiplied in: bfloat16 where the processor does so, its sums being float32; else
    float32, in which the same numbers are as exact."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
