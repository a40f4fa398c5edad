"""`siglane embed`: the vectors it writes and prints are the tagger's, and what cannot be is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from two_tower_checkpoint import write_two_tower_checkpoint

from siglane import Tagger
from siglane.cli.main import main

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


def test_eight_bits(model: str, pictures: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    exact = torch.cat(
        (Tagger(model, device="cpu").embed_images(pictures), Tagger(model, device="cpu").embed_texts(TEXTS))
    )
    words = ["embed", model, *pictures, "--text", *TEXTS, "--device", "cpu", "--json", "--quantization", "8bit"]
    assert main(words) == 0
    found = torch.tensor([row["embedding"] for row in json.loads(capsys.readouterr().out)])
    assert not torch.equal(found, exact)
    assert torch.cosine_similarity(found, exact).min() > 0.999


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["embed", "MODEL", "--json"], "nothing to embed"),
        (["embed", "MODEL", "--text", "a", "-o", "a.jsonl"], "JSON Lines hold pictures alone"),
        (["embed", "MODEL", "--text", "a"], "nowhere to put the vectors"),
        (["embed", "MODEL", "--text", "a", "-o", "/nowhere/a.safetensors"], "there is no folder /nowhere"),
        (["embed", "MODEL", "gone.png", "--json"], "gone.png"),
        (["embed", "MODEL", "--text", "a", "--json", "--quantization", "4bit", "--device", "cpu"], "no 4-bit products"),
    ],
)
def test_mistakes(model: str, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model if word == "MODEL" else word for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert complaint in said.err


def test_rows_are_written_and_continued(
    model: str, pictures: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    (tmp_path / "broken.png").write_bytes(b"")
    images = [pictures[0], str(tmp_path / "broken.png"), *pictures[1:], pictures[0]]
    words = ["embed", model, *images, "--device", "cpu", "-o", str(out)]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{out}: 3 pictures embedded, 1 unreadable, 0 were there\n"
    rows = [json.loads(row) for row in out.read_text().splitlines()]
    assert [row["image"] for row in rows] == images[:4]
    assert "not an image" in rows.pop(1)["error"]
    expected = Tagger(model, device="cpu").embed_images(pictures)
    assert np.allclose([row["embedding"] for row in rows], expected, atol=1e-6)
    whole = out.read_bytes()
    out.write_bytes(whole[: whole.rindex(b'{"image"') + 30])
    assert main(words) == 0
    assert capsys.readouterr().out == f"{out}: 1 pictures embedded, 0 unreadable, 3 were there\n"
    assert [json.loads(row)["image"] for row in out.read_text().splitlines()] == images[:4]
    words[1] = "/nowhere"
    assert main(words) == 0  # no model is loaded


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
