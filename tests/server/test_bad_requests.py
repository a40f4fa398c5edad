"""Requests that must be refused, each with its own status and code and without a leak; docs/faults.md has others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from openai import APIStatusError, BadRequestError, NotFoundError
from serving import (
    CHAT,
    LEAKS,
    RunningServer,
    Told,
    assert_error,
    assert_unharmed,
    chat,
    image_part,
    picture,
    running,
)

from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor


def test_the_first_bad_image_is_named(server: RunningServer) -> None:
    good, bad = image_part(picture()), image_part(b"bad")
    body = chat(good, "text", bad, good, image_part(b""))
    assert_error(server.post(body), 400, "image_decode_failed", "messages[0].content[2]")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}, *body["messages"]]
    assert_error(server.post({**body, "messages": messages}), 400, "image_decode_failed", "messages[2].content[2]")


LONG = "iVBORw0KGgo" * 5000  # a picture that stands in the wrong field
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
AT_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "detail": (CHAT, chat({"type": "image_url", "image_url": {"url": "data:,", "detail": LONG}})),
    "role": (CHAT, chat(messages=[{"role": LONG, "content": "x"}])),
    "model": (CHAT, chat("x", model=LONG)),
    "tool choice": (CHAT, chat("x", tools=[TOOL], tool_choice={"type": "function", "function": {"name": LONG}})),
    "schema": (CHAT, chat("x", response_format={"type": "json_schema", "json_schema": {"schema": {"type": LONG}}})),
    "max_tokens": (CHAT, chat("x", max_tokens=1e300)),
    "token": ("/detokenize", {"tokens": [1e300]}),
    "prompt": ("/v1/completions", {"prompt": [1e300]}),
    "label": ("/v1/score", {"query": "x", "items": ["y"], "label_token_ids": [1e300, 1]}),
    "input": ("/v1/decisions", {"input": "x", "questions": [{"id": LONG, "type": LONG, "question": "x"}]}),
    "messages": ("/v1/messages", {"max_tokens": 1e300, "messages": [{"role": "user", "content": "x"}]}),
    "responses": ("/v1/responses", {"input": [{"role": LONG, "content": "x"}]}),
}


@pytest.mark.parametrize("name", AT_LENGTH)
def test_what_a_client_sends_at_length_is_not_sent_back(server: RunningServer, name: str) -> None:
    path, body = AT_LENGTH[name]
    answer = server.post_to(path, **body)
    assert answer.status_code in (400, 404)
    message = answer.json()["error"]["message"]
    assert 0 < len(message) < 500
    assert not LEAKS.search(answer.text)


def test_images_of_one_request_share_its_pixels(processor: Processor, engine: EngineProcess) -> None:
    """Each image alone would be accepted."""
    with running(processor, engine, max_image_pixels=10_000) as server:
        part = image_part(picture(90, 60))
        assert server.post(chat(part)).status_code == 200
        assert_error(server.post(chat(part, part)), 400, "image_too_large", "messages[0].content[1]")


def fields(**more: Any) -> dict[str, Any]:
    return chat("hello", **more)


def messages(*found: Any) -> dict[str, Any]:
    return {**chat(), "messages": list(found)}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


CALL = {"name": "weather", "arguments": '{"city": "Bern"}'}

BAD_BODIES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "tools": (fields(tools=[{"type": "function", "function": {"name": "f"}}]), "unsupported_field", "tools"),
    "tool choice": (fields(tool_choice="required"), "invalid_value", "tool_choice"),
    "json": (fields(response_format={"type": "json"}), "invalid_value", "response_format.type"),
    "regex": (fields(regex="a("), "invalid_regex", "regex"),
    "best_of": (fields(best_of=2), "unsupported_field", "best_of"),
    "beams": (fields(use_beam_search=True), "unsupported_field", "use_beam_search"),
    "echo": (fields(echo=True), "unsupported_field", "echo"),
    "tool calls": (
        messages({"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": CALL}]}),
        "unsupported_field",
        "messages[0].tool_calls",
    ),
    "tool calls without a function": (
        messages({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}),
        "missing_field",
        "messages[0].tool_calls[0].function",
    ),
    "tool calls of another type": (
        messages({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "f", "input": "x"}}]}),
        "invalid_value",
        "messages[0].tool_calls[0].type",
    ),
    "function call": (
        messages({"role": "assistant", "content": None, "function_call": CALL}),
        "unsupported_field",
        "messages[0].tool_calls",
    ),
    "audio of an earlier answer": (
        messages({"role": "assistant", "content": None, "audio": {"id": "1"}}),
        "unsupported_field",
        "messages[0].audio",
    ),
    "refusal of a user": (
        messages(user([{"type": "refusal", "refusal": "no"}])),
        "unsupported_content_type",
        "messages[0].content[0]",
    ),
    "stream options": (fields(stream_options={"include_usage": True}), "invalid_value", "stream_options"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_refused_by_name(server: RunningServer, name: str) -> None:
    body, code, param = BAD_BODIES[name]
    assert_error(server.post(body), 400, code, param)


def test_values_that_ask_for_nothing_are_accepted(server: RunningServer) -> None:
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "best_of": 1, "echo": False}
    nothing |= {"functions": None, "modalities": ["text"], "use_beam_search": False, "chat_template": None}
    response = server.post(chat("x", **nothing, n=None, stop=None, logit_bias=None, seed=None, top_k=-1))
    assert response.status_code == 200, response.text
    assert "x-siglane-ignored-fields" not in response.headers


def test_unknown_paths_and_methods(server: RunningServer) -> None:
    with server.http() as client:
        assert_error(client.get("/v1/embeddings"), 404, "not_found")
        assert_error(client.get("/v1/models/"), 404)
        assert_error(client.get("/health/"), 404, "not_found")
        assert_error(client.post("/health"), 405, "method_not_allowed")
        assert_error(client.get("/v1/chat/completions"), 405, "method_not_allowed")
        assert_error(client.post("/v1/chat/completions/", json=chat("x")), 404, "not_found")


def test_exactly_full_is_accepted_and_one_more_is_not(server: RunningServer, processor: Processor) -> None:
    prompt = server.post(chat("x", max_tokens=1)).json()["usage"]["prompt_tokens"]
    room = processor.context_length - prompt
    assert_error(server.post(chat("x", max_tokens=room + 1)), 400, "context_length_exceeded", "max_tokens")
    letters = server.post(chat("z" * 100, max_tokens=1)).json()["usage"]["prompt_tokens"] - prompt
    assert letters > 50  # so that the next text is just too long
    full = server.post(chat("z" * (room * 100 // letters + 100), max_tokens=1))
    assert_error(full, 400, "context_length_exceeded", "messages")


def test_an_unforeseen_exception_tells_nothing(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("secret at 0x7f0000000000 in /home/someone")

    monkeypatch.setattr(server.served.chat.media, "admit", explode)
    response = server.post(chat("x"))
    assert_error(response, 500, "internal_error")
    assert "secret" not in response.text


def test_random_damage_never_breaks_the_server(server: RunningServer, alone: Told) -> None:
    """Damaged files of every accepted format are decoded or refused, nothing else."""
    generator = np.random.default_rng(0)

    def damage() -> None:
        with server.http() as client:
            for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
                data = picture(24, 24, format=format)
                for _ in range(12):
                    broken = bytearray(data)
                    for place in generator.integers(0, len(data), 6):
                        broken[place] = generator.integers(0, 256)
                    response = client.post("/v1/chat/completions", json=chat(image_part(bytes(broken)), max_tokens=1))
                    if response.status_code != 200:
                        assert_error(response, 400)

    assert_unharmed(server, alone, damage)


def test_every_error_is_one_that_openai_s_client_reads(server: RunningServer) -> None:
    cases: list[tuple[Callable[[], object], type[APIStatusError], str]] = []
    with server.openai() as client:
        create = client.chat.completions.create
        cases = [
            (lambda: create(**chat(image_part(b""))), BadRequestError, "image_decode_failed"),
            (lambda: list(create(**chat(image_part(b""), stream=True))), BadRequestError, "image_decode_failed"),
            (lambda: create(**chat("x", model="other")), NotFoundError, "model_not_found"),
        ]
        for call, kind, code in cases:
            with pytest.raises(kind) as caught:
                call()
            assert caught.value.code == code
