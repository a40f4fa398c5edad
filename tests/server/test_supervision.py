"""Engines that hang, and servers as a supervisor runs them: what they answer, log and exit with.

`PROGRAM` is `siglane serve` whose engine fails, hangs or writes to stderr when a client asks for it: the engine's
process runs it too, up to the last line.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from ports import free_port
from serving import (
    CHAT,
    HOST,
    Told,
    ask_good,
    assert_error,
    chat,
    config_of,
    data_url,
    image_part,
    listening,
    picture,
    running,
    stream,
    told_by,
)
from two_tower_checkpoint import write_two_tower_checkpoint
from waiting import PATIENCE, eventually, wait_while

from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor
from siglane.server.launch import serving
from siglane.settings.engine import EngineConfig

LONG = chat("x", max_tokens=4000, ignore_eos=True)
HUNG_AFTER = 2.0


@pytest.mark.slow
def test_a_stopped_engine_is_noticed_and_replaced(processor: Processor, spec: EngineSpec, tmp_path: Path) -> None:
    """Its requests get an error, the server says so meanwhile, and whoever comes next gets what came before."""
    held = tmp_path / "held"
    spec = replace(spec, config=replace(spec.config, engine_timeout=HUNG_AFTER))
    engine = EngineProcess(spec, prepare=functools.partial(wait_while, held))
    engine.start()
    held.touch()
    try:
        with running(processor, engine) as server, server.http() as client:
            before, pid = ask_good(server), engine.pid
            assert pid is not None
            whole: list[httpx2.Response] = []
            waiting = threading.Thread(target=lambda: whole.append(server.post(LONG)))
            waiting.start()
            eventually(lambda: server.metric("siglane_requests_in_flight") == 1)

            stop = iter([lambda: os.kill(pid, signal.SIGSTOP)])
            told = stream(server, LONG, lambda: next(stop, lambda: None)())
            waiting.join()
            assert told.error is not None
            assert told.error["code"] == "engine_restarting"
            assert told.finish_reasons == []
            assert_error(whole[0], 503, "engine_restarting")
            for path in ("/health", "/ready"):
                assert_error(client.get(path), 503, "engine_restarting")
            held.unlink()
            eventually(lambda: engine.state == "ready")
            after = ask_good(server)
            assert (after.text, after.tokens, after.usage) == (before.text, before.tokens, before.usage)
            assert client.get("/health").status_code == 200
    finally:
        engine.close()


def hang_in_the_tower(flag: Path) -> None:
    """In the child, before it loads: while `flag` exists, a block of a vision tower does not end."""
    from siglane.nn.encoder import EncoderBlock

    forward = EncoderBlock.forward

    def stuck(self: EncoderBlock, *arguments: Any, **options: Any) -> Any:
        while flag.exists():
            time.sleep(0.01)
        return forward(self, *arguments, **options)

    EncoderBlock.forward = stuck  # type: ignore[method-assign]


@pytest.mark.slow  # an engine is started twice
def test_a_tagger_that_hangs_in_its_tower_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_two_tower_checkpoint(tmp_path / "model", "siglip2")
    flag = tmp_path / "flag"
    prepared = functools.partial(EngineProcess, prepare=functools.partial(hang_in_the_tower, flag))
    monkeypatch.setattr("siglane.engine.process.supervisor.EngineProcess", lambda spec, *_, **__: prepared(spec))
    config = EngineConfig(device="cpu", threads=1, engine_timeout=HUNG_AFTER)
    with serving(config_of(), EngineSpec(str(tmp_path / "model"), config)) as served, listening(served) as server:
        served.engine.wait_ready()
        body = {"input": [{"image": data_url(picture())}]}
        before = server.post_to("/v1/embeddings", **body).json()["data"]
        flag.touch()
        lost = server.post_to("/v1/embeddings", **body)
        flag.unlink()
        assert_error(lost, 503, "engine_restarting")
        served.engine.wait_ready()
        after = server.post_to("/v1/embeddings", **body).json()["data"]
        for one, other in zip(before, after, strict=True):
            assert np.array_equal(one["embedding"], other["embedding"])


PROGRAM = """
import os, sys
from siglane.engine.device import Device

forward = Device.forward

def faulty(self, batch):
    asked = {chunk.sequence.request.max_tokens for chunk in batch.chunks}
    if 7 in asked:
        raise RuntimeError("two\\nlines")
    if 9 in asked:
        os.write(2, b"raw words of a library\\nand {half a line")
    return forward(self, batch)

Device.forward = faulty

if __name__ == "__main__":
    from siglane.cli.main import main

    sys.exit(main(sys.argv[1:]))
"""


class Process:
    """A server as a supervisor runs it; its log goes to a file."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.log = process, log
        self.http = httpx2.Client(base_url=f"http://{HOST}:{port}", timeout=PATIENCE, trust_env=False)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Every line that stderr has; all of them are JSON objects."""
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        assert all({"time", "level", "logger", "message"} <= set(line) for line in found)
        return found

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.http.get("/ready").status_code == 200
        except httpx2.HTTPError:
            return False

    def ask(self, **fields: Any) -> httpx2.Response:
        headers = {"x-request-id": fields.pop("request_id", "none")}
        return self.http.post(CHAT, json=chat("x", **fields), headers=headers)

    def engine(self) -> int | None:
        """The engine's pid: the youngest below the process that children come from."""
        return max((pid for one in children(self.process.pid) for pid in children(one)), default=None)


def children(pid: int) -> list[int]:
    """Of all its threads; none of a process that has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def cpu_ticks(pid: int) -> int:
    """All the work that a process has done."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


@contextmanager
def server_of(folder: Path, tmp_path: Path, *flags: str) -> Iterator[Process]:
    port = free_port()
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py"), "serve", str(folder), "--port", str(port), *flags]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--device", "cpu", "--threads", "1", "--kv-tokens", "8192", "--served-model-name", "tiny"],
            stderr=log,
            stdout=log,
        )
    try:
        yield Process(process, port, tmp_path / "log")
    finally:
        process.kill()
        process.wait()


def failures(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "exception" in line]


@pytest.mark.slow  # a server is started
def test_every_line_of_a_server_s_log_is_json(nvila_folder: Path, tmp_path: Path) -> None:
    """From start to stop, with mistakes of clients, a failing request, a library's words, an engine that dies and one
    that is stopped when the server is told to end."""
    with server_of(nvila_folder, tmp_path, "--log-format", "json", "--drain-timeout", "1") as server:
        eventually(server.is_ready)
        for mistake in ({"max_tokens": -1}, {"temperature": 9}, {"stop_token_ids": [10**6]}, {"model": "other"}):
            assert 400 <= server.ask(**mistake).status_code < 500
        broken = {"messages": [{"role": "user", "content": [image_part(b"no picture")]}]}
        assert server.http.post(CHAT, json={**chat("x"), **broken}).status_code == 400
        assert server.http.post(CHAT, content=b"{", headers={"content-type": "application/json"}).status_code == 400
        assert failures(server.lines) == []

        assert_error(server.ask(max_tokens=7, request_id="the-failing-one"), 500)

        def lines_of_it() -> list[dict[str, Any]]:
            return [line for line in server.lines if line.get("request_id") == "the-failing-one"]

        eventually(lambda: len(lines_of_it()) == 2)  # and its access line, behind its answer
        (failure,) = failures(lines_of_it())
        assert failure["logger"] == "siglane.engine.engine"
        assert "two\nlines" in failure["exception"]

        assert server.ask(max_tokens=9).status_code == 200
        eventually(lambda: "raw words of a library" in [line["message"] for line in server.lines])
        pid = server.engine()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: any("killed by SIGKILL" in line["message"] for line in server.lines))
        eventually(server.is_ready)
        stopped = server.engine()
        assert stopped not in (None, pid)
        assert cpu_ticks(stopped) < cpu_ticks(parent(stopped)) / 2, "a restart imports everything again"
        assert server.ask().status_code == 200

        def stop_and_terminate() -> None:
            os.kill(stopped, signal.SIGSTOP)
            server.process.send_signal(signal.SIGTERM)

        actions = iter([stop_and_terminate])
        told: Told
        with server.http.stream("POST", CHAT, json={**LONG, "stream": True}) as answer:
            told = told_by(answer.iter_lines(), lambda: next(actions, lambda: None)())
        assert told.error is not None
        assert told.error["code"] == "server_shutting_down"
        assert server.process.wait(timeout=PATIENCE) == 0
        assert len(failures(server.lines)) == 1
        assert not Path(f"/proc/{stopped}").exists() or "Z" in Path(f"/proc/{stopped}/stat").read_text()


@pytest.mark.slow  # a server is started
def test_a_server_whose_engine_dies_again_and_again_ends(nvila_folder: Path, tmp_path: Path) -> None:
    """With one sentence and an exit code that a supervisor takes for a failure."""
    killed: set[int] = set()
    with server_of(nvila_folder, tmp_path, "--log-format", "json") as server:
        eventually(server.is_ready)

        def killed_until_it_ends() -> bool:
            pid = server.engine()
            if pid is not None and pid not in killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
            return server.process.poll() is not None

        eventually(killed_until_it_ends)
        assert server.process.returncode == 1
        last = [line["message"] for line in server.lines][-1]
        assert "the engine process died 6 times in 300 seconds, the last time killed by SIGKILL" in last
        assert failures(server.lines) == []
    assert len(killed) == 6


def test_what_is_wrong_before_the_start_is_json_too(nvila_folder: Path) -> None:
    with socket.create_server((HOST, 0)) as taken:
        flags = ["--log-format", "json", "--port", str(taken.getsockname()[1])]
        command = [sys.executable, "-m", "siglane.cli.main", "serve", str(nvila_folder), *flags]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 2
    (line,) = map(json.loads, ended.stderr.splitlines())
    assert "in use" in line["message"]
