"""A decoder in another basis of the same space, where no channel stands out (QuaRot, arXiv:2404.00456).

Without rounding the answers stay the same. With it they lose less: an outlier of one channel is spread over all, so
that a row's codes suffice for the rest. The norms' gains go into the weights behind them; one orthogonal matrix turns
the residual stream, so each weight that reads or writes it; a second one turns every head's values between v and o.
What enters the stream (embeddings, image rows) is turned by one product.
"""

from __future__ import annotations

import torch

from siglane.lm.qwen import DecoderAttention, DecoderBlock, DecoderMLP
from siglane.nn.norm import RMSNorm

SEED = 0  # of the matrices: any will do, every rank has to have the same


def random_basis(size: int) -> torch.Tensor:
    """An orthogonal matrix f64 `[size, size]`, the same at every call."""
    generator = torch.Generator().manual_seed(SEED)
    basis, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis * triangle.diagonal().sign()


@torch.no_grad()
def rotate_block(block: DecoderBlock, basis: torch.Tensor, head_basis: torch.Tensor) -> None:
    """The stream comes and goes as `x @ basis`. The block's parameters are loaded and its own."""
    attention, mlp = block.attention, block.mlp
    assert isinstance(attention, DecoderAttention)
    assert isinstance(mlp, DecoderMLP)
    _rotate_reader(block.input_norm, attention.qkv.weight, basis)
    _rotate_reader(block.post_attention_norm, mlp.gate_up.weight, basis)
    _rotate_values(attention, head_basis)
    for writer in (attention.o_proj, mlp.down_proj):
        writer.weight.copy_(basis.T @ writer.weight.double())
        if writer.bias is not None:
            writer.bias.copy_(writer.bias.double() @ basis)


@torch.no_grad()
def rotated_head(norm: RMSNorm, weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The output head behind `norm`, whose gain moves into it: weight `[vocabulary, hidden_size]` -> the same."""
    rows = [(part.double() * norm.weight.double()) @ basis for part in weight.split(8192)]
    norm.weight.fill_(1)
    return torch.cat([part.to(weight.dtype) for part in rows])


def _rotate_reader(norm: RMSNorm, weight: torch.Tensor, basis: torch.Tensor) -> None:
    """`weight` reads the stream behind `norm`."""
    weight.copy_((weight.double() * norm.weight.double()) @ basis)
    norm.weight.fill_(1)


def _rotate_values(attention: DecoderAttention, basis: torch.Tensor) -> None:
    """A mean of turned values is the turned mean: v turns them, o turns them back."""
    qkv, size = attention.qkv, attention.qkv.head_dim
    first = (qkv.heads + qkv.kv_heads) * size
    for parameter in (qkv.weight, qkv.bias):
        if parameter is not None:
            values = parameter[first:].double().unflatten(0, (-1, size))
            turned = torch.einsum("ji,hj...->hi...", basis, values)
            parameter[first:].copy_(turned.flatten(0, 1))
    output = attention.o_proj.weight
    output.copy_((output.double().unflatten(1, (-1, size)) @ basis).flatten(1))
