"""`siglane batch` with a real engine: answers are those of the HTTP server, and no kill changes them."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from serving import MODEL, RunningServer, at_rest, chat, config_of, data_url, image_part, image_url, picture
from waiting import PATIENCE, eventually, lines_of, wait_for_lines

from siglane.batch.form import Answer
from siglane.batch.output import Output
from siglane.batch.requests import open_requests
from siglane.batch.run import Plan, run_batch
from siglane.cli.main import main
from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess
from siglane.families.pipeline import MediaPipeline
from siglane.families.processor import Processor
from siglane.server.local import LocalServer
from siglane.server.metrics import Metrics
from siglane.server.served import ChatModel, Deployment, Served
from siglane.settings.engine import EngineConfig
from siglane.types import Prompt, Request

CHAT = "/v1/chat/completions"
HOLDING = Path(__file__).with_name("holding.py")
PICTURES = [picture(40 + number, 30, seed=number) for number in range(3)]


@pytest.fixture
def local(processor: Processor, engine: EngineProcess) -> Iterator[Served]:
    config, metrics = config_of(model_aliases=("other",)), Metrics()
    served = Served(config, engine, metrics, ChatModel(Deployment(MODEL, "x", engine, config, metrics), processor))
    yield served
    served.close()


def ask(served: Served, *bodies: dict[str, Any], url: str = CHAT) -> list[Answer]:
    async def go() -> list[Answer]:
        server = LocalServer(served, 8)
        return await asyncio.gather(*(server.ask(url, body) for body in bodies))

    return asyncio.run(go())


def test_answers_are_the_servers(server: RunningServer, local: Served) -> None:
    bodies = [chat(image_part(one), f"What is {number}?") for number, one in enumerate(PICTURES)]
    for body, found in zip(bodies, ask(local, *bodies), strict=True):
        expected = server.post(body).json()
        assert found.status == 200
        assert found.body["choices"] == expected["choices"]
        assert found.body["usage"]["total_tokens"] == expected["usage"]["total_tokens"]
        assert json.loads(json.dumps(found.body["siglane"])) == expected["siglane"]
    assert local.inflight_bytes.used == 0


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (chat("x", stream=True), 400, "unsupported_field"),
        (chat("x", model="gpt-4o"), 404, "model_not_found"),
        (chat("x", temperature="warm"), 400, "invalid_value"),
        (chat("x", tools=[{"type": "function", "function": {"name": "f"}}]), 400, "unsupported_field"),
        ({"model": MODEL}, 400, "missing_field"),
        (chat(image_url("file:///etc/passwd"), "x"), 400, "local_media_forbidden"),
        (chat(image_url("http://127.0.0.1:1/a.png"), "x"), 400, "image_url_forbidden"),
        (chat(image_url("/etc/passwd"), "x"), 400, "unsupported_url_scheme"),
        (chat(image_url(data_url(b"no picture")), "x"), 400, "image_decode_failed"),
        (chat("x " * 100_000), 400, "context_length_exceeded"),
    ],
)
def test_what_the_server_refuses_is_refused(
    body: dict[str, Any], status: int, code: str, server: RunningServer, local: Served
) -> None:
    bad, good = ask(local, body, chat("hello"))
    assert (bad.status, bad.body["error"]["code"]) == (status, code)
    if not body.get("stream"):
        assert bad.body == server.post(body).json()
    assert good.status == 200


def test_other_urls_and_ignored_fields(local: Served) -> None:
    (found,) = ask(local, {"input": "x"}, url="/v1/embeddings")
    assert (found.status, found.body["error"]["code"]) == (404, "not_found")
    (found,) = ask(local, chat("x", model="other", user="me"))
    assert (found.status, found.ignored) == (200, ("user",))


def test_a_full_server_is_waited_for(local: Served) -> None:
    """Together the requests would hold more than the limit; each alone fits."""
    bodies = [chat(image_part(picture(200, 200, seed=number)), "x") for number in range(6)]
    local.inflight_bytes.limit = 3_000_000
    assert [one.status for one in ask(local, *bodies)] == [200] * 6
    local.inflight_bytes.limit = 1000
    (refused,) = ask(local, bodies[0])
    assert (refused.status, refused.body["error"]["code"]) == (503, "server_overloaded")


@pytest.mark.parametrize("late", [None, pytest.param(5, marks=pytest.mark.slow)])
def test_rows_reach_the_engine_in_order(
    late: int | None, local: Served, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long each takes to be prepared, and whoever is refused; not behind one that takes too long."""
    prompt, submit, seen = ChatModel.prompt, EngineProcess.submit, list[int]()
    others_gone = threading.Event()

    async def slow(self: ChatModel, *arguments: Any) -> Prompt:
        number = arguments[0][0].characters
        if number == late:
            await asyncio.to_thread(others_gone.wait, 30)
        await asyncio.sleep(0.05 * (number % 3))
        return await prompt(self, *arguments)

    def note(self: EngineProcess, requests: Sequence[Request], on_delta: Any) -> None:
        seen.append(requests[0].max_tokens)
        if len(seen) == 8:
            others_gone.set()
        submit(self, requests, on_delta)

    ask(local, chat("x"))  # what renders templates is started
    monkeypatch.setattr(ChatModel, "prompt", slow)
    monkeypatch.setattr(EngineProcess, "submit", note)
    monkeypatch.setattr("siglane.server.local.STRAGGLER_SECONDS", 5.0)
    bodies = [chat("x" * number, max_tokens=number + 1, stream=number == 3) for number in range(10)]
    found = ask(local, *bodies)
    assert [one.status for one in found] == [200] * 3 + [400] + [200] * 6
    assert seen == ([1, 2, 3, 5, 6, 7, 8, 9, 10] if late is None else [1, 2, 3, 5, 7, 8, 9, 10, 6])


def encoded_by(served: Served) -> int:
    return at_rest(served.engine, lambda: ask(served, chat("x", max_tokens=1))).encoded_images


@pytest.mark.slow
def test_each_picture_is_encoded_once(
    nvila_folder: Path, processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight pictures, asked about by five rows each that are spread over the file; the cache holds one."""
    monkeypatch.setattr("siglane.server.local.STRAGGLER_SECONDS", 60.0)
    config = EngineConfig(device="cpu", threads=1, kv_tokens=16384, max_running=4, prefix_cache=False)
    engine = EngineProcess(EngineSpec(str(nvila_folder), replace(config, feature_cache_bytes=5_000)))
    engine.start()
    encoded = {}
    try:
        for window in (1, 64):
            lines = []
            for number in range(40):
                body = chat(image_part(picture(30, 30, seed=100 * window + number % 8)), f"{number}?", max_tokens=1)
                lines.append(json.dumps({"custom_id": str(number), "url": CHAT, "body": body}))
            (tmp_path / "in.jsonl").write_text("\n".join(lines))
            served = Served(
                settings := config_of(), engine, metrics := Metrics(),
                ChatModel(Deployment(MODEL, "x", engine, settings, metrics), processor),
            )  # fmt: skip
            before = encoded_by(served)
            with Output(tmp_path / f"{window}.jsonl", {}) as output:
                rows, plan = open_requests(tmp_path / "in.jsonl", 1 << 20).rows, Plan(window=window)
                asyncio.run(run_batch(rows, LocalServer(served, 4), output, plan, stop=asyncio.Event()))
                assert output.found == 40
                assert not output.failures
            encoded[window] = encoded_by(served) - before
            served.close()
    finally:
        engine.close()
    assert encoded[1] > 20, encoded
    assert encoded[64] == 8


@pytest.mark.slow
def test_ten_pictures_of_200_rows_are_decoded_and_encoded_once(
    nvila_folder: Path, processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(device="cpu", threads=1, kv_tokens=16384, max_running=8, prefix_cache=False)
    engine = EngineProcess(EngineSpec(str(nvila_folder), replace(config, feature_cache_bytes=5_000)))
    engine.start()
    monkeypatch.setattr("siglane.server.local.STRAGGLER_SECONDS", 60.0)
    decoded: list[object] = []
    decode = MediaPipeline.decode
    monkeypatch.setattr(MediaPipeline, "decode", lambda self, item: (decoded.append(item), decode(self, item))[1])
    lines = []
    for number in range(200):
        body = chat(image_part(picture(30, 30, seed=number % 10)), f"{number}?", max_tokens=1)
        lines.append(json.dumps({"custom_id": str(number), "url": CHAT, "body": body}))
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    try:
        served = Served(
            settings := config_of(), engine, metrics := Metrics(),
            ChatModel(Deployment(MODEL, "x", engine, settings, metrics), processor),
        )  # fmt: skip
        with Output(tmp_path / "out.jsonl", {}) as output:
            rows = open_requests(tmp_path / "in.jsonl", 1 << 20).rows
            asyncio.run(run_batch(rows, LocalServer(served, 8), output, Plan(), stop=asyncio.Event()))
            assert output.found == 200
            assert not output.failures
        assert len(decoded) == 10
        assert encoded_by(served) == 10
        served.close()
    finally:
        engine.close()


# --- the command


def write_requests(path: Path, count: int, *, pictures: int = 3) -> Path:
    """Every tenth row is bad."""
    rows = []
    for number in range(count):
        body = chat(image_part(PICTURES[number % pictures]), f"Question {number}?", max_tokens=4 + number % 5)
        row = {"custom_id": f"row {number}", "method": "POST", "url": CHAT, "body": body}
        rows.append(json.dumps(row) if number % 10 != 7 else '{"custom_id"')
    path.write_text("\n".join(rows) + "\n")
    return path


def words(model: Path, source: Path | str, out: Path, *more: str) -> list[str]:
    engine = ["--device", "cpu", "--threads", "1", "--kv-tokens", "16384", "--served-model-name", MODEL]
    return ["batch", str(model), "-i", str(source), "-o", str(out), *engine, *more]


def files_of(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), out.with_name(f"{out.stem}.errors.jsonl").read_bytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_requests(tmp_path_factory.mktemp("batch") / "in.jsonl", 40)


@pytest.fixture(scope="module")
def whole(source: Path, nvila_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that nothing stopped, and `summary.json` beside it."""
    folder = tmp_path_factory.mktemp("whole")
    with redirect_stdout(io.StringIO()) as out:
        assert main(words(nvila_folder, source, folder / "out.jsonl", "--json")) == 0
    (folder / "summary.json").write_text(out.getvalue())
    return folder / "out.jsonl"


def test_the_command(whole: Path, source: Path, server: RunningServer) -> None:
    answers = [json.loads(row) for row in whole.read_text().splitlines()]
    assert [row["custom_id"] for row in answers] == [f"row {number}" for number in range(40) if number % 10 != 7]
    asked = {row["custom_id"]: row["body"] for row in map(json.loads, source.read_text().splitlines()[:7])}
    for row in answers[:5]:
        expected = server.post(asked[row["custom_id"]]).json()
        assert row["response"]["body"]["choices"] == expected["choices"]
    found = json.loads((whole.parent / "summary.json").read_text())
    assert found["finished"]
    assert (found["answered"], found["failed"], found["images"]) == (36, {"invalid_json": 4}, 36)
    assert found["prompt_tokens"] == sum(row["response"]["body"]["usage"]["prompt_tokens"] for row in answers)


def test_a_finished_job_loads_no_model_and_another_is_refused(
    whole: Path,
    source: Path,
    nvila_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = files_of(whole)
    with monkeypatch.context() as patch:
        patch.setattr(EngineProcess, "start", None)
        assert main(words(nvila_folder, source, whole)) == 0
    assert "0 answered, 0 failed, 40 found there" in capsys.readouterr().out
    for more, said in (
        (("--seed", "3"), "seed was 0, is 3"),
        (("--shard", "1/2"), 'shard was null, is "1/2"'),
        (("--detail", "low"), 'detail was "auto", is "low"'),
        (("--quantization", "8bit"), 'quantization was "none", is "8bit"'),
        (("--default-temperature", "1"), "default_temperature was null, is 1.0"),
    ):
        assert main(words(nvila_folder, source, whole, *more)) == 2
        assert said in capsys.readouterr().err
    assert files_of(whole) == before


def test_mistakes_are_one_line(nvila_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    for command, said in (
        (words(nvila_folder, tmp_path / "none.jsonl", out), "no such file"),
        (words(nvila_folder, tmp_path, out), "need a --prompt"),
        (words(nvila_folder, tmp_path, out, "-p", "what?"), "holds no pictures"),
        (words(nvila_folder, tmp_path, out, "-p", "what?", "--body", "{"), "--body is not JSON"),
        (words(nvila_folder, tmp_path, out, "--shard", "3/2"), "is not I/N"),
        (words(nvila_folder, tmp_path, out, "--limit", "0"), "--limit must be at least 1"),
        (words(Path("/nowhere"), tmp_path, out), "there is no folder '/nowhere'"),
    ):
        assert main(command) == 2
        assert said in capsys.readouterr().err
    assert not out.exists()


def test_pictures_shards_and_limits(nvila_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One engine for all: the shards' rows are what one run without shards would hold."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(PICTURES[number % 3])
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(PICTURES[0])
    (folder / "broken.png").write_bytes(b"")
    more = ["-p", "What is it?", "--body", '{"max_tokens": 3, "temperature": 0}']
    assert main(words(nvila_folder, folder, tmp_path / "out.jsonl", *more, "--limit", "6")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "5 answered, 1 failed, 0 found there; 5 images" in lines[0]
    assert lines[1].endswith(": 1 image_decode_failed")
    found = [json.loads(row) for one in files_of(tmp_path / "out.jsonl") for row in one.splitlines()]
    assert len(found) == 6
    assert {row["custom_id"] for row in found} == set(sorted(map(str, folder.iterdir()))[:6])


class Forked:
    """Commands that are started in no time; each ends before the next begins."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forking.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._engines_parent, self.command = int(self._read()), 0

    def start(self, words: list[str]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        self.command = int(self._read())

    def end(self) -> int:
        """Its exit code."""
        return int(self._read())

    def engines(self) -> list[int]:
        """Ids of processes that live."""
        children = Path(f"/proc/{self._engines_parent}/task/{self._engines_parent}/children").read_text().split()
        return [int(one) for one in children if lives(int(one))]

    def processes(self) -> list[int]:
        """All that belongs to the command, but for the process that engines are forked from."""
        return [*tree_of(self.command), *(one for engine in self.engines() for one in tree_of(engine))]

    def close(self) -> None:
        if lives(self.command):
            os.kill(self.command, signal.SIGKILL)
        self._process.communicate(timeout=PATIENCE)

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@pytest.fixture
def forked() -> Iterator[Forked]:
    one = Forked()
    yield one
    one.close()


def tree_of(pid: int) -> list[int]:
    """A process and all that it has started, which belong to the thread that did."""
    found = [pid]
    with suppress(FileNotFoundError, ProcessLookupError):
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [one for child in children.read_text().split() for one in tree_of(int(child))]
    return found


def lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


KILLS, ROWS = int(os.environ.get("BATCH_KILLS", "8")), int(os.environ.get("BATCH_ROWS", "3000"))
ROWS_TO_KILL_IN = 240


@pytest.mark.slow
def test_killed_at_random_points_it_ends_the_same(nvila_folder: Path, tmp_path: Path, forked: Forked) -> None:
    """First its engine, then the command, again and again: BATCH_KILLS times each."""
    source, whole, out, rng = tmp_path / "in.jsonl", tmp_path / "whole.jsonl", tmp_path / "out.jsonl", random.Random(0)
    write_requests(source, ROWS_TO_KILL_IN)
    forked.start(words(nvila_folder, source, whole, "--max-running", "2"))
    assert forked.end() == 0

    def finish() -> None:
        forked.start(words(nvila_folder, source, out, "--max-running", "2"))
        assert forked.end() == 0
        assert files_of(out) == files_of(whole)

    for _ in range(KILLS):
        if lines_of(out) > ROWS_TO_KILL_IN // 2:  # so that every kill is in the middle
            finish()
            for file in tmp_path.glob("out.*"):
                file.unlink()
        forked.start(words(nvila_folder, source, out, "--max-running", "2"))
        for victim in ("its engine", "the command"):
            wanted = lines_of(out) + rng.randint(0, 3)
            eventually(lambda wanted=wanted: bool(forked.engines()) and lines_of(out) >= wanted)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 0.1))
            os.kill(forked.engines()[0] if victim == "its engine" else forked.command, signal.SIGKILL)
        assert forked.end() == -signal.SIGKILL
        eventually(lambda: not forked.engines())
        written = out.read_bytes()
        assert whole.read_bytes().startswith(written[: written.rfind(b"\n") + 1])
        assert lines_of(out) < lines_of(whole)
    finish()


@pytest.mark.slow
def test_memory_is_flat_over_thousands_of_rows(tmp_path: Path, forked: Forked) -> None:
    """Of the command, its engine and all that they have started, where every row has a picture of its own and one of
    twenty is bad. `BATCH_ROWS=10000 pytest tests/server/test_batch_command.py -k memory -s` says what it takes."""
    source, out, errors = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl"
    with source.open("w") as file:
        for number in range(ROWS):
            shown = picture(60 + number % 40, 50, seed=number)
            body = chat(image_part(shown), f"Question {number}?", model="demo", max_tokens=1 + number % 8)
            good = json.dumps({"custom_id": str(number), "method": "POST", "url": CHAT, "body": body})
            file.write(f"{good if number % 20 != 7 else good[:-1]}\n")
    seen: list[tuple[int, int]] = []
    forked.start(["batch", "demo", "-i", str(source), "-o", str(out), "--device", "cpu", "--threads", "1"])
    while lives(forked.command):
        rows = lines_of(out) + lines_of(errors)
        if forked.engines() and rows >= (seen[-1][0] + 200 if seen else 1000):
            seen.append((rows, sum(map(memory_of, forked.processes()))))
        time.sleep(0.05)
    assert forked.end() == 0
    assert (lines_of(out), lines_of(errors)) == (ROWS * 19 // 20, ROWS // 20)
    print(*(f"row {rows}: {size / 1e6:.0f} MB" for rows, size in seen), sep="\n")
    assert seen[-1][0] > 0.8 * ROWS
    assert max(size for _, size in seen) < 1.1 * seen[0][1], seen


def memory_of(pid: int) -> int:
    """Bytes of its own and of what it was forked with, 0 when it has ended. Files' pages are the machine's."""
    try:
        found = re.findall(r"^(?:Anonymous|Pss_Shmem):\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(map(int, found)) * 1024


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_whole(
    number: signal.Signals, whole: Path, source: Path, nvila_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "siglane.cli.main", *words(nvila_folder, source, out, "--max-running", "2")]
    with subprocess.Popen(
        [sys.executable, str(HOLDING), "12", *command[3:], "--window", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        wait_for_lines(out, 3, process)
        process.send_signal(number)
        said, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3, errors
    assert "the same command continues it" in errors
    assert said.startswith(f"{out}: ")
    assert 3 <= lines_of(out) <= 12
    assert out.read_bytes().endswith(b"\n")
    assert files_of(whole)[0].startswith(files_of(out)[0])
    assert subprocess.run(command, capture_output=True, check=False, timeout=120).returncode == 0
    assert files_of(out) == files_of(whole)
