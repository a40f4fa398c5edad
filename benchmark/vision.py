"""The tower on its own: mixed grids packed, padded and one by one; and fixed pictures against the usual runtimes.

python benchmark/vision.py [--layers 9] [--repeats 5] [--quick]

SigLIP-so400m's shape (width 1152, MLP 4304, 16 heads; `--layers` of its 27 blocks), random weights, float32, CPU. All
contenders of a part run in turn, round after round in one process; the figures are medians, and the machine's own
float32 matrix-product rate is measured between the rounds. OpenVINO joins in where it is installed
(`pip install 'siglane[bench]'`). Prints the tables and whether each bar holds, writes benchmark/results/vision.json and
vision.png, exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openvino_tower
import torch
from machine import description, gemm_rate, onednn_rate
from torch import nn
from transformers import Siglip2VisionConfig, Siglip2VisionModel, SiglipVisionConfig, SiglipVisionModel

from siglane.config.vision import PatchLayout, PositionResize, VisionConfig
from siglane.nn.cpu.optimise import optimise
from siglane.types import Grid, PackedPatches
from siglane.vision import tower as siglane_tower

MIXED = tuple(Grid(*shape) for shape in ((16, 16), (8, 12), (24, 40), (10, 14), (6, 20), (12, 12), (30, 30), (8, 8)))
FIXED = Grid(24, 24)
PATCH = 16
RESULTS = Path(__file__).parent / "results"
Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a tower: SigLIP-so400m's but for the number of layers, or a tiny one for a quick look."""

    layers: int
    hidden: int = 1152
    intermediate: int = 4304
    heads: int = 16

    def sizes(self) -> dict[str, Any]:
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "patch_size": PATCH,
        }

    def flops(self, grids: Sequence[Grid]) -> float:
        """Useful floating-point operations of one forward: linear layers and attention, no padding."""
        d, patches = self.hidden, sum(grid.area for grid in grids)
        linear = 2 * patches * (3 * PATCH**2 * d + self.layers * (4 * d * d + 2 * d * self.intermediate))
        return linear + 4 * d * self.layers * sum(grid.area**2 for grid in grids)


def siglane(
    shape: Shape, positions: Grid, layout: PatchLayout, resize: PositionResize, packed: bool = True
) -> nn.Module:
    """packed: its weights, as by every engine after loading."""
    config = VisionConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_channels=3, patch_size=PATCH, position_grid=positions,
        hidden_act="gelu_tanh", layer_norm_eps=1e-6, patch_layout=layout, position_resize=resize, rope_theta=None,
        depth=shape.layers, post_norm=True, use_head=False,
    )  # fmt: skip
    tower = siglane_tower.SiglipVisionModel(config)
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.02)
    if packed:
        optimise(tower)
    return tower.eval().requires_grad_(False)


def packed_run(tower: nn.Module, grids: Sequence[Grid]) -> Run:
    packed = PackedPatches(torch.randn(sum(grid.area for grid in grids), 3 * PATCH**2), tuple(grids))
    return lambda: tower(packed)


def alone_run(tower: nn.Module, grids: Sequence[Grid]) -> Run:
    runs = [packed_run(tower, [grid]) for grid in grids]
    return lambda: [run() for run in runs]


def padded_model(shape: Shape) -> nn.Module:
    config = Siglip2VisionConfig(**shape.sizes(), num_patches=256, vision_use_head=False)
    return Siglip2VisionModel(config).eval().requires_grad_(False)


def padded_run(model: nn.Module, grids: Sequence[Grid]) -> Run:
    longest = max(grid.area for grid in grids)
    inputs = {
        "pixel_values": torch.randn(len(grids), longest, 3 * PATCH**2),
        "pixel_attention_mask": torch.stack([(torch.arange(longest) < grid.area).long() for grid in grids]),
        "spatial_shapes": torch.tensor([list(grid) for grid in grids]),
    }
    return lambda: model(**inputs)


def fixed_model(shape: Shape) -> nn.Module:
    side = FIXED.h * PATCH
    config = SiglipVisionConfig(**shape.sizes(), image_size=side, vision_use_head=False)
    config._attn_implementation = "sdpa"
    return SiglipVisionModel(config).eval().requires_grad_(False)


def openvino_run(model: nn.Module, pixels: torch.Tensor) -> Run | None:
    if not openvino_tower.installed("openvino"):
        return None
    run, values = openvino_tower.run_of(openvino_tower.converted(model, pixels), openvino_tower.FLOAT32), pixels.numpy()
    return lambda: run(values)


@torch.inference_mode()
def interleaved(runs: dict[str, Run], repeats: int) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of every contender in every round, and torch's matrix-product rate after each round.

    Every round begins with another contender: what ran before leaves its threads and its data behind.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    rates = []
    names = list(runs)
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            runs[name]()
            if repeat:  # the first round warms up and compiles
                seconds[name].append(time.perf_counter() - begin)
        rates.append(gemm_rate(repeats=5))
    return seconds, rates


def rate_table(seconds: dict[str, list[float]], flops: float, ceiling: float) -> dict[str, dict[str, float]]:
    return {
        name: {
            "seconds": round(statistics.median(found), 4),
            "gflops": round(flops / statistics.median(found) / 1e9, 1),
            "of_ceiling": round(flops / statistics.median(found) / ceiling, 3),
        }
        for name, found in seconds.items()
    }


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster `fast` is: the median over the rounds, in which both ran side by side."""
    return statistics.median(one / other for one, other in zip(seconds[slow], seconds[fast], strict=True))


def mixed(shape: Shape, repeats: int) -> dict[str, Any]:
    tower = siglane(shape, Grid(16, 16), "channel_last", "bilinear_antialias")
    patches = sum(grid.area for grid in MIXED)
    uniform = [Grid(16, round(patches / len(MIXED) / 16))] * len(MIXED)
    runs = {
        "siglane packed": packed_run(tower, MIXED),
        "siglane one by one": alone_run(tower, MIXED),
        "siglane uniform batch": packed_run(tower, uniform),
        "transformers padded": padded_run(padded_model(shape), MIXED),
    }
    seconds, rates = interleaved(runs, repeats)
    ceiling = statistics.median(rates)
    table = rate_table(seconds, shape.flops(MIXED), ceiling)
    table["siglane uniform batch"] = rate_table(seconds, shape.flops(uniform), ceiling)["siglane uniform batch"]
    uniform_patches = sum(grid.area for grid in uniform)
    return {
        "contenders": table,
        "torch_gflops": round(ceiling / 1e9, 1),
        "times_padded": round(ratio(seconds, "transformers padded", "siglane packed"), 2),
        "times_one_by_one": round(ratio(seconds, "siglane one by one", "siglane packed"), 3),
        "cost_per_patch_to_uniform": round(
            uniform_patches / patches / ratio(seconds, "siglane uniform batch", "siglane packed"), 3
        ),
    }


def fixed(shape: Shape, repeats: int, batch: int) -> dict[str, Any]:
    model = fixed_model(shape)
    pixels = torch.randn(batch, 3, FIXED.h * PATCH, FIXED.w * PATCH)
    compiled = torch.compile(model)
    runs: dict[str, Run | None] = {
        "siglane": packed_run(siglane(shape, FIXED, "channel_first", "never"), [FIXED] * batch),
        "transformers": lambda: model(pixels),
        "torch.compile": lambda: compiled(pixels),
        "OpenVINO": openvino_run(model, pixels),
    }
    seconds, rates = interleaved({name: run for name, run in runs.items() if run is not None}, repeats)
    ceiling = statistics.median(rates)
    others = [name for name in seconds if name != "siglane"]
    return {
        "contenders": rate_table(seconds, shape.flops([FIXED] * batch), ceiling),
        "torch_gflops": round(ceiling / 1e9, 1),
        "times_best_other": round(min(ratio(seconds, name, "siglane") for name in others), 3),
    }


def peak_bytes(which: str, shape: Shape) -> int:
    """Growth of the resident memory at its highest during one forward, in a process of its own."""
    job = json.dumps({"which": which, **{name: getattr(shape, name) for name in Shape.__slots__}})
    return printed_number(__file__, "--peak-of", job)


def printed_number(script: str, *arguments: str) -> int:
    """The last word of a benchmark's own process."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent)
    return int(done.stdout.split()[-1])


@torch.inference_mode()
def print_peak(job: dict[str, Any]) -> None:
    which = job.pop("which")
    shape = Shape(**job)
    if which == "packed":
        run = packed_run(siglane(shape, Grid(16, 16), "channel_last", "bilinear_antialias"), MIXED)
    else:
        run = padded_run(padded_model(shape), MIXED)
    before = resident_bytes()
    print(highest_bytes(run) - before)


def resident_bytes() -> int:
    return _status("VmRSS")


def highest_bytes(run: Run) -> int:
    """The resident memory at its highest while `run` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the highest so far
    run()
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    parts = {"8 mixed grids": result["mixed"], **{f"24x24, batch {n}": result[f"fixed_{n}"] for n in (1, 4)}}
    figure, axes = plt.subplots(1, len(parts), figsize=(13, 3.6), constrained_layout=True)
    for axis, (title, part) in zip(axes, parts.items(), strict=True):
        rows = {name: row["of_ceiling"] for name, row in part["contenders"].items() if "uniform" not in name}
        colours = ["#2a6fb0" if name.startswith("siglane") else "#b8bec6" for name in rows]
        bars = axis.barh(list(rows), list(rows.values()), color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=3)
        axis.axvline(1, color="#888", linewidth=0.8, linestyle="--")
        axis.set(title=title, xlabel="useful FLOP/s / torch's GEMM rate", xlim=(0, 1.18 * max(1.0, *rows.values())))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def bars(result: dict[str, Any]) -> dict[str, bool]:
    packed = result["mixed"]["contenders"]["siglane packed"]
    return {
        "mixed: at least 3 times transformers' padded throughput": result["mixed"]["times_padded"] >= 3,
        "mixed: faster than one by one": result["mixed"]["times_one_by_one"] > 1,
        "mixed: at least 0.90 of the matrix-product rate": packed["of_ceiling"] >= 0.9,
        "mixed: cost per patch within 10 % of a uniform batch": result["mixed"]["cost_per_patch_to_uniform"] <= 1.1,
        "mixed: at most half of the padded peak memory": result["memory"]["packed_to_padded"] <= 0.5,
        **{
            f"fixed, batch {n}: at least 0.95 of the best other": result[f"fixed_{n}"]["times_best_other"] >= 0.95
            for n in (1, 4)
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9, help="blocks of the tower (so400m has 27)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny tower: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peak-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options.peak_of)
        return 0
    torch.manual_seed(0)
    shape = Shape(1, 64, 96, 2) if options.quick else Shape(options.layers)
    repeats = 1 if options.quick else options.repeats
    memory = {name: peak_bytes(name, shape) for name in ("packed", "padded")}
    result: dict[str, Any] = {
        "command": f"benchmark/vision.py --layers {shape.layers} --repeats {repeats}" + " --quick" * options.quick,
        "machine": description(),
        "siglane_gflops": round(onednn_rate() / 1e9, 1),
        "mixed": mixed(shape, repeats),
        "memory": {**memory, "packed_to_padded": round(memory["packed"] / memory["padded"], 3)},
        **{f"fixed_{batch}": fixed(shape, repeats, batch) for batch in (1, 4)},
    }
    result["bars"] = bars(result)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "vision.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(result, options.out / "vision.png")
    print(json.dumps(result, indent=2))
    return 0 if options.quick or all(result["bars"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
