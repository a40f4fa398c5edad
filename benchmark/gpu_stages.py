"""The stages of `gpu_report.py`, each for a process of its own. Prints lines of JSON: what was found, and goals.

    python benchmark/gpu_stages.py STAGE [--small]

--small: tiny shapes on the CPU. Floors are the card's own rates, measured by the stage that compares with them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from step import BASE

from siglane.config.language import LanguageConfig
from siglane.config.vision import VisionConfig
from siglane.config.vlm import VlmConfig
from siglane.engine.attention_cuda import PREFILLS, STEPS
from siglane.engine.batch import StepBatch
from siglane.engine.engine import Engine
from siglane.engine.kernel_trial import Shape, decoded, prefilled, stored
from siglane.engine.sampler import sample
from siglane.families.model import VisionLanguageModel
from siglane.nn.attention import runnable_backends, tried_backend
from siglane.nn.cpu.optimise import optimise
from siglane.nn.cuda.optimise import optimise_on_cuda
from siglane.nn.trial import fault
from siglane.settings.engine import EngineConfig
from siglane.types import Grid, PackedPatches, Prompt, Request, SamplingParams
from siglane.vision.tower import SiglipVisionModel

ROOT = Path(__file__).resolve().parents[1]
QWEN_1_5B = replace(
    BASE, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, head_dim=128
)
QWEN_7B = replace(
    BASE, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, head_dim=128, vocab_size=152_064, tie_embeddings=False,
)  # fmt: skip
TINY = replace(
    BASE, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=32, vocab_size=512
)
SO400M = VisionConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, num_channels=3,
    patch_size=14, position_grid=Grid(27, 27), hidden_act="gelu_tanh", layer_norm_eps=1e-6,
    patch_layout="channel_first", position_resize="never", rope_theta=None, depth=27, post_norm=True, use_head=False,
)  # fmt: skip


class Place(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    small: bool

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, call: Callable[[], object], repeats: int = 15) -> float:
        """Median, each with its wait; two before are not counted."""
        found = []
        for _ in range(repeats + 2):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            found.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(found[2:])

    def matmul_rate(self) -> float:
        """FLOP/s of a product of matrices."""
        side = 256 if self.small else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * side**3 / self.milliseconds(lambda: a @ b) * 1e3

    def copy_rate(self) -> float:
        """Bytes per second that are read or written."""
        source = torch.zeros(1 << (20 if self.small else 31), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.milliseconds(lambda: target.copy_(source)) * 1e3

    @contextmanager
    def defaults(self) -> Iterator[None]:
        """Of what is built: on the device at once, in its dtype."""
        torch.set_default_dtype(self.dtype)
        with self.device:
            yield
        torch.set_default_dtype(torch.float32)


def say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def goal(name: str, value: object, wanted: str, passed: bool) -> None:
    say(goal=name, value=value, wanted=wanted, passed=passed)


def share(name: str, found: float, floor: float, least: float, **facts: object) -> None:
    """A time in ms beside the least that the card's rates allow."""
    reached = round(100 * floor / found, 1)
    say(what=name, ms=round(found, 3), floor_ms=round(floor, 3), percent_of_floor=reached, **facts)
    if least:
        goal(name, f"{reached} % of its floor", f"at least {least:g} %", reached >= least)


def machine(place: Place) -> None:
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    try:
        versions["triton"] = version("triton")
    except PackageNotFoundError:
        versions["triton"] = None
    if place.device.type == "cuda":
        facts = torch.cuda.get_device_properties(place.device)
        versions |= {"gpu": facts.name, "bytes": facts.total_memory, "capability": f"{facts.major}.{facts.minor}"}
    say(**versions, tflops=round(place.matmul_rate() / 1e12, 2), gbytes_per_second=round(place.copy_rate() / 1e9, 1))


def kernels(place: Place) -> None:
    """Every candidate over every shape: what is wrong with it, null for nothing."""
    dtypes = (torch.float32,) if place.small else (torch.bfloat16, torch.float16)
    broken = []
    for dtype in dtypes:
        for head_dim in (32, 64, 72, 128):
            for group in (1, 6, 7):
                language = replace(BASE, num_attention_heads=2 * group, num_key_value_heads=2, head_dim=head_dim)
                shape = Shape(language, 2 * group, 2, 16, dtype, place.device)
                for part, candidates, trial in (
                    ("store", STEPS, stored), ("decode", STEPS, decoded), ("prefill", PREFILLS, prefilled),
                ):  # fmt: skip
                    run, expected = trial(shape)
                    faults = {name: fault(partial(run, made), expected) for name, made in candidates.items()}
                    taken = next((name for name, reason in faults.items() if reason is None), None)
                    say(kernel=part, shape=str(shape), faults=faults, taken=taken)
                    first = next(iter(faults))
                    broken += [f"{part}, {shape}: {faults[first]}"] if faults[first] else []
            backends = runnable_backends("auto", place.device, dtype)
            backend = tried_backend(backends, place.device, dtype, 16, head_dim)
            say(kernel="tower", head_dim=head_dim, dtype=str(dtype), taken=backend)
            broken += [] if backend == backends[0] else [f"tower, {head_dim}: {backends[0]}"]
    if not place.small:  # on a CPU none of them runs
        goal("kernels that are meant are right", broken[:3] or "all", "all", not broken)


def tests(place: Place) -> None:
    files = ["tests/gpu", "tests/unit/test_triton_kernels.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (ended.stdout.strip().splitlines() or [""])[-1]
    goal("tests of a GPU", last, "pass", ended.returncode in ((0, 5) if place.small else (0,)))


@torch.no_grad()
def random_model(language: LanguageConfig, place: Place) -> VisionLanguageModel:
    config = VlmConfig(
        family="causal_lm", images=None, language=language, image_token="", image_token_id=-1, eos_token_ids=(),
        thinking=None, sampling={},
    )  # fmt: skip
    torch.manual_seed(0)
    with place.defaults():
        model = VisionLanguageModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def tuned(model: VisionLanguageModel) -> VisionLanguageModel:
    optimise(model)
    optimise_on_cuda(model.language)
    return model


def engine_of(model: VisionLanguageModel, rows: int, length: int, paged_backend: str = "auto") -> Engine:
    device = str(model.language.norm.weight.device)
    config = EngineConfig(device=device, kv_tokens=rows * (length + 64), max_running=rows, paged_backend=paged_backend)
    return Engine(model, config, ())


def request(number: int, length: int, answer: int, vocabulary: int, temperature: float = 0.0) -> Request:
    prompt = Prompt(tuple((7 * place + 13 * number) % vocabulary for place in range(length)))
    return Request(str(number), prompt, SamplingParams(ignore_eos=True, temperature=temperature, seed=number), answer)


def answers_of(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    for one in requests:
        engine.add(one)
    found: dict[str, list[int]] = {one.request_id: [] for one in requests}
    while engine.has_work:
        for delta in engine.step():
            if delta.token_id is not None:
                found[delta.request_id].append(delta.token_id)
            if delta.finished is not None and delta.finished.reason == "error":
                raise RuntimeError(f"request {delta.request_id} ended with an error: {delta.finished}")
    return found


def answers(place: Place) -> None:
    """A tiny model of random weights: on the CPU, in graphs and without, alone and beside others, with few pages."""
    wide = place._replace(dtype=torch.float32)
    cpu, here = random_model(TINY, Place(torch.device("cpu"), torch.float32, True)), random_model(TINY, wide)
    here.load_state_dict(cpu.state_dict())
    many = [request(number, 20 + 9 * number, 24, TINY.vocab_size) for number in range(6)]
    expected = answers_of(engine_of(tuned(cpu), 8, 128), many)
    found = answers_of(engine_of(tuned(here), 8, 128), many)
    equal = sum(found[one] == expected[one] for one in found)
    goal("greedy answers in float32 are the CPU's", equal, "6", found == expected)
    half = tuned(random_model(TINY, place))
    recorded, plain = engine_of(half, 8, 128), engine_of(half, 8, 128)
    plain.runner.buckets = ()
    say(what="captured", buckets=list(recorded.runner.buckets))
    found, expected = (answers_of(one, many) for one in (recorded, plain))
    goal("answers of graphs are those of the same kernels without", found == expected, "true", found == expected)
    hot = [request(number, 20, 24, TINY.vocab_size, temperature=1.0) for number in range(4)]
    together = answers_of(recorded, hot)
    alone = {one.request_id: answers_of(recorded, [one])[one.request_id] for one in hot}
    say(what="seeds alone and beside others", equal=sum(alone[one] == together[one] for one in alone), of=len(alone))
    found = answers_of(engine_of(half, 2, 32), many)  # pages for two of the six: the others are put off and begin anew
    say(what="answers after preemption", equal=sum(found[one] == expected[one] for one in found), of=len(found))
    lengths = sorted({len(one) for one in (*found.values(), *together.values())})
    goal("tokens of every answer", lengths, "[24]", lengths == [24])


@torch.inference_mode()
def tower(place: Place) -> None:
    config = (
        replace(SO400M, depth=1, hidden_size=144, intermediate_size=96, num_attention_heads=2)
        if place.small
        else SO400M
    )
    with place.defaults():
        model = SiglipVisionModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    rate, wide = place.matmul_rate(), config.hidden_size
    for count, least in ({1: 0, 2: 0} if place.small else {1: 30, 2: 0, 8: 50, 64: 0}).items():
        grids = (config.position_grid,) * count
        patches = sum(grid.area for grid in grids)
        pixels = torch.randn(patches, config.patch_dim, device=place.device, dtype=place.dtype)
        packed = PackedPatches(pixels, grids)
        block = 4 * wide**2 + 2 * wide * config.intermediate_size
        flops = 2 * patches * (config.patch_dim * wide + config.depth * block)
        flops += 4 * wide * config.depth * sum(grid.area**2 for grid in grids)
        share(f"tower, {count} images", place.milliseconds(partial(model, packed)), 1e3 * flops / rate, least)


def decode(place: Place) -> None:
    """Steps that only decode, behind prompts of 2,048 tokens; all of its weights and keys are read once."""
    shapes = {"tiny": (TINY, {1: 0, 8: 0})} if place.small else {
        "1.5B": (QWEN_1_5B, {1: 50, 8: 0, 64: 50}), "7B": (QWEN_7B, {1: 65, 8: 0, 64: 65}),
    }  # fmt: skip
    context, rate = (64 if place.small else 2048), place.copy_rate()
    for name, (language, goals) in shapes.items():
        model = tuned(random_model(language, place))
        read = sum(parameter.nbytes for parameter in model.parameters())
        if not language.tie_embeddings:
            read -= model.language.get_parameter("embed_tokens.weight").nbytes
        for rows, least in goals.items():
            engine = engine_of(model, rows, context + 256)
            for number in range(rows):
                engine.add(request(number, context, 200, language.vocab_size))
            while any(one.answered == 0 for one in (*engine.scheduler.running, *engine.scheduler.waiting)):
                engine.step()
            plan = engine.runner.plan(StepBatch(tuple(engine.scheduler.plan().chunks)))
            begin = time.perf_counter()
            engine.runner.plan(StepBatch(plan.batch))
            host = 1e3 * (time.perf_counter() - begin)
            run = torch.inference_mode()(partial(engine.runner.forward, plan))
            floor = 1e3 * (read + rows * context * engine.runner.kv.bytes_per_token) / rate
            share(f"decode {name}, {rows} rows", place.milliseconds(run), floor, least, plan_ms=round(host, 3))
            found = place.milliseconds(engine.step)
            say(what=f"whole step {name}, {rows} rows", ms=round(found, 3), tokens_per_second=round(1e3 * rows / found))
            if rows == max(goals):
                sampler(place, engine, run().logits)
            del engine


def sampler(place: Place, engine: Engine, logits: torch.Tensor) -> None:
    chunks = engine.scheduler.plan().chunks
    rows = [token for chunk in chunks for token in chunk.next_tokens]
    found = place.milliseconds(torch.inference_mode()(lambda: sample(logits, rows, frozenset())))
    if place.small:
        say(what="sampler", ms=round(found, 3))
    else:
        goal(f"sampler of {len(rows)} greedy rows", f"{found:.2f} ms", "at most 0.5 ms", found <= 0.5)


def engine(place: Place) -> None:
    """Requests of as many tokens as a picture and a question have, all at once."""
    language, count, length, answer = (TINY, 8, 64, 16) if place.small else (QWEN_1_5B, 64, 985, 128)
    served = engine_of(tuned(random_model(language, place)), count, length + answer)
    answers_of(served, [request(count, length, 4, language.vocab_size)])
    begin, first, steps = time.perf_counter(), dict[str, float](), 0
    for number in range(count):
        served.add(request(number, length, answer, language.vocab_size))
    while served.has_work:
        steps += 1
        for delta in served.step():
            first.setdefault(delta.request_id, time.perf_counter() - begin)
    seconds, waits = time.perf_counter() - begin, sorted(first.values())
    peak = torch.cuda.max_memory_allocated() if place.device.type == "cuda" else None
    say(
        what="engine", tokens_per_second=round(count * answer / seconds), steps=steps, peak_bytes=peak,
        first_token_p50=round(waits[len(waits) // 2], 3), first_token_p99=round(waits[int(0.99 * len(waits))], 3),
    )  # fmt: skip
    goal("every request got its first token", len(first), f"{count}", len(first) == count)


STAGES = {one.__name__: one for one in (machine, kernels, tests, answers, tower, decode, engine)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    small = Place(torch.device("cpu"), torch.float32, True)
    STAGES[arguments.stage](small if arguments.small else Place(torch.device("cuda", 0), torch.bfloat16, False))


if __name__ == "__main__":
    main()
