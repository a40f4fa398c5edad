"""`siglane verify --quantization`: fewer bits against the float reference, with thresholds of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from ovis2_5_checkpoint import write_ovis2_6_checkpoint
from safetensors.torch import load_file, save_file

from siglane.cli.main import main
from siglane.nn.quantise import Bits
from siglane.verify import verify
from siglane.verify.bars import CODED, EXACT, LANGUAGE, Thresholds
from siglane.verify.report import html, verdict
from siglane.verify.stages import ORDER, Bars
from siglane.weights.demo import FOLDERS, demo_folder

EITHER_BITS = pytest.mark.parametrize("bits", ["8bit", "4bit"])


@pytest.mark.few("demo-8bit", "demo-native-4bit", "demo-siglip-8bit")
@EITHER_BITS
@pytest.mark.parametrize("model", FOLDERS)
def test_the_shipped_models(model: str, bits: Bits) -> None:
    report = verify(model, random=2, steps=4, quantization=bits)
    assert report.ok, [one for one in report.comparisons if not one.ok]
    assert report.quantization == bits
    assert report.first_inexact is None
    found = {one.stage: one for one in report.comparisons}
    assert found["patch_embedding"].min_threshold == found["patch_embedding"].mean_threshold == 0.99
    coded = found["block.0"]
    expected = CODED["8bit" if report.prompt else bits]  # beside a language model a tower keeps 8 bits
    assert (coded.min_threshold, coded.mean_threshold) == (expected.least, expected.mean)
    assert coded.min_cosine is not None
    assert coded.min_cosine < 1 - 1e-6, "it was not quantised"
    assert f"thresholds of its kind for {bits}" in verdict(report)


@EITHER_BITS
def test_experts(bits: Bits, tmp_path: Path) -> None:
    write_ovis2_6_checkpoint(tmp_path, moe=True)
    report = verify(tmp_path, random=3, steps=4, quantization=bits)
    assert report.ok, [one for one in report.comparisons if not one.ok]
    coded = [one for one in report.comparisons if one.stage.startswith("lm.block.")]
    assert len(coded) > 1
    for one in coded:
        assert one.min_cosine is not None
        assert one.min_cosine < 1 - 1e-6, "it was not quantised"


def test_every_stage_has_its_bars() -> None:
    floats, small = Thresholds(0.99), Thresholds(0.99, "4bit", speaks=True)
    for kind in ORDER:
        for stage in (kind, f"{kind}.3"):
            assert floats.of(stage) == Bars(0.99, 0.99, 0.99)
            expected = floats.of(stage) if kind in EXACT else CODED["4bit" if kind in LANGUAGE else "8bit"]
            assert small.of(stage) == expected
    assert {*EXACT, *LANGUAGE} <= {*ORDER}


def damaged(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """The shipped model with one tensor changed."""
    shutil.copytree(demo_folder() / FOLDERS["demo"], folder)
    file = next(file for file in folder.rglob("*.safetensors") if name in load_file(file))
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, file)
    return folder


@pytest.mark.few("vision_model.encoder.layers.1.mlp.fc2.weight-*", "model.norm.weight-*")
@pytest.mark.parametrize(
    ("name", "change", "stage"),
    [
        ("vision_model.embeddings.position_embedding.weight", lambda weight: weight.flip(0), "positions"),
        ("vision_model.encoder.layers.1.mlp.fc2.weight", lambda weight: weight.flip(0), "block.1"),
        ("model.layers.2.mlp.down_proj.weight", lambda weight: weight.flip(0), "lm.block.2"),
        ("model.norm.weight", lambda weight: -weight, "logits"),
    ],
)
def test_damage_is_no_rounding(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], stage: str, tmp_path: Path
) -> None:
    report = verify(damaged(tmp_path / "copy", name, change), random=1, reference="demo", quantization="8bit")
    assert report.first_diverging == stage


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    words = ["verify", "demo-siglip", "--random", "1", "--quantization", "8bit"]
    assert main([*words, "--report", str(page)]) == 0
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split()[-5:] == ["mean", "above", "min", "above", "ok"]
    assert next(line for line in lines if line.startswith("block.0")).split()[-3:] == ["0.995", "0.9", "yes"]
    assert last.startswith("ok: all ")
    HTMLParser().feed(page.read_text())
    assert "threshold 0.9<" in page.read_text()
    assert "threshold 0.99<" in page.read_text()
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == "8bit"
    assert main([*words, "--threshold", "0.999999"]) == 1, "a threshold that is given holds for every stage"
    assert "NOT OK: diverges at block.0" in capsys.readouterr().out


def test_a_page_of_floats_is_as_before() -> None:
    report = verify("demo-siglip", random=1)
    assert report.ok
    assert html(report).count("threshold 0.99<") == 1
