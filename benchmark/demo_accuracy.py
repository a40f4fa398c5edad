"""How well the demo model sees: `python benchmark/demo_accuracy.py [MODEL]`.

600 fresh questions, the same number of each kind and each about a picture of its own, and every word of the list
printed once; the seed is none that training used. Pictures and questions go through `siglane.LLM` as a user's would.
Prints a table, writes benchmark/results/demo_accuracy.json and exits with 1 below the bars.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import description

from siglane import LLM, SamplingParams
from siglane.settings.engine import Quantization

sys.path.append(str(Path(__file__).parents[1]))  # recipes/ is no part of the installed package

from recipes.demo.questions import QUESTION_KINDS, Question, ask
from recipes.demo.scenes import WORDS, Scene, draw, random_scene

BARS = {"all": 0.95, "printed words": 0.85}
RESULT = Path(__file__).parent / "results" / "demo_accuracy.json"


def fresh_questions(count: int, seed: int) -> list[tuple[Scene, Question]]:
    """`count` questions, kind after kind in turn."""
    rng = np.random.default_rng([seed, 0])
    found: list[tuple[Scene, Question]] = []
    while len(found) < count:
        scene = random_scene(rng)
        question = ask(QUESTION_KINDS[len(found) % len(QUESTION_KINDS)], scene, rng)
        if question is not None:
            found.append((scene, question))
    return found


def printed_words(seed: int) -> list[tuple[Scene, Question]]:
    rng = np.random.default_rng([seed, 1])
    scenes = [random_scene(rng, word) for word in WORDS]
    return [
        (scene, Question("printed words", "What does the sign say?", word))
        for scene, word in zip(scenes, WORDS, strict=True)
    ]


def measure(model: str, asked: Sequence[tuple[Scene, Question]], quantization: Quantization) -> list[str]:
    prompts = [{"prompt": question.text, "images": [draw(scene)]} for scene, question in asked]
    return [
        answer.text for answer in LLM(model, quantization=quantization).generate(prompts, SamplingParams(max_tokens=48))
    ]


def report(asked: Sequence[tuple[Scene, Question]], answers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """right, asked and share of each kind, of "all" but the printed words, and of those."""
    rows: dict[str, dict[str, Any]] = {}
    for (_, question), answer in zip(asked, answers, strict=True):
        for name in {question.kind, "printed words" if question.kind == "printed words" else "all"}:
            row = rows.setdefault(name, {"right": 0, "asked": 0})
            row["asked"] += 1
            row["right"] += answer == question.answer
    for row in rows.values():
        row["share"] = round(row["right"] / row["asked"], 4)
    return {name: rows[name] for name in (*QUESTION_KINDS, "all", "printed words")}


def main() -> int:
    parser = argparse.ArgumentParser(description="Accuracy of the demo model on fresh questions.")
    parser.add_argument("model", nargs="?", default="demo", help="folder or hub id (default: the shipped model)")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1000, help="training uses 1 and 2")
    parser.add_argument("--quantization", default="none", choices=["none", "8bit", "4bit"])
    parser.add_argument("--mistakes", action="store_true", help="print every wrong answer")
    options = parser.parse_args()
    asked = fresh_questions(options.count, options.seed) + printed_words(options.seed)
    begin = time.perf_counter()
    answers = measure(options.model, asked, options.quantization)
    seconds = time.perf_counter() - begin
    rows = report(asked, answers)
    for name, row in rows.items():
        bar = f"  bar {BARS[name]:.0%}" if name in BARS else ""
        print(f"{name:14} {row['right']:4} / {row['asked']:<4} {row['share']:7.1%}{bar}")
    for (_, question), answer in zip(asked, answers, strict=True):
        if options.mistakes and answer != question.answer:
            print(f"  {question.text}  {question.answer!r}, not {answer!r}")
    passed = all(rows[name]["share"] >= bar for name, bar in BARS.items())
    RESULT.parent.mkdir(exist_ok=True)
    command = f"benchmark/demo_accuracy.py {options.model} --count {options.count} --seed {options.seed}"
    command += f" --quantization {options.quantization}"
    result = {"command": command, "seconds": round(seconds, 1), "machine": description(), "bars": BARS, "shares": rows}
    RESULT.write_text(json.dumps(result | {"passed": passed}, indent=2) + "\n", encoding="utf-8")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
