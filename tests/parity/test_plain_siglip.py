"""Plain SigLIP checkpoints against transformers' `last_hidden_state` and `pooler_output`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from reference import picture

from siglane.errors import ConfigError
from siglane.families.model import load_vision, stored_dtype
from siglane.families.processor import ImageProcessor, load_processor
from siglane.families.registry import is_vision_only
from siglane.types import DecodedImage, ImagePatches, Size
from siglane.weights.hub import open_checkpoint

SIZES = [(60, 90), (56, 56), (200, 31)]


def patches_of(processor: ImageProcessor) -> list[ImagePatches]:
    images = [DecodedImage.from_rgb(np.array(picture(*size, seed=seed))) for seed, size in enumerate(SIZES)]
    layouts = processor.layouts([image.size for image in images])
    return [processor.patches(image, layout) for image, layout in zip(images, layouts, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize(("full", "infix", "image_size"), [(True, True, 56), (False, True, 56), (False, False, 62)])
def test_features_and_embeddings(tmp_path: Path, full: bool, infix: bool, image_size: int) -> None:
    """62 pixels hold 4 patches of 14; the last 6 rows and columns are never read."""
    written, model = write_siglip_checkpoint(tmp_path, full=full, infix=infix, image_size=image_size)
    checkpoint = open_checkpoint(tmp_path)
    assert is_vision_only(checkpoint)
    assert stored_dtype(checkpoint) == torch.float32
    encoder, processor = load_vision(checkpoint, device="cpu", dtype=torch.float32, head=True)
    patches = patches_of(processor)
    resized = [np.array(picture(*size, seed=seed).resize((image_size, image_size))) for seed, size in enumerate(SIZES)]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 127.5 - 1
    expected = (model.vision_model if model is not None else written.tower)(pixel_values=pixels)
    for ours, theirs in zip(encoder.features(patches), expected.last_hidden_state, strict=True):
        assert (ours - theirs).abs().max() < 2e-4
        assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.99999
    assert (encoder.embeddings(patches) - expected.pooler_output).abs().max() < 2e-4


def test_without_its_head_a_tower_has_no_embeddings(tmp_path: Path) -> None:
    write_siglip_checkpoint(tmp_path)
    encoder, processor = load_vision(open_checkpoint(tmp_path), device="cpu", dtype=torch.float32)
    assert encoder.tower.head is None
    with pytest.raises(ValueError, match="no pooling head"):
        encoder.embeddings(patches_of(processor))


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
