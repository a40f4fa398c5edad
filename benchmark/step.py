"""What a decoding step of a language model costs, part by part.

    python benchmark/step.py [--shape qwen2.5-0.5b] [--quantization 8bit] [--batch 1 8] [--context 256] [--threads 1]

A model of that shape with random weights answers so many requests behind prompts of so many tokens. Each part is called
by itself, all layers in a row, so that weights come from where they come from in a step; calls are interleaved. The
floor is "products": rows that are codes already, times the weights. CPU milliseconds, or wall with --wall; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from machine import description

from siglane.config.language import LanguageConfig
from siglane.config.vlm import VlmConfig
from siglane.engine.attention.kernels import DecodeRows, StepAttention
from siglane.engine.batch import StepBatch
from siglane.engine.engine import Engine
from siglane.engine.sampling.sampler import sample
from siglane.families.model import VisionLanguageModel
from siglane.lm.quantise import LanguageQuantiser
from siglane.nn.cpu.int8 import Int8Weight
from siglane.nn.cpu.optimise import optimise
from siglane.settings.engine import EngineConfig
from siglane.types import Prompt, Request, SamplingParams

BASE = LanguageConfig(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    head_dim=64, vocab_size=151_936, max_position_embeddings=32_768, rms_norm_eps=1e-6, rope_theta=1e6, qkv_bias=True,
    output_bias=False, mlp_bias=False, qk_norm=False, norm_dtype="float32", tie_embeddings=True, rope_scaling=None,
    experts=None,
)  # fmt: skip
SHAPES = {
    "qwen2.5-0.5b": BASE,
    "smollm2-135m": replace(
        BASE, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49_152, max_position_embeddings=8192, rope_theta=1e5, qkv_bias=False,
        norm_dtype="input",
    ),
}  # fmt: skip


@torch.inference_mode()
def random_model(language: LanguageConfig, quantization: str) -> VisionLanguageModel:
    config = VlmConfig(
        family="causal_lm", images=None, language=language, image_token="", image_token_id=-1, eos_token_ids=(),
        thinking=None, sampling={},
    )  # fmt: skip
    model = VisionLanguageModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=parameter.shape[-1] ** -0.5)
    if quantization != "none":
        quantiser = LanguageQuantiser(language, quantization)
        tables = [table.weight for table in (model.language.embed_tokens, model.language.lm_head) if table is not None]
        for table, weight in zip(quantiser.begin(model.language), tables, strict=True):
            table.load_part("weight", "", weight)
        for block in model.language.blocks:
            quantiser.quantise_block(block)
        quantiser.finish(model.language)
    optimise(model)
    return model


def answering(model: VisionLanguageModel, batch: int, context: int, steps: int) -> Engine:
    """An engine whose every step from now on decodes `batch` rows, `steps` times at least."""
    config = EngineConfig(device="cpu", kv_tokens=batch * (context + 2 * steps + 64), max_running=batch)
    engine, vocabulary = Engine(model, config, ()), model.language.config.vocab_size
    for number in range(batch):
        prompt = Prompt(tuple((7 * place + number) % vocabulary for place in range(context)), (), (), ())
        engine.add(Request(str(number), prompt, SamplingParams(ignore_eos=True), 2 * steps + 32))
    while any(one.answered == 0 for one in (*engine.scheduler.running, *engine.scheduler.waiting)):
        engine.step()
    return engine


def calls_of(engine: Engine) -> dict[str, Callable[[], object]]:
    """A step and its parts."""
    runner, language = engine.runner, engine.runner.model.language
    layers = [layer for layer in language.modules() if isinstance(layer, Int8Weight)]
    step = StepBatch(tuple(engine.scheduler.plan().chunks))
    batch = len(step.chunks)
    rows = {layer.inputs: torch.randn(batch, layer.inputs) for layer in layers}
    codes = {layer.inputs: torch.randint(0, 255, (batch, layer.inputs), dtype=torch.uint8) for layer in layers}
    attention = decoding(engine, step)
    config = language.config
    q = torch.randn(batch, config.num_attention_heads, config.head_dim)
    k = torch.randn(batch, config.num_key_value_heads, config.head_dim)
    logits = runner.forward(runner.plan(step)).logits
    hidden = torch.randn(batch, config.hidden_size)
    next_tokens = [next_token for chunk in step.chunks for next_token in chunk.next_tokens]
    parts: dict[str, Callable[[], object]] = {
        "step": engine.step,
        "forward": lambda: runner.forward(runner.plan(step)),
        "attention": lambda: [attention(layer, q, k, k) for layer in range(config.num_hidden_layers)],
        "head": lambda: language.logits(hidden),
        "sampling": lambda: sample(logits, next_tokens, frozenset()),
    }
    if layers:
        parts["layers"] = lambda: [layer(rows[layer.inputs]) for layer in layers]
        if layers[0].packed.is_mkldnn:  # else no product is alone
            parts["products"] = lambda: [layer._product(codes[layer.inputs]) for layer in layers]
    return parts


def decoding(engine: Engine, step: StepBatch) -> StepAttention:
    """The attention of a step whose rows are one token each, of sequences that lie in one run."""
    kernels, count = engine.runner.kernels, len(step.chunks)
    slots = torch.tensor(step.slots(engine.config.page_size))
    lengths = torch.tensor([chunk.stop for chunk in step.chunks])
    tables = [torch.tensor(chunk.sequence.block_table, dtype=torch.int32) for chunk in step.chunks]
    table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True)
    decode = kernels.decode(DecodeRows(table, torch.arange(count), lengths, step.chunks))
    return StepAttention(kernels, slots, count, decode, None)


@torch.inference_mode()
def measure(engine: Engine, clock: Callable[[], float], steps: int) -> dict[str, float]:
    """Milliseconds."""
    calls = calls_of(engine)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(steps):
        for name, call in calls.items():
            begin = clock()
            call()
            seconds[name].append(clock() - begin)
    return {name: round(1e3 * statistics.median(values), 2) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--quantization", choices=("none", "8bit", "4bit"), default="8bit")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.perf_counter if arguments.wall else time.process_time
    model = random_model(SHAPES[arguments.shape], arguments.quantization)
    print(json.dumps({**description(), **vars(arguments)}))
    for batch in arguments.batch:
        found = measure(answering(model, batch, arguments.context, arguments.steps), clock, arguments.steps)
        rate = f"{1e3 * batch / found['step']:.1f} tokens/s"
        print(json.dumps({"batch": batch, **found, "rate": rate}), flush=True)


if __name__ == "__main__":
    main()
