"""SigLIP's MAP head: one learned probe attends to an image's patches and becomes its embedding (arXiv:2303.15343)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from siglane.config.vision import VisionConfig
from siglane.nn.act import activate
from siglane.nn.attention import eager, runs_of, sdpa
from siglane.nn.cpu.product import linear
from siglane.nn.plan import Rule, WeightPlan
from siglane.types import AttentionBackend


class MapHead(nn.Module):
    """Features `[N, hidden_size]` of B images -> `[B, hidden_size]`.

    The residual is the attention's output, not the probe. The head runs once per image on one query, so it is kept
    whole on every rank.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.heads, self.activation = config.num_attention_heads, config.hidden_act
        self.probe = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.out_proj = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, config.layer_norm_eps)
        self.fc1 = nn.Linear(hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, hidden_size)

    def forward(
        self, features: torch.Tensor, lengths: Sequence[int], backend: AttentionBackend = "sdpa"
    ) -> torch.Tensor:
        """backend: "eager" or any other, which are one kernel for a single query."""
        attend, scale = (eager if backend == "eager" else sdpa), (features.shape[-1] // self.heads) ** -0.5
        wq, wk, wv = self.in_proj_weight.chunk(3)
        bq, bk, bv = self.in_proj_bias.chunk(3)
        q = linear(self.probe[0], wq, bq).unflatten(-1, (self.heads, -1))
        k = linear(features, wk, bk).unflatten(-1, (self.heads, -1))
        v = linear(features, wv, bv).unflatten(-1, (self.heads, -1))
        pooled, runs = [], runs_of(lengths)
        rows = [length * count for length, count in runs]
        for keys, values, (length, count) in zip(k.split(rows), v.split(rows), runs, strict=True):
            ks, vs = (x.unflatten(0, (count, length)) for x in (keys, values))
            pooled.append(attend(q.expand(count, -1, -1, -1), ks, vs, scale=scale).flatten(1))
        attended = self.out_proj(torch.cat(pooled))
        return attended + self.fc2(activate(self.fc1(self.norm(attended)), self.activation))


# transformers' `SiglipMultiheadAttentionPoolingHead`
HEAD_PLAN = WeightPlan((
    Rule("probe", "probe"),
    Rule("attention.in_proj_weight", "in_proj_weight"),
    Rule("attention.in_proj_bias", "in_proj_bias"),
    Rule("attention.out_proj.{leaf}", "out_proj.{leaf}"),
    Rule("layernorm.{leaf}", "norm.{leaf}"),
    Rule("mlp.fc1.{leaf}", "fc1.{leaf}"),
    Rule("mlp.fc2.{leaf}", "fc2.{leaf}"),
))  # fmt: skip
