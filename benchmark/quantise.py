"""The tower in 8 bits against the same tower in float32, on a CPU: speed, memory of the blocks, and how alike it sees.

python benchmark/quantise.py [--layers 9] [--batch 8] [--repeats 5] [--quick]

SigLIP-so400m's shape (width 1152, MLP 4304, 16 heads, pictures of 24x24 patches; `--layers` of its 27 blocks), random
weights. Both run in turn, round after round in one process; figures are medians, and the machine's float32 and int8
matrix-product rates are measured between the rounds. Then the shipped demo-siglip labels 1,024 fresh pictures either
way. Prints JSON and writes benchmark/results/quantise.json; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from machine import description, onednn_rate
from vision import FIXED, PATCH, RESULTS, Shape, ratio, siglane

from siglane.families.two_tower import load_two_tower
from siglane.nn.cpu.int8 import Int8Linear
from siglane.nn.cpu.optimise import optimise
from siglane.nn.quantise import quantise
from siglane.training.evaluate import embed_classes, embed_pictures
from siglane.types import PackedPatches
from siglane.weights.demo import open_model

sys.path.append(str(Path(__file__).parents[1]))  # recipes/ is no part of the installed package

from recipes.demo.scenes import draw, random_scene
from recipes.demo.siglip import LABELS, decoded

DEMO_SEED = 4321


@torch.inference_mode()
def int8_rate(repeats: int = 9) -> float:
    """Multiply-adds of an 8-bit layer of SigLIP-base's MLP shape, rows made 8 bits included, in operations/s."""
    x, layer = torch.randn(2304, 768), Int8Linear(torch.randn(3072, 768), None)
    seconds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        layer(x)
        seconds.append(time.perf_counter() - begin)
    return 2 * 2304 * 768 * 3072 / statistics.median(seconds[1:])


def weight_bytes(module: torch.nn.Module) -> int:
    own = sum(parameter.nbytes for parameter in module.parameters())
    return own + sum(layer.nbytes for layer in module.modules() if isinstance(layer, Int8Linear))


@torch.inference_mode()
def measure(shape: Shape, batch: int, repeats: int) -> dict[str, Any]:
    towers = {}
    for name in ("float32", "8bit"):
        torch.manual_seed(0)
        towers[name] = siglane(shape, FIXED, "channel_first", "never", packed=False)
    sizes = {"float32": weight_bytes(towers["float32"].blocks)}
    optimise(towers["float32"])
    begin = time.perf_counter()
    quantise(towers["8bit"], "8bit", "cpu")
    optimise(towers["8bit"])
    quantising = time.perf_counter() - begin
    sizes["8bit"] = weight_bytes(towers["8bit"].blocks)
    packed = PackedPatches(torch.randn(batch * FIXED.area, 3 * PATCH**2), (FIXED,) * batch)
    features = {name: tower(packed) for name, tower in towers.items()}  # and warms up
    seconds: dict[str, list[float]] = {name: [] for name in towers}
    rates: dict[str, list[float]] = {"float32": [], "8bit": []}
    for _ in range(repeats):
        for name, tower in towers.items():
            begin = time.perf_counter()
            tower(packed)
            seconds[name].append(time.perf_counter() - begin)
        rates["float32"].append(onednn_rate())
        rates["8bit"].append(int8_rate())
    flops = shape.flops([FIXED] * batch)
    return {
        name: {
            "seconds": round(statistics.median(found), 4),
            "gops": round(flops / statistics.median(found) / 1e9, 1),
            "ceiling_gops": round(statistics.median(rates[name]) / 1e9, 1),
            "weight_bytes": sizes[name],
        }
        for name, found in seconds.items()
    } | {
        "times_float32": round(ratio(seconds, "float32", "8bit"), 2),
        "seconds_to_quantise": round(quantising, 3),
        "least_cosine": round(float(F.cosine_similarity(features["float32"], features["8bit"], dim=-1).min()), 6),
    }


def on_the_demo(pictures: int) -> dict[str, Any]:
    """`demo-siglip` in 8 bits beside float32, on fresh scenes of one shape and the 32 labels of colour and shape."""
    exact, coarse = (
        load_two_tower(open_model("demo-siglip"), device=torch.device("cpu"), dtype=torch.float32) for _ in range(2)
    )
    quantise(coarse.model, "8bit", "cpu")
    rngs = [np.random.default_rng([DEMO_SEED, number]) for number in range(pictures)]
    scenes = [decoded(draw(random_scene(rng, shapes_wanted=1, sign_share=0.0))) for rng in rngs]
    images = [embed_pictures(two_tower, scenes) for two_tower in (exact, coarse)]
    first = [
        (x @ embed_classes(two_tower, LABELS).T).argmax(-1)
        for x, two_tower in zip(images, (exact, coarse), strict=True)
    ]
    return {
        "pictures": pictures,
        "top_1_agreement": round(float((first[0] == first[1]).float().mean()), 4),
        "least_cosine_of_embeddings": round(float(F.cosine_similarity(*images, dim=-1).min()), 6),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9, help="blocks of the tower (so400m has 27)")
    parser.add_argument("--batch", type=int, default=8, help="pictures of one forward")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny tower: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    shape = Shape(1, 64, 96, 2) if options.quick else Shape(options.layers)
    batch, repeats = (1, 1) if options.quick else (options.batch, options.repeats)
    command = f"benchmark/quantise.py --layers {shape.layers} --batch {batch} --repeats {repeats}"
    found = measure(shape, batch, repeats)
    demo = on_the_demo(16 if options.quick else 1024)
    bars = {
        "at least 1.8 times as fast as float32": found["times_float32"] >= 1.8,
        "at most 0.26 of the blocks' memory": found["8bit"]["weight_bytes"] <= 0.26 * found["float32"]["weight_bytes"],
        "cosine of every feature at least 0.999": found["least_cosine"] >= 0.999,
        "demo: cosine of every embedding at least 0.999": demo["least_cosine_of_embeddings"] >= 0.999,
        "demo: the same first label for at least 99 % of the pictures": demo["top_1_agreement"] >= 0.99,
    }
    result = {
        "command": command + " --quick" * options.quick,
        "machine": description(),
        **found,
        "demo": demo,
        "bars": bars,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quantise.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if options.quick or all(bars.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
