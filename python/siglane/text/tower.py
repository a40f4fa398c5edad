"""`SiglipTextModel`: padded ids -> one embedding per text (formats.md 1.3)."""

from __future__ import annotations

import torch
from torch import nn

from siglane.config.two_tower import TextTowerConfig
from siglane.nn.attention import Segments, choose_backend
from siglane.nn.embedding import VocabParallelEmbedding
from siglane.nn.encoder import BLOCK_PLAN, EncoderBlock
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Ignore, Rule, WeightPlan
from siglane.types import AttentionBackend, BackendChoice


class SiglipTextModel(nn.Module):
    """Every position attends to every other, padding included: that is how the model was trained. The embedding is read
    at the last position, whatever stands there."""

    def __init__(
        self, config: TextTowerConfig, tp: TensorParallel | None = None, attention_backend: BackendChoice = "auto"
    ) -> None:
        super().__init__()
        tp = tp or TensorParallel.single()
        self.config, self.attention_backend = config, attention_backend
        self._backends: dict[tuple[torch.device, torch.dtype], AttentionBackend] = {}
        self.token_embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp)
        # not filled: what fills weights that are on no device takes torch seconds to import
        positions = torch.empty(config.length, config.hidden_size)
        self.position_embedding = nn.Embedding.from_pretrained(positions, freeze=False)
        self.blocks = nn.ModuleList(EncoderBlock(config, tp) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.projection_size)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids i64 `[B, S]`, S at most the trained length -> `[B, projection_size]`, not normalised."""
        texts, length = ids.shape
        x = self.token_embedding(ids.flatten()).unflatten(0, ids.shape) + self.position_embedding.weight[:length]
        x = x.flatten(0, 1)
        backend = self._backend(x)
        segments = Segments.of([length] * texts, x.device)
        for block in self.blocks:
            x = block(x, segments, backend)
        last = x.unflatten(0, ids.shape)[:, -1]  # norm and head see each row by itself
        embeddings: torch.Tensor = self.head(self.final_norm(last))
        return embeddings

    def _backend(self, x: torch.Tensor) -> AttentionBackend:
        key = (x.device, x.dtype)
        if key not in self._backends:
            config = self.config
            heads, head_dim = config.num_attention_heads, config.head_dim
            self._backends[key] = choose_backend(self.attention_backend, *key, heads, head_dim)
        return self._backends[key]


# transformers' `SiglipTextModel` and `Siglip2TextModel`
TEXT_TOWER_PLAN = WeightPlan((
    Ignore("{rest}.position_ids", "a constant buffer of older versions", torch.arange),
    Rule("embeddings.token_embedding.weight", "token_embedding.weight"),
    Rule("embeddings.position_embedding.weight", "position_embedding.weight"),
    *BLOCK_PLAN.under("encoder.layers.{i}.", "blocks.{i}.").entries,
    Rule("final_layer_norm.{leaf}", "final_norm.{leaf}"),
    Rule("head.{leaf}", "head.{leaf}"),
))  # fmt: skip
