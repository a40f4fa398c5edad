"""What ten questions about one picture cost beside one: `LLM.decide`, whose prompts share the picture and its prefill.

    python benchmark/decide.py [--repeats 7] [--threads 0] [--out benchmark/results/decide.json]

SigLIP-base at 384 pixels and a Qwen2 of hidden 512 (`serving_model.py`, random weights). One and ten yes-or-no
questions in turn, each time about a picture that was never seen; beside them ten calls of one question each about one
picture. Exits with 1 when ten questions cost more than 1.6 times one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import description
from PIL import Image
from serving_model import write_checkpoint

from siglane import LLM, Question

BAR = 1.6
THINGS = ("a cat", "a dog", "a boat", "a tree", "a red car", "snow", "a child", "a window", "bread", "a bicycle")
QUESTIONS = [Question.yes_no(f"The picture shows {thing}.") for thing in THINGS]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (384, 384, 3), dtype=np.uint8))


def seconds(llm: LLM, seed: int, *calls: list[Question]) -> float:
    """Of several calls about one new picture."""
    about: dict[str, Any] = {"prompt": "A photograph.", "images": [picture(seed)]}
    begin = time.perf_counter()
    for questions in calls:
        assert all(0 < decision.mass <= 1 for decision in llm.decide(about, questions))
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decide.json")
    given = parser.parse_args()
    ways = {
        "one question": (QUESTIONS[:1],),
        "ten questions": (QUESTIONS,),
        "ten, one by one": tuple([question] for question in QUESTIONS),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        llm = LLM(folder, device="cpu", kv_tokens=16384, threads=given.threads)
        for name, calls in ways.items():  # not counted: what only a first call would find missing
            seconds(llm, len(name), *calls)
        for repeat in range(given.repeats):
            for number, (name, calls) in enumerate(ways.items()):
                found[name].append(seconds(llm, 100 + 10 * repeat + number, *calls))
    medians = {name: statistics.median(samples) for name, samples in found.items()}
    times = statistics.median(ten / one for one, ten in zip(found["one question"], found["ten questions"], strict=True))
    for name, median in medians.items():
        print(f"{name:16} {median:.3f} s")
    print(f"ten questions cost {times:.2f} times one; the bar is {BAR}")
    result = {"command": sys.argv, "machine": description(), "bar": BAR, "times": times, "samples": found}
    given.out.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if times <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
