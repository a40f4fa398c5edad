"""A sparse MLP of fewer bits: each expert is an MLP of its own, whose layers are replaced as a dense block's are.

On their way from a checkpoint the experts are never whole in memory together: their tensors stay the file's own pages
until all of a block is there, its norm's gain among it, and are then turned and made small one by one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from siglane.config.language import LanguageConfig
from siglane.lm.experts import Experts, SparseMLP
from siglane.lm.qwen import DecoderBlock, DecoderMLP, QwenModel
from siglane.lm.rotation import turned_reader, turned_writer
from siglane.nn.cpu.product import linear
from siglane.nn.experts import mixed
from siglane.nn.parallel import TensorParallel
from siglane.nn.quantise import Given, Weight, own


class SeparateExperts(nn.Module):
    """`SparseMLP` behind an RMSNorm without gain, which is a part of it. The experts are on the meta device.

    The router stays in float32, whatever the dtype: it is a thousandth of the weights, and rounding it sends tokens to
    other experts, where any other rounding moves a result a little.
    """

    def __init__(self, config: LanguageConfig, sparse: SparseMLP, eps: float) -> None:
        super().__init__()
        self.routing, self.router, self.tp, self.eps = sparse.routing, sparse.router, sparse.tp, eps
        width = sparse.experts.size // sparse.tp.size  # of each expert this rank's share, whose sums are added once
        narrow = replace(config, intermediate_size=width, mlp_bias=False)
        with torch.device("meta"):
            experts = [DecoderMLP(narrow, TensorParallel.single()) for _ in range(sparse.experts.count)]
        self.experts = nn.ModuleList(experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        weights, chosen = self.routing(linear(rows, self.router))
        return self.tp.all_reduce(mixed(rows, self._expert, len(self.experts), weights, chosen)).to(x.dtype)

    def _expert(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.experts[number](rows)
        return y

    def added(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """`residual + self(x)`"""
        return residual + self(x)


def separate(model: QwenModel) -> None:
    """Every sparse MLP of a model on the meta device."""
    for block in model.blocks:
        assert isinstance(block, DecoderBlock)
        if isinstance(block.mlp, SparseMLP):
            block.mlp = SeparateExperts(model.config, block.mlp, block.post_attention_norm.eps)


class IncomingExperts(Experts):
    """What stands for the experts while a checkpoint is read: nothing is copied."""

    def __init__(self, experts: Experts) -> None:
        with torch.device("meta"):
            super().__init__(experts.hidden_size, experts.experts, experts.tp)
        self._kept: dict[str, torch.Tensor] = {}

    def load_part(self, name: str, part: str, tensor: torch.Tensor) -> None:
        self._kept[part] = self.share(part, tensor)

    def take(self, number: int, *kinds: str) -> torch.Tensor:
        """This rank's weights of one expert, those of several kinds below each other, once."""
        return torch.cat([self._kept.pop(f"{number}.{kind}") for kind in kinds])


@torch.no_grad()
def separated(block: DecoderBlock, config: LanguageConfig, basis: torch.Tensor) -> Given:
    """Makes the sparse MLP of a loaded `block` one of separate experts, its router turned.

    Returns what gives its layers their turned weights, float32, made as they are asked for; other layers give their
    own.
    """
    sparse, norm = block.mlp, block.post_attention_norm
    assert isinstance(sparse, SparseMLP)
    incoming, gain = sparse.stacked, norm.weight.clone()
    assert isinstance(incoming, IncomingExperts)
    block.mlp = mlp = SeparateExperts(config, sparse, norm.eps)
    mlp.router = nn.Parameter(turned_reader(sparse.router, gain, basis).float(), requires_grad=False)
    readers = {id(expert.gate_up): number for number, expert in enumerate(mlp.experts)}
    writers = {id(expert.down_proj): number for number, expert in enumerate(mlp.experts)}

    def given(layer: nn.Module) -> tuple[Weight, torch.Tensor | None]:
        if (number := readers.get(id(layer))) is not None:
            return turned_reader(incoming.take(number, "gate", "up"), gain, basis).float(), None
        if (number := writers.get(id(layer))) is not None:
            return turned_writer(incoming.take(number, "down"), basis).float(), None
        return own(layer)

    return given
