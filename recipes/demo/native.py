"""The second demo model: native resolution, wired as Ovis2.5. The more patches it gets, the smaller print it reads.

Every batch has one canvas and one pixel budget, drawn at random, so the pictures of a batch share a grid and the model
meets grids of 64 to 672 patches.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from recipes.demo.data import Batch, BatchImages
from recipes.demo.export import language_tensors, preprocessor_config, vision_tensors, write_json, write_tensors
from recipes.demo.model import LANGUAGE as TILED_LANGUAGE
from recipes.demo.model import VISION as TILED_VISION
from recipes.demo.model import answer_logits, to_patches
from recipes.demo.naming import NamingHeads
from recipes.demo.scenes import CANVASES
from recipes.demo.tokenizer import END, PAD, START, VOCAB_SIZE, save_tokenizer, special_id, train_tokenizer
from siglane.config.language import LanguageConfig
from siglane.config.projector import LinearLayer, NormLayer, ProjectorConfig, VocabularyConfig
from siglane.config.vision import VisionConfig
from siglane.lm.qwen import QwenModel
from siglane.projector.build import projector_plan
from siglane.projector.visual_vocabulary import VisualVocabulary
from siglane.tiling.navit import smart_resize
from siglane.training.initialise import initialise
from siglane.types import Grid, PackedPatches
from siglane.vision.tower import SiglipVisionModel
from siglane.weights.export import checkpoint_tensors

PATCH, STRIDE = 16, 2
BUDGETS = (128 * 128, 192 * 192, 256 * 256, 384 * 384)  # pixels of a picture
SHARES = (0.08, 0.17, 0.3, 0.45)  # of the batches
PRINT_SCALES = (0.7, 0.5)  # at the largest budget a character is 1.9 or 1.3 patches wide
PATCHES_OF_A_BATCH = 3600
SEEING_STEPS = 3000
WORDS, INDICATORS = 1024, 4
SPECIAL = (PAD, START, END)
IMAGE_ID = VOCAB_SIZE  # outside the embedding table: it only marks places

VISION = replace(
    TILED_VISION,
    num_hidden_layers=4,
    patch_size=PATCH,
    position_grid=Grid(24, 24),
    position_resize="bicubic",
    rope_theta=10000.0,
)
LANGUAGE = replace(TILED_LANGUAGE, max_position_embeddings=4096, qkv_bias=False, qk_norm=True)
PROJECTOR = ProjectorConfig(
    merge="blocks",
    factor=STRIDE,
    column_major=False,
    layers=(
        LinearLayer("visual_tokenizer.head.0", STRIDE * STRIDE * VISION.hidden_size, WORDS, bias=False),
        NormLayer("visual_tokenizer.head.1", WORDS, 1e-5),
    ),
    input_size=VISION.hidden_size,
    output_size=LANGUAGE.hidden_size,
    vocabulary=VocabularyConfig("vte", WORDS, INDICATORS),
)


def native_tokenizer() -> Tokenizer:
    return train_tokenizer(special=SPECIAL)


@dataclass(frozen=True, slots=True)
class NativePromptFormat:
    """`data.PromptFormat` of Ovis2.5: no system turn, the picture between two indicators, a line feed, the question."""

    questions: int = 8
    page_batches: int = SEEING_STEPS  # every second of the first ones is a page

    def is_page(self, number: int) -> bool:
        return number < self.page_batches and number % 2 == 0

    def batch_images(self, rng: np.random.Generator) -> BatchImages:
        canvas = CANVASES[rng.integers(len(CANVASES))]
        budget = BUDGETS[rng.choice(len(BUDGETS), p=SHARES)]
        size = smart_resize(canvas, factor=PATCH * STRIDE, min_pixels=1, max_pixels=budget)
        grid = Grid(size.height // PATCH, size.width // PATCH)
        images = min(32, max(6, PATCHES_OF_A_BATCH // grid.area))
        return BatchImages(images, canvas, PRINT_SCALES, size, "bilinear", grid, grid.area // STRIDE**2 + 2)

    def beginning(self, tokenizer: Tokenizer, rows: int) -> list[int]:
        return [*tokenizer.encode(f"{START}user\n").ids, *[IMAGE_ID] * rows]

    def ending(self, question: str) -> str:
        return f"\n{question}{END}\n{START}assistant\n"


class NativeModel(nn.Module):
    """Tower, visual vocabulary, language model, and the naming heads that only training has."""

    def __init__(
        self, tokenizer: Tokenizer, vision: VisionConfig = VISION, language: LanguageConfig = LANGUAGE
    ) -> None:
        super().__init__()
        self.tower = SiglipVisionModel(vision)
        self.projector = VisualVocabulary(PROJECTOR)
        self.language = QwenModel(language)
        self.naming = NamingHeads(tokenizer, vision.hidden_size, language.hidden_size, block=STRIDE)
        initialise(self)
        # the mixture starts sharp, or every row would be the table's mean; its entries have a token's size
        nn.init.constant_(self.projector.norm.weight, 3.0)
        nn.init.normal_(self.projector.table, std=2 * language.hidden_size**-0.5)

    def see(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u8 `[B, height, width, 3]` -> tower features `[B * h * w, hidden]` and rows `[B * h * w / 4, hidden]`."""
        grids = (Grid(pictures.shape[1] // PATCH, pictures.shape[2] // PATCH),) * len(pictures)
        features: torch.Tensor = self.tower(PackedPatches(to_patches(pictures, PATCH), grids))
        return features, self.projector(features, grids)

    def naming_loss(self, features: torch.Tensor, rows: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The losses of `naming.py`; features and rows as `see` gives them."""
        grid = Grid(batch.pictures.shape[1] // PATCH, batch.pictures.shape[2] // PATCH)
        loss: torch.Tensor = self.naming.patch_loss(features, batch.labels)
        return loss + self.naming.row_loss(rows, batch.labels, self.language.embed_tokens.get_parameter("weight"), grid)

    def answers(self, rows: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[A, vocab]` and targets `[A]` of all answer tokens."""
        start, end = self.projector.indicator(0), self.projector.indicator(1)
        pictures = rows.unflatten(0, (len(batch.ids), -1))
        ends = [row.to(rows.dtype).expand(len(batch.ids), 1, -1) for row in (start, end)]
        framed = torch.cat((ends[0], pictures, ends[1]), dim=1).flatten(0, 1)
        return answer_logits(self.language, framed, batch, IMAGE_ID)


def export(model: NativeModel, tokenizer: Tokenizer, folder: Path) -> None:
    """A complete Ovis2.5 checkpoint in `folder` (formats.md section 3), at most 12 MB."""
    end, pad = special_id(tokenizer, END), special_id(tokenizer, PAD)
    vision, language = model.tower.config, model.language.config
    write_json(folder / "config.json", _config(vision, language, end, pad))
    write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": [end], "pad_token_id": pad})
    write_json(folder / "preprocessor_config.json", _preprocessor_config(vision))
    save_tokenizer(tokenizer, folder, SPECIAL, template=None)
    tensors = {f"visual_tokenizer.vit.{name}": value for name, value in vision_tensors(model.tower).items()}
    tensors |= {f"llm.{name}": value for name, value in language_tensors(model.language).items()}
    tensors |= checkpoint_tensors(model.projector, projector_plan(PROJECTOR))
    write_tensors(folder, tensors)


def _config(vision: VisionConfig, language: LanguageConfig, end: int, pad: int) -> dict[str, Any]:
    sizes = asdict(language)
    text = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **{key: sizes[key] for key in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
        )},
        "attention_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": language.tie_embeddings,
        "eos_token_id": end,
        "pad_token_id": pad,
        "torch_dtype": "float32",
    }  # fmt: skip
    return {
        "architectures": ["Ovis2_5"],
        "model_type": "ovis2_5",
        "conversation_formatter_class": "Qwen3ConversationFormatter",
        "hidden_size": language.hidden_size,
        "vocab_size": language.vocab_size,
        "visual_vocab_size": WORDS + INDICATORS,
        "llm_config": text,
        "vit_config": _tower_config(vision),
        "torch_dtype": "float32",
    }


def _tower_config(vision: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": "siglip2_navit",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": vision.num_channels,
        "num_patches": -1,
        "image_size": vision.position_grid.h * vision.patch_size,
        "patch_size": vision.patch_size,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": vision.layer_norm_eps,
        "attention_dropout": 0.0,
        "hidden_stride": STRIDE,
        "window_size": 112,
        "fullatt_block_indexes": None,
        "temporal_patch_size": 1,
        "preserve_original_pe": True,
        "use_rope": True,
    }


def _preprocessor_config(vision: VisionConfig) -> dict[str, Any]:
    side = vision.position_grid.h * vision.patch_size
    return preprocessor_config(side, 2) | {"min_pixels": (PATCH * STRIDE) ** 2, "max_pixels": BUDGETS[-1]}
