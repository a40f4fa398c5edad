"""Decisions of every family are the softmax over what whole forwards say of each label's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from causal_lm_checkpoint import write_causal_lm_checkpoint
from checkpoints import write_nvila_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint
from parity_kit import noise

from siglane import LLM, Decision, EngineError, Question, UserError
from siglane.families.model import VisionLanguageModel, load_model
from siglane.families.prompt.questions import asked_behind
from siglane.training.forward import IGNORED, Example, answer_loss
from siglane.types import DecodedImage, ImagePart, Message
from siglane.weights.hub import open_checkpoint

WRITERS: dict[str, tuple[Callable[..., Any], bool]] = {
    "nvila": (write_nvila_checkpoint, True),
    "llava_onevision": (write_llava_onevision_checkpoint, True),
    "ovis2_5": (write_ovis2_5_checkpoint, True),
    "nanovlm": (write_nanovlm_checkpoint, True),
    "llama": (lambda folder: write_causal_lm_checkpoint(folder, "llama"), False),
}
QUESTIONS = [
    Question.yes_no("It is a photograph."),
    Question.choice("What is it?", {"a cat": "", "a dog": "barks", "neither": ""}),
    Question.choice("Which of many?", {f"number {number}": "" for number in range(40)}),
    Question.score("How bright is it?", ["dark", "dim", "bright"]),
    Question("What is in the picture?", ("a red square", "a red circle", "a", "a sign that says HELLO", "<|im_end|>")),
]
PICTURES = [noise(1, (70, 50)), noise(2, (40, 90))]


@dataclass
class Family:
    llm: LLM
    model: VisionLanguageModel
    sees: bool

    @torch.inference_mode()
    def whole(self, question: Question) -> list[float]:
        """The log-probability of each label, prompt and label computed together."""
        processor = self.llm.processor
        media = [DecodedImage.from_rgb(np.asarray(one)) for one in PICTURES] if self.sees else []
        layouts = processor.layouts([one.size for one in media])
        patches = [processor.patches(*one) for one in zip(media, layouts, strict=True)]
        about = (Message("user", (*map(ImagePart, range(len(media))), "Look.")),)
        closed = {"enable_thinking": False} if processor.config.thinking else {}
        prompt = processor.prompt(asked_behind(about, question), layouts, closed)
        labels = [processor.text_ids(label) for label in question.labels]
        told = answer_loss(self.model, [Example(prompt, ids, prompt.in_order(patches)) for ids in labels], logits=True)
        assert told.logits is not None
        places = (told.targets != IGNORED).nonzero()[:, 0]
        each = told.logits[places].log_softmax(-1).gather(1, told.targets[places, None])[:, 0]
        return [float(one.sum()) for one in each.split([len(ids) for ids in labels])]


@pytest.fixture(scope="module", params=WRITERS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    write, sees = WRITERS[request.param]
    folder = tmp_path_factory.mktemp("family") / str(request.param)
    write(folder)
    llm = LLM(folder, device="cpu", kv_tokens=16384)
    config = llm.processor.config
    return Family(llm, load_model(open_checkpoint(folder), config, device="cpu", dtype=torch.float32), sees)


@pytest.mark.few("nvila", "ovis2_5", "llama")
def test_probabilities_of_labels(family: Family) -> None:
    about: Any = {"prompt": "Look.", "images": PICTURES} if family.sees else "Look."
    decisions = family.llm.decide(about, QUESTIONS)
    for question, decision in zip(QUESTIONS, decisions, strict=True):
        expected = family.whole(question)
        assert decision.logprobs == pytest.approx(expected, abs=1e-4)
        powers = [math.exp(one - max(expected)) for one in expected]
        shares = [power / math.fsum(powers) for power in powers]
        assert list(decision.probabilities.values()) == pytest.approx(shares, abs=1e-5)
        assert decision.names == question.meanings
    if family.sees:  # a text of a few tokens fills no page
        first, *others = (one.cached_tokens for one in decisions)  # others have asked this engine without pictures
        assert all(one > first for one in others)


def test_what_cannot_be_decided(family: Family) -> None:
    llm = family.llm

    def refused(*labels: str) -> str:
        with pytest.raises(UserError) as error:
            llm.decide("Look.", [QUESTIONS[0], Question("Which?", labels)])
        assert error.value.param == "questions[1]"
        return str(error.value)

    assert "empty" in refused("a", "")
    assert "same" in refused("a", "b", "a")
    assert "labels" in refused()
    assert "labels" in refused(*map(str, range(256)))
    assert "64 tokens" in refused("word " * 200)
    if llm.processor.config.thinking is not None:
        with pytest.raises(UserError, match="thinking"):
            llm.decide("Look.", QUESTIONS[:1], chat_template_kwargs={"enable_thinking": True})
    again = llm.decide("Look.", QUESTIONS)
    assert [isinstance(one, Decision) for one in again] == [True] * len(QUESTIONS)


def test_a_question_that_fails_leaves_the_engine_empty(family: Family) -> None:
    llm = family.llm
    engine = llm._engine
    forward = engine.runner.forward
    engine.runner.forward = lambda batch: 1 / 0  # type: ignore[assignment, method-assign]
    with pytest.raises(EngineError):
        llm.decide("Look at this.", QUESTIONS)
    engine.runner.forward = forward  # type: ignore[method-assign]
    assert not engine.has_work
    assert llm.decide("Look at this.", QUESTIONS[:1])[0].mass > 0
