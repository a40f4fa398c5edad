"""torch's packed attention, `torch.nn.attention.varlen.varlen_attn`, whose signature each release changes.

2.10 knows `is_causal` and neither a scale nor a window; 2.11 a scale and a window instead; from 2.12 on fewer key heads
have to be announced, and `num_splits`, which keeps cuDNN out, that would build a plan for every new shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.attention.varlen as varlen

UNLIMITED, CAUSAL = (-1, -1), (-1, 0)  # tokens seen before and behind a query's own place


class Packed(NamedTuple):
    """Where sequences begin in packed rows: i32 `[B + 1]`; longest: of them."""

    cu_seqlens: torch.Tensor
    longest: int


def attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: Packed,
    keys: Packed,
    *,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """q `[N, heads, head_dim]`, k and v `[M, kv_heads, head_dim]` -> `[N, heads, head_dim]`. causal: the last query of
    a sequence sees all of its keys, the one before all but one."""
    function = varlen.varlen_attn
    options = accepted(function)
    named: dict[str, Any] = {}
    if "scale" in options:
        named["scale"] = scale
    else:  # it is head_dim ** -0.5, so the true one is folded into q
        q = q * (scale * q.shape[-1] ** 0.5)
    if "window_size" in options:
        named["window_size"] = CAUSAL if causal else UNLIMITED
    else:
        named["is_causal"] = causal
    if "enable_gqa" in options:
        named["enable_gqa"] = q.shape[1] != k.shape[1]
    if "num_splits" in options:
        named["num_splits"] = 1
    starts = queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest
    out = function(q, k, v, *starts, **named)
    assert isinstance(out, torch.Tensor)
    return out


@cache
def accepted(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)
