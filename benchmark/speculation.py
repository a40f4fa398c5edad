"""What guessing ahead (`num_speculative_tokens`) is worth: answers that repeat a document, and traffic that does not.

    python benchmark/speculation.py [--tokens 8] [--quantization none] [--repeats 3] [--threads 1]

SmolLM2-135M (`decode_models.py`), greedy, one engine, with and without in turn: one request that repeats its document,
one that tells a story, and eight of both kinds and sampled ones at once. Prints seconds, CPU seconds and steps of each,
how many guesses were right, and whether all answers are the same with and without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from decode_models import write_smollm2
from machine import description

from siglane.engine.engine import Engine
from siglane.engine.process.load import build_engine
from siglane.families.processor import load_processor
from siglane.settings.engine import EngineConfig
from siglane.types import Message, Request, SamplingParams
from siglane.weights.hub import open_checkpoint

DOCUMENT = """The harbour office opens at eight o'clock. Ships that arrive before seven wait at the north pier until a
pilot is free. Every captain signs the book of arrivals and states the cargo, the port of origin and the number of crew.
Fees are paid in the hall on the first floor; a receipt is needed to leave. Fishing boats under twelve metres pay half.
After a storm the office stays closed until the lights of both piers have been checked."""
REPEAT = f"Repeat this text word for word:\n\n{DOCUMENT}"
STORIES = tuple(f"Tell a short story about {what}." for what in ("a river", "a clock", "two foxes", "a lost letter"))
ANSWER = 96


@dataclass(frozen=True)
class Traffic:
    """questions: of the requests at once; temperatures: in turn."""

    name: str
    questions: tuple[str, ...]
    temperatures: tuple[float, ...] = (0.0,)


TRAFFIC = (
    Traffic("repeats a document", (REPEAT,)),
    Traffic("tells a story", STORIES[:1]),
    Traffic("tells a story, sampled", STORIES[:1], (1.0,)),
    Traffic("eight mixed", (REPEAT, *STORIES[:3], REPEAT, *STORIES[1:]), (0.0, 0.0, 1.0)),
)


def ask(engine: Engine, requests: list[Request]) -> dict[str, Any]:
    """Seconds, CPU seconds, steps, guesses, and the answers."""
    for request in requests:
        engine.add(request)
    answers: dict[str, list[int]] = {request.request_id: [] for request in requests}
    right = wrong = 0
    steps, begin, cpu = engine.stats().steps, time.perf_counter(), time.process_time()
    while engine.has_work:
        for delta in engine.step():
            answers[delta.request_id] += [] if delta.token_id is None else [delta.token_id]
            if delta.finished is not None:
                right += delta.finished.accepted_prediction_tokens
                wrong += delta.finished.rejected_prediction_tokens
    return {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "steps": engine.stats().steps - steps,
        "accepted": right,
        "rejected": wrong,
        "answers": answers,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8, help="num_speculative_tokens")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("runs") / "decode")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "speculation.json")
    options = parser.parse_args()
    folder = options.cache / "SmolLM2-135M"
    if not folder.exists():
        options.cache.mkdir(parents=True, exist_ok=True)
        write_smollm2(folder)
    checkpoint = open_checkpoint(str(folder))
    processor = load_processor(checkpoint)
    config = EngineConfig(
        device="cpu", quantization=options.quantization, threads=options.threads, kv_tokens=8192, prefix_cache=False
    )
    engine = build_engine(checkpoint, processor.config, processor.tokenizer, config)

    def request(number: int, traffic: Traffic, guessed: int) -> Request:
        prompt = processor.prompt([Message("user", (traffic.questions[number],))], [])
        temperature = traffic.temperatures[number % len(traffic.temperatures)]
        params = SamplingParams(temperature=temperature, seed=number, ignore_eos=True, num_speculative_tokens=guessed)
        return Request(str(number), prompt, replace(params, max_tokens=ANSWER), ANSWER)

    report: dict[str, Any] = {
        "command": "python benchmark/speculation.py " + " ".join(sys.argv[1:]),
        "machine": description(),
        "traffic": {},
    }
    for traffic in TRAFFIC:
        rows: dict[int, list[dict[str, Any]]] = {0: [], options.tokens: []}
        for repeat in range(options.repeats):
            for guessed in list(rows)[:: 1 if repeat % 2 else -1]:
                requests = [request(number, traffic, guessed) for number in range(len(traffic.questions))]
                rows[guessed].append(ask(engine, requests))
        report["traffic"][traffic.name] = compared(rows[0], rows[options.tokens])
        print(f"{traffic.name:24} {json.dumps(report['traffic'][traffic.name])}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")


def compared(without: list[dict[str, Any]], guessing: list[dict[str, Any]]) -> dict[str, Any]:
    def pace(key: str) -> float:
        return round(statistics.median(one[key] / other[key] for one, other in zip(without, guessing, strict=True)), 2)

    equal = [without[0]["answers"][name] == found for run in guessing for name, found in run["answers"].items()]
    return {
        "times_faster": pace("seconds"),
        "times_faster_per_cpu_second": pace("cpu_seconds"),
        "steps": [without[0]["steps"], guessing[0]["steps"]],
        "accepted": guessing[0]["accepted"],
        "rejected": guessing[0]["rejected"],
        "equal_answers": f"{sum(equal)} of {len(equal)}",
    }


if __name__ == "__main__":
    main()
