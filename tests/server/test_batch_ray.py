"""`siglane batch --ray`: the bytes of a batch without it, whatever happens to the workers. `make test-ray` runs it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from test_batch_command import files_of, words, write_requests
from waiting import PATIENCE, lines_of, wait_for_lines

from siglane.batch import cluster as cluster_module
from siglane.batch.cluster import RayServer, Serving, Workers
from siglane.batch.form import Answer
from siglane.batch.output import Output
from siglane.batch.pool import Server
from siglane.batch.requests import open_requests
from siglane.batch.run import Plan, run_batch
from siglane.cli.main import main
from siglane.errors import EngineError, UserError

pytest.importorskip("ray", reason="Ray is not installed here; `make test-ray` has it")
pytestmark = pytest.mark.ray
START_SECONDS = 240.0  # Ray takes its time to start beside other suites
WORKERS = ("--ray-workers", "2", "--ray-cpus", "0.5")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_requests(tmp_path_factory.mktemp("ray") / "in.jsonl", 200)


@pytest.fixture(scope="module")
def whole(source: Path, nvila_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a batch without Ray writes."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    assert main(words(nvila_folder, source, out)) == 0
    return out


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray that runs before and after the batches."""
    import ray

    context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    address = context.address_info["gcs_address"]
    yield address
    ray.shutdown()


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "siglane.cli.main", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def workers() -> list[int]:
    """Processes of workers that have an engine."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdecimal() and (folder / "cmdline").read_bytes().startswith(b"ray::_Worker"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_a_worker_is_killed_in_the_middle(
    cluster: str, source: Path, whole: Path, nvila_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    with start(words(nvila_folder, source, out, "--ray", cluster, *WORKERS, "--max-running", "2")) as process:
        wait_for_lines(out, 20, process, START_SECONDS)
        before = workers()
        os.kill(before[0], signal.SIGKILL)
        rows = lines_of(out)
        said, errors = process.communicate(timeout=PATIENCE)
    assert len(before) == 2
    assert rows < 150
    assert process.returncode == 0, errors
    assert "2 workers with 0.5 CPUs and 0 GPUs each" in errors
    assert "a Ray worker died, another one takes its place" in errors, errors
    assert said.startswith(f"{out}: 180 answered, 20 failed, 0 found there")
    assert files_of(out) == files_of(whole)


def test_stopped_on_a_ray_of_its_own_it_is_continued_without(
    source: Path, whole: Path, nvila_folder: Path, tmp_path: Path
) -> None:
    """And leaves no process behind."""
    out = tmp_path / "out.jsonl"
    before = workers()
    with start(words(nvila_folder, source, out, "--ray-workers", "1", "--max-running", "2", "--ray")) as process:
        wait_for_lines(out, 10, process, START_SECONDS)
        assert len(workers()) == len(before) + 1
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3, errors
    assert errors.endswith("the batch was stopped; the same command continues it\n")
    assert workers() == before
    assert 10 <= lines_of(out) < 180
    assert main(words(nvila_folder, source, out)) == 0
    assert files_of(out) == files_of(whole)


def serving(deadly: tuple[str, ...] = (), late: float = 0, fails: Exception | None = None) -> Serving:
    """Servers that answer with their process's id, and die under texts; pickled whole, as no worker knows this file."""

    class Echo:
        slots = 4

        async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
            text = body["messages"][0]["content"]
            await asyncio.sleep(0.01)
            if text in deadly:
                os._exit(1)
            choices = [{"index": 0, "text": text}]
            return Answer(200, {"id": "x", "choices": choices, "usage": {}, "process": os.getpid()})

    @contextmanager
    def serve() -> Iterator[AbstractAsyncContextManager[Server]]:
        time.sleep(late)
        if fails is not None:
            raise fails
        yield nullcontext(Echo())

    return serve


def answer(source: Path, out: Path, workers: Workers, serving: Serving, count: int = 2) -> Output:
    async def go() -> None:
        async with RayServer(serving, workers, count) as server:
            await run_batch(open_requests(source, 1 << 20).rows, server, output, Plan(), stop=asyncio.Event())

    with Output(out, {}) as output:
        asyncio.run(go())
    return output


def write_texts(path: Path, *texts: str) -> Path:
    lines = []
    for number, text in enumerate(texts):
        body = {"messages": [{"role": "user", "content": text}]}
        lines.append(json.dumps({"custom_id": str(number), "url": "/v1/chat/completions", "body": body}))
    path.write_text("\n".join(lines))
    return path


def test_a_row_that_kills_its_worker_twice_is_an_error(cluster: str, tmp_path: Path) -> None:
    source = write_texts(tmp_path / "in.jsonl", *["good"] * 10, "deadly", *["good"] * 29)
    output = answer(source, tmp_path / "out.jsonl", Workers(cpus=0.5), serving(deadly=("deadly",)))
    assert output.failures == {"engine_died": 1}
    found = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in found] == [str(number) for number in range(40) if number != 10]
    assert len({row["response"]["body"]["process"] for row in found}) >= 2


def test_workers_that_do_not_start(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is there answers all rows; when nobody is, the reason is said, as it was over there."""
    source, out = write_texts(tmp_path / "in.jsonl", *["good"] * 20), tmp_path / "out.jsonl"
    assert answer(source, out, Workers(cpus=1), serving(), count=9).answered == 20  # two of them fit
    source = write_texts(tmp_path / "in.jsonl", *["good"] * 20)
    with pytest.raises(UserError, match="no such model") as raised:
        answer(source, out, Workers(cpus=0.5), serving(fails=UserError("no such model", code="x")))
    assert (raised.value.code, raised.value.exit_code) == ("x", 2)
    with pytest.raises(EngineError, match="a Ray worker failed: ZeroDivisionError: by zero"):
        answer(source, out, Workers(cpus=0.5), serving(fails=ZeroDivisionError("by zero")))
    with pytest.raises(UserError, match=r"no worker with 0\.5 CPUs and 0 GPUs in 0\.5 seconds"):
        answer(source, out, Workers(cpus=0.5, patience=0.5), serving(late=2))
    monkeypatch.setattr(cluster_module, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(cluster_module, "STARTS", 2)
    with pytest.raises(EngineError, match="a Ray worker died 2 times while it started"):
        answer(source, out, Workers(cpus=0.5), exiting, count=1)


@contextmanager
def exiting() -> Iterator[AbstractAsyncContextManager[Server]]:
    os._exit(1)
    yield


def test_mistakes_are_one_line(
    source: Path, nvila_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        free = f"127.0.0.1:{other.getsockname()[1]}"
    for more, complaint in (
        (("--ray", free), f"cannot use the Ray at {free}: Connection refused"),
        (("--ray", "somewhere"), "cannot use the Ray at somewhere: it is no host:port"),
        (("--ray", "ray://127.0.0.1:10001"), "it is no host:port; start the batch on a node of the cluster"),
        (("--ray", "--ray-cpus", "0"), "ray_cpus or ray_gpus must be above 0"),
        (("--ray", "--ray-workers", "0"), "ray_workers must be at least 1"),
        (("--ray-workers", "2"), "--ray-workers belongs to --ray, which is missing"),
        (("--ray", "--retries", "2"), "--retries belongs to --base-url, which is missing"),
    ):
        assert main(words(nvila_folder, source, tmp_path / "out.jsonl", *more)) == 2
        said = capsys.readouterr().err.strip()
        assert complaint in said
        assert len(said.splitlines()) == 1
    remote = ["batch", "m", "-i", str(source), "-o", str(tmp_path / "out.jsonl"), "--base-url", "http://127.0.0.1:1"]
    assert main([*remote, "--ray"]) == 2
    assert "--ray has no effect with --base-url" in capsys.readouterr().err
