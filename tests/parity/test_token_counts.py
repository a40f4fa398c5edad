"""`siglane tokens` on 10,000 sizes for every released model of docs/examples, against what its reference counts.

The counts are the references' own functions of a size (`verify/references/`), and transformers' processors where they
have one; none of them reads a pixel.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlavaOnevisionConfig, LlavaOnevisionProcessor
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil

from siglane.families.registry import CHAT_FAMILIES, TOWER_FAMILIES, image_facts, tower_family, vlm_family
from siglane.types import Size
from siglane.verify.references import idefics3, llava_qwen, nanovlm, nvila, ovis2_5, siglip2, videollama3_qwen2
from siglane.verify.references.files import Raw, processor_json, read_json
from siglane.weights.hub import Checkpoint

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SIZES = 10_000

Count = Callable[[int, int], int | None]  # width and height -> tokens, None where the reference fails


def nvila_count(folder: Path) -> Count:
    """Per tile as many rows as its grid has after it was merged and filled up; with scales those of the last one."""
    raw = read_json(folder / "config.json")
    vision = read_json(folder / "vision_tower" / "config.json") or raw["vision_config"]
    flags = nvila._flags(folder, raw, vision)
    side = flags.scales[0] if flags.scales else vision["image_size"]
    factor, _ = nvila.DOWNSAMPLES[flags.projector]
    rows = (-(-(side // vision["patch_size"]) // factor)) ** 2
    fewest = (flags.scales[-1] // flags.scales[0]) ** 2 if flags.scales else flags.min_tiles

    def count(width: int, height: int) -> int:
        columns, lines = nvila.closest_grid(width, height, side, fewest, flags.max_tiles)
        tiles = columns * lines
        return rows * (tiles if flags.scales or tiles == 1 else tiles + 1)

    return count


def onevision_count(folder: Path) -> Count:
    """transformers' own counting, which reads nothing but these."""
    raw = read_json(folder / "config.json")
    side, patch = raw["vision_config"]["image_size"], raw["vision_config"]["patch_size"]
    theirs: Any = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    pinpoints = raw.get("image_grid_pinpoints", LlavaOnevisionConfig().image_grid_pinpoints)
    theirs.image_processor = SimpleNamespace(image_grid_pinpoints=pinpoints)
    theirs.num_image_tokens = (side // patch) ** 2
    theirs.vision_aspect_ratio = raw.get("vision_aspect_ratio", "anyres_max_9")
    return lambda width, height: int(theirs._get_number_of_features(height, width, side, side))


def llava_qwen_count(folder: Path) -> Count:
    raw = read_json(folder / "config.json")

    def count(width: int, height: int) -> int:
        _, _, kept = llava_qwen.map_of((width, height), raw, 384, 27)
        rows, columns = kept[-2:]
        return 27 * 27 + rows * (columns + 1)

    return count


def ovis_count(folder: Path) -> Count:
    """Where it would leave a side no pixels, the reference fails."""
    raw, bounds = read_json(folder / "config.json")["vit_config"], processor_json(folder)
    factor = raw["patch_size"] * raw.get("hidden_stride", 2)
    least, most = bounds.get("min_pixels", ovis2_5.MIN_PIXELS), bounds.get("max_pixels", ovis2_5.MAX_PIXELS)

    def count(width: int, height: int) -> int | None:
        high, wide = ovis2_5.smart_resize(height, width, factor, least, most)
        return high * wide // factor**2 or None

    return count


def nanovlm_count(folder: Path) -> Count:
    reference: Any = nanovlm.NanoVlm.__new__(nanovlm.NanoVlm)
    reference.raw = raw = read_json(folder / "config.json")
    side, extra = raw["vit_img_size"], raw.get("vlm_extra_tokens") or {}
    rows = (side // raw["vit_patch_size"] // raw.get("mp_pixel_shuffle_factor", 2)) ** 2

    def count(width: int, height: int) -> int:
        if "max_img_size" not in raw:
            return rows
        wide, high = reference._enlarged(width, height, side)
        tiles = wide * high // side**2
        return rows * (tiles + ("global_image_token" in extra and tiles > 1))

    return count


def idefics3_count(folder: Path) -> Count:
    picture, rows = processor_json(folder), read_json(folder / "processor_config.json")["image_seq_len"]
    side = picture["max_image_size"]["longest_edge"]

    def count(width: int, height: int) -> int:
        scaled = idefics3._scaled(width, height, picture["size"]["longest_edge"])
        wide, high = idefics3._whole_squares(*scaled, side)
        tiles = wide * high // side**2
        return int(rows * (tiles + (tiles > 1)))

    return count


def video_llama_count(folder: Path) -> Count:
    """transformers refuses sides beyond 200:1."""
    theirs = VideoLlama3ImageProcessorPil(**processor_json(folder))

    def count(width: int, height: int) -> int | None:
        if max(width, height) > 200 * min(width, height):
            return None
        return int(theirs.get_number_of_image_patches(height, width, {}))

    return count


def authors_video_llama_count(folder: Path) -> Count:
    raw: Raw = processor_json(folder)
    least, most = raw["min_tokens"], raw["max_tokens"] * 14 * 14

    def count(width: int, height: int) -> int:
        high, wide = videollama3_qwen2._alone(height, width, 14, least, most)
        return high * wide // 14**2

    return count


def siglip_count(folder: Path) -> Count:
    raw = read_json(folder / "config.json")["vision_config"]
    return lambda width, height: (raw["image_size"] // raw["patch_size"]) ** 2


def naflex_count(folder: Path) -> Count:
    raw, picture = read_json(folder / "config.json")["vision_config"], processor_json(folder)
    patch = raw["patch_size"]

    def count(width: int, height: int) -> int:
        wide, high = siglip2.resized_to(width, height, patch, picture["max_num_patches"])
        return wide * high // patch**2

    return count


COUNTS: dict[str, Callable[[Path], Count]] = {
    "nvila": nvila_count,
    "llava_onevision": onevision_count,
    "r_4b": onevision_count,
    "bee": onevision_count,
    "llava_qwen": llava_qwen_count,
    "ovis2_5": ovis_count,
    "ovis2_6": ovis_count,
    "nanovlm": nanovlm_count,
    "idefics3": idefics3_count,
    "video_llama_3": video_llama_count,
    "videollama3_qwen2": authors_video_llama_count,
    "siglip": siglip_count,
    "siglip2": naflex_count,
}
MODELS = sorted(folder.name for folder in EXAMPLES.iterdir() if folder.is_dir())


def family_of(name: str) -> str:
    checkpoint = Checkpoint(EXAMPLES / name)
    return (tower_family(checkpoint) or vlm_family(checkpoint)).name


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_ten_thousand_sizes(name: str) -> None:
    """Between 1 and 8,192 pixels along a side, small ones as often as large ones."""
    facts, count = image_facts(Checkpoint(EXAMPLES / name)), COUNTS[family_of(name)](EXAMPLES / name)
    chance, compared = random.Random(name), 0
    while compared < SIZES:
        width, height = (round(2 ** chance.uniform(0, 13)) for _ in range(2))
        expected = count(width, height)
        if expected is not None:
            (layout,) = facts.layouts([Size(width, height)])
            assert layout.image_tokens == expected, (width, height)
            compared += 1


def test_every_family_with_eyes_is_counted() -> None:
    known = {family.name for family in (*CHAT_FAMILIES, *TOWER_FAMILIES)} - {"causal_lm"}
    assert set(COUNTS) == {family_of(name) for name in MODELS} == known
