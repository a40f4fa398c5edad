"""A decoder in a turned basis is the same decoder; with 8-bit layers it stays close to itself, row by row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from siglane.cli.demo import load_example
from siglane.config.language import LanguageConfig
from siglane.errors import ConfigError
from siglane.llm import LLM
from siglane.lm.attention import SegmentAttention
from siglane.lm.build import build_language_model
from siglane.lm.quantise import LanguageQuantiser
from siglane.lm.qwen import QwenModel
from siglane.lm.rotation import head_turn, random_basis, rotate_block
from siglane.lm.tables import QuantisedHead, TiedTable
from siglane.nn.cpu.int4 import Int4Linear
from siglane.nn.cpu.int8 import CentredInt8Linear, Int8Weight, NormedInt8Linear, WideInt8Linear
from siglane.nn.cpu.table import PackedRows
from siglane.nn.quantise import Bits
from siglane.types import SamplingParams

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2"},
    "qwen2 tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3 biased": {"model_type": "qwen3", "head_dim": 10, "attention_bias": True},
    "all biased": {"model_type": "qwen2", "all_biased": True},
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
IDS = torch.randint(0, 211, (40,), generator=torch.Generator().manual_seed(3))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def language(kind: dict[str, Any]) -> QwenModel:
    """A decoder of drawn weights."""
    config = LanguageConfig.from_hf(SIZES | {key: value for key, value in kind.items() if key != "all_biased"})
    if "all_biased" in kind:  # as a Llama may be
        config = replace(config, qkv_bias=True, output_bias=True, mlp_bias=True)
    model = build_language_model(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.eval()


def quantised(model: QwenModel, kind: Bits = "8bit") -> QwenModel:
    quantiser = LanguageQuantiser(model.config, kind)
    weights = [table.weight for table in (model.embed_tokens, model.lm_head) if table is not None]
    for table, weight in zip(quantiser.begin(model), weights, strict=True):
        table.load_part("weight", "", weight)
    for block in model.blocks:
        quantiser.quantise_block(block)
    quantiser.finish(model)
    return model


@torch.no_grad()
def logits(model: QwenModel, taps: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    attention = SegmentAttention([len(IDS)])
    return model.logits(model(model.embed(IDS), torch.arange(len(IDS)), attention, taps))


@EVERY_KIND
def test_a_turned_decoder_is_the_same(kind: dict[str, Any]) -> None:
    plain, turned = language(kind), language(kind)
    basis, head_basis = random_basis(48), random_basis(turned.config.head_dim)
    assert torch.allclose(basis.T @ basis, torch.eye(48, dtype=torch.float64), atol=1e-12)
    for block in turned.blocks:
        rotate_block(block, basis, head_basis)
    table = (turned.lm_head or turned.embed_tokens).weight
    head, turned.basis = head_turn(turned.norm, basis)(table).float(), basis.T.float()
    expected, found = {}, {}
    reference = logits(plain, expected)
    logits(turned, found)
    for name, tap in expected.items():
        assert torch.allclose(found[name], tap, atol=2e-4), name
    hidden = turned(turned.embed(IDS), torch.arange(len(IDS)), SegmentAttention([len(IDS)]))
    assert torch.allclose(F.linear(hidden, head), reference, atol=2e-4)


@pytest.mark.few("qwen2 tied", "qwen3 biased")
@EVERY_KIND
def test_eight_bits_stay_close(kind: dict[str, Any]) -> None:
    plain, small = language(kind), quantised(language(kind))
    expected, found = logits(plain), logits(small)
    assert F.cosine_similarity(found, expected).min() > 0.998
    attention, mlp = small.blocks[0].attention, small.blocks[0].mlp
    assert all(isinstance(layer.linear, WideInt8Linear) for layer in (attention.qkv, mlp.down_proj))
    assert all(isinstance(layer.linear, CentredInt8Linear) for layer in (attention.o_proj, mlp.gate_up))
    tied = plain.config.tie_embeddings
    assert isinstance(small.embed_tokens if tied else small.lm_head, TiedTable if tied else QuantisedHead)
    rows = small.embed(IDS)
    assert F.cosine_similarity(rows, plain.embed(IDS)).min() > 0.9998
    layers = [module for module in small.modules() if isinstance(module, Int8Weight)]
    assert len(layers) == 3 * 4 + 1


@EVERY_KIND
@torch.no_grad()
def test_rows_need_not_be_turned_back_and_forth(kind: dict[str, Any]) -> None:
    ids, attention = torch.tensor([5, -300, 210, 211, 7]), [SegmentAttention([5]) for _ in range(3)]
    for model in (language(kind), quantised(language(kind))):
        embeds = model.embed(ids)
        torch.testing.assert_close(model.embed_turned(ids), model.turned(embeds), rtol=1e-5, atol=1e-5)
        expected = model(embeds, torch.arange(5), attention[0])
        torch.testing.assert_close(model.decode(model.turned(embeds), torch.arange(5), attention[1]), expected)
    assert not torch.allclose(model.embed_turned(ids), embeds, atol=0.1)


@EVERY_KIND
def test_four_bits_stay_near(kind: dict[str, Any]) -> None:
    plain, small = language(kind), quantised(language(kind), "4bit")
    assert F.cosine_similarity(logits(small), logits(plain)).mean() > 0.98
    first = small.blocks[0]
    assert isinstance(first.attention.qkv.linear, WideInt8Linear)
    for layer in (first.attention.o_proj, first.mlp.gate_up, first.mlp.down_proj):
        assert isinstance(layer.linear, Int4Linear)


@torch.no_grad()
def test_a_tied_table_lies_in_memory_once() -> None:
    small = quantised(language(KINDS["qwen2 tied"]))
    table = small.embed_tokens
    assert isinstance(table.codes, PackedRows)
    assert torch.equal(table.codes[torch.arange(211)], table.head.stored.codes)
    assert table.codes.nbytes == 0, "oneDNN keeps weights in another order here"


def test_a_second_table_with_other_values_is_refused() -> None:
    model = language(KINDS["qwen2 tied"])
    values = model.embed_tokens.weight
    (table,) = LanguageQuantiser(model.config, "8bit").begin(model)
    table.load_part("weight", "", values)
    with pytest.raises(ValueError, match="other values than the table to which it is tied"):
        table.load_part("weight", "", values + 1)


@torch.no_grad()
def test_an_outlier_costs_less_in_another_basis() -> None:
    basis = random_basis(256).float()
    x, weight = drawn(50, 256), drawn(64, 256, seed=1)
    x[:, 17] *= 40
    expected = F.linear(x, weight)
    straight = CentredInt8Linear(weight, None)(x)
    turned = CentredInt8Linear(weight @ basis, None)(x @ basis)
    assert (turned - expected).norm() < 0.5 * (straight - expected).norm()


def test_the_same_weights_give_the_same_model() -> None:
    first, second = (quantised(language(KINDS["qwen2"])) for _ in range(2))
    assert torch.equal(logits(first), logits(second))


@torch.no_grad()
@pytest.mark.parametrize(("layer", "bound"), [(CentredInt8Linear, 0.016), (WideInt8Linear, 0.011)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_each_row_has_its_own_codes(layer: type[Int8Weight], bound: float, with_bias: bool) -> None:
    x, weight = drawn(600, 96) * torch.logspace(-6, 6, 600)[:, None], drawn(64, 96, seed=1)
    made = layer(weight, drawn(64, seed=2) * 1e-9 if with_bias else None)
    found, expected = made(x), F.linear(x, weight)
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() < bound
    alone = torch.cat([made(row) for row in x.split(1)])
    assert ((alone - found).norm(dim=1) / found.norm(dim=1)).max() < 2e-4  # a value between two codes may take either
    x[1, 2], x[2, 2], x[3], x[4] = torch.nan, torch.inf, 0, x[4] * 0 - 0.0
    again = made(x)
    assert not again[1:3].isfinite().any()
    assert not torch.cat([made(row) for row in x[1:3].split(1)]).isfinite().any()
    assert torch.equal(made(x[3:4]), again[3:4])
    assert torch.equal(again[5:], found[5:])
    assert torch.equal(again[3:5], (torch.zeros(2, 64) if made.bias is None else made.bias.expand(2, 64)))


@torch.no_grad()
@pytest.mark.parametrize("layer", [CentredInt8Linear, WideInt8Linear])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_norm_before_a_layer_is_a_scale(rows: int, layer: type[NormedInt8Linear]) -> None:
    x, weight, bias = drawn(rows, 96) * 3, drawn(64, 96, seed=1), drawn(64, seed=2)
    normed = layer(weight, bias)(F.rms_norm(x, (96,), eps=0.3))
    made = layer(weight, bias, eps=0.3)
    assert torch.allclose(made(x), normed, atol=1e-3)
    if made.packed.is_mkldnn:  # by torch's calls too, as where nothing can be compiled
        made.compiled = None
        assert torch.allclose(made(x), normed, atol=1e-3)


@torch.no_grad()
def test_sixteen_bits_leave_the_weights_error_alone() -> None:
    x, weight = drawn(5, 512), drawn(32, 512, seed=1)
    x[2, 17] = 300.0  # an outlier, as behind a product of two rows
    made = WideInt8Linear(weight, None)
    rounded = (weight / made.scale[:, None]).round() * made.scale[:, None]
    expected = x.double() @ rounded.double().T
    assert ((made(x).double() - expected).norm(dim=1) / expected.norm(dim=1)).max() < 2e-4


def test_an_answer_of_eight_bits(nvila_folder: Path) -> None:
    """All of a chat model: tower, projector, language model and head; greedy answers repeat, alone or not."""
    options = {"device": "cpu", "kv_tokens": 2048}
    small, plain = LLM(nvila_folder, quantization="8bit", **options), LLM(nvila_folder, **options)
    params = SamplingParams(max_tokens=12, logprobs=5, ignore_eos=True)
    (alone,) = small.generate("Why is the sky blue?", params)
    beside = small.generate(["Name a colour.", "Why is the sky blue?", "What is a river?"], params)[1]
    assert alone.text == beside.text
    assert [one.logprob for one in alone.logprobs] == pytest.approx([one.logprob for one in beside.logprobs], abs=3e-5)
    (exact,) = plain.generate("Why is the sky blue?", replace(params, max_tokens=1))
    first = alone.logprobs[0]
    assert abs(first.logprob - exact.logprobs[0].logprob) < 0.05


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_the_shipped_model_answers_the_shipped_question(bits: Bits) -> None:
    example = load_example()
    prompt = {"prompt": example.question, "images": [example.picture]}
    (answer,) = LLM("demo", device="cpu", quantization=bits, kv_tokens=2048).generate(prompt)
    assert answer.text == example.answer


def test_what_cannot_be_said(nvila_folder: Path) -> None:
    with pytest.raises(ConfigError, match="quantization '3bit' is not known"):
        LLM(nvila_folder, device="cpu", quantization="3bit")
