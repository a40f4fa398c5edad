"""The first thing to run on a GPU: is every number right, and how near is every time to what the card allows?

    python benchmark/gpu_report.py [--quick] [--out FOLDER]

Each stage (`benchmark/gpu_stages.py`) is a process of its own with a limit, so that one that hangs or dies costs itself
alone; what it says is written to FOLDER/gpu_report.jsonl at once. `--quick`: right numbers only, two minutes. Without a
GPU the same stages run on the CPU with tiny shapes, which shows that they run and nothing else.

Exit code: 0 when every goal is met, 1 when one is missed or a stage breaks, 2 without a GPU. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

STAGES = Path(__file__).with_name("gpu_stages.py")


class Stage(NamedTuple):
    """seconds: after which it is ended; quick: it belongs to `--quick`."""

    name: str
    seconds: int
    quick: bool


PLAN = (
    Stage("machine", 60, True),
    Stage("kernels", 120, True),
    Stage("tests", 180, False),
    Stage("answers", 120, True),
    Stage("tower", 120, False),
    Stage("decode", 240, False),
    Stage("engine", 180, False),
)
Line = dict[str, Any]


def run(stage: Stage, small: bool) -> list[Line]:
    """What it says, a line of JSON each, and how it ended where it did not end well."""
    command = [sys.executable, str(STAGES), stage.name, *(["--small"] if small else [])]
    begin = time.monotonic()
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=stage.seconds, check=False)
        said, error = ended.stdout, None
        if ended.returncode:
            error = (ended.stderr.strip().splitlines() or [f"ended with {ended.returncode}"])[-1]
    except subprocess.TimeoutExpired as expired:
        said = expired.stdout.decode() if isinstance(expired.stdout, bytes) else ""
        error = f"did not end within {stage.seconds} s"
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    lines.append({"seconds": round(time.monotonic() - begin, 1)} | ({"error": error} if error else {}))
    return [{"stage": stage.name, **line} for line in lines]


def verdict(lines: list[Line], on_gpu: bool) -> tuple[str, int]:
    """The table of goals, and the exit code."""
    goals, errors = [line for line in lines if "goal" in line], [line for line in lines if "error" in line]
    rows = [f"{'ok' if one['passed'] else 'MISSED':7}{one['goal']}: {one['value']} ({one['wanted']})" for one in goals]
    rows += [f"BROKEN stage {one['stage']}: {one['error']}" for one in errors]
    missed = bool(errors) or not all(one["passed"] for one in goals)
    if not on_gpu:
        rows.append(
            "No GPU: torch finds no CUDA here. The stages ran on the CPU with tiny shapes; no time above counts."
        )
    return "\n".join(rows), 1 if missed else 0 if on_gpu else 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_report"))
    arguments = parser.parse_args()
    on_gpu, lines = torch.cuda.is_available(), list[Line]()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "gpu_report.jsonl").open("w", encoding="utf-8") as file:
        for stage in PLAN:
            if arguments.quick and not stage.quick:
                continue
            print(f"== {stage.name}", flush=True)
            for line in run(stage, small=not on_gpu):
                print(json.dumps(line), file=file, flush=True)
                print(json.dumps(line), flush=True)
                lines.append(line)
    table, code = verdict(lines, on_gpu)
    print(table)
    return code


if __name__ == "__main__":
    sys.exit(main())
