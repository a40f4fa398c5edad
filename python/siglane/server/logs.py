"""Log lines, as text or as JSON: one line per event whatever a message holds, with the request's id."""

from __future__ import annotations

import atexit
import logging
import os
import re
import sys
import threading
import time
from functools import cache
from typing import Literal, TextIO

import orjson

# line breaks and terminal controls in a message could forge lines or hide them
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
RELAY_SECONDS = 1.0
_LAST = "\0\n"  # the line behind which nothing is relayed
Format = Literal["text", "json"]
_FIELDS = ("request_id", "method", "route", "status", "milliseconds", "code", "key")


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", None)
        where = f" [{request_id}]" if request_id else ""
        line = f"{_time(record)} {record.levelname.lower()}{where} {_one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in _FIELDS if hasattr(record, name)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def begin(format: Format, level: str) -> None:
    """Configures a server's own process. With "json", whatever else is written to stderr, by libraries or by the
    engine's process, leaves this process as JSON too."""
    configure(format, level, _captured_stderr() if format == "json" else sys.stderr)


def configure(format: Format, level: str, stream: TextIO | None = None) -> None:
    """Sends siglane's and uvicorn's log to `stream`, by default stderr, in one format."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    for name in ("siglane", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())


@cache
def _captured_stderr() -> TextIO:
    """The stderr that this process was started with. Its number 2 becomes a pipe, which children inherit: what comes
    from there is passed on if it is a JSON line, else inside of one. This process reads it, so that the last words of
    an engine that crashes are not lost."""
    out = open(os.dup(2), "w", buffering=1)  # noqa: SIM115 - as long as the process
    source, sink = os.pipe()
    os.dup2(sink, 2)
    os.close(sink)
    relay = threading.Thread(target=_relay, args=(source, out), name="stderr-relay", daemon=True)
    relay.start()

    def end() -> None:
        sys.stderr.flush()
        os.write(2, b"\n" + _LAST.encode())  # not the pipe's end: children may have it still
        relay.join(timeout=RELAY_SECONDS)
        os.dup2(out.fileno(), 2)

    atexit.register(end)
    return out


def _relay(source: int, out: TextIO) -> None:
    with open(source, errors="replace") as lines:
        for line in lines:
            if line == _LAST:
                return
            if text := line.rstrip():
                out.write((text if _is_json(text) else _stray(text)) + "\n")


def _is_json(line: str) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except ValueError:
        return False


def _stray(text: str) -> str:
    return JsonFormatter().format(logging.LogRecord("stderr", logging.WARNING, "", 0, "%s", (text,), None))


def _time(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _one_line(message: str) -> str:
    return _CONTROL.sub(lambda found: found.group().encode("unicode_escape").decode(), message)
