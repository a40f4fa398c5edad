"""`heads.py`'s functions as torch meets them: float32 tensors on the CPU."""

from __future__ import annotations

import ctypes

import torch

from siglane.nn.cpu.jit.code import Compiled
from siglane.nn.cpu.jit.heads import NORMS, STEP, heads_module
from siglane.nn.cpu.jit.limits import GROUP, TOGETHER
from siglane.nn.cpu.jit.processor import this_processor
from siglane.nn.cpu.jit.program import Call, Function
from siglane.nn.cpu.jit.types import ADDRESS, COUNT

Cache = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer, each `[slots, kv_heads, head_dim]`

LOG2_E = 1.4426950408889634
ROWS_OF_A_THREAD = 2  # from which threads take whole rows
ALONE = 1 << 14  # keys' values below which one thread is faster than several


class Heads:
    """For heads of `head_dim` values."""

    def __init__(self, head_dim: int) -> None:
        self._head_dim, self._owner = head_dim, Compiled(heads_module(head_dim, this_processor()))
        function = self._owner.function
        self._attend = function("attend", ADDRESS, ADDRESS, COUNT, COUNT, *[ADDRESS] * 3, COUNT)
        self._stores = {
            dtype: function(name, ADDRESS, ADDRESS, COUNT, COUNT, *[ADDRESS] * 3, COUNT, COUNT)
            for dtype, name in ((torch.float32, "store"), (torch.float16, "store_half"))
        }
        self._turn = function("turn", ADDRESS, COUNT, *[ADDRESS] * 3, COUNT, COUNT)
        self._turn_normed = function("turn_normed", ADDRESS, COUNT, *[ADDRESS] * 3, COUNT, COUNT, ADDRESS)

    def turn(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norms: HeadNorms | None = None
    ) -> torch.Tensor:
        """`rotate` of x `[T, heads, head_dim]`, behind the norms of its heads."""
        x = self._together(x)
        rows, heads, _ = x.shape
        out = torch.empty(rows, heads, self._head_dim)
        cos, sin = cos.contiguous(), sin.contiguous()
        function, *others = self._turning(norms)
        function(x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), rows, heads, *others)
        return out

    def _turning(self, norms: HeadNorms | None) -> tuple[Function] | tuple[Function, int]:
        return (self._turn,) if norms is None else (self._turn_normed, norms.address)

    def store(
        self, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Keeps k and v `[T, kv_heads, head_dim]` in `slots` i64 `[T]` of keys and values `[S, kv_heads, head_dim]`,
        float32 or float16."""
        k, v, slots = self._together(k), self._together(v), slots.contiguous()
        self._stores[keys.dtype](
            k.data_ptr(), v.data_ptr(), k.stride(0), v.stride(0), slots.data_ptr(), keys.data_ptr(), values.data_ptr(),
            k.shape[0], k.shape[1] * self._head_dim,
        )  # fmt: skip

    def attend(self, step: PagedStep, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """q `[B, heads, head_dim]`; keys and values `[S, kv_heads, head_dim]`, whole pages -> `[B, heads, head_dim]`.
        ValueError where too many heads share a key head."""
        q, out, group = self._together(q), torch.empty(q.shape), q.shape[1] // keys.shape[1]
        if group > GROUP:
            raise ValueError(f"{group} query heads share one of keys, at most {GROUP} may")
        self._attend(
            step.address, q.data_ptr(), q.stride(0), group, keys.data_ptr(), values.data_ptr(), out.data_ptr(),
            step.threads,
        )  # fmt: skip
        return out

    def program(
        self,
        qkv: torch.Tensor,
        turned: torch.Tensor,
        attended: torch.Tensor,
        cache: Cache,
        norms: HeadNorms | None = None,
    ) -> list[Call]:
        """All three of one layer in a `Program`, which is told `rows` and addresses: `cos`, `sin`, `slots`, `step` (of
        a `PagedStep`) and `seers`, its threads.

        qkv, turned and attended have whole rows: heads of q, k and v, those of q and k turned, those of q `[M, heads,
        head_dim]`.
        """
        size, heads, (keys, values) = self._head_dim, attended.shape[1], cache
        kv_heads, stride, turning = keys.shape[1], qkv.stride(0), turned.stride(0)
        k, v = turned[:, heads:].data_ptr(), qkv[:, heads + kv_heads :].data_ptr()
        own, (turn, *others) = (keys.data_ptr(), values.data_ptr()), self._turning(norms)
        return [
            Call(turn, (qkv.data_ptr(), stride, "cos", "sin", turned.data_ptr(), "rows", heads + kv_heads, *others)),
            Call(self._stores[keys.dtype], (k, v, turning, stride, "slots", *own, "rows", kv_heads * size)),
            Call(
                self._attend,
                ("step", turned.data_ptr(), turning, heads // kv_heads, *own, attended.data_ptr(), "seers"),
            ),
        ]

    def _together(self, x: torch.Tensor) -> torch.Tensor:
        """x `[T, heads, head_dim]` with all heads of a row one after another."""
        return x if x.stride(2) == 1 and x.stride(1) == self._head_dim else x.contiguous()


class HeadNorms:
    """RMSNorms of the first `heads` heads of a row, those of q, and of all others, those of k: gains `[head_dim]`."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, heads: int, eps: float) -> None:
        self._held = [x.detach().contiguous() for x in (q, k)]  # whose addresses are used
        self._facts = NORMS.native(*(x.data_ptr() for x in self._held), heads, eps)
        self.address = ctypes.addressof(self._facts)


class PagedStep:
    """What each of B tokens sees, for all layers of a step: the first `lengths` tokens in the pages `table[rows]`.

    table i32 `[R, columns]`, rows and lengths i64 `[B]`; pages: keys or values of a layer or of all, float32 or
    float16 `[.., page_size, kv_heads, head_dim]`.
    """

    def __init__(self, table: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor, pages: torch.Tensor) -> None:
        page_size, kv_heads, size = pages.shape[-3:]
        self._held = [x.contiguous() for x in (table, rows, lengths)]  # whose addresses are used
        seen = int(lengths.sum()) * kv_heads * size
        self.threads = 1 if seen < ALONE else min(torch.get_num_threads(), len(rows) * kv_heads)
        # a token's key heads lie together: who reads them all reads one stretch of memory, and what a core calls ahead
        # is what it needs; few rows are divided among threads by heads
        whole = kv_heads <= TOGETHER and len(rows) >= ROWS_OF_A_THREAD * self.threads
        self._facts = STEP.native(
            *(x.data_ptr() for x in self._held), table.shape[1], len(rows), kv_heads, page_size, kv_heads * size,
            kv_heads if whole else 1, pages.dtype == torch.float16, size**-0.5 * LOG2_E,
        )  # fmt: skip
        self.address = ctypes.addressof(self._facts)
