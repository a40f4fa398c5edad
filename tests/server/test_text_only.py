"""A model without eyes behind the server: texts are answered, images are refused and harm nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from causal_lm_checkpoint import write_causal_lm_checkpoint
from serving import RunningServer, assert_error, chat, image_part, picture, running, stream, video_part

from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import load_processor
from siglane.llm import LLM
from siglane.settings.engine import EngineConfig
from siglane.types import Question, SamplingParams
from siglane.weights.hub import open_checkpoint

QUESTION, TOKENS = "Why is the sky blue?", 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_causal_lm_checkpoint(tmp_path_factory.mktemp("text") / "llama", "llama", tied=True).folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    process = EngineProcess(EngineSpec(str(folder), EngineConfig(device="cpu", threads=1, kv_tokens=4096)))
    process.start()
    with running(load_processor(open_checkpoint(folder)), process) as one:
        yield one
    process.close()


def test_a_text_is_answered_and_an_image_beside_it_refused(server: RunningServer, folder: Path) -> None:
    llm = LLM(folder, device="cpu", kv_tokens=4096)
    (expected,) = llm.generate(QUESTION, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    refused: list[Any] = []

    def misbehave() -> None:
        if not refused:
            refused.append(server.post(chat("Look", image_part(picture()))))

    told = stream(server, chat(QUESTION, max_tokens=TOKENS, ignore_eos=True), misbehave)
    assert told.text == expected.text
    assert told.usage["completion_tokens"] == TOKENS
    assert_error(refused[0], 400, "images_unsupported", "messages[0].content[1]")


@pytest.mark.parametrize(
    "part",
    [
        image_part(picture(), max_tiles=1),
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/never-fetched.png"}},
        video_part(b"no video"),
    ],
    ids=["limited", "remote", "video"],
)
def test_every_image_is_refused_by_its_place(server: RunningServer, part: dict[str, Any]) -> None:
    assert_error(server.post(chat(part, "What?")), 400, "images_unsupported", "messages[0].content[0]")


def test_parts_of_text_are_one_text(server: RunningServer) -> None:
    whole, parts = (server.post(chat(*texts)).json() for texts in (("a tower",), ("a ", "tower")))
    assert whole["choices"][0]["message"] == parts["choices"][0]["message"]


def test_a_text_is_continued_and_questions_about_it_are_decided(server: RunningServer, folder: Path) -> None:
    found = server.post_to(
        "/v1/completions", prompt=QUESTION, max_tokens=4, temperature=0, echo=True, logprobs=0
    ).json()
    (choice,) = found["choices"]
    ids = load_processor(open_checkpoint(folder)).tokenizer(QUESTION).input_ids
    assert len(choice["logprobs"]["tokens"]) == len(ids) + found["usage"]["completion_tokens"]
    assert choice["text"].startswith(QUESTION)
    asked = Question.yes_no("The sky is blue.")
    body = {"input": QUESTION, "questions": [{"id": "a", "type": "yes_no", "question": "The sky is blue."}]}
    (expected,) = LLM(folder, device="cpu", kv_tokens=4096).decide(QUESTION, [asked])
    answer = server.post_to("/v1/decisions", **body).json()["answers"]["a"]
    assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    refused = server.post_to("/v1/decisions", **body, images=["data:image/png;base64,AAAA"])
    assert_error(refused, 400, "images_unsupported", "images[0]")
