"""The demo model: siglane's own tower, projector and language model, wired as NVILA-Lite, small enough for a laptop."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import nn

from recipes.demo.data import Batch, BatchShape, branch_attention
from recipes.demo.naming import NamingHeads
from recipes.demo.tokenizer import IMAGE, VOCAB_SIZE, special_id
from siglane.config.language import LanguageConfig
from siglane.config.projector import vila_projector
from siglane.config.vision import VisionConfig
from siglane.families.splice import ImageRows, splice
from siglane.lm.qwen import QwenModel
from siglane.projector.mlp import Projector
from siglane.training.initialise import initialise
from siglane.types import Grid, PackedPatches
from siglane.vision.tower import SiglipVisionModel

TILE, PATCH = 144, 12
GRID = Grid(TILE // PATCH, TILE // PATCH)
ROWS = (GRID.h // 3) * (GRID.w // 3)
PROJECTOR = "mlp_downsample_3x3_fix"

VISION = VisionConfig(
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_channels=3,
    patch_size=PATCH,
    position_grid=GRID,
    hidden_act="gelu_tanh",
    layer_norm_eps=1e-6,
    patch_layout="channel_first",
    position_resize="never",
    rope_theta=None,
    depth=4,  # NVILA reads hidden_states[-2]
    post_norm=False,
    use_head=False,
)
LANGUAGE = LanguageConfig(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    norm_dtype="float32",
    tie_embeddings=True,
    rope_scaling=None,
    experts=None,
)


class DemoModel(nn.Module):
    """Tower, projector, language model, and the naming heads that only training has."""

    def __init__(
        self, tokenizer: Tokenizer, vision: VisionConfig = VISION, language: LanguageConfig = LANGUAGE
    ) -> None:
        super().__init__()
        self.tower = SiglipVisionModel(vision)
        self.projector = Projector(
            vila_projector(PROJECTOR, input_size=vision.hidden_size, output_size=language.hidden_size)
        )
        self.language = QwenModel(language)
        self.image_id = special_id(tokenizer, IMAGE)
        self.naming = NamingHeads(tokenizer, vision.hidden_size, language.hidden_size, block=3)
        initialise(self)

    def see(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u8 `[B, tile, tile, 3]` -> tower features `[B * h * w, hidden]` and rows `[B * ROWS, hidden]`."""
        grids = (GRID,) * len(pictures)
        features: torch.Tensor = self.tower(PackedPatches(to_patches(pictures, PATCH), grids))
        return features, self.projector(features, grids)

    def naming_loss(self, features: torch.Tensor, rows: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The losses of `naming.py`; features and rows as `see` gives them."""
        embedding = self.language.embed_tokens.get_parameter("weight")
        loss: torch.Tensor = self.naming.patch_loss(features, batch.labels)
        return loss + self.naming.row_loss(rows, batch.labels, embedding, GRID)

    def answers(self, rows: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[A, vocab]` and targets `[A]` of all answer tokens."""
        return answer_logits(self.language, rows, batch, self.image_id)


def answer_logits(
    language: QwenModel, rows: torch.Tensor, batch: Batch, image_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[A, vocab]` and targets `[A]` of all answer tokens; each sequence's share of `rows` takes the places of
    `image_id`."""
    sequences, length = batch.ids.shape
    own = rows.chunk(sequences)
    first = int((batch.ids[0] == image_id).nonzero()[0])  # every sequence begins alike
    span = ImageRows(first, first + len(own[0]), 0, 0)
    embeds = splice(
        language.embed(batch.ids.flatten()), [span.moved(start * length) for start in range(sequences)], own
    )
    hidden = language(embeds, batch.positions.flatten(), branch_attention(batch.branches))
    targets = batch.targets.flatten()
    where = (targets >= 0).nonzero()[:, 0]
    return language.logits(hidden[where]), targets[where]


def to_patches(pictures: torch.Tensor, patch: int) -> torch.Tensor:
    """u8 `[B, height, width, 3]` -> normalised f32 `[B * h * w, 3 * patch * patch]`, channel first, raster order."""
    grid = Grid(pictures.shape[1] // patch, pictures.shape[2] // patch)
    x: torch.Tensor = pictures.float().div(127.5).sub(1.0)
    x = x.unflatten(2, (grid.w, patch)).unflatten(1, (grid.h, patch))  # [B, h, y, w, x, c]
    return x.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(0, 2)


SHAPE = BatchShape(images=24, questions=8, tile=TILE, patch=PATCH, rows=ROWS)
