"""`eager` attention: plain products and a softmax in both towers and in the language model, as transformers' eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F
from causal_lm_checkpoint import write_causal_lm_checkpoint
from checkpoints import write_nvila_checkpoint
from parity_kit import assert_parity, picture
from transformers import AutoModelForCausalLM, AutoProcessor, SiglipModel
from two_tower_checkpoint import write_two_tower_checkpoint

from siglane import LLM, Tagger
from siglane.errors import ConfigError
from siglane.settings.engine import EngineConfig
from siglane.types import SamplingParams

OPTIONS: dict[str, Any] = {"device": "cpu", "kv_tokens": 1024}
GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=3, ignore_eos=True)
KERNELS = ("_scaled_dot_product_flash_attention_for_cpu",)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused attention fails."""

    def fused(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("a fused kernel was called")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    for name in KERNELS:
        monkeypatch.setattr(getattr(torch.ops.aten, name), "default", fused)
    for name in ("attention_by_head", "sdpa"):
        monkeypatch.setattr(f"siglane.nn.attention.{name}", fused)


@torch.no_grad()
def test_both_towers(tmp_path: Path, plain: None) -> None:
    write_two_tower_checkpoint(tmp_path, "siglip2", layers=3)
    reference = SiglipModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tagger = Tagger(tmp_path, device="cpu", attention="eager", cache=tmp_path / "cache")
    images = [picture(60, 60), picture(33, 80, seed=1)]
    pixels = AutoProcessor.from_pretrained(tmp_path, use_fast=False).image_processor(images, return_tensors="pt")
    theirs = F.normalize(reference.vision_model(**pixels).pooler_output, dim=-1)
    assert_parity("images", tagger.embed_images(images), theirs)
    ids = tagger._tokens.ids(["a cat", "two dogs"])
    theirs = F.normalize(reference.text_model(ids).pooler_output, dim=-1)
    assert_parity("texts", tagger.embed_texts(["a cat", "two dogs"]), theirs)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_a_language_model(tmp_path: Path, kind: Any, plain: None) -> None:
    """Two prompts in one step, read in pieces and then decoded side by side, grouped heads."""
    write_causal_lm_checkpoint(tmp_path, kind)
    llm = LLM(tmp_path, attention_backend="eager", max_batch_tokens=16, page_size=4, **OPTIONS)
    found = llm.generate(["Why is the sky blue?", "Name a colour, please."], GREEDY)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for answer in found:
        ids = [*answer.prompt_token_ids, *answer.output_token_ids]
        theirs = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, said in enumerate(answer.logprobs, len(answer.prompt_token_ids) - 1):
            assert said.token_id == int(theirs[place].argmax())
            assert said.logprob == pytest.approx(float(theirs[place].max()), abs=1e-4)


def test_answers_are_those_of_any_backend(tmp_path: Path) -> None:
    write_nvila_checkpoint(tmp_path)
    request = {"prompt": "What is it?", "images": [picture(70, 90)]}
    found = {}
    for backend in ("eager", "auto"):
        (answer,) = LLM(tmp_path, attention_backend=backend, **OPTIONS).generate(request, GREEDY)  # type: ignore[arg-type]
        found[backend] = answer
    assert found["eager"].output_token_ids == found["auto"].output_token_ids
    pairs = zip(found["eager"].logprobs, found["auto"].logprobs, strict=True)
    assert all(one.logprob == pytest.approx(other.logprob, abs=1e-5) for one, other in pairs)


def test_what_eager_means() -> None:
    assert EngineConfig(attention_backend="eager").resolve_paged_backend() == "eager"
    assert EngineConfig(attention_backend="eager", paged_backend="torch").resolve_paged_backend() == "torch"
    assert EngineConfig(paged_backend="eager").resolve_paged_backend() == "eager"
    assert EngineConfig().resolve_paged_backend() == "auto"
    with pytest.raises(ConfigError, match="use auto, torch, eager"):
        EngineConfig(paged_backend="plain")
