"""Clients that leave, engines that die, servers that are told to stop."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
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
from serving import (
    GOOD,
    HOST,
    RunningServer,
    Told,
    ask_good,
    assert_error,
    assert_unharmed,
    at_rest,
    chat,
    head,
    image_part,
    picture,
    running,
    stream,
    told_by,
)
from waiting import PATIENCE, eventually, wait_while

from siglane.engine.engine import EngineStats
from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess
from siglane.errors import UserError
from siglane.families.processor import Processor
from siglane.image.patchify import to_patches
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


PHASES = ["preparing", "generating", "streaming"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_client_that_leaves_frees_its_place(
    server: RunningServer,
    engine: EngineProcess,
    processor: Processor,
    alone: Told,
    phase: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before its prefill, in the middle of a stream or waiting for a whole answer: it is cancelled and counted so."""
    prepares, left = threading.Event(), threading.Event()

    def slowly(image: Any, *others: Any) -> Any:
        if image.size == (33, 33):
            prepares.set()
            left.wait(PATIENCE)
        return to_patches(image, *others)

    monkeypatch.setattr("siglane.image.patchify.to_patches", slowly)
    before, tokens = cancelled(server), figures(server).computed_tokens

    def leave() -> None:
        body = {**LONG, "n": 2, "stream": phase == "streaming"}
        if phase == "preparing":
            body |= chat(image_part(picture(33, 33, seed=4242)), max_tokens=4000)  # no other test has decoded it
        connection = send(server, body)
        if phase == "preparing":
            assert prepares.wait(PATIENCE)
        if phase == "generating":
            eventually(lambda: working(engine) >= 2)
        if phase == "streaming":
            assert b" 200 " in connection.recv(4096)
        connection.close()
        eventually(lambda: cancelled(server) == before + 1)
        left.set()

    assert_unharmed(server, alone, leave)
    eventually(lambda: server.served.inflight_bytes.used == 0)
    stats = figures(server)
    assert stats.computed_tokens - tokens < LONG["max_tokens"], "nobody reads what is computed"
    assert stats.pages_free + stats.pages_cached == stats.pages_total


def test_clients_that_leave_in_a_hurry_leave_nothing_behind(server: RunningServer, engine: EngineProcess) -> None:
    before, tokens = cancelled(server), figures(server).computed_tokens
    for number in range(60):
        connection = send(server, {**LONG, "stream": bool(number % 2)})
        time.sleep(number % 10 / 2000)
        connection.close()
    eventually(lambda: cancelled(server) == before + 60)
    assert figures(server).computed_tokens - tokens < 10 * LONG["max_tokens"], "nobody reads what is computed"
    eventually(lambda: server.metric("siglane_requests_in_flight") == 0)


def test_a_client_may_leave_while_it_sends(server: RunningServer, engine: EngineProcess) -> None:
    before = cancelled(server)
    with server.connect() as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        connection.sendall(b"content-length: 1000\r\n\r\n{")
        eventually(lambda: server.served.inflight_bytes.used > 0)
    eventually(lambda: cancelled(server) == before + 1)
    eventually(lambda: server.served.inflight_bytes.used == 0)


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


@pytest.mark.slow  # the engine is started twice
def test_an_engine_that_dies_takes_its_requests_and_comes_back(
    processor: Processor, spec: EngineSpec, tmp_path: Path
) -> None:
    """A killed engine never looks like a clean end: its requests get an error, and it is started again."""
    held = tmp_path / "held"
    engine = EngineProcess(spec, prepare=functools.partial(wait_while, held))
    try:
        with running(processor, engine) as server, server.http() as client:
            assert_error(client.get("/ready"), 503, "engine_starting")
            assert client.get("/health").status_code == 200
            assert client.get("/metrics").status_code == 200
            assert_error(server.post(chat("x")), 503, "engine_starting")
            engine.start()
            before = ask_good(server)
            whole: list[httpx2.Response] = []
            waiting = threading.Thread(target=lambda: whole.append(server.post(LONG)))
            waiting.start()
            eventually(lambda: server.metric("siglane_requests_in_flight") == 1)

            def kill() -> None:
                if engine.state == "ready" and not whole:
                    assert engine.pid is not None
                    held.touch()
                    os.kill(engine.pid, signal.SIGKILL)
                    eventually(lambda: engine.state == "restarting")
                    assert_error(client.get("/health"), 503, "engine_restarting")
                    assert_error(client.get("/ready"), 503, "engine_restarting")

            told = stream(server, LONG, kill)
            waiting.join()
            assert told.error is not None
            assert told.error["code"] == "engine_restarting"
            assert told.finish_reasons == []
            assert_error(whole[0], 503, "engine_restarting")
            held.unlink()
            eventually(lambda: engine.state == "ready")
            after = ask_good(server)
            assert (after.text, after.tokens) == (before.text, before.tokens)
            engine.close()
            assert_error(client.get("/health"), 503, "engine_down")
            assert_error(server.post(chat("x")), 503, "engine_down")
    finally:
        engine.close()


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


def test_what_cannot_work_is_said_before_anything_is_loaded(nvila_folder: Path, tmp_path: Path) -> None:
    """A port in use, an address of another machine, a model or media folder that is not there."""
    config = ServerConfig(port=0)
    preflight(config, str(nvila_folder)).close()
    preflight(config, "owner/name").close()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    with socket.create_server((HOST, 0)) as taken:
        cases: list[tuple[ServerConfig, str, str]] = [
            (ServerConfig(port=taken.getsockname()[1]), str(nvila_folder), "in use"),
            (ServerConfig(host="203.0.113.1", port=0), str(nvila_folder), "cannot listen"),
            (config, str(tmp_path / "missing"), "no folder"),
            (config, "not a/hub/id", "no folder"),
            (config, str(tmp_path), "no config.json"),
            (config, str(broken), "config.json is not valid JSON"),
            (ServerConfig(port=0, allowed_local_media_path=str(tmp_path / "x")), str(nvila_folder), "not a folder"),
        ]
        for options, model, words in cases:
            with pytest.raises(UserError, match=words):
                preflight(options, model)


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

    def stream_until_signal(self, signals: list[int], **fields: Any) -> Told:
        """A long request; the signals come, one by one, after its first chunk."""

        def on_chunk() -> None:
            while signals:
                self.process.send_signal(signals.pop(0))
                time.sleep(0.2)

        body = {**LONG, **fields, "stream": True}
        with httpx2.stream(
            "POST", f"{self.url}/v1/chat/completions", json=body, timeout=PATIENCE, trust_env=False
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


@pytest.mark.slow  # two servers are started
def test_signals_end_a_server_cleanly(nvila_folder: Path, tmp_path: Path) -> None:
    """The first lets requests finish, the second ends them; both exit with 0."""
    with process_of(nvila_folder, tmp_path / "1") as patient, process_of(nvila_folder, tmp_path / "2") as hurried:
        for server in (patient, hurried):
            eventually(server.is_ready)
        finished = patient.stream_until_signal([signal.SIGTERM], max_tokens=300)
        assert finished.finish_reasons == ["length"]
        cut = hurried.stream_until_signal([signal.SIGINT, signal.SIGTERM])
        assert cut.error is not None
        assert cut.error["code"] == "server_shutting_down"
        assert cut.finish_reasons == []
        for server in (patient, hurried):
            code, log = server.end()
            assert code == 0
            assert any("POST /v1/chat/completions: " in line for line in log)
            assert not any("Traceback" in line for line in log)


@pytest.mark.slow  # a server is started
def test_a_model_that_cannot_be_loaded_ends_the_server(nvila_folder: Path, tmp_path: Path) -> None:
    """Truncated weights: the engine's process says why, and the server ends with its words and the user's exit code."""
    broken = tmp_path / "broken"
    shutil.copytree(nvila_folder, broken)
    for path in broken.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:1000])
    with process_of(broken, tmp_path / "log") as server:
        code, log = server.end()
    assert code == 2
    assert "safetensors" in log[-1]


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
