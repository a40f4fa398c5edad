"""`verify` on a SigLIP with both towers: the text tower's stages too, and damage to them named by its stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_verify_damage import Damage, edit_tensors, set_tensor, swap
from two_tower_checkpoint import Kind, write_two_tower_checkpoint

from siglane.verify import verify

FILE = "model.safetensors"
LAYER = "text_model.encoder.layers.1."


@pytest.fixture(scope="module", params=["siglip", "siglip2", "naflex"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("two_tower") / request.param
    kind: Kind = request.param
    write_two_tower_checkpoint(folder, kind)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("two_tower") / "siglip"
    write_two_tower_checkpoint(folder, "siglip", tokenizer="json")
    return folder


def test_both_towers_agree_with_transformers(original: Path, tmp_path: Path) -> None:
    golden = tmp_path / "golden.safetensors"
    report = verify(original, random=1, threshold=0.9999, save=golden)
    assert report.ok
    assert report.first_inexact is None
    stages = [one.stage for one in report.comparisons if one.case == "texts"]
    blocks = ["text.block.0", "text.block.1"]
    assert stages == ["text.ids", "text.embedding", *blocks, "text.pooled", "calibration.0", "calibration.1"]
    assert verify(original, reference=golden, threshold=0.9999).ok


def lower(folder: Path) -> None:
    """A tokenizer that keeps capital letters."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"][5:7] = raw["model"]["vocab"][6:4:-1]
    (folder / "tokenizer.json").write_text(json.dumps(raw))


DAMAGE: dict[str, tuple[Damage, str]] = {
    "order of the vocabulary": (lower, "text.ids"),
    "embedding table": (
        set_tensor(FILE, "text_model.embeddings.token_embedding.weight", lambda w: w.flip(0)),
        "text.embedding",
    ),
    "positions": (
        set_tensor(FILE, "text_model.embeddings.position_embedding.weight", lambda w: w.flip(0)),
        "text.block.0",
    ),
    "query for value": (
        swap(FILE, f"{LAYER}self_attn.q_proj.weight", f"{LAYER}self_attn.v_proj.weight"),
        "text.block.1",
    ),
    "head": (set_tensor(FILE, "text_model.head.weight", torch.neg), "text.pooled"),
    "temperature": (set_tensor(FILE, "logit_scale", lambda w: w + 0.1), "calibration.0"),
    "bias": (set_tensor(FILE, "logit_bias", lambda w: w * 1.1), "calibration.1"),
}


@pytest.mark.few("order of the vocabulary", "query for value", "temperature")
@pytest.mark.parametrize(("damage", "stage"), DAMAGE.values(), ids=DAMAGE)
def test_damage_to_the_text_tower_is_named(siglip: Path, tmp_path: Path, damage: Damage, stage: str) -> None:
    copy = shutil.copytree(siglip, tmp_path / "copy")
    damage(copy)
    report = verify(copy, random=1, reference=siglip)
    assert report.first_diverging == stage


def test_an_image_tower_alone_has_no_text_stages(siglip: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(siglip, tmp_path / "copy")
    edit_tensors(copy / FILE, lambda state: [state.pop(name) for name in list(state) if name.startswith("text_model")])
    assert {one.case for one in verify(copy, random=1).comparisons} == {"image.0", "packed"}
