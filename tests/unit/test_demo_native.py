"""The shipped native-resolution model: more patches read smaller print."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from recipes.demo.native import PRINT_SCALES
from recipes.demo.scenes import WORDS, draw, random_scene
from siglane import LLM, Question, SamplingParams
from siglane.types import Size
from siglane.weights.demo import demo_folder

FEW, MANY = 96 * 96, 384 * 384


@pytest.fixture(scope="module")
def model() -> LLM:
    return LLM("demo-native")


def read(model: LLM, budget: int) -> float:
    rng = np.random.default_rng(5)
    words = [str(word) for word in rng.choice(WORDS, 12, replace=False)]
    prompts = [
        {
            "prompt": "What does the sign say?",
            "images": [
                {"image": draw(random_scene(rng, word, Size(384, 384), PRINT_SCALES[-1])), "max_pixels": budget}
            ],
        }
        for word in words
    ]
    answers = model.generate(prompts, SamplingParams(max_tokens=16), errors="raise")
    return sum(answer.text == word for answer, word in zip(answers, words, strict=True)) / len(words)


def test_it_reads_small_print_from_many_patches_and_not_from_few(model: LLM) -> None:
    assert read(model, MANY) >= read(model, FEW) + 0.5


def test_it_names_what_is_in_the_picture(model: LLM) -> None:
    picture = Path(demo_folder() / "pictures" / "cafe.png")
    (answer,) = model.generate(
        [{"prompt": "What is in the picture?", "images": [picture]}], SamplingParams(max_tokens=32)
    )
    assert answer.text == "a green triangle, a red circle, a blue square and a sign"


def test_it_decides_what_it_would_say(model: LLM) -> None:
    picture = demo_folder() / "pictures" / "cafe.png"
    questions = [
        Question("What does the sign say?", ("HELLO", "CAFE", "STOP")),
        Question("What is in the picture?", ("a green triangle, a red circle", "a green triangle, a blue circle")),
    ]
    word, shapes = model.decide({"prompt": "", "images": [picture]}, questions)
    assert (word.choice, shapes.choice) == ("CAFE", questions[1].labels[0])
    assert word.probabilities["CAFE"] > 0.9
    assert 0.5 < word.mass <= 1


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in (demo_folder() / "native").iterdir()) <= 12_000_000
