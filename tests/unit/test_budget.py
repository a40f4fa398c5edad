"""Budgets: who may set what, every rule's reading of it, and that what was applied is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint

from siglane.config.projector import ProjectorConfig, llava_projector, vila_projector
from siglane.config.vlm import ImageFacts
from siglane.errors import UserError
from siglane.families.pipeline import MediaPipeline, report_image
from siglane.families.registry import image_facts
from siglane.media.item import MediaItem
from siglane.tiling.anyres import AnyResTiling
from siglane.tiling.bounds import Bounds
from siglane.tiling.idefics3 import LongestEdge
from siglane.tiling.naflex import NaFlex
from siglane.tiling.nanovlm import WholeTiles
from siglane.tiling.navit import NativeResolution
from siglane.tiling.rule import CHECKPOINT_LIMITS, LIMITS, ImageBudget, ImageContext, LayoutRule, PatchGeometry
from siglane.tiling.squash import Squash
from siglane.tiling.video_llama_3 import NativeFrames
from siglane.tiling.vila import VilaTiling
from siglane.types import ImageLayout, Medium, Size, VideoSize
from siglane.weights.hub import open_checkpoint

ONE_TO_ONE = llava_projector(input_size=3, output_size=4)
LITE_PROJECTOR = vila_projector("mlp_downsample_3x3_fix", input_size=3, output_size=4)
BLOCK_PROJECTOR = vila_projector("mlp_downsample_2x2_fix", input_size=3, output_size=4)
S2_PROJECTOR = vila_projector("mlp_downsample", input_size=9, output_size=4)
WIDE = Size(1600, 900)

LITE = VilaTiling(
    tile=Size(448, 448), resample="bicubic", tiling="dynamic", min_tiles=1, max_tiles=12, s2_scales=(),
    fill=(127, 127, 127),
)  # fmt: skip
S2 = replace(LITE, tiling="dynamic_s2", s2_scales=(448, 896, 1344))
PINPOINTS = tuple((384 * height, 384 * width) for height in range(1, 7) for width in range(1, 7))
ANYRES = AnyResTiling(
    tile=Size(384, 384), resample="bicubic", frame_resample="bicubic", fill=(127, 127, 127), pinpoints=PINPOINTS,
    max_maps=9,
)  # fmt: skip
NANOVLM = WholeTiles(
    side=512, longest=4, enlarge=True, global_token="<g>", tile_tokens=tuple(("<t>",) * 4 for _ in range(4))
)
IDEFICS3 = LongestEdge(
    longest=2048, tile=Size(512, 512), splits=True, resample="lanczos", frame_longest=512, around="<a>", whole="<w>"
)
NATIVE = NativeResolution(factor=28, min_pixels=448 * 448, max_pixels=1792 * 1792, resample="bicubic")
NATIVE_FRAMES = NativeFrames(
    picture=Bounds(14, 56 * 56, 28 * 28 * 1280), frame=Bounds(28, 128 * 28 * 28, 768 * 28 * 28), resample="bicubic",
    drops_still=True,
)  # fmt: skip

# every rule, with a projector that fits it, and the limits that mean something to it
RULES: dict[str, tuple[LayoutRule, ProjectorConfig, tuple[str, ...]]] = {
    "squash": (Squash(tile=Size(224, 224), resample="bicubic"), ONE_TO_ONE, ()),
    "vila squash": (replace(LITE, tiling="squash"), LITE_PROJECTOR, ()),
    "vila pad": (replace(LITE, tiling="pad"), LITE_PROJECTOR, ()),
    "vila dynamic": (LITE, LITE_PROJECTOR, ("max_tiles",)),
    "vila dynamic_s2": (S2, S2_PROJECTOR, ("max_tiles",)),
    "anyres": (ANYRES, ONE_TO_ONE, ("max_tiles", "grid_pinpoints")),
    "naflex": (NaFlex(patch_size=14, max_num_patches=256, resample="bilinear"), ONE_TO_ONE, ("max_num_patches",)),
    "whole tiles": (NANOVLM, ONE_TO_ONE, ("max_tiles",)),
    "longest edge": (IDEFICS3, ONE_TO_ONE, ("max_tiles",)),
    "native frames": (NATIVE_FRAMES, ONE_TO_ONE, ("max_pixels", "min_pixels")),
    "native": (NATIVE, BLOCK_PROJECTOR, ("max_pixels", "min_pixels")),
}  # fmt: skip
A_LIMIT = {
    "max_pixels": 600_000, "min_pixels": 300_000, "max_num_patches": 256, "max_tiles": 10,
    "grid_pinpoints": ((384, 384), (384, 768)),
}  # fmt: skip


def layout_of(name: str, budget: ImageBudget, size: Size = WIDE) -> ImageLayout:
    rule, projector, _ = RULES[name]
    return rule.within(budget).rule.image(size, PatchGeometry(14, projector), ImageContext())


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> ImageFacts:
    folder = tmp_path_factory.mktemp("tower")
    write_siglip_checkpoint(folder)
    return image_facts(open_checkpoint(folder))


def laid_out(facts: ImageFacts, size: Medium, image_limits: ImageBudget = CHECKPOINT_LIMITS) -> MediaItem:
    item, pipeline = MediaItem(None, "images[0]", image_limits, size=size), MediaPipeline(facts)
    pipeline.admit([item])
    pipeline.lay_out([item])
    return item


@pytest.mark.parametrize("name", RULES)
class TestEveryRule:
    def test_without_a_budget_it_is_the_checkpoints_own(self, name: str) -> None:
        rule = RULES[name][0]
        assert rule.within(CHECKPOINT_LIMITS) == (rule, "auto")

    @pytest.mark.parametrize("limit", LIMITS)
    def test_a_limit_applies_or_is_refused_by_name(self, name: str, limit: str) -> None:
        rule, _, known = RULES[name]
        budget = ImageBudget(**{limit: A_LIMIT[limit]})
        if limit in known:
            rule.within(budget)
            return
        with pytest.raises(UserError, match=f"{limit} does not apply to this model") as caught:
            rule.within(budget)
        assert (caught.value.code, caught.value.param) == ("unsupported_budget", limit)

    @pytest.mark.parametrize("detail", ["auto", "low", "high", "original"])
    def test_what_was_applied_is_reported(self, name: str, detail: str, facts: ImageFacts) -> None:
        rule, projector, known = RULES[name]
        budget = ImageBudget(detail=detail, **{limit: A_LIMIT[limit] for limit in known})  # type: ignore[arg-type]
        layout = layout_of(name, budget)
        preprocess = replace(facts.preprocess, rule=rule)
        item = laid_out(replace(facts, projector=projector, preprocess=preprocess), WIDE, budget)
        assert item.layout == layout
        report = report_image(item)
        assert report["detail"] == {"requested": detail, "applied": rule.within(budget).detail}
        assert report["limits"] == {limit: A_LIMIT[limit] for limit in known}
        assert (report["width"], report["height"], report["tiles"]) == (*WIDE, len(layout.tiles))
        assert report["grids"] == list(layout.grids)
        assert report["tokens"] == layout.image_tokens
        assert "frames" not in report

    def test_low_never_costs_more_than_high(self, name: str) -> None:
        assert layout_of(name, ImageBudget(detail="low")).patches <= layout_of(name, ImageBudget(detail="high")).patches


def test_limits_change_what_they_name() -> None:
    assert len(layout_of("vila dynamic", ImageBudget(max_tiles=4)).tiles) <= 5
    assert len(layout_of("vila dynamic", ImageBudget(detail="low")).tiles) == 1
    assert len(layout_of("anyres", ImageBudget(grid_pinpoints=((384, 768),))).tiles) == 3
    assert len(layout_of("anyres", ImageBudget(max_tiles=2)).tiles) <= 3
    assert len(layout_of("whole tiles", ImageBudget(max_tiles=2)).tiles) <= 3
    assert layout_of("naflex", ImageBudget(max_num_patches=100)).patches <= 100
    assert layout_of("native", ImageBudget(max_pixels=300_000)).patches * 14 * 14 <= 300_000
    assert layout_of("native", ImageBudget(min_pixels=3_000_000)).patches * 14 * 14 >= 3_000_000
    assert layout_of("native", ImageBudget(detail="original"), Size(4000, 3000)).patches > NATIVE.max_pixels // 196  # type: ignore[operator]


@pytest.mark.parametrize(
    "values", [{"max_pixels": 0}, {"max_tiles": -1}, {"grid_pinpoints": ()}, {"grid_pinpoints": ((0, 3),)}]
)
def test_a_limit_that_leaves_nothing_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(values))) as caught:
        ImageBudget(**values)  # type: ignore[arg-type]
    assert caught.value.code == "invalid_budget"


def test_a_local_callers_image_overrides_the_common_budget() -> None:
    common = ImageBudget(detail="low", max_pixels=1000, max_tiles=4)
    assert ImageBudget().over(common) == common
    assert ImageBudget(detail="high", max_pixels=5000).over(common) == ImageBudget(
        detail="high", max_pixels=5000, max_tiles=4
    )


class TestUnderAServersCeiling:
    def test_numbers_can_only_be_lowered(self) -> None:
        ceiling = ImageBudget(max_pixels=1000, max_num_patches=50, max_tiles=4)
        assert ImageBudget().under(ceiling) == ceiling
        assert ImageBudget(max_pixels=500, max_num_patches=90, max_tiles=1).under(ceiling) == ImageBudget(
            max_pixels=500, max_num_patches=50, max_tiles=1
        )

    def test_min_pixels_cannot_push_beyond_the_ceiling(self) -> None:
        assert ImageBudget(min_pixels=5000).under(ImageBudget(max_pixels=1000)).min_pixels == 1000
        assert ImageBudget(min_pixels=100).under(ImageBudget(min_pixels=500)).min_pixels == 100
        assert ImageBudget(min_pixels=5000).under(CHECKPOINT_LIMITS).min_pixels == 5000

    def test_resolutions_are_chosen_among_its_own(self) -> None:
        ceiling = ImageBudget(grid_pinpoints=((384, 384), (384, 768)))
        assert ImageBudget(grid_pinpoints=((384, 768), (768, 768))).under(ceiling).grid_pinpoints == ((384, 768),)
        with pytest.raises(UserError, match="must be among") as caught:
            ImageBudget(grid_pinpoints=((768, 768),)).under(ceiling)
        assert caught.value.param == "grid_pinpoints"

    def test_its_detail_is_a_default_and_original_keeps_to_its_numbers(self) -> None:
        assert ImageBudget().under(ImageBudget(detail="low")).detail == "low"
        assert ImageBudget(detail="high").under(ImageBudget(detail="low")).detail == "high"
        limits = ImageBudget(detail="original").under(ImageBudget(max_pixels=500_000))
        assert layout_of("native", limits, Size(4000, 3000)).patches * 196 <= 500_000
        assert NATIVE.within(limits).detail == "high"


def test_each_image_has_its_own_budget_and_videos_do_not_count_as_images(tmp_path: Path) -> None:
    write_nvila_checkpoint(tmp_path)
    facts = image_facts(open_checkpoint(tmp_path))
    alone, clip = facts.layouts([WIDE, VideoSize(Size(640, 480), 4)])
    assert len(alone.tiles) > 1
    assert alone == facts.layouts([WIDE])[0]
    assert (clip.frames, len(clip.tiles)) == (4, 4)
    few, every = (facts.layouts([WIDE], [budget])[0] for budget in (ImageBudget(max_tiles=2), None))
    assert len(few.tiles) < len(every.tiles)
    assert report_image(laid_out(facts, VideoSize(Size(640, 480), 4)))["frames"] == 4
