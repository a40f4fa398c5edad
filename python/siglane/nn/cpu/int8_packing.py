"""Codes of 8 bits in the order in which products read them.

Blocks of 64 outputs and 64 inputs, filled up with zeros, in which four inputs of one output lie together, then the
same four of the next output; behind all blocks each output's negative sum, 32 bits. That is oneDNN's order for
processors with VNNI. It lays codes out slowly, at less than 100 MB/s of a core, so it packs one weight of each shape,
and where its bytes are the ones expected, the next of that shape are written over a copy of it. Where its products are
not exact all are compiled loops', and codes lie in a tensor of bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F

from siglane.nn.cpu.memory import span
from siglane.nn.cpu.onednn import is_exact

OUTPUTS, INPUTS, TOGETHER = 64, 64, 4
ROWS = 64 * OUTPUTS  # that are brought into order at a time

_known: WeakValueDictionary[tuple[int, ...], torch.Tensor] = WeakValueDictionary()  # packed by oneDNN, by shape


def pack_codes(codes: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """int8 `[N, K]` -> what products read, oneDNN's or bytes, and whether it is in the order that is known here."""
    if not is_exact():
        packed = torch.empty(_size(*codes.shape), dtype=torch.uint8)
        _write(packed, codes)
        return packed, True
    known = _known.get(tuple(codes.shape))
    if known is not None:
        packed = known.clone()
        _write(packed, codes)
        return packed, True
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    ordered = holds(packed, codes) and torch.equal(_tail(packed, *codes.shape), -sums(packed, *codes.shape))
    if ordered:
        _known[tuple(codes.shape)] = packed
    return packed, ordered


def holds(packed: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether `packed` has `codes` in the order that is known here."""
    return has_size(packed, *codes.shape) and all(map(torch.equal, *_parts(packed, codes)))


def blocks(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The bytes of `packed`, which has the size, as `[N / OUTPUTS, K / TOGETHER, OUTPUTS, TOGETHER]`. It is a view and
    does not keep them."""
    rows, inside = _filled(outputs, OUTPUTS), _filled(inputs, INPUTS)
    flat = _memory(packed, 0, rows * inside, torch.int8)
    return flat.view(rows // OUTPUTS, inside // TOGETHER, OUTPUTS, TOGETHER)


def has_size(packed: torch.Tensor, outputs: int, inputs: int) -> bool:
    """Whether it is as large as blocks and sums are."""
    return span(packed)[1] == _size(outputs, inputs)


def unpack_codes(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """The reverse of `pack_codes`: int8 `[N, K]`, a copy."""
    if packed.is_mkldnn:
        return packed.to_dense().T.contiguous()
    return blocks(packed, outputs, inputs).transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, :inputs].contiguous()


def sums(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    """Of each output's codes, i32 `[N]`: a product with ones reads them at the memory's speed."""
    if not packed.is_mkldnn:
        return -_tail(packed, outputs, inputs)
    ones = torch.ones(1, inputs, dtype=torch.uint8)
    scale, zero_points = torch.ones(outputs), torch.zeros(outputs, dtype=torch.int64)
    product: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
        ones, 1.0, 0, packed, scale, zero_points, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return product[0].to(torch.int32)


def _write(packed: torch.Tensor, codes: torch.Tensor) -> None:
    for into, part in zip(*_parts(packed, codes), strict=True):
        into.copy_(part)
    tail = _tail(packed, *codes.shape)  # which the product with zero points reads
    tail.copy_(-sums(packed, *codes.shape) if packed.is_mkldnn else codes.sum(1, dtype=torch.int32).neg_())


def _parts(packed: torch.Tensor, codes: torch.Tensor) -> tuple[Iterator[torch.Tensor], Iterator[torch.Tensor]]:
    """Blocks of `packed` and what belongs there, some at a time, four bytes in one."""
    outputs, inputs = codes.shape
    whole = blocks(packed, outputs, inputs).view(torch.int32)[..., 0]
    return iter(whole.split(ROWS // OUTPUTS)), (_ordered(part) for part in codes.split(ROWS))


def _ordered(codes: torch.Tensor) -> torch.Tensor:
    """`[N, K]` -> i32 `[N / OUTPUTS, K / TOGETHER, OUTPUTS]`, a view."""
    below, right = -codes.shape[0] % OUTPUTS, -codes.shape[1] % INPUTS
    if below or right:
        filled = F.pad(codes, (0, right, 0, below))
    else:  # a file's tensors may begin anywhere
        filled = codes.clone() if codes.data_ptr() % TOGETHER else codes
    return filled.view(torch.int32).unflatten(0, (-1, OUTPUTS)).transpose(1, 2)


def _tail(packed: torch.Tensor, outputs: int, inputs: int) -> torch.Tensor:
    rows = _filled(outputs, OUTPUTS)
    return _memory(packed, rows * _filled(inputs, INPUTS), rows * 4, torch.int32)[:outputs]


def _memory(packed: torch.Tensor, offset: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    memory = (ctypes.c_char * size).from_address(span(packed)[0] + offset)
    return torch.frombuffer(memory, dtype=dtype)


def _size(outputs: int, inputs: int) -> int:
    return _filled(outputs, OUTPUTS) * (_filled(inputs, INPUTS) + 4)


def _filled(count: int, step: int) -> int:
    return -(-count // step) * step
