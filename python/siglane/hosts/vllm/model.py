"""siglane's tower and projector with vLLM's language model: one class for every family."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.models.interfaces import SupportsMultiModal, SupportsPP, SupportsQuant
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from siglane.families.parallel import EncoderParallel
from siglane.hosts.asked import Described
from siglane.hosts.config import SiglaneConfig
from siglane.hosts.model import HostModel, of_group
from siglane.hosts.settings import VllmHostConfig
from siglane.hosts.vllm.processor import SiglaneDummyInputs, SiglaneMultiModalProcessor, SiglaneProcessingInfo
from siglane.settings.options import read_environment


@MULTIMODAL_REGISTRY.register_processor(
    SiglaneMultiModalProcessor, info=SiglaneProcessingInfo, dummy_inputs=SiglaneDummyInputs
)
class SiglaneForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, SupportsQuant):
    """vllm_config: of a view (`hosts/view.py`). ConfigError or WeightError when its checkpoint is not what it was."""

    supports_encoder_tp_data = True
    packed_modules_mapping = {  # noqa: RUF012 (vLLM's own declaration)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """None: the view's chat template writes them, each family its own."""
        return None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: SiglaneConfig = vllm_config.model_config.hf_config
        divided = vllm_config.model_config.multimodal_config.mm_encoder_tp_mode == "data"
        parallel: EncoderParallel = "dp" if divided else read_environment(VllmHostConfig).encoder_parallel
        self.siglane = HostModel(config, of_group(get_tp_group()), parallel)
        self.vision = self.siglane.vision
        self.language_model = init_vllm_registered_model(
            vllm_config, hf_config=config.text_config, prefix=maybe_prefix(prefix, "language_model")
        )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(
        self, siglane_pixels: Sequence[torch.Tensor] = (), siglane_described: Sequence[torch.Tensor] = (), **others: Any
    ) -> Sequence[torch.Tensor]:
        """The rows of each image, `[rows, hidden_size]`: one packed forward for all of them, of whatever requests."""
        described = [Described.from_bytes(one.numpy().tobytes()) for one in siglane_described]
        pairs = zip(described, siglane_pixels, strict=True)
        return self.vision([one.patches(pixels.contiguous(), self.siglane.images) for one, pixels in pairs]).split()

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """The names of what was filled, which vLLM compares with all there is."""
        language = self.siglane.load(weights, self.language_model.load_weights)
        return {f"vision.{name}" for name, _ in self.vision.named_parameters()} | {
            f"language_model.{name}" for name in language
        }
