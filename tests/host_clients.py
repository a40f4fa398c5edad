"""What clients of a host's server send, and what siglane's own engine answers to the same messages."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from clips import animation
from clips import video as clip
from host_process import RunningServer
from openai import OpenAI
from parity_kit import picture
from PIL import Image

from siglane.llm import LLM, Generation
from siglane.types import SamplingParams
from siglane.weights.demo import demo_folder

Messages = list[dict[str, Any]]

SECONDS = 120.0  # for one answer, with everybody else on the same two cores
TOKENS = 16
# what no answer may ever hold: addresses in memory, paths, tracebacks, media
LEAKS = re.compile(r"0x[0-9a-f]{6,}|/(etc|home|tmp|work|usr|root|proc)\b|Traceback|BytesIO|[A-Za-z0-9+/]{120,}")


def image(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def video(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url, **fields}}


def user(*content: Any) -> dict[str, Any]:
    """A user's turn. content: texts, and parts of other kinds."""
    return {
        "role": "user",
        "content": [{"type": "text", "text": one} if isinstance(one, str) else one for one in content],
    }


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int = 60, height: int = 40, seed: int = 0) -> bytes:
    return encoded(picture(width, height, seed))


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


CAFE, HELLO = (data_url((demo_folder() / "pictures" / name).read_bytes()) for name in ("cafe.png", "hello.png"))
WIDE, TALL = data_url(png(300, 120, seed=1)), data_url(png(50, 140, seed=2))
SIGN, SHAPES = "What does the sign say?", "What is in the picture?"
CONVERSATIONS: Mapping[str, Messages] = {
    "text": [user("How many yellow shapes do you see?")],
    "text alone": [{"role": "user", "content": SHAPES}],
    "image": [user(image(CAFE), SIGN)],
    "image last": [user(SIGN, image(CAFE))],
    "another image": [user(image(HELLO), SHAPES)],
    "several": [user("First ", image(WIDE), " then ", image(TALL), SHAPES, image(CAFE), "?")],
    "two with nothing between": [user(image(CAFE), image(HELLO), SIGN)],
    "no words": [user(image(TALL))],
    "system": [{"role": "system", "content": "Name one colour."}, user(image(HELLO), SHAPES)],
    "turns": [user(image(CAFE), SIGN), {"role": "assistant", "content": "CAFE"}, user("And how many shapes?")],
    "images in all turns": [
        {"role": "system", "content": "Be brief."},
        user(image(CAFE), SIGN),
        {"role": "assistant", "content": "CAFE"},
        user(SHAPES, image(HELLO)),
        {"role": "assistant", "content": [{"type": "text", "text": "a star"}]},
        user("Which is left of the other?"),
    ],
    "low": [user(image(WIDE, detail="low"), SHAPES)],
    "high": [user(image(WIDE, detail="high"), SHAPES)],
    "auto": [user(image(WIDE, detail="auto"), SHAPES)],
    "of two details": [user(image(WIDE, detail="low"), image(TALL), SHAPES)],
    "GIF": [user(video(data_url(animation(3), "image/gif")), "What happens?")],
    "MP4": [user("Tell me: ", video(data_url(clip(4), "video/mp4")))],
}


@dataclass(frozen=True, slots=True)
class Said:
    """An answer. text: special tokens in it; prompt, completion: tokens, as its usage says."""

    text: str
    prompt: int
    completion: int


@dataclass(frozen=True, slots=True)
class Client:
    """Talks to one server about one model."""

    server: RunningServer
    model: str

    @property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.server.base_url}/v1", api_key="none", max_retries=0, timeout=SECONDS)

    def ask(self, messages: Messages, tokens: int = TOKENS, **fields: Any) -> Said:
        """A greedy answer of exactly so many tokens."""
        answer: Any = self.openai.chat.completions.create(**self._request(messages, tokens), **fields)
        (choice,) = answer.choices
        return Said(choice.message.content, answer.usage.prompt_tokens, answer.usage.completion_tokens)

    def stream(self, messages: Messages, tokens: int = TOKENS) -> tuple[Said, int]:
        """The same in pieces, and how many pieces held text."""
        stream = self.openai.chat.completions.create(
            **self._request(messages, tokens), stream=True, stream_options={"include_usage": True}
        )
        pieces, usage = [], None
        for chunk in stream:
            pieces += [choice.delta.content for choice in chunk.choices if choice.delta.content]
            usage = chunk.usage or usage
        assert usage is not None
        return Said("".join(pieces), usage.prompt_tokens, usage.completion_tokens), len(pieces)

    def post(self, path: str, body: Any, seconds: float = SECONDS) -> httpx2.Response:
        with httpx2.Client(base_url=self.server.base_url, timeout=seconds, trust_env=False) as client:
            return client.post(path, json=body)

    def chat(self, *content: Any, seconds: float = SECONDS) -> httpx2.Response:
        body = {"model": self.model, "messages": [user(*content)], "max_tokens": 4, "temperature": 0}
        return self.post("/v1/chat/completions", body, seconds)

    def generate(self, text: str, **fields: Any) -> httpx2.Response:
        """SGLang's native route."""
        return self.post(
            "/generate", {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": 4}, **fields}
        )

    def _request(self, messages: Messages, tokens: int) -> dict[str, Any]:
        extra = {"ignore_eos": True, "skip_special_tokens": False}
        return {"model": self.model, "messages": messages, "max_tokens": tokens, "temperature": 0, "extra_body": extra}


def refusal(response: httpx2.Response, status: int = 400) -> str:
    """The message of a refused request: one line that gives nothing away."""
    assert response.status_code == status, response.text[:500]
    body = json.loads(response.text)
    message: str = body.get("error", body)["message"]
    assert 0 < len(message) < 300
    assert "\n" not in message
    assert not LEAKS.search(response.text), response.text
    return message


def said_by_siglane(model: Path, conversations: Sequence[Messages], tokens: int = TOKENS) -> list[Said]:
    """The greedy answers of siglane's own engine."""
    llm = LLM(model, device="cpu", dtype="float32", kv_tokens=16384)
    answers = llm.chat(list(conversations), SamplingParams(max_tokens=tokens, ignore_eos=True))
    return [_said(llm, answer) for answer in answers]


def _said(llm: LLM, answer: Generation) -> Said:
    text: str = llm.processor.tokenizer.decode(answer.output_token_ids, skip_special_tokens=False)
    return Said(text, answer.usage.prompt_tokens, answer.usage.completion_tokens)
