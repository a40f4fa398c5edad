"""`siglane demo`: the shipped model behind a real server, asked about the shipped picture over the OpenAI API."""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

from siglane.cli.common import Argument
from siglane.cli.own_server import free_port, own_server
from siglane.errors import SiglaneError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.options import PREFIX, CommandOptions, option

USUAL_PORT = 8000
START_SECONDS, ANSWER_SECONDS = 120.0, 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions(CommandOptions):
    COMMAND = "demo"

    stay: bool = option(False, "keep the server running and print a curl line to try")
    port: int = option(0, "TCP port of the server; 0 takes a free one")


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
        return _stay(example, options.port or free_port(USUAL_PORT), out)
    with tempfile.TemporaryFile("w+") as log:
        begin = time.monotonic()
        with _server(options.port or free_port(), example.picture.parent, log) as url:
            out.write(f"server    {url}/v1, up in {time.monotonic() - begin:.1f} s\n")
            answer = asyncio.run(_ask(example, url, out))
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
    with _server(port, example.picture.parent, sys.stderr) as url:
        body = json.dumps(_request(example.question, example.picture.as_uri()))
        command = ["curl", "-s", f"{url}/v1/chat/completions", "-H", "content-type: application/json"]
        out.write(f"\nThe server is up. Ctrl-C stops it. Try:\n\n{shlex.join([*command, '-d', body])}\n\n")
        out.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
    return 0


def _server(port: int, media: Path, log: IO[str]) -> contextlib.AbstractContextManager[str]:
    """A `siglane serve demo` that no setting of this machine changes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    words = ["demo", "--allowed-local-media-path", str(media), "--device", "cpu"]
    return own_server(words, port, log, START_SECONDS, environment)


async def _ask(example: Example, url: str, out: TextIO) -> str:
    """Prints question and answer as it streams; returns the answer."""
    from siglane.cli.streaming import StreamingClient

    data = base64.b64encode(example.picture.read_bytes()).decode()
    body = _request(example.question, f"data:image/png;base64,{data}")
    body |= {"stream": True, "stream_options": {"include_usage": True}, "include_timings": True}
    out.write(f"picture   {example.picture}\nquestion  {example.question}\nanswer    ")
    out.flush()
    text, begin, first = "", time.monotonic(), 0.0
    async with StreamingClient(url, timeout=ANSWER_SECONDS) as client:
        async for piece in client.pieces(body):
            if piece.text and not first:
                first = time.monotonic() - begin
            text += piece.text
            out.write(piece.text)
            out.flush()
    usage = piece.usage
    assert usage is not None
    details = usage["prompt_tokens_details"]
    tokens = f"{details['image_tokens']} image + {details['text_tokens']} text -> {usage['completion_tokens']}"
    out.write(f"\nusage     {tokens} tokens\n")
    shown = [f"{name} {1000 * seconds:.0f} ms" for name, seconds in piece.timings.items()]
    shown += [f"first token {1000 * first:.0f} ms", f"all {1000 * (time.monotonic() - begin):.0f} ms"]
    out.write(f"timings   {', '.join(shown)}\n")
    return text.strip()


def _request(question: str, url: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"model": "demo", "temperature": 0, "max_tokens": 64, "messages": [{"role": "user", "content": content}]}
