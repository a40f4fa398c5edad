"""A language model of fewer bits: every linear layer and the output head; embeddings and norms stay."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from siglane.lm.qwen import DecoderAttention, DecoderBlock, DecoderMLP, QwenModel
from siglane.lm.rotation import random_basis, rotate_block, rotated_head
from siglane.nn.cpu.int8 import CentredInt8Linear, WideInt8Linear
from siglane.nn.embedding import VocabParallelEmbedding
from siglane.nn.parallel import TensorParallel
from siglane.nn.quantise import Bits, MakeLinear, kernel, quantise, quantised


def quantise_language(model: QwenModel, kind: Bits) -> None:
    """Replaces the layers of a loaded `model`, on CUDA as a tower's; UserError when there is no kernel here.

    On CPUs: in the turned basis (`rotation.py`) rows have no outliers, so 8 bits around zero suffice; but behind the
    product of SwiGLU, which no turn of weights can reach, they take 16 (`WideInt8Linear`).
    """
    device = model.embed_tokens.weight.device
    if device.type != "cpu":
        quantise(model, kind, device)
        return
    kernel(kind, device)
    size = model.config.hidden_size
    basis, head_basis = random_basis(size), random_basis(model.config.head_dim)
    for block in model.blocks:
        assert isinstance(block, DecoderBlock)
        rotate_block(block, basis, head_basis)
        _quantise_block(block)
    table = model.lm_head or model.embed_tokens
    assert isinstance(table, VocabParallelEmbedding)
    model.lm_head = QuantisedHead(rotated_head(model.norm, table.weight, basis), table.tp)
    model.basis = basis.to(model.embed_tokens.weight.dtype)


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

    def __init__(self, weight: torch.Tensor, tp: TensorParallel) -> None:
        super().__init__()
        self.tp = tp
        self.linear = CentredInt8Linear(weight, None)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.tp.all_gather(self.linear(hidden))
