"""What it costs on a CPU to choose the next tokens of a full step: 64 rows of a vocabulary of 151,936.

    python benchmark/sampler.py [--rows 64] [--vocabulary 151936] [--threads N] [--out FILE]

Every kind of request over logits that are nearly flat (normal, standard deviation 1) and over peaked ones (8). Medians
of wall milliseconds of a whole step, from logits to tokens. Exits with 1 when rows at temperature 1 take more than 80.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from machine import description

from siglane.engine.batch import NextToken, Sequence
from siglane.engine.sampling.sampler import sample
from siglane.types import Prompt, Request, SamplingParams

MOST_MS = 80.0  # of rows at temperature 1
SHAPES = {"flat": 1.0, "peaked": 8.0}
GREEDY, HOT = SamplingParams(), SamplingParams(temperature=1.0)
TOP_P, TOP_K = SamplingParams(temperature=1.0, top_p=0.9), SamplingParams(temperature=1.0, top_k=50)
KINDS = {
    "greedy": (GREEDY,),
    "temperature 1": (HOT,),
    "top_p 0.9": (TOP_P,),
    "top_k 50": (TOP_K,),
    "both": (SamplingParams(temperature=1.0, top_p=0.9, top_k=50),),
    "min_p 0.05": (SamplingParams(temperature=1.0, min_p=0.05),),
    "a mixture": (GREEDY, HOT, TOP_P, TOP_K),
    "penalties": (SamplingParams(temperature=1.0, repetition_penalty=1.1, presence_penalty=0.5),),
    "log-probabilities": (SamplingParams(temperature=1.0, logprobs=5),),
}


def next_tokens(kinds: tuple[SamplingParams, ...], rows: int) -> list[NextToken]:
    prompt = Prompt(tuple(range(1000)))
    requests = (Request(str(row), prompt, kinds[row % len(kinds)], 9) for row in range(rows))
    return [Sequence.of(request, row, seed=row).next_token() for row, request in enumerate(requests)]


def milliseconds(logits: torch.Tensor, steps: list[NextToken], repeats: int) -> list[float]:
    sample(logits, steps, frozenset())
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        sample(logits, steps, frozenset())
        found.append(round(1e3 * (time.perf_counter() - begin), 2))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    samples, missed = dict[str, dict[str, list[float]]](), False
    for shape, deviation in SHAPES.items():
        noise = torch.randn(options.rows, options.vocabulary, generator=torch.Generator().manual_seed(0))
        logits, samples[shape] = noise * deviation, {}
        for name, kinds in KINDS.items():
            own = samples[shape][name] = milliseconds(logits, next_tokens(kinds, options.rows), options.repeats)
            median, held = statistics.median(own), name != "temperature 1" or statistics.median(own) <= MOST_MS
            print(f"{'PASS' if held else 'FAIL'}  {shape:7} {name:18} {median:8.1f} ms", flush=True)
            missed |= not held
    if options.out is not None:
        facts = {"command": sys.argv, "machine": description(), "seed": 0, "samples_ms": samples}
        options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
