"""Qwen3-MoE's sparse MLP against transformers' block: which experts, with which weights, from which tensors, on how
many ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_lm_checkpoint import EXPERTS, write_causal_lm_checkpoint
from checkpoints import decoder_of, saved_experts
from parity_kit import assert_parity
from safetensors.torch import load_file, save_file
from test_visual_vocabulary import Ranks
from transformers import Qwen3MoeConfig

from siglane.config.language import ExpertsConfig, LanguageConfig
from siglane.config.reader import ConfigReader
from siglane.errors import ConfigError, WeightError
from siglane.families.model import VisionLanguageModel, load_model
from siglane.families.processor import load_processor
from siglane.hosts.config import text_config
from siglane.lm.experts import SparseMLP, experts_rules
from siglane.lm.mlp import DecoderMLP
from siglane.lm.qwen import QwenModel, qwen_plan
from siglane.nn.cpu.product import linear
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import WeightPlan
from siglane.weights.export import checkpoint_tensors
from siglane.weights.hub import open_checkpoint
from siglane.weights.load import StrictLoad

HIDDEN = 48
PLAN = "model.layers.0.mlp."


def experts(**facts: Any) -> ExpertsConfig:
    whole = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True} | facts
    found = ExpertsConfig.from_hf(ConfigReader(whole, "config.json"))
    assert found is not None
    return found


def block(**facts: Any) -> Any:
    """transformers' sparse block, random."""
    whole = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True} | facts
    return decoder_of("qwen3_moe", 3, vocab_size=8, **whole).model.layers[0].mlp


def filled(
    reference: Any, config: ExpertsConfig, tp: TensorParallel | None = None, *, fused: bool = False
) -> SparseMLP:
    """Ours with the reference's weights, from tensors as they are saved, or (fused) as they are in memory."""
    ours = SparseMLP(HIDDEN, config, tp or TensorParallel.single())
    state = {f"mlp.{name}": tensor for name, tensor in reference.state_dict().items()}
    with StrictLoad(WeightPlan(experts_rules(config)).under("mlp.", ""), ours) as load:
        for name, tensor in (state if fused else saved_experts(state)).items():
            load.take(name, tensor)
    return ours.eval()


def rows(count: int = 40, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
@pytest.mark.parametrize(
    "facts", [{}, {"norm_topk_prob": False}, {"num_experts_per_tok": 5}, {"num_experts_per_tok": 1}]
)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("count", [1, 40])
def test_rows_are_transformers(facts: dict[str, Any], fused: bool, count: int) -> None:
    reference = block(**facts)
    x = rows(count)
    assert_parity("rows", filled(reference, experts(**facts), fused=fused)(x), reference(x[None])[0])


@torch.no_grad()
def test_in_bfloat16_the_softmax_is_float32() -> None:
    dtype = torch.bfloat16
    reference, x = block().to(dtype), rows(dtype=dtype)
    ours = filled(reference, experts()).to(dtype)
    _, weights, chosen = reference.gate(x)
    found, numbers = ours.routing(linear(x, ours.router))
    assert found.dtype == dtype
    assert torch.equal(numbers, chosen)
    assert torch.equal(found, weights)
    assert torch.equal(ours(x), reference(x[None])[0])


@pytest.mark.parametrize(("normalised", "weights"), [(False, [0.52308, 0.31727]), (True, [0.62246, 0.37754])])
def test_the_weights_of_a_token(normalised: bool, weights: list[float]) -> None:
    """formats.md 8.1: logits (1, 3, 2, 3.5), the best two of four."""
    config = experts(num_experts=4, norm_topk_prob=normalised)
    ours = SparseMLP(1, config, TensorParallel.single())
    ours.router = torch.nn.Parameter(torch.tensor([[1.0], [3.0], [2.0], [3.5]]))
    found, chosen = ours.routing(linear(torch.ones(1, 1), ours.router))
    assert chosen.tolist() == [[3, 1]]
    assert found[0].tolist() == pytest.approx(weights, abs=1e-5)


@torch.no_grad()
def test_a_weight_multiplies_what_its_expert_gives() -> None:
    """Three experts whose outputs are 1, 10 and 100 times the same."""
    config = experts(num_experts=3, moe_intermediate_size=2)
    ours = SparseMLP(1, config, TensorParallel.single())
    ours.router.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
    ours.experts.gate_up.fill_(1.0)
    ours.experts.down.copy_(torch.tensor([[0.5], [5.0], [50.0]]).expand(3, 2))
    silu = torch.nn.functional.silu(torch.tensor(1.0)).item()
    first, second = torch.tensor([1.0, 2.0]).softmax(0).tolist()
    assert ours(torch.ones(1, 1)).item() == pytest.approx(silu * (10 * first + 100 * second), rel=1e-5)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_ranks_share_the_width_of_every_expert(size: int) -> None:
    """24 columns do not divide by five: then each rank has all of them."""
    reference, config, x = block(), experts(), rows()
    expected = filled(reference, config)(x).detach()

    def work(tp: TensorParallel) -> torch.Tensor:
        with torch.no_grad():  # of the thread
            ours = filled(reference, config, tp)
            assert ours.experts.down.shape == (5 * HIDDEN, 24 // (1 if size == 5 else size))
            return ours(x)

    for found in Ranks(size).run(work):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_which_layers_are_sparse() -> None:
    facts = {**EXPERTS, "num_hidden_layers": 6, "mlp_only_layers": [1], "decoder_sparse_step": 2}
    theirs = decoder_of("qwen3_moe", 0, vocab_size=8, **facts).model.layers
    config = LanguageConfig.from_hf({**Qwen3MoeConfig(**facts, vocab_size=8, hidden_size=HIDDEN).to_dict()})
    with torch.device("meta"):
        ours = QwenModel(config).blocks
    sparse = [isinstance(block.mlp, SparseMLP) for block in ours]
    assert sparse == [hasattr(layer.mlp, "experts") for layer in theirs] == [False, False, False, True, False, True]
    assert all(isinstance(block.mlp, DecoderMLP | SparseMLP) for block in ours)


def test_absent_keys_are_transformers_defaults() -> None:
    found = LanguageConfig.from_hf({"model_type": "qwen3_moe"})
    theirs = Qwen3MoeConfig()
    for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "rms_norm_eps",
    ):  # fmt: skip
        assert getattr(found, name) == getattr(theirs, name), name
    assert found.head_dim == 2048 // 32
    assert found.experts == ExpertsConfig(
        count=theirs.num_experts, per_token=8, size=768, normalised=False, step=1, dense_layers=()
    )
    assert LanguageConfig.from_hf({"model_type": "qwen3_moe", "num_experts": 0}).experts is None


def load(folder: Path) -> VisionLanguageModel:
    checkpoint = open_checkpoint(folder)
    return load_model(checkpoint, load_processor(checkpoint).config, device="cpu", dtype=torch.float32)


class TestFiles:
    def test_what_is_exported_are_the_saved_tensors(self, tmp_path: Path) -> None:
        write_causal_lm_checkpoint(tmp_path, "qwen3_moe", **EXPERTS)
        model = load(tmp_path)
        found = checkpoint_tensors(model.language, qwen_plan(model.config.language))
        stored = load_file(tmp_path / "model.safetensors")
        assert found.keys() == stored.keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in found.items())

    @torch.no_grad()
    def test_stacked_tensors_are_read_as_single_ones(self, tmp_path: Path) -> None:
        """As a raw `state_dict` of transformers has them."""
        written = write_causal_lm_checkpoint(tmp_path, "qwen3_moe", **EXPERTS)
        ids = torch.arange(20)
        expected = load(tmp_path).language.embed(ids)
        state = {name: tensor.contiguous() for name, tensor in written.model.state_dict().items()}
        assert "model.layers.0.mlp.experts.gate_up_proj" in state
        save_file(state, tmp_path / "model.safetensors")
        model = load(tmp_path)
        assert torch.equal(model.language.embed(ids), expected)
        for number in (0, 2):
            mine = model.language.blocks[number].mlp
            assert isinstance(mine, SparseMLP)
            theirs = state[f"model.layers.{number}.mlp.experts.down_proj"]
            assert torch.equal(mine.experts.down.unflatten(0, (5, -1)), theirs)

    def test_a_stack_that_lies_on_its_side_is_refused(self, tmp_path: Path) -> None:
        """As Qwen3-VL's files have it."""
        written = write_causal_lm_checkpoint(tmp_path, "qwen3_moe", **EXPERTS | {"moe_intermediate_size": 20})
        state = {name: tensor.contiguous() for name, tensor in written.model.state_dict().items()}
        name = "model.layers.0.mlp.experts.gate_up_proj"
        save_file(state | {name: state[name].transpose(1, 2).contiguous()}, tmp_path / "model.safetensors")
        with pytest.raises(WeightError, match=rf"tensor {name} has 240 rows, the model needs"):
            load(tmp_path)

    def test_a_missing_expert_is_named(self, tmp_path: Path) -> None:
        write_causal_lm_checkpoint(tmp_path, "qwen3_moe", **EXPERTS)
        state = load_file(tmp_path / "model.safetensors")
        del state["model.layers.2.mlp.experts.3.up_proj.weight"]
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(WeightError, match=r"missing: language\.blocks\.2\.mlp\.experts\.gate_up \(3\.up\)"):
            load(tmp_path)

    def test_one_expert_too_many_is_named(self, tmp_path: Path) -> None:
        write_causal_lm_checkpoint(tmp_path, "qwen3_moe", **EXPERTS)
        raw = json.loads((tmp_path / "config.json").read_text())
        raw.pop("num_local_experts", None)
        (tmp_path / "config.json").write_text(json.dumps(raw | {"num_experts": 4}))
        with pytest.raises(WeightError, match=r"has no parameter to fill|has shape"):
            load(tmp_path)


def test_a_host_builds_the_same_model(tmp_path: Path) -> None:
    written = write_causal_lm_checkpoint(tmp_path, "qwen3_moe", **EXPERTS)
    facts = text_config(load_processor(open_checkpoint(tmp_path)).config.language, "float32")
    assert facts.pop("model_type") == "qwen3_moe"
    theirs, ours = written.model.config, Qwen3MoeConfig(**facts)
    for name in (*EXPERTS, "hidden_size", "intermediate_size", "num_hidden_layers", "decoder_sparse_step"):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_experts_per_tok": 6}, "num_experts_per_tok 6 is more than the 5 experts"),
        ({"num_experts": 1 << 24}, "num_experts 16777216 is more than 4096"),
        ({"num_experts": -1}, "num_experts must be between 1 and"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be between 1 and"),
        ({"mlp_only_layers": {"1": 2}}, "mlp_only_layers must be a list of layers"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be bool"),
    ],
)
def test_facts_that_are_no_models(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        experts(**facts)
