"""The real `vllm serve` with a shipped model, asked by the openai client, answers as siglane's own engine does; what a
client names is refused or fetched by siglane, never opened by vLLM."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
from host_clients import (
    CAFE,
    CONVERSATIONS,
    SHAPES,
    SIGN,
    TALL,
    WIDE,
    Client,
    Said,
    data_url,
    image,
    png,
    refusal,
    said_by_siglane,
    user,
    video,
)
from vllm_host import vllm_server

from siglane.weights.demo import FOLDERS, demo_folder

FILE = (demo_folder() / "pictures" / "cafe.png").read_bytes()
NO_SCHEME = "the media URL must start with data:, https://, http:// or file://"
NO_FILE = "not a file below the allowed folder"
PRIVATE = "the media URL leads to a private or reserved address"


@dataclass(frozen=True)
class Served:
    """name: of the model, as the user gave it; folder: files that requests may name."""

    name: str
    client: Client
    expected: Mapping[str, Said]
    folder: Path

    def refused(self, url: str, **fields: Any) -> str:
        return refusal(self.client.chat(image(url, **fields), SIGN))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    name = os.path.relpath(demo_folder() / FOLDERS["demo"])
    folder = tmp_path_factory.mktemp("server")
    (folder / "allowed").mkdir()
    env = {"SIGLANE_VLLM_VIEWS": str(folder / "views"), "SIGLANE_MAX_IMAGES": "8"}
    said = said_by_siglane(Path(name), list(CONVERSATIONS.values()))
    options = {"allowed_local_media_path": str(folder / "allowed"), "trust_request_mm_kwargs": True}
    with vllm_server(name, env=env, max_model_len=None, **options) as server:
        print(f"\nvllm serve: healthy after {server.start_seconds:.0f} s")
        yield Served(name, Client(server, name), dict(zip(CONVERSATIONS, said, strict=True)), folder / "allowed")
        assert server.process.poll() is None


def test_it_has_the_name_that_the_user_gave(served: Served) -> None:
    models = served.client.openai.models.list().data
    assert [model.id for model in models] == [served.name]


def test_the_answers_are_those_of_siglanes_own_engine(served: Served) -> None:
    """Words, the prompt's tokens and the answer's; `detail` is each picture's own."""
    found = {name: served.client.ask(messages) for name, messages in CONVERSATIONS.items()}
    assert found == served.expected
    assert found["low"].prompt < found["of two details"].prompt
    assert found["low"].prompt < found["high"].prompt


def test_streaming_equals_not_streaming(served: Served) -> None:
    for name in ("text", "image", "images in all turns", "MP4"):
        said, pieces = served.client.stream(CONVERSATIONS[name])
        assert said == served.expected[name], name
        assert pieces > 3


def test_a_literal_placeholder(served: Served) -> None:
    """Beside an image it is refused: nobody could tell which of the two the image stands for. Without one vLLM does not
    ask siglane; the placeholder is a token like others."""
    for text in ("What does <image> mean?", "<image><image>"):
        assert "image placeholders for 1 images" in refusal(served.client.chat(image(CAFE), text))
    assert served.client.chat("What does <image> mean?").status_code == 200


def test_paths_and_files(served: Served, tmp_path: Path) -> None:
    inside, outside = served.folder / "cafe.png", tmp_path / "cafe.png"
    inside.write_bytes(FILE)
    outside.write_bytes(FILE)
    for path in ("/etc/hostname", str(inside), "cafe.png"):
        assert served.refused(path) == f"image[0]: {NO_SCHEME}"
    assert refusal(served.client.chat(video("/etc/hostname"), SIGN)) == f"video[0]: {NO_SCHEME}"
    (served.folder / "link.png").symlink_to(outside)
    for url in (outside.as_uri(), "file:///etc/hostname", f"{served.folder.as_uri()}/link.png"):
        assert served.refused(url) == f"image[0]: {NO_FILE}"
    assert served.client.chat(image(inside.as_uri()), SIGN).json()["choices"][0]["message"]["content"] == "CAFE"


def test_addresses_and_broken_files(served: Served) -> None:
    assert served.refused("http://127.0.0.1:1/x.png") == f"image[0]: {PRIVATE}"
    assert served.refused("http://[::1]/x.png") == f"image[0]: {PRIVATE}"
    assert served.refused("ftp://a.b/c.png") == f"image[0]: {NO_SCHEME}"
    assert "not an image" in served.refused(data_url(b"no picture at all"))
    cut = refusal(served.client.chat(image(CAFE), image(data_url(png()[:200])), SIGN))
    assert cut == "image[1]: the image cannot be decoded: its data are damaged or incomplete"
    assert "At most 8 image(s)" in refusal(served.client.chat(*[image(TALL)] * 9, SIGN))


def test_budgets_of_a_request(served: Served) -> None:
    """For all its pictures by `mm_processor_kwargs`, for one beside its URL; what is not known is refused by name."""

    def tokens(**fields: Any) -> int:
        body = {"model": served.name, "messages": CONVERSATIONS["auto"], "max_tokens": 1, **fields}
        response = served.client.post("/v1/chat/completions", body)
        assert response.status_code == 200, response.text
        return int(response.json()["usage"]["prompt_tokens"])

    low, auto, high = (served.expected[name].prompt for name in ("low", "auto", "high"))
    assert tokens() == tokens(mm_processor_kwargs={}) == auto
    assert tokens(mm_processor_kwargs={"detail": "low"}) == low < high
    assert low < tokens(mm_processor_kwargs={"max_tiles": 1}) <= high
    for fields, named in (
        ({"mm_processor_kwargs": {"max_pixels": 1000}}, "max_pixels does not apply to this model"),
        ({"mm_processor_kwargs": {"do_resize": False}}, "mm_processor_kwargs: key 'do_resize' is not known"),
        ({"media_io_kwargs": {"image": {"image_mode": "L"}}}, "key 'image_mode' is not known"),
    ):
        body = {"model": served.name, "messages": CONVERSATIONS["auto"], "max_tokens": 1, **fields}
        assert named in refusal(served.client.post("/v1/chat/completions", body))
    assert served.client.chat(image(WIDE, detail="tiny"), SIGN).status_code == 400  # by vLLM's own schema


def test_64_requests_at_once(served: Served) -> None:
    """Good ones are answered as alone, broken ones refused; the engine lives on."""
    client = served.client
    bad: list[Callable[[], Any]] = [
        lambda: refusal(client.chat(image("/etc/hostname"), SIGN)),
        lambda: refusal(client.chat(image(CAFE[:-9]), SIGN)),
        lambda: refusal(client.chat(image(CAFE), image(data_url(png()[:200])), SIGN)),
        lambda: refusal(client.chat(image("http://127.0.0.1/x.png"), SIGN)),
        lambda: refusal(client.chat(image(CAFE), "What does <image> mean?")),
        lambda: refusal(client.chat(image(CAFE), "word " * 3000)),
    ]

    def good(name: str, stream: bool) -> None:
        messages = CONVERSATIONS[name]
        said = client.stream(messages)[0] if stream else client.ask(messages)
        assert said == served.expected[name], name

    jobs = [
        job
        for number, (name, wrong) in enumerate(islice(zip(cycle(CONVERSATIONS), cycle(bad), strict=False), 32))
        for job in (lambda name=name, number=number: good(name, number % 2 == 0), wrong)
    ]
    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(job) for job in random.Random(0).sample(jobs, len(jobs))]:
            done.result()


def test_clients_that_leave(served: Served) -> None:
    body = {"model": served.name, "messages": CONVERSATIONS["image"], "max_tokens": 400, "stream": True}
    for _ in range(4):
        stream = served.client.openai.chat.completions.create(**body, extra_body={"ignore_eos": True})
        assert len(list(islice(stream, 2))) == 2
        stream.close()
    assert served.client.ask(CONVERSATIONS["image"]) == served.expected["image"]


def test_text_that_no_template_wrote(served: Served) -> None:
    """The completions route takes text alone."""
    body = {"model": served.name, "prompt": "The sign says", "max_tokens": 4, "temperature": 0}
    assert served.client.post("/v1/completions", body).status_code == 200
    assert served.client.chat(user(SHAPES)["content"][0]["text"]).status_code == 200
