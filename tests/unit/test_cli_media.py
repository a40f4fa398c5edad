"""Videos and budgets on the command line: the same flags, variables and report in every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clips import video
from PIL import Image
from safetensors.torch import load_file

from siglane.cli.main import main
from siglane.tiling.rule import ImageBudget


@pytest.fixture(scope="module")
def model(nvila_folder: Path) -> str:
    return str(nvila_folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    Image.effect_noise((200, 90), 100).convert("RGB").save(folder / "wide.png")
    (folder / "clip.mp4").write_bytes(video(12))
    return {name: str(folder / name) for name in ("wide.png", "clip.mp4")}


def said(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main([*words, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def generate(model: str, *words: str) -> list[str]:
    asked = ["--prompt", "What?", "--device", "cpu", "--kv-tokens", "4096", "--max-tokens", "2"]
    return ["generate", model, *asked, *words]


def test_generate_reads_videos(model: str, files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    (report,) = said(capsys, *generate(model, "--video", files["clip.mp4"]))["images"]
    assert (report["width"], report["height"], report["frames"]) == (64, 48, 8)
    found = said(capsys, *generate(model, "--video", files["clip.mp4"], "--num-frames", "3", "-i", files["wide.png"]))
    assert [report.get("frames") for report in found["images"]] == [None, 3]
    assert main(generate(model, "--video", files["wide.png"])) == 2
    assert "not a video that is accepted" in capsys.readouterr().err


def test_every_command_takes_the_same_budget(
    model: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide, budget = files["wide.png"], ["--max-tiles", "3", "--detail", "high"]
    (counted,) = said(capsys, "tokens", model, wide, *budget)
    assert counted["detail"] == {"requested": "high", "applied": "high"}
    assert counted["limits"] == {"max_tiles": 3}
    assert 1 < counted["tiles"] <= 4
    (shown,) = said(capsys, *generate(model, "--image", wide, *budget))["images"]
    assert {key: shown[key] for key in ("tiles", "grids", "detail", "limits")} == {
        key: counted[key] for key in ("tiles", "grids", "detail", "limits")
    }
    out = tmp_path / "features.safetensors"
    said(capsys, "encode", model, wide, "--output", str(out), "--device", "cpu", "--no-enable-packing", *budget)
    assert load_file(out)["0"].shape[0] == sum(h * w for h, w in counted["grids"])
    drawn = said(capsys, "look", model, wide, "--output", str(tmp_path / "view.png"), *budget)
    assert drawn["tiles"] == counted["tiles"]


def test_variables_set_it_and_the_table_says_what_was_applied(
    model: str, files: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["tokens", model, files["wide.png"]]) == 0
    assert "detail" not in capsys.readouterr().out
    monkeypatch.setenv("SIGLANE_DETAIL", "original")
    monkeypatch.setenv("SIGLANE_MAX_TILES", "2")
    assert main(["tokens", model, files["wide.png"]]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "detail original, applied as high; limits: max_tiles 2"


def test_tokens_counts_a_video_by_its_size(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    clip, still = said(capsys, "tokens", model, "--sizes", "640x480x8", "640x480")
    assert (clip["tiles"], still["tiles"]) == (8, 13)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-pixels", "1000"], "max_pixels does not apply to this model; it knows max_tiles"),
        (["--grid-pinpoints", "384:768", "768:384"], "grid_pinpoints does not apply"),
        (["--grid-pinpoints", "384"], "is not 2 values joined by ':'"),
        (["--max-tiles", "0"], "max_tiles must be at least 1"),
        (["--detail", "huge"], "'huge' is not one of auto, low, high, original"),
    ],
)
def test_a_budget_that_cannot_be_honoured_is_one_line(
    model: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tokens", model, "--sizes", "64x64", *words]) == 2
    assert message in capsys.readouterr().err


def test_serve_hands_the_budget_to_the_server(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def record(*arguments: Any) -> int:
        given.extend(arguments)
        return 0

    monkeypatch.setattr("siglane.server.launch.serve", record)
    words = [
        "--max-tiles",
        "4",
        "--detail",
        "low",
        "--max-batch-patches",
        "2048",
        "--no-enable-packing",
        "--max-videos",
        "3",
    ]
    assert main(["serve", model, "--port", "0", *words]) == 0
    config, spec, listener, budget = given
    listener.close()
    assert budget == ImageBudget(max_tiles=4, detail="low")
    assert (spec.config.max_batch_patches, spec.config.enable_packing, config.max_videos) == (2048, False, 3)
