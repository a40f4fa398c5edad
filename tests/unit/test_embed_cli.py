"""`siglane embed`: the vectors it writes and prints are the tagger's, and what cannot be is said in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from two_tower_checkpoint import write_two_tower_checkpoint
from waiting import lines_of, wait_for_lines

from siglane import Tagger
from siglane.cli.main import main
from siglane.types import ImagePatches

TEXTS = ["a cat", "two green shapes"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("embed") / "tiny"
    write_two_tower_checkpoint(folder, "siglip2", seed=2)
    return str(folder)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pictures")
    names = [str(folder / f"{number}.png") for number in range(3)]
    for number, name in enumerate(names):
        rgb = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(name)
    return names


def test_a_file_and_a_list(model: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tagger = Tagger(model, device="cpu")
    images, texts = tagger.embed_images(pictures), tagger.embed_texts(TEXTS)
    file = tmp_path / "out.safetensors"
    words = ["embed", model, *pictures, "--text", *TEXTS, "--device", "cpu"]
    assert main([*words, "-o", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}: 5 vectors of 32\n"
    written = load_file(file)
    assert torch.allclose(written["images"], images, atol=1e-6)
    assert torch.allclose(written["texts"], texts, atol=1e-6)
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row.get("image") or row["text"] for row in rows] == [*pictures, *TEXTS]
    assert np.allclose([row["embedding"] for row in rows], torch.cat((images, texts)), atol=1e-6)


@pytest.mark.parametrize(("bits", "least"), [("8bit", 0.999), ("4bit", 0.98)])
def test_fewer_bits(
    model: str, pictures: list[str], bits: str, least: float, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = torch.cat(
        (Tagger(model, device="cpu").embed_images(pictures), Tagger(model, device="cpu").embed_texts(TEXTS))
    )
    words = ["embed", model, *pictures, "--text", *TEXTS, "--device", "cpu", "--json", "--quantization", bits]
    assert main(words) == 0
    found = torch.tensor([row["embedding"] for row in json.loads(capsys.readouterr().out)])
    assert not torch.equal(found, exact)
    assert torch.cosine_similarity(found, exact).min() > least


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["embed", "MODEL", "--json"], "nothing to embed"),
        (["embed", "MODEL", "--text", "a", "-o", "a.jsonl"], "rows hold pictures alone"),
        (["embed", "MODEL", "--text", "a"], "nowhere to put the vectors"),
        (["embed", "MODEL", "--text", "a", "-o", "/nowhere/a.safetensors"], "there is no folder /nowhere"),
        (["embed", "MODEL", "gone.png", "--json"], "gone.png"),
        (
            ["embed", "MODEL", "--text", "a", "--json", "--quantization", "3bit", "--device", "cpu"],
            "'3bit' is not one of",
        ),
    ],
)
def test_mistakes(model: str, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model if word == "MODEL" else word for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert complaint in said.err


def test_rows_are_written_and_continued(
    model: str,
    pictures: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "broken.png").write_bytes(b"")
    images = [pictures[0], str(tmp_path / "broken.png"), *pictures[1:], pictures[0]]
    words = ["embed", model, *images, "--device", "cpu", "-o", str(out)]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 3 answered, 1 failed, 0 found there; 3 images in ")
    rows = records(out)
    assert [row["image"] for row in rows] == pictures
    (failed,) = records(tmp_path / "out.errors.jsonl")
    assert (failed["image"], failed["line"]) == (images[1], 2)
    assert "not an image" in failed["error"]["message"]
    expected = Tagger(model, device="cpu").embed_images(pictures)
    assert np.allclose([row["embedding"] for row in rows], expected, atol=1e-6)
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.rindex(b'{"image"') + 30])
    assert main(words) == 0
    assert "1 answered, 0 failed, 3 found there" in capsys.readouterr().out
    assert [row["image"] for row in records(out)] == pictures
    assert main([*words, "--dtype", "bfloat16"]) == 2
    assert 'dtype was "auto", is "bfloat16"' in capsys.readouterr().err
    monkeypatch.setattr(Tagger, "from_settings", None)
    assert main(words) == 0  # no model is loaded


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.read_text().splitlines()]


def test_tables(model: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Vectors are lists of one length, as numpy stacks them; a row that has none is null."""
    names = [Path(one).name for one in pictures]
    folder = Path(pictures[0]).parent
    pq.write_table(pa.table({"image": [names[0], "gone.png", *names[1:]], "n": [1, 2, 3, 4]}), folder / "in.parquet")
    out = tmp_path / "out.parquet"
    try:
        words = ["embed", model, f"{folder}/*.parquet", "--device", "cpu", "-o", str(out), "--keep", "n", "--json"]
        assert main(words) == 0
    finally:
        (folder / "in.parquet").unlink()
    assert json.loads(capsys.readouterr().out)["table_rows"] == 4
    table = pq.read_table(out)
    assert table.column_names == ["custom_id", "n", "embedding", "error_code", "error_message"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert table["error_code"].to_pylist() == [None, "image_not_found", None, None]
    good = table.filter(pa.compute.is_valid(table["embedding"]))
    assert good["n"].to_pylist() == [1, 3, 4]
    vectors = np.stack(good["embedding"].to_numpy())
    assert vectors.dtype == np.float32
    assert np.allclose(vectors, Tagger(model, device="cpu").embed_images(pictures), atol=1e-6)


def test_a_table_without_any_vector(model: str, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    assert main(["embed", model, "gone.png", "--device", "cpu", "-o", str(out)]) == 0
    assert pq.read_table(out)["error_code"].to_pylist() == ["image_not_found"]


def test_vectors_that_are_not_finite_are_errors(
    model: str, pictures: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    embed = Tagger._embed

    def broken(self: Tagger, patches: Sequence[ImagePatches]) -> torch.Tensor:
        return embed(self, patches).index_fill(0, torch.tensor([1]), float("nan"))

    monkeypatch.setattr(Tagger, "_embed", broken)
    assert main(["embed", model, *pictures, "--device", "cpu", "-o", str(out)]) == 0
    assert [row["image"] for row in records(out)] == [pictures[0], pictures[2]]
    assert records(tmp_path / "out.errors.jsonl")[0]["error"]["code"] == "not_finite"


@pytest.mark.slow
def test_killed_it_goes_on(model: str, tmp_path: Path) -> None:
    """The vectors of a run that nothing stopped, as a table."""
    many = tmp_path / "many"
    many.mkdir()
    for number in range(300):
        Image.new("RGB", (30, 20), (number % 256, 5 * number % 256, 90)).save(many / f"{number:03}.png")
    out, whole = tmp_path / "out.parquet", tmp_path / "whole.parquet"
    words = ["embed", model, str(many), "--device", "cpu", "--batch-size", "1", "-o"]
    assert main([*words, str(whole)]) == 0
    lines = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "siglane.cli.main", *words, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for_lines(lines, 6, process)
        process.kill()
    assert lines_of(lines) < 300
    assert not out.exists()
    assert main([*words, str(out)]) == 0
    one, two = pq.read_table(out), pq.read_table(whole)
    assert one["image"].to_pylist() == two["image"].to_pylist()
    stacked = [np.stack(table["embedding"].to_numpy()) for table in (one, two)]
    assert np.allclose(*stacked, atol=1e-6)


def test_a_picture_that_cannot_be_read_costs_its_own_vector(
    model: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", model, "gone.png", *pictures, "--device", "cpu", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert "gone.png: cannot be read" in rows[0]["error"]
    assert [len(row["embedding"]) for row in rows[1:]] == [32] * 3
    assert (
        main(["embed", model, "gone.png", *pictures, "--device", "cpu", "-o", str(tmp_path / "none.safetensors")]) == 2
    )
    assert "gone.png" in capsys.readouterr().err
