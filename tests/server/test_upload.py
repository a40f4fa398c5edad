"""Files that come in forms: whatever a client sends, the disk holds whole files or nothing."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from serving import RunningServer, assert_error, head, read_all, running
from waiting import eventually

from siglane.engine.process.supervisor import EngineProcess
from siglane.errors import UserError
from siglane.families.processor import Processor
from siglane.server.stored.upload import Upload

KIND = "multipart/form-data; boundary=xyz"
FILES = "/v1/files"


def part(disposition: str, data: bytes, *headers: str) -> bytes:
    lines = [f"Content-Disposition: form-data; {disposition}", *headers]
    return b"--xyz\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + data + b"\r\n"


PURPOSE = part('name="purpose"', b"batch")
FILE = part('name="file"; filename="a.jsonl"', b"data")
END = b"--xyz--\r\n"


def form_head(length: int) -> bytes:
    return head(FILES, content_length=length).replace(b"application/json", KIND.encode())


def names(server: RunningServer) -> list[str]:
    assert server.served.config.data_dir is not None
    return [path.name for path in (server.served.config.data_dir / "files").iterdir()]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_however_the_body_is_cut(size: int, tmp_path: Path) -> None:
    data = bytes(range(256)) * 3 + b"\r\n--xy\r\n--xyz-\r\n\r"
    body = PURPOSE + part('name="file"; filename="C:\\\\dir\\\\a\tb.jsonl"', data, "Content-Type: text/plain") + END
    upload = Upload(KIND, tmp_path / "part", 10_000)
    for start in range(0, len(body), size):
        upload.feed(body[start : start + size])
    upload.finish()
    assert upload.fields == {"purpose": "batch"}
    assert (upload.filename, upload.size) == ("a_b.jsonl", len(data))
    assert (tmp_path / "part").read_bytes() == data
    upload.close()
    assert not (tmp_path / "part").exists()


def test_a_large_file_is_never_in_memory(tmp_path: Path) -> None:
    upload = Upload(KIND, tmp_path / "part", 1 << 30)
    piece = bytes(1 << 20)
    upload.feed(PURPOSE + FILE.removesuffix(b"\r\n"))
    tracemalloc.start()
    for _ in range(64):
        upload.feed(piece)
    upload.feed(b"\r\n" + END)
    upload.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert upload.size == (64 << 20) + 4
    assert peak < 4 << 20
    upload.close()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_form"),
        (b"no form", "invalid_form"),
        (PURPOSE + FILE, "invalid_form"),
        (PURPOSE + END, "missing_field"),
        (FILE + END, "invalid_value"),
        (PURPOSE + FILE + FILE + END, "invalid_form"),
        (PURPOSE + PURPOSE + FILE + END, "invalid_form"),
        (part('filename="x"', b"x") + END, "invalid_form"),
        (part('name="purpose"', b"x" * 5000) + END, "invalid_value"),
        (part('name="purpose"', b"batch") + part('name="model"', b"x") + FILE + END, "unsupported_field"),
        (b"".join(part(f'name="{number}"', b"") for number in range(17)) + END, "invalid_form"),
        (PURPOSE + part('name="file"; filename="x"', b"") + END, "empty_file"),
        (PURPOSE + part('name="expires_after[seconds]"', b"3600") + FILE + END, "invalid_value"),
        (b"--xyz\r\n" + b"A: b\r\n" * 100_000, "invalid_form"),
    ],
)
def test_a_form_that_cannot_be_used(body: bytes, code: str, stored: RunningServer) -> None:
    before = names(stored)
    with stored.http() as http:
        assert_error(http.post(FILES, content=body, headers={"content-type": KIND}), 400, code)
    assert names(stored) == before


def test_no_form_at_all(stored: RunningServer) -> None:
    with stored.http() as http:
        for kind in ("application/json", "multipart/form-data", "multipart/mixed; boundary=x", ""):
            assert_error(http.post(FILES, content=b"{}", headers={"content-type": kind}), 415, "unsupported_media_type")


def test_too_large_is_refused_before_it_is_read(stored: RunningServer) -> None:
    with stored.connect() as connection:
        length = stored.served.config.max_file_bytes + (2 << 20)
        connection.sendall(form_head(length))
        assert b" 413 " in read_all(connection).splitlines()[0]


def test_who_sends_nothing_more_is_left(processor: Processor, engine: EngineProcess, tmp_path: Path) -> None:
    with running(processor, engine, data_dir=tmp_path, body_timeout=0.5) as server:
        before = names(server)
        with server.connect() as connection:
            connection.sendall(form_head(1000) + PURPOSE + FILE)
            answer = read_all(connection)
        assert b" 408 " in answer.splitlines()[0]
        assert b"request_timeout" in answer
        assert names(server) == before


def test_who_leaves_leaves_nothing(stored: RunningServer) -> None:
    before = names(stored)
    with stored.connect() as connection:
        connection.sendall(form_head(5 << 20))
        connection.sendall(PURPOSE + FILE.removesuffix(b"\r\n") + bytes(2 << 20))
        eventually(lambda: len(names(stored)) == len(before) + 1)
    eventually(lambda: names(stored) == before)


def test_a_boundary_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Upload("multipart/form-data; boundary=" + "x" * 500, tmp_path / "part", 10)
