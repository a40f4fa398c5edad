"""A language model of fewer bits: every linear layer, the output head and the embedding table; norms stay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from siglane.config.language import LanguageConfig
from siglane.lm.experts import Experts, SeparateExperts, SparseMLP
from siglane.lm.mlp import DecoderMLP
from siglane.lm.qwen import DecoderAttention, DecoderBlock, QwenModel
from siglane.lm.rotation import head_turn, random_basis, rotate_block, turned_reader, turned_writer
from siglane.lm.tables import IncomingTable, QuantisedHead, QuantisedTable, TiedCodes, TiedTable
from siglane.nn.cpu.int4 import GROUP_SIZE, Int4Linear
from siglane.nn.cpu.int8 import CentredInt8Linear, Int8Codes, WideInt8Linear, int8_codes
from siglane.nn.cpu.memory import return_freed
from siglane.nn.embedding import VocabTable
from siglane.nn.norm import GainlessRMSNorm
from siglane.nn.quantise import Bits, Given, MakeLinear, kernel, own, quantised

ABSORBED = ("input_norm", "post_attention_norm")  # of a block, whose gains go into the layers behind them
FOUR_BITS = ("attention.o_proj", ".gate_up", ".down_proj")  # of a block, the layers that `4bit` means


class LanguageQuantiser:
    """Replaces the layers of a decoder on a CPU, block by block, as each is loaded, its tables as they are read and its
    head at last; experts, one by one.

    In the turned basis (`rotation.py`) rows have no outliers, so 8 bits around zero suffice; but behind the product of
    SwiGLU, which no turn of weights can reach, they take 16 (`WideInt8Linear`), and so they do in front of q, k and v
    and of the head, small products whose rows' rounding would cause a fifth of the error. With 4 bits some weights
    keep 8: q, k and v, a small part that causes half of the error, tables, and the head, because a head of 4 writes
    bfloat16, in which likely tokens are ties. UserError when there is no kernel here.
    """

    def __init__(self, config: LanguageConfig, kind: Bits, group_size: int = GROUP_SIZE) -> None:
        kernel(kind, torch.device("cpu"))
        self._config, self._kind, self._group_size = config, kind, group_size
        self._basis, self._head_basis = random_basis(config.hidden_size), random_basis(config.head_dim)
        self._tied: IncomingTable[TiedCodes] | None = None
        self._table: IncomingTable[Int8Codes] | None = None
        self._head: IncomingTable[torch.Tensor] | None = None

    def begin(self, model: QwenModel) -> list[nn.Module]:
        """Before anything is loaded. Returns what then stands for tables and experts and needs no memory of its own."""
        return [*self._begin_tables(model), *_begin_experts(model)]

    def _begin_tables(self, model: QwenModel) -> list[nn.Module]:
        table, head = model.embed_tokens, model.lm_head
        if not isinstance(head, VocabTable):
            self._tied = model.embed_tokens = IncomingTable(table, lambda weight: TiedCodes(self._turned(weight)))
            return [model.embed_tokens]
        self._table = model.embed_tokens = IncomingTable(table, self._turned)
        # small only when the norm's gain is known; what is kept are the file's own pages
        self._head = model.lm_head = IncomingTable(head, lambda weight: weight)
        return [model.embed_tokens, model.lm_head]

    def _turned(self, weight: torch.Tensor) -> Int8Codes:
        return int8_codes(weight, lambda rows: rows.double() @ self._basis)

    def quantise_block(self, block: nn.Module) -> None:
        assert isinstance(block, DecoderBlock)
        given: Given = own
        if isinstance(block.mlp, SparseMLP):
            reader = partial(turned_reader, gain=block.post_attention_norm.weight.detach(), basis=self._basis)
            given = block.mlp.separated(self._config, reader, partial(turned_writer, basis=self._basis))
        rotate_block(block, self._basis, self._head_basis)
        return_freed()
        _quantise_block(block, self._kind, self._group_size, given)

    def finish(self, model: QwenModel) -> None:
        """Once all is loaded."""
        dtype = model.norm.weight.dtype
        model.basis = self._basis.T.to(dtype).contiguous()
        basis = model.basis.T  # a view: `restore` has the same, and layouts decide the last bit of a product
        gain = (self._basis.T * model.norm.weight.double()) @ self._basis
        turn = head_turn(model.norm, self._basis)
        if self._tied is not None:
            model.embed_tokens = TiedTable(self._tied, self._tied.take(), basis, gain.to(dtype))
        if self._table is not None:
            model.embed_tokens = QuantisedTable(self._table, *self._table.take(), basis)
        if self._head is not None:
            model.lm_head = QuantisedHead(WideInt8Linear(self._head.take(), None, turn), self._head.tp)


def restore(model: QwenModel, kind: Bits, given: Given, values: Callable[[str], torch.Tensor]) -> None:
    """What `LanguageQuantiser` leaves of `model`, made of the codes that it made. given: those of each layer and table,
    which are then its own; values: `basis` and, where the table is its own head, `gain`, in the model's dtype.

    UserError when there is no kernel here.
    """
    kernel(kind, torch.device("cpu"))
    table, head = model.embed_tokens, model.lm_head
    model.basis = values("basis")
    columns = model.basis.T
    codes = _table_codes(given, table)
    if isinstance(head, VocabTable):
        model.embed_tokens = QuantisedTable(table, codes.codes.clone(), codes.scale, columns)  # no view of a file
        model.lm_head = QuantisedHead(WideInt8Linear(_table_codes(given, head), None), head.tp)
    else:
        model.embed_tokens = TiedTable(table, TiedCodes(codes), columns, values("gain"))
    for block in model.blocks:
        assert isinstance(block, DecoderBlock)
        if isinstance(mlp := block.mlp, SparseMLP):
            mlp.router = nn.Parameter(torch.empty(mlp.router.shape), requires_grad=False)  # float32, not yet filled
        _quantise_block(block, kind, GROUP_SIZE, given)


def separate(model: QwenModel) -> None:
    """The experts of a model on the meta device, as those of fewer bits are."""
    for mlp in model.modules():
        if isinstance(mlp, SparseMLP):
            mlp.separate(model.config)


def _begin_experts(model: QwenModel) -> list[nn.Module]:
    """A block's experts are never whole in memory: what comes of them stays the file's own pages until all of the block
    is there, its norm's gain among it."""
    stacked = [module for module in model.modules() if isinstance(module, Experts)]
    for one in stacked:
        one.kept = {}
    return [*stacked]


def _table_codes(given: Given, table: nn.Module) -> Int8Codes:
    codes, _ = given(table)
    assert isinstance(codes, Int8Codes)
    return codes


def _quantise_block(block: DecoderBlock, kind: Bits, group_size: int, given: Given = own) -> None:
    """The norms, which have no gain any more, become scales of the layers behind them, but for the one in front of
    experts, whose rows serve their router too. given: as of `quantise`."""
    attention, mlp = block.attention, block.mlp
    assert isinstance(attention, DecoderAttention)
    assert isinstance(mlp, DecoderMLP | SparseMLP)
    small = partial(Int4Linear, group_size=group_size)
    centred, wide = (CentredInt8Linear, WideInt8Linear) if kind == "8bit" else (small, small)  # FOUR_BITS
    layers: list[tuple[nn.Module, str, MakeLinear]] = [
        (attention, "qkv", partial(WideInt8Linear, eps=block.input_norm.eps)),
        (attention, "o_proj", centred),
    ]
    norm: nn.Module = nn.Identity()
    if isinstance(mlp, DecoderMLP):
        gate_up = partial(centred, eps=block.post_attention_norm.eps)
        layers += [(mlp, "gate_up", gate_up), (mlp, "down_proj", wide)]
    else:
        assert isinstance(mlp.experts, SeparateExperts)
        norm = GainlessRMSNorm(block.post_attention_norm.eps)
        for expert in mlp.experts:
            layers += [(expert, "gate_up", centred), (expert, "down_proj", wide)]
    for parent, name, make in layers:
        setattr(parent, name, quantised(getattr(parent, name), make, given))
        return_freed()
    for name, left in zip(ABSORBED, (nn.Identity(), norm), strict=True):
        setattr(block, name, left)
