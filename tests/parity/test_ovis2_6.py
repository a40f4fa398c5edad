"""Ovis2.6 against Ovis2.5's reference with transformers' Qwen3 or Qwen3-MoE in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ovis2_5_checkpoint import write_ovis2_5_checkpoint, write_ovis2_6_checkpoint
from parity_kit import ask, assert_parity, build, greedy, logits, patches_of, picture, spliced
from test_ovis2_5 import OvisPair, clip_of, compare_taps

from siglane.errors import ConfigError
from siglane.families.processor import load_processor
from siglane.families.registry import image_facts, vlm_family
from siglane.verify.references.ovis2_5 import Ovis2_5
from siglane.weights.hub import open_checkpoint

QUESTION = "What is in the image?"


@pytest.fixture(scope="module", params=[False, True], ids=["dense", "experts"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OvisPair:
    folder = tmp_path_factory.mktemp("ovis2_6")
    return build(folder, write_ovis2_6_checkpoint, Ovis2_5, moe=request.param)


@pytest.mark.few("experts-*", "dense-[]", "dense-[(50, 30)]")
@torch.no_grad()
@pytest.mark.parametrize("sizes", [[], [(50, 30)], [(1, 1)], [(17, 400)], [(31, 77), (64, 64)]], ids=str)
def test_the_whole_path(pair: OvisPair, sizes: list[tuple[int, int]]) -> None:
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    patches, seen = patches_of(pair.processor, images), pair.see(images)
    if images:
        compare_taps(pair, patches, seen)
    prompt = ask(pair.processor, patches, QUESTION)
    text = pair.reference.text(QUESTION, seen)
    assert list(prompt.token_ids) == pair.their_ids(text, seen)
    embeds = spliced(pair.model, prompt, patches)
    theirs = pair.reference.language.run(pair.reference.embeds(text, seen), 32)
    assert_parity("logits", logits(pair.model, embeds)[-len(theirs["logits"]) :], theirs["logits"])
    assert greedy(pair.model, embeds, 32) == theirs["tokens"].tolist()


@torch.no_grad()
def test_a_video(pair: OvisPair) -> None:
    frames = [picture(40, 60, seed=seed) for seed in range(3)]
    compare_taps(pair, [clip_of(pair.processor, frames)], pair.see([frames]))


@pytest.mark.parametrize("section", ["text_config", "llm_config"])
def test_both_names_of_the_language_models_section(tmp_path: Path, section: str) -> None:
    write_ovis2_6_checkpoint(tmp_path, section=section)
    found = load_processor(open_checkpoint(tmp_path)).config
    assert (found.family, found.language.hidden_size) == ("ovis2_6", 48)


def test_how_large_a_picture_may_become_has_to_be_stated(tmp_path: Path) -> None:
    write_ovis2_6_checkpoint(tmp_path / "new", bounds_stated=False)
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json: key 'max_pixels' is missing"):
        image_facts(open_checkpoint(tmp_path / "new"))
    write_ovis2_5_checkpoint(tmp_path / "old", bounds_stated=False)
    assert image_facts(open_checkpoint(tmp_path / "old")).preprocess.rule.max_pixels == 1792**2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        ({"architectures": None, "model_type": "ovis2_6"}, "ovis2_6"),
        ({"architectures": ["Ovis2_6_MoeForCausalLM"], "model_type": "ovis"}, "ovis2_6"),
        ({"architectures": ["Ovis2_6_NextForCausalLM"], "model_type": "ovis2_6_next"}, None),
        ({"architectures": ["Ovis2_6_NextForCausalLM"], "model_type": "ovis2_6"}, None),
    ],
)
def test_how_it_announces_itself(tmp_path: Path, keys: dict[str, Any], family: str | None) -> None:
    """A third class has another decoder."""
    write_ovis2_6_checkpoint(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | keys
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    if family is not None:
        assert vlm_family(open_checkpoint(tmp_path)).name == family
        return
    with pytest.raises(ConfigError, match="Ovis2_6_NextForCausalLM"):
        vlm_family(open_checkpoint(tmp_path))
