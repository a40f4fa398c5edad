"""siglane's tower and projector with SGLang's language model: one class for every family."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.managers.mm_utils import general_mm_embed_routine, pad_mm_tokens
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.models.qwen3 import Qwen3ForCausalLM
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM
from sglang.srt.utils import add_prefix
from torch import nn

from siglane.hosts.config import ARCHITECTURE, SiglaneConfig
from siglane.hosts.model import HostModel
from siglane.hosts.settings import SglangHostConfig
from siglane.hosts.sglang import bridge
from siglane.settings.options import read_environment

logger = logging.getLogger(__name__)

LANGUAGE_MODELS = {
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
}


class SiglaneForConditionalGeneration(nn.Module):
    """config: of a view (`view.py`). ConfigError or WeightError when its checkpoint is not what it was."""

    def __init__(self, config: SiglaneConfig, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.siglane = HostModel(config, bridge.tensor_parallel(), read_environment(SglangHostConfig).encoder_parallel)
        self.config = config
        self.vision = self.siglane.vision
        self.language_model = LANGUAGE_MODELS[config.text_config.model_type](
            config.text_config, quant_config, add_prefix("language_model", prefix)
        )

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.language_model.get_input_embeddings()
        return embeddings

    @property
    def lm_head(self) -> nn.Module:
        head: nn.Module = self.language_model.lm_head
        return head

    def pad_input_ids(self, input_ids: Any, mm_inputs: Any) -> Any:
        return pad_mm_tokens(input_ids, mm_inputs)

    def get_image_feature(self, items: list[Any]) -> list[torch.Tensor]:
        """What stands at the places of each item, `[places, hidden_size]`; any subset of a batch's images, one packed
        forward for all of them."""
        images = [bridge.patches_of(item, self.siglane.images) for item in items]
        logger.debug("siglane: %d images to encode", len(images))
        rows = self.vision(images).split()
        return [bridge.span_rows(*pair, self.get_input_embeddings()) for pair in zip(items, rows, strict=True)]

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: Any) -> Any:
        if not forward_batch.contains_mm_inputs():  # beside images SGLang does it itself
            # its native route takes any id from a client; one outside the vocabulary would end the scheduler
            input_ids = input_ids.clamp(0, self.config.text_config.vocab_size - 1)
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            multimodal_model=self,
            positions=positions,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """The first pass must fill every parameter of tower and projector; later ones, updates, may bring some."""
        if self.siglane.loaded:
            bridge.forget_rows()
        self.siglane.load(weights, self.language_model.load_weights)


assert SiglaneForConditionalGeneration.__name__ == ARCHITECTURE
EntryClass = SiglaneForConditionalGeneration
