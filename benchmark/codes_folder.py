"""How long a model of fewer bits takes to load, and how much memory: `python benchmark/codes_folder.py MODEL`.

python benchmark/codes_folder.py MODEL [--quantization 8bit] [--repeats 5] [--threads 1]

MODEL (a folder, a hub id, `random`: text-only of Qwen2.5-0.5B's shape, or `experts`: eight layers of 32) is written as
a folder of codes; then the original with `--quantization` and that folder are loaded in turn, each in a process of its
own whose files are in the page cache. Seconds are those of the weights, by the clock and of all cores together; memory
is what the process holds of its own (RssAnon, mapped files left out) beyond what it held before, once loaded and at
most meanwhile; about 20 MB of it are compiled loops. Weights are what layers, tables and norms hold, beside what the
checkpoint's numbers are in float32. Prints JSON; exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")
PAUSE = 0.002  # seconds between two looks
MOST = {"8bit": 0.30, "4bit": 0.20}  # of float32's weights
PEAK = 1.25  # of what is held in the end


def held(name: str) -> int:
    """Bytes of this process, as the system counts them."""
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name)) * 1024


class Watch(threading.Thread):
    """The most that RssAnon was."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._over = 0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(PAUSE):
            self.most = max(self.most, held("RssAnon"))

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.most


def weight_mb(model: Any) -> float:
    """What its weights take in memory."""
    from siglane.nn.cpu.int4 import Int4Linear
    from siglane.nn.cpu.int8 import Int8Weight

    own = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
    return (own + sum(x.nbytes for x in model.modules() if isinstance(x, Int8Weight | Int4Linear))) / 1e6


def float32_mb(folder: Path) -> float:
    """What a checkpoint's numbers would take."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return 4 * total / 1e6


def load_once(model: str, bits: str | None, threads: int) -> dict[str, float]:
    """One load in this process."""
    import torch

    from siglane.families.model import load_model
    from siglane.families.processor import load_processor
    from siglane.families.registry import is_vision_only
    from siglane.families.two_tower import LoadedTwoTower, load_two_tower
    from siglane.nn.cpu.memory import return_freed
    from siglane.weights.demo import open_model

    torch.set_num_threads(threads)
    checkpoint = open_model(model)
    both: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "quantization": bits}
    tower = is_vision_only(checkpoint)
    config = None if tower else load_processor(checkpoint).config
    return_freed()  # what reading the tokenizer left
    before, watch = held("RssAnon"), Watch()
    watch.start()
    begin, busy = time.perf_counter(), time.process_time()
    loaded = load_two_tower(checkpoint, **both) if config is None else load_model(checkpoint, config, **both)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    most = watch.stop() - before
    final = held("RssAnon") - before
    model = loaded.model if isinstance(loaded, LoadedTwoTower) else loaded
    found = {"seconds": seconds, "cpu_seconds": busy, "final_mb": final / 1e6, "peak_mb": most / 1e6}
    return {**found, "weights_mb": weight_mb(model)}


def measured(model: str, bits: str | None, threads: int) -> dict[str, float]:
    words = [sys.executable, __file__, model, "--once", "--threads", str(threads)]
    words += [] if bits is None else ["--quantization", bits]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How long a model of fewer bits takes to load, and how much memory.")
    parser.add_argument("model")
    parser.add_argument("--quantization", choices=("8bit", "4bit"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    asked = options()
    if asked.once:
        print(json.dumps(load_once(asked.model, asked.quantization, asked.threads)))
        return 0
    from siglane.weights.demo import open_model

    bits = asked.quantization or "8bit"
    with tempfile.TemporaryDirectory() as place:
        model = asked.model
        if model in ("random", "experts"):
            from random_decoder import Shape, write_random

            shape = Shape() if model == "random" else Shape(8, 1024, 512, 16, 4, vocab=16_384, experts=32)
            model = f"{place}/original"
            write_random(Path(model), shape)
        folder = f"{place}/codes"
        begin = time.perf_counter()
        words = [sys.executable, "-m", "siglane.cli.main", "quantize", model, "-o", folder, "--quantization", bits]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        written = time.perf_counter() - begin
        rounds = [
            (measured(model, bits, asked.threads), measured(folder, None, asked.threads)) for _ in range(asked.repeats)
        ]
        found = {
            name: {key: round(statistics.median(one[key] for one in runs), 2) for key in runs[0]}
            for name, runs in zip(("original", "folder"), zip(*rounds, strict=True), strict=True)
        }
        size = (Path(folder) / "model.safetensors").stat().st_size / 1e6
        share = found["original"]["weights_mb"] / float32_mb(open_model(model).root)
        peak = max(one["peak_mb"] / one["final_mb"] for one in found.values())
        ratios = {"weights_of_float32": round(share, 3), "peak_of_final": round(peak, 2)}
        files = {"quantization": bits, "written_s": round(written, 1), "file_mb": round(size, 1)}
        print(json.dumps(files | found | ratios))
        return 0 if share <= MOST[bits] and peak <= PEAK else 1


if __name__ == "__main__":
    raise SystemExit(main())
