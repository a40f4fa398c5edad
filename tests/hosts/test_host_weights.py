"""What SGLang's language model and siglane's tower get of one pass over the files: heads, adapters, wrappers' names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_kit import train
from checkpoints import write_nvila_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint
from safetensors.torch import load_file, save_file

from siglane.errors import OtherWeights
from siglane.families.model import check_model, load_model, model_tensors
from siglane.families.processor import load_processor
from siglane.families.registry import vlm_family
from siglane.families.stack import VisionStack
from siglane.hosts.config import SiglaneConfig
from siglane.hosts.sglang.view import view_of
from siglane.hosts.view import write_view
from siglane.hosts.weights import known_tensors, language_tensors
from siglane.lm.qwen import qwen_plan
from siglane.nn.plan import Destination
from siglane.weights.demo import open_model
from siglane.weights.hub import Checkpoint
from siglane.weights.load import StrictLoad

State = dict[str, torch.Tensor]
HEAD, TABLE = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def change(file: Path, edit: Callable[[State], State]) -> None:
    save_file({name: one.contiguous().clone() for name, one in edit(load_file(file)).items()}, file)


def streamed(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor]]:
    """As SGLang reads a view: the files' own names."""
    for file in dict.fromkeys(tensor.file for tensor in model_tensors(checkpoint)):
        yield from load_file(file).items()


def host(checkpoint: Checkpoint, stream: Any = None, *, whole: bool = True) -> tuple[VisionStack, State]:
    """The tower as siglane fills it, and what SGLang's language model is given."""
    family = vlm_family(checkpoint)
    weights = check_model(checkpoint, load_processor(checkpoint).config)
    images = weights.config.images
    assert images is not None
    stack = VisionStack(images)
    load = StrictLoad(family.vision_plan(images), stack)
    named = known_tensors(streamed(checkpoint) if stream is None else stream, checkpoint, weights, whole=whole)
    names = {tensor.name: tensor.name for tensor in weights.tensors}
    return stack, dict(language_tensors(named, names, load, family, weights.config, whole=whole))


def compare(checkpoint: Checkpoint) -> State:
    """A host's modules against siglane's own; returns what the language model got."""
    stack, language = host(checkpoint)
    model = load_model(checkpoint, load_processor(checkpoint).config, device="cpu", dtype=torch.float32)
    assert model.vision is not None
    ours = model.vision.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in stack.state_dict().items())
    again, plan = type(model.language)(model.config.language), qwen_plan(model.config.language)
    with StrictLoad(plan, again) as load:
        for name, tensor in language.items():
            load.take(name, tensor)
    assert not load.ignored
    ours = model.language.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in again.state_dict().items())
    return language


LAYOUTS = {
    "folders": partial(write_nvila_checkpoint, tied=True),
    "hub": write_llava_onevision_checkpoint,
    "untied": partial(write_llava_onevision_checkpoint, tied=False, names="memory"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_as_it_is(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path)
    assert ("lm_head.weight" in compare(Checkpoint(tmp_path))) == (layout == "untied")


def test_a_head_of_its_own(tmp_path: Path) -> None:
    write_llava_onevision_checkpoint(tmp_path)
    change(tmp_path / "model.safetensors", lambda state: state | {HEAD: state[TABLE].flip(0)})
    assert "lm_head.weight" in compare(Checkpoint(tmp_path))
    view = write_view(Checkpoint(tmp_path), tmp_path / "views")
    config = SiglaneConfig.from_pretrained(view)
    assert not config.tie_word_embeddings
    assert not config.text_config.tie_word_embeddings


def test_names_with_a_wrapper(tmp_path: Path) -> None:
    write_llava_onevision_checkpoint(tmp_path)
    change(tmp_path / "model.safetensors", lambda state: {f"module.{name}": one for name, one in state.items()})
    compare(Checkpoint(tmp_path))


class TestAnAdapter:
    CASES = (
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector", "lm_head"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
    )

    @pytest.mark.few("case0-True", "case1-False", "case2-True")
    @pytest.mark.parametrize("head_stored", [True, False])
    @pytest.mark.parametrize("case", CASES)
    def test_is_merged_while_sglang_reads(self, case: dict[str, Any], head_stored: bool, tmp_path: Path) -> None:
        written = write_llava_onevision_checkpoint(tmp_path / "base", head_stored=head_stored)
        train(written.model, tmp_path / "adapter", **case)
        parted = "lm_head" in str(case)
        checkpoint = open_model(tmp_path / "base", adapter=tmp_path / "adapter")
        assert ("lm_head.weight" in compare(checkpoint)) == parted
        config = SiglaneConfig.from_pretrained(write_view(checkpoint, tmp_path / "views"))
        assert config.text_config.tie_word_embeddings != parted
        assert config.files() == Checkpoint(checkpoint.root.resolve(), (tmp_path / "adapter").resolve())

    def test_alone_has_a_view_of_its_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written = write_llava_onevision_checkpoint(tmp_path / "base")
        train(written.model, tmp_path / "adapter", target_modules=["q_proj"])
        config = tmp_path / "adapter/adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "../base"}))
        monkeypatch.setenv("SIGLANE_SGLANG_VIEWS", str(tmp_path / "views"))
        views = [view_of(str(tmp_path / name)) for name in ("base", "adapter")]
        assert None not in views
        assert views[0] != views[1]
        assert views[1] is not None
        assert SiglaneConfig.from_pretrained(views[1]).files().adapter == (tmp_path / "adapter").resolve()

    def test_stays_when_weights_are_updated(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        written = write_llava_onevision_checkpoint(tmp_path / "base")
        train(written.model, tmp_path / "adapter", target_modules=["q_proj"])
        checkpoint = open_model(tmp_path / "base", adapter=tmp_path / "adapter")
        _, first = host(checkpoint)
        _, again = host(checkpoint, whole=False)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[name], first[name]) for name in first)
        assert "is merged into the new weights too" in caplog.messages[-1]


def test_an_update_that_parts_head_and_table_is_refused(tmp_path: Path) -> None:
    """The host's model has one table; the head would be lost without a word."""
    write_llava_onevision_checkpoint(tmp_path)
    table = load_file(tmp_path / "model.safetensors")[TABLE]
    checkpoint = Checkpoint(tmp_path)
    _, language = host(checkpoint, [(TABLE, table), (HEAD, table)], whole=False)
    assert language.keys() == {"model.embed_tokens.weight"}
    with pytest.raises(OtherWeights, match=r"lm_head\.weight differs from the one that it is tied to"):
        host(checkpoint, [(TABLE, table), (HEAD, table.flip(0))], whole=False)


def test_the_plan_of_a_tied_model_knows_both_names(tmp_path: Path) -> None:
    write_llava_onevision_checkpoint(tmp_path)
    config = load_processor(Checkpoint(tmp_path)).config
    plan = vlm_family(Checkpoint(tmp_path)).language_plan(config.language)
    assert plan.find(HEAD) == plan.find(TABLE) == Destination("embed_tokens.weight", "")
