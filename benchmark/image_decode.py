"""JPEGs decoded whole and at a fraction of their size (`--image-decode exact` and `fast`): time and difference.

python benchmark/image_decode.py [--repeats 9] [PHOTO.jpg ...]

A picture of 12 megapixels with the spectrum of photographs (`tests/unit/image_spectra.py`), once with as much detail as
they have on average and once with as much as a telephone leaves in them, cut into the 384x384 pixels of SigLIP: file
to patches, one thread, both ways in turn, medians. Then the mean difference of the pixels at the least shrinking at
which `fast` does anything, for every filter and fraction, over such a picture and the given photographs, and for
comparison where less is left to the filter. Writes benchmark/results/image_decode.json, exits with 1 when a bar is
missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import description
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/unit"))
from image_spectra import photograph

from siglane.config.preprocess import LOCAL_DECODE, PreprocessConfig
from siglane.config.vision import VisionConfig
from siglane.image.decode import decode, decode_for
from siglane.image.patchify import to_patches
from siglane.image.reduce import FILTERS, LEFT_OVER, SHRINKS, shrink_of
from siglane.image.tile import render_tiles
from siglane.tiling.squash import Squash
from siglane.types import Box, Grid, ImageLayout, Resize, Size, Tile

WIDTH, HEIGHT, SIDE, PATCH = 4000, 3000, 384, 16
DETAIL = {"photographs on average": (1.0, 90), "a telephone's": (1.2, 90)}  # exponent of the spectrum, JPEG quality
LESS_LEFT = (2.0, 2.5, 3.0)
RULES = {rule: replace(LOCAL_DECODE, jpeg=rule) for rule in ("exact", "fast")}
FASTER, MEAN = 2.5, 0.5
RESULTS = Path(__file__).parent / "results/image_decode.json"


def layout_of(source: Size, size: Size, resample: Any) -> ImageLayout:
    grid = Grid(size.height // PATCH, size.width // PATCH)
    tile = Tile((Resize(size, resample),), Box(0, 0, *size), grid)
    return ImageLayout(source, (tile,), (), Grid(1, 1), projected=(grid,))


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def seconds(data: bytes, repeats: int) -> dict[str, float]:
    """Of each rule, from the file to patches."""
    vision = VisionConfig.from_hf(
        {"image_size": SIDE, "patch_size": PATCH}, feature_layer=-1, post_norm=True, head=False, name="vision_config"
    )
    size = Size(SIDE, SIDE)
    preprocess = PreprocessConfig(
        rule=Squash(tile=size, resample="bicubic"), mean=(0.5,) * 3, std=(0.5,) * 3, rescale=1 / 255
    )
    layout = layout_of(Size(WIDTH, HEIGHT), size, "bicubic")
    taken: dict[str, list[float]] = {rule: [] for rule in RULES}
    for _ in range(repeats + 1):
        for rule, config in RULES.items():
            began = time.perf_counter()
            to_patches(decode_for(data, layout, config), layout, preprocess, vision)
            taken[rule].append(time.perf_counter() - began)
    return {rule: statistics.median(samples[1:]) for rule, samples in taken.items()}


def difference(data: bytes, resample: str, shrink: int, left_over: float) -> float | None:
    """Mean over all pixels, of 255, when a fraction 1 / shrink of a picture is made `left_over` times smaller; None for
    a picture that is too small."""
    whole = decode(data, LOCAL_DECODE)
    size = Size(int(whole.size.width / shrink / left_over), int(whole.size.height / shrink / left_over))
    if min(size) < PATCH:
        return None
    layout = layout_of(whole.size, size, resample)
    (exact,) = render_tiles((whole.rgb,), layout)
    if left_over >= LEFT_OVER:
        assert shrink_of(layout) == shrink
        fast = decode_for(data, layout, RULES["fast"])
        (pixels,) = render_tiles((fast.rgb,), layout, fast.region)
    else:  # which `fast` does not do
        image = Image.open(BytesIO(data))
        image.draft(None, (image.width // shrink, image.height // shrink))
        region = (0, 0, whole.size.width / shrink, whole.size.height / shrink)
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling[resample.upper()], region))
    return float(np.abs(exact.astype(float) - pixels).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="*", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files = {name: jpeg(photograph(WIDTH, HEIGHT, exponent=exponent), q) for name, (exponent, q) in DETAIL.items()}
    times = {name: seconds(data, arguments.repeats) for name, data in files.items()}
    print(
        f"{WIDTH}x{HEIGHT} to {SIDE}x{SIDE}, one thread\n{'detail':24} {'MB':>5} {'exact ms':>9} {'fast ms':>8}  times"
    )
    for name, taken in times.items():
        exact, fast = taken["exact"], taken["fast"]
        print(f"{name:24} {len(files[name]) / 1e6:5.1f} {exact * 1e3:9.0f} {fast * 1e3:8.0f} {exact / fast:6.2f}")
    pictures = {path.name: path.read_bytes() for path in arguments.photos}
    pictures["1803x1351"] = jpeg(photograph(1803, 1351), 90)
    lefts = (*LESS_LEFT, LEFT_OVER)
    print(f"\nmean difference of 255, the worst picture and fraction; left to the filter: {', '.join(map(str, lefts))}")
    worst: dict[str, list[float]] = {}
    for resample in FILTERS:
        found = [
            [difference(data, resample, shrink, left) for data in pictures.values() for shrink in SHRINKS]
            for left in lefts
        ]
        worst[resample] = [max(one for one in row if one is not None) for row in found]
        print(f"{resample:10}" + "".join(f"{one:8.2f}" for one in worst[resample]))
    bars = {
        f"fast at least {FASTER} x exact": all(one["exact"] / one["fast"] >= FASTER for one in times.values()),
        f"mean difference at most {MEAN} of 255": all(row[-1] <= MEAN for row in worst.values()),
    }
    for bar, holds in bars.items():
        print(f"{'holds' if holds else 'MISSED'}: {bar}")
    facts = {"machine": description(), "seconds": times, "left_over": lefts, "difference": worst, "bars": bars}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    return 0 if all(bars.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
