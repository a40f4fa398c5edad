"""`coded.py`'s functions as torch meets them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from siglane.nn.cpu.int8_packing import OUTPUTS
from siglane.nn.cpu.jit.code import Compiled
from siglane.nn.cpu.jit.coded import CALL, GROUP, coded_module, room_size
from siglane.nn.cpu.jit.layer import NativeLayer
from siglane.nn.cpu.jit.processor import this_processor
from siglane.nn.cpu.jit.product import TILE
from siglane.nn.cpu.jit.tiles import TILE_ROWS
from siglane.nn.cpu.jit.types import ADDRESS, COUNT, LANES
from siglane.types import Activation

MOST = 36  # rows of an item: what they become lies in a core's nearer cache


class EightBits(Protocol):
    """A layer of `cpu/int8.py`."""

    outputs: int
    native: NativeLayer | None


class CompiledBlock:
    """What an encoder block does but for its attention, in two calls. dtype: of what attention reads and writes."""

    def __init__(self, activation: Activation) -> None:
        processor = this_processor()
        self.dtype = torch.bfloat16 if processor.bfloat16 else torch.float32
        self._owner = Compiled(coded_module(activation, processor))
        self._heads, self._rest = (self._owner.function(name, ADDRESS, COUNT) for name in ("heads", "rest"))
        self._step, self._most = (TILE_ROWS, GROUP) if processor.tiles else (TILE, MOST)

    @staticmethod
    def takes(qkv: EightBits, out_proj: EightBits, fc1: EightBits, fc2: EightBits) -> bool:
        known = all(layer.native is not None for layer in (qkv, out_proj, fc1, fc2))
        return known and all(layer.outputs % LANES == 0 for layer in (qkv, out_proj, fc2))  # which leave a call

    def heads(self, x: torch.Tensor, norm: nn.LayerNorm, qkv: EightBits) -> torch.Tensor:
        """qkv of a norm without shift: x float32 `[N, K]` -> `[N, outputs]` of `dtype`."""
        y = torch.empty(len(x), qkv.outputs, dtype=self.dtype)
        self._run(self._heads, x, norm, None, y, qkv)
        return y

    def rest(
        self, attended: torch.Tensor, x: torch.Tensor, norm: nn.LayerNorm, out_proj: EightBits, fc1: EightBits,
        fc2: EightBits,
    ) -> torch.Tensor:  # fmt: skip
        """What follows attention: of `dtype`, and x float32 `[N, K]` -> float32 like x."""
        y = torch.empty_like(x)
        self._run(self._rest, x, norm, attended, y, out_proj, fc1, fc2)
        return y

    def _run(
        self, function: Callable[..., None], x: torch.Tensor, norm: nn.LayerNorm, attended: torch.Tensor | None,
        y: torch.Tensor, *layers: EightBits,
    ) -> None:  # fmt: skip
        if not len(x):
            return
        given, threads = (x, norm.weight.float(), attended, y), torch.get_num_threads()
        assert all(tensor is None or tensor.is_contiguous() for tensor in given)
        natives = [layer.native for layer in layers if layer.native is not None]
        group = min(self._most, _whole(-(-len(x) // threads), self._step))
        threads = min(threads, -(-len(x) // group))
        hidden = _whole(layers[1].outputs, OUTPUTS) if len(layers) > 1 else 0  # behind which codes follow
        size = room_size(max(native.facts.stride for native in natives), hidden)
        room = torch.empty(threads, size, dtype=torch.uint8)
        addresses = (None if tensor is None else tensor.data_ptr() for tensor in given)
        of_layers = [native.address for native in natives] + [None] * (3 - len(natives))
        call = CALL.native(*addresses, *of_layers, room.data_ptr(), size, len(x), group, 0, 0, norm.eps)
        function(ctypes.addressof(call), threads)


def _whole(count: int, step: int) -> int:
    return -(-count // step) * step
