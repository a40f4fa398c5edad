"""Qwen2, Qwen3, Qwen3-MoE and Llama: one decoder, their differences are flags of `LanguageConfig` (formats.md section
8)."""

from __future__ import annotations

from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from siglane.config.language import LanguageConfig
from siglane.lm.attention import LayerAttention
from siglane.lm.experts import SparseMLP, experts_rules
from siglane.lm.mlp import BlockMLP, DecoderMLP
from siglane.nn.cpu.product import linear
from siglane.nn.embedding import VocabParallelEmbedding, VocabTable
from siglane.nn.linear import QKVParallelLinear, RowParallelLinear, attention_parallel
from siglane.nn.norm import RMSNorm
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Ignore, Rule, WeightPlan, parts
from siglane.nn.rope import NormedRotation, Rotary, Rotation, rotary_frequencies, rotary_tables


class OutputHead(Protocol):
    """Hidden states `[T, hidden_size]` -> logits `[T, vocab_size]`."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


@runtime_checkable
class TurnedTable(Protocol):
    """An embedding table whose rows are kept in the basis of the blocks."""

    def turned(self, ids: torch.Tensor) -> torch.Tensor: ...


class DecoderAttention(nn.Module):
    """Grouped-query attention with rotary positions; Qwen3 normalises each head of q and k before the rotation."""

    def __init__(self, config: LanguageConfig, layer: int, tp: TensorParallel, norm: type[RMSNorm]) -> None:
        super().__init__()
        self.layer = layer
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        tp = attention_parallel(tp, heads, kv_heads)
        self.qkv = QKVParallelLinear(config.hidden_size, heads, kv_heads, head_dim, bias=config.qkv_bias, tp=tp)
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, bias=config.output_bias, tp=tp)
        self.q_norm = norm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = norm(head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.rotation = NormedRotation(head_dim, self.qkv.heads) if config.qk_norm else Rotation(head_dim)

    def forward(
        self, x: torch.Tensor, rotary: Rotary, attention: LayerAttention, residual: torch.Tensor
    ) -> torch.Tensor:
        """residual: is added."""
        heads, kv_heads = self.qkv.heads, self.qkv.kv_heads
        turning, v = self.qkv.together(x).split([heads + kv_heads, kv_heads], 1)
        norms = () if self.q_norm is None else (self.q_norm, self.k_norm)
        q, k = self.rotation(turning, *rotary, *norms).split([heads, kv_heads], 1)
        return self.o_proj.added(attention(self.layer, q, k, v).flatten(1), residual)


class DecoderBlock(nn.Module):
    """`x += attention(norm(x)); x += mlp(norm(x))`."""

    def __init__(self, config: LanguageConfig, layer: int, tp: TensorParallel, norm: type[RMSNorm]) -> None:
        super().__init__()
        self.input_norm = norm(config.hidden_size, config.rms_norm_eps)
        self.attention = DecoderAttention(config, layer, tp, norm)
        self.post_attention_norm = norm(config.hidden_size, config.rms_norm_eps)
        if config.experts is not None and config.experts.at(layer):
            self.mlp: BlockMLP = SparseMLP(config.hidden_size, config.experts, tp)
        else:
            self.mlp = DecoderMLP(config, tp)

    def forward(self, x: torch.Tensor, rotary: Rotary, attention: LayerAttention) -> torch.Tensor:
        x = self.attention(self.input_norm(x), rotary, attention, x)
        return self.mlp.added(self.post_attention_norm(x), x)


class QwenModel(nn.Module):
    """The decoder with its embedding table and output head. A step's metadata comes in through `attention`.

    basis: `[hidden_size, hidden_size]`, a vector in each row, where the blocks' weights are those of another basis
    (`rotation.py`).
    """

    norm_type: type[RMSNorm] = RMSNorm
    basis: torch.Tensor | None

    def __init__(self, config: LanguageConfig, tp: TensorParallel | None = None) -> None:
        super().__init__()
        tp = tp or TensorParallel.single()
        self.config = config
        self.embed_tokens: VocabTable = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.blocks = nn.ModuleList(
            DecoderBlock(config, layer, tp, self.norm_type) for layer in range(config.num_hidden_layers)
        )
        self.norm = self.norm_type(config.hidden_size, config.rms_norm_eps)
        untied = not config.tie_embeddings
        self.lm_head: OutputHead | None = None
        if untied:
            self.lm_head = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        self.register_buffer("basis", None, persistent=False)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[T]` -> `[T, hidden_size]`. Ids outside the table (placeholders of some families) read row 0."""
        rows: torch.Tensor = self.embed_tokens(self._inside(token_ids))
        return rows

    def embed_turned(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`turned(embed(token_ids))`, without turning rows back and forth."""
        if self.basis is None:
            return self.embed(token_ids)
        assert isinstance(self.embed_tokens, TurnedTable)
        return self.embed_tokens.turned(self._inside(token_ids))

    def turned(self, rows: torch.Tensor) -> torch.Tensor:
        """`[T, hidden_size]`, embeddings or image rows -> the same in the basis of the blocks."""
        return rows if self.basis is None else linear(rows, self.basis)

    def _inside(self, token_ids: torch.Tensor) -> torch.Tensor:
        inside = (token_ids >= 0) & (token_ids < self.config.vocab_size)
        return torch.where(inside, token_ids, 0)

    def forward(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        attention: LayerAttention,
        taps: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """embeds `[T, hidden_size]`, positions i64 `[T]` -> normalised hidden states `[T, hidden_size]`."""
        return self.decode(self.turned(embeds), positions, attention, taps)

    def decode(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        attention: LayerAttention,
        taps: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """`forward` of rows that are `turned` already."""
        rotary = self.rotary(positions, x.dtype)
        for number, block in enumerate(self.blocks):
            x = block(x, rotary, attention)
            if taps is not None:
                taps[f"lm.block.{number}"] = x if self.basis is None else x @ self.basis
        hidden: torch.Tensor = self.norm(x)
        return hidden

    def rotary(self, positions: torch.Tensor, dtype: torch.dtype) -> Rotary:
        config = self.config
        return rotary_tables(positions, config.head_dim, config.rope_theta, dtype, config.rope_scaling)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[T, hidden_size]` -> `[T, vocab_size]`, whole on every rank."""
        return (self.lm_head or self.embed_tokens).logits(hidden)

    @property
    def heads(self) -> int:
        """Query heads this rank holds."""
        attention = self.blocks[0].attention
        assert isinstance(attention, DecoderAttention)
        return attention.qkv.heads

    @property
    def kv_heads(self) -> int:
        """Key/value heads this rank holds."""
        attention = self.blocks[0].attention
        assert isinstance(attention, DecoderAttention)
        return attention.qkv.kv_heads


def qwen_plan(config: LanguageConfig, decoder: str = "model.") -> WeightPlan:
    """transformers' `Qwen2ForCausalLM`, `Qwen3ForCausalLM`, `Qwen3MoeForCausalLM` and `LlamaForCausalLM`. decoder: the
    prefix of all but the output head."""
    block = WeightPlan((
        Rule("input_layernorm.{leaf}", "input_norm.{leaf}"),
        *parts("self_attn.*_proj.{leaf}", "attention.qkv.{leaf}", "q k v"),
        Rule("self_attn.q_norm.{leaf}", "attention.q_norm.{leaf}"),
        Rule("self_attn.k_norm.{leaf}", "attention.k_norm.{leaf}"),
        Rule("self_attn.o_proj.{leaf}", "attention.o_proj.{leaf}"),
        Rule("post_attention_layernorm.{leaf}", "post_attention_norm.{leaf}"),
        *parts("mlp.*_proj.{leaf}", "mlp.gate_up.{leaf}", "gate up"),
        Rule("mlp.down_proj.{leaf}", "mlp.down_proj.{leaf}"),
        *(WeightPlan(experts_rules(config.experts)).under("mlp.", "mlp.").entries if config.experts else ()),
    ))  # fmt: skip
    tied = config.tie_embeddings
    frequencies = partial(rotary_frequencies, theta=config.rope_theta, scaling=config.rope_scaling)
    return WeightPlan((
        Ignore("{rest}.rotary_emb.inv_freq", "computed from rope_theta", frequencies),
        Rule(f"{decoder}embed_tokens.weight", "embed_tokens.weight", twin=tied),
        Rule(f"{decoder}norm.weight", "norm.weight"),
        *block.under(f"{decoder}layers.{{i}}.", "blocks.{i}.").entries,
        Rule("lm_head.weight", "embed_tokens.weight" if tied else "lm_head.weight", twin=tied),
    ))  # fmt: skip
