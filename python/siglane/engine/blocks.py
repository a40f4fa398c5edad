"""A decoder's blocks as one compiled call, for steps that only decode.

Of a small model's step Python took two fifths of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from siglane.engine.attention.compiled import CompiledKernels
from siglane.engine.attention.kernels import DecodeRows, Kernels
from siglane.lm.mlp import DecoderMLP
from siglane.lm.qwen import DecoderAttention, DecoderBlock, QwenModel
from siglane.nn.cpu.int4 import Int4Linear
from siglane.nn.cpu.int8 import Int8Weight
from siglane.nn.quantise import QuantisedColumn, QuantisedQKV, QuantisedRow
from siglane.nn.rope import NormedRotation

if TYPE_CHECKING:
    from siglane.nn.cpu.jit.calls import Cache, HeadNorms
    from siglane.nn.cpu.jit.layer import CompiledLayer
    from siglane.nn.cpu.jit.program import Call, Program

ROWS = 32  # of a step, at most


@dataclass(frozen=True, slots=True)
class _Layers:
    """Of a block. heads: of queries; norms: of heads, where it has some."""

    heads: int
    norms: HeadNorms | None
    qkv: CompiledLayer
    o_proj: CompiledLayer
    gate_up: CompiledLayer
    down_proj: CompiledLayer

    @classmethod
    def of(cls, block: nn.Module) -> _Layers | None:
        """None where a block is more than these: a norm, experts, several ranks, layers that are not compiled."""
        assert isinstance(block, DecoderBlock)
        attention, mlp = block.attention, block.mlp
        assert isinstance(attention, DecoderAttention)
        norms = block.input_norm, block.post_attention_norm
        if not isinstance(mlp, DecoderMLP) or not all(isinstance(one, nn.Identity) for one in norms):
            return None
        of_heads = None
        if isinstance(rotation := attention.rotation, NormedRotation):
            assert attention.q_norm is not None
            assert attention.k_norm is not None
            if (of_heads := rotation.norms(attention.q_norm, attention.k_norm)) is None:
                return None
        layers = [_compiled(layer) for layer in (attention.qkv, attention.o_proj, mlp.gate_up, mlp.down_proj)]
        qkv, o_proj, gate_up, down_proj = layers
        if qkv is None or o_proj is None or gate_up is None or down_proj is None or not gate_up.gates:
            return None
        return cls(attention.qkv.heads, of_heads, qkv, o_proj, gate_up, down_proj)

    def __iter__(self) -> Iterator[CompiledLayer]:
        return iter((self.qkv, self.o_proj, self.gate_up, self.down_proj))


def _compiled(layer: nn.Module) -> CompiledLayer | None:
    """What computes all of `layer`."""
    if not isinstance(layer, QuantisedColumn | QuantisedRow | QuantisedQKV):
        return None
    shared = not isinstance(layer, QuantisedQKV) and layer.tp.size > 1
    return layer.linear.compiled if isinstance(layer.linear, Int8Weight | Int4Linear) and not shared else None


class CompiledBlocks:
    """`QwenModel.decode` of up to `most` rows that are a sequence's next token each, to the same bits."""

    def __init__(self, model: QwenModel, kernels: CompiledKernels, blocks: list[_Layers]) -> None:
        self.most = min(ROWS, *(layer.most for block in blocks for layer in block))
        self._model, self._kernels = model, kernels
        room = _Room.of(self.most, blocks, kernels)
        self._program, self._room, self._blocks = room.program(blocks, kernels), room, blocks  # whose memory it uses

    def __call__(
        self, x: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, decodes: DecodeRows
    ) -> torch.Tensor:
        """x `[B, hidden_size]`, positions and slots i64 `[B]` -> normalised hidden states `[B, hidden_size]`."""
        cos, sin = self._model.rotary(positions, x.dtype)
        step, rows, x, slots = self._kernels.seen(decodes), x.shape[0], x.contiguous(), slots.contiguous()
        self._program(
            rows=rows, threads=torch.get_num_threads(), seers=step.threads, step=step.address,
            x=x.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), slots=slots.data_ptr(),
        )  # fmt: skip
        hidden: torch.Tensor = self._model.norm(self._room.out[:rows])
        return hidden


@dataclass(frozen=True, slots=True, eq=False)
class _Room:
    """What rows pass through, the same memory in every block. codes: u8, what a layer's rows become."""

    qkv: torch.Tensor
    turned: torch.Tensor
    attended: torch.Tensor
    middle: torch.Tensor
    gated: torch.Tensor
    out: torch.Tensor
    codes: torch.Tensor

    @classmethod
    def of(cls, rows: int, blocks: list[_Layers], kernels: CompiledKernels) -> _Room:
        first, (kv_heads, size) = blocks[0], kernels.kv.keys.shape[-2:]
        return cls(
            qkv=torch.empty(rows, first.heads + 2 * kv_heads, size),
            turned=torch.empty(rows, first.heads + kv_heads, size),
            attended=torch.empty(rows, first.heads, size),
            middle=torch.empty(rows, first.o_proj.outputs),
            gated=torch.empty(rows, first.gate_up.outputs // 2),
            out=torch.empty(rows, first.down_proj.outputs),
            codes=torch.empty(max(layer.room(rows) for layer in first), dtype=torch.uint8),
        )

    def program(self, blocks: list[_Layers], kernels: CompiledKernels) -> Program:
        from siglane.nn.cpu.jit.program import Program

        x: int | str = "x"
        calls: list[Call] = []
        for block, cache in zip(blocks, kernels.kv.slots, strict=True):
            calls += self._block(block, x, kernels, cache)
            x = self.out.data_ptr()
        return Program(calls)

    def _block(self, block: _Layers, x: int | str, kernels: CompiledKernels, cache: Cache) -> Iterator[Call]:
        codes, middle, gated = (one.data_ptr() for one in (self.codes, self.middle, self.gated))
        yield block.qkv.call(x, self.qkv.data_ptr(), codes)
        yield from kernels.heads.program(self.qkv, self.turned, self.attended, cache, block.norms)
        yield block.o_proj.call(self.attended.data_ptr(), middle, codes, x)
        yield block.gate_up.call(middle, gated, codes, gated=True)
        yield block.down_proj.call(gated, self.out.data_ptr(), codes, middle)


def compiled_blocks(model: QwenModel, kernels: Kernels) -> CompiledBlocks | None:
    """None where a part of a block is not one compiled call."""
    if not isinstance(kernels, CompiledKernels):
        return None
    blocks = [_Layers.of(block) for block in model.blocks]
    whole = [block for block in blocks if block is not None]
    return CompiledBlocks(model, kernels, whole) if whole and len(whole) == len(blocks) else None
