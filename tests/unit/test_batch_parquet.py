"""Parquet in and out of a batch: columns become questions and pictures, answers a table, memory stays flat."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from peak import PEAK
from test_batch import Echo, write_requests

from siglane.batch import parquet_output
from siglane.batch.form import OPENAI, Answer
from siglane.batch.output import Output
from siglane.batch.parquet import Question, Tables, find_tables
from siglane.batch.parquet_output import Journal, journal_of, write_table
from siglane.batch.requests import open_requests
from siglane.batch.row import BadRow, Row
from siglane.batch.run import Plan, run_batch
from siglane.cli.main import main
from siglane.cli.rows import check_kept
from siglane.errors import UserError

PNG = b"\x89PNG the bytes"


def write(path: Path, *, row_group_size: int = 2, **columns: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def tables(*files: str, prompt: str = "What?", keep: tuple[str, ...] = (), **options: Any) -> Tables:
    return Tables(list(files), Question(prompt=prompt, fields={"max_tokens": 3}, **options), keep)


def rows_of(*files: str, **options: Any) -> list[Row | BadRow]:
    return list(tables(*files, **options).source().rows)


def texts_of(rows: list[Row | BadRow]) -> list[str]:
    return [row.body["messages"][0]["content"][-1]["text"] for row in rows if isinstance(row, Row)]


def codes_of(rows: list[Row | BadRow]) -> list[str | None]:
    return [row.code if isinstance(row, BadRow) else None for row in rows]


@pytest.mark.parametrize(
    "kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])]
)
def test_pictures_as_bytes(kind: pa.DataType, tmp_path: Path) -> None:
    values = [PNG, None, b"", PNG]
    as_struct = [None if value is None else {"bytes": value, "path": None} for value in values]
    file = write(tmp_path / "a.parquet", image=pa.array(as_struct if pa.types.is_struct(kind) else values, kind))
    rows = rows_of(file)
    assert [(row.number, row.custom_id) for row in rows] == [(1, "1"), (2, "2"), (3, "3"), (4, "4")]
    assert codes_of(rows) == [None, "missing_value", "missing_value", None]
    first, last = rows[0], rows[3]
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    image, text = first.read()["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert (text["text"], first.read()["max_tokens"], first.images) == ("What?", 3, 1)
    assert first.key == last.key != ""
    assert first.size >= len(PNG)


def test_pictures_as_paths_and_urls(tmp_path: Path) -> None:
    """A path is below the table's folder; Hugging Face's struct without bytes has one too."""
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.png").write_bytes(PNG)
    urls = ["a.png", "https://example.com/a.png", "data:image/png;base64,eA==", str(tmp_path / "t" / "a.png"), "gone"]
    plain = write(tmp_path / "t" / "a.parquet", image=urls)
    struct = write(tmp_path / "t" / "b.parquet", image=[{"bytes": None, "path": url} for url in urls])
    coded = write(tmp_path / "t" / "c.parquet", image=pa.array(urls).dictionary_encode())
    for file in (plain, struct, coded):
        found = [row for row in rows_of(file) if isinstance(row, Row)]
        parts = [row.read()["messages"][0]["content"][0]["image_url"]["url"] for row in found[:4]]
        assert parts[0] == parts[3]
        assert parts[0].startswith("data:image/png;base64,")
        assert parts[1:3] == urls[1:3]
        with pytest.raises(UserError, match="gone: cannot be read"):
            found[4].read()


def test_several_pictures_of_a_row(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", pages=[[b"one", b"two"], [b"one"], [], [None], None])
    rows = rows_of(file, image_column="pages")
    assert codes_of(rows) == [None, None, "missing_value", "missing_value", "missing_value"]
    assert [row.images for row in rows] == [2, 1, 0, 0, 0]


def test_columns_stand_in_the_prompt(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.parquet",
        title=["Ein Café", "{title}", None],
        n=[1, 2, 3],
        tags=[["a", "b"], [], ["ü"]],
        **{"a.b": [True, False, True]},
    )
    rows = rows_of(file, prompt="{{x}} {title}/{n}: {tags} {a.b}")
    assert texts_of(rows) == ['{x} Ein Café/1: ["a", "b"] True', "{x} {title}/2: [] False"]
    assert codes_of(rows) == [None, None, "missing_value"]
    bad = rows[2]
    assert isinstance(bad, BadRow)
    assert bad.message == "column 'title' is null"


def test_ids_from_a_column(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", key=["a", None, "a", "", "x" * 513, "b"], n=range(6))
    rows = rows_of(file, prompt="{n}", id_column="key")
    wrong = ["missing_custom_id", "duplicate_custom_id", "invalid_custom_id", "invalid_custom_id"]
    assert codes_of(rows) == [None, *wrong, None]
    assert [row.custom_id for row in rows if isinstance(row, Row)] == ["a", "b"]
    assert rows_of(file, prompt="{key}", id_column="n")[0].custom_id == "0"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"prompt": "{titel}"}, "has no column 'titel'; its columns are title, blob, n"),
        ({"prompt": "{}"}, "has no column ''"),
        ({"image_column": "picture"}, "has no column 'picture'"),
        ({"prompt": "{n}", "id_column": "id"}, "has no column 'id'"),
        ({"prompt": "{n}", "keep": ("x",)}, "has no column 'x'"),
        ({"image_column": "n"}, "column 'n' of .* holds int64; pictures are bytes, paths, or {bytes, path}"),
        ({"prompt": "{blob}"}, "column 'blob' of .* holds binary, which is no text for the prompt"),
        ({}, "has no column 'image' and --prompt names none"),
        ({"prompt": "a } b"}, "{{ and }} are braces"),
        ({"prompt": "{n:>3}"}, "{n} takes no format"),
        ({"prompt": "{n!r}"}, "{n} takes no format"),
    ],
)
def test_what_is_said_before_a_model_is_loaded(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", title=["a"], blob=[b"b"], n=[1])
    with pytest.raises(UserError, match=complaint) as raised:
        tables(file, **options)
    assert "\n" not in str(raised.value)


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("b", "a", "sub/c", "_delta/x", ".hidden/y"):
        write(tmp_path / f"{name}.parquet", n=[name])
    found = find_tables(str(tmp_path))
    assert [Path(one).stem for one in found] == ["a", "b", "c"]
    assert texts_of(rows_of(*found, prompt="{n}")) == ["a", "b", "sub/c"]
    assert [row.number for row in rows_of(*found, prompt="{n}")] == [1, 2, 3]
    assert find_tables(str(tmp_path / "[ab].parquet")) == found[:2]
    assert find_tables(str(tmp_path / "none.jsonl")) == []
    other = write(tmp_path / "z.parquet", m=["x"])
    with pytest.raises(UserError, match=r"z\.parquet has no column 'n'"):
        tables(found[0], other, prompt="{n}")


def test_the_digest_is_of_all_files(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.parquet", n=[1]), write(tmp_path / "b.parquet", n=[2])
    digest = tables(one, prompt="{n}").digest
    assert tables(one, prompt="{n}").digest == digest
    assert len({digest, tables(other, prompt="{n}").digest, tables(one, other, prompt="{n}").digest}) == 3


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no table")
    whole = Path(write(tmp_path / "whole.parquet", n=["x" * 1000] * 100, row_group_size=100)).read_bytes()
    (tmp_path / "torn.parquet").write_bytes(whole[:-20])
    for name in ("a", "torn", "gone"):
        with pytest.raises(UserError, match=rf"cannot read .*{name}\.parquet"):
            tables(str(tmp_path / f"{name}.parquet"), prompt="{n}")
    (tmp_path / "worn.parquet").write_bytes(whole[:8] + bytes(30) + whole[38:])
    with pytest.raises(UserError, match=r"cannot read .*worn\.parquet"):
        rows_of(str(tmp_path / "worn.parquet"), prompt="{n}")


# --- a table of answers


class Kind(Echo):
    async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        text = body["messages"][0]["content"][-1]["text"]
        if text.startswith("bad"):
            return Answer(400, {"error": {"message": "no", "type": "x", "param": None, "code": "refused"}})
        choices = [{"index": 0, "message": {"content": f"{text}!"}, "finish_reason": "stop"}]
        return Answer(200, {"choices": choices, "usage": {"prompt_tokens": 3, "completion_tokens": 1}})


def answer(found: Tables, out: Path, **plan: Any) -> Journal:
    with Output(journal_of(out), {}) as output:
        rows = (row for row in found.source().rows if not output.has(row))
        asyncio.run(run_batch(rows, Kind(), output, Plan(**plan), stop=asyncio.Event()))
        return Journal(output.path, output.errors_path)


@pytest.mark.parametrize("order", ["input", "done"])
def test_answers_as_a_table(order: str, tmp_path: Path) -> None:
    """In the input's order, with the kept columns in the types that they have there."""
    kept = {
        "when": pa.array([1, 2, 3, 4, 5], pa.timestamp("us")),
        "blob": pa.array([b"\xff", None, b"", b"x", b"y"]),
        "nested": pa.array([{"a": [1]}, {"a": []}, None, {"a": [2, 3]}, {"a": None}]),
        "kind": pa.array(["x", "y", "x", None, "y"]).dictionary_encode(),
    }
    file = write(tmp_path / "in.parquet", text=["a", "bad", None, "b", "a"], key=[*"vwxyv"], **kept)
    found = tables(file, prompt="{text}", id_column="key", keep=tuple(kept))
    out = tmp_path / "out.parquet"
    journal = answer(found, out, order=order)
    assert write_table(out, journal, found.source(), found, lambda _: True, None) == 5
    table = pq.read_table(out)
    assert table.column_names == ["custom_id", *kept, *OPENAI.columns]
    assert table["answer"].to_pylist() == ["a!", None, None, "b!", None]
    codes = [None, "refused", "missing_value", None, "duplicate_custom_id"]
    assert table["error_code"].to_pylist() == codes
    assert table["custom_id"].to_pylist() == [*"vwxyv"]
    assert table["prompt_tokens"].to_pylist() == [3, None, None, 3, None]
    assert json.loads(table["response"][0].as_py())["choices"][0]["finish_reason"] == "stop"
    for name, values in kept.items():
        assert table[name].combine_chunks().to_pylist() == values.to_pylist()
        assert table.schema.field(name).type == values.type
    assert not list(tmp_path.glob("*.part"))


def test_shards_and_limits_of_a_table(tmp_path: Path) -> None:
    file = write(tmp_path / "in.parquet", text=[*"abcdef"])
    found, out = tables(file, prompt="{text}"), tmp_path / "out.parquet"
    journal = answer(found, out)
    assert write_table(out, journal, found.source(), found, lambda number: number % 2 == 1, 4) == 2
    assert pq.read_table(out)["answer"].to_pylist() == ["a!", "c!"]
    journal.answers.write_text("")
    with pytest.raises(UserError, match="row 1 of the input has no answer"):
        write_table(out, journal, found.source(), found, lambda _: True, None)


def test_many_rows_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_output, "GROUP_ROWS", 2000)
    file = write(tmp_path / "in.parquet", text=[f"row {number}" for number in range(5000)], row_group_size=700)
    found, out = tables(file, prompt="{text}", keep=("text",)), tmp_path / "out.parquet"
    journal = answer(found, out)
    assert write_table(out, journal, found.source(), found, lambda _: True, None) == 5000
    table = pq.ParquetFile(out)
    assert table.metadata.num_row_groups > 1
    read = table.read()
    assert [f"{text}!" for text in read["text"].to_pylist()] == read["answer"].to_pylist()


FULL = """
import sys
from pathlib import Path
from test_batch_parquet import finish
finish(Path(sys.argv[1]))
"""


def finish(folder: Path) -> int:
    found = tables(str(folder / "in.parquet"), prompt="{text}")
    journal = Journal(folder / "out.jsonl", folder / "out.errors.jsonl")
    return write_table(folder / "out.parquet", journal, found.source(), found, lambda _: True, None)


def test_a_disk_that_fills_up_leaves_no_table(tmp_path: Path) -> None:
    """Of an earlier one nothing is lost, and the same command writes the new one."""
    file = write(tmp_path / "in.parquet", text=[f"{hash(number):x}" * 5 for number in range(0, 9 << 50, 1 << 43)])
    answer(tables(file, prompt="{text}"), tmp_path / "out.parquet")
    (tmp_path / "out.parquet").write_bytes(b"earlier")
    done = subprocess.run(
        [sys.executable, "-B", "-c", FULL, str(tmp_path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), *sys.path))},
    )
    assert re.search("CannotWrite: cannot write .*out.parquet: .*File too large; the same command", done.stderr)
    assert (tmp_path / "out.parquet").read_bytes() == b"earlier"
    assert not list(tmp_path.glob("*.part"))
    assert finish(tmp_path) == 1152
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 1152


def test_names_that_are_taken(tmp_path: Path) -> None:
    file = write(tmp_path / "in.parquet", answer=["a"], n=[1])
    with pytest.raises(UserError, match="--keep answer: the output has a column of that name already"):
        check_kept(tables(file, prompt="{n}", keep=("answer",)), OPENAI)
    (tmp_path / "mine.parquet").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"mine\.parquet is there and has no mine\.jsonl beside it"):
        journal_of(tmp_path / "mine.parquet")


def test_requests_in_and_a_table_out(tmp_path: Path) -> None:
    lines: list[Any] = []
    for number in range(3):
        content = [{"type": "text", "text": f"text {number}"}]
        lines.append(
            {"custom_id": str(number), "url": "/v1/chat/completions", "body": {"messages": [{"content": content}]}}
        )
    lines.insert(1, b"{broken")
    source = open_requests(write_requests(tmp_path / "in.jsonl", lines), 1 << 20)
    with Output(tmp_path / "out.jsonl", {}) as output:
        asyncio.run(run_batch(source.rows, Kind(), output, Plan(), stop=asyncio.Event()))
        journal = Journal(output.path, output.errors_path)
    assert write_table(tmp_path / "out.parquet", journal, source, None, lambda _: True, None) == 4
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["answer"].to_pylist() == ["text 0!", None, "text 1!", "text 2!"]
    assert table["custom_id"].to_pylist() == ["0", None, "1", "2"]


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "t" / "a.parquet", n=[1])
    rows = write_requests(tmp_path / "in.jsonl", [{}])
    base = ["--base-url", "http://127.0.0.1:1"]

    def words(source: object, *more: str, out: str = "out.jsonl") -> list[str]:
        return ["batch", "m", "-i", str(source), "-o", str(tmp_path / out), *base, *more]

    (tmp_path / "t" / "p.png").write_bytes(PNG)
    for command, complaint in (
        (words(file), "pictures and tables need a --prompt"),
        (words(tmp_path / "t", "-p", "{n}"), "holds pictures and Parquet tables; name one kind by a pattern"),
        (words(file, "-p", "{m}"), "has no column 'm'"),
        (words(file, "-p", "{n}", "--keep", "n"), "--keep needs a Parquet output"),
        (words(rows, "--id-column", "n"), "--id-column names columns, and"),
        (words(rows, "--keep", "n", out="out.parquet"), "--keep names columns, and"),
    ):
        assert main(command) == 2
        assert complaint in capsys.readouterr().err
    assert not list(tmp_path.glob("out.*"))


WITHOUT = """
import sys
sys.modules["pyarrow"] = None
from siglane.cli.main import main
from siglane.cli.rows import check_kept
sys.exit(main(sys.argv[1:]))
"""


def test_without_pyarrow(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", n=[1])
    rows = write_requests(tmp_path / "in.jsonl", [{}])
    for source, out in ((file, "out.jsonl"), (str(rows), "out.parquet")):
        words = ["batch", "m", "-i", source, "-o", str(tmp_path / out), "--base-url", "http://127.0.0.1:1"]
        words += ["-p", "{n}"] if source == file else []
        done = subprocess.run([sys.executable, "-c", WITHOUT, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.strip().endswith("pip install 'siglane[parquet]'")
        assert len(done.stderr.strip().splitlines()) == 1


MEASURE = """
import sys
from siglane.batch.parquet import Question, Tables
found = Tables([sys.argv[1]], Question(prompt="x", fields={}))
before = peak()
count = sum(row.images for row in found.source().rows)
print(count, (peak() - before) >> 20)
"""


@pytest.mark.slow  # a large table
def test_memory_is_flat_in_one_large_row_group(tmp_path: Path) -> None:
    """200 MB of pictures in a single row group, a few in each page; what is held at one time is a few megabytes."""
    import random

    rng = random.Random(0)
    one = [rng.randbytes(200_000) for _ in range(100)]
    schema = pa.schema([("image", pa.binary())])
    options = {"compression": "none", "use_dictionary": False, "write_batch_size": 4}
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, **options) as writer:
        writer.write_table(pa.table({"image": one * 10}, schema), row_group_size=1000)
    assert pq.ParquetFile(tmp_path / "a.parquet").metadata.num_row_groups == 1
    done = subprocess.run(
        [sys.executable, "-c", PEAK + MEASURE, str(tmp_path / "a.parquet")], capture_output=True, text=True, check=True
    )
    count, megabytes = map(int, done.stdout.split())
    assert count == 1000
    assert megabytes < 80
