"""Experts of fewer bits: the same sparse MLP in another basis, close to itself, read without a copy of them all."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from causal_lm_checkpoint import EXPERTS, write_causal_lm_checkpoint
from checkpoints import decoder_of, saved_experts
from parity_kit import assert_parity, load, logits
from safetensors.torch import load_file, save_file
from test_codes_folder import EITHER_BITS, quantised
from torch import nn

from siglane.config.language import LanguageConfig
from siglane.errors import UserError, WeightError
from siglane.families.model import VisionLanguageModel, load_model
from siglane.families.processor import load_processor
from siglane.families.quantise import Quantiser
from siglane.llm import LLM
from siglane.lm.build import build_language_model
from siglane.lm.experts import Experts, SeparateExperts, SparseMLP, experts_rules
from siglane.lm.qwen import DecoderBlock
from siglane.lm.rotation import random_basis, turned_reader, turned_writer
from siglane.nn.cpu.int4 import Int4Linear
from siglane.nn.cpu.int8 import CentredInt8Linear, Int8Weight, WideInt8Linear
from siglane.nn.norm import GainlessRMSNorm
from siglane.nn.plan import WeightPlan
from siglane.nn.quantise import Bits
from siglane.nn.quantise import quantised as replaced
from siglane.types import SamplingParams
from siglane.weights.hub import open_checkpoint
from siglane.weights.load import StrictLoad

# as wide as its layers have to be for what stands beside codes to be little of them
WIDE: dict[str, Any] = {
    "hidden_size": 256, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "vocab_size": 400,
    "norm_topk_prob": True, "head_dim": 64, "num_hidden_layers": 2,
}  # fmt: skip
IDS = torch.randint(0, 400, (60,), generator=torch.Generator().manual_seed(3))


def small(folder: Path, bits: Bits | None = "8bit", dtype: torch.dtype = torch.float32) -> VisionLanguageModel:
    checkpoint = open_checkpoint(folder)
    config = load_processor(checkpoint).config
    return load_model(checkpoint, config, device="cpu", dtype=dtype, quantization=bits)


@torch.no_grad()
def said(model: VisionLanguageModel) -> torch.Tensor:
    return logits(model, model.language.embed(IDS))


def float_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight = nn.Parameter(weight)
    return made


@torch.no_grad()
def test_turned_experts_are_the_same() -> None:
    """With products of floats, whose weights are read as a file has them and turned one expert after the other."""
    reference = decoder_of("qwen3_moe", 1, vocab_size=8, **EXPERTS | {"mlp_only_layers": []})
    layer = reference.model.layers[0]
    config = LanguageConfig.from_hf(reference.config.to_dict())
    block = build_language_model(config).blocks[0]
    assert isinstance(block, DecoderBlock)
    block.post_attention_norm.weight.copy_(layer.post_attention_layernorm.weight)
    mlp: Any = block.mlp
    mlp.experts.kept = {}
    assert config.experts is not None
    with StrictLoad(WeightPlan(experts_rules(config.experts)), mlp) as reading:
        for name, tensor in saved_experts({f".{name}": one for name, one in layer.mlp.state_dict().items()}).items():
            reading.take(name.removeprefix("."), tensor)
    basis = random_basis(config.hidden_size)
    reader = partial(turned_reader, gain=block.post_attention_norm.weight, basis=basis)
    given = mlp.separated(config, reader, partial(turned_writer, basis=basis))
    assert isinstance(mlp.experts, SeparateExperts)
    for expert in mlp.experts:
        for name in ("gate_up", "down_proj"):
            setattr(expert, name, replaced(getattr(expert, name), float_linear, given))
    x = torch.randn(40, config.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = x + layer.mlp(layer.post_attention_layernorm(x)[None])[0]
    stream = x @ basis.float()
    normed = GainlessRMSNorm(config.rms_norm_eps)(stream)
    assert_parity("rows", mlp.added(normed, stream) @ basis.T.float(), expected)


@pytest.mark.parametrize(("bits", "least"), [("8bit", 0.998), ("4bit", 0.97)])
def test_it_stays_close(bits: Bits, least: float, tmp_path: Path) -> None:
    write_causal_lm_checkpoint(tmp_path, "qwen3_moe", **EXPERTS)
    model = small(tmp_path, bits)
    assert F.cosine_similarity(said(model), said(load(tmp_path)[0])).mean() > least
    kinds = {"8bit": (CentredInt8Linear, WideInt8Linear), "4bit": (Int4Linear, Int4Linear)}[bits]
    sparse = [module for module in model.modules() if isinstance(module, SparseMLP)]
    assert len(sparse) == 2
    for mlp in sparse:
        assert isinstance(mlp.experts, SeparateExperts)
        assert mlp.router.dtype == torch.float32
        assert len(mlp.experts) == EXPERTS["num_experts"]
        for expert in mlp.experts:
            assert (type(expert.gate_up.linear), type(expert.down_proj.linear)) == kinds


@EITHER_BITS
def test_alone_and_beside_others(bits: Bits, tmp_path: Path) -> None:
    """Whom an expert serves besides changes no answer; a value between two codes, or of bfloat16, may take either."""
    write_causal_lm_checkpoint(tmp_path, "qwen3_moe", **EXPERTS)
    llm = LLM(tmp_path, device="cpu", quantization=bits, kv_tokens=2048)
    params = SamplingParams(max_tokens=12, logprobs=5, ignore_eos=True)
    (alone,) = llm.generate("Why is the sky blue?", params)
    beside = llm.generate(["Name a colour.", "Why is the sky blue?", "What is a river?"], params)[1]
    assert alone.text == beside.text
    found, expected = ([one.logprob for one in answer.logprobs] for answer in (beside, alone))
    assert found == pytest.approx(expected, abs={"8bit": 1e-4, "4bit": 0.02}[bits])


@EITHER_BITS
def test_stacked_tensors_are_read_as_single_ones(bits: Bits, tmp_path: Path) -> None:
    written = write_causal_lm_checkpoint(tmp_path, "qwen3_moe", **EXPERTS)
    expected = said(small(tmp_path, bits))
    state = {name: tensor.contiguous() for name, tensor in written.model.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(said(small(tmp_path, bits)), expected)


def test_the_router_stays_in_float32(tmp_path: Path) -> None:
    write_causal_lm_checkpoint(tmp_path / "model", "qwen3_moe", **EXPERTS)
    folder = quantised(tmp_path / "model", tmp_path / "small").root
    stored = load_file(folder / "model.safetensors")["language.blocks.0.mlp.router"]
    assert stored.dtype == torch.float32
    for model in (small(tmp_path / "model", dtype=torch.bfloat16), small(folder, None, torch.bfloat16)):
        mlp = model.language.blocks[0].mlp
        assert isinstance(mlp, SparseMLP)
        assert mlp.router.dtype == torch.float32
        assert model.language.norm.weight.dtype == torch.bfloat16
        assert F.cosine_similarity(mlp.router, stored).min() > 0.9999
        assert F.cosine_similarity(said(model).float(), said(small(folder, None))).mean() > 0.98


@pytest.mark.parametrize(("bits", "most"), [("8bit", 0.30), ("4bit", 0.20)])
def test_what_the_weights_take(bits: Bits, most: float, tmp_path: Path) -> None:
    write_causal_lm_checkpoint(tmp_path, "qwen3_moe", **WIDE)
    model, floats = small(tmp_path, bits), load(tmp_path)[0]
    own = [*model.parameters(), *model.buffers()]
    layers = [module for module in model.modules() if isinstance(module, Int8Weight | Int4Linear)]
    assert len(layers) == 2 * (2 + 2 * 8) + 1
    basis = model.language.basis
    assert basis is not None
    held = sum(one.nbytes for one in (*own, *layers)) - basis.nbytes  # which does not grow with layers or experts
    assert held < most * sum(one.nbytes for one in floats.parameters())


def test_experts_are_turned_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a checkpoint is read no float copy of a block's experts is made: what stands for them are its own pages."""
    write_causal_lm_checkpoint(tmp_path, "qwen3_moe", **WIDE)
    made, taken = list[tuple[int, ...]](), list[torch.Tensor]()
    whole_load, whole_empty = Experts.load_part, torch.empty

    def load_part(self: Experts, name: str, part: str, tensor: torch.Tensor) -> None:
        whole_load(self, name, part, tensor)
        if tensor.is_meta:  # of the rehearsal
            return
        assert self.kept is not None
        assert self.kept[part].untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        taken.append(self.gate_up)

    def empty(*sizes: Any, **facts: Any) -> torch.Tensor:
        tensor: torch.Tensor = whole_empty(*sizes, **facts)
        if not tensor.is_meta:
            made.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(Experts, "load_part", load_part)
    monkeypatch.setattr(torch, "empty", empty)
    small(tmp_path)
    assert len(taken) == 2 * 3 * 8
    assert all(parameter.is_meta for parameter in taken)
    assert made
    assert (8 * 2 * 128, 256) not in made


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    write_causal_lm_checkpoint(tmp_path / "model", "qwen3_moe", **EXPERTS)
    folder = quantised(tmp_path / "model", tmp_path / "small").root
    state = load_file(folder / "model.safetensors")
    del state["language.blocks.2.mlp.experts.3.gate_up.codes"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightError, match=r"tensor language\.blocks\.2\.mlp\.experts\.3\.gate_up\.codes is missing"):
        small(folder, None)


@EITHER_BITS
def test_on_cuda_they_are_refused_by_name(bits: Bits) -> None:
    config = LanguageConfig.from_hf(
        {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1}
    )
    with torch.device("meta"):
        language = build_language_model(config)
    message = "a mixture of experts has no form of fewer bits on cuda; use the model in floats, or a CPU"
    with pytest.raises(UserError, match=message) as caught:
        Quantiser(bits, None, language, torch.device("cuda"), torch.bfloat16, torch.bfloat16)
    assert (caught.value.code, caught.value.param) == ("unsupported_quantization", "quantization")
