"""A decoder in another basis of the same space, where no channel stands out (QuaRot, arXiv:2404.00456).

Without rounding the answers stay the same. With it they lose less: an outlier of one channel is spread over all, so
that a row's codes suffice for the rest. The norms' gains go into the weights behind them; one orthogonal matrix turns
the residual stream, so each weight that reads or writes it; a second one turns every head's values between v and o.
What enters the stream (embeddings, image rows) is turned by one product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from siglane.lm.mlp import DecoderMLP
from siglane.lm.qwen import DecoderAttention, DecoderBlock
from siglane.nn.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from siglane.nn.norm import RMSNorm

ROWS = COLUMNS = 256  # that are turned at a time, in float64
SEED = 0  # of the matrices: any will do, every rank has to have the same


def random_basis(size: int) -> torch.Tensor:
    """An orthogonal matrix f64 `[size, size]`, the same at every call."""
    generator = torch.Generator().manual_seed(SEED)
    basis, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return basis * triangle.diagonal().sign()


@torch.no_grad()
def rotate_block(block: DecoderBlock, basis: torch.Tensor, head_basis: torch.Tensor) -> None:
    """The stream comes and goes as `x @ basis`. The block's parameters are loaded and its own, but for experts, whose
    weights are turned one by one (`experts.py: SeparateExperts.given`)."""
    attention, mlp = block.attention, block.mlp
    assert isinstance(attention, DecoderAttention)
    _rotate_reader(block.input_norm, attention.qkv, basis)
    _rotate_values(attention, head_basis)
    _rotate_writer(attention.o_proj, basis)
    if isinstance(mlp, DecoderMLP):
        _rotate_reader(block.post_attention_norm, mlp.gate_up, basis)
        _rotate_writer(mlp.down_proj, basis)


def turned_reader(weight: torch.Tensor, gain: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """f64: a weight `[N, hidden_size]` that reads the stream behind a norm, whose `gain` moves into it."""
    return (weight.double() * gain.double()) @ basis


def turned_writer(weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """f64: a weight `[hidden_size, K]` whose results are added to the stream."""
    return basis.T @ weight.double()


@torch.no_grad()
def head_turn(norm: RMSNorm, basis: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """What turns rows `[N, hidden_size]` of the output head behind `norm`, whose gain moves into it."""
    gain = norm.weight.clone()
    norm.weight.fill_(1)
    return lambda rows: turned_reader(rows, gain, basis)


def _rotate_reader(norm: RMSNorm, reader: ColumnParallelLinear | QKVParallelLinear, basis: torch.Tensor) -> None:
    for rows in reader.weight.split(ROWS):
        rows.copy_(turned_reader(rows, norm.weight, basis))
    norm.weight.fill_(1)


def _rotate_writer(writer: RowParallelLinear, basis: torch.Tensor) -> None:
    for columns in writer.weight.split(COLUMNS, dim=1):
        columns.copy_(turned_writer(columns, basis))
    if writer.bias is not None:
        writer.bias.copy_(writer.bias.double() @ basis)


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
