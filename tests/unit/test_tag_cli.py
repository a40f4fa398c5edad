"""`siglane tag`: what it prints and writes, and that a stopped run is continued."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from two_tower_checkpoint import write_two_tower_checkpoint
from waiting import PATIENCE, wait_for_lines

from siglane import Tagger
from siglane.batch.pictures import expand
from siglane.batch.rows import RowFile
from siglane.cli.main import main
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
        self,
        command: list[str],
        folder: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        out = tmp_path / "out.jsonl"
        assert main(command) == 0
        assert capsys.readouterr().out.startswith(f"{out}: 9 answered, 0 failed, 0 found there; 9 images in ")
        whole = out.read_bytes()
        assert [row["image"] for row in rows_of(out)] == pictures(folder)
        assert rows_of(out)[0].keys() == {"image", "tags"}
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
        assert "0 answered, 0 failed, 9 found there" in capsys.readouterr().out
        monkeypatch.setattr(Tagger, "from_settings", None)  # a finished run loads no model
        assert main(command) == 0

    def test_another_job_is_refused(
        self, command: list[str], labels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(command) == 0
        before = (tmp_path / "out.jsonl").read_bytes()
        other = tmp_path / "labels.txt"
        other.write_text("a cat\n")
        for more, said in (
            (("--threshold", "0.5"), "threshold was 0.0, is 0.5"),
            (("--labels", str(other)), "labels was"),
            (("--max-num-patches", "16"), "max_num_patches was null, is 16"),
            (("--shard", "1/2"), 'shard was null, is "1/2"'),
            (("--limit", "0"), "--limit must be at least 1"),
            (("--shard", "3/2"), "is not I/N"),
            (("--keep", "x"), "--keep needs a Parquet output"),
            (("--id-column", "x"), "--id-column names columns, and"),
        ):
            assert main([*command, *more]) == 2
            assert said in capsys.readouterr().err
        assert (tmp_path / "out.jsonl").read_bytes() == before
        assert main([*command[:-2], "--max-errors", "2"]) == 2
        assert "--max-errors needs rows in a file" in capsys.readouterr().err

    def test_bad_pictures_cost_themselves(
        self, command: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "broken.png").write_bytes(b"x")
        command[3:3] = [str(tmp_path / "broken.png"), str(tmp_path / "gone.png")]
        assert main([*command, "--max-errors", "0"]) == 3
        assert "1 rows failed, more than --max-errors 0; the same command continues" in capsys.readouterr().err
        assert main([*command, "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert (summary["answered"], summary["failed"], summary["found"]) == (0, {"image_not_found": 1}, 10)
        assert len(rows_of(tmp_path / "out.jsonl")) == 9
        broken, gone = rows_of(tmp_path / "out.errors.jsonl")
        assert broken["image"] == str(tmp_path / "broken.png")
        assert (broken["error"]["code"], broken["line"]) == ("image_decode_failed", 10)
        assert (gone["error"]["code"], gone["line"]) == ("image_not_found", 11)
        assert "cannot be read" in gone["error"]["message"]

    def test_shards_and_limits(self, command: list[str], folder: Path, tmp_path: Path) -> None:
        found = []
        for shard in ("1/2", "2/2"):
            command[-1] = str(tmp_path / f"{shard[0]}.jsonl")
            assert main([*command, "--shard", shard, "--limit", "7"]) == 0
            found.append([row["image"] for row in rows_of(Path(command[-1]))])
        assert found == [pictures(folder)[:7:2], pictures(folder)[1:7:2]]

    def test_another_file_is_left_alone(
        self, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out.jsonl"
        for content, said in (
            ('{"x": 1}\n', "line 1 is not a row with 'image'; name another file"),
            ('{"image": "a"}\n{"picture": 1}\n{"image": "b"}\n', "line 2 is not a row with 'image'; name another file"),
            ('{"image": "a", "tags": []}\n', "has rows and no out.manifest.json beside it"),
        ):
            out.write_text(content)
            assert main(command) == 2
            assert said in capsys.readouterr().err
            assert out.read_text() == content

    def test_two_runs_do_not_share_a_file(self, tmp_path: Path) -> None:
        with (
            RowFile(tmp_path / "out.jsonl", "image"),
            pytest.raises(UserError, match="is being written by another run"),
        ):
            RowFile(tmp_path / "out.jsonl", "image")
        RowFile(tmp_path / "out.jsonl", "image").close()

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
            [sys.executable, "-B", "-c", program, str(out), json.dumps(rows)],
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
    def test_a_stopped_run_is_continued(self, command: list[str], tmp_path: Path) -> None:
        """Killed, stopped by signals and on a full disk, it ends as one that nothing stopped."""
        many = tmp_path / "many"
        many.mkdir()
        for number in range(400):
            Image.new("RGB", (30, 20), (number % 256, 5 * number % 256, 90)).save(many / f"{number:03}.png")
        (many / "100.png").write_bytes(b"broken")
        command[2:3] = [str(many)]
        out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
        assert main([*command[:-1], str(whole)]) == 0
        program = [sys.executable, "-B", "-m", "siglane.cli.main", *command, "--batch-size", "1"]
        for number, code, size in (
            (signal.SIGKILL, -signal.SIGKILL, None),
            (signal.SIGINT, 3, None),
            (None, 3, 30_000),
        ):
            before = len(rows_of(out)) if out.exists() else 0

            def prepare(size: int | None = size) -> None:
                # a shell has its background jobs ignore the signal, and what they start
                signal.signal(signal.SIGINT, signal.SIG_DFL)
                if size is not None:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

            with subprocess.Popen(
                program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=prepare
            ) as process:
                if number is not None:
                    wait_for_lines(out, before + 6, process)
                    process.send_signal(number)
                _, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == code, errors
            if code == 3:
                assert "the same command continues" in errors
            assert before < len(rows_of(out)) < 399
        assert main(command) == 0
        assert [row["image"] for row in rows_of(out)] == [row["image"] for row in rows_of(whole)]
        for one, two in zip(rows_of(out), rows_of(whole), strict=True):
            assert [tag["label"] for tag in one["tags"]] == [tag["label"] for tag in two["tags"]]
        (failed,) = rows_of(tmp_path / "out.errors.jsonl")
        assert failed["image"].endswith("100.png")


class TestTables:
    @pytest.fixture
    def table(self, folder: Path, tmp_path: Path) -> tuple[Path, list[bytes | None]]:
        files: list[bytes | None] = [Path(one).read_bytes() for one in pictures(folder)]
        files[3], files[5] = None, b"broken"
        columns = {
            "id": [f"row {number}" for number in range(9)],
            "photo": [None if one is None else {"bytes": one, "path": None} for one in files],
            "year": pa.array(range(1990, 1999), pa.int16()),
        }
        pq.write_table(pa.table(columns), tmp_path / "in.parquet", row_group_size=4)
        return tmp_path / "in.parquet", files

    def test_a_table_in_and_out(
        self, model: str, labels: str, table: tuple[Path, list[bytes | None]], tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        file, files = table
        out = tmp_path / "out.parquet"
        command = ["tag", model, str(file), "--labels", labels, "--threshold", "0", "-o", str(out)]
        command += ["--image-column", "photo", "--id-column", "id", "--keep", "year"]
        assert main(command) == 0
        assert capsys.readouterr().out.splitlines()[-1] == f"{out}: 9 rows"
        found = pq.read_table(out)
        assert found.column_names == ["custom_id", "year", "tags", "error_code", "error_message"]
        assert found.schema.field("year").type == pa.int16()
        assert str(found.schema.field("tags").type).startswith("list<")
        assert found["custom_id"].to_pylist() == [f"row {number}" for number in range(9)]
        codes = [None, None, None, "missing_value", None, "image_decode_failed", None, None, None]
        assert found["error_code"].to_pylist() == codes
        good = [one for one in files if one is not None and one != b"broken"]
        expected = iter(Tagger(model).tag(good, LABELS, threshold=0))
        for tags, code in zip(found["tags"].to_pylist(), codes, strict=True):
            if code is not None:
                assert tags is None
                continue
            wanted = next(expected).tags
            assert [tag["label"] for tag in tags] == [tag.label for tag in wanted]
            assert np.allclose([tag["confidence"] for tag in tags], [tag.confidence for tag in wanted], atol=1e-6)
        assert [row["custom_id"] for row in rows_of(tmp_path / "out.jsonl")][:2] == ["row 0", "row 1"]
        before = out.read_bytes()
        out.unlink()
        assert main(command) == 0  # from its lines, without a model
        assert out.read_bytes() == before

    def test_printed(
        self, model: str, labels: str, table: tuple[Path, list[bytes | None]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["tag", model, str(table[0]), "--labels", labels, "--image-column", "photo", "--top-k", "1"]
        assert main([*words, "--limit", "4"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(": ")[0] for line in lines] == ["1", "2", "3", "4"]
        assert lines[3] == "4: error: column 'photo' holds no picture"

    def test_pictures_in_and_a_table_out(self, model: str, labels: str, folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.parquet"
        assert main(["tag", model, str(folder), "--labels", labels, "--top-k", "2", "-o", str(out)]) == 0
        found = pq.read_table(out)
        assert found.column_names == ["image", "tags", "error_code", "error_message"]
        assert found["image"].to_pylist() == pictures(folder)
        assert [len(tags) for tags in found["tags"].to_pylist()] == [2] * 9

    def test_what_a_table_must_be(
        self, model: str, labels: str, folder: Path, table: tuple[Path, list[bytes | None]], tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        file = str(table[0])
        pq.write_table(pa.table({"image": [[b"a", b"b"]], "tags": [1]}), tmp_path / "lists.parquet")
        for words, complaint in (
            ([file], "has no column 'image'; its columns are id, photo, year"),
            ([file, "--image-column", "year"], "column 'year' of"),
            ([str(tmp_path / "lists.parquet")], "a row may have one picture here"),
            ([file, str(folder)], f"{folder} is no Parquet table, and {file} is one; name one kind"),
            ([file, "--image-column", "photo", "--keep", "nothing"], "has no column 'nothing'"),
            ([file, "--image-column", "photo", "--id-column", "id", "--keep", "custom_id"], "no column 'custom_id'"),
        ):
            command = ["tag", model, *words, "--labels", labels, "-o", str(tmp_path / "out.parquet")]
            assert main(command) == 2
            assert complaint in capsys.readouterr().err
        assert not list(tmp_path.glob("out.*"))


WITHOUT = """
import sys
sys.modules["orjson"] = sys.modules["pyarrow"] = None
from siglane.cli.main import main
at = sys.argv.index("embed")
sys.exit(main(sys.argv[1:at]) or main(sys.argv[at:]))
"""


@pytest.mark.slow
def test_neither_the_servers_packages_nor_pyarrow_are_needed(
    model: str, labels: str, folder: Path, tmp_path: Path
) -> None:
    words = [model, str(folder), "-o", str(tmp_path / "out.jsonl")]
    command = ["tag", *words, "--labels", labels, "embed", *words[:-1], str(tmp_path / "vectors.jsonl")]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "out.jsonl")) == len(rows_of(tmp_path / "vectors.jsonl")) == 9
