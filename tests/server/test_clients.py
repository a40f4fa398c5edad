"""`siglane chat` and `siglane bench` against a real server, and servers that misbehave."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from serving import CHAT, HOST, MODEL, RunningServer, Told, assert_unharmed, picture
from waiting import PATIENCE

from siglane.cli.bench_load import Taken, Timed, body_of
from siglane.cli.bench_options import BenchOptions
from siglane.cli.bench_report import lines, summary
from siglane.cli.chat import HELP
from siglane.cli.main import main
from siglane.cli.streaming import Piece, StreamingClient
from siglane.errors import SiglaneError


def say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], *typed: str
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in typed)))
    code = main(["chat", "--temperature", "0", *words])
    told = capsys.readouterr()
    return code, told.out, told.err


class TestChat:
    def test_turns_pictures_and_commands(
        self,
        server: RunningServer,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """What is sent: earlier turns, pictures with the next message alone, nothing after /clear."""
        asked: list[dict[str, Any]] = []
        pieces = StreamingClient.pieces

        def noted(self: StreamingClient, body: dict[str, Any]) -> Any:
            asked.append(json.loads(json.dumps(body)))
            return pieces(self, body)

        monkeypatch.setattr(StreamingClient, "pieces", noted)
        for name in ("a.png", "with space.png"):
            (tmp_path / name).write_bytes(picture())
        typed = (
            f"/image {tmp_path}/a.png",
            f"/image {tmp_path}/with space.png",
            "first",
            "",
            "second",
            "/clear",
            "third",
        )
        words = ["--base-url", server.url + "/v1", "--max-tokens", "4", "--system", "Be brief."]
        code, out, err = say(monkeypatch, capsys, words, *typed, "/exit", "never")
        assert (code, err) == (0, "")
        assert out.count("\n") >= 3
        kinds = [[message["role"] for message in body["messages"]] for body in asked]
        assert kinds == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
        content = asked[0]["messages"][1]["content"]
        assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
        assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
        assert asked[1]["messages"][1] == asked[0]["messages"][1]
        assert asked[1]["messages"][3]["content"] == "second"
        assert {body["model"] for body in asked} == {MODEL}
        assert all((body["max_tokens"], body["temperature"]) == (4, 0) for body in asked)

    def test_mistakes_cost_their_line(
        self, server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["--base-url", server.url, "--max-tokens", "2"]
        typed = ("/image none.png", "/image", '/image "open', "/dance", "hello")
        code, out, err = say(monkeypatch, capsys, words, *typed)
        assert code == 1
        assert out.strip("\n")
        complaints = [line.removeprefix("siglane: error: ") for line in err.splitlines()]
        assert complaints[0] == "none.png cannot be read: No such file or directory"
        assert complaints[1] == "/image needs the path of a picture"
        assert complaints[2].startswith('/image "open: ')
        assert complaints[3] == f"/dance is no command; {HELP}"
        assert len(complaints) == 4

    def test_what_the_server_refuses_is_said_in_its_words_and_forgotten(
        self, server: RunningServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, out, err = say(monkeypatch, capsys, ["no-such", "--base-url", server.url], "hello")
        assert (code, out) == (1, "")
        assert "the server answers 404: the model 'no-such' is not served here" in err
        code, out, err = say(monkeypatch, capsys, ["--base-url", f"http://{HOST}:1"], "hello")
        assert (code, out) == (1, "")
        assert "does not answer: ConnectError" in err
        for words, complaint in [
            ([], "give MODEL, or --base-url of a server"),
            (["--base-url", "localhost:8000"], "is no http:// or https:// address"),
            (["--base-url", "http://"], "is no http:// or https:// address"),
        ]:
            assert say(monkeypatch, capsys, words)[0] == 2, complaint

    def test_in_a_terminal(self, server: RunningServer, tmp_path: Path) -> None:
        """It says what can be typed, shows the pictures that wait, and ends with Ctrl-D."""
        (tmp_path / "a.png").write_bytes(picture())
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "siglane.cli.main", "chat", "--base-url", server.url, "--max-tokens", "3"]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True) as process:
            os.close(theirs)
            seen = b""

            def until(text: bytes) -> None:
                nonlocal seen
                while text not in seen:
                    seen += os.read(ours, 4096)
                seen = seen.partition(text)[2]

            until(b"/exit (or Ctrl-D) ends")
            until(b"> ")
            os.write(ours, f"/image {tmp_path}/a.png\n".encode())
            until(b"[1 images] > ")
            os.write(ours, b"hello\n")
            until(b"hello\r\n")
            until(b"\r\n> ")
            os.write(ours, b"\x04")
            assert process.wait(PATIENCE) == 0
        os.close(ours)


class TestBench:
    WORDS = ("-n", "6", "-c", "3", "--warmup", "1", "--max-tokens", "4", "--words", "8", "--sizes", "64x48", "32x32")

    def bench(self, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
        code = main(["bench", *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    def test_numbers_of_a_real_server(
        self, server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("matplotlib")
        out, plot = tmp_path / "out.json", tmp_path / "plot.png"
        code, text, _ = self.bench(
            capsys, "--base-url", server.url, *self.WORDS, "-o", str(out), "--plot", str(plot), "--json"
        )
        assert code == 0
        found = json.loads(text)
        assert (found["model"], found["completed"], found["failed"], found["errors"]) == (MODEL, 6, 0, {})
        assert (found["tokens_are"], found["output_tokens"]) == ("usage", 24)
        assert found["images_per_second"] == pytest.approx(6 / found["seconds"])
        times = found["milliseconds"]
        assert set(times) == {"ttft", "itl", "tpot", "e2e"}
        assert 0 < times["ttft"]["p50"] <= times["ttft"]["p99"] <= times["ttft"]["max"] <= times["e2e"]["max"]
        kept = json.loads(out.read_text())
        assert {name: value for name, value in kept.items() if name != "requests"} == found
        assert [one["completion_tokens"] for one in kept["requests"]] == [4] * 6
        assert all(one["tokens"] == sorted(one["tokens"]) for one in kept["requests"])
        assert "api_key" not in kept["settings"]
        assert plot.read_bytes().startswith(b"\x89PNG")

    def test_harms_no_neighbour(self, server: RunningServer, alone: Told, capsys: pytest.CaptureFixture[str]) -> None:
        assert_unharmed(server, alone, lambda: self.bench(capsys, "--base-url", server.url, *self.WORDS))

    def test_equal_options_ask_the_same(self) -> None:
        options = BenchOptions(base_url="http://x", images=2, sizes=("20x10", "8x8"))
        assert body_of(options, "m", 3) == body_of(options, "m", 3)
        assert body_of(options, "m", 3) != body_of(options, "m", 4)

    def test_what_cannot_be_measured(self, server: RunningServer, capsys: pytest.CaptureFixture[str]) -> None:
        for words, code, complaint in [
            (("--base-url", server.url, "no-such"), 2, "the server answers 404"),
            (
                ("--base-url", server.url, "no-such", "--warmup", "0", "-n", "1"),
                1,
                "no request was answered: the server",
            ),
            (("--base-url", f"http://{HOST}:1"), 1, "does not answer"),
            (("--base-url", server.url, "--sizes", "big"), 2, "sizes must be like 640x480, got big"),
            (("--base-url", server.url, "-n", "0"), 2, "requests must be at least 1"),
            (("--base-url", server.url, "-o", "none/x.json"), 2, "cannot write none/x.json"),
            ((), 2, "--base-url is missing"),
        ]:
            found = self.bench(capsys, *words)
            assert found[0] == code
            assert complaint in found[2]

    def test_failures_are_counted_apart(self) -> None:
        good = Timed(0.0, 1, 0.1, [0.1, 0.2, 0.4], 0.5)
        found = summary(Taken([good, Timed(0.0, 1, error="the server answers 503: full")], 2.0))
        assert (found["completed"], found["failed"], found["tokens_are"]) == (1, 1, "events")
        assert (found["output_tokens"], found["images_per_second"]) == (3, 0.5)
        assert found["milliseconds"]["itl"]["mean"] == pytest.approx(150)
        assert found["milliseconds"]["tpot"]["p99"] == pytest.approx(200)
        text = "\n".join(lines({"model": "m", **found}))
        assert "1 answers in 2.00 s, 1 failed" in text
        assert "1 x the server answers 503: full" in text


@contextmanager
def saying(*events: bytes, status: int = 200) -> Iterator[str]:
    """A server that answers everything with these bytes, and hangs up."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"".join(events))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        looks_every = 0.01  # seconds, whether it is to end
        threading.Thread(target=server.serve_forever, args=(looks_every,), daemon=True).start()
        yield f"http://{HOST}:{server.server_port}"
        server.shutdown()


def told_by(url: str) -> list[Piece]:
    async def read() -> list[Piece]:
        async with StreamingClient(url, timeout=PATIENCE) as client:
            return [piece async for piece in client.pieces({})]

    return asyncio.run(read())


TEXT = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
END = b'data:{"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'


def test_what_other_servers_send() -> None:
    """Comments, no space behind the colon, vLLM's name for reasoning, no [DONE] at the end, nulls."""
    reasoning = b'data: {"choices":[{"delta":{"content":null,"reasoning":"r"}}],"usage":null}\n\n'
    usage = b'data: {"choices":[],"usage":{"completion_tokens":1}}\n\n'
    with saying(b": hello\n\n", reasoning, TEXT, END, usage) as url:
        found = told_by(url)
    assert [(one.text, one.reasoning, one.finish_reason) for one in found] == [
        ("", "r", None),
        ("a", "", None),
        ("", "", "stop"),
        ("", "", None),
    ]
    assert found[-1].usage == {"completion_tokens": 1}


@pytest.mark.parametrize(
    ("events", "status", "complaint"),
    [
        ([TEXT], 200, "the stream ended before its answer did"),
        ([], 200, "the stream ended before its answer did"),
        ([TEXT, b'data: {"error":{"message":"no luck","code":"x"}}\n\n', END], 200, "no luck"),
        ([b'data: {"error":"as a text"}\n\n'], 200, "as a text"),
        ([b"data: {broken\n\n"], 200, "an event that is none of OpenAI's"),
        ([b"data: [1]\n\n"], 200, "an event that is none of OpenAI's"),
        ([b'data: {"choices":[{"delta":"x"}]}\n\n'], 200, "an event that is none of OpenAI's"),
        ([b'{"error":{"message":"slow down"}}'], 429, "the server answers 429: slow down"),
        ([b"<html>"], 502, "the server answers 502: <html>"),
        ([b'{"detail":"nope"}'], 404, "the server answers 404: nope"),
    ],
)
def test_servers_that_fail(events: list[bytes], status: int, complaint: str) -> None:
    with saying(*events, status=status) as url, pytest.raises(SiglaneError) as caught:
        told_by(url)
    assert complaint in str(caught.value)
    assert CHAT not in str(caught.value)
