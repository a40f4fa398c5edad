"""Llama as nanoVLM has it: Qwen2's decoder without biases, with another norm (formats.md 7.4)."""

from __future__ import annotations

from siglane.lm.qwen import QwenModel
from siglane.nn.norm import InputRMSNorm


class LlamaModel(QwenModel):
    """Its configuration says that no projection has a bias and that q and k have no norms."""

    norm_type = InputRMSNorm
