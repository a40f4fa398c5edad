"""`siglane demo`: the shipped model behind a real server, asked about the shipped picture over the OpenAI API."""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TextIO

from siglane.cli.common import Argument
from siglane.errors import SiglaneError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.options import PREFIX, CommandOptions

HOST, USUAL_PORT = "127.0.0.1", 8000
START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 120.0, 60.0, 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions(CommandOptions):
    COMMAND = "demo"

    stay: bool = field(default=False, metadata={"help": "keep the server running and print a curl line to try"})
    port: int = field(default=0, metadata={"help": "TCP port of the server; 0 takes a free one"})


@dataclass(frozen=True, slots=True)
class Example:
    """What is asked and what must come back."""

    picture: Path
    question: str
    answer: str


ARGUMENTS: tuple[Argument, ...] = ()
OPTIONS = (OptionGroup(DemoOptions, "demo"),)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(DemoOptions, arguments)
    example = load_example()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave as after Ctrl-C: the server must not stay behind
    if options.stay:
        return _stay(example, options.port or _free_port(USUAL_PORT), out)
    with tempfile.TemporaryFile("w+") as log:
        begin = time.monotonic()
        with _server(options.port or _free_port(0), example.picture.parent, log) as port:
            out.write(f"server    http://{HOST}:{port}/v1, up in {time.monotonic() - begin:.1f} s\n")
            answer = _ask(example, port, out)
    if answer != example.answer:
        raise SiglaneError(f"the demo model answered {answer[:80]!r}, expected {example.answer!r}")
    return 0


def load_example() -> Example:
    """The first question about the first picture that ships beside the demo model."""
    from siglane.config.reader import read_json
    from siglane.weights.demo import demo_folder

    pictures = demo_folder() / "pictures"
    name, questions = next(iter(read_json(pictures / "questions.json").items()))
    return Example(pictures / name, questions[0]["question"], questions[0]["answer"])


def _stay(example: Example, port: int, out: TextIO) -> int:
    with _server(port, example.picture.parent, sys.stderr):
        url = example.picture.as_uri()
        body = json.dumps(_request(example.question, url))
        command = ["curl", "-s", f"http://{HOST}:{port}/v1/chat/completions", "-H", "content-type: application/json"]
        out.write(f"\nThe server is up. Ctrl-C stops it. Try:\n\n{shlex.join([*command, '-d', body])}\n\n")
        out.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


@contextlib.contextmanager
def _server(port: int, media: Path, log: IO[str]) -> Iterator[int]:
    """A `siglane serve demo` of its own, ready to answer; stopped by SIGTERM at the end, which it must survive."""
    command = [sys.executable, "-m", "siglane.cli.main", "serve", "demo", "--host", HOST, "--port", str(port)]
    command += ["--allowed-local-media-path", str(media), "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    process = subprocess.Popen(command, env=environment, stderr=log, start_new_session=True)
    try:
        _wait_until_ready(process, port, log)
        yield port
    finally:
        process.terminate()
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    if code != 0:
        raise SiglaneError(f"the server ended with exit code {code}{_last_line(log)}")


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: IO[str]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SiglaneError(f"the server did not start (exit code {process.returncode}){_last_line(log)}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(HOST, port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise SiglaneError(f"the server was not ready after {START_SECONDS:.0f} s{_last_line(log)}")


def _ask(example: Example, port: int, out: TextIO) -> str:
    """Prints question and answer as it streams; returns the answer."""
    data = base64.b64encode(example.picture.read_bytes()).decode()
    body = _request(example.question, f"data:image/png;base64,{data}")
    body |= {"stream": True, "stream_options": {"include_usage": True}, "include_timings": True}
    out.write(f"picture   {example.picture}\nquestion  {example.question}\nanswer    ")
    out.flush()
    text, last, begin, first = "", {}, time.monotonic(), 0.0
    for event in _events(port, body):
        last = event
        piece = "".join(choice["delta"].get("content", "") for choice in event["choices"])
        if piece and not first:
            first = time.monotonic() - begin
        text += piece
        out.write(piece)
        out.flush()
    usage, details = last["usage"], last["usage"]["prompt_tokens_details"]
    tokens = f"{details['image_tokens']} image + {details['text_tokens']} text -> {usage['completion_tokens']}"
    out.write(f"\nusage     {tokens} tokens\n")
    stages = last.get("siglane", {}).get("timings", {})
    shown = [f"{name} {1000 * seconds:.0f} ms" for name, seconds in stages.items()]
    shown += [f"first token {1000 * first:.0f} ms", f"all {1000 * (time.monotonic() - begin):.0f} ms"]
    out.write(f"timings   {', '.join(shown)}\n")
    return text.strip()


def _request(question: str, url: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"model": "demo", "temperature": 0, "max_tokens": 64, "messages": [{"role": "user", "content": content}]}


def _events(port: int, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The server-sent events of one request, until its [DONE]."""
    connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER_SECONDS)
    with contextlib.closing(connection):
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise SiglaneError(f"the server answered {response.status}: {response.read().decode()}")
        for line in response:
            name, _, data = line.decode().partition(": ")
            if name == "data" and data.strip() == "[DONE]":
                return
            if name == "data":
                event = json.loads(data)
                if "error" in event:
                    raise SiglaneError(f"the server failed at the request: {event['error']['message']}")
                yield event
    raise SiglaneError("the stream ended before [DONE]")


def _free_port(preferred: int) -> int:
    """`preferred` when nobody listens there, else any port the system gives."""
    for port in (preferred, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    raise SiglaneError(f"no free port on {HOST}")


def _last_line(log: IO[str]) -> str:
    """What the server said last, when its log is ours to read."""
    if log is sys.stderr:
        return ""
    log.seek(0)
    lines = log.read().strip().splitlines()
    return f": {lines[-1]}" if lines else ""
