"""vLLM's half: the cases of a family, answered by its CPU engine in a process of its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from vllm_cases import TOKENS, Answer, Case, Picture, Video, rendered

HERE = Path(__file__).parent
PYTHON = HERE.parents[2] / ".venv-vllm/bin/python"
READY = HERE.parents[2] / ".venv-vllm/.ready"
SECONDS = 600


class Answered(NamedTuple):
    """version: vLLM's; answers: by the name of the case."""

    version: str
    answers: dict[str, Answer]


def ask_vllm(folder: Path, cases: Mapping[str, Case], scratch: Path) -> Answered:
    """One process for all cases: starting vLLM takes most of the time. scratch: where pictures are left for it."""
    prompts, limits = [], {"image": 0, "video": 0}
    for number, case in enumerate(cases.values()):
        arrays = _arrays(case)
        path = scratch / f"{number}.npz"
        np.savez(path, **arrays)
        prompts.append({"prompt": rendered(case), "media": str(path)})
        for kind, count in Counter(name.split(".")[0] for name in arrays).items():
            limits[kind] = max(limits[kind], count)
    job = {"model": str(folder), "limits": limits, "max_tokens": TOKENS, "prompts": prompts}
    done = subprocess.run(
        [str(PYTHON), str(HERE / "run_vllm.py")],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"vLLM ended with {done.returncode}:\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Answered(found["vllm"], {name: Answer(**one) for name, one in zip(cases, found["answers"], strict=True)})


def _arrays(case: Case) -> dict[str, np.ndarray]:
    pictures = [np.asarray(part.draw()) for part in case if isinstance(part, Picture)]
    videos = [np.stack([np.asarray(frame.draw()) for frame in part.frames]) for part in case if isinstance(part, Video)]
    return {f"image.{n}": one for n, one in enumerate(pictures)} | {f"video.{n}": one for n, one in enumerate(videos)}
