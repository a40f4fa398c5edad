"""The tower in 8 bits, on a CPU: beside itself in float32 and beside OpenVINO in 8 bits; and how alike it sees.

python benchmark/quantise.py [--layers 9] [--repeats 5] [--quick]

SigLIP-so400m's shape (width 1152, MLP 4304, 16 heads; `--layers` of its 27 blocks), random weights: one and four
pictures of 24x24 patches, and the mixed grids of `vision.py`. Contenders run in turn, round after round in one process;
figures are medians, and the machine's float32 and int8 matrix-product rates are measured between the rounds. OpenVINO
joins in where it and NNCF are installed (`pip install 'siglane[bench]'`): its weights and activations in 8 bits, scales
from random pictures, cosines against its own float32. Memory is a process's at its highest in one forward, weights
included, over what it was before there were any. Then the shipped demo-siglip labels 1,024 fresh pictures in either
form. Prints JSON and writes benchmark/results/quantise.json; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino_tower
import torch
import torch.nn.functional as F
from machine import description, onednn_rate
from torch import nn
from vision import (
    FIXED,
    MIXED,
    PATCH,
    RESULTS,
    Run,
    Shape,
    fixed_model,
    highest_bytes,
    interleaved,
    printed_number,
    ratio,
    resident_bytes,
    siglane,
)

from siglane.config.vision import PatchLayout, PositionResize
from siglane.families.two_tower import load_two_tower
from siglane.nn.cpu.int8 import Int8Linear
from siglane.nn.cpu.optimise import optimise
from siglane.nn.quantise import quantise
from siglane.training.evaluate import embed_classes, embed_pictures
from siglane.types import Grid, PackedPatches
from siglane.weights.demo import open_model

sys.path.append(str(Path(__file__).parents[1]))  # recipes/ is no part of the installed package

from recipes.demo.scenes import draw, random_scene
from recipes.demo.siglip import LABELS, decoded

DEMO_SEED = 4321
BATCHES = (1, 4)
SIDES = (FIXED.h * PATCH, FIXED.w * PATCH)
PEER, EXACT = "OpenVINO 8bit", "float32.xml"


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


@dataclass(frozen=True)
class Towers:
    """One tower in both forms; sizes: bytes of their blocks."""

    float32: nn.Module
    in_8_bits: nn.Module
    sizes: dict[str, int]
    seconds_to_quantise: float


def towers_of(shape: Shape, positions: Grid, layout: PatchLayout, resize: PositionResize) -> Towers:
    float32, fewer = (same_tower(shape, positions, layout, resize) for _ in range(2))
    sizes = {"float32": weight_bytes(float32.get_submodule("blocks"))}
    optimise(float32)
    begin = time.perf_counter()
    quantise(fewer, "8bit", "cpu")
    optimise(fewer)
    seconds = time.perf_counter() - begin
    return Towers(float32, fewer, {**sizes, "8bit": weight_bytes(fewer.get_submodule("blocks"))}, seconds)


def same_tower(shape: Shape, positions: Grid, layout: PatchLayout, resize: PositionResize) -> nn.Module:
    torch.manual_seed(0)
    return siglane(shape, positions, layout, resize, packed=False)


def timed(runs: dict[str, Run], repeats: int, flops: float) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """A row for each contender; their seconds."""
    seconds, _ = interleaved(runs, repeats)
    rates = {"float32": statistics.median(onednn_rate() for _ in range(3)), "8bit": int8_rate()}
    rows = {}
    for name, found in seconds.items():
        middle = statistics.median(found)
        ceiling = rates["float32" if name == "float32" else "8bit"]
        rows[name] = {
            "seconds": round(middle, 4),
            "gops": round(flops / middle / 1e9, 1),
            "ceiling_gops": round(ceiling / 1e9, 1),
        }
    return rows, seconds


def alike(one: torch.Tensor, other: torch.Tensor) -> float:
    """The least cosine of their rows."""
    return round(float(F.cosine_similarity(one.flatten(0, -2), other.flatten(0, -2), dim=-1).min()), 6)


@torch.inference_mode()
def fixed(shape: Shape, batch: int, repeats: int, peer: Path | None) -> dict[str, Any]:
    """peer: OpenVINO's model in 8 bits, beside it its float32 one."""
    towers = towers_of(shape, FIXED, "channel_first", "never")
    packed = PackedPatches(torch.randn(batch * FIXED.area, 3 * PATCH**2), (FIXED,) * batch)
    runs: dict[str, Run] = {"float32": lambda: towers.float32(packed), "8bit": lambda: towers.in_8_bits(packed)}
    cosines = {"least_cosine": alike(runs["float32"](), runs["8bit"]())}
    if peer is not None:
        pixels = torch.randn(batch, 3, *SIDES).numpy()
        exact = openvino_tower.run_of(peer.with_name(EXACT), openvino_tower.FLOAT32)(pixels)
        run = openvino_tower.run_of(peer, openvino_tower.OPTIONS)
        cosines["least_cosine_of_openvino"] = alike(exact, run(pixels))
        runs[PEER] = lambda: run(pixels)
    rows, seconds = timed(runs, repeats, shape.flops([FIXED] * batch))
    ratios = {"times_float32": round(ratio(seconds, "float32", "8bit"), 2)}
    if peer is not None:
        ratios["times_openvino"] = round(ratio(seconds, PEER, "8bit"), 3)
    sizes = {"seconds_to_quantise": round(towers.seconds_to_quantise, 3), "block_bytes": towers.sizes}
    return {"contenders": rows, **ratios, **cosines, **sizes}


@torch.inference_mode()
def mixed(shape: Shape, repeats: int) -> dict[str, Any]:
    towers = towers_of(shape, Grid(16, 16), "channel_last", "bilinear_antialias")
    packed = PackedPatches(torch.randn(sum(grid.area for grid in MIXED), 3 * PATCH**2), MIXED)
    runs: dict[str, Run] = {"float32": lambda: towers.float32(packed), "8bit": lambda: towers.in_8_bits(packed)}
    cosine = alike(runs["float32"](), runs["8bit"]())
    rows, seconds = timed(runs, repeats, shape.flops(MIXED))
    return {"contenders": rows, "times_float32": round(ratio(seconds, "float32", "8bit"), 2), "least_cosine": cosine}


def write_peer(shape: Shape, folder: Path) -> Path | None:
    """OpenVINO's towers in float32 and 8 bits, and the path of the latter; None where it is not installed."""
    if not openvino_tower.installed("openvino", "nncf"):
        return None
    import openvino

    model, pixels = fixed_model(shape), torch.randn(1, 3, *SIDES)
    openvino.save_model(openvino_tower.converted(model, pixels), folder / EXACT, compress_to_fp16=False)
    openvino.save_model(openvino_tower.in_8_bits(model, pixels), folder / "8bit.xml", compress_to_fp16=False)
    return folder / "8bit.xml"


@torch.inference_mode()
def print_peak(shape: Shape, batch: int, peer: Path | None) -> None:
    """Of a forward of OpenVINO's tower at `peer`, else of siglane's."""
    before, run = openvino_alone(peer, batch) if peer else siglane_alone(shape, batch)
    run()
    print(highest_bytes(run) - before)


def siglane_alone(shape: Shape, batch: int) -> tuple[int, Run]:
    """Resident bytes before there is a tower; its forward."""
    before = resident_bytes()  # LLVM is not loaded yet: what it needs counts, as OpenVINO's plugin does
    tower = towers_of(shape, FIXED, "channel_first", "never").in_8_bits
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # gives back the float32 weights that it was made of
    packed = PackedPatches(torch.randn(batch * FIXED.area, 3 * PATCH**2), (FIXED,) * batch)
    return before, lambda: tower(packed)


def openvino_alone(peer: Path, batch: int) -> tuple[int, Run]:
    import openvino  # noqa: F401

    before = resident_bytes()
    run, pixels = openvino_tower.run_of(peer, openvino_tower.OPTIONS), torch.randn(batch, 3, *SIDES).numpy()
    return before, lambda: run(pixels)


def memory(shape: Shape, batch: int, peer: Path | None) -> dict[str, int]:
    job = ["--layers", str(shape.layers), "--peak-of", str(batch)]
    found = {"8bit": printed_number(__file__, *job)}
    if peer is not None:
        found[PEER] = printed_number(__file__, *job, "--peer", str(peer))
    return found


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


def bars(result: dict[str, Any]) -> dict[str, bool]:
    found = {
        "mixed grids: at least 2.5 times float32": result["mixed"]["times_float32"] >= 2.5,
        "demo: cosine of every embedding at least 0.999": result["demo"]["least_cosine_of_embeddings"] >= 0.999,
        "demo: the same first label for at least 99 % of the pictures": result["demo"]["top_1_agreement"] >= 0.99,
    }
    for batch in BATCHES:
        part, peaks = result[f"fixed_{batch}"], result[f"memory_{batch}"]
        sizes = part["block_bytes"]
        found |= {
            f"batch {batch}: cosine of every feature at least 0.9997": part["least_cosine"] >= 0.9997,
            f"batch {batch}: at most 0.26 of the blocks' memory": sizes["8bit"] <= 0.26 * sizes["float32"],
        }
        if PEER in peaks:
            found |= {
                f"batch {batch}: at least 0.85 of OpenVINO in 8 bits": part["times_openvino"] >= 0.85,
                f"batch {batch}: at most 0.6 of OpenVINO's memory": peaks["8bit"] <= 0.6 * peaks[PEER],
            }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9, help="blocks of the tower (so400m has 27)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny tower: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = Shape(1, 64, 96, 2) if options.quick else Shape(options.layers)
    if options.peak_of:
        print_peak(shape, options.peak_of, options.peer)
        return 0
    repeats = 1 if options.quick else options.repeats
    result: dict[str, Any] = {
        "command": f"benchmark/quantise.py --layers {shape.layers} --repeats {repeats}" + " --quick" * options.quick,
        "machine": description(),
    }
    with tempfile.TemporaryDirectory() as temporary:
        peer = write_peer(shape, Path(temporary))
        for batch in BATCHES:
            result[f"fixed_{batch}"] = fixed(shape, batch, repeats, peer)
            result[f"memory_{batch}"] = memory(shape, batch, peer)
    result |= {"mixed": mixed(shape, repeats), "demo": on_the_demo(16 if options.quick else 1024)}
    result["bars"] = bars(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "quantise.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if options.quick or all(result["bars"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
