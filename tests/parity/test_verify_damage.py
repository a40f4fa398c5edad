"""Damaged copies of a checkpoint: `verify` names the stage where each first differs from its original."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_siglip_checkpoint
from safetensors.torch import load_file, save_file

from siglane.verify import Report, verify

Damage = Callable[[Path], None]
State = dict[str, torch.Tensor]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[State], None]) -> None:
    state = load_file(path)
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})


def set_json(name: str, **changes: Any) -> Damage:
    return lambda folder: edit_json(folder / name, **changes)


def set_tensor(file: str, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda folder: edit_tensors(folder / file, lambda state: state.update({name: change(state[name])}))


def swap(file: str, first: str, second: str) -> Damage:
    def exchange(state: State) -> None:
        state[first], state[second] = state[second], state[first]

    return lambda folder: edit_tensors(folder / file, exchange)


def shuffled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[torch.randperm(len(tensor), generator=torch.Generator().manual_seed(0))]


TOWER, LANGUAGE, PROJECTOR = (f"{part}/model.safetensors" for part in ("vision_tower", "llm", "mm_projector"))
PREPROCESSOR = "vision_tower/preprocessor_config.json"
CONVOLUTION = "vision_model.embeddings.patch_embedding.weight"
POSITIONS = "vision_model.embeddings.position_embedding.weight"

NVILA: list[tuple[str, Damage, str]] = [
    ("mean", set_json(PREPROCESSOR, image_mean=[0.48, 0.46, 0.41]), "preprocessing"),
    ("std alone, which no cosine shows", set_json(PREPROCESSOR, image_std=[0.25, 0.25, 0.25]), "preprocessing"),
    ("rescaled twice", set_json(PREPROCESSOR, rescale_factor=1 / 255**2), "preprocessing"),
    ("rows and columns of a patch", set_tensor(TOWER, CONVOLUTION, lambda w: w.transpose(2, 3)), "patch_embedding"),
    ("blue for red", set_tensor(TOWER, CONVOLUTION, lambda w: w.flip(1)), "patch_embedding"),
    ("shuffled positions", set_tensor(TOWER, POSITIONS, shuffled), "positions"),
    ("activation", set_json("vision_tower/config.json", hidden_act="silu"), "block.0"),
    (
        "query for key",
        swap(TOWER, *(f"vision_model.encoder.layers.1.self_attn.{part}_proj.weight" for part in "qv")),
        "block.1",
    ),
    ("one layer too early", set_json("config.json", mm_vision_select_layer=-3), "features"),
    ("one layer too late", set_json("config.json", mm_vision_select_layer=-1), "features"),
    ("projector rows", set_tensor(PROJECTOR, "layers.7.weight", lambda w: w.flip(0)), "projector"),
    ("projector's input order", set_tensor(PROJECTOR, "layers.2.weight", lambda w: w.roll(32, 1)), "projector"),
    ("embedding table", set_tensor(LANGUAGE, "model.embed_tokens.weight", shuffled), "spliced"),
    (
        "rope_theta",
        set_json("llm/config.json", rope_parameters={"rope_type": "default", "rope_theta": 20.0}),
        "lm.block.0",
    ),
    (
        "one tensor of the language model",
        set_tensor(LANGUAGE, "model.layers.1.mlp.down_proj.weight", torch.neg),
        "lm.block.1",
    ),
    ("final norm", set_tensor(LANGUAGE, "model.norm.weight", lambda w: w.roll(1)), "logits"),
    ("head", set_tensor(LANGUAGE, "lm_head.weight", shuffled), "logits"),
    ("chat template", set_json("llm/tokenizer_config.json", chat_template="{{ messages[0]['content'] }}"), "spliced"),
]


def damaged(original: Path, folder: Path, damage: Damage) -> Path:
    copy = shutil.copytree(original, folder / "copy")
    damage(copy)
    return copy


def checked(model: Path, original: Path, **options: Any) -> Report:
    return verify(model, random=2, reference=original, steps=2, **options)


def test_an_unchanged_copy_agrees(nvila_folder: Path, tmp_path: Path) -> None:
    report = checked(damaged(nvila_folder, tmp_path, lambda _: None), nvila_folder, threshold=0.99999)
    assert report.ok
    assert report.first_inexact is None


@pytest.mark.few(
    "std alone, which no cosine shows", "blue for red", "shuffled positions", "one layer too early",
    "projector rows", "rope_theta", "chat template",
)  # fmt: skip
@pytest.mark.parametrize(("damage", "stage"), [case[1:] for case in NVILA], ids=[case[0] for case in NVILA])
def test_the_stage_of_the_damage_is_named(nvila_folder: Path, tmp_path: Path, damage: Damage, stage: str) -> None:
    report = checked(damaged(nvila_folder, tmp_path, damage), nvila_folder)
    assert not report.ok
    assert report.first_diverging == stage


def test_a_near_activation_passes_the_bar_and_is_still_named(nvila_folder: Path, tmp_path: Path) -> None:
    """The exact GELU differs from tanh's by less than 0.0005: no usual threshold sees it, but it is not rounding."""
    near = damaged(nvila_folder, tmp_path, set_json("vision_tower/config.json", hidden_act="gelu"))
    report = checked(near, nvila_folder, threshold=0.99999)
    assert report.ok
    assert report.first_inexact == "block.0"


@pytest.mark.parametrize(
    ("damage", "stage"),
    [
        (set_json("preprocessor_config.json", resample=0, size={"height": 56, "width": 56}), "preprocessing"),
        (set_json("config.json", hidden_act="quick_gelu", intermediate_size=40), "block.0"),
        (set_tensor("model.safetensors", "vision_model.post_layernorm.bias", lambda b: b.roll(1)), "features"),
        (set_tensor("model.safetensors", "vision_model.head.probe", lambda p: p.flip(-1)), "pooled"),
    ],
    ids=["resize filter", "activation", "last norm", "probe of the head"],
)
def test_a_damaged_tower_is_named(tmp_path: Path, damage: Damage, stage: str) -> None:
    original = write_siglip_checkpoint(tmp_path / "original").folder
    report = checked(damaged(original, tmp_path, damage), original, threshold=0.9999)
    assert report.first_diverging == stage


def test_infinities_are_a_divergence(nvila_folder: Path, tmp_path: Path) -> None:
    bad = set_tensor(TOWER, POSITIONS, lambda w: torch.full_like(w, float("nan")))
    report = checked(damaged(nvila_folder, tmp_path, bad), nvila_folder)
    assert report.first_diverging == "positions"
    failed = next(one for one in report.comparisons if not one.ok)
    assert failed.note == "siglane gives values that are not finite"
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["ok"] is False
