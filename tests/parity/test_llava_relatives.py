"""R-4B, Bee and VARCO-VISION: what they change in LLaVA-OneVision. The references are transformers' own class, for the
first two with the projector of vLLM's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_onevision_checkpoint import RELATIVES, write_relative
from parity_kit import ask, assert_parity, build, load, patches_of, picture
from safetensors.torch import load_file, save_file
from test_llava_onevision import LlavaPair, check_whole_path

from siglane.errors import ConfigError, UserError, WeightError
from siglane.families.processor import load_processor
from siglane.families.registry import vlm_family
from siglane.llm import LLM
from siglane.types import Grid, Message, SamplingParams, Size
from siglane.verify.references.bee import Bee
from siglane.verify.references.llava_onevision import LlavaOnevision
from siglane.verify.references.r_4b import R4B
from siglane.weights.hub import open_checkpoint

REFERENCES: dict[str, type[LlavaOnevision]] = {"r_4b": R4B, "bee": Bee}
NORMED = pytest.mark.parametrize("name", ["r_4b", "bee"])


def change_config(folder: Path, **keys: Any) -> None:
    """None takes a key out."""
    raw = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.fixture(scope="module", params=RELATIVES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlavaPair:
    return build(
        tmp_path_factory.mktemp("relatives"),
        write_relative,
        REFERENCES.get(request.param, LlavaOnevision),
        name=request.param,
    )


@pytest.mark.few("*-[]", "*-[(130, 70)]", "r_4b-*")
@torch.no_grad()
@pytest.mark.parametrize("sizes", [[], [(130, 70)], [(17, 400)], [(1, 1)], [(50, 171), (60, 60)]], ids=str)
def test_the_whole_path(pair: LlavaPair, sizes: list[tuple[int, int]]) -> None:
    check_whole_path(pair, [picture(*size, seed=seed) for seed, size in enumerate(sizes)])


@pytest.mark.parametrize("name", RELATIVES)
def test_each_is_the_family_that_it_states(tmp_path: Path, name: str) -> None:
    write_relative(tmp_path, name)
    assert vlm_family(open_checkpoint(tmp_path)).name == ("llava_onevision" if name.startswith("varco") else name)


@NORMED
@torch.no_grad()
def test_without_its_norm_every_patch_becomes_the_same_row(tmp_path: Path, name: str) -> None:
    write_relative(tmp_path, name)
    file, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
    (norm,) = [key for key in tensors if key.endswith("pre_norm.weight")]
    save_file(tensors | {norm: torch.zeros_like(tensors[norm])}, file, metadata={"format": "pt"})
    model, processor = load(tmp_path)
    rows = model.vision(patches_of(processor, [picture(60, 60)])).embeds[:16]
    assert_parity("rows", rows, rows[:1].expand(16, -1))


def test_its_norm_has_no_place_in_another_model(tmp_path: Path) -> None:
    write_relative(tmp_path, "r_4b")
    change_config(tmp_path, architectures=["LlavaOnevisionForConditionalGeneration"], model_type="llava_onevision")
    with pytest.raises(WeightError, match=r"tensor \S*multi_modal_projector\.pre_norm\.\w+ "):
        load(tmp_path)


@NORMED
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"image_token_index": None}, "key 'image_token_index' is missing"),
        ({"text_config": {"hidden_size": 48}}, "text_config: key 'model_type' is missing"),
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio 'anyres' is not known"),
    ],
)
def test_what_no_file_states_is_not_guessed(tmp_path: Path, name: str, keys: dict[str, Any], message: str) -> None:
    write_relative(tmp_path, name)
    change_config(tmp_path, **keys)
    with pytest.raises(ConfigError, match=message):
        load_processor(open_checkpoint(tmp_path))


def test_r_4b_is_spoken_to_through_its_own_template_only(tmp_path: Path) -> None:
    write_relative(tmp_path, "r_4b", chat_template=None)
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        load_processor(open_checkpoint(tmp_path))


def test_a_template_decides_whether_it_thinks(tmp_path: Path) -> None:
    write_relative(tmp_path, "r_4b")
    processor = load_processor(open_checkpoint(tmp_path))
    thinking = processor.config.thinking
    assert thinking is not None
    question = [Message("user", ("Why?",))]
    modes = {mode: processor.prompt(question, [], {"thinking_mode": mode}).token_ids for mode in ("long", "short")}
    assert {mode: thinking.start in ids for mode, ids in modes.items()} == {"long": True, "short": False}
    answers = [Message("assistant", (text,)) for text in ("<think>So\n</think>\n\nYes", "Yes")]
    assert len({processor.prompt([*question, one, *question], []).token_ids for one in answers}) == 1


def test_bees_default_template_is_the_published_prompt(tmp_path: Path) -> None:
    written = write_relative(tmp_path, "bee", chat_template=None)
    processor = load_processor(open_checkpoint(tmp_path))
    prompt = ask(processor, patches_of(processor, [picture(60, 60)]), "What is it?")
    start, stop, _ = prompt.spans[0]
    before, after = (written.tokenizer.decode(part) for part in (prompt.token_ids[:start], prompt.token_ids[stop:]))
    assert before == "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert after == "\nWhat is it?<|im_end|><|im_start|>assistant\n<think>\n"


@NORMED
def test_videos_are_refused(tmp_path: Path, name: str) -> None:
    write_relative(tmp_path, name)
    assert load_processor(open_checkpoint(tmp_path)).facts.video is None
    llm = LLM(tmp_path, device="cpu", kv_tokens=4096)
    with pytest.raises(UserError, match="reads images, not videos"):
        llm.generate({"prompt": "What?", "videos": [[picture(60, 60)]]}, SamplingParams(max_tokens=2))


def test_a_tile_of_another_patch_size(tmp_path: Path) -> None:
    """72 pixels hold 4x4 patches of 16; what is left over is never read."""
    write_relative(tmp_path, "varco of patches of 16")
    processor = load_processor(open_checkpoint(tmp_path))
    (layout,) = processor.layouts([Size(130, 70)])
    assert set(layout.grids) == {Grid(4, 4)}
