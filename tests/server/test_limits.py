"""What keeps one client, or all of them together, from taking the server away from the others."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from typing import Any

import pytest
from openai import InternalServerError
from serving import RunningServer, assert_error, chat, head, image_part, picture, read_all, running
from waiting import eventually

from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor
from siglane.server import http
from siglane.settings.server import ServerConfig

LONG = chat("x", max_tokens=3000, ignore_eos=True, stream=True)


def test_all_requests_together_hold_a_bounded_number_of_bytes(processor: Processor, engine: EngineProcess) -> None:
    with running(processor, engine, max_inflight_bytes=200_000) as server, server.connect() as hog:
        hog.sendall(head(content_length=190_000) + b" " * 150_000)
        eventually(lambda: server.served.inflight_bytes.used >= 150_000)
        assert_error(server.post(chat("x" * 60_000)), 503, "server_overloaded")
        assert server.post(chat("x")).status_code == 200
        hog.close()
        eventually(lambda: server.served.inflight_bytes.used == 0)
        assert server.post(chat(image_part(picture()), "x")).status_code == 200
        eventually(lambda: server.served.inflight_bytes.used == 0)


def test_what_is_not_http_is_told_so(server: RunningServer) -> None:
    long = b"GET /" + b"x" * 1_000_000  # more than is read at one time
    for garbage in (b"\0\1\2\r\n\r\n", long, b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with server.connect() as connection:
            connection.sendall(garbage)
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_a_full_server_says_when_to_try_again_and_stays_healthy(processor: Processor, engine: EngineProcess) -> None:
    """Clients that have not sent their bodies take no place."""
    body = json.dumps(LONG).encode()
    with running(processor, engine, max_queue=3) as server, contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(server.connect()) for _ in range(5)]
        for connection in waiting:
            connection.sendall(head(content_length=len(body)) + body[:-1])
        assert server.post(chat("x", max_tokens=1)).status_code == 200
        # its client has the answer before the server has given its place back
        eventually(lambda: server.metric("siglane_requests_total", outcome="ok") == 1)
        for connection in waiting:
            connection.sendall(body[-1:])
        answers = [connection.recv(12) for connection in waiting]
        assert sorted(answers) == [b"HTTP/1.1 200"] * 3 + [b"HTTP/1.1 503"] * 2
        with server.openai() as client, pytest.raises(InternalServerError) as caught:
            client.chat.completions.create(**chat("x"))
        assert caught.value.code == "server_overloaded"
        assert caught.value.response.headers["retry-after"] == "1"
        assert "x-should-retry" not in caught.value.response.headers
        with server.http() as probe:
            assert probe.get("/health").status_code == probe.get("/ready").status_code == 200
        stack.close()
        eventually(lambda: server.metric("siglane_requests_in_flight") == 0)
        assert server.metric("siglane_requests_total", outcome="cancelled") == 3


def test_a_process_without_files_says_so_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio tries thousands of times a second, and would write a traceback each time."""
    log = http._AcceptLog()
    loop = asyncio.new_event_loop()
    with contextlib.closing(loop):
        for _ in range(5000):
            log(loop, {"message": http.OUT_OF_FILES, "exception": OSError(errno.EMFILE, "Too many open files")})
        assert len(caplog.messages) == 1
        log(loop, {"message": "something else", "exception": RuntimeError("x")})
    assert len(caplog.messages) == 2


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"port": 70000}, "port"),
        ({"max_queue": 0}, "max_queue"),
        ({"body_timeout": 0.0}, "body_timeout"),
        ({"drain_timeout": -1.0}, "drain_timeout"),
        ({"default_temperature": 3.0}, "default_temperature"),
        ({"api_key": ""}, "api_key"),
        ({"api_key": "a\nb"}, "api_key"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ServerConfig(**options)
    assert "secret" not in repr(ServerConfig(api_key="secret"))
