"""What a language model's layers attend to, and its form without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from siglane.nn.attention import Segments, by_runs, sdpa


class LayerAttention(Protocol):
    """What a language model's layer calls: remembers k and v of this step and attends to all the past.

    q `[T, heads, head_dim]`, k and v `[T, kv_heads, head_dim]` of the step's T tokens -> `[T, heads, head_dim]`.
    """

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...


Past = dict[int, tuple[torch.Tensor, torch.Tensor]]  # k and v of each layer


class SegmentAttention:
    """`LayerAttention` without pages: whole sequences packed one after another, each token sees its own up to itself.

    mask: bool `[B, L, L]` for B sequences of one length L, says instead what each token sees. past: of a single
    sequence, filled by its whole beginning and then by one token a call, which sees all of it.
    """

    def __init__(self, lengths: Sequence[int], *, mask: torch.Tensor | None = None, past: Past | None = None) -> None:
        self.segments = Segments.of(lengths, torch.device("cpu"))  # only the runs are read
        self.mask = None if mask is None else mask[:, None]
        self.past = past

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the rotation leaves them in float32
        if self.past is not None:
            if layer in self.past:
                k, v = (torch.cat((before, now)) for before, now in zip(self.past[layer], (k, v), strict=True))
            self.past[layer] = (k, v)
        if len(k) > len(q):
            return sdpa(q[None], k[None], v[None], scale=scale)[0]
        attend = partial(sdpa, scale=scale, causal=self.mask is None, mask=self.mask)
        return by_runs(attend, q, k, v, self.segments)
