"""Encoder blocks of 8 bits: codes of a norm go into the product behind it, and what a product gives becomes the next
one's codes while it lies in a cache. Each row has a scale and a zero point of its own, so no neighbour changes its
numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from siglane.nn.attention import Segments
from siglane.nn.cpu.between import Between
from siglane.nn.cpu.chunks import ChunkedBlock
from siglane.nn.cpu.int8 import Int8Linear, refuse_gradient
from siglane.nn.cpu.jit.entrance import between, coded_block
from siglane.nn.rope import Rotary
from siglane.types import Activation, AttentionBackend

if TYPE_CHECKING:
    from siglane.nn.cpu.jit.coded_calls import CompiledBlock

PRODUCT_ROWS = 288  # whose sums a cache holds: fewer rows take more calls


class CodedBlock(ChunkedBlock):
    """A block whose layers are whole and have 8 bits. The norms' shifts are zero: `quantise` moves them into the layers
    behind."""

    def together(
        self, x: torch.Tensor, segments: Segments, backend: AttentionBackend, rotary: Rotary | None = None
    ) -> torch.Tensor:
        """x of any float dtype, which the result has too; inside there are float32 and `attention_dtype`."""
        refuse_gradient(x)
        stream, attention = x.float().contiguous(), self.attention
        qkv, *rest = (own(layer) for layer in (attention.qkv, attention.out_proj, self.mlp.fc1, self.mlp.fc2))
        passes = self.passes(attention_dtype(), qkv, *rest)
        rows = passes.heads(stream, self.norm1, qkv)
        q, k, v = rows.unflatten(-1, (3, attention.qkv.heads, attention.qkv.head_dim)).unbind(1)
        attended = attention.attend((q, k, v), segments, backend, rotary).contiguous()
        del rows, q, k, v  # as large as all that follows
        return passes.rest(attended, stream, self.norm2, *rest).to(x.dtype)

    def passes(self, dtype: torch.dtype, *layers: Int8Linear) -> CompiledBlock | ByParts:
        """What computes with `layers`, its own. dtype: of what attention reads."""
        compiled = coded_block(self.mlp.activation)
        if compiled is not None and compiled.dtype == dtype and compiled.takes(*layers):
            return compiled
        return ByParts(self.mlp.activation, dtype)


class ByParts:
    """What a block does but for its attention: some rows at a time, product by product. `jit/coded_calls.py` has the
    same in two calls."""

    def __init__(self, activation: Activation, dtype: torch.dtype) -> None:
        """dtype: of what attention reads."""
        self._passes, self._activation, self._dtype = between() or Between(), activation, dtype

    def heads(self, x: torch.Tensor, norm: nn.LayerNorm, qkv: Int8Linear) -> torch.Tensor:
        """qkv of a norm without shift: x float32 `[N, K]` -> `[N, outputs]`."""
        y = torch.empty(len(x), qkv.outputs, dtype=self._dtype)
        for part, into in parts(x, y):
            rows = self._passes.normed(part, norm.weight.float(), norm.eps)
            self._passes.finished(qkv.sums_of(rows), rows, qkv.corrections, into)
        return y

    def rest(
        self, attended: torch.Tensor, x: torch.Tensor, norm: nn.LayerNorm, out_proj: Int8Linear, fc1: Int8Linear,
        fc2: Int8Linear,
    ) -> torch.Tensor:  # fmt: skip
        """What follows attention: x float32 `[N, K]` -> the same."""
        passes, y = self._passes, torch.empty_like(x)
        for part, residual, into in parts(attended, x, y):
            rows = passes.coded(part)
            passes.added(out_proj.sums_of(rows), rows, out_proj.corrections, residual, into)
            rows = passes.normed(into, norm.weight.float(), norm.eps)
            hidden = passes.activated(fc1.sums_of(rows), rows, fc1.corrections, self._activation)
            passes.added(fc2.sums_of(hidden), hidden, fc2.corrections, into, into)
        return y


def own(layer: nn.Module) -> Int8Linear:
    """Whose product `layer`'s is."""
    linear = layer.linear
    assert isinstance(linear, Int8Linear)
    return linear


def parts(*rows: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(some.split(PRODUCT_ROWS) for some in rows), strict=True)


@functools.cache
def attention_dtype() -> torch.dtype:
    """Of what attention reads behind codes: bfloat16 where the processor multiplies it, since the codes' own error is
    larger; elsewhere it is slower than float32."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
