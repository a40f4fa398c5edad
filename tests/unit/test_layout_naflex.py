"""NaFlex' resize rule against transformers' own search, and what budgets make of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from siglane.config.projector import vila_projector
from siglane.errors import ConfigError, UserError
from siglane.tiling.naflex import MOST_PATCHES, NaFlex, fitted
from siglane.tiling.rule import ImageBudget, ImageContext, PatchGeometry
from siglane.types import Box, Grid, Resize, Size, VideoSize

RULE = NaFlex(patch_size=16, max_num_patches=256, resample="bilinear")
GEOMETRY = PatchGeometry(16, vila_projector("identity", input_size=4, output_size=4))
SIZES = st.builds(Size, st.integers(1, 8000), st.integers(1, 8000))


@pytest.mark.parametrize(
    ("height", "width", "resized", "grid"),
    [
        (480, 640, (224, 288), (14, 18)),
        (224, 224, (256, 256), (16, 16)),
        (1080, 1920, (192, 336), (12, 21)),
        (100, 2000, (64, 1024), (4, 64)),
        (1, 1, (112, 112), (7, 7)),
        (17, 4000, (16, 3776), (1, 236)),
    ],
)
def test_vectors(height: int, width: int, resized: tuple[int, int], grid: tuple[int, int]) -> None:
    """formats.md 2.2."""
    layout = RULE.image(Size(width, height), GEOMETRY, ImageContext())
    (tile,) = layout.tiles
    assert (tile.canvas.height, tile.canvas.width) == resized
    assert tile.grid == Grid(*grid)
    assert layout.image_tokens == tile.grid.area
    assert tile.steps == (Resize(Size(resized[1], resized[0]), "bilinear"),)
    assert tile.box == Box(0, 0, resized[1], resized[0])


@settings(max_examples=300, deadline=None, database=None)
@given(size=SIZES, patch=st.sampled_from([14, 16, 32]), most=st.integers(1, 2048))
@example(size=Size(1, 8000), patch=16, most=16)
@example(size=Size(8000, 1), patch=16, most=1)
def test_the_search_is_the_references(size: Size, patch: int, most: int) -> None:
    height, width = get_image_size_for_max_num_patches(size.height, size.width, patch, most)
    assert fitted(size, patch, most) == Size(width, height)


@settings(max_examples=150, deadline=None, database=None)
@given(size=SIZES, most=st.integers(1, 2048))
def test_a_picture_never_has_more_patches_than_allowed(size: Size, most: int) -> None:
    for budget in (ImageBudget(max_num_patches=most), ImageBudget(max_num_patches=most, detail="original")):
        assert RULE.within(budget).rule.image(size, GEOMETRY, ImageContext()).patches <= most


@pytest.mark.parametrize(
    ("budget", "most", "detail"),
    [
        (ImageBudget(), 256, "auto"),
        (ImageBudget(detail="low"), 64, "low"),
        (ImageBudget(detail="high"), 1024, "high"),
        (ImageBudget(max_num_patches=900), 900, "auto"),
        (ImageBudget(detail="high", max_num_patches=500), 500, "high"),
        (ImageBudget(detail="low", max_num_patches=500), 64, "low"),
    ],
)
def test_details(budget: ImageBudget, most: int, detail: str) -> None:
    rule, applied = RULE.within(budget)
    assert rule == replace(RULE, max_num_patches=most)
    assert applied == detail


def test_original_keeps_the_size_of_what_fits() -> None:
    rule, applied = RULE.within(ImageBudget(detail="original"))
    assert applied == "original"
    assert rule.image(Size(100, 50), GEOMETRY, ImageContext()).grids == (Grid(4, 7),)
    assert 0.9 * MOST_PATCHES < rule.image(Size(3000, 2000), GEOMETRY, ImageContext()).patches <= MOST_PATCHES


def test_refusals() -> None:
    with pytest.raises(UserError, match="max_tiles does not apply"):
        RULE.within(ImageBudget(max_tiles=3))
    with pytest.raises(UserError, match="videos"):
        RULE.video(VideoSize(Size(10, 10), 2), GEOMETRY)
    with pytest.raises(ConfigError, match="max_num_patches"):
        NaFlex(patch_size=16, max_num_patches=0, resample="bilinear")
