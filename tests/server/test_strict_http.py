"""Bytes on the wire: what two readers of HTTP could read in two ways is refused, and a refusal reaches its client."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import CHAT, RunningServer, chat, head, read_all, running
from waiting import eventually

from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor

BODY = json.dumps(chat("x", max_tokens=1)).encode()
KIND = b"content-type: application/json\r\n"
POST = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: x\r\n" + KIND
LENGTH = b"content-length: %d\r\n" % len(BODY)
CHUNKED = b"transfer-encoding: chunked\r\n"
CHUNK = b"%x\r\n%s\r\n" % (len(BODY), BODY)
SMUGGLED = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"

REFUSED: dict[str, bytes] = {
    "a length beside chunks": POST + LENGTH + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n",
    "chunks beside a length": POST + CHUNKED + b"content-length: 4\r\n\r\n" + CHUNK + b"0\r\n\r\n" + SMUGGLED,
    "two lengths": POST + LENGTH + b"content-length: 3\r\n\r\n" + BODY,
    "two lengths in one": POST + b"content-length: 3, %d\r\n\r\n" % len(BODY) + BODY,
    "a signed length": POST + b"content-length: +%d\r\n\r\n" % len(BODY) + BODY,
    "two encodings": POST + CHUNKED + b"transfer-encoding: identity\r\n\r\n" + CHUNK + b"0\r\n\r\n",
    "an encoding of chunks twice": POST + b"transfer-encoding: chunked, chunked\r\n\r\n" + CHUNK + b"0\r\n\r\n",
    "an unknown encoding": POST + b"transfer-encoding: xchunked\r\n\r\n" + CHUNK + b"0\r\n\r\n",
    "chunks in HTTP/1.0": POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n",
    "bare line feeds": (POST + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY,
    "one bare line feed": POST + b"x: y\n" + LENGTH + b"\r\n" + BODY,
    "a header behind a line feed": POST + b"x: y\ncontent-length: 0\r\n" + LENGTH + b"\r\n" + BODY,
    "a bare line feed at the end": POST + LENGTH + b"\n" + BODY,
    "a bare carriage return": POST + b"x: y\rz\r\n" + LENGTH + b"\r\n" + BODY,
    "a folded line": POST + b"x: y\r\n z\r\n" + LENGTH + b"\r\n" + BODY,
    "a folded length": POST + b"content-length:\r\n %d\r\n\r\n" % len(BODY) + BODY,
    "a space before the colon": POST + b"content-length : %d\r\n\r\n" % len(BODY) + BODY,
    "a name without a colon": POST + b"nonsense\r\n" + LENGTH + b"\r\n" + BODY,
    "a zero byte": POST + b"x: a\0b\r\n" + LENGTH + b"\r\n" + BODY,
    "no host": POST.replace(b"host: x\r\n", b"") + LENGTH + b"\r\n" + BODY,
    "two hosts": POST + b"host: y\r\n" + LENGTH + b"\r\n" + BODY,
    "a chunk extension": POST + CHUNKED + b"\r\n%x;a=b\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    "a line feed in an extension": POST + CHUNKED + b"\r\n%x;\n\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    "white space behind a size": POST + CHUNKED + b"\r\n%x \r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    "a size that ends with a line feed": POST + CHUNKED + b"\r\n%x\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    "a size in another notation": POST + CHUNKED + b"\r\n0x%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    "an endless size": POST + CHUNKED + b"\r\n" + b"0" * 40 + CHUNK + b"0\r\n\r\n",
    "a chunk that is longer": POST + CHUNKED + b"\r\n%x\r\n%sxx\r\n0\r\n\r\n" % (len(BODY), BODY),
    "a chunk without an end": POST + CHUNKED + b"\r\n%x\r\n%s0\r\n\r\n" % (len(BODY), BODY),
    "an extension of the last chunk": POST + CHUNKED + b"\r\n" + CHUNK + b"0;a\r\n\r\n",
    "a line feed behind the last chunk": POST + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\n",
    "trailers": POST + CHUNKED + b"\r\n" + CHUNK + b"0\r\nx: y\r\n\r\n",
}


def send(server: RunningServer, *pieces: bytes) -> bytes:
    """All that comes back until the server closes. A piece at a time, so that the server reads them apart."""
    with server.connect() as connection:
        for piece in pieces:
            connection.sendall(piece)
            if len(pieces) > 1:
                time.sleep(0.01)
        return read_all(connection)


def assert_refused(answer: bytes) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 "), answer
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "invalid_http"  # nothing behind it: one answer, no smuggled one


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_be_read_in_two_ways_is_refused_and_the_connection_closed(server: RunningServer, name: str) -> None:
    assert_refused(send(server, REFUSED[name] + SMUGGLED))


@pytest.mark.parametrize(
    "name", ["a chunk extension", "trailers", "a line feed behind the last chunk", "a folded line"]
)
def test_however_the_bytes_fall(server: RunningServer, name: str) -> None:
    data = REFUSED[name]
    places = (*range(len(POST) - 3, len(POST) + 30, 5), *range(len(data) - 14, len(data)))
    with ThreadPoolExecutor(len(places)) as clients:
        for answer in clients.map(lambda place: send(server, data[:place], data[place:]), places):
            assert_refused(answer)


@pytest.mark.parametrize(
    "data",
    [
        POST + LENGTH + b"\r\n" + BODY,
        POST + CHUNKED + b"\r\n" + CHUNK + b"0\r\n\r\n",
        POST + CHUNKED + b"\r\n000%x\r\n%s\r\n3\r\n%s\r\n00\r\n\r\n" % (len(BODY) - 3, BODY[:-3], BODY[-3:]),
        POST + CHUNKED + b"\r\n" + b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n",
        POST.replace(b"host:", b"Host: \t") + b"X-Odd: \xff, \t y \r\n" + LENGTH + b"\r\n" + BODY,
        POST.replace(b"1.1", b"1.0") + LENGTH + b"\r\n" + BODY,
    ],
    ids=["length", "chunks", "two chunks", "chunks of one", "white space", "HTTP/1.0"],
)
def test_what_is_right_is_taken_however_its_bytes_fall(server: RunningServer, data: bytes) -> None:
    """And the next request on the connection too."""
    last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    several = b"HTTP/1.0" not in data
    ends = range(len(data) - 12, len(data)) if len(data) < 1000 else (len(data) - 2,)
    places = (0, *range(len(POST) - 2, len(POST) + 34, 7), *ends)
    pieces = [(data[:place], data[place:] + (last if several else b"")) for place in places]
    with ThreadPoolExecutor(len(places)) as clients:
        for place, answer in zip(places, clients.map(lambda two: send(server, *two), pieces), strict=True):
            assert answer.startswith(b"HTTP/1.1 200 "), (place, answer)
            assert answer.count(b"HTTP/1.1 200 ") == 1 + several, (place, answer)


@pytest.fixture(scope="module")
def small(processor: Processor, engine: EngineProcess) -> Iterator[RunningServer]:
    with running(processor, engine, max_body_bytes=100_000, api_key="key") as server:
        yield server


def refused_while_sending(server: RunningServer, start: bytes, size: int) -> tuple[bytes, bool]:
    """What a client gets that stops at the first write that fails, and whether one did."""
    failed = False
    with server.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            failed = True
            connection.sendall(start)
            for _ in range(size // 65536):
                connection.sendall(b" " * 65536)
            failed = False
        answer = b""
        while not answer.endswith(b"}}") and (data := connection.recv(65536)):
            answer += data
        return answer, failed


KEY = b"authorization: Bearer key\r\n"


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (POST + KEY + b"content-length: 40000000\r\n\r\n", b"413"),
        (POST + KEY + CHUNKED + b"\r\n2625a00\r\n", b"413"),
        (POST + b"content-length: 40000000\r\n\r\n", b"401"),
        (POST.replace(KIND, b"") + KEY + b"content-length: 40000000\r\n\r\n", b"415"),
        (POST + KEY + CHUNKED + b"\r\n2625a00;x=y\r\n", b"400"),
    ],
    ids=["length", "chunks", "no key", "no JSON", "no HTTP"],
)
def test_a_refusal_reaches_whoever_is_still_sending(small: RunningServer, start: bytes, status: bytes) -> None:
    """No write fails and no connection is reset over it: the rest is read and forgotten, many times over."""
    for _ in range(12):
        answer, failed = refused_while_sending(small, start, 8 << 20)
        assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
        assert not failed
    eventually(lambda: small.metric("siglane_inflight_bytes") == 0)


def test_a_full_server_refuses_without_a_reset(processor: Processor, engine: EngineProcess) -> None:
    with running(processor, engine) as server:
        server.served.draining = True
        for _ in range(12):
            answer, failed = refused_while_sending(server, POST + b"content-length: 8388608\r\n\r\n", 8 << 20)
            assert answer.startswith(b"HTTP/1.1 503 "), answer[:200]
            assert not failed


def test_whoever_goes_on_sending_for_ever_is_dropped(processor: Processor, engine: EngineProcess) -> None:
    with running(processor, engine, max_body_bytes=100_000, idle_timeout=1) as server:
        with server.connect() as connection:
            connection.sendall(POST + b"content-length: 40000000000\r\n\r\n")
            began = time.monotonic()

            def is_dropped() -> bool:
                try:
                    connection.sendall(b" " * 65536)
                except OSError:
                    return True
                return False

            eventually(is_dropped)
            assert time.monotonic() - began > 0.7
        eventually(lambda: not server.server.server_state.connections)


def test_a_body_that_does_not_come_is_told_so(processor: Processor, engine: EngineProcess) -> None:
    with running(processor, engine, body_timeout=0.3) as server, server.connect() as connection:
        connection.sendall(head(content_length=1000) + b"{")
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")
