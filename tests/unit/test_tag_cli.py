"""`siglane tag`: what it prints and writes, and that a stopped run is continued."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from two_tower_checkpoint import write_two_tower_checkpoint

from siglane import Tagger
from siglane.batch.rows import RowFile
from siglane.cli.main import main
from siglane.cli.tag import expand
from siglane.errors import SiglaneError, UserError

LABELS = ("a cat", "a dog", "two shapes", "café")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tag") / "tiny"
    write_two_tower_checkpoint(folder, "siglip2", seed=2)
    return str(folder)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("labels") / "labels.txt"
    file.write_text("\n".join(LABELS) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures in two folders, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep" / ".hidden").mkdir(parents=True)
    for number in range(9):
        rng = np.random.default_rng(number)
        place = folder / ("deep" if number > 5 else "") / f"{number}.{'jpg' if number % 2 else 'PNG'}"
        Image.fromarray(rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)).save(place)
    (folder / "notes.txt").write_text("x")
    (folder / "deep" / ".hidden" / "10.png").write_bytes(b"")
    return folder


def pictures(folder: Path) -> list[str]:
    return expand(str(folder))


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class TestPrinted:
    def test_json(self, model: str, labels: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        images = [*pictures(folder), str(folder / "none.png")]
        assert main(["tag", model, *images, "--labels", labels, "--threshold", "0", "--json"]) == 0
        captured = capsys.readouterr()
        rows = json.loads(captured.out)
        assert [row["image"] for row in rows] == images
        tagged = Tagger(model).tag(images, LABELS, threshold=0)
        assert rows == [{"image": name} | one.as_json() for name, one in zip(images, tagged, strict=True)]
        assert rows[0].keys() == {"image", "tags"}
        assert rows[0]["tags"][0].keys() == {"label", "confidence"}
        assert "cannot be read" in rows[-1]["error"]
        assert captured.err.startswith("siglane: cpu, torch.float32, 8 pictures a batch; texts: lower case")

    def test_lines(self, model: str, labels: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "broken.gif").write_text("x")
        try:
            assert main(["tag", model, str(folder), "--labels", labels, "--top-k", "2"]) == 0
        finally:
            (folder / "broken.gif").unlink()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 10
        assert [line.split(": ")[0] for line in lines if ": error: " not in line] == pictures(folder)
        assert sum(": error: " in line for line in lines) == 1
        assert lines[0].count(",") == 1
        assert main(["tag", model, pictures(folder)[0], "--labels", labels, "--threshold", "1"]) == 0
        assert capsys.readouterr().out == f"{pictures(folder)[0]}: no tags\n"

    def test_templates(self, model: str, labels: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        templates = ["{label}", "a {label} at night"]
        image = pictures(folder)[0]
        words = [word for template in templates for word in ("--template", template)]
        assert main(["tag", model, image, "--labels", labels, *words, "--threshold", "0", "--json"]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert row["tags"] == Tagger(model, templates=templates).tag([image], LABELS, threshold=0)[0].as_json()["tags"]

    def test_only_unreadable_pictures_are_a_failure(
        self, model: str, labels: str, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["tag", model, str(folder / "none.png"), "--labels", labels]) == 1
        assert ": error: " in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["MODEL", "IMAGE"], "--labels is missing"),
            (["MODEL", "IMAGE", "--labels", "/nowhere"], "cannot read /nowhere: No such file"),
            (["MODEL", "/nowhere/*.png", "--labels", "LABELS"], "'/nowhere/*.png' holds no pictures"),
            (["/nowhere", "IMAGE", "--labels", "LABELS"], "there is no folder '/nowhere'"),
            (["-", "IMAGE", "--labels", "LABELS"], "no model is given"),
            (["MODEL", "IMAGE", "--labels", "LABELS", "--threshold", "7"], "must be between 0 and 1, got 7.0"),
            (["MODEL", "IMAGE", "--labels", "LABELS", "--top-k", "0"], "top_k must be at least 1"),
            (["MODEL", "IMAGE", "--labels", "LABELS", "--template", "x"], "has no place for the label"),
            (["MODEL", "IMAGE", "--labels", "LABELS", "--config", "/nowhere"], "cannot read /nowhere"),
            (["MODEL", "IMAGE", "--labels", "LABELS", "-o", "/nowhere/out"], "cannot write /nowhere/out"),
            (["MODEL", "IMAGE", "--labels", "LABELS", "--attention", "flash_attention_2"], "cannot run on cpu"),
        ],
    )
    def test_mistakes_have_one_line(
        self,
        model: str,
        labels: str,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
        words: list[str],
        complaint: str,
    ) -> None:
        given = {"MODEL": model, "LABELS": labels, "IMAGE": pictures(folder)[0]}
        assert main(["tag", *(given.get(word, word) for word in words)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert complaint in captured.err.splitlines()[-1]

    def test_settings(
        self, model: str, labels: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        config = tmp_path / "siglane.toml"
        config.write_text(
            f'[plugins.siglip]\nmodel = "{model}"\nconfidence_threshold = 0.0\nmax_tags = 2\nbatch_size = 3\n'
        )
        command = ["tag", "-", pictures(folder)[0], "--labels", labels, "--config", str(config), "--json"]

        def tags(*words: str) -> int:
            assert main([*command, *words]) == 0
            return len(json.loads(capsys.readouterr().out)[0]["tags"])

        assert tags() == 2
        assert tags("--max-tags", "3") == 3
        assert tags("--threshold", "1") == 0
        monkeypatch.setenv("SIGLANE_MAX_TAGS", "1")
        assert tags() == 1
        monkeypatch.setenv("SIGLANE_ENABLED", "0")
        assert main(command) == 2
        assert "tagging is switched off" in capsys.readouterr().err


class TestPictures:
    def test_folders_patterns_and_names(self, folder: Path, tmp_path: Path) -> None:
        found = expand(str(folder))
        assert [Path(name).name for name in found] == [
            "0.PNG", "1.jpg", "2.PNG", "3.jpg", "4.PNG", "5.jpg", "6.PNG", "7.jpg", "8.PNG",
        ]  # fmt: skip
        assert expand(f"{folder}/*.jpg") == [f"{folder}/{number}.jpg" for number in (1, 3, 5)]
        assert len(expand(f"{folder}/**/*.jpg")) == 4
        assert expand("/nowhere/a.png") == ["/nowhere/a.png"]
        assert expand("https://example.com/a?b=[1]*") == ["https://example.com/a?b=[1]*"]
        (tmp_path / "[1]*.png").write_bytes(b"")
        assert expand(str(tmp_path / "[1]*.png")) == [str(tmp_path / "[1]*.png")]
        with pytest.raises(UserError, match="holds no pictures"):
            expand(str(tmp_path / "nothing*"))

    def test_a_picture_named_twice_is_tagged_once(
        self, model: str, labels: str, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        image = pictures(folder)[0]
        assert main(["tag", model, image, image, "--labels", labels]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 1


class TestOutput:
    @pytest.fixture
    def command(self, model: str, labels: str, folder: Path, tmp_path: Path) -> list[str]:
        return ["tag", model, str(folder), "--labels", labels, "--threshold", "0", "-o", str(tmp_path / "out.jsonl")]

    def test_it_is_written_and_continued(
        self, command: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out.jsonl"
        assert main(command) == 0
        assert capsys.readouterr().out == f"{out}: 9 pictures tagged, 0 unreadable\n"
        whole = out.read_bytes()
        assert [row["image"] for row in rows_of(out)] == pictures(folder)
        lines = whole.splitlines(keepends=True)
        for kept in (b"", lines[0], whole[:-1], whole[: len(lines[0]) + 7], b"".join(lines[:4]) + b'{"image"\n', whole):
            out.write_bytes(kept)
            assert main(command) == 0
            again = {row["image"]: row["tags"] for row in rows_of(out)}
            assert len(rows_of(out)) == 9
            for row in map(json.loads, lines):
                assert [tag["label"] for tag in again[row["image"]]] == [tag["label"] for tag in row["tags"]]
                for one, two in zip(again[row["image"]], row["tags"], strict=True):
                    assert abs(one["confidence"] - two["confidence"]) < 1e-6
        assert out.read_bytes() == whole
        assert "9 pictures are already in" in capsys.readouterr().err

    def test_a_finished_run_loads_no_model(self, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(command) == 0
        command[1] = "/nowhere"
        assert main(command) == 0

    def test_json_besides(self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == rows_of(tmp_path / "out.jsonl")

    def test_another_file_is_left_alone(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out.jsonl"
        out.write_text('{"image": "a"}\n{"picture": 1}\n{"image": "b"}\n')
        before = out.read_bytes()
        assert main(command) == 2
        assert "out.jsonl, line 2 is not a row with 'image'; name another file" in capsys.readouterr().err
        assert out.read_bytes() == before

    def test_two_runs_do_not_share_a_file(self, tmp_path: Path) -> None:
        with (
            RowFile(tmp_path / "out.jsonl", "image"),
            pytest.raises(UserError, match="is being written by another run"),
        ):
            RowFile(tmp_path / "out.jsonl", "image")
        RowFile(tmp_path / "out.jsonl", "image").close()

    def test_a_device_that_is_full(self, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        command[-1] = "/dev/full"
        assert main(command) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("siglane: error: cannot write /dev/full: No space left on device")

    def test_a_disk_that_fills_up_leaves_whole_rows(self, tmp_path: Path) -> None:
        """The limit on a file's size stops a write in the middle of a line, as a full disk does."""
        out = tmp_path / "out.jsonl"
        rows = [{"image": f"{number}.png", "tags": [{"label": "é", "confidence": number / 7}]} for number in range(50)]
        program = (
            "import json, sys\n"
            "from pathlib import Path\n"
            "from siglane.batch.rows import RowFile\n"
            "with RowFile(Path(sys.argv[1]), 'image') as file:\n"
            "    for row in json.loads(sys.argv[2]):\n"
            "        file.append(row)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(out), json.dumps(rows)],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
            capture_output=True,
            text=True,
            check=False,
        )
        assert f"CannotWrite: cannot write {out}: File too large; its rows so far are whole" in done.stderr
        written = len(rows_of(out))
        assert rows_of(out) == rows[:written]
        assert 900 < out.stat().st_size <= 1000
        with RowFile(out, "image") as file:
            assert file.known == {row["image"] for row in rows[:written]}

    def test_a_row_that_fails_leaves_the_ones_before(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with RowFile(tmp_path / "out.jsonl", "image") as file:
            file.append({"image": "a"})

            def fails(descriptor: int, data: bytes) -> int:
                raise OSError(5, "Input/output error")

            monkeypatch.setattr(os, "write", fails)
            with pytest.raises(SiglaneError, match="Input/output error"):
                file.append({"image": "b"})
            monkeypatch.undo()
            file.append({"image": "c"})
        assert rows_of(tmp_path / "out.jsonl") == [{"image": "a"}, {"image": "c"}]

    @pytest.mark.slow
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
    def test_a_stopped_run_is_continued(
        self, command: list[str], folder: Path, tmp_path: Path, number: signal.Signals, code: int
    ) -> None:
        out = tmp_path / "out.jsonl"
        os.mkfifo(tmp_path / "stuck.png")  # nobody writes: the run waits here until it is stopped
        images = [*pictures(folder), str(tmp_path / "stuck.png")]
        program = [sys.executable, "-m", "siglane.cli.main", *command[:2], *images, *command[3:], "--batch-size", "2"]
        with subprocess.Popen(
            program,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # a shell has its background jobs ignore the signal, and what they start
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            deadline = time.monotonic() + 120
            while not (out.exists() and len(rows_of(out)) >= 6) and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(number)
            while process.poll() is None and time.monotonic() < deadline:  # lets go of the thread that reads
                with contextlib.suppress(OSError):
                    os.close(os.open(tmp_path / "stuck.png", os.O_WRONLY | os.O_NONBLOCK))
                time.sleep(0.05)
            process.kill()
            _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert 6 <= len(rows_of(out)) < 10
        assert main(command) == 0
        assert sorted(row["image"] for row in rows_of(out)) == pictures(folder)
