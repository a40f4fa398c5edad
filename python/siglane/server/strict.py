"""HTTP/1.1 read strictly: what a proxy in front might read otherwise is refused, or one client's bytes could become
another's request (RFC 9112, section 11.2)."""

from __future__ import annotations

import re
from typing import Any

import h11

# a lone CR or LF, where some end a line and others do not, and a header that goes on in the next line
_ODD_LINES = re.compile(rb"\r(?!\n|\Z)|(?<!\r)\n|\r\n[ \t]")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{0,16}\r?")
_END_OF_CHUNK = re.compile(rb"\A\r?\n?")  # h11 may have taken the first byte of it, and checks both


class StrictConnection(h11.Connection):
    """A server's side. `next_event` raises RemoteProtocolError for what h11 lets pass: bare line feeds, folded lines, a
    length beside chunks, chunks in HTTP/1.0, and chunks with extensions or trailers, which no client here sends."""

    def __init__(self, max_incomplete_event_size: int) -> None:
        super().__init__(h11.SERVER, max_incomplete_event_size)
        self._size_is_next = self._last_chunk = False

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE and _ODD_LINES.search(self.trailing_data[0].partition(b"\r\n\r\n")[0]):
            raise h11.RemoteProtocolError("a line of the head does not end with CR LF, or goes on in the next one")
        if self.their_state is h11.SEND_BODY and self._size_is_next:
            self._check_chunk(self.trailing_data[0])
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._size_is_next, self._last_chunk = _is_chunked(event), False
        elif isinstance(event, h11.Data):
            self._size_is_next = event.chunk_end
        return event

    def _check_chunk(self, data: bytes) -> None:
        """data: what stands between two chunks' bytes, as much of it as is there."""
        if not self._last_chunk:
            size, end, data = _END_OF_CHUNK.sub(b"", data).partition(b"\r\n")
            if not _CHUNK_SIZE.fullmatch(size):
                raise h11.RemoteProtocolError("the head of a chunk is more than its size")
            self._last_chunk = bool(end and size) and not size.strip(b"0")
            self._size_is_next = self._last_chunk or not end  # h11 takes a whole line, even with nothing behind it
        if self._last_chunk and data[:2] not in (b"", b"\r", b"\r\n"):
            raise h11.RemoteProtocolError("something stands behind the last chunk")


def _is_chunked(request: h11.Request) -> bool:
    names = {name for name, _ in request.headers}
    chunked = b"transfer-encoding" in names
    if chunked and (b"content-length" in names or request.http_version != b"1.1"):
        raise h11.RemoteProtocolError("chunks beside a length, or in HTTP/1.0")
    return chunked
