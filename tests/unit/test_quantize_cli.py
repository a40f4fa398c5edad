"""`siglane quantize`: what it writes and says, and which commands read it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from siglane.cli.demo import load_example
from siglane.cli.main import main
from siglane.errors import UserError
from siglane.hosts.sglang.view import view_of
from siglane.nn.device import resolve_device
from siglane.settings.training import TrainConfig
from siglane.training.pairs import open_pairs
from siglane.training.run import open_run
from siglane.weights.demo import open_model

SHAPES = Path(__file__).parents[2] / "python" / "siglane" / "demo" / "shapes"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`chat` in 4 bits and `siglip` in 8, of the shipped models; nobody writes to them."""
    root = tmp_path_factory.mktemp("quantize")
    assert main(["quantize", "demo", "-o", str(root / "chat"), "--quantization", "4bit"]) == 0
    assert main(["quantize", "demo-siglip", "-o", str(root / "siglip")]) == 0
    return root


def test_it_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "small"
    assert main(["quantize", "demo", "-o", str(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    size = (folder / "model.safetensors").stat().st_size
    assert told == {"folder": str(folder), "quantization": "8bit", "bytes": size}
    assert main(["quantize", "demo", "-o", str(folder)]) == 2
    assert f"{folder} exists; give a folder that does not" in capsys.readouterr().err
    assert main(["quantize", str(folder), "-o", str(tmp_path / "again")]) == 2
    assert "is quantised already, by siglane; give the original model" in capsys.readouterr().err
    assert main(["quantize", "demo", "-o", str(tmp_path / "nothing" / "small")]) == 2
    assert f"there is no folder {tmp_path / 'nothing'}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_commands_that_read_it(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example, siglip = load_example(), str(folders / "siglip")
    words = ["generate", str(folders / "chat"), "--prompt", example.question, "--image", str(example.picture)]
    assert main([*words, "--device", "cpu", "--kv-tokens", "2048"]) == 0
    assert capsys.readouterr().out.strip() == example.answer
    labels = str(SHAPES.parent / "labels.txt")
    assert main(["tag", siglip, str(SHAPES / "blue_circle.png"), "--labels", labels]) == 0
    assert "blue circle" in capsys.readouterr().out
    assert main(["embed", siglip, "--text", "a blue circle", "--json", "--quantization", "8bit"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    for name in ("chat", "siglip"):
        assert main(["tokens", str(folders / name), "--sizes", "640x480"]) == 0


def test_a_doctor_examines_it(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("chat", "siglip"):
        assert main(["doctor", str(folders / name)]) == 0
        assert "names and shapes are the configuration's" in capsys.readouterr().out
        (folders / name / "SHA256SUMS").unlink()


def test_commands_that_need_the_original(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(SHAPES / "blue_circle.png")
    for name in ("chat", "siglip"):
        for words in (["verify"], ["encode", picture, "-o", str(tmp_path / "features.safetensors")]):
            assert main([words[0], str(folders / name), *words[1:]]) == 2
            told = capsys.readouterr().err
            assert "which only serve, generate, batch, tag, embed and LLM read; give the original model" in told
            assert told.count("\n") == 1
    with pytest.raises(UserError, match="give the original model"):  # inside SGLang
        view_of(str(folders / "chat"))


def test_it_is_not_trained(folders: Path, tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(json.dumps({"image": str(SHAPES / "blue_circle.png"), "caption": "a blue circle"}) + "\n")
    pairs, _ = open_pairs(rows)
    with pytest.raises(UserError, match="give the original model"):
        open_run(open_model(folders / "siglip"), pairs, tmp_path / "run", TrainConfig(), resolve_device("cpu"))
    assert not (tmp_path / "run").exists()
