"""The two sides of `decode.py`, each in a process of its own that does as it is told: siglane's engine, llama.cpp's.

    python benchmark/decode_contenders.py '{"engine": "siglane", "path": FOLDER, "scheme": "8bit", ...}'

Reads a line of JSON a command and answers with one. Both sides are driven the same way and timed from outside: token
ids in, greedy token ids out, prompts kept in the engine's own cache.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Setup:
    """engine: siglane or llama.cpp; path: a folder or a GGUF file; scheme: siglane's `quantization`, llama.cpp's is
    the file's; slots: answers at the same time, of at most `context` tokens each; vocab: ids of prompts are below it.
    """

    engine: str
    path: str
    scheme: str
    threads: int
    slots: int
    context: int
    vocab: int

    @property
    def name(self) -> str:
        words = {"none": "float32", "8bit": "8 bit", "4bit": "4 bit"}
        return f"{self.engine} {words.get(self.scheme, self.scheme)}"


class Side(Protocol):
    """prompts and answers are token ids; every answer has exactly `tokens`."""

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]: ...


class Siglane:
    def __init__(self, setup: Setup) -> None:
        from siglane.engine.process.load import load_engine
        from siglane.settings.engine import EngineConfig

        config = EngineConfig(
            device="cpu",
            quantization=setup.scheme,  # type: ignore[arg-type]
            threads=setup.threads,
            kv_tokens=setup.slots * setup.context,
        )
        self.engine = load_engine(setup.path, config)

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        from siglane.types import Prompt, Request, SamplingParams

        params = SamplingParams(max_tokens=tokens, ignore_eos=True)
        answers: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        for name, ids in zip(answers, prompts, strict=True):
            self.engine.add(Request(name, Prompt(tuple(ids), (), (), ()), params, tokens))
        while self.engine.has_work:
            for delta in self.engine.step():
                if delta.finished is not None and delta.finished.error is not None:
                    raise delta.finished.error
                if delta.token_id is not None:
                    answers[delta.request_id].append(delta.token_id)
        return list(answers.values())


class LlamaCpp:
    def __init__(self, setup: Setup) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = setup.path
        params.n_parallel, params.n_ctx = setup.slots, setup.slots * setup.context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setup.threads
        params.cache_ram_mib = 0  # no copies of what slots held before
        params.verbosity = 0
        self.server = xllamacpp.Server(params)
        self.clients = ThreadPoolExecutor(setup.slots)

    def generate(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        def ask(slot: int) -> list[int]:
            body = {
                "prompt": prompts[slot],
                "id_slot": slot,
                "n_predict": tokens,
                "ignore_eos": True,
                "temperature": 0,
                "samplers": ["temperature"],
                "cache_prompt": True,
                "return_tokens": True,
                "verbose": True,
            }
            answer = self.server.handle_completions(body)
            if "error" in answer:
                raise RuntimeError(answer["error"])
            found: list[int] = answer["__verbose"]["tokens"]
            return found

        return list(self.clients.map(ask, range(len(prompts))))


class Worker:
    """What a process is told to do, by name."""

    def __init__(self, setup: Setup) -> None:
        importlib.import_module({"siglane": "siglane.engine.process.load", "llama.cpp": "xllamacpp"}[setup.engine])
        self.setup, before = setup, status("VmRSS")
        begin = time.perf_counter()
        self.side: Side = {"siglane": Siglane, "llama.cpp": LlamaCpp}[setup.engine](setup)
        self.load = {
            "load_seconds": time.perf_counter() - begin,
            "peak_bytes": status("VmHWM") - before,
            "resident_bytes": status("VmRSS") - before,
        }

    def loaded(self) -> dict[str, float]:
        return self.load

    def decode(self, batch: int, prompt: int, tokens: int) -> dict[str, float]:
        """Of one step: seconds, and CPU seconds of the whole process. The difference of two runs whose prompts are
        known leaves the steps between alone."""
        prompts = [self.random_ids(prompt, slot) for slot in range(batch)]
        self.side.generate(prompts, 1)
        short, long = self.timed(prompts, 1), self.timed(prompts, 1 + tokens)
        return {key: (long[key] - short[key]) / tokens for key in long}

    def prefill(self, prompt: int, seed: int) -> dict[str, float]:
        """Of one prompt that is new for every seed, and one token."""
        return self.timed([self.random_ids(prompt, 1000 + seed)], 1)

    def answer(self, prompt: list[int], tokens: int) -> list[int]:
        return self.side.generate([prompt], tokens)[0]

    def timed(self, prompts: list[list[int]], tokens: int) -> dict[str, float]:
        begin, cpu = time.perf_counter(), time.process_time()
        answers = self.side.generate(prompts, tokens)
        seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
        if any(len(answer) != tokens for answer in answers):
            raise RuntimeError(f"{self.setup.name} gave {[len(answer) for answer in answers]} tokens, not {tokens}")
        return seconds

    def random_ids(self, count: int, seed: int) -> list[int]:
        ids: list[int] = np.random.default_rng(seed).integers(0, self.setup.vocab, count).tolist()
        return ids


class Contender:
    """A worker's process, seen from the benchmark's."""

    def __init__(self, setup: Setup) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(setup.threads)}
        self.name = setup.name
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(setup))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def ask(self, command: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):  # whatever else a library prints
                said = json.loads(line)
                if "refused" in said:
                    raise Refused(f"{self.name}: {said['refused']}")
                return said["answer"]
        raise SystemExit(f"{self.name} ended with {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


class Refused(Exception):
    """Bits that this side does not have here."""


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def work(setup: Setup) -> None:
    from siglane.errors import UserError

    try:
        worker = Worker(setup)
    except UserError as error:
        if error.code != "unsupported_quantization":
            raise
        print(json.dumps({"refused": str(error)}), flush=True)
        return
    print(json.dumps({"answer": worker.loaded()}), flush=True)
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        print(json.dumps({"answer": getattr(worker, command)(*arguments)}), flush=True)


if __name__ == "__main__":
    work(Setup(**json.loads(sys.argv[1])))
