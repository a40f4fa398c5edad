"""Rows 28 to 31, 60 to 64, 67 and 70: clients that are slow, gone, many or curious."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import re
import socket
import threading
from collections import Counter
from typing import Any

import httpx2
import pytest
from faults import SECRET, Stage, Table
from openai import AuthenticationError
from PIL import Image
from serving import CHAT, HOST, assert_error, chat, encode, head, image_part, image_url, picture, read_all
from test_lifecycle import LONG, cancelled, figures, send, working
from waiting import PATIENCE, eventually

from siglane.image.patchify import to_patches
from siglane.server import http
from siglane.server.logs import TextFormatter

TABLE = Table()


@TABLE.row(28, "clients that send slowly", idle_timeout=2, body_timeout=2.0)
def slow_senders(stage: Stage) -> None:
    """Clients that open a connection and send nothing, a byte at a time, or half a body."""
    server = stage.server
    silent, dribbling, keeping, halved = (server.connect() for _ in range(4))
    halved.sendall(head(content_length=1000) + b"{")
    body = json.dumps(chat("x", max_tokens=1)).encode()
    keeping.sendall(head(content_length=len(body)) + body)
    while not keeping.recv(65536).endswith(b"}}"):
        pass
    stop = threading.Event()

    def dribble() -> None:
        while not stop.wait(0.1):
            with contextlib.suppress(OSError):
                dribbling.sendall(b"a")
                keeping.sendall(b"P")

    thread = threading.Thread(target=dribble)
    thread.start()
    for connection in (silent, dribbling, keeping):
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(65536) == b""
    stop.set()
    thread.join()
    answer = read_all(halved)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in answer
    assert b"x-should-retry: false" in answer
    for connection in (silent, dribbling, keeping, halved):
        connection.close()


PHASES = ("sending", "preparing", "generating", "streaming")


def leaves(phase: str, stage: Stage) -> None:
    """While it sends, before its prefill, in the middle of a stream or waiting for a whole answer."""
    server = stage.server
    prepares, left = threading.Event(), threading.Event()

    def slowly(image: Any, *others: Any) -> Any:
        if image.size == (33, 33):
            prepares.set()
            left.wait(PATIENCE)
        return to_patches(image, *others)

    stage.patch.setattr("siglane.image.patchify.to_patches", slowly)
    before = cancelled(server)
    body = {**LONG, "n": 2, "stream": phase == "streaming"}
    if phase == "sending":
        connection = server.connect()
        connection.sendall(head(content_length=1000) + b"{")
        eventually(lambda: server.metric("siglane_inflight_bytes") > 0)
    elif phase == "preparing":
        connection = send(server, body | chat(image_part(picture(33, 33, seed=4242)), max_tokens=4000))
        assert prepares.wait(PATIENCE)
    else:
        connection = send(server, body)
    if phase == "generating":
        eventually(lambda: working(stage.engine) >= 2)
    if phase == "streaming":
        assert b" 200 " in connection.recv(4096)
    connection.close()
    eventually(lambda: cancelled(server) == before + 1)
    left.set()


@TABLE.row(29, "clients that leave")
def leave_nothing(stage: Stage) -> None:
    """Four that left: nobody computes for them, and their pages and bytes are free."""
    tokens = figures(stage.server).computed_tokens
    for phase in PHASES:
        leaves(phase, stage)
    eventually(lambda: stage.server.served.inflight_bytes.used == 0)
    stats = figures(stage.server)
    assert stats.computed_tokens - tokens < LONG["max_tokens"], "nobody reads what is computed"
    assert stats.pages_free + stats.pages_cached == stats.pages_total


@TABLE.row(30, "a client that does not read", stall_timeout=2.0)
def does_not_read(stage: Stage) -> None:
    """The answer is far larger than what sockets buffer, which is little here."""
    server = stage.server
    for listener in server.server.servers[0].sockets:  # its connections inherit it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = json.dumps({**LONG, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((HOST, server.port))
        connection.sendall(head(content_length=len(body)) + body)
        eventually(lambda: cancelled(server) == 1)


FLOOD = 200


@TABLE.row(31, "a flood", max_queue=16)
def flood(stage: Stage) -> None:
    """Every request is answered and counted once: a 200, or a 503 that says when to come back."""
    server = stage.server

    async def ask() -> list[httpx2.Response]:
        options: dict[str, Any] = {"limits": httpx2.Limits(max_connections=None), "trust_env": False, "verify": False}
        async with httpx2.AsyncClient(base_url=server.url, timeout=PATIENCE, **options) as client:
            bodies = [chat(f"question {number}", max_tokens=20) for number in range(FLOOD)]
            return list(await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies)))

    answers = asyncio.run(ask())
    codes = Counter(answer.status_code for answer in answers)
    assert set(codes) == {200, 503}
    assert codes[200] >= 15  # and the good request
    assert codes.total() == FLOOD
    for answer in answers:
        if answer.status_code == 503:
            assert_error(answer, 503, "server_overloaded")
    assert len({answer.headers["x-request-id"] for answer in answers}) == FLOOD
    eventually(lambda: server.metric("siglane_requests_total", outcome="ok") == codes[200] + 1)
    eventually(lambda: server.metric("siglane_requests_total", outcome="rejected") == codes[503])
    assert server.metric("siglane_requests_in_flight") == 0


@TABLE.row(60, "names that would be series")
def no_series(stage: Stage) -> None:
    """Random paths, methods, model names and fields: what a client invents never becomes a label."""
    server = stage.server

    def series() -> set[str]:
        with server.http() as client:
            text = client.get("/metrics").text
        return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}

    def roam(word: str) -> None:
        with server.http() as client:
            for number in range(100):
                client.get(f"/{word}/{number}")
                client.get(f"/v1/models/{word}{number}")
            client.request(word.upper(), "/v1/models")
            client.post(CHAT, json=chat("x", model=word))
            client.post(CHAT, json={**chat("x"), word: 1})

    series()
    roam("first")
    known = series()
    roam("second")
    assert {name for name in series() - known if "second" in name} == set()
    assert 'siglane_http_requests_total{method="GET",route="other",status="404"}' in known
    assert 'siglane_http_requests_total{method="GET",route="/v1/models/{name:path}",status="404"}' in known
    assert 'siglane_http_requests_total{method="other",route="/v1/models",status="405"}' in known
    assert not [name for name in known if "first" in name.partition("{")[2]]


@TABLE.row(61, "two pictures of one colour")
def two_pictures_of_one_colour(stage: Stage) -> None:
    """Their bytes are the same in another shape."""
    wide, high = (encode(Image.new("RGB", size, "teal")) for size in ((112, 448), (448, 112)))

    def ask(file: bytes, salt: str) -> Any:
        answer = stage.server.post(chat(image_part(file), "x", cache_salt=salt, logprobs=True))
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    first, beside, alone = ask(wide, "a colour"), ask(high, "a colour"), ask(high, "another")
    assert beside["message"] == alone["message"]
    assert first["logprobs"] != beside["logprobs"]


@TABLE.row(62, "two tenants")
def two_tenants(stage: Stage) -> None:
    """None learns from its usage what the other has asked."""
    body = chat(image_part(picture(seed=62)), "x " * 60, max_tokens=1)

    def cached(salt: str) -> int:
        usage = stage.server.post({**body, "cache_salt": salt}).json()["usage"]
        found: int = usage["prompt_tokens_details"]["cached_tokens"]
        return found

    found = [cached(salt) for salt in ("tenant 1", "tenant 1", "tenant 2", "tenant 2")]
    assert found[0] == found[2] == 0 < found[1] == found[3]


WRONG: tuple[dict[str, str], ...] = (
    {},
    {"authorization": SECRET},
    {"authorization": f"Basic {SECRET}"},
    {"authorization": f"Bearer {SECRET}x"},
    {"authorization": f"Bearer {SECRET[:-1]}"},
    {"authorization": "Bearer é"},
    {"x-api-key": "other"},
    {"host": "127.0.0.1/health", "authorization": "Bearer no"},
    {"x-forwarded-prefix": "/health", "x-original-url": "/health"},
)
CLOSED = "/v1/models /health/ //health /HEALTH /health/../v1/models //v1/models /nope /openapi.json"


@TABLE.row(63, "no key")
def no_key(stage: Stage) -> None:
    """Whatever the headers and paths pretend; only the probes are open."""
    with stage.another(api_key=SECRET) as server, server.http() as client:
        for path in CLOSED.split():
            for headers in WRONG:
                raw = {name.encode(): text.encode("latin-1") for name, text in headers.items()}
                answer = client.get(httpx2.URL(server.url).copy_with(raw_path=path.encode()), headers=raw)
                assert_error(answer, 401, "invalid_api_key")
                assert SECRET not in answer.text
        assert [client.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3
        right = ("authorization", f"Bearer {SECRET}")
        assert_error(client.get("/v1/models", headers=[("authorization", "Bearer x"), right]), 401)
        assert_error(client.get("/nope", headers=dict([right])), 404, "not_found")
        assert server.openai(api_key=SECRET).chat.completions.create(**chat("x")).usage
        with pytest.raises(AuthenticationError) as caught:
            server.openai(api_key="wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        assert SECRET not in repr(server.served.config)


ADMIN = "/update_weights_from_disk /configure_logging /flush_cache /release_memory_occupation /sleep /load_model"


@TABLE.row(64, "doors without a key")
def nothing_to_administer(stage: Stage) -> None:
    """What peers have open without a key is not there, and nobody else's page may ask."""
    assert stage.server.served.config.host == "127.0.0.1"
    with stage.server.http() as client:
        for path in ADMIN.split():
            assert_error(client.post(path, json={}), 404, "not_found")
        answer = client.get("/v1/models", headers={"origin": "https://page.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


@TABLE.row(67, "forged lines")
def no_forged_line(stage: Stage) -> None:
    """Line breaks in what a client sends cannot forge a line, and no text, picture or query of a URL is written."""
    server, mine = stage.server, {"x-request-id": "mine"}
    with stage.log.at_level(logging.DEBUG, "siglane"):
        server.post(chat(image_part(picture()), "a private text", wild=1), headers=mine)
        server.post(chat(image_url(f"http://127.0.0.1:9/a.png?token={SECRET}")), headers=mine)
        server.post(chat("x", model="evil\n2026 error forged"), headers=mine)
        server.post(chat("x", **{"wild\nfield": 1}), headers=mine)
        with server.http() as client:
            client.get(f"/path%0aforged?token={SECRET}", headers=mine)
        formatted = functools.partial(TextFormatter().format)

        def lines() -> list[str]:
            return [formatted(one) for one in stage.log.records if one.name.startswith("siglane.server")]

        eventually(lambda: len([line for line in lines() if "[mine] POST /v1/chat/completions: " in line]) >= 4)
    text = "\n".join(lines())
    assert not any(word in text for word in (SECRET, "private", "127.0.0.1:9", "base64", "forged"))
    assert all("\n" not in line for line in lines())
    assert re.search(r"\[mine\] POST /v1/chat/completions: image_url_forbidden in \d+ ms", text)
    assert [line.rpartition(": ")[2] for line in lines() if "have no effect here" in line] == ["wild", "wild?field"]


@TABLE.row(70, "no files left")
def no_files_left(stage: Stage) -> None:
    """One connection more is refused before it asks; who is connected is served, and so is everybody when they have
    gone."""
    stage.patch.setattr(http, "most_connections", lambda: 8)
    with stage.another() as server, contextlib.ExitStack() as stack, server.http() as good:
        connections = server.server.server_state.connections
        assert good.get("/health").status_code == 200
        idle = [stack.enter_context(server.connect()) for _ in range(7)]
        eventually(lambda: len(connections) == 8)
        for _ in range(3):
            refused = httpx2.get(f"{server.url}/health", trust_env=False)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
            eventually(lambda: len(connections) == 8)
        with server.connect() as told:  # without a request of its own
            assert b"retry-after: 1" in read_all(told)
        flood = [stack.enter_context(server.connect()) for _ in range(200)]
        eventually(lambda: len(connections) <= 9)
        assert good.post(CHAT, json=chat("x", max_tokens=1)).status_code == 200
        for connection in (*idle, *flood):
            connection.close()
        eventually(lambda: len(connections) <= 1)
        assert httpx2.get(f"{server.url}/health", trust_env=False).status_code == 200
