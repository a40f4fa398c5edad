"""Requests that must be refused: each with its own status and code, without a leak, without harm to a neighbour.

The numbers are the rows of the fault table in the server's contract.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from openai import APIStatusError, BadRequestError, NotFoundError
from PIL import Image
from serving import (
    MODEL,
    RunningServer,
    Told,
    assert_error,
    assert_unharmed,
    chat,
    encode,
    image_part,
    image_url,
    picture,
    running,
    video_part,
)

from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor
from siglane.image.patchify import to_patches
from siglane.types import DecodedImage, ImageLayout, ImagePatches

FIRST_IMAGE = "messages[0].content[0]"


def with_image(url: str) -> dict[str, Any]:
    return chat(image_url(url), "What is this?")


def with_file(data: bytes) -> dict[str, Any]:
    return chat(image_part(data), "What is this?")


def header_only_png(width: int, height: int) -> bytes:
    """A PNG whose header promises pixels that are not there: refused by its header, or it fails as damaged."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(b"")) + block(b"IEND", b"")


def truncated(format: str) -> bytes:
    data = picture(80, 80, format=format)
    return data[: len(data) // 2]


def corrupt_avif() -> bytes:
    return b"\0\0\0\x1cftypavif" + bytes(range(200))


BASE64 = base64.b64encode(picture()).decode()

BAD_IMAGES: dict[str, tuple[dict[str, Any], str]] = {
    "1 no bytes": (with_file(b""), "image_decode_failed"),
    "1 no image": (with_file(b"hello, world" * 20), "image_decode_failed"),
    "2 truncated jpeg": (with_file(truncated("JPEG")), "image_decode_failed"),
    "2 truncated png": (with_file(truncated("PNG")), "image_decode_failed"),
    "2 truncated webp": (with_file(truncated("WEBP")), "image_decode_failed"),
    "2 truncated gif": (with_file(truncated("GIF")), "image_decode_failed"),
    "3 corrupt avif": (with_file(corrupt_avif()), "image_format_not_allowed"),
    "4 bomb by header": (with_file(header_only_png(60000, 60000)), "image_too_large"),
    "4 real bomb": (with_file(encode(Image.new("1", (6000, 6000)))), "image_too_large"),
    "5 long side": (with_file(encode(Image.new("L", (65500, 1)))), "image_aspect_ratio"),
    "5 high side": (with_file(encode(Image.new("L", (1, 300)))), "image_aspect_ratio"),
    "12 svg": (with_file(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "image_format_not_allowed"),
    "12 html": (with_file(b"<!DOCTYPE html><html></html>"), "image_format_not_allowed"),
    "12 pdf": (with_file(b"%PDF-1.7\n" + b"x" * 100), "image_format_not_allowed"),
    "12 eps": (with_file(b"%!PS-Adobe-3.0 EPSF-3.0\n" + b"x" * 100), "image_format_not_allowed"),
    "12 psd": (with_file(b"8BPS\0\1" + b"\0" * 100), "image_format_not_allowed"),
    "12 tiff": (with_file(encode(Image.new("L", (4, 4)), "TIFF")), "image_format_not_allowed"),
    "13 bad letters": (with_image("data:image/png;base64,!!!!"), "invalid_base64"),
    "13 bad padding": (with_image("data:image/png;base64," + BASE64.rstrip("=") + "A"), "invalid_base64"),
    "13 white space": (with_image("data:image/png;base64," + BASE64[:80] + "\n" + BASE64[80:]), "invalid_base64"),
    "13 url-safe": (with_image("data:image/png;base64,_-_-"), "invalid_base64"),
    "13 not ascii": (with_image("data:image/png;base64,ééé="), "invalid_base64"),
    "14 no comma": (with_image("data:image/png;base64"), "invalid_base64"),
    "14 not base64": (with_image("data:image/png,%89PNG"), "invalid_base64"),
    "17 loopback": (with_image("http://127.0.0.1:9/a.png"), "image_url_forbidden"),
    "17 metadata": (with_image("http://169.254.169.254/latest/meta-data"), "image_url_forbidden"),
    "17 loopback v6": (with_image("http://[::1]:9/"), "image_url_forbidden"),
    "18 decimal": (with_image("http://2130706433/"), "image_url_forbidden"),
    "18 mapped": (with_image("http://[::ffff:127.0.0.1]/"), "image_url_forbidden"),
    "23 ftp": (with_image("ftp://example.org/a.png"), "unsupported_url_scheme"),
    "23 gopher": (with_image("gopher://example.org/"), "unsupported_url_scheme"),
    "23 blob": (with_image("blob:https://example.org/1"), "unsupported_url_scheme"),
    "23 bare path": (with_image("/etc/passwd"), "unsupported_url_scheme"),
    "23 bare base64": (with_image(BASE64), "unsupported_url_scheme"),
    "23 nothing": (with_image(""), "unsupported_url_scheme"),
    "24 no folder allowed": (with_image("file:///etc/passwd"), "local_media_forbidden"),
}


NEIGHBOURS = 9  # good requests that share the bad images: four of them come while one good answer is written


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_refused_by_name(server: RunningServer, name: str) -> None:
    body, code = BAD_IMAGES[name]
    for asked in (body, {**body, "stream": True}):
        assert_error(server.post(asked), 400, code, FIRST_IMAGE)


@pytest.mark.parametrize("first", range(NEIGHBOURS))
def test_bad_images_do_not_harm_a_neighbour(server: RunningServer, alone: Told, first: int) -> None:
    def some_of_them() -> None:
        for body, code in list(BAD_IMAGES.values())[first::NEIGHBOURS]:
            assert_error(server.post(body), 400, code, FIRST_IMAGE)

    assert_unharmed(server, alone, some_of_them)


def test_the_first_bad_image_is_named(server: RunningServer) -> None:
    good, bad = image_part(picture()), image_part(b"bad")
    body = chat(good, "text", bad, good, image_part(b""))
    assert_error(server.post(body), 400, "image_decode_failed", "messages[0].content[2]")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hi"}, *body["messages"]]
    assert_error(server.post({**body, "messages": messages}), 400, "image_decode_failed", "messages[2].content[2]")


def test_images_of_one_request_share_its_pixels(processor: Processor, engine: EngineProcess) -> None:
    """Each image alone would be accepted."""
    with running(processor, engine, max_image_pixels=10_000) as server:
        part = image_part(picture(90, 60))
        assert server.post(chat(part)).status_code == 200
        assert_error(server.post(chat(part, part)), 400, "image_too_large", "messages[0].content[1]")


def test_local_files_outside_the_folder_stay_closed(
    processor: Processor, engine: EngineProcess, tmp_path: Path
) -> None:
    """One answer to all of them, so that nobody learns which files exist."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(picture())
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "sub").mkdir()
    os.mkfifo(root / "pipe.png")
    urls = [
        f"file://{root}/../secret.png",
        f"file://{root}/%2e%2e/secret.png",
        f"file://{tmp_path}/secret.png",
        f"file://{root}/link.png",
        f"file://{root}/sub",
        f"file://{root}/pipe.png",
        f"file://{root}/missing.png",
        f"file://elsewhere{root}/a.png",
        "file:///proc/self/environ",
        "file:///dev/zero",
        "file:relative.png",
    ]
    with running(processor, engine, allowed_local_media_path=str(root)) as server:
        answers = [server.post(with_image(url)) for url in urls]
    for answer in answers:
        assert_error(answer, 400, "local_media_forbidden", FIRST_IMAGE)
    assert len({answer.text for answer in answers}) == 1


def test_too_many_images_are_counted_before_any_is_looked_at(server: RunningServer, alone: Told) -> None:
    """None of them is fetched."""
    body = chat(*[image_url("https://127.0.0.1:9/never-fetched.png")] * 17)
    assert_unharmed(server, alone, lambda: assert_error(server.post(body), 400, "too_many_images", "messages"))


def fields(**more: Any) -> dict[str, Any]:
    return chat("hello", **more)


def messages(*found: Any) -> dict[str, Any]:
    return {**chat(), "messages": list(found)}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


CALL = {"name": "weather", "arguments": '{"city": "Bern"}'}

BAD_BODIES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "33 no tokens": (fields(max_tokens=0), "invalid_value", "max_tokens"),
    "33 negative": (fields(max_completion_tokens=-1), "invalid_value", "max_completion_tokens"),
    "33 too many": (fields(max_tokens=10**9), "context_length_exceeded", "max_tokens"),
    "33 no room": (fields(max_completion_tokens=4096), "context_length_exceeded", "max_completion_tokens"),
    "33 min above max": (fields(max_tokens=4, min_tokens=5), "invalid_value", "min_tokens"),
    "33 endless min": (fields(max_tokens=None, min_tokens=10**9), "invalid_value", "min_tokens"),
    "34 n": (fields(n=10**9), "invalid_value", "n"),
    "34 no choice": (fields(n=0), "invalid_value", "n"),
    "34 top_logprobs": (fields(logprobs=True, top_logprobs=10**6), "invalid_value", "top_logprobs"),
    "34 lonely top_logprobs": (fields(top_logprobs=2), "invalid_value", "top_logprobs"),
    "34 stops": (fields(stop=["x"] * 10**5), "invalid_value", "stop"),
    "34 long stop": (fields(stop="x" * 10**5), "invalid_value", "stop"),
    "34 empty stop": (fields(stop=["a", ""]), "invalid_value", "stop"),
    "34 stop ids": (fields(stop_token_ids=[1] * 10**5), "invalid_value", "stop_token_ids"),
    "34 biases": (fields(logit_bias={str(i): 1 for i in range(10**5)}), "invalid_value", "logit_bias"),
    "34 messages": (messages(*[user("x")] * 10**5), "invalid_value", "messages"),
    "34 parts": (chat(*["x"] * 5000), "invalid_value", "messages[0].content"),
    "34 salt": (fields(cache_salt="x" * 1000), "invalid_value", "cache_salt"),
    "34 template values": (fields(chat_template_kwargs={f"k{i}": 1 for i in range(100)}), "invalid_value", None),
    "35 bool for int": (fields(n=True), "invalid_value", "n"),
    "35 bool for number": (fields(temperature=True), "invalid_value", "temperature"),
    "35 text for number": (fields(temperature="1"), "invalid_value", "temperature"),
    "35 huge int": (fields(seed=10**40), "invalid_value", "seed"),
    "35 bool bias": (fields(logit_bias={"1": True}), "invalid_value", "logit_bias"),
    "35 temperature": (fields(temperature=-0.1), "invalid_value", "temperature"),
    "35 hot": (fields(temperature=1e300), "invalid_value", "temperature"),
    "35 top_p": (fields(top_p=1.5), "invalid_value", "top_p"),
    "35 min_p": (fields(min_p=-1), "invalid_value", "min_p"),
    "35 top_k": (fields(top_k=-2), "invalid_value", "top_k"),
    "35 repetition": (fields(repetition_penalty=0), "invalid_value", "repetition_penalty"),
    "35 presence": (fields(presence_penalty=3), "invalid_value", "presence_penalty"),
    "36 bias of no token": (fields(logit_bias={"999999": 1}), "invalid_value", "logit_bias"),
    "36 stop of no token": (fields(stop_token_ids=[999999]), "invalid_value", "stop_token_ids"),
    "36 negative token": (fields(logit_bias={"-1": 1}), "invalid_value", "logit_bias"),
    "36 word token": (fields(logit_bias={"cat": 1}), "invalid_value", "logit_bias"),
    "36 strong bias": (fields(logit_bias={"1": 1000}), "invalid_value", "logit_bias"),
    "36 bad words": (fields(bad_words=["cat"]), "unsupported_field", "bad_words"),
    "36 input ids": (fields(input_ids=[1]), "unsupported_field", "input_ids"),
    "38 no messages": ({"model": MODEL}, "missing_field", "messages"),
    "38 empty messages": (messages(), "invalid_value", "messages"),
    "38 messages of no list": ({"messages": "hi"}, "invalid_value", "messages"),
    "38 message of no object": (messages("hi"), "invalid_value", "messages[0]"),
    "38 unknown role": (messages({"role": "robot", "content": "x"}), "invalid_value", "messages[0].role"),
    "38 tool role": (messages({"role": "tool", "content": "x"}), "unsupported_field", "messages[0].role"),
    "38 no role": (messages({"content": "x"}), "missing_field", "messages[0].role"),
    "38 no content": (messages({"role": "user"}), "missing_field", "messages[0].content"),
    "38 null content": (messages(user(None)), "invalid_value", "messages[0].content"),
    "38 empty content": (messages(user("")), "empty_content", "messages[0].content"),
    "38 no parts": (messages(user([])), "invalid_value", "messages[0].content"),
    "38 no text": (messages(user([{"type": "text"}])), "missing_field", "messages[0].content[0].text"),
    "38 no url": (
        messages(user([{"type": "image_url", "image_url": {}}])),
        "missing_field",
        "messages[0].content[0].image_url.url",
    ),
    "38 bare url": (
        messages(user([{"type": "image_url", "image_url": "https://example.org/a.png"}])),
        "invalid_value",
        "messages[0].content[0].image_url",
    ),
    "38 no detail": (
        chat(image_part(b"", detail="much")),
        "invalid_value",
        "messages[0].content[0].image_url.detail",
    ),
    "40 video of the assistant": (
        messages({"role": "assistant", "content": [video_part(b"")]}, user("x")),
        "unsupported_content_type",
        "messages[0].content[0]",
    ),
    "40 audio": (
        messages(user([{"type": "input_audio", "input_audio": {}}])),
        "unsupported_content_type",
        "messages[0].content[0]",
    ),
    "40 image of the system": (
        messages({"role": "system", "content": [image_part(b"")]}, user("x")),
        "unsupported_content_type",
        "messages[0].content[0]",
    ),
    "59 template": (fields(chat_template="{{ 1 }}"), "unsupported_field", "chat_template"),
    "59 processor": (fields(mm_processor_kwargs={"a": 1}), "unsupported_field", "mm_processor_kwargs"),
    "59 media": (fields(media_io_kwargs={"a": 1}), "unsupported_field", "media_io_kwargs"),
    "59 own variables": (
        fields(chat_template_kwargs={"messages": "x"}),
        "invalid_chat_template_kwargs",
        "chat_template_kwargs",
    ),
    "59 deep variables": (fields(chat_template_kwargs={"a": [1]}), "invalid_value", "chat_template_kwargs"),
    "66 embeddings": (fields(prompt_embeds="AAAA"), "unsupported_field", "prompt_embeds"),
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


def test_bad_bodies_do_not_harm_a_neighbour(server: RunningServer, alone: Told) -> None:
    def all_of_them() -> None:
        for body, code, _ in BAD_BODIES.values():
            assert_error(server.post(body), 400, code)

    assert_unharmed(server, alone, all_of_them)


def test_values_that_ask_for_nothing_are_accepted(server: RunningServer) -> None:
    nothing = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "best_of": 1, "echo": False}
    nothing |= {"functions": None, "modalities": ["text"], "use_beam_search": False, "chat_template": None}
    response = server.post(chat("x", **nothing, n=None, stop=None, logit_bias=None, seed=None, top_k=-1))
    assert response.status_code == 200, response.text
    assert "x-siglane-ignored-fields" not in response.headers


RAW: dict[str, tuple[bytes, str]] = {
    "35 nan": (b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}', "invalid_json"),
    "35 infinity": (b'{"messages":[{"role":"user","content":"x"}],"temperature":-Infinity}', "invalid_json"),
    "35 1e400": (b'{"messages":[{"role":"user","content":"x"}],"temperature":1e400}', "invalid_json"),
    "35 deep": (b"[" * 100_000, "invalid_json"),
    "35 deep object": (b'{"a":' * 100_000, "invalid_json"),
    "37 utf-8": (b'{"messages":[{"role":"user","content":"\xff\xfe"}]}', "invalid_json"),
    "37 surrogate": (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "invalid_json"),
    "37 surrogate bytes": (b'{"messages":[{"role":"user","content":"\xed\xa0\x80"}]}', "invalid_json"),
    "38 empty": (b"", "invalid_body"),
    "38 broken": (b'{"messages":', "invalid_json"),
    "38 list": (b"[]", "invalid_body"),
    "38 number": (b"1", "invalid_body"),
    "38 null": (b"null", "invalid_body"),
    "38 text": (b'"x"', "invalid_body"),
}


def post_raw(server: RunningServer, content: bytes, **headers: str) -> httpx2.Response:
    with server.http() as client:
        headers = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return client.post("/v1/chat/completions", content=content, headers=headers)


@pytest.mark.parametrize("name", RAW)
def test_a_body_that_is_no_request(server: RunningServer, alone: Told, name: str) -> None:
    content, code = RAW[name]
    assert_unharmed(server, alone, lambda: assert_error(post_raw(server, content), 400, code))


def test_only_plain_json_is_read(server: RunningServer) -> None:
    """Other content types are refused, and compressed bodies without being unpacked: a bomb stays small."""
    body = json.dumps(chat("x")).encode()
    assert post_raw(server, body, content_type="application/json; charset=utf-8").status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert_error(post_raw(server, body, content_type=kind), 415, "unsupported_media_type")
    bomb = zlib.compress(b"0" * 10_000_000)
    for encoding in ("gzip", "deflate", "zstd", "br", "x"):
        assert_error(post_raw(server, bomb, content_encoding=encoding), 415, "unsupported_content_encoding")
    assert post_raw(server, body, content_encoding="identity").status_code == 200


def test_unknown_paths_and_methods(server: RunningServer) -> None:
    with server.http() as client:
        assert_error(client.get("/v1/embeddings"), 404, "not_found")
        assert_error(client.get("/v1/models/"), 404)
        assert_error(client.get("/health/"), 404, "not_found")
        assert_error(client.post("/health"), 405, "method_not_allowed")
        assert_error(client.get("/v1/chat/completions"), 405, "method_not_allowed")
        assert_error(client.post("/v1/chat/completions/", json=chat("x")), 404, "not_found")


def test_a_prompt_that_is_too_long_is_refused_before_pixels_are_decoded(
    server: RunningServer, processor: Processor, alone: Told
) -> None:
    """The count is exact, and made from headers."""
    image = image_part(header_only_png(1000, 900))  # would fail if it were decoded
    short = chat(image, "x")
    assert_error(server.post(short), 400, "image_decode_failed")
    for content in ([image, "x " * 4000], [image, *["letters " * 1000] * 9], [image, "x" * 5_000_000]):
        assert_unharmed(server, alone, partial(assert_too_long, server, chat(*content), processor.context_length))


def assert_too_long(server: RunningServer, body: dict[str, Any], context: int) -> None:
    response = server.post(body)
    assert_error(response, 400, "context_length_exceeded", "messages")
    assert str(context) in response.json()["error"]["message"]


def test_exactly_full_is_accepted_and_one_more_is_not(server: RunningServer, processor: Processor) -> None:
    prompt = server.post(chat("x", max_tokens=1)).json()["usage"]["prompt_tokens"]
    room = processor.context_length - prompt
    assert_error(server.post(chat("x", max_tokens=room + 1)), 400, "context_length_exceeded", "max_tokens")
    letters = server.post(chat("z" * 100, max_tokens=1)).json()["usage"]["prompt_tokens"] - prompt
    assert letters > 50  # so that the next text is just too long
    full = server.post(chat("z" * (room * 100 // letters + 100), max_tokens=1))
    assert_error(full, 400, "context_length_exceeded", "messages")


def test_an_exception_inside_one_step_ends_one_request(
    server: RunningServer, processor: Processor, alone: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patches of a width that the tower cannot multiply get through, and the step raises."""

    def spoil(image: DecodedImage, layout: ImageLayout, *facts: Any) -> ImagePatches:
        patches = to_patches(image, layout, *facts)
        return patches if image.size != (33, 33) else replace(patches, pixels=torch.zeros(layout.patches, 7))

    monkeypatch.setattr("siglane.image.patchify.to_patches", spoil)
    poison = image_part(picture(33, 33))

    def fault() -> None:
        for _ in range(3):
            assert_error(server.post(chat(poison)), 500, "engine_error")
            assert_error(server.post(chat(poison, stream=True, n=2)), 500, "engine_error")

    assert_unharmed(server, alone, fault)
    with server.http() as client:
        assert client.get("/health").status_code == 200


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
