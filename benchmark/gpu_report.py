"""The first thing to run on a GPU: is every number right, and how near is every time to what the card allows?

    python benchmark/gpu_report.py [--quick | --stages STAGE ...] [--seconds 540] [--out FOLDER]

Each stage (`benchmark/gpu_stages.py`) is a process of its own with a limit, so that one that hangs or dies costs itself
alone, and so does a part of it that raises. What is said goes to FOLDER/gpu_report.jsonl at once, what is logged to
FOLDER/STAGE.log, all of it and the goals to FOLDER/gpu_report.json at last. `--quick`: right numbers only. Without a
GPU the same stages run on the CPU with tiny shapes, which shows that they run and nothing else. Nothing has to be
installed but what siglane imports: stages take the package of this checkout.

Exit code: 0 when every goal is met, 1 when one is missed or a stage breaks, 2 without a GPU. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

STAGES = Path(__file__).with_name("gpu_stages.py")
PACKAGE = Path(__file__).resolve().parents[1] / "python"


class Stage(NamedTuple):
    """seconds: after which it is ended; quick: it belongs to `--quick`."""

    name: str
    seconds: int
    quick: bool


PLAN = (
    Stage("machine", 60, True),
    Stage("kernels", 180, True),
    Stage("answers", 120, True),
    Stage("tower", 90, False),
    Stage("decode", 180, False),
    Stage("engine", 120, False),
    Stage("tests", 240, False),
)
LEAST_SECONDS = 10
Line = dict[str, Any]


def run(stage: Stage, small: bool, log: Path, left: float = math.inf) -> list[Line]:
    """What it says, a line of JSON each, and how it ended where it did not end well. log: what it writes to stderr;
    left: seconds after which it is ended in any case."""
    if left < LEAST_SECONDS:
        return [{"stage": stage.name, "error": "was not begun: no time was left, see --seconds"}]
    command = [sys.executable, str(STAGES), stage.name, *(["--small"] if small else [])]
    begin, limit, error = time.monotonic(), min(stage.seconds, left), None
    path = os.pathsep.join(filter(None, (str(PACKAGE), os.environ.get("PYTHONPATH"))))
    with log.open("w", encoding="utf-8") as logged, tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        try:
            environment = os.environ | {"PYTHONPATH": path}
            ended = subprocess.run(command, stdout=output, stderr=logged, timeout=limit, check=False, env=environment)
            if ended.returncode:
                error = f"ended with {ended.returncode}; {last_line(log)}"
        except subprocess.TimeoutExpired:
            error = f"did not end within {limit:.0f} s; {last_line(log)}"
        output.seek(0)
        lines = [json.loads(line) for line in output if line.startswith("{") and line.endswith("}\n")]
    lines.append({"seconds": round(time.monotonic() - begin, 1)} | ({"error": error} if error else {}))
    return [{"stage": stage.name, **line} for line in lines]


def last_line(log: Path) -> str:
    return (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing was logged"])[-1]


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


def planned(quick: bool, names: list[str] | None) -> list[Stage]:
    if names is None:
        return [one for one in PLAN if one.quick or not quick]
    known = {one.name: one for one in PLAN}
    return [known[name] for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--quick", action="store_true")
    chosen.add_argument("--stages", nargs="+", choices=[one.name for one in PLAN], help="these alone, in this order")
    parser.add_argument("--seconds", type=float, default=540, help="after which no stage is begun or goes on")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_report"))
    arguments = parser.parse_args()
    on_gpu, lines, begin = torch.cuda.is_available(), list[Line](), time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "gpu_report.jsonl").open("w", encoding="utf-8") as file:
        for stage in planned(arguments.quick, arguments.stages):
            print(f"== {stage.name}", flush=True)
            left = arguments.seconds - (time.monotonic() - begin)
            for line in run(stage, not on_gpu, arguments.out / f"{stage.name}.log", left):
                print(json.dumps(line), file=file, flush=True)
                print(json.dumps(line), flush=True)
                lines.append(line)
    table, code = verdict(lines, on_gpu)
    whole = {"command": " ".join(sys.argv), "exit_code": code, "goals": [one for one in lines if "goal" in one]}
    whole |= {"broken": [one for one in lines if "error" in one], "lines": lines}
    (arguments.out / "gpu_report.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    print(table)
    return code


if __name__ == "__main__":
    sys.exit(main())
