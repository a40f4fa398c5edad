"""Training data: every row of every source is used, or named and counted."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_train_siglip import add, picture, run, write_config, write_lines, write_shards

from siglane.cli.main import main
from siglane.errors import UserError
from siglane.training.pairs import drawn_pairs, fingerprint, open_pairs
from siglane.training.report import BadRow, Skipped
from siglane.training.run import MODEL


def encoded(number: int = 0, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture(number)[0].save(file, kind)
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            add(tar, name, data)
    return path


def read_tar(tmp_path: Path, files: dict[str, bytes]) -> tuple[dict[str, str], dict[str, str]]:
    """Captions of the pairs and reasons of the rest, by what follows the shard's name."""
    pairs, bad = open_pairs(write_tar(tmp_path / "0.tar", files | {"good.png": encoded(), "good.txt": b"good"}).parent)
    captions = {pair.name.partition(".tar:")[2]: pair.caption for pair in pairs.pairs}
    assert captions.pop("good") == "good"
    assert all(pair.picture().rgb.shape[2] == 3 for pair in pairs.pairs)
    return captions, {row.name.partition(".tar:")[2]: row.reason for row in bad}


PNG, JPEG = encoded(), encoded(1, "JPEG")


@pytest.mark.parametrize(
    ("files", "captions", "reasons"),
    [
        # names with dots
        ({"IMG.2023.jpg": JPEG, "IMG.2023.txt": b"one"}, {"IMG.2023": "one"}, {}),
        ({"s.input.jpg": JPEG, "s.output.txt": b"one"}, {"s": "one"}, {}),
        (
            {"IMG.2.jpg": JPEG, "IMG.1.jpg": JPEG, "IMG.1.txt": b"one", "IMG.2.txt": b"two"},
            {"IMG.1": "one", "IMG.2": "two"}, {},
        ),
        ({"v1.0/a.jpg": JPEG, "v1.0/a.txt": b"one", "v1.0/b.c.jpg": JPEG, "v1.0/b.c.txt": b"two"},
         {"v1.0/a": "one", "v1.0/b.c": "two"}, {}),
        ({"IMG.1.jpg": JPEG, "IMG.1.txt": b"one", "IMG.2.jpg": JPEG}, {"IMG.1": "one"}, {"IMG.2": "no caption"}),
        ({"IMG.1.jpg": JPEG, "IMG.1.txt": b"one", "IMG.2.txt": b"2"}, {"IMG.1": "one"}, {"IMG.2": "no picture"}),
        ({"s.a.jpg": JPEG, "s.b.jpg": JPEG, "s.txt": b"?"}, {}, {"s": "more than one picture"}),
        ({"s.a.txt": b"?", "s.b.txt": b"?", "s.jpg": JPEG}, {}, {"s": "more than one caption"}),
        ({"s.jpg": JPEG, "s.txt": b"one", "s.mask.png": PNG, "s.json": b"{}"}, {"s": "one"}, {}),
        # extensions, folders, hidden files
        ({"A.JPG": JPEG, "A.TXT": b"one", "b.JpEg": JPEG, "b.txt": b"two"}, {"A": "one", "b": "two"}, {}),
        ({"x/1.png": PNG, "x/1.txt": b"one", "y/1.png": PNG, "y/1.txt": b"two"}, {"x/1": "one", "y/1": "two"}, {}),
        ({"./1.png": PNG, "./1.txt": b"one"}, {"./1": "one"}, {}),
        ({"a.gif": encoded(2, "GIF"), "a.txt": b"one", "b.bmp": encoded(2, "BMP"), "b.txt": b"two"},
         {"a": "one", "b": "two"}, {}),
        ({"d/._a.png": b"x", "d/.a.txt": b"x"}, {},
         {"d/._a.png": "a hidden file: its name begins with a dot",
          "d/.a.txt": "a hidden file: its name begins with a dot"}),
        ({"a.tif": b"II*", "a.json": b"{}"}, {}, {"a": "neither picture nor caption, only .tif, .json"}),
        ({"a.tif": b"II*", "a.txt": b"one"}, {}, {"a": "no picture"}),
        ({"README": b"words"}, {}, {}),
        # captions
        ({"a.png": PNG, "a.txt": "ein Café".encode("utf-16")}, {"a": "ein Café"}, {}),
        ({"a.png": PNG, "a.txt": "ein Café".encode("utf-32")}, {"a": "ein Café"}, {}),
        ({"a.png": PNG, "a.txt": "﻿ein Café\r\n".encode()}, {"a": "ein Café"}, {}),
        ({"a.png": PNG, "a.txt": "ein Café".encode("latin-1")}, {}, {"a": "the caption is not UTF-8 text"}),
        ({"a.png": PNG, "a.txt": "ein Cafe".encode("utf-16-le")}, {}, {"a": "the caption is not UTF-8 text"}),
        ({"a.png": PNG, "a.txt": b"\xff\xfea"}, {}, {"a": "the caption is not UTF-16 text"}),
        ({"a.png": PNG, "a.txt": b""}, {}, {"a": "no caption"}),
        ({"a.png": PNG, "a.txt": "﻿ \r\n".encode()}, {}, {"a": "no caption"}),
    ],
)  # fmt: skip
def test_a_sample_is_used_or_named(
    files: dict[str, bytes], captions: dict[str, str], reasons: dict[str, str], tmp_path: Path
) -> None:
    assert read_tar(tmp_path, files) == (captions, reasons)


def test_a_name_that_stands_twice_and_links(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("a.png", PNG), ("a.txt", b"one"), ("a.txt", b"two"), ("b.png", PNG), ("b.txt", b"b")):
            add(tar, name, data)
        for name, kind in (("c.png", tarfile.LNKTYPE), ("d.png", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "b.png"
            tar.addfile(entry)
        add(tar, "c.txt", b"c")
        add(tar, "d.txt", b"d")
        folder = tarfile.TarInfo("e.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    pairs, bad = open_pairs(tmp_path)
    assert [(pair.caption, pair.picture().digest) for pair in pairs.pairs] == [
        (caption, pairs[0].picture().digest) for caption in "bc"
    ]
    assert [(row.name.rpartition(":")[2], row.reason) for row in bad] == [
        ("a", "more than one caption"), ("d", "no picture"),
    ]  # fmt: skip


def test_a_tar_that_ends_early_gives_what_stands_before(tmp_path: Path) -> None:
    write_shards(tmp_path)
    whole = (tmp_path / "00001.tar").read_bytes()
    (tmp_path / "00001.tar").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.tar.gz").write_bytes(b"")
    (tmp_path / "3.TAR").write_bytes(whole)
    pairs, bad = open_pairs(tmp_path)
    names = [pair.name.rpartition("/")[2] for pair in pairs.pairs]
    assert names[:6] == [f"00000.tar:{number:03}" for number in range(6)]
    assert names[-6:] == [f"3.TAR:{number:03}" for number in range(6, 12)]
    early = [name for name in names if name.startswith("00001")]
    assert 0 < len(early) < 6
    reasons = {row.name.rpartition("/")[2]: row.kind or row.reason for row in bad}
    assert reasons.pop("00001.tar") == "not a readable tar"
    assert reasons.pop("2.tar.gz") == "a compressed shard"
    assert set(reasons.values()) <= {"no caption"}
    (single,) = {open_pairs(tmp_path / name)[0].size for name in ("00000.tar", "3.TAR")}
    assert single == 6


BAD_LINES: list[tuple[bytes, str]] = [
    ('{"image": "pictures/0.png", "caption": "Café"}'.encode("latin-1"), "not UTF-8 text"),
    (b'{"image": "pictures/0.png", "caption": "half a \\ud83d pair"}', "the caption is not Unicode text"),
    (b'{"image": "pictures", "caption": "a folder"}', "the picture pictures is not a file"),
    (b'{"image": "%s", "caption": "a"}' % (b"x" * 300), f"the picture {'x' * 300} cannot be read: File name too long"),
    (b'{"image": "a\\u0000.png", "caption": "nul"}', "the picture a\0.png cannot be read: not a usable path"),
    (b'{"image": "pictures/0.png/1.png", "caption": "none"}', "the picture pictures/0.png/1.png is missing"),
    (b'{"image": 7, "caption": "a number"}', "no image"),
    (b'{"image": "pictures/0.png", "caption": null}', "no caption"),
    (b'{"image": "pictures/0.png", "caption": ""}', "no caption"),
    (b"[" * 100_000, "not JSON"),
    (b'{"image": "pictures/0.png", "caption": "cut', "not JSON"),
]  # fmt: skip


def test_a_line_is_used_or_named(tmp_path: Path) -> None:
    lines = write_lines(tmp_path, 2)
    lines.write_bytes(b"\n".join([lines.read_bytes(), *(line for line, _ in BAD_LINES), lines.read_bytes()]))
    pairs, bad = open_pairs(lines)
    assert [pair.caption for pair in pairs.pairs] == ["a red picture", "a green picture"] * 2
    assert [row.reason for row in bad] == [reason for _, reason in BAD_LINES]
    assert [row.name for row in bad] == [f"{lines}:{number}" for number in range(4, 4 + len(BAD_LINES))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_lines_in_the_encoding_that_their_mark_states(encoding: str, ending: str, tmp_path: Path) -> None:
    lines = write_lines(tmp_path, 3)
    row = '{"image": "pictures/0.png", "caption": "caf\\u00e9 \u2028 日本"}'
    text = lines.read_text() + row
    lines.write_bytes(
        ending.join(text.splitlines(keepends=False) if "\u2028" not in text else text.split("\n")).encode(encoding)
    )
    pairs, bad = open_pairs(lines)
    assert bad == ()
    assert [pair.caption for pair in pairs.pairs][2:] == ["a blue picture", "café \u2028 日本"]


def test_a_picture_whose_name_is_not_utf8(tmp_path: Path) -> None:
    lines = write_lines(tmp_path, 1)
    name = os.fsdecode(b"caf\xe9.png")
    picture(1)[0].save(tmp_path / name)
    lines.write_text(json.dumps({"image": name, "caption": "one"}) + "\n")
    pairs, bad = open_pairs(lines)
    assert bad == ()
    assert pairs[0].picture().rgb.shape == (41, 50, 3)


def test_rows_are_counted_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    skipped = Skipped()
    skipped.add([BadRow(f"a:{number}", "no caption") for number in range(5)])
    skipped.add([BadRow("a:9", "the picture x.png is missing", "the picture is missing"), BadRow("a:0", "no caption")])
    assert capsys.readouterr().err.count("\n") == 6
    assert skipped.as_json() == {
        "no caption": {"count": 5, "first": ["a:0", "a:1", "a:2"]},
        "the picture is missing": {"count": 1, "first": ["a:9"]},
    }
    assert str(skipped) == ("6 pairs skipped: 5 no caption (a:0, a:1, a:2 and 2 more); 1 the picture is missing (a:9)")
    assert str(Skipped()) == "0 pairs skipped"


def test_pairs_that_no_batch_held_are_counted() -> None:
    assert drawn_pairs(14, 4, 0, 3) == 12
    assert drawn_pairs(14, 4, 0, 2) == 8
    assert drawn_pairs(12, 4, 0, 30) == 12
    assert 12 < drawn_pairs(14, 4, 0, 6) <= 14
    assert drawn_pairs(14, 4, 0, 0) == 0


def test_the_command_accounts_for_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text tower reads 12 tokens, the last of which is the end."""
    long = "".join(random.Random(0).choices("acdegilnprtu", k=94))
    extra = (json.dumps({"image": "pictures/0.png", "caption": long}), '{"image": "none.png", "caption": "gone"}')
    lines = write_lines(tmp_path, 13, extra)
    (tmp_path / "pictures" / "5.png").write_bytes(b"nothing")
    words = ["train", str(lines), "--from-scratch", str(write_config(tmp_path)), "--batch-size", "4", "--workers", "0"]
    assert main([*words, "--out", str(tmp_path / "out"), "--epochs", "2", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["used"], found["skipped"], found["cut_captions"]) == (13, 2, 1)
    assert 12 <= found["drawn"] <= 14
    assert found["reasons"] == {
        "the picture is missing": {"count": 1, "first": [f"{lines}:15"]},
        "the picture cannot be read": {"count": 1, "first": [f"{lines}:6"]},
    }
    assert printed.err.count("captions are cut") == 1
    assert f"1 captions are cut, the model reads 11 tokens: {lines}:14\n" in printed.err
    assert "13 pairs can be used, steps so far drew " in printed.err
    assert (
        f"2 pairs skipped: 1 the picture is missing ({lines}:15); 1 the picture cannot be read ({lines}:6)"
        in printed.err
    )


def test_another_runs_data_are_not_resumed(tmp_path: Path) -> None:
    lines, source = write_lines(tmp_path), write_config(tmp_path)
    stopped = run(lines, source, tmp_path / "out", minutes=0.0)
    before = lines.read_text()

    def refused(text: str) -> None:
        lines.write_text(text)
        with pytest.raises(
            UserError, match=r"other data: they differ in .*pairs\.jsonl:1 to .*pairs\.jsonl:12; resume"
        ):
            run(lines, source, tmp_path / "out", resume=True)

    refused(before.replace("red", "pink", 1))  # a caption
    rows = before.splitlines(keepends=True)
    refused("".join([rows[1], rows[0], *rows[2:]]))  # the order
    refused(before.replace("pictures/3.png", "pictures/4.png"))  # a picture's name
    Image.new("RGB", (9, 9)).save(tmp_path / "pictures" / "7.png")  # a picture
    refused(before)
    assert fingerprint(open_pairs(lines)[0]) != stopped.facts["data"]


def test_a_folder_that_moved_is_resumed(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards")
    source = write_config(tmp_path)
    whole = run(shards, source, tmp_path / "whole")
    run(shards, source, tmp_path / "out", minutes=0.0)
    shards.rename(tmp_path / "moved")
    resumed = run(tmp_path / "moved", source, tmp_path / "out", resume=True)
    assert resumed.step == 6
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert (tmp_path / "out" / MODEL / "model.safetensors").exists()


def test_blocks_say_which_pairs_differ(tmp_path: Path) -> None:
    from siglane.training.pairs import where_data_differ

    folder = tmp_path / "shards"
    folder.mkdir()
    names = {f"{number:04}.{kind}": data for number in range(600) for kind, data in (("png", PNG), ("txt", b"words"))}
    write_tar(folder / "0.tar", names)
    before = fingerprint(open_pairs(folder)[0])
    assert len(before) == 3 * 16
    assert where_data_differ(open_pairs(folder)[0], before) is None
    write_tar(folder / "0.tar", names | {"0300.txt": b"other"})
    where = where_data_differ(open_pairs(folder)[0], before)
    assert where == f"{folder / '0.tar'}:0256 to {folder / '0.tar'}:0511"
