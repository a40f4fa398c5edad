"""File names as they come: bytes that are not UTF-8, newlines, tabs, quotes. Every picture keeps its row, every line is
one row, whatever stdout is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from two_tower_checkpoint import write_two_tower_checkpoint

from siglane.cli.main import main
from siglane.cli.output import emit_line
from siglane.media.policy import MediaPolicy
from siglane.media.source import fetch, read_local

NAMES = {
    b"a.png": "a.png",
    b"caf\xe9.png": "caf\\udce9.png",  # Latin-1
    b"\x83e\x83X\x83g.png": "\\udc83e\\udc83X\\udc83g.png",  # Shift-JIS
    "ünïcode 日本.png".encode(): "ünïcode 日本.png",
    b"line\nbreak.png": "line\\nbreak.png",
    b'tab\t"quote",\'.png': 'tab\\t"quote",\'.png',
    b"\x1b[31mred.png": "\\x1b[31mred.png",
    "para\u2029graph.png".encode(): "para\\u2029graph.png",
    b"z" * 240 + b".png": "z" * 240 + ".png",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names")
    for number, name in enumerate(NAMES):
        rgb = np.random.default_rng(number).integers(0, 256, (30, 20, 3), dtype=np.uint8)
        with open(os.fsencode(folder) + b"/" + name, "wb") as file:
            Image.fromarray(rgb).save(file, "PNG")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_two_tower_checkpoint(folder / "two_tower", "siglip2", seed=2)
    return str(folder / "two_tower")


@pytest.fixture
def labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    (tmp_path / "labels.txt").write_text("a cat\na dog\n")
    return ["--labels", str(tmp_path / "labels.txt"), "--threshold", "0"]


def paths(folder: Path) -> list[str]:
    return sorted(str(folder / os.fsdecode(name)) for name in NAMES)


def shown(folder: Path) -> list[str]:
    """The paths as text has them."""
    printed = {str(folder / os.fsdecode(name)): f"{folder}/{text}" for name, text in NAMES.items()}
    return [printed[path] for path in paths(folder)]


def test_tag(folder: Path, model: str, labels: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tag", model, str(folder), *labels]
    assert main(words) == 0
    lines = capsys.readouterr().out.split("\n")
    assert [line.partition(".png: a ")[0] + ".png" for line in lines[:-1]] == shown(folder)
    assert main([*words, "--json"]) == 0
    assert [row["image"] for row in json.loads(capsys.readouterr().out)] == paths(folder)
    for _ in range(2):  # written, then found to be there
        assert main([*words, "-o", str(tmp_path / os.fsdecode(b"out\xff.jsonl"))]) == 0
        assert capsys.readouterr().out.startswith(f"{tmp_path}/out\\udcff.jsonl: ")
        written = (tmp_path / os.fsdecode(b"out\xff.jsonl")).read_bytes().splitlines()
        assert [json.loads(row)["image"] for row in written] == paths(folder)


def test_tokens_embed_encode_and_look(
    folder: Path, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokens", model, *paths(folder)]) == 0
    table = capsys.readouterr().out.split("\n")
    assert [line[38:] for line in table[1:-2]] == shown(folder)
    out = str(tmp_path / os.fsdecode(b"\xe9.out"))
    for command, *words in (["tokens"], ["embed"], ["encode", "-o", out]):
        assert main([command, model, *paths(folder), *words, "--json"]) == 0
        assert [row["image"] for row in json.loads(capsys.readouterr().out)] == paths(folder)
    assert main(["encode", model, *paths(folder), "-o", out]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/\\udce9.out: ")
    for path in paths(folder)[::4]:
        assert main(["look", model, path, "-o", out]) == 0
        assert capsys.readouterr().out.startswith(f"{tmp_path}/\\udce9.out: ")
        assert main(["look", model, path, "-o", out, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["image"], found["view"]) == (path, out)


def test_generate(folder: Path, nvila_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(nvila_folder), "-p", "What is it?", "--max-tokens", "1", "--device", "cpu"]
    assert main([*words, "--kv-tokens", "4096", "--image", *paths(folder)[:4], "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["images"]) == 4
    assert main([*words, "--image", str(folder / "gone\udce9.png")]) == 2
    assert "gone\\udce9.png: cannot be read" in capsys.readouterr().err


def test_a_picture_that_cannot_be_read_costs_its_own_row(
    folder: Path, model: str, labels: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jpg").mkdir()
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "locked.png").symlink_to("/proc/self/mem")  # may be opened, cannot be read
    bad = [str(tmp_path / name) for name in ("x.jpg", "empty.png", "locked.png", "gone.png", "y" * 300 + ".png")]
    images = [path for pair in zip(paths(folder), bad, strict=False) for path in pair]
    encode = ["encode", model, *images, "-o", str(tmp_path / "out")]
    for words in (["tag", model, *images, *labels], ["tokens", model, *images], ["embed", model, *images], encode):
        assert main([*words, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["image"] for row in rows] == images
        assert [row["image"] for row in rows if "error" in row] == bad
        if words[0] in ("embed", "encode"):
            continue
        assert main(words) == 0
        assert sum("error" in line for line in capsys.readouterr().out.splitlines()) == len(bad)
    assert sorted(load_file(tmp_path / "out")) == [str(number) for number in range(0, 10, 2)]
    for words in (["tokens", model, *bad], ["embed", model, *bad, "--json"], ["encode", model, *bad, "-o", encode[-1]]):
        capsys.readouterr()
        assert main(words) == 2
        assert capsys.readouterr().out == ""


def run(words: list[str], shell: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "siglane.cli.main", *words]
    if shell:
        command = ["/bin/sh", "-c", f'"$@" {shell}', "sh", *command]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHONIO"))}
    return subprocess.run(command, capture_output=True, check=False, timeout=120, env=variables | environment)


@pytest.mark.slow  # a process each
@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["ascii stdout", "ascii names"],
)
def test_any_encoding_of_stdout(environment: dict[str, str], folder: Path, model: str) -> None:
    answer = run(["tokens", model, *paths(folder)], **environment)
    assert (answer.returncode, answer.stderr) == (0, b"")
    assert answer.stdout.isascii()
    assert answer.stdout.count(b"\n") == len(NAMES) + 2
    answer = run(["tokens", model, *paths(folder), "--json"], **environment)
    assert [os.fsencode(row["image"]) for row in json.loads(answer.stdout)] == [
        os.fsencode(path) for path in paths(folder)
    ]


@pytest.mark.slow
def test_stdout_that_is_closed(model: str) -> None:
    answer = run(["tokens", model, "--sizes", "9x9"], ">&-")
    assert answer.returncode == 2
    assert answer.stderr == b"siglane: error: stdout is closed; send it to a file, or to /dev/null\n"
    answer = run(["tokens", model, "--sizes", "9x9", "--json"], "2>&-")
    assert answer.returncode == 0
    assert json.loads(answer.stdout)[0]["image"] == "9x9"
    assert run(["tokens", model, "--sizes", "9x9"], "| true").stderr == b""


def test_a_line_stays_a_line() -> None:
    out = io.StringIO()
    emit_line("a\r\n\0\x85\u2028\udcff b　é\\n", out)
    assert out.getvalue() == "a\\r\\n\\x00\\x85\\u2028\\udcff b　é\\n\n"


def test_a_file_url_names_bytes(folder: Path) -> None:
    url = f"file://{folder}/caf%E9.png"
    data = (folder / os.fsdecode(b"caf\xe9.png")).read_bytes()
    assert read_local(url, MediaPolicy()) == data
    assert fetch(url, MediaPolicy(allowed_local_root=folder)) == data


@pytest.mark.slow
def test_stdout_on_a_full_disk(model: str) -> None:
    answer = run(["tokens", model, "--sizes", "9x9"], ">/dev/full")
    assert answer.returncode == 1
    message = b"the output cannot be written: No space left on device; make room, or write somewhere else"
    assert answer.stderr == b"siglane: error: " + message + b"\n"
