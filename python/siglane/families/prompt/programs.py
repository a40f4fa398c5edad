"""Processes of a small program that answers JSON lines, so that what a checkpoint or a client brings can be ended."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading


class Programs:
    """At most `most` processes of the program at `path`, each started when it is first needed and again when it was
    ended. Safe to share between threads; a thread waits while all of them work."""

    def __init__(self, path: str, most: int) -> None:
        self._path, self._room = path, threading.BoundedSemaphore(most)
        self._idle: list[subprocess.Popen[bytes]] = []

    def ask(self, question: bytes) -> bytes | int:
        """One line for another; the exit code where the process ended instead."""
        with self._room:
            process = self._take()
            try:
                line = _ask(process, question + b"\n")
            except BaseException:  # interrupted: its answer would be taken for the next one's
                process.kill()
                raise
            self._idle.append(process if line else self._start())
        return line or _exit_code(process)

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
        return self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-P", self._path],  # -P: what lies beside the file is not what it imports
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )


def _ask(process: subprocess.Popen[bytes], question: bytes) -> bytes:
    """Nothing when the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(question)
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return b""


def _exit_code(process: subprocess.Popen[bytes]) -> int:
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            assert pipe is not None
            pipe.close()
    return process.wait()
