"""Linear layers with fewer bits: real integer products on CPUs, weight-only kernels of a library on CUDA.

On CPUs weights are int8, symmetric, one scale for each output; each row becomes 8 bits as it comes, with a scale and a
zero point of its own, so that its result never depends on its neighbours; sums are 32-bit integers, everything else
stays float32. That is W8A8 with per-channel and per-token scales (arXiv:2208.07339 section 2, arXiv:2211.10438
section 2). The zero point is what outliers need: in a row with one huge value, or behind a GELU, almost everything else
lies on one side of it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import platform
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from siglane.errors import ConfigError, UserError
from siglane.nn.act import activate
from siglane.nn.cpu.chunks import chunk_mlp
from siglane.nn.cpu.sealed import Sealed
from siglane.nn.encoder import EncoderBlock, EncoderMLP
from siglane.nn.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from siglane.types import Activation

Bits = Literal["8bit", "4bit"]
MakeLinear = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]  # weight [N, K], bias [N] -> x W^T + b

LEVELS = 127  # weight codes on either side of zero
STEPS = 254  # of a row between its least and its greatest value; one code is left for rounding
# from 2^23 on float32 holds whole numbers only: adding it rounds, and the low byte of the sum is the code; the 2^8 keep
# what is just below zero above 2^23
ROUNDING = float(2**23 + 2**8)
LEAST = 1e-30  # of the spans that are divided by
ROWS = 256  # of one product: what passes between its steps then stays in the cache


def quantise(model: nn.Module, kind: Bits, device: torch.device | str) -> nn.Module:
    """`model` itself, the linear layers of its transformer blocks replaced; weights are loaded before, on `device`.

    Embeddings, norms and the pooling heads stay as they are: a head is about one block's work and has no successor that
    could even out its errors. UserError when there is no kernel for it here, ConfigError when there is nothing to
    replace, because the model has no such layers or they were replaced before.
    """
    device = torch.device(device)
    make = _on_cpu(kind) if device.type == "cpu" else _on_cuda(kind, device)
    layers = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, ColumnParallelLinear | RowParallelLinear | QKVParallelLinear)
    ]
    if not layers:
        raise ConfigError(f"there is nothing to quantise to {kind}: the model has no float linear layers in its blocks")
    if device.type == "cpu":
        _balance(model)
    for parent, name, layer in layers:
        setattr(parent, name, _quantised(layer, make))
    if device.type == "cpu":
        _chunk(model)
    return model


@torch.no_grad()
def _balance(model: nn.Module) -> None:
    """Channels that a norm makes larger than others are divided there and multiplied in the weights behind it, which
    changes no result but leaves the others more of a row's codes (SmoothQuant, arXiv:2211.10438 section 4, with the
    norm's own gain in the place of recorded activations)."""
    for block in model.modules():
        if not isinstance(block, EncoderBlock):
            continue
        for norm, layer in ((block.norm1, block.attention.qkv), (block.norm2, block.mlp.fc1)):
            size = torch.hypot(norm.weight, norm.bias).float().clamp_min(LEAST)
            ratio = (size / layer.weight.abs().amax(0).float().clamp_min(LEAST)).sqrt()
            divisor = (ratio / ratio.median()).clamp_min(1).to(norm.weight.dtype)
            norm.weight.div_(divisor)
            norm.bias.div_(divisor)
            layer.weight.mul_(divisor)


def _chunk(model: nn.Module) -> None:
    """The wide values inside an MLP stay in the cache instead of going through memory."""
    for module in model.modules():
        if isinstance(module, EncoderMLP) and isinstance(module.fc2, QuantisedRow) and module.fc2.tp.size == 1:
            chunk_mlp(module, ROWS)


class Int8Linear(Sealed):
    """`y = x W^T + b` by int8 products: x `[..., K]` of any float dtype -> `[..., N]` in the same one.

    It lives on the CPU and has no parameters: it cannot be trained, saved, moved, cast, copied or loaded into;
    ValueError for any attempt. A row with an infinite or undefined value gives undefined values, and no other row does.
    """

    sealed, sealed_by, refusal = "an 8-bit layer", "quantise", ValueError

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        wide = weight.detach().float()
        self.outputs, self.inputs = wide.shape
        peak = wide.abs().amax(1)
        self.scale = torch.where(peak > LEAST, peak, 1.0) / LEVELS
        codes = (wide / self.scale[:, None]).round_()
        self.packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(codes.to(torch.int8), None)
        self.zero_points = torch.zeros(self.outputs, dtype=torch.int64)
        shift = torch.zeros(self.outputs) if bias is None else bias.detach().float()
        # what a row's zero point adds to its sums, and the bias: one product with [zero point, 1] adds both
        self.corrections = torch.stack((codes.sum(1) * self.scale, shift))

    @property
    def nbytes(self) -> int:
        """What it holds in memory."""
        return self.outputs * self.inputs + sum(x.nbytes for x in (self.scale, self.zero_points, self.corrections))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("an 8-bit layer has no gradient; use torch.no_grad(), or train the model in float32")
        rows = x.reshape(-1, self.inputs).float()
        if rows.shape[0] <= ROWS:
            y = self._multiply(rows)
        else:
            y = torch.empty(rows.shape[0], self.outputs)
            for part, into in zip(rows.split(ROWS), y.split(ROWS), strict=True):
                into.copy_(self._multiply(part))
        return y.to(x.dtype).reshape(*x.shape[:-1], self.outputs)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale, zero = row_codes(x)
        y = _integer_product(codes, self.packed, self.scale, self.zero_points).mul_(scale)
        return y.addmm_(torch.cat((zero * -scale, torch.ones_like(zero)), 1), self.corrections)


def row_codes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x float32 `[M, K]` -> codes u8 `[M, K]`, scale and zero point float32 `[M, 1]`: x is about (code - zero) * scale.

    Zero has a code of its own, so that what is exactly zero stays so.
    """
    low, high = x.amin(-1, keepdim=True).clamp_max_(0), x.amax(-1, keepdim=True).clamp_min_(0)
    span = (high - low).clamp_min_(LEAST)
    steps = STEPS / span
    zero = (low * -steps).round_()
    codes = x.mul(steps).add_(zero + ROUNDING).view(torch.int32).to(torch.uint8)
    return codes, span / STEPS, zero


def _integer_product(
    codes: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero_points: torch.Tensor
) -> torch.Tensor:
    """`(codes W^T) * scale`, float32. oneDNN has fast kernels for unsigned rows and signed weights only."""
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product


class QuantisedColumn(nn.Module):
    """`ColumnParallelLinear` of quantised weights."""

    def __init__(self, layer: ColumnParallelLinear, make: MakeLinear) -> None:
        super().__init__()
        self.tp, self.gather_output = layer.tp, layer.gather_output
        self.linear = make(layer.weight, layer.bias)

    def forward(self, x: torch.Tensor, activation: Activation | None = None) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        if activation is not None:
            y = activate(y, activation)
        return self.tp.all_gather(y) if self.gather_output else y


class QuantisedRow(nn.Module):
    """`RowParallelLinear` of quantised weights. Every rank has the scales of its own columns."""

    def __init__(self, layer: RowParallelLinear, make: MakeLinear) -> None:
        super().__init__()
        self.tp = layer.tp
        alone = layer.tp.size == 1
        self.linear = make(layer.weight, layer.bias if alone else None)
        self.bias = None if alone else layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        if self.tp.size > 1:
            y = self.tp.all_reduce(y)
        return y if self.bias is None else y + self.bias


class QuantisedQKV(nn.Module):
    """`QKVParallelLinear` of quantised weights."""

    def __init__(self, layer: QKVParallelLinear, make: MakeLinear) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = layer.heads, layer.kv_heads, layer.head_dim
        self.linear = make(layer.weight, layer.bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        qkv = self.linear(x).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        return q, k, v


def _quantised(layer: nn.Module, make: MakeLinear) -> nn.Module:
    if isinstance(layer, ColumnParallelLinear):
        return QuantisedColumn(layer, make)
    if isinstance(layer, RowParallelLinear):
        return QuantisedRow(layer, make)
    assert isinstance(layer, QKVParallelLinear)
    return QuantisedQKV(layer, make)


def _unsupported(kind: Bits, message: str) -> UserError:
    return UserError(f"quantization {kind!r}: {message}", code="unsupported_quantization", param="quantization")


def _on_cpu(kind: Bits) -> MakeLinear:
    if kind == "4bit":
        raise _unsupported(kind, "there are no 4-bit products for CPUs here; use '8bit', or a CUDA device")
    if not _exact():
        raise _unsupported(kind, "this processor has no exact 8-bit products (VNNI or AMX); use 'none'")
    return Int8Linear


@functools.cache
def _exact() -> bool:
    """Whether int8 products are integer products here: oneDNN's kernels for processors without VNNI add neighbours up
    in 16 bits, which overflow in silence, and on other architectures it has none that are fast."""
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return False
    inputs = 64
    weight = torch.full((16, inputs), LEVELS, dtype=torch.int8)
    codes = torch.full((16, inputs), STEPS, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    product = _integer_product(codes, packed, torch.ones(16), torch.zeros(16, dtype=torch.int64))
    return bool((product == inputs * STEPS * LEVELS).all())


def _on_cuda(kind: Bits, device: torch.device) -> MakeLinear:
    if kind == "8bit" and importlib.util.find_spec("torchao") is not None:
        return functools.partial(_torchao_linear, device)
    if importlib.util.find_spec("bitsandbytes") is not None:
        return functools.partial(_bitsandbytes_linear, kind, device)
    wanted = "torchao or bitsandbytes" if kind == "8bit" else "bitsandbytes"
    raise _unsupported(kind, f"{device} needs {wanted}; pip install {wanted.split()[-1]}, or use 'none'")


def _float_linear(weight: torch.Tensor, bias: torch.Tensor | None, device: torch.device) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().to(device), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)  # type: ignore[assignment]
    return layer


def _torchao_linear(device: torch.device, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    """int8 weights, one scale for each output; the product in the activations' dtype."""
    library: Any = importlib.import_module("torchao.quantization")
    layer = _float_linear(weight, bias, device)
    library.quantize_(layer, library.Int8WeightOnlyConfig())
    return layer


def _bitsandbytes_linear(
    kind: Bits, device: torch.device, weight: torch.Tensor, bias: torch.Tensor | None
) -> nn.Module:
    """LLM.int8() (arXiv:2208.07339) or NF4 (arXiv:2305.14314). bitsandbytes quantises when a layer is moved."""
    library: Any = importlib.import_module("bitsandbytes.nn")
    outputs, inputs = weight.shape
    if kind == "8bit":
        layer = library.Linear8bitLt(inputs, outputs, bias=bias is not None, has_fp16_weights=False)
        layer.weight = library.Int8Params(weight.detach().cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        layer = library.Linear4bit(inputs, outputs, bias=bias is not None, compute_dtype=weight.dtype, quant_type="nf4")
        layer.weight = library.Params4bit(weight.detach().cpu(), requires_grad=False, quant_type="nf4")
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    moved: nn.Module = layer.to(device)
    return moved
