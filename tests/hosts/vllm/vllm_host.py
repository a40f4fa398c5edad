"""The real vLLM on a machine without a GPU, in its own environment: its own classes' answers to the cases of a family,
and its server with siglane inside, in a process group of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from host_process import Process, RunningServer, flags, in_session, process_group, receive, serving
from ports import free_port
from vllm_cases import TOKENS, Answer, Case, Picture, Video, rendered

HERE = Path(__file__).parent
PYTHON = HERE.parents[2] / ".venv-vllm/bin/python"
READY = HERE.parents[2] / ".venv-vllm/.ready"
SECONDS = 600
START_SECONDS = 300.0
ANSWER_SECONDS = 60.0
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
class Imported:
    """A process that has imported vLLM (`vllm_forks.py`)."""

    process: Process
    pipe: Connection
    log: Path

    def ask(self, *job: Any) -> Any:
        self.pipe.send(job)
        return receive(self.process, self.pipe, self.log, ANSWER_SECONDS)

    def server(self, arguments: Sequence[str], env: Mapping[str, str]) -> AbstractContextManager[tuple[Forked, Path]]:
        def start(env: Mapping[str, str], log: Path) -> Forked:
            return Forked(self, self.ask(arguments, env, str(log)))

        return in_session(start, env)


@dataclass(frozen=True, slots=True)
class Forked:
    """A server. parent: the only one that is told how it ended."""

    parent: Imported
    pid: int

    def poll(self) -> int | None:
        return self.parent.ask(self.pid, os.WNOHANG)

    def wait(self) -> int:
        return self.parent.ask(self.pid, 0)


@contextmanager
def vllm_imported() -> Iterator[Imported]:
    ours, theirs = Pipe()
    command = [str(PYTHON), str(HERE / "vllm_forks.py"), str(theirs.fileno())]
    with ours, process_group(command, environment({}), (theirs.fileno(),)) as (process, log):
        theirs.close()
        receive(process, ours, log, START_SECONDS)
        yield Imported(process, ours, log)


@contextmanager
def vllm_server(
    model: Path | str, *, env: Mapping[str, str], imported: Imported | None = None, **more: Any
) -> Iterator[RunningServer]:
    """What `vllm serve` starts, once it is healthy. The command itself looks for a distribution called vllm, and the
    wheel for CPUs has another name. imported: to fork it from; more: vLLM's arguments over `engine_options`."""
    options = engine_options(host="127.0.0.1", port=free_port(), **more)
    arguments, env = ["--model", str(model), *flags(options)], environment(env)
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", *arguments]
    session = process_group(command, env) if imported is None else imported.server(arguments, env)
    with serving(session, options["port"], START_SECONDS) as server:
        yield server
