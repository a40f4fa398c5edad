"""Encoder blocks of 8 bits: codes of a norm go into the product behind it, and what a product gives becomes the next
one's codes while it lies in a cache. Each row has a scale and a zero point of its own, so no neighbour changes its
numbers."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn

from siglane.nn.attention import Segments
from siglane.nn.cpu.between import Between
from siglane.nn.cpu.chunks import ChunkedBlock
from siglane.nn.cpu.int8 import Int8Linear, refuse_gradient
from siglane.nn.cpu.jit.entrance import between
from siglane.nn.rope import Rotary
from siglane.types import AttentionBackend

PRODUCT_ROWS = 192  # whose sums a core's cache holds


class CodedBlock(ChunkedBlock):
    """A block whose layers are whole and have 8 bits. The norms' shifts are zero: `quantise` moves them into the layers
    behind."""

    def together(
        self, x: torch.Tensor, segments: Segments, backend: AttentionBackend, rotary: Rotary | None = None
    ) -> torch.Tensor:
        """x of any float dtype, which the result has too; inside there are float32 and `attention_dtype`."""
        refuse_gradient(x)
        passes, stream = between() or Between(), x.float().contiguous()
        attention, rows = self.attention, self._qkv(passes, stream, attention_dtype(x.dtype))
        heads = rows.unflatten(-1, (3, attention.qkv.heads, attention.qkv.head_dim)).unbind(1)
        attended = attention.attend(heads, segments, backend, rotary)
        return self._rest(passes, attended, stream).to(x.dtype)

    def _qkv(self, passes: Between, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        linear = own(self.attention.qkv)
        y = torch.empty(len(x), linear.outputs, dtype=dtype)
        for part, into in parts(x, y):
            rows = passes.normed(part, self.norm1.weight.float(), self.norm1.eps)
            passes.finished(linear.sums_of(rows), rows, linear.corrections, into)
        return y

    def _rest(self, passes: Between, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What follows attention."""
        out_proj, fc1, fc2 = (own(layer) for layer in (self.attention.out_proj, self.mlp.fc1, self.mlp.fc2))
        y = torch.empty_like(x)
        for part, residual, into in parts(attended, x, y):
            rows = passes.coded(part.contiguous())
            passes.added(out_proj.sums_of(rows), rows, out_proj.corrections, residual, into)
            rows = passes.normed(into, self.norm2.weight.float(), self.norm2.eps)
            hidden = passes.activated(fc1.sums_of(rows), rows, fc1.corrections, self.mlp.activation)
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
def attention_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of what attention reads behind codes in a tower of `dtype`: bfloat16 where the processor multiplies it, since the
    codes' own error is larger."""
    half = dtype == torch.bfloat16 or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if half else torch.float32
