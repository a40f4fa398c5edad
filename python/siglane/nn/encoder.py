"""The pre-LN transformer blocks of SigLIP, the same in both of its towers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from siglane.nn.attention import Segments, packed_attention
from siglane.nn.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear, attention_parallel
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Rule, WeightPlan, parts
from siglane.nn.rope import Rotary, rotate
from siglane.types import Activation, AttentionBackend


class BlockFacts(Protocol):
    """What a block needs to know; the configurations of both towers have it."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def hidden_act(self) -> Activation: ...
    @property
    def layer_norm_eps(self) -> float: ...


class EncoderAttention(nn.Module):
    """Self-attention within each segment: an image, a frame or a text."""

    def __init__(self, config: BlockFacts, tp: TensorParallel) -> None:
        super().__init__()
        heads, head_dim, hidden_size = config.num_attention_heads, config.head_dim, config.hidden_size
        tp = attention_parallel(tp, heads, heads)
        self.scale = head_dim**-0.5
        self.qkv = QKVParallelLinear(hidden_size, heads, heads, head_dim, bias=True, tp=tp)
        self.out_proj = RowParallelLinear(hidden_size, hidden_size, bias=True, tp=tp)

    def forward(
        self, x: torch.Tensor, segments: Segments, backend: AttentionBackend, rotary: Rotary | None
    ) -> torch.Tensor:
        return self.out_proj(self.attend(self.qkv(x), segments, backend, rotary))

    def attend(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        segments: Segments,
        backend: AttentionBackend,
        rotary: Rotary | None,
    ) -> torch.Tensor:
        """q, k and v, each `[N, heads, head_dim]` -> `[N, heads * head_dim]`"""
        q, k, v = qkv
        if rotary is not None:  # in float32 whatever the dtype, as in the reference
            q, k = (rotate(part.float(), *rotary).to(part.dtype) for part in (q, k))
        return packed_attention(q, k, v, segments, scale=self.scale, backend=backend).flatten(1)


class EncoderMLP(nn.Module):
    """Two linear layers. A width that does not divide by the group's size (4304 on 3) is kept whole on every rank."""

    def __init__(self, config: BlockFacts, tp: TensorParallel) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.fc1 = ColumnParallelLinear(config.hidden_size, {"": config.intermediate_size}, bias=True, tp=tp)
        self.fc2 = RowParallelLinear(config.intermediate_size, config.hidden_size, bias=True, tp=tp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x, self.activation)
        return self.fc2(hidden)


class EncoderBlock(nn.Module):
    """`x += attention(norm1(x)); x += mlp(norm2(x))`."""

    def __init__(self, config: BlockFacts, tp: TensorParallel) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = EncoderAttention(config, tp)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = EncoderMLP(config, tp)

    def forward(
        self, x: torch.Tensor, segments: Segments, backend: AttentionBackend, rotary: Rotary | None = None
    ) -> torch.Tensor:
        x = x + self.attention(self.norm1(x), segments, backend, rotary)
        return x + self.mlp(self.norm2(x))


# transformers' `SiglipEncoderLayer`, the same in both towers
BLOCK_PLAN = WeightPlan((
    Rule("layer_norm1.{leaf}", "norm1.{leaf}"),
    *parts("self_attn.*_proj.{leaf}", "attention.qkv.{leaf}", "q k v"),
    Rule("self_attn.out_proj.{leaf}", "attention.out_proj.{leaf}"),
    Rule("layer_norm2.{leaf}", "norm2.{leaf}"),
    Rule("mlp.fc1.{leaf}", "mlp.fc1.{leaf}"),
    Rule("mlp.fc2.{leaf}", "mlp.fc2.{leaf}"),
))  # fmt: skip
