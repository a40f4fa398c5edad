"""A host's process on this machine: in a process group of its own that is killed with everything below it."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, TypeVar

TAIL_CHARACTERS = 4000


class HostError(RuntimeError):
    """A host did not start, died or did not answer in time. words: all that it wrote; the message ends with the last of
    them."""

    def __init__(self, message: str, words: str = "") -> None:
        super().__init__(f"{message}; its last words:\n{words[-TAIL_CHARACTERS:]}" if words else message)
        self.words = words


class Process(Protocol):
    """What is asked of a `subprocess.Popen`, and of a fork that another process made."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


P = TypeVar("P", bound=Process)


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A host's server. base_url ends without a slash and without /v1. start_seconds: until /health said yes."""

    process: Process
    base_url: str
    log: Path
    start_seconds: float


@contextmanager
def serving(
    session: AbstractContextManager[tuple[Process, Path]], port: int, start_seconds: float
) -> Iterator[RunningServer]:
    """A server on this machine, once it is healthy. session: its processes, as `process_group` starts them."""
    base_url, started = f"http://127.0.0.1:{port}", time.monotonic()
    with session as (process, log):
        while not healthy(base_url):
            watch(process, log, started + start_seconds)
            time.sleep(0.5)
        yield RunningServer(process, base_url, log, time.monotonic() - started)


@contextmanager
def process_group(
    command: Sequence[str], env: Mapping[str, str], pass_fds: tuple[int, ...] = ()
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A host's command in a session of its own, as `in_session` has it."""

    def start(env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                pass_fds=pass_fds, start_new_session=True,
            )  # fmt: skip

    with in_session(start, env) as found:
        yield found


@contextmanager
def in_session(start: Callable[[Mapping[str, str], Path], P], env: Mapping[str, str]) -> Iterator[tuple[P, Path]]:
    """What `start` starts in a session of its own, with an environment whose temporary folder is its own, and the file
    it writes to; leaving kills every process in the session and removes the folder."""
    with tempfile.TemporaryDirectory(prefix="host-", ignore_cleanup_errors=True) as folder:
        log = Path(folder) / "log.txt"
        process = start({**env, "TMPDIR": folder}, log)
        try:
            yield process, log
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def receive(process: Process, pipe: Connection, log: Path, seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not pipe.poll(0.5):
        watch(process, log, deadline)
    try:
        return pipe.recv()
    except EOFError:
        raise HostError("the host closed its pipe", words_of(log)) from None


def watch(process: Process, log: Path, deadline: float) -> None:
    """Raises HostError once the process has ended or the time is over."""
    if (code := process.poll()) is not None:
        raise HostError(f"the host ended with code {code}", words_of(log))
    if time.monotonic() > deadline:
        raise HostError("the host did not answer in time", words_of(log))


def words_of(log: Path) -> str:
    return log.read_text(errors="replace")


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
