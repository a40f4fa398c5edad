"""Llama as nanoVLM has it: Qwen2's decoder without biases, with another norm (formats.md 7.4)."""

from __future__ import annotations

import torch

from siglane.lm.qwen import QwenModel
from siglane.nn.norm import RMSNorm


class InputRMSNorm(RMSNorm):
    """`x / rms(x) * weight`, all of it in the dtype of x (nanoVLM models/language_model.py `RMSNorm`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return super().forward(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class LlamaModel(QwenModel):
    """Its configuration says that no projection has a bias and that q and k have no norms."""

    norm_type = InputRMSNorm
