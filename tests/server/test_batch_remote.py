"""`siglane batch --base-url`: another server's rows are answered once, whatever it and the way to it do."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving import MODEL, RunningServer, picture
from test_batch_command import PICTURES, files_of, write_requests
from waiting import PATIENCE, lines_of, wait_for_lines

from siglane.batch import remote
from siglane.cli.main import main

CHAT = "/v1/chat/completions"

Reply = tuple[int, Mapping[str, str], bytes]  # status, headers, body


@dataclass
class Door:
    """What stands before a server: `reply` answers each request. asked: the bodies, in order."""

    reply: Callable[[str, bytes, Mapping[str, str]], Reply | None]
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def standing(reply: Callable[[str, bytes, Mapping[str, str]], Reply | None]) -> Iterator[Door]:
    """A web server on a thread; None as a reply breaks the connection."""
    door = Door(reply)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            door.asked.append(json.loads(body))
            door.headers.append(self.headers)
            found = door.reply(self.path, body, self.headers)
            if found is None:
                self.close_connection = True
                return
            status, headers, content = found
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/v1/models" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    looks_every = 0.01  # seconds, whether it is to end
    thread = threading.Thread(target=web.serve_forever, args=(looks_every,), daemon=True)
    thread.start()
    door.url = f"http://127.0.0.1:{web.server_address[1]}/v1"
    try:
        yield door
    finally:
        web.shutdown()
        web.server_close()
        thread.join()


def flaky(server: RunningServer, share: float, seed: int) -> Callable[..., Reply | None]:
    """siglane's own server, of whose answers a share is 503 and half as many connections break."""
    rng = random.Random(seed)

    def reply(path: str, body: bytes, headers: Mapping[str, str]) -> Reply | None:
        luck = rng.random()
        if luck < share:
            return 503, {"retry-after": "0"}, b"<html>upstream is away</html>"
        if luck < 1.5 * share:
            return None
        with server.http() as client:
            found = client.post(path, content=body, headers={"content-type": "application/json"})
        return found.status_code, {"content-type": "application/json"}, found.content

    return reply


def words(url: str, source: Path | str, out: Path, *more: str, model: str = MODEL) -> list[str]:
    return ["batch", model, "-i", str(source), "-o", str(out), "--base-url", url, *more]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.read_bytes().splitlines()]


def texts(path: Path, *rows: str, **fields: Any) -> Path:
    """A file of rows with these texts, which name no model."""
    lines = []
    for number, text in enumerate(rows):
        body = {"messages": [{"role": "user", "content": text}], **fields}
        lines.append(json.dumps({"custom_id": f"{number}", "url": CHAT, "body": body}))
    path.write_text("\n".join(lines) + "\n")
    return path


def said(text: str) -> Reply:
    body = {"id": "x", "choices": [{"message": {"content": text}}], "usage": {"prompt_tokens": 2}}
    return 200, {}, json.dumps(body).encode()


def text_of(body: bytes) -> str:
    found = json.loads(body)["messages"][0]["content"]
    assert isinstance(found, str)
    return found


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_requests(tmp_path_factory.mktemp("remote") / "in.jsonl", 60)


def test_all_rows_once_although_a_tenth_is_503(
    server: RunningServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with standing(flaky(server, 0.1, seed=1)) as door:
        assert main([*words(door.url, source, tmp_path / "out.jsonl"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["answered"], summary["failed"], summary["images"]) == (54, {"invalid_json": 6}, 54)
    assert len(door.asked) > 54
    answers = records(tmp_path / "out.jsonl")
    assert [row["custom_id"] for row in answers] == [f"row {number}" for number in range(60) if number % 10 != 7]
    asked = {row["custom_id"]: row["body"] for row in map(json.loads, source.read_text().splitlines()[:7])}
    for row in answers[:3]:
        assert row["response"]["body"]["choices"] == server.post(asked[row["custom_id"]]).json()["choices"]


KILLED = """
import sys
from siglane.batch import remote
from siglane.cli.main import main
remote.FIRST_PAUSE = 0.01
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_and_stopped_it_goes_on(server: RunningServer, source: Path, tmp_path: Path) -> None:
    """kill -9, then SIGTERM, then to the end, with other luck each time: the bytes of a run that nothing stopped."""
    with standing(flaky(server, 0.1, seed=2)) as door:
        assert main(words(door.url, source, tmp_path / "whole.jsonl")) == 0
        out = tmp_path / "out.jsonl"
        command = [sys.executable, "-c", KILLED, *words(door.url, source, out, "--concurrency", "2")]
        for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 3)):
            before = lines_of(out)
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
                wait_for_lines(out, before + 8, process)
                process.send_signal(number)
                process.communicate(timeout=PATIENCE)
            assert process.returncode == code
        found = {row["custom_id"] for row in records(out)}
        assert 16 <= len(found) < 54
    with standing(flaky(server, 0.1, seed=3)) as door:  # elsewhere: the address is no part of the job
        assert main(words(door.url, source, out)) == 0
    again = Counter(json.dumps(body["messages"][0]["content"][1]) for body in door.asked)
    assert len(again) == 54 - len(found)
    assert files_of(out) == files_of(tmp_path / "whole.jsonl")


def test_what_is_an_error_of_the_row(tmp_path: Path) -> None:
    """Bodies as OpenAI, vLLM, FastAPI and proxies write them; nothing of it is asked twice."""
    errors = {
        "openai": (400, {"error": {"message": "no", "type": "invalid_request_error", "param": "x", "code": "bad"}}),
        "no code": (400, {"error": {"message": "no", "type": "BadRequestError", "code": None}}),
        "number": (400, {"object": "error", "message": "no", "code": 400}),
        "fastapi": (422, {"detail": [{"loc": ["body"], "msg": "no"}]}),
        "text": (413, b"<html>too large</html>"),
        "empty": (403, b""),
        "no json": (200, b"<html>welcome</html>"),
        "model": (404, {"error": {"message": "no such model", "code": "model_not_found"}}),
        "once": (500, {"error": {"message": "no", "code": "engine_error"}}),
    }

    def reply(path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        status, content = errors[text_of(body)]
        encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
        return status, {"x-should-retry": "false"} if status == 500 else {}, encoded

    rows = texts(tmp_path / "in.jsonl", *errors, model="mine")
    with standing(reply) as door:
        assert main(words(door.url, rows, tmp_path / "out.jsonl")) == 0
    assert len(door.asked) == len(errors)
    found = records(tmp_path / "out.errors.jsonl")
    assert [row["error"]["code"] for row in found] == [
        "bad", "BadRequestError", "http_400", "http_422", "http_413", "http_403", "bad_answer", "model_not_found",
        "engine_error",
    ]  # fmt: skip
    assert [row["response"]["status_code"] for row in found] == [400, 400, 400, 422, 413, 403, 502, 404, 500]
    assert found[0]["response"]["body"]["error"]["param"] == "x"
    assert found[4]["error"]["message"] == "<html>too large</html>"
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_what_is_asked_again(tmp_path: Path) -> None:
    """Until it is taken; a row that never is becomes an error where others are answered."""
    tries: Counter[str] = Counter()
    began: dict[str, float] = {}
    waited: dict[str, float] = {}

    def reply(path: str, body: bytes, headers: Mapping[str, str]) -> Reply | None:
        text = text_of(body)
        tries[text] += 1
        began.setdefault(text, time.monotonic())
        waited[text] = time.monotonic() - began[text]
        if text == "never" or (text != "good" and tries[text] < 3):
            status = {"never": 502, "limit": 429, "date": 503}.get(text, 500)
            after = {"limit": "0.2", "date": "Wed, 21 Oct 2015 07:28:00 GMT", "odd": "soon"}.get(text, "")
            return None if text == "broken" else (status, {"retry-after": after} if after else {}, b"busy")
        return said(text)

    rows = texts(tmp_path / "in.jsonl", "limit", "date", "odd", "broken", "never", *["good"] * 3)
    with standing(reply) as door:
        assert main(words(door.url, rows, tmp_path / "out.jsonl", "--retries", "4")) == 0
    assert tries == {"limit": 3, "date": 3, "odd": 3, "broken": 3, "never": 5, "good": 3}
    assert waited["limit"] >= 0.4
    assert [row["custom_id"] for row in records(tmp_path / "out.jsonl")] == ["0", "1", "2", "3", "5", "6", "7"]
    (failed,) = records(tmp_path / "out.errors.jsonl")
    assert failed["error"] == {"code": "http_502", "message": "busy"}


def test_a_server_that_is_gone_stops_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No row is written as an error because nobody is there; the same command continues."""
    count = 0

    def reply(path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        nonlocal count
        count += 1
        return said("x") if count <= 3 else (503, {}, b"")

    rows, out = texts(tmp_path / "in.jsonl", *"abcdefgh"), tmp_path / "out.jsonl"
    with standing(reply) as door:
        assert main(words(door.url, rows, out, "--retries", "2", "--concurrency", "1")) == 3
        assert "answers nothing, tried 3 times: 503: no reason given; the same command continues" in (
            capsys.readouterr().err
        )
    assert main(words(door.url, rows, out, "--retries", "2")) == 3  # nobody listens
    assert "ConnectError" in capsys.readouterr().err
    assert len(records(out)) == 3
    assert (tmp_path / "out.errors.jsonl").read_bytes() == b""
    with standing(lambda path, body, headers: said("x")) as door:
        assert main(words(door.url, rows, out)) == 0
    assert len(door.asked) == 5
    assert len(records(out)) == 8


@pytest.mark.parametrize("reply", [(500, {}, b""), (504, {}, b""), None])
def test_a_last_row_that_fails_is_not_taken_for_a_server_that_is_gone(reply: Reply | None, tmp_path: Path) -> None:
    """Else the same command would stop at it for ever."""
    rows = texts(tmp_path / "in.jsonl", "bad")
    with standing(lambda path, body, headers: reply) as door:
        assert main(words(door.url, rows, tmp_path / "out.jsonl", "--retries", "1")) == 0
    assert len(door.asked) == 2
    (failed,) = records(tmp_path / "out.errors.jsonl")
    assert failed["response"]["status_code"] == (502 if reply is None else reply[0])


def test_a_server_that_hangs_is_given_up(tmp_path: Path) -> None:
    def reply(path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        if text_of(body) == "slow":
            time.sleep(0.5)
        return said("x")

    rows = texts(tmp_path / "in.jsonl", "slow", *["fast"] * 3)
    with standing(reply) as door:
        assert main(words(door.url, rows, tmp_path / "out.jsonl", "--retries", "1", "--answer-timeout", "0.2")) == 0
    (failed,) = records(tmp_path / "out.errors.jsonl")
    assert failed["error"] == {"code": "connection_failed", "message": "ReadTimeout"}


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        ((401, {}, b'{"error": {"message": "bad key"}}'), "refuses the key: bad key; set SIGLANE_BATCH_API_KEY"),
        ((404, {}, b'{"error": {"message": "no", "code": "model_not_found"}}'), "has no model 'tiny': no"),
        ((404, {}, b'{"error": {"message": "no", "param": "model", "code": 404}}'), "has no model 'tiny': no"),
        ((307, {"location": "http://else.where/"}, b""), "give the address that it leads to as --base-url"),
    ],
)
def test_what_is_wrong_with_all_rows_ends_it(
    reply: Reply, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = texts(tmp_path / "in.jsonl", "a", "b"), tmp_path / "out.jsonl"
    with standing(lambda path, body, headers: reply) as door:
        assert main(words(door.url, rows, out)) == 2
    assert complaint in capsys.readouterr().err
    assert files_of(out) == (b"", b"")


def test_what_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key and MODEL's name, any url, and the files of a folder as data URLs of their own type."""
    monkeypatch.setenv("SIGLANE_BATCH_API_KEY", "secret")
    paths: list[str] = []

    def reply(path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        paths.append(path)
        return said("x")

    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture(format="JPEG"))
    (folder / "b.jpg").write_bytes(PICTURES[0])  # a PNG by its content
    (folder / "c.webp").write_bytes(picture(format="WEBP"))
    with standing(reply) as door:
        assert main(words(door.url, folder, tmp_path / "a.jsonl", "-p", "What?", "--body", '{"top_k": 1}')) == 0
        rows = [
            {"custom_id": "1", "url": "/v1/responses", "body": {"input": "x", "model": "other"}},
            {"custom_id": "2", "url": "/v2/x", "body": {}},
            {"custom_id": "3", "url": CHAT, "body": {"stream": True}},
        ]
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert main(words(door.url.removesuffix("/v1"), tmp_path / "in.jsonl", tmp_path / "b.jsonl")) == 0
    assert paths == [*[CHAT] * 3, "/v1/responses"]
    urls = [body["messages"][0]["content"][0]["image_url"]["url"] for body in door.asked[:3]]
    kinds = sorted(url.partition(";")[0] for url in urls)
    assert kinds == ["data:image/jpeg", "data:image/png", "data:image/webp"]
    assert [(body["model"], body.get("top_k")) for body in door.asked] == [*[("tiny", 1)] * 3, ("other", None)]
    assert {headers["authorization"] for headers in door.headers} == {"Bearer secret"}
    assert not any(b"secret" in path.read_bytes() for path in tmp_path.glob("*.*"))
    assert [row["error"]["code"] for row in records(tmp_path / "b.errors.jsonl")] == [
        "invalid_url",
        "unsupported_field",
    ]


LIGHT = """
import sys
from siglane.cli.main import main
code = main(sys.argv[1:])
print(code, [name for name in ("torch", "transformers", "fastapi", "siglane.engine") if name in sys.modules])
"""


def test_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    rows = texts(tmp_path / "in.jsonl", "a", "b")
    with standing(lambda path, body, headers: said("x")) as door:
        command = [sys.executable, "-c", LIGHT, *words(door.url, rows, tmp_path / "out.jsonl")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr


def test_options_that_would_have_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = texts(tmp_path / "in.jsonl", "a"), tmp_path / "out.jsonl"
    url = "http://127.0.0.1:1/v1"
    for command, complaint in (
        (words(url, rows, out, "--dtype", "float32"), "--dtype has no effect with --base-url"),
        (words(url, rows, out, "--detail", "low"), "--detail has no effect with --base-url"),
        (words(url, rows, out, "--revision", "main"), "--revision has no effect with --base-url"),
        (words("localhost:80", rows, out), "is no http:// or https:// address"),
        (words(url, rows, out, "--concurrency", "0"), "--concurrency must be at least 1"),
        (["batch", "demo", "-i", str(rows), "-o", str(out), "--retries", "3"], "--retries belongs to --base-url"),
    ):
        assert main(command) == 2
        assert complaint in capsys.readouterr().err
    assert not out.exists()


def test_another_job_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = texts(tmp_path / "in.jsonl", "a"), tmp_path / "out.jsonl"
    with standing(lambda path, body, headers: said("x")) as door:
        assert main(words(door.url, rows, out)) == 0
        assert main(words(door.url, rows, out, model="large")) == 2
    assert 'model was "tiny", is "large"' in capsys.readouterr().err


def test_a_table_is_written_when_all_rows_are_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped in the middle there are its lines; the same command goes on, and asks nothing for another `--keep`."""
    pq.write_table(pa.table({"image": [PICTURES[0]] * 6, "title": [*"abcdef"]}), tmp_path / "in.parquet")
    out = tmp_path / "out.parquet"
    more = ("-p", "{title}?", "--keep", "title", "--retries", "0", "--concurrency", "1")
    asked: list[str] = []

    def reply(path: str, body: bytes, headers: Mapping[str, str]) -> Reply:
        picture, text = json.loads(body)["messages"][0]["content"]
        assert picture["image_url"]["url"].startswith("data:image/png;base64,")
        asked.append(text["text"])
        return (503, {}, b"") if len(asked) == 4 else said(f"{text['text']}!")

    with standing(reply) as door:
        assert main(words(door.url, tmp_path / "in.parquet", out, *more)) == 3
        assert not out.exists()
        assert len(records(tmp_path / "out.jsonl")) == 3
        assert main(words(door.url, tmp_path / "in.parquet", out, *more)) == 0
        assert f"{out}: 6 rows" in capsys.readouterr().out
        assert sorted(asked) == sorted([*(f"{title}?" for title in "abcdef"), "d?"])
        table = pq.read_table(out)
        assert table["answer"].to_pylist() == [f"{title}?!" for title in "abcdef"]
        assert table["title"].to_pylist() == [*"abcdef"]
        assert main(words(door.url, tmp_path / "in.parquet", out, "-p", "{title}?")) == 0
        assert pq.read_table(out).column_names[:2] == ["custom_id", "answer"]
        assert len(asked) == 7
        assert main(words(door.url, tmp_path / "in.parquet", out, "-p", "{title}!")) == 2
        assert 'prompt was "{title}?", is "{title}!"' in capsys.readouterr().err
