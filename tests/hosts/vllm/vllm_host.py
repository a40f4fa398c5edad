"""The real vLLM on a machine without a GPU, in its own environment: its own classes' answers to the cases of a family,
and its engine and server with siglane inside, each in a process group of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from host_process import RunningServer, flags, process_group, receive, serving
from ports import free_port
from vllm_cases import TOKENS, Answer, Case, Picture, Video, rendered

HERE = Path(__file__).parent
PYTHON = HERE.parents[2] / ".venv-vllm/bin/python"
READY = HERE.parents[2] / ".venv-vllm/.ready"
SECONDS = 600
START_SECONDS = 300.0
ANSWER_SECONDS = 240.0
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_NO_USAGE_STATS": "1",
}


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


def engine_options(**more: Any) -> dict[str, Any]:
    """vLLM's arguments for a small machine, `more` put over them."""
    return {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096, "max_num_seqs": 16, **more}


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """This process' environment with what vLLM needs, `env` put over it. Where siglane is, vLLM's own knows."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT | dict(env)


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """`vllm.LLM` in its worker process."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    log: Path

    def chat(
        self, conversations: Sequence[Any], tokens: int, seconds: float = ANSWER_SECONDS, **more: Any
    ) -> list[dict[str, Any]]:
        """vLLM's greedy answers (prompt_tokens, token_ids, cached_tokens) to conversations submitted at once; each is
        {"error": message} when one is refused. more: for `LLM.chat`."""
        self.pipe.send((list(conversations), tokens, more))
        answers: list[dict[str, Any]] = receive(self.process, self.pipe, self.log, seconds)
        return answers


@contextmanager
def vllm_engine(model: Path | str, *, env: Mapping[str, str], **more: Any) -> Iterator[RunningEngine]:
    """An offline engine; `more` are vLLM's arguments over `engine_options`."""
    ours, theirs = Pipe()
    command = [str(PYTHON), str(HERE / "vllm_worker.py"), str(theirs.fileno())]
    with process_group(command, environment(env), (theirs.fileno(),)) as (process, log):
        theirs.close()
        with ours:
            ours.send(engine_options(model=str(model), **more))
            receive(process, ours, log, START_SECONDS)
            yield RunningEngine(process, ours, log)
            with suppress(OSError, subprocess.TimeoutExpired):  # already dead, or does not want to end: killed below
                ours.send(None)
                process.wait(timeout=20)


@contextmanager
def vllm_server(model: Path | str, *, env: Mapping[str, str], **more: Any) -> Iterator[RunningServer]:
    """`vllm serve`, once it is healthy."""
    options = engine_options(host="127.0.0.1", port=free_port(), **more)
    command = [str(PYTHON.with_name("vllm")), "serve", str(model), *flags(options)]
    with serving(command, environment(env), options["port"], START_SECONDS) as server:
        yield server
