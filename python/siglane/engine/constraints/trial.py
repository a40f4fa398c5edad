"""Compiles grammars in a process of its own: JSON lines in, JSON lines out. `constraint.py` starts it as a program.

A client's text may nest so deep that compiling it overruns the stack, which ends a process: this one, whose stack is
smaller than the engine's. What it compiles, the engine can. It imports nothing but llguidance: it starts at once.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

STACK_BYTES = 2 << 20  # main threads have 8 MiB


def _compile(grammar: str, limits: dict[str, Any], tokens: LLTokenizer, found: list[str]) -> None:
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=LLParserLimits(**limits))
    if not matcher.is_error():
        matcher.compute_bitmask()
    found.append(matcher.get_error())


def _answer(line: bytes, tokens: LLTokenizer) -> dict[str, Any]:
    """error: why no answer can be held to the grammar, empty where one can."""
    seconds, grammar, limits = json.loads(line)
    found: list[str] = []
    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends the process, whatever it is doing
    thread = threading.Thread(target=_compile, args=(grammar, limits, tokens, found))
    thread.start()
    thread.join()
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"error": found[0] if found else "it cannot be compiled"}


def main() -> None:
    """Until the one that asks closes the pipe."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they reach the whole group; the parent decides when to end
        signal.signal(number, signal.SIG_IGN)
    threading.stack_size(STACK_BYTES)
    tokens = LLTokenizer("byte")  # enough to compile for, where no answer is written
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_answer(line, tokens)).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
