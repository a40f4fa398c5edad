"""Clients that leave, engines that die, servers that are told to stop."""

from __future__ import annotations

import functools
import json
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import APIError
from ports import free_port
from serving import GOOD, HOST, RunningServer, Told, assert_error, at_rest, chat, head, running, stream, told_by
from waiting import PATIENCE, eventually

from siglane.engine.engine import EngineStats
from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor
from siglane.server.launch import preflight
from siglane.settings.server import ServerConfig

LONG = chat("x", max_tokens=4000, ignore_eos=True)


def send(server: RunningServer, body: dict[str, Any]) -> socket.socket:
    connection = server.connect()
    data = json.dumps(body).encode()
    connection.sendall(head(content_length=len(data)) + data)
    return connection


def cancelled(server: RunningServer) -> float:
    return server.metric("siglane_requests_total", outcome="cancelled")


def working(engine: EngineProcess) -> int:
    stats = engine.stats()
    assert stats is not None
    return stats.running + stats.waiting


def figures(server: RunningServer) -> EngineStats:
    return at_rest(server.served.engine, lambda: server.post(chat("x", max_tokens=1)))


def test_clients_that_leave_in_a_hurry_leave_nothing_behind(server: RunningServer, engine: EngineProcess) -> None:
    before, tokens = cancelled(server), figures(server).computed_tokens
    for number in range(60):
        connection = send(server, {**LONG, "stream": bool(number % 2)})
        time.sleep(number % 10 / 2000)
        connection.close()
    eventually(lambda: cancelled(server) == before + 60)
    assert figures(server).computed_tokens - tokens < 10 * LONG["max_tokens"], "nobody reads what is computed"
    eventually(lambda: server.metric("siglane_requests_in_flight") == 0)


def test_several_requests_on_one_connection(server: RunningServer) -> None:
    """A finished request must not be taken for one whose client left, nor the other way round."""
    before = cancelled(server)
    with server.http() as client:
        for number in range(20):
            body = chat("x", max_tokens=2, stream=bool(number % 2))
            assert client.post("/v1/chat/completions", json=body).status_code == 200
        seconds = []
        for _ in range(20):
            began = time.monotonic()
            assert client.get("/v1/models").status_code == 200
            seconds.append(time.monotonic() - began)
    assert min(seconds) < 0.03, "an answer waits for the acknowledgement of its header"
    with server.connect() as connection:  # both at once
        data = json.dumps(chat("x", max_tokens=2)).encode()
        kept, last = head(content_length=len(data)), head(content_length=len(data), connection="close")
        connection.sendall((kept + data) * 2 + last + data)
        answers = b""
        while found := connection.recv(65536):
            answers += found
    assert answers.count(b"HTTP/1.1 200 OK") == 3
    assert cancelled(server) == before


def test_a_silent_stream_says_that_it_lives(
    processor: Processor, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Comments come while nothing else does, also before the first token, and clients do not see them."""
    submit, held = engine.submit, list[Callable[[], None]]()
    monkeypatch.setattr(engine, "submit", lambda *arguments: held.append(functools.partial(submit, *arguments)))
    body = chat("x", stream=True)
    with running(processor, engine, sse_keep_alive=0.1) as server:
        with server.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert [next(lines) for _ in range(6)] == [": keep-alive", ""] * 3
            held.pop()()
            assert told_by(lines).done
        monkeypatch.setattr(engine, "submit", lambda *arguments: threading.Timer(0.5, submit, arguments).start())
        with server.openai() as openai:
            events = list(openai.chat.completions.create(**body))
        assert events[-1].choices[0].finish_reason == "length"


@pytest.mark.slow
def test_draining_lets_requests_finish_and_refuses_new_ones(processor: Processor, engine: EngineProcess) -> None:
    """What SIGTERM begins, without the signal."""
    with running(processor, engine, drain_timeout=PATIENCE) as server:
        body = {**GOOD, "max_tokens": 800, "cache_salt": "drain"}
        stream(server, body)  # from here on the prompt is cached
        alone = stream(server, body)
        refused: list[httpx2.Response] = []
        drained = threading.Event()

        def drain() -> None:
            if drained.is_set():
                return
            drained.set()
            server.server.drain()
            refused.append(server.post(chat("x")))
            with server.http() as client:
                refused.append(client.get("/ready"))
                assert client.get("/health").status_code == 200

        beside = stream(server, body, drain)
        for response in refused:
            assert_error(response, 503, "server_shutting_down")
        assert (beside.text, beside.tokens, beside.usage) == (alone.text, alone.tokens, alone.usage)
        server.thread.join(timeout=PATIENCE)
        assert not server.thread.is_alive()
        with pytest.raises(OSError, match="refused"):
            server.connect()


def test_what_does_not_finish_in_time_ends_with_an_error(processor: Processor, engine: EngineProcess) -> None:
    """An error event and no finish_reason; a client that waits for the whole answer gets a 503."""
    with running(processor, engine, drain_timeout=0.3) as server:
        whole: list[httpx2.Response] = []
        waiting = threading.Thread(target=lambda: whole.append(server.post({**LONG, "n": 4})))
        waiting.start()
        eventually(lambda: server.metric("siglane_requests_in_flight") == 1)

        def drain_once() -> None:
            if not server.served.draining:
                server.server.drain()

        told = stream(server, {**LONG, "n": 4}, drain_once)
        waiting.join()
        assert told.error is not None
        assert told.error["code"] == "server_shutting_down"
        assert told.error["type"] == "server_error"
        assert told.done
        assert told.finish_reasons == []
        assert len(told.text) > 0
        assert_error(whole[0], 503, "server_shutting_down")
        server.thread.join(timeout=PATIENCE)
        assert not server.thread.is_alive()
    eventually(lambda: working(engine) == 0)


def test_a_failed_stream_raises_in_openai_s_client(processor: Processor, engine: EngineProcess) -> None:
    with running(processor, engine, drain_timeout=0.0) as server, server.openai() as client:
        body = chat("x", max_tokens=4000, stream=True)
        events = client.chat.completions.create(**body, extra_body={"ignore_eos": True})
        next(iter(events))
        server.server.drain()
        with pytest.raises(APIError) as caught:
            for _ in events:
                pass
        assert caught.value.code == "server_shutting_down"


def test_a_folder_and_an_id_of_the_hub_are_taken_for_a_model(nvila_folder: Path) -> None:
    for model in (str(nvila_folder), "owner/name"):
        preflight(ServerConfig(port=0), model).close()


PROGRAM = """
import sys
from siglane.settings.server import ServerConfig
from siglane.errors import SiglaneError
from siglane.server.launch import preflight, serve
config = ServerConfig(port=int(sys.argv[2]), served_model_name="tiny")
try:
    listener = preflight(config, sys.argv[1])
    from siglane.settings.engine import EngineConfig
    from siglane.engine.process.child import EngineSpec
    sys.exit(serve(config, EngineSpec(sys.argv[1], EngineConfig(device="cpu", threads=1)), listener))
except SiglaneError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


class Process:
    """The server as users run it; its log goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.log = process, log
        self.url = f"http://{HOST}:{port}"

    def end(self) -> tuple[int, list[str]]:
        """Exit code and log lines."""
        return self.process.wait(timeout=PATIENCE), self.log.read_text().splitlines()

    def is_ready(self) -> bool:
        assert self.process.poll() is None
        try:
            return httpx2.get(f"{self.url}/ready", trust_env=False).status_code == 200
        except httpx2.HTTPError:
            return False

    def stream_until_signal(self, signals: list[int], body: dict[str, Any]) -> Told:
        """A long answer; the signals come, one by one, after its first chunk."""

        def on_chunk() -> None:
            while signals:
                self.process.send_signal(signals.pop(0))
                time.sleep(0.2)

        with httpx2.stream(
            "POST",
            f"{self.url}/v1/chat/completions",
            json={**body, "stream": True},
            timeout=PATIENCE,
            trust_env=False,
        ) as answer:
            return told_by(answer.iter_lines(), on_chunk)


@contextmanager
def process_of(model: Path, log: Path, port: int = 0) -> Iterator[Process]:
    port = port or free_port()
    command = [sys.executable, "-c", PROGRAM, str(model), str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        yield Process(process, port, log)
    finally:
        process.kill()
        process.wait()


def test_a_port_in_use_costs_no_time(nvila_folder: Path, tmp_path: Path) -> None:
    """One line, long before torch is loaded."""
    with socket.create_server((HOST, 0)) as taken:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with process_of(nvila_folder, tmp_path / "log", taken.getsockname()[1]) as server:
            code, log = server.end()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 2
    assert len(log) == 1
    assert "in use" in log[0]
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_the_checks_before_loading_load_nothing_heavy() -> None:
    """So that a mistake in the command line is told at once."""
    heavy = "{'torch', 'transformers', 'fastapi'}"
    program = f"import sys, siglane.server.launch, siglane.settings.server; print({heavy} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
