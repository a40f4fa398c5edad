"""A batch loses nothing: rows are read or named, answered once, written whole, and continued after any interruption."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from siglane.batch.form import Answer
from siglane.batch.keys import DiskSet
from siglane.batch.output import Output, Stopped
from siglane.batch.pictures import ask_pictures
from siglane.batch.pool import EngineDied
from siglane.batch.requests import open_requests
from siglane.batch.row import CHAT, EMBEDDINGS, BadRow, Row
from siglane.batch.rows import CannotWrite
from siglane.batch.run import Plan, run_batch, seed_of
from siglane.batch.window import Window
from siglane.errors import ImageError, UserError

JOB = {"input": "a digest", "model": "tiny"}


def line(custom_id: str, text: str = "hello", **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], **fields}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def image_line(custom_id: str, url: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": custom_id}]
    return line(custom_id, "", messages=[{"role": "user", "content": content}])


def write_requests(path: Path, lines: list[Any]) -> Path:
    encoded = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def read_rows(path: Path, max_line: int = 1 << 20) -> list[Row | BadRow]:
    return list(open_requests(path, max_line).rows)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.read_bytes().splitlines()]


# --- reading


def test_rows_and_what_is_wrong_with_the_others(tmp_path: Path) -> None:
    lines: list[tuple[Any, str | None]] = [
        (b"\xef\xbb\xbf" + json.dumps(line("first")).encode(), None),
        (json.dumps(line("second")).encode() + b"\r", None),
        (b"{broken", "invalid_json"),
        (b'{"custom_id": "x", "url": NaN}', "invalid_json"),
        (b'{"custom_id": "half \\ud800 pair"}', "invalid_json"),
        ('{"custom_id": "Café"}'.encode("latin-1"), "invalid_json"),
        (b"[" * 5000, "invalid_json"),
        (b'["a list"]', "invalid_json"),
        ({"url": CHAT, "body": {}}, "missing_custom_id"),
        ({**line("x"), "custom_id": 7}, "invalid_custom_id"),
        ({**line("x"), "custom_id": ""}, "invalid_custom_id"),
        ({**line("x"), "custom_id": "x" * 513}, "invalid_custom_id"),
        ({**line("other url"), "url": "/v1/images"}, "invalid_url"),
        ({**line("no url"), "url": None}, "invalid_url"),
        ({**line("get"), "method": "GET"}, "invalid_method"),
        ({**line("body"), "body": "text"}, "invalid_body"),
        (line("first"), "duplicate_custom_id"),
        (line("long", "x" * 300_000), "line_too_long"),
        (line("last"), None),
    ]
    path = write_requests(tmp_path / "in.jsonl", [one for one, _ in lines])
    rows = read_rows(path, max_line=200_000)
    assert [row.number for row in rows] == list(range(1, len(lines) + 1))
    assert [row.code if isinstance(row, BadRow) else None for row in rows] == [code for _, code in lines]
    assert [row.custom_id for row in rows if isinstance(row, Row)] == ["first", "second", "last"]
    assert rows[16].custom_id == "first"
    assert open_requests(path, 1).count == len(lines)


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\n \r\n" + json.dumps(line("a")).encode() + b"\n\n" + json.dumps(line("b")).encode())
    assert [(row.number, row.custom_id) for row in read_rows(path)] == [(3, "a"), (5, "b")]
    assert open_requests(path, 1).count == 2


def test_an_input_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        open_requests(tmp_path / "none.jsonl", 1)
    (tmp_path / "wide.jsonl").write_text(json.dumps(line("a")), encoding="utf-16")
    with pytest.raises(UserError, match="UTF-16; save it as UTF-8"):
        open_requests(tmp_path / "wide.jsonl", 1)


def test_a_long_line_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(b"x" * (20 << 20) + b"\n")
        file.write(json.dumps(line("a")).encode())
    assert [type(row) for row in read_rows(path, max_line=1 << 10)] == [BadRow, Row]


def test_pictures_are_rows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"data")
    source = ask_pictures([str(tmp_path / "a.png"), str(tmp_path / "gone.png")], "What is it?", {"max_tokens": 3})
    first, second = source.rows
    assert isinstance(first, Row)
    assert isinstance(second, Row)
    assert (first.custom_id, first.url, source.count) == (str(tmp_path / "a.png"), CHAT, 2)
    assert first.read() == {
        "max_tokens": 3,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/any;base64,ZGF0YQ=="}},
                    {"type": "text", "text": "What is it?"},
                ],
            }
        ],
    }
    with pytest.raises(ImageError, match=r"gone\.png: cannot be read"):
        second.read()


# --- the window


def row(number: int, key: str = "", size: int = 1) -> Row:
    return Row(number, str(number), CHAT, {}, size, key)


def test_equal_pictures_leave_together(tmp_path: Path) -> None:
    urls = ["data:a", "data:b", "data:c"]
    path = write_requests(tmp_path / "in.jsonl", [image_line(str(number), urls[number % 3]) for number in range(9)])
    window = Window(100)
    for one in read_rows(path):
        assert isinstance(one, Row)
        window.add(one)
    assert [window.take().number for _ in range(9)] == [1, 4, 7, 2, 5, 8, 3, 6, 9]


def test_equal_beginnings_leave_together(tmp_path: Path) -> None:
    systems = [[{"role": "system", "content": f"You are {number % 2}"}] for number in range(4)]
    last = [{"role": "user", "content": "hello"}]
    lines = [line(str(number), "", messages=[*systems[number], *last]) for number in range(4)]
    found = [one for one in read_rows(write_requests(tmp_path / "in.jsonl", lines)) if isinstance(one, Row)]
    assert found[0].key == found[2].key != found[1].key == found[3].key
    assert read_rows(write_requests(tmp_path / "in.jsonl", [line("a")]))[0].key == ""  # type: ignore[union-attr]
    embedded = {"custom_id": "e", "url": EMBEDDINGS, "body": {"input": [{"image": "data:a"}]}}
    assert read_rows(write_requests(tmp_path / "in.jsonl", [embedded]))[0].key != ""  # type: ignore[union-attr]


def test_the_window_is_bounded_and_nobody_waits_for_ever() -> None:
    window = Window(4, most_bytes=10)
    assert window.has_room(beside=0)
    window.add(row(1, size=50))  # one always may
    assert not window.has_room(beside=0)
    assert window.take().number == 1
    assert not window.has_room(beside=4)
    window.add(row(2, "same"))
    window.add(row(3, "other"))
    taken = []
    for number in range(4, 20):
        window.add(row(number, "same"))
        taken.append(window.take().number)
    assert taken.index(3) <= 5
    assert len(window) == 2


@given(st.lists(st.tuples(st.sampled_from("abc "), st.integers(0, 5)), max_size=40), st.integers(1, 8))
def test_every_row_leaves_once(keys: list[tuple[str, int]], rows: int) -> None:
    window, left = Window(rows, most_bytes=8), []
    for number, (key, size) in enumerate(keys):
        while not window.has_room(beside=0):
            left.append(window.take().number)
        window.add(row(number, key.strip(), size))
    while window:
        left.append(window.take().number)
    assert sorted(left) == list(range(len(keys)))


def test_a_set_on_the_disk() -> None:
    keys = DiskSet()
    assert [keys.add(key) for key in ("a", "b", "a", "\udce9")] == [True, True, False, True]
    assert "a" in keys
    assert "c" not in keys
    keys.close()


# --- running


class Echo:
    """Answers with the row's own text, later rows sooner. dies: how often the engine dies under a row, by its text;
    asked: texts in the order of their asking; most: rows that were asked at one time."""

    def __init__(self, slots: int = 5, dies: Mapping[str, int] | None = None) -> None:
        self.slots, self.dies, self.dies_alone = slots, Counter(dies or {}), True
        self.asked: list[str] = []
        self.working: set[str] = set()
        self.most = 0
        self.alone: list[str] = []

    async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        text = body["messages"][0]["content"]
        self.asked.append(text)
        self.working.add(text)
        self.most = max(self.most, len(self.working))
        if len(self.working) == 1:
            self.alone.append(text)
        try:
            for _ in range(3 - len(self.asked) % 3):
                await asyncio.sleep(0)
            if self.dies[text] > 0:
                self.dies[text] -= 1
                raise EngineDied(alone=self.dies_alone)
        finally:
            self.working.discard(text)
        if text.startswith("bad"):
            error = {"message": f"{text} is refused", "type": "invalid_request_error", "param": None, "code": "refused"}
            return Answer(400, {"error": error})
        usage = {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": len(self.asked), "image_tokens": 0}}
        choices = [{"index": 0, "text": text, "seed": body["seed"]}]
        return Answer(
            200, {"id": f"x{len(self.asked)}", "created": len(self.asked), "choices": choices, "usage": usage}
        )


def run(
    source: Path,
    out: Path,
    server: Any = None,
    plan: Plan | None = None,
    stop_after: int | None = None,
    max_errors: int | None = None,
) -> Output:
    async def go() -> None:
        stop = asyncio.Event()

        def written(row: Row | BadRow, answer: Answer | None) -> None:
            if stop_after is not None and output.found >= stop_after:
                stop.set()

        rows = (one for one in open_requests(source, 1 << 20).rows if not output.has(one))
        await run_batch(rows, server or Echo(), output, plan or Plan(window=16), stop=stop, written=written)

    with Output(out, JOB, max_errors=max_errors) as output:
        asyncio.run(go())
    return output


def mixed(count: int) -> list[Any]:
    """Rows of which every fifth is bad, by its line or by the server."""
    lines: list[Any] = [line(f"id {number}", f"text {number}") for number in range(count)]
    for number in range(3, count, 10):
        lines[number] = b"{broken"
    for number in range(8, count, 10):
        lines[number] = line(f"id {number}", f"bad {number}")
    return lines


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_requests(tmp_path_factory.mktemp("source") / "in.jsonl", mixed(30))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Both files of a run that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out.jsonl"
    run(source, out)
    return files_of(out)


def files_of(out: Path) -> tuple[bytes, bytes]:
    return out.read_bytes(), out.with_name("out.errors.jsonl").read_bytes()


def test_answers_stand_in_the_order_of_the_input(whole: tuple[bytes, bytes]) -> None:
    answers, errors = ([json.loads(row) for row in one.splitlines()] for one in whole)
    good = [number for number in range(30) if number % 10 not in (3, 8)]
    assert [row["custom_id"] for row in answers] == [f"id {number}" for number in good]
    assert answers[0]["error"] is None
    body = answers[0]["response"]["body"]
    assert body["choices"][0] == {"index": 0, "text": "text 0", "seed": seed_of(0, "id 0")}
    assert (body["created"], body["usage"]["prompt_tokens_details"]) == (0, {"image_tokens": 0})
    assert [row["line"] for row in errors] == [4, 9, 14, 19, 24, 29]
    assert errors[0]["error"]["code"] == "invalid_json"
    assert errors[0]["response"] is errors[0]["custom_id"] is None
    assert errors[1]["error"] == {"code": "refused", "message": "bad 8 is refused"}
    assert errors[1]["response"]["status_code"] == 400
    assert len({row["id"] for row in (*answers, *errors)}) == 30


def test_as_done_holds_the_same_rows(source: Path, whole: tuple[bytes, bytes], tmp_path: Path) -> None:
    run(source, tmp_path / "out.jsonl", plan=Plan(order="done", window=16))
    assert [sorted(one.splitlines()) for one in files_of(tmp_path / "out.jsonl")] == [
        sorted(one.splitlines()) for one in whole
    ]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_killed_at_any_byte_it_ends_the_same(
    data: st.DataObject, source: Path, whole: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """Of both files any beginning may be on the disk."""
    out = tmp_path / "out.jsonl"
    run(source, out)
    for name, content in zip(("out.jsonl", "out.errors.jsonl"), whole, strict=True):
        (tmp_path / name).write_bytes(content[: data.draw(st.integers(0, len(content)), label=name)])
    if data.draw(st.booleans(), label="stopped once more"):
        with Output(out, JOB) as output:
            found = output.found
        if found < 28:
            with pytest.raises(Stopped):
                run(source, out, stop_after=found + 1)
    run(source, out)
    assert files_of(out) == whole


def test_what_is_finished_is_not_asked_again(source: Path, whole: tuple[bytes, bytes], tmp_path: Path) -> None:
    server = Echo()
    with pytest.raises(Stopped, match="the same command continues"):
        run(source, tmp_path / "out.jsonl", server, stop_after=10)
    before = [*records(tmp_path / "out.jsonl"), *records(tmp_path / "out.errors.jsonl")]
    assert 10 <= len(before) < 30
    again = Echo()
    output = run(source, tmp_path / "out.jsonl", again)
    asked_before = [row["custom_id"] for row in before if row["custom_id"] is not None]
    assert len(again.asked) == 27 - len(asked_before)  # three lines are broken
    assert not {f"id {text.split()[1]}" for text in again.asked} & set(asked_before)
    assert output.found == 30
    assert files_of(tmp_path / "out.jsonl") == whole
    idle = Echo()
    run(source, tmp_path / "out.jsonl", idle)
    assert idle.asked == []


def test_slots_and_window_bound_what_is_held(source: Path, tmp_path: Path) -> None:
    server = Echo(slots=3)
    run(source, tmp_path / "out.jsonl", server)
    assert server.most == 3


def test_the_server_is_asked_in_order_however_long_files_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third file is gone, the first ones are read last."""
    paths = [tmp_path / f"{number:02}.png" for number in range(12)]
    for number, path in enumerate(paths):
        if number % 3:
            path.write_bytes(b"data")
    read = Row.read

    def read_late(row: Row) -> Mapping[str, Any]:
        time.sleep(0.02 * (4 - row.number % 4))
        return {"messages": [{"content": row.custom_id}]} if read(row) else {}

    monkeypatch.setattr(Row, "read", read_late)
    server = Echo(slots=6)

    async def go() -> None:
        with Output(tmp_path / "out.jsonl", JOB) as output:
            source = ask_pictures(map(str, paths), "?", {})
            await run_batch(source.rows, server, output, Plan(), stop=asyncio.Event())

    asyncio.run(go())
    assert server.asked == [str(path) for path in paths if path.exists()]


def test_a_row_that_kills_the_engine_twice_is_left(source: Path, whole: tuple[bytes, bytes], tmp_path: Path) -> None:
    """Those that ran beside it are asked again alone and get their answers."""
    server = Echo(dies={"text 5": 9, "text 4": 1, "text 6": 1, "text 20": 1})
    output = run(source, tmp_path / "out.jsonl", server)
    assert server.dies["text 5"] == 7
    assert output.failures["engine_died"] == 1
    (dead,) = [row for row in records(tmp_path / "out.errors.jsonl") if row["custom_id"] == "id 5"]
    assert dead["error"] == {"code": "engine_died", "message": "the engine died 2 times under this row"}
    assert dead["response"]["status_code"] == 500
    assert set(server.alone) >= {"text 4", "text 5", "text 6", "text 20"}
    rest = [row for row in whole[0].splitlines() if json.loads(row)["custom_id"] != "id 5"]
    assert (tmp_path / "out.jsonl").read_bytes().splitlines() == rest


def test_a_row_that_dies_beside_others_is_asked_more_often(
    source: Path, whole: tuple[bytes, bytes], tmp_path: Path
) -> None:
    """They may be the cause: requests of clients, which a batch knows nothing of."""
    first, second = (json.loads(line)["response"]["body"]["choices"][0]["text"] for line in whole[0].splitlines()[:2])
    server = Echo(dies={first: 4, second: 5})
    server.dies_alone = False
    output = run(source, tmp_path / "out.jsonl", server)
    assert output.failures["engine_died"] == 1
    answers, errors = files_of(tmp_path / "out.jsonl")
    assert answers.splitlines() == whole[0].splitlines()[:1] + whole[0].splitlines()[2:]
    assert b"the engine died 5 times under this row" in errors


def test_too_many_errors_stop_it(source: Path, whole: tuple[bytes, bytes], tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="3 rows failed, more than --max-errors 2"):
        run(source, tmp_path / "out.jsonl", max_errors=2)
    assert len(records(tmp_path / "out.errors.jsonl")) == 3
    run(source, tmp_path / "out.jsonl")
    assert files_of(tmp_path / "out.jsonl") == whole


def test_seeds_are_functions_of_the_row() -> None:
    assert seed_of(0, "a") == seed_of(0, "a") != seed_of(1, "a") != seed_of(1, "b")
    assert 0 <= seed_of(0, "\udce9") < 1 << 31


# --- the files


def test_another_job_is_refused_by_what_differs(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run(source, out)
    before = files_of(out)
    with pytest.raises(UserError, match=r'belongs to another job: model was "tiny", is "large"; name another file'):
        Output(out, {**JOB, "model": "large"})
    with pytest.raises(UserError, match="seed was null, is 3"):
        Output(out, {**JOB, "seed": 3})
    (tmp_path / "out.manifest.json").unlink()
    with pytest.raises(UserError, match=r"has rows and no out\.manifest\.json beside it"):
        Output(out, JOB)
    (tmp_path / "out.manifest.json").write_text("{")
    with pytest.raises(UserError, match="name another output"):
        Output(out, JOB)
    assert files_of(out) == before


def test_files_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        Output(tmp_path / "none" / "out.jsonl", JOB)
    with Output(tmp_path / "out.jsonl", JOB), pytest.raises(UserError, match="being written by another run"):
        Output(tmp_path / "out.jsonl", JOB)
    (tmp_path / "notes.jsonl").write_text("my notes\nand more\n")
    with pytest.raises(UserError, match="line 1 is not a row with 'custom_id'"):
        Output(tmp_path / "notes.jsonl", JOB)
    assert (tmp_path / "notes.jsonl").read_text() == "my notes\nand more\n"
    with pytest.raises(UserError, match="it is a folder"):
        Output(tmp_path, JOB)


def test_the_input_as_the_output_keeps_its_last_line(tmp_path: Path) -> None:
    """Which has no end in many files."""
    for before in ("", '{"custom_id": "a"}\n'):
        file = tmp_path / "requests.jsonl"
        file.write_text(text := before + '{"custom_id": "b"}')
        with pytest.raises(
            UserError, match=rf"line {1 + bool(before)} is not a row with 'custom_id'; name another file"
        ):
            Output(file, JOB)
        assert file.read_text() == text


@pytest.mark.parametrize("line", ["my notes", '{"x": 1}', "[" * 100_000], ids=["words", "another row", "deep"])
def test_one_whole_line_of_somebody_elses_is_not_cut_off(tmp_path: Path, line: str) -> None:
    """A row that was half-written has no end, or stands behind others."""
    file = tmp_path / "notes.jsonl"
    file.write_text(f"{line}\n")
    with pytest.raises(UserError, match="line 1 is not a row with 'custom_id'; name another file"):
        Output(file, JOB)
    assert file.read_text() == f"{line}\n"


def test_a_disk_that_fails(
    source: Path, whole: tuple[bytes, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every row once: an error of the disk, of a write in part and of fsync."""
    write, fsync = os.write, os.fsync
    left = 0

    def failing(descriptor: int, data: bytes) -> int:
        nonlocal left
        if (left := left - 1) < 0:
            write(descriptor, data[:5])
            raise OSError(errno.EIO, "Input/output error")
        return write(descriptor, data)

    for rows in (0, 1, 4, 7):
        left = rows
        monkeypatch.setattr(os, "write", failing)
        with pytest.raises(CannotWrite, match="Input/output error; its rows so far are whole"):
            run(source, tmp_path / "out.jsonl", plan=Plan(window=16))
        monkeypatch.setattr(os, "write", write)
        assert all(whole[0].startswith(one) for one in files_of(tmp_path / "out.jsonl")[:1])
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(CannotWrite):
        run(source, tmp_path / "out.jsonl")
    monkeypatch.setattr(os, "fsync", fsync)
    run(source, tmp_path / "out.jsonl")
    assert files_of(tmp_path / "out.jsonl") == whole


FULL = """
import sys
from pathlib import Path
from test_batch import run
run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_disk_that_fills_up(source: Path, whole: tuple[bytes, bytes], tmp_path: Path) -> None:
    """The limit on a file's size stops a write in the middle of a line, as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", FULL, str(source), str(tmp_path / "out.jsonl")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))},
    )
    assert "CannotWrite: cannot write" in done.stderr
    answers, _ = files_of(tmp_path / "out.jsonl")
    assert 1000 < len(answers) <= 3000
    assert whole[0].startswith(answers)
    assert answers.endswith(b"\n")
    run(source, tmp_path / "out.jsonl")
    assert files_of(tmp_path / "out.jsonl") == whole


class Forgetful(Echo):
    async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        del self.asked[6:], self.alone[6:]
        return await super().ask(url, {**body, "messages": [{"content": body["messages"][0]["content"][:9]}]})


def rows_of(count: int) -> Iterator[Row | BadRow]:
    for number in range(1, count + 1):
        text = f"text {number}" + "x" * 2000
        yield Row(number, str(number), CHAT, {"messages": [{"content": text}]}, 2100, "")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    import tracemalloc

    seen: list[int] = []
    tracemalloc.start()

    def written(row: Row | BadRow, answer: Answer | None) -> None:
        if row.number in (1000, 10_000):
            seen.append(tracemalloc.get_traced_memory()[0])

    with Output(tmp_path / "out.jsonl", JOB) as output:
        asyncio.run(
            run_batch(rows_of(10_100), Forgetful(), output, Plan(window=64), stop=asyncio.Event(), written=written)
        )
    tracemalloc.stop()
    assert seen[1] < 1.1 * seen[0] + 100_000
