"""Linear layers with fewer bits in the place of those that a checkpoint filled.

On CPUs products of 8 bits are those of integers (`cpu/int8.py`) and weights of 4 bits are unpacked for theirs
(`cpu/int4.py`); on CUDA weights are widened where they are read (`cuda/low_bits.py`), or both sides are 8-bit floats
(`cuda/fp8.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import nn

from siglane.errors import ConfigError, EngineError, UserError
from siglane.nn.act import SwiGLU, activate
from siglane.nn.cpu.few_rows import LEAST
from siglane.nn.cpu.int4 import Int4Codes, Int4Linear, has_packed_products
from siglane.nn.cpu.int8 import Int8Codes, Int8Linear, Int8Weight, has_integer_products
from siglane.nn.cpu.int8_block import CodedBlock
from siglane.nn.cpu.jit.entrance import missing_products
from siglane.nn.cuda.fp8 import fp8_layers
from siglane.nn.cuda.low_bits import low_bit_linear
from siglane.nn.encoder import EncoderBlock
from siglane.nn.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from siglane.types import Activation

Bits = Literal["8bit", "4bit", "fp8"]
LAYERS = (ColumnParallelLinear, RowParallelLinear, QKVParallelLinear)  # that have a quantised form
Weight = torch.Tensor | Int8Codes | Int4Codes  # [N, K]
MakeLinear = Callable[[Any, torch.Tensor | None], nn.Module]  # `Weight`, bias [N] -> x W^T + b
Given = Callable[[nn.Module], tuple[Weight, torch.Tensor | None]]  # a layer or table -> its weight and bias


def own(layer: nn.Module) -> tuple[Weight, torch.Tensor | None]:
    """What a checkpoint filled `layer` with."""
    bias = layer.bias
    assert bias is None or isinstance(bias, torch.Tensor)
    return layer.get_parameter("weight"), bias


def quantise(model: nn.Module, kind: Bits, device: torch.device | str, given: Given = own) -> nn.Module:
    """`model` itself, the linear layers of its blocks and projector replaced; weights are loaded before, on `device`.

    Embeddings, norms and the pooling heads stay as they are: a head is about one block's work and has no successor that
    could even out its errors. given: the codes of each layer where they were made before, of weights that this function
    had prepared; the layers' own weights are then not read. UserError when there is no kernel for it here, ConfigError
    when there is nothing to replace, because the model has no such layers or they were replaced before.
    """
    device = torch.device(device)
    make = kernel(kind, device)
    layers = float_layers(model)
    if not layers:
        raise ConfigError(f"there is nothing to quantise to {kind}: the model has no float linear layers in its blocks")
    if device.type == "cpu" and given is own:
        _balance(model)
    for parent, name, layer in layers:
        setattr(parent, name, quantised(layer, make, given))
    if device.type == "cpu" and kind == "8bit":  # weights of 4 bits are unpacked for all rows at once
        _code(model)
    return model


def has_float_layers(model: nn.Module) -> bool:
    """Whether `quantise` finds something to replace."""
    return bool(float_layers(model))


def float_layers(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Those that `quantise` replaces, each with its parent and its name there."""
    return [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, LAYERS)
    ]


@torch.no_grad()
def _balance(model: nn.Module) -> None:
    """Moves what a norm does to single channels into the weights behind it, which changes no result: its shift becomes
    a part of their bias, and channels that it makes larger than others are divided there and multiplied in the weights,
    which leaves the others more of a row's codes (SmoothQuant, arXiv:2211.10438 section 4, with the norm's own gain in
    the place of recorded activations)."""
    for block in model.modules():
        if not isinstance(block, EncoderBlock) or not isinstance(block.attention.qkv, QKVParallelLinear):
            continue
        for norm, layer in ((block.norm1, block.attention.qkv), (block.norm2, block.mlp.fc1)):
            weight = layer.weight.float()
            assert layer.bias is not None
            bias = torch.addmv(layer.bias.float(), weight, norm.bias.float())
            layer.bias = nn.Parameter(bias, requires_grad=False)
            norm.bias.zero_()
            ratio = (norm.weight.float().abs().clamp_min(LEAST) / weight.abs().amax(0).clamp_min(LEAST)).sqrt()
            divisor = (ratio / ratio.median()).clamp_min(1).to(norm.weight.dtype)
            norm.weight.div_(divisor)
            layer.weight.mul_(divisor)


def _code(model: nn.Module) -> None:
    """Blocks whose layers are whole."""
    for block in model.modules():
        if not isinstance(block, EncoderBlock):
            continue
        out_proj, fc2 = block.attention.out_proj, block.mlp.fc2
        if not (isinstance(out_proj, QuantisedRow) and isinstance(fc2, QuantisedRow)):
            continue
        if out_proj.tp.size == fc2.tp.size == 1:
            block.__class__ = CodedBlock


class QuantisedColumn(nn.Module):
    """`ColumnParallelLinear` whose product is `linear`'s."""

    def __init__(self, layer: ColumnParallelLinear, linear: nn.Module) -> None:
        super().__init__()
        self.tp, self.gather_output = layer.tp, layer.gather_output
        self.linear = linear

    def forward(self, x: torch.Tensor, activation: Activation | None = None) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        if activation is not None:
            y = activate(y, activation)
        return self.tp.all_gather(y) if self.gather_output else y

    def gated(self, x: torch.Tensor, swiglu: SwiGLU) -> torch.Tensor:
        if isinstance(self.linear, Int8Weight | Int4Linear) and not self.gather_output:
            return self.linear.gated(x)
        return swiglu(self(x))


class QuantisedRow(nn.Module):
    """`RowParallelLinear` whose product is `linear`'s, which adds the bias where the layer is whole. Every rank has the
    scales of its own columns."""

    def __init__(self, layer: RowParallelLinear, linear: nn.Module) -> None:
        super().__init__()
        self.tp = layer.tp
        self.linear = linear
        self.bias = None if layer.tp.size == 1 else layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        if self.tp.size > 1:
            y = self.tp.all_reduce(y)
        return y if self.bias is None else y + self.bias

    def added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        if isinstance(self.linear, Int8Weight | Int4Linear) and self.tp.size == 1:
            return self.linear.added(x, residual)
        return residual + self(x)


class QuantisedQKV(nn.Module):
    """`QKVParallelLinear` whose product is `linear`'s."""

    def __init__(self, layer: QKVParallelLinear, linear: nn.Module) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = layer.heads, layer.kv_heads, layer.head_dim
        self.linear = linear

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.together(x).split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        return q, k, v

    def together(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y.unflatten(-1, (-1, self.head_dim))


def quantised(layer: nn.Module, make: MakeLinear, given: Given = own) -> nn.Module:
    """What computes as the float `layer` does, its products by `make`. given: as of `quantise`."""
    weight, bias = given(layer)
    if isinstance(layer, ColumnParallelLinear):
        return QuantisedColumn(layer, make(weight, bias))
    if isinstance(layer, RowParallelLinear):
        return QuantisedRow(layer, make(weight, bias if layer.tp.size == 1 else None))
    assert isinstance(layer, QKVParallelLinear)
    return QuantisedQKV(layer, make(weight, bias))


def unsupported(kind: Bits, message: str) -> UserError:
    """The error for bits that cannot be had. message: why, and what to do."""
    return UserError(f"quantization {kind!r}: {message}", code="unsupported_quantization", param="quantization")


def kernel(kind: Bits, device: torch.device) -> MakeLinear:
    """UserError, naming the reason, when there is none here."""
    if kind not in get_args(Bits):
        raise ConfigError(f"quantization {kind!r} is not known; use none, {', '.join(get_args(Bits))}")
    if kind == "fp8":
        return _fp8(device)
    if device.type != "cpu":
        return low_bit_linear({"8bit": 8, "4bit": 4}[kind], device)
    if not has_integer_products():
        raise unsupported(kind, f"{missing_products()}; use the original model in floats")
    if kind == "8bit":
        return Int8Linear
    if not has_packed_products():
        raise unsupported(kind, "torch has no 4-bit products for this processor (it takes AVX2); use '8bit'")
    return Int4Linear


def _fp8(device: torch.device) -> MakeLinear:
    if device.type == "cpu":
        raise unsupported("fp8", "CPUs have no products of 8-bit floats; use '8bit'")
    try:
        return fp8_layers(device)
    except EngineError as error:
        raise unsupported("fp8", f"{error}; use '8bit'") from error
