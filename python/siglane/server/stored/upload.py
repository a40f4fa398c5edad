"""A file that comes in a form (multipart/form-data, RFC 7578), from the socket to the disk piece by piece."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from siglane.errors import UserError

MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096
MAX_NAME_CHARACTERS = 255
PIECE_BYTES = 1 << 20  # parsed and written at once
UNSAFE = re.compile(r"[\x00-\x1f\x7f]")


class Upload:
    """One file, which is written to `path`, and short fields. What blocks belongs on a thread.

    fields: by name; filename: what the client calls the file, "" before it comes; size: bytes of the file so far.
    UserError for a form that cannot be read, or a file of more than `most_bytes`.
    """

    def __init__(self, content_type: str, path: Path, most_bytes: int) -> None:
        kind, options = parse_options_header(content_type)
        if kind.lower() != b"multipart/form-data" or not options.get(b"boundary"):
            message = "the content type must be multipart/form-data, with a boundary"
            raise UserError(message, code="unsupported_media_type", status=415)
        self.fields: dict[str, str] = {}
        self.filename, self.size = "", 0
        self.path, self._most_bytes = path, most_bytes
        self._file: BinaryIO | None = None
        self._headers: list[tuple[bytearray, bytearray]] = []
        self._field: tuple[str, bytearray] | None = None  # None: the part is the file
        self._whole = False
        with _refusing():
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._headers.clear,
                    "on_header_begin": lambda: self._headers.append((bytearray(), bytearray())),
                    "on_header_field": lambda data, start, end: self._headers[-1][0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._headers[-1][1].extend(data[start:end]),
                    "on_headers_finished": self._begin_part,
                    "on_part_data": self._take,
                    "on_part_end": self._end_part,
                    "on_end": self._end,
                },
            )

    def close(self) -> None:
        """What nobody has taken from `path` is deleted."""
        with suppress(OSError):  # what a full disk has refused is refused again
            if self._file is not None:
                self._file.close()
        self.path.unlink(missing_ok=True)

    def feed(self, data: bytes) -> None:
        with _refusing():
            self._parser.write(data)

    def finish(self) -> None:
        """The file is on the disk when this returns."""
        if not self._whole:
            raise UserError("the form ends before its last boundary", code="invalid_form")
        if self._file is None:
            raise UserError("file is required", code="missing_field", param="file")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _begin_part(self) -> None:
        headers = {bytes(name).lower(): bytes(value) for name, value in self._headers}
        _, options = parse_options_header(headers.get(b"content-disposition"))
        if b"name" not in options:
            raise UserError("a part of the form has no name", code="invalid_form")
        name = _text(options[b"name"])
        if len(self.fields) == MAX_FIELDS or name in self.fields or (name == "file" and self._file is not None):
            raise UserError(f"the form has {name[:80]!r} twice, or too many fields", code="invalid_form")
        if name != "file":
            self._field = name, bytearray()
            return
        self._field = None
        # the last part of a path, whichever system it is from
        given = _text(options.get(b"filename", b"")).replace("\\", "/").rpartition("/")[2]
        self.filename = UNSAFE.sub("_", given)[:MAX_NAME_CHARACTERS] or "file"
        self._file = self.path.open("xb")

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._field is not None:
            name, value = self._field
            value += data[start:end]
            if len(value) > MAX_FIELD_BYTES:
                raise UserError(f"{name[:80]} is too long", code="invalid_value", param=name[:80])
            return
        assert self._file is not None
        self.size += end - start
        if self.size > self._most_bytes:
            raise too_large(self._most_bytes)
        self._file.write(data[start:end])

    def _end_part(self) -> None:
        if self._field is not None:
            name, value = self._field
            self.fields[name] = _text(bytes(value))

    def _end(self) -> None:
        self._whole = True


async def receive(request: Request, upload: Upload, silence: float) -> None:
    """Reads the whole body into `upload`. silence: seconds that the client may send nothing. UserError as `Upload`;
    OSError when the disk refuses the file."""
    piece = bytearray()
    async for chunk in _chunks(request, silence):
        piece += chunk
        if len(piece) >= PIECE_BYTES:
            await run_in_threadpool(upload.feed, bytes(piece))
            piece.clear()
    await run_in_threadpool(upload.feed, bytes(piece))
    await run_in_threadpool(upload.finish)


async def _chunks(request: Request, silence: float) -> AsyncIterator[bytes]:
    stream = aiter(request.stream())
    try:
        while True:
            async with asyncio.timeout(silence):
                chunk = await anext(stream, None)
            if chunk is None:
                return
            yield chunk
    except TimeoutError:
        message = f"the client sent nothing for {silence:g} seconds"
        raise UserError(message, code="request_timeout", status=408) from None
    except ClientDisconnect:
        raise UserError("the client left before the end of the file", code="client_left", status=499) from None


def too_large(most_bytes: int) -> UserError:
    message = f"the file is larger than {most_bytes} bytes, the most that can be stored"
    return UserError(message, code="file_too_large", param="file", status=413)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        raise UserError(f"the form cannot be read: {str(error)[:200]}", code="invalid_form") from error


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
