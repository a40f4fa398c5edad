"""Attention over packed sequences: `[N, heads, head_dim]` holds many images or texts, each attends to itself only.

The cost follows the real lengths on every device: no padding, no mask tensor. Backends give the same numbers; `auto`
takes the fastest that the machine has.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, assert_never

import torch
import torch.nn.functional as F

from siglane.errors import ConfigError
from siglane.nn.cpu.product import linear, uses_onednn
from siglane.types import AttentionBackend, BackendChoice

logger = logging.getLogger(__name__)


FLASHINFER_HEAD_DIMS = (64, 128, 256)
KERNEL_HEAD_DIM_STEP = 8  # flash kernels take head dims that are multiples of 8
# on CPUs: rows that pass through a block together, so that what one operation writes is still in a cache when the next
# one reads it
CHUNK_ROWS = 1024
LONG = 320  # rows of a segment from which two plain products beat a CPU's fused attention
SCORES = 1 << 20  # of one head that a CPU's cache takes
LOG2_E = math.log2(math.e)
SAFE_SUMS = (1e-25, 1e30)  # of a row's exponentials: no weight that counts is lost to float32's range


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Lengths of the sequences packed in a tensor, with what the backends need derived once per forward.

    cu_seqlens: i32 `[B + 1]` on the device (None on CPU, where nothing reads it); max_len on the host;
    runs: (length, how many in a row) of neighbours of equal length; pieces: on CPU the same segments in groups of at
    most CHUNK_ROWS rows, or one segment; empty where one piece is all.
    """

    lengths: tuple[int, ...]
    max_len: int
    cu_seqlens: torch.Tensor | None
    runs: tuple[tuple[int, int], ...]
    pieces: tuple[Segments, ...] = ()

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        on_cpu = device.type == "cpu"
        cu_seqlens = None if on_cpu else cu_seqlens_of(lengths, device)
        runs = tuple((length, sum(1 for _ in group)) for length, group in groupby(lengths))
        groups = _groups(lengths) if on_cpu else []
        pieces = tuple(cls.of(group, device) for group in groups) if len(groups) > 1 else ()
        return cls(tuple(lengths), max(lengths, default=0), cu_seqlens, runs, pieces)

    @property
    def rows(self) -> int:
        return sum(self.lengths)


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    rows = 0
    for length in lengths:
        if not groups or rows + length > CHUNK_ROWS:
            groups.append([])
            rows = 0
        groups[-1].append(length)
        rows += length
    return groups


PackedAttention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments, float, bool], torch.Tensor]


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    *,
    scale: float,
    backend: AttentionBackend,
    causal: bool = False,
) -> torch.Tensor:
    """q `[N, heads, head_dim]`, k and v `[N, kv_heads, head_dim]` -> `[N, heads, head_dim]`.

    Segment by segment softmax(q k^T * scale) v; `heads` a multiple of `kv_heads`.
    """
    match backend:
        case "sdpa":
            return _sdpa(q, k, v, segments, scale, causal)
        case "torch_varlen":
            return _padded(_torch_varlen, q, k, v, segments, scale, causal, KERNEL_HEAD_DIM_STEP)
        case "flash_attn":
            return _padded(_flash_attn, q, k, v, segments, scale, causal, KERNEL_HEAD_DIM_STEP)
        case "flashinfer":
            step = next((size for size in FLASHINFER_HEAD_DIMS if size >= q.shape[-1]), FLASHINFER_HEAD_DIMS[-1])
            return _padded(_flashinfer, q, k, v, segments, scale, causal, step)
        case _:
            assert_never(backend)


def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, causal: bool
) -> torch.Tensor:
    """One call per run of equal lengths, each a batch of its own."""
    grouped = q.shape[1] != k.shape[1]
    by_head = not causal and not grouped and uses_onednn(q, k, v)
    outputs = []
    start = 0
    for length, count in segments.runs:
        qs, ks, vs = (x.narrow(0, start, length * count).unflatten(0, (count, length)) for x in (q, k, v))
        if by_head and length >= LONG:
            outputs += [_by_head(*one, scale) for one in zip(qs, ks, vs, strict=True)]
        else:
            qs, ks, vs = (x.transpose(1, 2) for x in (qs, ks, vs))
            attended = F.scaled_dot_product_attention(qs, ks, vs, is_causal=causal, scale=scale, enable_gqa=grouped)
            outputs.append(attended.transpose(1, 2).flatten(0, 1))
        start += length * count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _by_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One long segment by oneDNN's products, one head after another so that its scores stay in the cache."""
    rows = max(LONG, SCORES // len(q))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # all views at once: a block has few other calls, and each takes its microseconds
    heads = zip(q.unbind(1), k.unbind(1), v.unbind(1), out.unbind(1), strict=True)
    for queries, keys, values, attended in heads:
        keys, values = keys.contiguous(), values.contiguous().T  # oneDNN reads either order, but no wider rows
        for some, into in zip(queries.split(rows), attended.split(rows), strict=True):
            weights, totals = _weights(some, keys, scale)
            torch.div(linear(weights, values), totals, out=into)
    return out


def _weights(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The softmax of one head before its division: weights `[rows, keys]` and their sums `[rows, 1]`.

    exp2 takes a part of the time of a CPU's softmax (`python benchmark/machine.py`). Only where the exponentials leave
    float32's range is each row's largest score taken off first, as softmax does.
    """
    weights = linear(queries * (scale * LOG2_E), keys).exp2_()
    totals = weights.sum(-1, keepdim=True)
    least, most = totals.aminmax()
    if not (SAFE_SUMS[0] < least.item() and most.item() < SAFE_SUMS[1]):
        weights = torch.softmax(linear(queries * scale, keys), -1)
        totals = torch.ones_like(totals)
    return weights, totals


def _padded(
    kernel: PackedAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    scale: float,
    causal: bool,
    step: int,
) -> torch.Tensor:
    """Runs a kernel that wants head_dim a multiple of `step`: zeros are appended, the scale stays the true one."""
    head_dim = q.shape[-1]
    extra = -head_dim % step
    if extra:
        q, k, v = (F.pad(x, (0, extra)) for x in (q, k, v))
    return kernel(q, k, v, segments, scale, causal)[..., :head_dim]


def _torch_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, causal: bool
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    k, v = _repeat_heads(k, v, q.shape[1])
    # torch 2.10's signature has no scale: it is head_dim ** -0.5, so the true one is folded into q
    q = q * (scale * q.shape[-1] ** 0.5)
    cu_seqlens, longest = segments.cu_seqlens, segments.max_len
    window: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}  # nor has it a window, which causal needs
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **window)  # type: ignore[arg-type]
    assert isinstance(out, torch.Tensor)
    return out


def _flash_attn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, causal: bool
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    cu_seqlens, longest = segments.cu_seqlens, segments.max_len
    out: torch.Tensor = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale, causal=causal
    )
    return out


def _flashinfer(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, causal: bool
) -> torch.Tensor:
    import flashinfer

    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace)
    wrapper.plan(
        segments.cu_seqlens,
        segments.cu_seqlens,
        q.shape[1],
        k.shape[1],
        q.shape[2],
        causal=causal,
        sm_scale=scale,
        q_data_type=q.dtype,
    )
    out: torch.Tensor = wrapper.run(q, k, v)
    return out


def _repeat_heads(k: torch.Tensor, v: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    times = heads // k.shape[1]
    return (k, v) if times == 1 else (k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))


def choose_backend(choice: BackendChoice, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """The backend to use for packed attention; logs what was chosen and why.

    Kernels for half precision on CUDA are preferred in the order flash-attn, torch. float32, CPU and GPUs older than
    Ampere, for which the kernels are not built, take SDPA, one call per run of equal lengths. ConfigError when an
    explicit choice cannot run here.
    """
    half_on_cuda = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    kernels_run = half_on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    available: dict[AttentionBackend, bool] = {
        "flash_attn": kernels_run and importlib.util.find_spec("flash_attn") is not None,
        "torch_varlen": kernels_run and importlib.util.find_spec("torch.nn.attention.varlen") is not None,
        "flashinfer": kernels_run and importlib.util.find_spec("flashinfer") is not None,
        "sdpa": True,
    }
    if choice == "auto":
        order: tuple[AttentionBackend, ...] = ("flash_attn", "torch_varlen", "sdpa")
        chosen = next(backend for backend in order if available[backend])
    elif available[choice]:
        chosen = choice
    else:
        raise ConfigError(f"attention_backend {choice!r} cannot run on {device} in {dtype}; use 'auto'")
    logger.info("vision attention: %s (%s, %s, asked for %s)", chosen, device, dtype, choice)
    return chosen


def cu_seqlens_of(lengths: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
    """Cumulative lengths, i32 `[B + 1]`, starting at 0."""
    total = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=total[1:])
    return total if device is None else total.to(device, non_blocking=True)


class LayerAttention(Protocol):
    """What a language model's layer calls: remembers k and v of this step and attends to all the past.

    q `[T, heads, head_dim]`, k and v `[T, kv_heads, head_dim]` of the step's T tokens -> `[T, heads, head_dim]`.
    """

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...


class CausalSegments:
    """`LayerAttention` without a cache: whole sequences packed one after another (training, reference runs)."""

    def __init__(self, lengths: Sequence[int], device: torch.device | None = None) -> None:
        self.segments = Segments.of(lengths, device or torch.device("cpu"))

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _sdpa(q, k, v, self.segments, q.shape[-1] ** -0.5, True)
