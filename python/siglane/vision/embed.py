"""Patches to embeddings: the reference's strided convolution is a linear layer on flattened patches."""

from __future__ import annotations

import torch
from torch import nn

from siglane.config.vision import VisionConfig
from siglane.nn.cpu.product import linear
from siglane.nn.linear import ShardedModule, check_shape, copy_checked


class PatchEmbedding(ShardedModule):
    """`[N, patch_dim]` -> `[N, hidden_size]`.

    The checkpoint stores either a convolution `[hidden, channels, P, P]` or a linear `[hidden, patch_dim]`; a
    convolution is brought into the order of `patch_layout` when it is loaded.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.patch_dim))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        return linear(patches, self.weight, self.bias)

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        config = self.config
        if name == "weight" and tensor.ndim == 4:
            check_shape(tensor, config.hidden_size, config.num_channels, config.patch_size, config.patch_size)
            if config.patch_layout == "channel_last":
                tensor = tensor.permute(0, 2, 3, 1)
            tensor = tensor.flatten(1)
        copy_checked(self.get_parameter(name), tensor)

    def stored_parts(self, name: str) -> dict[str, torch.Tensor]:
        stored, config = super().stored_parts(name), self.config
        if name == "weight" and config.patch_layout == "channel_first":
            return {"": stored[""].unflatten(1, (config.num_channels, config.patch_size, config.patch_size))}
        return stored
