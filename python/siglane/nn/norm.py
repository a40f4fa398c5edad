"""Normalisations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from siglane.nn.linear import ShardedModule, check_shape, copy_checked
from siglane.nn.parallel import TensorParallel


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, the mean square taken in float32 and the result cast back before the weight.

    That order is Qwen2's and Qwen3's (transformers `Qwen2RMSNorm`); nanoVLM's differs in half precision.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class GainlessRMSNorm(nn.Module):
    """`x / rms(x)` in float32, whatever the dtype of x."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)


class InputRMSNorm(RMSNorm):
    """`x / rms(x) * weight`, all of it in the dtype of x (nanoVLM models/language_model.py `RMSNorm`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32:
            return super().forward(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class ShardedLayerNorm(ShardedModule):
    """LayerNorm over rows of `size` columns that are cut over the ranks: x `[..., size / tp.size]` -> the same shape.

    Mean and centred squares are summed over all ranks, in float32 whatever the dtype, as in torch's own. The caller
    passes a `tp` whose size divides `size`.
    """

    def __init__(self, size: int, eps: float, tp: TensorParallel) -> None:
        super().__init__()
        self.size, self.eps, self.tp = size, eps, tp
        self.weight = nn.Parameter(torch.empty(size // tp.size))
        self.bias = nn.Parameter(torch.empty(size // tp.size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        wide = x.float()
        wide = wide - self._mean(wide)
        wide = wide * torch.rsqrt(self._mean(wide.square()) + self.eps)
        return (wide * self.weight.float() + self.bias.float()).to(x.dtype)

    def _mean(self, share: torch.Tensor) -> torch.Tensor:
        return self.tp.all_reduce(share.sum(-1, keepdim=True)) / self.size

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        check_shape(tensor, self.size)
        copy_checked(self.get_parameter(name), self.tp.shard(tensor, 0))
