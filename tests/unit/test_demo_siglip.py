"""The shipped SigLIP: `siglane tag` answers sensibly out of the box."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import SiglipModel

from recipes.demo.siglip import HELD_OUT, LOCKED_RECIPE, PaintedPairs, accuracies
from siglane import Tagger
from siglane.cli.main import main
from siglane.families.two_tower import load_two_tower
from siglane.settings.training import TrainConfig
from siglane.training.report import Skipped
from siglane.training.run import MODEL, open_run, train
from siglane.weights.demo import demo_folder, open_model

LABELS = demo_folder() / "labels.txt"
SHAPES = sorted((demo_folder() / "shapes").iterdir())


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Tagger:
    return Tagger("demo-siglip", cache=tmp_path_factory.mktemp("labels"))


def test_the_shipped_shapes_have_their_names_as_tags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tag", "demo-siglip", str(SHAPES[0].parent), "--labels", str(LABELS), "--threshold", "0.1"]
    assert main([*words, "--json", "--cache", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in rows] == [str(file) for file in SHAPES]
    assert [[tag["label"] for tag in row["tags"]] for row in rows] == [[file.stem.replace("_", " ")] for file in SHAPES]


def test_it_knows_colours_and_shapes_on_scenes_it_has_not_seen() -> None:
    two_tower = load_two_tower(open_model("demo-siglip"), device="cpu", dtype=torch.float32)
    assert accuracies(two_tower, seed=HELD_OUT + 50, pictures=64)["single"] >= 0.9


def test_transformers_reads_it(tagger: Tagger) -> None:
    folder = demo_folder() / "siglip"
    model, loading = SiglipModel.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] | loading["unexpected_keys"] | loading["mismatched_keys"]
    ours = load_two_tower(open_model("demo-siglip"), device="cpu", dtype=torch.float32)
    ids = ours.texts.ids(["a red circle", "a photo of a sign"])
    with torch.no_grad():
        theirs = model.eval().float().get_text_features(input_ids=ids)
        theirs = getattr(theirs, "pooler_output", theirs)
        found = ours.model.embed_texts(ids)
    torch.testing.assert_close(found, torch.nn.functional.normalize(theirs, dim=-1), atol=2e-4, rtol=0)


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in (demo_folder() / "siglip").iterdir()) <= 8_000_000


@pytest.mark.slow
def test_a_fresh_text_tower_learns_what_the_locked_image_tower_knows(tmp_path: Path) -> None:
    """SigLiT, half as long as in the recipe."""
    recipe: TrainConfig = replace(LOCKED_RECIPE, steps=LOCKED_RECIPE.steps // 2)
    pairs = PaintedPairs(recipe.seed)
    trainer = open_run(open_model("demo-siglip"), pairs, tmp_path, recipe, torch.device("cpu"), resume=False)
    train(trainer, pairs, tmp_path, skipped=Skipped())
    two_tower = load_two_tower(open_model(tmp_path / MODEL), device="cpu", dtype=torch.float32)
    assert accuracies(two_tower, seed=HELD_OUT + 51, pictures=256)["single"] >= 0.8
