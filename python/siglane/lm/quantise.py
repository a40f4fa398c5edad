"""A language model of fewer bits: every linear layer and the output head; embeddings and norms stay."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from siglane.config.language import LanguageConfig
from siglane.lm.qwen import DecoderAttention, DecoderBlock, DecoderMLP, QwenModel
from siglane.lm.rotation import head_turn, random_basis, rotate_block
from siglane.nn.cpu.int8 import CentredInt8Linear, WideInt8Linear
from siglane.nn.embedding import VocabParallelEmbedding
from siglane.nn.parallel import TensorParallel
from siglane.nn.quantise import Bits, MakeLinear, kernel, quantised


class LanguageQuantiser:
    """Replaces the layers of a decoder on a CPU, block by block, as each is loaded, and then its head.

    In the turned basis (`rotation.py`) rows have no outliers, so 8 bits around zero suffice; but behind the product of
    SwiGLU, which no turn of weights can reach, they take 16 (`WideInt8Linear`). UserError when there is no kernel here.
    """

    def __init__(self, config: LanguageConfig, kind: Bits) -> None:
        kernel(kind, torch.device("cpu"))
        self._basis, self._head_basis = random_basis(config.hidden_size), random_basis(config.head_dim)

    def quantise_block(self, block: nn.Module) -> None:
        assert isinstance(block, DecoderBlock)
        rotate_block(block, self._basis, self._head_basis)
        _quantise_block(block)

    def finish(self, model: QwenModel) -> None:
        """Once all blocks are done."""
        table = model.lm_head or model.embed_tokens
        assert isinstance(table, VocabParallelEmbedding)
        turn = head_turn(model.norm, self._basis)
        model.lm_head = QuantisedHead(CentredInt8Linear(table.weight, None, turn), table.tp)
        model.basis = self._basis.T.to(model.embed_tokens.weight.dtype).contiguous()


def _quantise_block(block: DecoderBlock) -> None:
    """The norms, which have no gain any more, become scales of the layers behind them."""
    attention, mlp = block.attention, block.mlp
    assert isinstance(attention, DecoderAttention)
    assert isinstance(mlp, DecoderMLP)
    layers: tuple[tuple[nn.Module, str, MakeLinear], ...] = (
        (attention, "qkv", partial(CentredInt8Linear, eps=block.input_norm.eps)),
        (attention, "o_proj", CentredInt8Linear),
        (mlp, "gate_up", partial(CentredInt8Linear, eps=block.post_attention_norm.eps)),
        (mlp, "down_proj", WideInt8Linear),
    )
    for parent, name, make in layers:
        setattr(parent, name, quantised(getattr(parent, name), make))
    for name in ("input_norm", "post_attention_norm"):
        setattr(block, name, nn.Identity())


class QuantisedHead(nn.Module):
    """The output head: `[T, hidden_size]` -> logits `[T, vocab_size]`, whole on every rank."""

    def __init__(self, linear: CentredInt8Linear, tp: TensorParallel) -> None:
        super().__init__()
        self.linear, self.tp = linear, tp

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.tp.all_gather(self.linear(hidden))
