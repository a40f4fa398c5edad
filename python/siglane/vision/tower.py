"""`SiglipVisionModel` over packed patches: every image of every request in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from siglane.config.vision import VisionConfig
from siglane.nn.attention import Segments, choose_backend
from siglane.nn.encoder import BLOCK_PLAN, EncoderBlock
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Entry, Ignore, Rule, WeightPlan
from siglane.nn.rope import Rotary, rotary_tables_2d
from siglane.types import AttentionBackend, BackendChoice, Grid, PackedPatches
from siglane.vision.embed import PatchEmbedding
from siglane.vision.pool import HEAD_PLAN, MapHead
from siglane.vision.position import PositionEmbedding

Taps = dict[str, torch.Tensor]


class SiglipVisionModel(nn.Module):
    """Packed patches -> features of the layer that `config` asks for.

    Only the blocks that are used exist: a tower that VILA reads at layer -2 has no last block and no post_norm.
    """

    def __init__(
        self, config: VisionConfig, tp: TensorParallel | None = None, attention_backend: BackendChoice = "auto"
    ) -> None:
        super().__init__()
        tp = tp or TensorParallel.single()
        self.config, self.attention_backend = config, attention_backend
        self._backends: dict[tuple[torch.device, torch.dtype], AttentionBackend] = {}
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = PositionEmbedding(config) if config.position_grid.area else None
        self.blocks = nn.ModuleList(EncoderBlock(config, tp) for _ in range(config.depth))
        self.post_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.post_norm else None
        self.head = MapHead(config) if config.use_head else None

    def forward(self, packed: PackedPatches, taps: Taps | None = None) -> torch.Tensor:
        """pixels `[N, patch_dim]` -> features `[N, hidden_size]`, raster order inside each grid.

        taps, when given, receives every intermediate: patch_embedding, positions, block.0, ..., features.
        """
        x = self.patch_embedding(packed.pixels)
        _tap(taps, "patch_embedding", x)
        if self.position_embedding is not None:
            x = self.position_embedding(x, packed.grids)
        _tap(taps, "positions", x)
        segments = Segments.of([grid.area for grid in packed.grids], x.device)
        backend, rotary = self.backend_for(x.device, x.dtype), self._rotary(packed.grids, x.device)
        for number, block in enumerate(self.blocks):
            x = block(x, segments, backend, rotary)
            _tap(taps, f"block.{number}", x)
        if self.post_norm is not None:
            x = self.post_norm(x)
        _tap(taps, "features", x)
        return x

    def pool(self, features: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """The image embeddings `[B, hidden_size]` of features `[N, hidden_size]`. ValueError without a MAP head."""
        if self.head is None:
            raise ValueError("this checkpoint has no pooling head (vision_use_head is false)")
        pooled: torch.Tensor = self.head(
            features, [grid.area for grid in grids], self.backend_for(features.device, features.dtype)
        )
        return pooled

    def _rotary(self, grids: Sequence[Grid], device: torch.device) -> Rotary | None:
        config = self.config
        if config.rope_theta is None:
            return None
        return rotary_tables_2d(grids, config.head_dim, config.rope_theta, device)

    def backend_for(self, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
        """Chosen once for each, as `choose_backend` does. ConfigError when an explicit choice cannot run there."""
        key = device, dtype
        if key not in self._backends:
            config = self.config
            heads, head_dim = config.num_attention_heads, config.head_dim
            self._backends[key] = choose_backend(self.attention_backend, device, dtype, heads, head_dim)
        return self._backends[key]


def _tap(taps: Taps | None, name: str, value: torch.Tensor) -> None:
    if taps is not None:
        taps[name] = value


def tower_plan(config: VisionConfig) -> WeightPlan:
    """transformers' `SiglipVisionModel`, saved with the infix `vision_model.` (hub) or without (transformers 5)."""
    unused_blocks = range(config.depth, config.num_hidden_layers)
    last_norm: Entry = Rule("post_layernorm.{leaf}", "post_norm.{leaf}")
    if not config.post_norm:
        last_norm = Ignore("post_layernorm.{leaf}", "the features are taken before the last norm")
    learned = (Rule("embeddings.position_embedding.weight", "position_embedding.weight"),)
    positions = learned if config.position_grid.area else ()
    head = HEAD_PLAN.under("head.", "head.")
    if not config.use_head:
        head = WeightPlan((Ignore("head.{rest}", "the pooling head is not used"),))
    return WeightPlan((
        Ignore("{rest}.position_ids", "a constant buffer of older versions", torch.arange),
        *(Ignore(f"encoder.layers.{i}.{{rest}}", "the features are taken before this block") for i in unused_blocks),
        Rule("embeddings.patch_embedding.{leaf}", "patch_embedding.{leaf}"),
        *positions,
        *BLOCK_PLAN.under("encoder.layers.{i}.", "blocks.{i}.").entries,
        last_norm,
        *head.entries,
    )).under("[vision_model.]", "")  # fmt: skip
