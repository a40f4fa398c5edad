"""What keeps one client, or all of them together, from taking the server away from the others."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from openai import APIStatusError, InternalServerError
from serving import (
    CHAT,
    GOOD,
    HOST,
    RunningServer,
    Told,
    ask_good,
    assert_error,
    assert_unharmed,
    chat,
    head,
    image_part,
    image_url,
    picture,
    read_all,
    running,
)
from waiting import PATIENCE, eventually

from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor
from siglane.media.policy import MediaPolicy
from siglane.server import http
from siglane.server.media import MediaLoader
from siglane.settings.server import ServerConfig

LONG = chat("x", max_tokens=3000, ignore_eos=True, stream=True)


def test_a_body_over_the_limit_is_cut_while_it_is_read(processor: Processor, engine: EngineProcess) -> None:
    """By its length when it tells one, else at the byte that is too many."""
    with running(processor, engine, max_body_bytes=100_000) as server:
        fits = chat(image_part(b"\0" * 60_000))
        assert_error(server.post(fits), 400, "image_decode_failed")
        with server.connect() as connection:  # nothing of the announced body is ever sent
            connection.sendall(head(content_length=10**12))
            assert b" 413 " in read_all(connection).split(b"\r\n")[0]
        with server.connect() as connection:
            connection.sendall(head(transfer_encoding="chunked"))
            chunk = b"%x\r\n%s\r\n" % (50_000, b" " * 50_000)
            for _ in range(3):
                connection.sendall(chunk)
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b'"code":"request_too_large"' in answer
        assert b"connection: close" in answer.lower()
        for size in (100_001, 5_000_000):
            with server.openai() as client, pytest.raises(APIStatusError) as caught:
                client.chat.completions.create(**chat("x" * size))
            assert caught.value.status_code == 413
            assert caught.value.code == "request_too_large"


def test_a_data_url_over_the_limit(processor: Processor, engine: EngineProcess) -> None:
    """The limit of one picture holds for those that come inside the body too."""
    with running(processor, engine, max_image_bytes=1000) as server:
        response = server.post(chat(image_part(b"\0" * 2000)))
        assert_error(response, 413, "request_too_large", "messages[0].content[0]")


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


def test_slow_headers_and_bodies_are_dropped(processor: Processor, engine: EngineProcess) -> None:
    """Clients that open a connection and send nothing, or a byte at a time."""
    with running(processor, engine, idle_timeout=1, body_timeout=0.5) as server:
        silent, dribbling, keeping = server.connect(), server.connect(), server.connect()
        body = json.dumps(chat("x", max_tokens=1)).encode()
        keeping.sendall(head(content_length=len(body)) + body)
        while not keeping.recv(65536).endswith(b"}}"):
            pass
        stop = threading.Event()

        def dribble() -> None:
            while not stop.wait(0.1):
                try:
                    dribbling.sendall(b"a")
                    keeping.sendall(b"P")
                except OSError:
                    return

        thread = threading.Thread(target=dribble)
        thread.start()
        for connection in (silent, dribbling, keeping):
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(65536) == b""
        stop.set()
        thread.join()
        with server.connect() as slow:
            slow.sendall(head(content_length=1000) + b"{")
            answer = read_all(slow)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"code":"request_timeout"' in answer
        assert b"x-should-retry: false" in answer
        for connection in (silent, dribbling, keeping):
            connection.close()


def test_what_is_not_http_is_told_so(server: RunningServer) -> None:
    long = b"GET /" + b"x" * 1_000_000  # more than is read at one time
    for garbage in (b"\0\1\2\r\n\r\n", long, b"POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with server.connect() as connection:
            connection.sendall(garbage)
            answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_slow_clients_do_not_harm_a_neighbour(server: RunningServer, alone: Told) -> None:
    connections = [server.connect() for _ in range(20)]

    def misbehave() -> None:
        for number, connection in enumerate(connections):
            connection.sendall(head(content_length=1000) + b"{" if number % 2 else b"POST /v1")
        for connection in connections:
            connection.close()

    assert_unharmed(server, alone, misbehave)


def test_a_flood_is_admitted_up_to_the_limit_and_nobody_goes_unanswered(
    processor: Processor, engine: EngineProcess
) -> None:
    """Every request is answered and counted once: a 200, or a 503 that says when to come back."""

    async def flood(server: RunningServer) -> list[httpx2.Response]:
        options: dict[str, Any] = {"limits": httpx2.Limits(max_connections=None), "trust_env": False, "verify": False}
        async with httpx2.AsyncClient(base_url=server.url, timeout=60, **options) as client:
            bodies = [chat(f"question {number}", max_tokens=20) for number in range(200)]
            return list(await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies)))

    with running(processor, engine, max_queue=16) as server:
        alone = ask_good(server)
        answers = asyncio.run(flood(server))
        codes = Counter(answer.status_code for answer in answers)
        assert set(codes) == {200, 503}
        assert codes[200] >= 16
        assert codes[200] + codes[503] == 200
        for answer in answers:
            if answer.status_code == 503:
                assert_error(answer, 503, "server_overloaded")
        assert len({answer.headers["x-request-id"] for answer in answers}) == 200
        eventually(lambda: server.metric("siglane_requests_total", outcome="ok") == codes[200] + 1)
        eventually(lambda: server.metric("siglane_requests_total", outcome="rejected") == codes[503])
        assert server.metric("siglane_requests_in_flight") == 0
        assert ask_good(server).text == alone.text


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


def test_connections_leave_files_for_requests(
    processor: Processor, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more is refused before it asks; who is connected is served, and so is everybody when they have gone."""
    monkeypatch.setattr(http, "most_connections", lambda: 8)
    with running(processor, engine) as server, contextlib.ExitStack() as stack, server.http() as good:
        once = {key: value for key, value in GOOD.items() if not key.startswith("stream")}
        alone = good.post(CHAT, json={**once, "cache_salt": "alone"}).json()
        idle = [stack.enter_context(server.connect()) for _ in range(7)]
        eventually(lambda: len(server.server.server_state.connections) == 8)
        for _ in range(3):
            refused = httpx2.get(f"{server.url}/health", trust_env=False)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_overloaded")
            eventually(lambda: len(server.server.server_state.connections) == 8)
        with server.connect() as told:  # without a request of its own
            assert b"retry-after: 1" in read_all(told)
        flood = [stack.enter_context(server.connect()) for _ in range(200)]
        eventually(lambda: len(server.server.server_state.connections) <= 9)
        beside = good.post(CHAT, json={**once, "cache_salt": "beside"}).json()
        assert [beside[key] for key in ("choices", "usage")] == [alone[key] for key in ("choices", "usage")]
        for connection in (*idle, *flood):
            connection.close()
        eventually(lambda: len(server.server.server_state.connections) <= 1)
        assert httpx2.get(f"{server.url}/health", trust_env=False).status_code == 200


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


def test_a_client_that_does_not_read_is_dropped_and_others_go_on(processor: Processor, engine: EngineProcess) -> None:
    """The answer is far larger than what sockets buffer, which is little here."""
    with running(processor, engine, stall_timeout=1.5) as server:
        alone = ask_good(server)
        for listener in server.server.servers[0].sockets:  # its connections inherit it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        body = json.dumps({**LONG, "logprobs": True, "top_logprobs": 20, "max_tokens": 4000}).encode()

        def stall() -> None:
            with socket.socket() as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect((HOST, server.port))
                connection.sendall(head(content_length=len(body)) + body)
                eventually(lambda: server.metric("siglane_requests_total", outcome="cancelled") == 1)

        assert_unharmed(server, alone, stall)
        eventually(lambda: engine_is_idle(engine))


def engine_is_idle(engine: EngineProcess) -> bool:
    stats = engine.stats()
    return stats is not None and stats.running == stats.waiting == 0


class Picture:
    """A web server for pictures on loopback that counts who comes, and answers while it is open."""

    def __init__(self, answer: bytes) -> None:
        self.hits, self.answer = 0, answer
        self.open = threading.Event()
        self.open.set()
        self._listener = socket.create_server((HOST, 0))
        self.url = f"http://{HOST}:{self._listener.getsockname()[1]}/picture.png?secret=token"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.hits += 1
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.recv(65536)
            self.open.wait(PATIENCE)
            connection.sendall(self.answer)

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def web(answer: bytes) -> Iterator[Picture]:
    found = Picture(answer)
    try:
        yield found
    finally:
        found.close()


def http_ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s" % (
        len(body),
        body,
    )


def test_private_addresses_are_never_connected_to(server: RunningServer) -> None:
    """No connection is made."""
    with web(http_ok(picture())) as site:
        assert_error(server.post(chat(image_url(site.url))), 400, "image_url_forbidden", "messages[0].content[0]")
        assert site.hits == 0


def test_a_url_is_fetched_once_for_a_burst(
    processor: Processor, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that want one picture at the same time share one fetch, tenants do not share theirs."""
    fly, wanted = MediaLoader._fly, list[str]()

    async def noted(self: MediaLoader, url: str, policy: MediaPolicy, tenant: str) -> bytes:
        wanted.append(tenant)
        return await fly(self, url, policy, tenant)

    def at_the_same_time(server: RunningServer, site: Picture, bodies: list[dict[str, Any]]) -> list[httpx2.Response]:
        """The site answers once all pictures are wanted, two by each request."""
        wanted.clear()
        site.open.clear()
        with ThreadPoolExecutor(len(bodies)) as clients:
            answers = [clients.submit(server.post, body) for body in bodies]
            eventually(lambda: len(wanted) == 2 * len(bodies))
            site.open.set()
            return [answer.result() for answer in answers]

    monkeypatch.setattr(MediaLoader, "_fly", noted)
    with running(processor, engine, allow_private_addresses=True) as server, web(http_ok(picture(seed=5))) as site:
        body = chat(image_url(site.url), image_url(site.url), "x")
        answers = at_the_same_time(server, site, [body] * 12)
        assert [answer.status_code for answer in answers] == [200] * 12
        assert site.hits == 1
        inline = server.post(chat(image_part(picture(seed=5)), image_part(picture(seed=5)), "x"))
        assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {
            inline.json()["choices"][0]["message"]["content"]
        }
        other_tenant = {**body, "cache_salt": "other"}
        assert server.post(other_tenant).status_code == 200
        assert site.hits == 2
        tenants = [{**body, "cache_salt": tenant} for tenant in ["one", "two", "three"] * 2]
        assert {answer.status_code for answer in at_the_same_time(server, site, tenants)} == {200}
        assert site.hits == 5


def test_slow_and_failing_sites_cost_only_their_request(processor: Processor, engine: EngineProcess) -> None:
    """A site that is slow, has no such page, sends too much, no picture or no HTTP."""
    options = {"allow_private_addresses": True, "max_image_bytes": 50_000}
    with (
        running(processor, engine, **options) as patient,
        running(processor, engine, **options, image_timeout=1.0) as hurried,
    ):
        alone = ask_good(patient)
        cases: list[tuple[RunningServer, bytes, str]] = [
            (hurried, b"", "image_fetch_timeout"),
            (
                patient,
                b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
                "image_fetch_failed",
            ),
            (patient, http_ok(b"\0" * 60_000), "image_too_large"),
            (patient, http_ok(b"nothing"), "image_decode_failed"),
            (patient, b"what", "image_fetch_failed"),
        ]
        for server, answer, code in cases:
            with web(answer) as site:
                if not answer:
                    site.open.clear()

                def fetch(server: RunningServer = server, url: str = site.url, code: str = code) -> None:
                    response = server.post(chat(image_url(url)))
                    assert_error(response, 400, code, "messages[0].content[0]")
                    assert "secret" not in response.text

                assert_unharmed(server, alone, fetch)


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
