"""The real SGLang on a machine without a GPU: its offline engine and its server, each in a process group of its own
that is killed with everything below it. One core per rank.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from host_process import HostError, RunningServer, flags, process_group, receive, serving
from ports import free_port
from waiting import PATIENCE

START_SECONDS = 180.0
UNSETTLED = "requests are still running"
ANSWER_SECONDS = 120.0

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "SGLANG_CPU_WORKERS": "1",  # its image processes; one per core by default
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def engine_options(**more: Any) -> dict[str, Any]:
    """SGLang's arguments for a machine without a GPU and its compiled kernels, `more` put over them."""
    return {
        "device": "cpu",
        "attention_backend": "torch_native",
        "mm_attention_backend": "sdpa",
        "sampling_backend": "pytorch",
        "disable_overlap_schedule": True,
        "disable_cuda_graph": True,
        "dtype": "float32",
        "max_total_tokens": 16384,
        "log_level": "error",
        "port": free_port(),
        **more,
    }


def environment(options: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, str]:
    """This process' environment with what SGLang needs, `env` put over it."""
    ours = dict(ENVIRONMENT)
    ranks = int(options.get("tp_size", 1)) * int(options.get("dp_size", 1))
    if ranks > 1:  # by default a rank takes a NUMA node, and more ranks than nodes are refused
        cores = sorted(os.sched_getaffinity(0))
        ours["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))
    return {**os.environ, **ours, **env}


@dataclass(frozen=True, slots=True)
class RunningEngine:
    """`sglang.Engine` in its worker process. start_seconds: until it could take a request."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    log: Path
    start_seconds: float

    def generate(
        self, requests: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any], *, seconds: float = ANSWER_SECONDS
    ) -> list[dict[str, Any]]:
        """SGLang's answers ("text", "output_ids", "meta_info"), all requests submitted at once.

        requests: keyword arguments of `Engine.async_generate` (prompt or input_ids, image_data, return_logprob, ...; a
        dictionary in image_data stands for SGLang's `ImageData`); a request's own sampling_params go before `sampling`.
        A refused request answers {"error": message}.
        Raises HostError if the engine dies or takes longer than `seconds`.
        """
        arguments = {"requests": [dict(request) for request in requests], "sampling": dict(sampling)}
        answers: list[dict[str, Any]] = self.call("generate", seconds=seconds, **arguments)
        return answers

    def call(self, method: str, *, seconds: float = ANSWER_SECONDS, **arguments: Any) -> Any:
        """What another method of `Engine` returns, as far as it can be pickled; {"error": message} if it raises."""
        self.pipe.send((method, arguments))
        return receive(self.process, self.pipe, self.log, seconds)

    def load_weights(self, folder: Path) -> None:
        """Reads the weights of another folder and empties the caches, which SGLang refuses until its last step has
        ended: that can be after the last answer. HostError if they are not taken."""
        deadline = time.monotonic() + PATIENCE
        while True:
            taken, message, _ = self.call("update_weights_from_disk", model_path=str(folder))
            if taken:
                return
            if UNSETTLED not in message or time.monotonic() > deadline:
                raise HostError(message)
            time.sleep(0.05)


@contextmanager
def sglang_engine(
    model: Path, *, env: Mapping[str, str] | None = None, start_seconds: float = START_SECONDS, **more: Any
) -> Iterator[RunningEngine]:
    """An offline engine serving the checkpoint in `model`; `more` are SGLang's arguments over `engine_options`."""
    options = engine_options(model_path=str(model), **more)
    ours, theirs = Pipe()
    command = [sys.executable, str(Path(__file__).with_name("sglang_worker.py")), str(theirs.fileno())]
    started = time.monotonic()
    with process_group(command, environment(options, env or {}), (theirs.fileno(),)) as (process, log):
        theirs.close()
        with ours:
            ours.send(options)
            receive(process, ours, log, start_seconds)
            yield RunningEngine(process, ours, log, time.monotonic() - started)
            with suppress(OSError, subprocess.TimeoutExpired):  # already dead, or does not want to end: killed below
                ours.send(None)
                process.wait(timeout=20)


@contextmanager
def sglang_server(
    model: Path,
    *,
    env: Mapping[str, str] | None = None,
    start_seconds: float = START_SECONDS,
    form: Literal["option", "positional", "module"] = "option",
    **more: Any,
) -> Iterator[RunningServer]:
    """SGLang's server, once it is healthy. form: `sglang serve --model-path MODEL`, `sglang serve MODEL` or
    `python -m sglang.launch_server --model-path MODEL`."""
    options = engine_options(host="127.0.0.1", **more)
    serve = [str(Path(sys.executable).with_name("sglang")), "serve"]
    launch = [sys.executable, "-m", "sglang.launch_server"]
    named = [str(model)] if form == "positional" else ["--model-path", str(model)]
    command = [*(launch if form == "module" else serve), *named, *flags(options)]
    session = process_group(command, environment(options, env or {}))
    with serving(session, options["port"], start_seconds) as server:
        yield server
