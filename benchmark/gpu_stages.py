"""The stages of `gpu_report.py`, each for a process of its own. Prints lines of JSON: what was found, and goals.

    python benchmark/gpu_stages.py STAGE [--small]

--small: tiny shapes on the CPU. Floors are the card's own rates, measured by the stage that compares with them.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from gpu_answers import answers, engine
from gpu_models import QWEN_1_5B, QWEN_7B, SO400M, TINY, TINY_TOWER, engine_of, random_model, request, tuned
from gpu_place import Place, goal, part, say, share
from step import BASE

from siglane.config.language import LanguageConfig
from siglane.engine.attention.by_rows import PREFILLS_ALIKE
from siglane.engine.attention.cuda import PREFILLS, STEPS
from siglane.engine.attention.trial import Shape, decoded, prefilled, stored
from siglane.engine.batch import NextToken, StepBatch
from siglane.engine.constraints.constraint import Constrained, Words, mask_words
from siglane.engine.engine import Engine
from siglane.engine.sampling.cuda import DeviceSampler, best_in_torch, keep_in_torch, tried_choices
from siglane.nn.act import SwiGLU
from siglane.nn.attention import runnable_backends, tried_backend
from siglane.nn.cuda.fp8 import CAPABILITY, Fp8Linear, fp8_layers
from siglane.nn.cuda.invariant import try_fixed_product
from siglane.nn.cuda.low_bits import low_bit_linear, product_in_torch
from siglane.nn.cuda.optimise import KERNELS, use_kernels
from siglane.nn.experts import Mixing, Routing
from siglane.nn.norm import InputRMSNorm, RMSNorm
from siglane.nn.quantise import quantise
from siglane.nn.rope import NormedRotation, Rotation
from siglane.nn.trial import fault
from siglane.types import Grid, PackedPatches, SamplingParams
from siglane.vision.tower import SiglipVisionModel

ROOT = Path(__file__).resolve().parents[1]
SAMPLED = {
    "greedy": SamplingParams(),
    "hot": SamplingParams(temperature=1.0),
    "top-p": SamplingParams(temperature=1.0, top_p=0.9),
    "under a grammar": SamplingParams(),
}


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
    broken = list[str]()
    for dtype in dtypes:
        for head_dim in (32, 64, 72, 128):
            for group in (1, 6, 7):
                language = replace(BASE, num_attention_heads=2 * group, num_key_value_heads=2, head_dim=head_dim)
                with part(f"attention, {group} heads of {head_dim} in {dtype}"):
                    broken += attention(Shape(language, 2 * group, 2, 16, dtype, place.device))
            with part(f"tower, heads of {head_dim} in {dtype}"):
                backends = runnable_backends("auto", place.device, dtype)
                backend = tried_backend(backends, place.device, dtype, 16, head_dim)
                say(kernel="tower", head_dim=head_dim, dtype=str(dtype), taken=backend)
                broken += [] if backend == backends[0] else [f"tower, {head_dim}: {backends[0]}"]
        with part(f"small operations in {dtype}"):
            broken += small_operations(place._replace(dtype=dtype))
        if not place.small:
            with part(f"products of batch_invariant in {dtype}"):
                try_fixed_product(dtype, place.device)
        if has_fp8(place):
            with part(f"products of 8-bit floats in {dtype}"):
                broken += fp8_products(place._replace(dtype=dtype))
        for bits in (8, 4):
            with part(f"{bits} bits in {dtype}"):
                quick = low_bit_linear(bits, place.device, dtype).args[1] is not product_in_torch
                name = f"products with weights of {bits} bits"
                say(kernel=name, dtype=str(dtype), taken="Triton" if quick else "torch")
                broken += [] if quick else [f"{name} in {dtype}"]
    with part("choices"):
        taken = tried_choices(place.device, BASE.vocab_size)
        for name, quick in (
            ("noise over a vocabulary", taken.best is not best_in_torch),
            ("masks of grammars", taken.keep is not keep_in_torch),
        ):
            say(kernel=name, taken="Triton" if quick else "torch")
            broken += [] if quick else [name]
    if not place.small:  # on a CPU none of them runs
        goal("kernels that are meant are right", broken[:3] or "all", "all", not broken)


def attention(shape: Shape) -> list[str]:
    """What the first candidate of each part does wrong."""
    broken = []
    for name, candidates, trial in (
        ("store", STEPS, stored), ("decode", STEPS, decoded), ("prefill", PREFILLS, prefilled),
        ("prefill of batch_invariant", PREFILLS_ALIKE, prefilled),
    ):  # fmt: skip
        run, expected = trial(shape)
        faults = {kernel: fault(partial(run, made), expected) for kernel, made in candidates.items()}
        taken = next((kernel for kernel, reason in faults.items() if reason is None), None)
        say(kernel=name, shape=str(shape), faults=faults, taken=taken)
        first = next(iter(faults))
        broken += [f"{name}, {shape}: {faults[first]}"] if faults[first] else []
    return broken


def has_fp8(place: Place) -> bool:
    return not place.small and torch.cuda.get_device_capability(place.device) >= CAPABILITY


def fp8_products(place: Place) -> list[str]:
    """Shapes of so400m whose layers stay in floats, because products are wrong or no faster; the log says which."""
    make, wide, inner = fp8_layers(place.device), SO400M.hidden_size, SO400M.intermediate_size
    left = []
    for shape in ((3 * wide, wide), (wide, wide), (inner, wide), (wide, inner)):
        weight = torch.randn(shape, device=place.device, dtype=place.dtype) * shape[1] ** -0.5
        taken = isinstance(make(weight, None), Fp8Linear)
        say(kernel="products of 8-bit floats", weight=shape, dtype=str(place.dtype), taken="fp8" if taken else "floats")
        left += [] if taken else [f"products of 8-bit floats with {list(shape)} in {place.dtype}"]
    return left


@torch.no_grad()
def small_operations(place: Place) -> list[str]:
    """Kinds of modules whose kernel was not taken."""
    kinds = (
        RMSNorm(1536, 1e-6),
        InputRMSNorm(576, 1e-5),
        Rotation(128),
        NormedRotation(128, 4),
        SwiGLU(),
        Routing(8, True),
        Mixing(128),
    )
    modules = torch.nn.ModuleList(kinds).to(place.device, place.dtype)
    for parameter in modules.parameters():
        parameter.uniform_(0.5, 2)
    wanted = {number: KERNELS[type(module)] for number, module in enumerate(modules)}
    use_kernels(modules, place.dtype, place.device)
    left = [type(module).__name__ for number, module in enumerate(modules) if type(module) is not wanted[number]]
    say(kernel="small operations", dtype=str(place.dtype), left_to_torch=left)
    return left


def tests(place: Place) -> None:
    files = ["tests/gpu", "tests/unit/test_triton_kernels.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(ended.stdout, file=sys.stderr)  # which the report keeps
    last = (ended.stdout.strip().splitlines() or [""])[-1]
    goal("tests of a GPU", last, "pass", ended.returncode in ((0, 5) if place.small else (0,)))


@torch.inference_mode()
def tower(place: Place) -> None:
    """Equal images, then grids of many sizes in one forward."""
    config = TINY_TOWER if place.small else SO400M
    with place.defaults():
        model = SiglipVisionModel(replace(config, position_resize="bicubic")).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    rate, own = place.matmul_rate(), config.position_grid
    mixed = tuple(own.__class__(*sides) for sides in ((16, 40), (27, 27), (12, 20), (32, 32), (8, 60)))
    packs = {f"{count} images": ((own,) * count, least) for count, least in ((1, 30), (2, 0), (8, 50), (64, 0))}
    if place.small:
        packs = {"1 images": ((own,), 0)}
    for name, (grids, least) in (packs | {"mixed grids": (mixed, 0)}).items():
        with part(f"tower, {name}"):
            tower_share(place, model, f"tower, {name}", grids, rate, least)
    if has_fp8(place):
        with part("tower, fp8"):
            quantise(model, "fp8", place.device)
            for count in (1, 8):  # of the floor of the same products in halves
                tower_share(place, model, f"tower, {count} images, fp8", (own,) * count, rate, 0)


def tower_share(
    place: Place, model: SiglipVisionModel, name: str, grids: tuple[Grid, ...], rate: float, least: float
) -> None:
    config, wide, patches = model.config, model.config.hidden_size, sum(grid.area for grid in grids)
    pixels = torch.randn(patches, config.patch_dim, device=place.device, dtype=place.dtype)
    block = 4 * wide**2 + 2 * wide * config.intermediate_size
    flops = 2 * patches * (config.patch_dim * wide + config.depth * block)
    flops += 4 * wide * config.depth * sum(grid.area**2 for grid in grids)
    packed = PackedPatches(pixels, grids)
    share(name, place.milliseconds(partial(model, packed)), 1e3 * flops / rate, least)


def decode(place: Place) -> None:
    """Steps that only decode, behind prompts of 2,048 tokens; all of its weights and keys are read once."""
    shapes = {"tiny": (TINY, {1: 0, 8: 0})} if place.small else {
        "1.5B": (QWEN_1_5B, {1: 50, 8: 0, 64: 50}), "7B": (QWEN_7B, {1: 65, 8: 0, 64: 65}),
    }  # fmt: skip
    for name, (language, goals) in shapes.items():
        with part(f"decode {name}"):
            decode_shape(place, name, language, goals)


def decode_shape(place: Place, name: str, language: LanguageConfig, goals: dict[int, int]) -> None:
    context, rate = (64 if place.small else 2048), place.copy_rate()
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


class Half(Constrained):
    """A grammar's place where every other token may come."""

    def __init__(self, vocab_size: int) -> None:
        self._words = np.full(mask_words(vocab_size), 0x5555555555555555)

    def mask(self, guesses: Sequence[int] = ()) -> Words | None:
        return self._words


def sampler(place: Place, engine: Engine, logits: torch.Tensor) -> None:
    """From logits to what the host has read, for every kind of request."""
    chunks = engine.scheduler.plan().chunks
    choose = DeviceSampler(len(logits), place.device, tried_choices(place.device, logits.shape[1]))
    for kind, sampling in SAMPLED.items():
        rows = list[NextToken]()
        for token in (token for chunk in chunks for token in chunk.next_tokens):
            held = Half(logits.shape[1]) if kind == "under a grammar" else None
            rows.append(token._replace(request=replace(token.request, sampling=sampling), constrained=held))
        call = torch.inference_mode()(lambda rows=rows: choose(logits, rows, frozenset())())
        found = place.milliseconds(call)
        if place.small:
            say(what=f"sampler, {kind}", ms=round(found, 3))
        else:
            goal(f"sampler of {len(rows)} rows, {kind}", f"{found:.2f} ms", "at most 0.5 ms", found <= 0.5)


STAGES = {one.__name__: one for one in (machine, kernels, tests, answers, tower, decode, engine)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")  # which the report keeps
    small = Place(torch.device("cpu"), torch.float32, True)
    STAGES[arguments.stage](small if arguments.small else Place(torch.device("cuda", 0), torch.bfloat16, False))


if __name__ == "__main__":
    main()
