"""Checkpoint tensors that hold q, k and v (or gate and up) one after another: cut, sharded, counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from siglane.errors import WeightError
from siglane.nn.linear import ColumnParallelLinear, QKVParallelLinear
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Rule, WeightPlan
from siglane.weights.load import StrictLoad

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 6, 4, 2, 3, 8
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
SINGLE = TensorParallel.single()
PLAN = WeightPlan((
    Rule("qkv_proj.{leaf}", "qkv.{leaf}", "q+k+v"),
    Rule("q_proj.{leaf}", "qkv.{leaf}", "q"),
    Rule("kv_proj.{leaf}", "qkv.{leaf}", "k+v"),
    Rule("gate_up_proj.{leaf}", "gate_up.{leaf}", "gate+up"),
))  # fmt: skip


class Layer(nn.Module):
    """The two layers of a block that checkpoints store fused."""

    def __init__(self, tp: TensorParallel) -> None:
        super().__init__()
        self.qkv = QKVParallelLinear(HIDDEN, HEADS, KV_HEADS, HEAD_DIM, bias=True, tp=tp)
        self.gate_up = ColumnParallelLinear(HIDDEN, {"gate": INNER, "up": INNER}, bias=False, tp=tp)


def rank(number: int, size: int = 2) -> TensorParallel:
    """One of `size` ranks whose collectives are never asked for: loading needs none."""

    def unexpected(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("loading does not communicate")

    return TensorParallel(number, size, unexpected, unexpected)


def numbered(rows: int, columns: int = HIDDEN, start: int = 0) -> torch.Tensor:
    """Every element says where it stood in the checkpoint."""
    return torch.arange(start, start + rows * columns, dtype=torch.float32).reshape(rows, columns)


TENSORS = {
    "qkv_proj.weight": numbered(Q + 2 * KV),
    "qkv_proj.bias": numbered(Q + 2 * KV, 1, start=1000).flatten(),
    "gate_up_proj.weight": numbered(2 * INNER, start=2000),
}


def loaded(tp: TensorParallel, tensors: dict[str, torch.Tensor] = TENSORS) -> Layer:
    layer = Layer(tp)
    with StrictLoad(PLAN, layer) as load:
        assert list(load.route(tensors.items())) == []
    return layer


def test_a_whole_tensor_fills_the_whole_parameter() -> None:
    layer = loaded(SINGLE)
    assert torch.equal(layer.qkv.weight, TENSORS["qkv_proj.weight"])
    assert layer.qkv.bias is not None
    assert torch.equal(layer.qkv.bias, TENSORS["qkv_proj.bias"])
    assert torch.equal(layer.gate_up.weight, TENSORS["gate_up_proj.weight"])


@pytest.mark.parametrize("number", [0, 1])
def test_each_rank_gets_its_heads_and_its_columns(number: int) -> None:
    """Rank 0 of 2 has q heads 0 and 1, k head 0, v head 0: row by row, by hand."""
    layer = loaded(rank(number))
    heads = [2 * number, 2 * number + 1]
    rows = [head * HEAD_DIM + row for head in heads for row in range(HEAD_DIM)]
    rows += [Q + number * HEAD_DIM + row for row in range(HEAD_DIM)]
    rows += [Q + KV + number * HEAD_DIM + row for row in range(HEAD_DIM)]
    assert torch.equal(layer.qkv.weight, TENSORS["qkv_proj.weight"][rows])
    assert layer.qkv.bias is not None
    assert torch.equal(layer.qkv.bias, TENSORS["qkv_proj.bias"][rows])
    own = [number * INNER // 2 + row for row in range(INNER // 2)]
    inner = own + [INNER + row for row in own]
    assert torch.equal(layer.gate_up.weight, TENSORS["gate_up_proj.weight"][inner])


@pytest.mark.parametrize("number", range(4))
def test_key_heads_are_kept_on_several_ranks_where_there_are_fewer(number: int) -> None:
    layer = loaded(rank(number, 4))
    key = number // 2
    rows = [number * HEAD_DIM + row for row in range(HEAD_DIM)]
    rows += [first + key * HEAD_DIM + row for first in (Q, Q + KV) for row in range(HEAD_DIM)]
    assert torch.equal(layer.qkv.weight, TENSORS["qkv_proj.weight"][rows])


def test_fused_and_separate_tensors_give_the_same_layer() -> None:
    weight, bias = TENSORS["qkv_proj.weight"], TENSORS["qkv_proj.bias"]
    apart = {
        "kv_proj.bias": bias[Q:],
        "q_proj.weight": weight[:Q],
        "gate_up_proj.weight": TENSORS["gate_up_proj.weight"],
        "kv_proj.weight": weight[Q:],
        "q_proj.bias": bias[:Q],
    }
    for tp in (SINGLE, rank(0), rank(1)):
        expected = loaded(tp).state_dict()
        found = loaded(tp, apart).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_fused_tensor_may_have_another_dtype_and_strides() -> None:
    tensors = {
        name: tensor.double().mT.contiguous().mT if tensor.ndim > 1 else tensor for name, tensor in TENSORS.items()
    }
    assert torch.equal(loaded(SINGLE, tensors).qkv.weight, TENSORS["qkv_proj.weight"])


def refused(change: Callable[[dict[str, torch.Tensor]], object], tp: TensorParallel = SINGLE) -> str:
    tensors = dict(TENSORS)
    change(tensors)
    with pytest.raises(WeightError) as caught:
        loaded(tp, tensors)
    return str(caught.value)


@pytest.mark.parametrize("tp", [SINGLE, rank(1)], ids=["whole", "sharded"])
class TestRefused:
    @pytest.mark.parametrize("rows", [0, 1, Q, Q + 2 * KV - 1, Q + 2 * KV + 1, 3 * Q])
    def test_another_number_of_rows(self, tp: TensorParallel, rows: int) -> None:
        message = refused(lambda tensors: tensors.update({"qkv_proj.weight": numbered(rows)}), tp)
        assert message == f"tensor qkv_proj.weight has {rows} rows, the model needs {Q}+{KV}+{KV}"

    def test_a_number_instead_of_rows(self, tp: TensorParallel) -> None:
        message = refused(lambda tensors: tensors.update({"qkv_proj.bias": torch.tensor(1.0)}), tp)
        assert message == f"tensor qkv_proj.bias has 0 rows, the model needs {Q}+{KV}+{KV}"

    def test_another_width(self, tp: TensorParallel) -> None:
        wide = numbered(Q + 2 * KV, HIDDEN + 1)
        message = refused(lambda tensors: tensors.update({"qkv_proj.weight": wide}), tp)
        assert message == f"tensor qkv_proj.weight has shape {[Q, HIDDEN + 1]}, the model needs {[Q, HIDDEN]}"

    def test_one_that_is_missing(self, tp: TensorParallel) -> None:
        message = refused(lambda tensors: tensors.pop("gate_up_proj.weight"), tp)
        assert "missing: gate_up.weight (gate), gate_up.weight (up)" in message

    def test_a_part_that_the_fused_tensor_already_brought(self, tp: TensorParallel) -> None:
        message = refused(lambda tensors: tensors.update({"q_proj.weight": numbered(Q)}), tp)
        assert message == "tensor q_proj.weight comes twice: qkv_proj.weight already filled its parameter"

    def test_a_fused_tensor_behind_one_of_its_parts(self, tp: TensorParallel) -> None:
        layer = Layer(tp)
        load = StrictLoad(PLAN, layer)
        load.take("kv_proj.weight", numbered(2 * KV))
        with pytest.raises(WeightError, match=r"qkv_proj.weight comes twice: kv_proj.weight already filled"):
            load.take("qkv_proj.weight", TENSORS["qkv_proj.weight"])

    def test_the_same_name_again(self, tp: TensorParallel) -> None:
        load = StrictLoad(PLAN, Layer(tp))
        load.take("qkv_proj.weight", TENSORS["qkv_proj.weight"])
        with pytest.raises(WeightError, match=r"qkv_proj.weight comes twice: qkv_proj.weight already filled"):
            load.take("qkv_proj.weight", TENSORS["qkv_proj.weight"])


def test_parts_the_parameter_does_not_have_are_refused() -> None:
    """A plan for another architecture."""
    plan = WeightPlan((Rule("qkv_proj.{leaf}", "gate_up.{leaf}", "q+k+v"),))
    with pytest.raises(WeightError, match=r"qkv_proj.weight has no parameter to fill \(gate_up.weight\)"):
        StrictLoad(plan, Layer(SINGLE)).take("qkv_proj.weight", TENSORS["qkv_proj.weight"])
