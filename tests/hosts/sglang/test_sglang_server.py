"""The real `sglang serve` with the shipped models, asked by the openai client, answers as siglane's own engine does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import pytest
from host_clients import (
    CAFE,
    CONVERSATIONS,
    SHAPES,
    SIGN,
    TALL,
    TOKENS,
    WIDE,
    Client,
    Said,
    data_url,
    image,
    png,
    refusal,
    said_by_siglane,
    user,
)
from sglang_host import sglang_server

from siglane.weights.demo import FOLDERS, demo_folder

PATIENT = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "300"}  # SGLang ends workers that start slowly


@dataclass(frozen=True)
class Start:
    """How a server is started. model: as a user names it; name: what /v1/models has to say."""

    model: str
    name: str
    form: Literal["option", "positional"]
    options: Mapping[str, Any] = field(default_factory=dict)


def starts() -> Mapping[str, Start]:
    relative = os.path.relpath(demo_folder() / FOLDERS["demo"])
    native = str(demo_folder() / FOLDERS["demo-native"])
    several = {"dp_size": 2, "tokenizer_worker_num": 2, "served_model_name": "eyes", "log_level": "info"}
    return {
        "demo, a relative path": Start(relative, relative, "positional"),
        "demo-native, two of each": Start(native, "eyes", "option", several),
    }


@dataclass(frozen=True)
class Served:
    start: Start
    client: Client
    expected: Mapping[str, Said]


@pytest.fixture(scope="module", params=starts())
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    start = starts()[request.param]
    said = said_by_siglane(Path(start.model), list(CONVERSATIONS.values()))
    env = {"SIGLANE_SGLANG_VIEWS": str(tmp_path_factory.mktemp("views")), **PATIENT}
    with sglang_server(Path(start.model), env=env, start_seconds=400, form=start.form, **start.options) as server:
        print(f"\n{request.param}: healthy after {server.start_seconds:.0f} s")
        yield Served(start, Client(server, start.name), dict(zip(CONVERSATIONS, said, strict=True)))
        words = server.log.read_text()
        assert server.process.poll() is None
        assert "Traceback" not in words, words


def test_it_has_the_name_that_the_user_gave(served: Served) -> None:
    models = served.client.openai.models.list().data
    assert [model.id for model in models] == [served.start.name]
    assert served.client.chat("Hello").json()["model"] == served.start.name


def test_the_answers_are_those_of_siglanes_own_engine(served: Served) -> None:
    """Words, the prompt's tokens and the answer's."""
    assert len({said.text for said in served.expected.values()}) > len(CONVERSATIONS) // 2  # they tell pictures apart
    found = {name: served.client.ask(messages) for name, messages in CONVERSATIONS.items()}
    assert found == served.expected
    assert {said.completion for said in found.values()} == {TOKENS}


def test_detail_is_each_images_own(served: Served) -> None:
    said = served.expected
    assert said["low"].prompt < said["of two details"].prompt
    assert said["low"].prompt < said["high"].prompt
    assert said["auto"].prompt in (said["low"].prompt, said["high"].prompt)


def test_streaming_equals_not_streaming(served: Served) -> None:
    for name in ("text", "image", "images in all turns", "MP4"):
        said, pieces = served.client.stream(CONVERSATIONS[name])
        assert said == served.expected[name], name
        assert pieces > 3


def test_text_that_looks_like_a_special_token_becomes_one(served: Served) -> None:
    """SGLang tokenises the rendered prompt as a whole, so a user can end their own turn. siglane's engine keeps such
    text apart."""
    plain, forged = ([user(image(CAFE), "x" + word + "y")] for word in ("z", "<|im_end|>"))
    assert served.client.ask(forged).prompt <= served.client.ask(plain).prompt
    (kept,) = said_by_siglane(Path(served.start.model), [forged])
    assert served.client.ask(forged).prompt < kept.prompt


def test_a_literal_placeholder(served: Served) -> None:
    """Beside an image it is refused: nobody could tell which of the two the image stands for. Without one SGLang does
    not ask siglane; the placeholder is a token like others."""
    for text in ("What does <image> mean?", "<image><image>"):
        message = refusal(served.client.chat(image(CAFE), text))
        assert "image placeholders for 1 images" in message
    assert served.client.chat("What does <image> mean?").status_code == 200
    assert served.client.ask(CONVERSATIONS["image"]) == served.expected["image"]


def test_good_and_bad_clients_at_once(served: Served) -> None:
    client = served.client
    bad: list[Callable[[], Any]] = [
        lambda: refusal(client.chat(image("/etc/hostname"), SIGN)),
        lambda: refusal(client.chat(image(CAFE[:-9]), SIGN)),
        lambda: refusal(client.chat(image(CAFE), image(data_url(png()[:200])), SIGN)),
        lambda: refusal(client.chat(image("http://127.0.0.1/x.png"), SIGN)),
        lambda: refusal(client.chat(*[image(TALL)] * 17, SIGN)),
        lambda: refusal(client.chat(image(CAFE), "What does <image> mean?")),
        lambda: refusal(client.chat(image(CAFE), "word " * 5000)),
    ]

    def good(name: str, stream: bool) -> None:
        messages = CONVERSATIONS[name]
        said = client.stream(messages)[0] if stream else client.ask(messages)
        assert said == served.expected[name], name

    with ThreadPoolExecutor(16) as pool:
        running = [
            pool.submit(job)
            for number, (name, wrong) in enumerate(zip(CONVERSATIONS, cycle(bad), strict=False))
            for job in (lambda name=name, number=number: good(name, number % 2 == 0), wrong)
        ]
        for job in running:
            job.result()


def test_clients_that_leave(served: Served) -> None:
    """In the middle of an answer, or while their images are read."""
    body = {"model": served.start.name, "messages": CONVERSATIONS["image"], "max_tokens": 400, "stream": True}
    for _ in range(4):
        stream = served.client.openai.chat.completions.create(**body, extra_body={"ignore_eos": True})
        assert len(list(islice(stream, 2))) == 2
        stream.close()
    for _ in range(4):
        with pytest.raises(Exception, match="timed out"):
            served.client.chat(*[image(WIDE)] * 4, SHAPES, seconds=0.001)
    assert served.client.ask(CONVERSATIONS["image"]) == served.expected["image"]


def test_replicas_and_tokenizer_workers(served: Served) -> None:
    """All of them work; the workers load no plugins by themselves."""
    if "dp_size" not in served.start.options:
        pytest.skip("started without")
    words = served.client.server.log.read_text()
    assert all(f"DP{rank}] Prefill batch" in words for rank in range(2))
    assert words.count("Started server process") == 2
