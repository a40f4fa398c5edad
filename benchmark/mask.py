"""What it costs a decoding step to hold its answers to a grammar.

    python benchmark/mask.py [--shape qwen2.5-0.5b] [--quantization 8bit] [--batch 8] [--threads 1]

A model of that shape with random weights and a vocabulary of its size answers so many requests at a time: free ones,
ones held to a JSON schema, ones beside strict tools whose text is free, and ones that have to call a tool. Their steps
are timed in turn. Medians of CPU milliseconds, or wall with --wall. Exits with 1 when a step that is held to something
takes more than 1.10 times a free one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from machine import description
from serving_model import tokenizer
from step import SHAPES, random_model

from siglane.engine.constraints.constraint import Grammars, check_constraint
from siglane.engine.constraints.tool_grammar import tool_constraint
from siglane.engine.engine import Engine
from siglane.families.model import VisionLanguageModel
from siglane.families.prompt.call_format import HERMES
from siglane.settings.engine import EngineConfig
from siglane.types import Constraint, Prompt, Request, SamplingParams, Tool, ToolUse

MOST = 1.10  # times a free step
SEEN = {
    "type": "object",
    "properties": {
        "label": {"type": "string"},
        "colour": {"enum": ["red", "green", "blue"]},
        "box": {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4},
        "certain": {"type": "boolean"},
    },
    "required": ["label", "colour", "box", "certain"],
    "additionalProperties": False,
}
MANY = {"type": "array", "items": SEEN, "minItems": 100}  # no answer ends meanwhile
LOOK = Tool("look", "looks at many places", {"type": "object", "properties": {"at": MANY}, "required": ["at"]}, True)


def constraints() -> dict[str, Constraint | None]:
    held = {
        "schema": Constraint.json_schema(MANY),
        "strict tools": tool_constraint(ToolUse((LOOK,), (LOOK,)), HERMES),
        "a call": tool_constraint(ToolUse((LOOK,), (LOOK,), required=True), HERMES),
    }
    for constraint in held.values():
        assert constraint is not None
        check_constraint(constraint)
    return {"free": None, **held}


def answering(
    model: VisionLanguageModel, grammars: Grammars, constraint: Constraint | None, options: argparse.Namespace
) -> Engine:
    """An engine whose every step decodes a token of each request."""
    length, batch = options.context + options.steps + 64, options.batch
    config = EngineConfig(device="cpu", kv_tokens=batch * (length + 64), max_running=batch)
    engine, vocabulary = Engine(model, config, (), None, grammars), model.language.config.vocab_size
    sampling = SamplingParams(ignore_eos=True, temperature=options.temperature, constraint=constraint)
    for number in range(batch):
        prompt = Prompt(tuple((7 * place + number) % vocabulary for place in range(options.context)), (), (), ())
        engine.add(Request(str(number), prompt, replace(sampling, seed=number), options.steps + 32))
    while any(one.answered < 8 for one in (*engine.scheduler.running, *engine.scheduler.waiting)):
        engine.step()
    return engine


@torch.inference_mode()
def measure(engines: dict[str, Engine], clock: Callable[[], float], steps: int) -> dict[str, dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(steps):
        for name, engine in engines.items():
            begin = clock()
            engine.step()
            seconds[name].append(clock() - begin)
    free = seconds["free"]
    return {
        name: {
            "milliseconds": round(1e3 * statistics.median(took), 2),
            "of_free": round(statistics.median(one / other for one, other in zip(took, free, strict=True)), 3),
        }
        for name, took in seconds.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--quantization", choices=("none", "8bit", "4bit"), default="8bit")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--wall", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = random_model(SHAPES[options.shape], options.quantization)
    vocabulary = model.language.config.vocab_size
    grammars = Grammars(tokenizer(vocabulary), vocabulary, (vocabulary - 2,))
    grammars.warm_up()
    print(json.dumps({**description(), **vars(options)}))
    engines = {name: answering(model, grammars, one, options) for name, one in constraints().items()}
    found: dict[str, Any] = measure(engines, time.perf_counter if options.wall else time.process_time, options.steps)
    for name, figures in found.items():
        held = name == "free" or figures["of_free"] <= MOST
        print(f"{'PASS' if held else 'FAIL'}  {name:12} {figures['milliseconds']:8.2f} ms  {figures['of_free']:.3f}")
    return 0 if all(figures["of_free"] <= MOST for figures in found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
