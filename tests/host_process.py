"""A host's process on this machine: in a process group of its own that is killed with everything below it."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TAIL_CHARACTERS = 4000


class HostError(RuntimeError):
    """A host did not start, died or did not answer in time; the message ends with what it wrote last."""


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A host's server. base_url ends without a slash and without /v1. start_seconds: until /health said yes."""

    process: subprocess.Popen[bytes]
    base_url: str
    log: Path
    start_seconds: float


@contextmanager
def serving(command: Sequence[str], env: Mapping[str, str], port: int, start_seconds: float) -> Iterator[RunningServer]:
    """A server on this machine, once it is healthy."""
    base_url, started = f"http://127.0.0.1:{port}", time.monotonic()
    with process_group(command, env) as (process, log):
        while not healthy(base_url):
            watch(process, log, started + start_seconds)
            time.sleep(0.5)
        yield RunningServer(process, base_url, log, time.monotonic() - started)


@contextmanager
def process_group(
    command: Sequence[str], env: Mapping[str, str], pass_fds: tuple[int, ...] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A host's command in a session of its own, with a temporary folder of its own, and the file it writes to; leaving
    kills every process in the session and removes the folder."""
    with tempfile.TemporaryDirectory(prefix="host-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env={**env, "TMPDIR": folder}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                pass_fds=pass_fds, start_new_session=True,
            )  # fmt: skip
        try:
            yield process, log
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def receive(process: subprocess.Popen[bytes], pipe: Connection, log: Path, seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not pipe.poll(0.5):
        watch(process, log, deadline)
    try:
        return pipe.recv()
    except EOFError:
        raise HostError(f"the host closed its pipe; its last words:\n{tail(log)}") from None


def watch(process: subprocess.Popen[bytes], log: Path, deadline: float) -> None:
    """Raises HostError once the process has ended or the time is over."""
    if process.poll() is not None:
        raise HostError(f"the host ended with code {process.returncode}; its last words:\n{tail(log)}")
    if time.monotonic() > deadline:
        raise HostError(f"the host did not answer in time; its last words:\n{tail(log)}")


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-TAIL_CHARACTERS:]


def healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=30) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def flags(options: Mapping[str, Any]) -> list[str]:
    """Arguments of `Engine` as those of the command line: True is a bare flag, False and None are absent."""
    words: list[str] = []
    for name, value in options.items():
        if value is False or value is None:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words
