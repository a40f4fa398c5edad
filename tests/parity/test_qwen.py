"""The decoder against transformers' Qwen2ForCausalLM and Qwen3ForCausalLM: logits, greedy tokens, half precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import randomise
from parity_kit import assert_parity, filled
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from siglane.config.language import LanguageConfig
from siglane.lm.attention import SegmentAttention
from siglane.lm.qwen import QwenModel, qwen_plan

ReferenceModel = Any  # transformers leaves it untyped

TINY: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 211,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2 untied": {"model_type": "qwen2"},
    "qwen2 tied, one key/value head": {"model_type": "qwen2", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "qwen2 without grouping": {"model_type": "qwen2", "num_key_value_heads": 4, "rms_norm_eps": 0.3},
    "qwen2 with its own head_dim": {"model_type": "qwen2", "head_dim": 20},
    "qwen3 head_dim above hidden/heads": {"model_type": "qwen3", "head_dim": 32},
    "qwen3 tied, biased": {"model_type": "qwen3", "head_dim": 10, "tie_word_embeddings": True, "attention_bias": True},
    "qwen3 small base": {
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
}
EVERY_VARIANT = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
EACH_MODEL = pytest.mark.parametrize("variant", [VARIANTS["qwen2 untied"], VARIANTS["qwen3 tied, biased"]])


def reference_model(variant: dict[str, Any], seed: int = 0) -> ReferenceModel:
    classes: dict[str, Any] = {"qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = classes[variant["model_type"]]
    config = config_class(**TINY | {key: value for key, value in variant.items() if key != "model_type"})
    model: ReferenceModel = model_class(config)
    model.eval()
    model.set_attn_implementation("eager")
    randomise(model, seed, by_width=True)
    model.generation_config.eos_token_id = None
    return model


def our_model(reference: ReferenceModel) -> QwenModel:
    return our_model_of(reference, LanguageConfig.from_hf(reference.config.to_dict()))


def our_model_of(reference: ReferenceModel, config: LanguageConfig) -> QwenModel:
    model, unused = filled(QwenModel(config), qwen_plan(config), reference)
    assert unused == ({"lm_head.weight"} if config.tie_embeddings else set())
    return model


def prompts(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, TINY["vocab_size"], (length,), generator=generator) for length in lengths]


def logits(
    model: QwenModel, sequences: list[torch.Tensor], taps: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """All sequences packed in one call, without a cache: `[sum of lengths, vocab_size]`."""
    lengths = [len(sequence) for sequence in sequences]
    positions = torch.cat([torch.arange(length) for length in lengths])
    embeds = model.embed(torch.cat(sequences))
    return model.logits(model(embeds, positions, SegmentAttention(lengths), taps))


@EVERY_VARIANT
@pytest.mark.parametrize("seed", [0, 1])
@torch.no_grad()
def test_logits_and_every_block_are_the_references(variant: dict[str, Any], seed: int) -> None:
    reference = reference_model(variant, seed)
    sequences = prompts([1, 7, 40, 40], seed)
    taps: dict[str, torch.Tensor] = {}
    ours = logits(our_model(reference), sequences, taps)
    theirs = [reference(ids[None], output_hidden_states=True) for ids in sequences]
    assert_parity("logits", ours, torch.cat([answer.logits[0] for answer in theirs]))
    assert list(taps) == ["lm.block.0", "lm.block.1", "lm.block.2"]
    for number in range(2):  # the reference's last hidden state is behind the norm
        blocks = torch.cat([answer.hidden_states[number + 1][0] for answer in theirs])
        assert_parity(f"lm.block.{number}", taps[f"lm.block.{number}"], blocks)


@pytest.mark.few(
    "qwen2 tied, one key/value head", "qwen2 with its own head_dim", "qwen3 head_dim above hidden/heads",
    "qwen3 tied, biased",
)  # fmt: skip
@EVERY_VARIANT
@torch.no_grad()
def test_32_greedy_tokens_are_the_references(variant: dict[str, Any]) -> None:
    reference = reference_model(variant, seed=1)
    # loud embeddings (quiet ones under a tied head, which would repeat its input) keep the answers from settling
    reference.model.embed_tokens.weight.mul_(0.3 if reference.config.tie_word_embeddings else 6)
    model = our_model(reference)
    started = prompts([9, 9, 9], seed=1)
    theirs = reference.generate(torch.stack(started), max_new_tokens=32, do_sample=False, pad_token_id=0)
    ours = started
    for _ in range(32):
        last = torch.tensor([len(ids) for ids in ours]).cumsum(0) - 1
        following = logits(model, ours)[last].argmax(-1)
        ours = [torch.cat((ids, token[None])) for ids, token in zip(ours, following, strict=True)]
    assert torch.equal(torch.stack(ours), theirs)
    assert theirs[:, 9:].unique().numel() >= 10


@pytest.mark.parametrize(
    "written",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 7.0},
        {},
    ],
    ids=str,
)
@torch.no_grad()
def test_every_way_to_write_the_rotary_base_reads_as_the_reference_reads_it(written: dict[str, Any]) -> None:
    raw = {**TINY, "model_type": "qwen2"}
    del raw["rope_parameters"]
    raw |= written
    make: Any = Qwen2ForCausalLM
    reference: ReferenceModel = make(Qwen2Config.from_dict(raw)).eval()
    randomise(reference, seed=3, by_width=True)
    model = our_model_of(reference, LanguageConfig.from_hf(raw))
    (ids,) = prompts([60], seed=3)
    assert_parity("logits", logits(model, [ids]), reference(ids[None]).logits[0])


@EACH_MODEL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_is_as_near_to_float32_as_the_references(variant: dict[str, Any], dtype: torch.dtype) -> None:
    reference = reference_model(variant, seed=4)
    model = our_model(reference)
    (ids,) = prompts([50], seed=4)
    exact = logits(model, [ids])
    ours = logits(model.to(dtype), [ids])
    theirs = reference.to(dtype)(ids[None]).logits[0]
    assert ours.dtype == dtype
    assert torch.isfinite(ours).all()
    drift, their_drift = ((half.float() - exact).square().mean().sqrt() for half in (ours, theirs))
    assert drift <= 1.2 * their_drift
    assert torch.nn.functional.cosine_similarity(ours.float(), exact, dim=-1).min() > 0.999


@EACH_MODEL
@torch.no_grad()
def test_embeddings_may_come_from_elsewhere(variant: dict[str, Any]) -> None:
    """An image's rows stand between embedded tokens, as `inputs_embeds` in the reference."""
    reference = reference_model(variant, seed=5)
    model = our_model(reference)
    embeds = torch.randn(30, TINY["hidden_size"], generator=torch.Generator().manual_seed(5))
    ours = model.logits(model(embeds, torch.arange(30), SegmentAttention([30])))
    assert_parity("logits", ours, reference(inputs_embeds=embeds[None]).logits[0])


@torch.no_grad()
def test_ids_outside_the_table_read_a_row_that_exists() -> None:
    """Placeholders of NVILA lie behind the table, Ovis' are negative; their rows are replaced afterwards."""
    model = our_model(reference_model(VARIANTS["qwen2 untied"]))
    rows = model.embed(torch.tensor([-300, -1, 5, 210, 211, 151649]))
    assert rows.shape == (6, 48)
    table = model.embed_tokens.weight
    assert torch.equal(rows[2], table[5])
    assert torch.equal(rows[3], table[210])


@torch.no_grad()
def test_a_tied_head_is_the_table_itself() -> None:
    model = our_model(reference_model(VARIANTS["qwen3 tied, biased"]))
    assert model.lm_head is None
    hidden = torch.randn(2, 48, generator=torch.Generator().manual_seed(6))
    torch.testing.assert_close(model.logits(hidden), hidden @ model.embed_tokens.weight.T)
