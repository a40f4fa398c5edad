"""Plain SigLIP checkpoints against their reference, transformers' own tower and head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from parity_kit import assert_parity, patches_of, picture

from siglane.errors import ConfigError
from siglane.families.model import load_vision, stored_dtype
from siglane.families.processor import load_processor
from siglane.families.registry import is_vision_only
from siglane.types import Size
from siglane.verify.references.siglip import Siglip
from siglane.weights.hub import open_checkpoint

PICTURES = [picture(*size, seed=seed) for seed, size in enumerate([(60, 90), (56, 56), (200, 31)])]


@torch.no_grad()
@pytest.mark.parametrize(("full", "infix", "image_size"), [(True, True, 56), (False, True, 56), (False, False, 62)])
def test_features_and_embeddings(tmp_path: Path, full: bool, infix: bool, image_size: int) -> None:
    """62 pixels hold 4 patches of 14; the last 6 rows and columns are never read."""
    write_siglip_checkpoint(tmp_path, full=full, infix=infix, image_size=image_size)
    checkpoint = open_checkpoint(tmp_path)
    assert is_vision_only(checkpoint)
    assert stored_dtype(checkpoint) == torch.float32
    encoder, processor = load_vision(checkpoint, device="cpu", dtype=torch.float32, head=True)
    patches = patches_of(processor, PICTURES)
    expected = Siglip(tmp_path, torch.device("cpu"), torch.float32).run(PICTURES, "", 0)
    assert_parity("features", torch.cat(encoder.features(patches)), expected["features"])
    assert_parity("pooled", encoder.embeddings(patches), expected["pooled"])


def test_without_its_head_a_tower_has_no_embeddings(tmp_path: Path) -> None:
    write_siglip_checkpoint(tmp_path)
    encoder, processor = load_vision(open_checkpoint(tmp_path), device="cpu", dtype=torch.float32)
    assert encoder.tower.head is None
    with pytest.raises(ValueError, match="no pooling head"):
        encoder.embeddings(patches_of(processor, PICTURES))


def test_layouts_are_one_squashed_tile(tmp_path: Path) -> None:
    write_siglip_checkpoint(tmp_path)
    _, processor = load_vision(open_checkpoint(tmp_path), device="cpu", dtype=torch.float32)
    (layout,) = processor.layouts([Size(300, 20)])
    assert (layout.grids, layout.image_tokens, layout.tiles[0].canvas) == (((4, 4),), 16, (56, 56))


def test_a_tower_cannot_answer(tmp_path: Path) -> None:
    write_siglip_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="SigLIP tower without a language model"):
        load_processor(open_checkpoint(tmp_path))


def test_pixels_that_do_not_fit_the_positions(tmp_path: Path) -> None:
    write_siglip_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 70, "width": 56}}))
    with pytest.raises(ConfigError, match="56x70 pixels do not hold the tower's 4x4 patches"):
        load_vision(open_checkpoint(tmp_path), device="cpu", dtype=torch.float32)


def test_a_vlms_tower_is_not_a_plain_one(tmp_path: Path) -> None:
    write_nvila_checkpoint(tmp_path)
    assert not is_vision_only(open_checkpoint(tmp_path))
    assert is_vision_only(open_checkpoint(tmp_path / "vision_tower"))
