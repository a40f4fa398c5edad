"""Processes that render chat templates, so that one which never ends costs its request and nobody else."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from siglane.errors import UserError
from siglane.families.prompt import sandbox

logger = logging.getLogger(__name__)

RENDER_SECONDS = 2.0  # a long conversation takes some hundredths
MOST_PROCESSES = 4


class Renderers:
    """At most `most` processes, each started when it is first needed and again when it was ended. Safe to share between
    threads; a thread waits while all of them work."""

    def __init__(self, most: int = MOST_PROCESSES) -> None:
        self._room = threading.BoundedSemaphore(most)
        self._idle: list[subprocess.Popen[bytes]] = []

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """variables: JSON. UserError `chat_template_failed` with what the template raised, `template_timeout` when it
        takes longer than `RENDER_SECONDS`, `template_memory` when it needs more than `sandbox.MEMORY_BYTES`."""
        question = json.dumps([RENDER_SECONDS, template, variables]).encode() + b"\n"
        with self._room:
            process = self._take()
            try:
                line = _ask(process, question)
            except BaseException:  # interrupted: its answer would be taken for the next one's
                process.kill()
                raise
            self._idle.append(process if line else _start())
        if not line:
            raise _ended(process)
        answer: dict[str, str] = json.loads(line)
        if "error" in answer:
            message = f"the chat template refused the messages: {answer['error']}"
            raise UserError(message, code="chat_template_failed", param="messages")
        return answer["text"]

    def close(self) -> None:
        while self._idle:
            process = self._idle.pop()
            process.kill()
            _exit_code(process)

    def _take(self) -> subprocess.Popen[bytes]:
        with contextlib.suppress(IndexError):
            while (process := self._idle.pop()).poll() is not None:
                pass  # somebody has ended it
            return process
        return _start()


def renderers() -> Renderers:
    """Those of this process: they know no model, so that all models share them."""
    return _of_process(os.getpid())


@cache
def _of_process(pid: int) -> Renderers:
    """pid: a fork must not talk through its parent's pipes."""
    found = Renderers()
    atexit.register(found.close)
    return found


def _start() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", sandbox.__file__],  # -P: what lies beside the file is not what it imports
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def _ask(process: subprocess.Popen[bytes], question: bytes) -> bytes:
    """One line for another; nothing when the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(question)
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return b""


def _ended(process: subprocess.Popen[bytes]) -> UserError:
    """Why it gave no answer."""
    code, message = "chat_template_failed", "the chat template ended its process"
    match _exit_code(process):
        case returncode if returncode == -signal.SIGALRM:
            code, message = "template_timeout", f"the chat template did not finish within {RENDER_SECONDS:g} s"
        case sandbox.OUT_OF_MEMORY:
            most = sandbox.MEMORY_BYTES >> 20
            code, message = "template_memory", f"the chat template needs more than {most} MiB of memory"
    logger.warning("%s; the request ends with an error", message)
    return UserError(f"{message} for these messages", code=code, param="messages")


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            assert pipe is not None
            pipe.close()
    return process.wait()
