"""Attention over packed sequences: `[N, heads, head_dim]` holds many images or texts, each attends to itself only.

The cost follows the real lengths on every device: no padding, no mask tensor. Backends give the same numbers; `auto`
takes the fastest that the machine has.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import groupby
from typing import TypeVar, assert_never

import torch
import torch.nn.functional as F

from siglane.errors import ConfigError, EngineError
from siglane.nn.cpu.attention import attention_by_head, compiled_attention, takes_heads_alone
from siglane.nn.cpu.product import uses_onednn
from siglane.nn.cuda.varlen import Packed, attend_packed
from siglane.nn.trial import first_right
from siglane.types import AttentionBackend, BackendChoice

logger = logging.getLogger(__name__)

T = TypeVar("T")

FLASHINFER_HEAD_DIMS = (64, 128, 256)
FLASHINFER_WORKSPACE = 128 << 20  # bytes
KERNEL_HEAD_DIM_STEP = 8  # flash kernels take head dims that are multiples of 8
TRIAL_LENGTHS = (5, 70, 1, 70)


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Lengths of the sequences packed in a tensor, with what the backends need derived once per forward."""

    lengths: tuple[int, ...]
    max_len: int
    cu_seqlens: torch.Tensor | None  # i32 `[B + 1]` on the device; None on CPU, where nothing reads it
    runs: tuple[tuple[int, int], ...]  # (length, how many in a row) of neighbours of equal length

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        cu_seqlens = None if device.type == "cpu" else cu_seqlens_of(lengths, device)
        return cls(tuple(lengths), max(lengths, default=0), cu_seqlens, runs_of(lengths))


def runs_of(items: Iterable[T]) -> tuple[tuple[T, int], ...]:
    """Each item with how many of it stand in a row."""
    return tuple((item, sum(1 for _ in group)) for item, group in groupby(items))


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, *, scale: float, backend: AttentionBackend
) -> torch.Tensor:
    """q, k and v `[N, heads, head_dim]` -> `[N, heads, head_dim]`: segment by segment softmax(q k^T * scale) v."""
    match backend:
        case "eager":
            return by_runs(partial(eager, scale=scale), q, k, v, segments)
        case "sdpa":
            return by_runs(partial(sdpa, scale=scale), q, k, v, segments)
        case "onednn":
            return _onednn(q, k, v, segments, scale)
        case "torch_varlen":
            return _padded(_torch_varlen, q, k, v, segments, scale, KERNEL_HEAD_DIM_STEP)
        case "flash_attn":
            return _padded(_flash_attn, q, k, v, segments, scale, KERNEL_HEAD_DIM_STEP)
        case "flashinfer":
            step = next((size for size in FLASHINFER_HEAD_DIMS if size >= q.shape[-1]), FLASHINFER_HEAD_DIMS[-1])
            return _padded(_flashinfer, q, k, v, segments, scale, step)
        case _:
            assert_never(backend)


def by_runs(
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
) -> torch.Tensor:
    """One call of `attend` per run of equal lengths, whose segments are a batch `[B, L, heads, head_dim]`."""
    outputs = []
    start = 0
    for length, count in segments.runs:
        batch = (x.narrow(0, start, length * count).unflatten(0, (count, length)) for x in (q, k, v))
        outputs.append(attend(*batch).flatten(0, 1))
        start += length * count
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """q `[B, L, heads, head_dim]`, k and v `[B, S, kv_heads, head_dim]` -> `[B, L, heads, head_dim]`.

    `heads` a multiple of `kv_heads`; mask: bool, broadcast to `[B, heads, L, S]`, True where a query sees a key.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    attended = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return attended.transpose(1, 2)


def eager(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`sdpa` by two plain products and a float32 softmax between them, as transformers' `eager_attention_forward` has
    it: every number can be looked at, and no kernel chooses another order."""
    repeats = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2)


def _onednn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    if (compiled := compiled_attention(q, k, v)) is not None:
        return compiled(q, k, v, segments.lengths, scale)
    by_head = uses_onednn(q, k, v)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        long = by_head and takes_heads_alone(q.shape[1])
        return attention_by_head(q, k, v, scale) if long else sdpa(q, k, v, scale=scale)

    return by_runs(attend, q, k, v, segments)


Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Segments, float], torch.Tensor]


def _padded(
    kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float, step: int
) -> torch.Tensor:
    """Runs a kernel that wants head_dim a multiple of `step`: zeros are appended, the scale stays the true one."""
    head_dim = q.shape[-1]
    if extra := -head_dim % step:
        q, k, v = (F.pad(x, (0, extra)) for x in (q, k, v))
    return kernel(q, k, v, segments, scale)[..., :head_dim]


def _torch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    assert segments.cu_seqlens is not None
    packed = Packed(segments.cu_seqlens, segments.max_len)
    return attend_packed(q, k, v, packed, packed, scale=scale)


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func

    cu_seqlens, longest = segments.cu_seqlens, segments.max_len
    out: torch.Tensor = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, softmax_scale=scale)
    return out


@cache
def _flashinfer_workspace(device: torch.device) -> torch.Tensor:
    return torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=device)


def _flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scale: float) -> torch.Tensor:
    import flashinfer

    _, heads, head_dim = q.shape
    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_flashinfer_workspace(q.device))
    wrapper.plan(
        segments.cu_seqlens, segments.cu_seqlens, heads, heads, head_dim,
        causal=False, sm_scale=scale, q_data_type=q.dtype,
    )  # fmt: skip
    out: torch.Tensor = wrapper.run(q, k, v)
    return out


def runnable_backends(choice: BackendChoice, device: torch.device, dtype: torch.dtype) -> tuple[AttentionBackend, ...]:
    """The backends that may be meant by `choice` and can be called here, the best first.

    For half precision on CUDA torch's packed kernel is preferred; float32 on CPUs takes oneDNN's products. Everything
    else, GPUs older than Ampere among it, for which the kernel is not built, takes SDPA, one call per run of equal
    lengths. flash-attn and flashinfer are taken by name only; "eager" is for who debugs numbers. ConfigError when an
    explicit choice cannot run here.
    """
    half_on_cuda = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
    kernels_run = half_on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    float_on_cpu = device.type == "cpu" and dtype == torch.float32
    available: dict[AttentionBackend, bool] = {
        "torch_varlen": kernels_run,
        "onednn": float_on_cpu and torch.backends.mkldnn.is_available(),
        "sdpa": True,
        "flash_attn": kernels_run and importlib.util.find_spec("flash_attn") is not None,
        "flashinfer": kernels_run and importlib.util.find_spec("flashinfer") is not None,
        "eager": True,
    }
    if choice == "auto":
        order: tuple[AttentionBackend, ...] = ("torch_varlen", "onednn", "sdpa")
        return tuple(backend for backend in order if available[backend])
    if not available[choice]:
        raise ConfigError(f"attention_backend {choice!r} cannot run on {device} in {dtype}; use 'auto'")
    return (choice,)


def choose_backend(
    choice: BackendChoice, device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> AttentionBackend:
    """The backend to use for packed attention over so many heads; on CUDA the first whose numbers are right. Logs what
    was chosen. ConfigError when an explicit choice cannot run here, or gives other numbers."""
    runnable = runnable_backends(choice, device, dtype)
    if device.type != "cuda":
        logger.info("vision attention: %s (%s, %s, asked for %s)", runnable[0], device, dtype, choice)
        return runnable[0]
    try:
        return tried_backend(runnable, device, dtype, heads, head_dim)
    except EngineError as error:
        if choice == "auto":
            raise
        raise ConfigError(f"attention_backend {choice!r}: {error}; use 'auto'") from error


def tried_backend(
    backends: Sequence[AttentionBackend], device: torch.device, dtype: torch.dtype, heads: int, head_dim: int
) -> AttentionBackend:
    """The first whose numbers are those of plain products in float32. EngineError when none's are."""
    cu_seqlens, scale = cu_seqlens_of(TRIAL_LENGTHS, device), head_dim**-0.5
    segments = replace(Segments.of(TRIAL_LENGTHS, device), cu_seqlens=cu_seqlens)
    shape, generator = (sum(TRIAL_LENGTHS), heads, head_dim), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    q *= 2  # a sharp softmax shows a wrong scale
    expected = by_runs(partial(eager, scale=scale), q.float(), k.float(), v.float(), segments)

    def run(backend: AttentionBackend) -> torch.Tensor:
        return packed_attention(q, k, v, segments, scale=scale, backend=backend)

    named: dict[str, AttentionBackend] = {backend: backend for backend in backends}
    return first_right(f"vision attention, {heads} heads of {head_dim} in {dtype}", named, run, expected)[1]


def cu_seqlens_of(lengths: Sequence[int], device: torch.device | None = None) -> torch.Tensor:
    """Cumulative lengths, i32 `[B + 1]`, starting at 0."""
    total = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int32), 0, out=total[1:])
    return total if device is None else total.to(device, non_blocking=True)
