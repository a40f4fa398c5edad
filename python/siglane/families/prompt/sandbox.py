"""Renders chat templates in a process of its own: JSON lines in, JSON lines out. `renderers.py` starts it as a program.

A template is a program that comes with a checkpoint, and a user's words decide how it runs: it may loop for ever or
fill the memory. Here the kernel ends it. It imports nothing but Jinja, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 512 << 20
MOST_CHARACTERS = 32 << 20  # of a rendered prompt: the longest context has fewer
OUT_OF_MEMORY = 3  # exit code


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; in a prompt its content stands as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


@lru_cache(maxsize=16)
def compiled(source: str) -> Template:
    """A template with what chat templates may use (Hugging Face's "Writing a chat template"); a test compares what it
    renders with transformers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(source)


def _answer(line: bytes) -> dict[str, str]:
    seconds, source, variables = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process, whatever it is doing
    try:
        text = compiled(source).render(variables)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:  # a template is a program: it may raise anything
        return {"error": str(error)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if len(text) > MOST_CHARACTERS:
        return {"error": f"it wrote {len(text)} characters, more than any model reads"}
    return {"text": text}


def main() -> None:
    """Until the one that asks closes the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the parent decides when to end
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_answer(line)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    try:
        main()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
