"""A `siglane serve` of a command's own, ready to answer, which ends with the command."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO

from siglane.errors import SiglaneError

HOST = "127.0.0.1"
STOP_SECONDS = 40.0


@contextlib.contextmanager
def own_server(
    words: Sequence[str], port: int, log: IO[str], patience: float, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """Its address, without `/v1`. Stopped by SIGTERM at the end, which it must survive.

    words: MODEL and options; log: where its stderr goes; patience: seconds until it is ready; environment: its, None
    for this process's. SiglaneError with its last line when it does not start, or ends badly.
    """
    command = [sys.executable, "-m", "siglane.cli.main", "serve", *words, "--host", HOST, "--port", str(port)]
    process = subprocess.Popen(command, env=environment or dict(os.environ), stderr=log, start_new_session=True)
    try:
        _wait_until_ready(process, port, log, patience)
        yield f"http://{HOST}:{port}"
    finally:
        process.terminate()
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    if code != 0:
        raise SiglaneError(f"the server ended with exit code {code}{_last_line(log)}")


def free_port(preferred: int = 0) -> int:
    """`preferred` when nobody listens there, else any port the system gives."""
    for port in (preferred, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return int(probe.getsockname()[1])
    raise SiglaneError(f"no free port on {HOST}")


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: IO[str], patience: float) -> None:
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SiglaneError(f"the server did not start (exit code {process.returncode}){_last_line(log)}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(HOST, port, timeout=5)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise SiglaneError(f"the server was not ready after {patience:.0f} s{_last_line(log)}")


def _last_line(log: IO[str]) -> str:
    """What the server said last, when its log is ours to read."""
    if log is sys.stderr:
        return ""
    log.seek(0)
    lines = log.read().strip().splitlines()
    return f": {lines[-1]}" if lines else ""
