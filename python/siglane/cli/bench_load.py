"""Requests of `siglane bench`, and the times of their answers."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from siglane.cli.bench_options import BenchOptions
from siglane.cli.streaming import StreamingClient
from siglane.errors import SiglaneError

WORDS = (
    "the a small large red green blue picture shows where many people stand near water trees behind old houses and one "
    "bright window under grey clouds before evening while two birds cross far above every roof in town"
)
NOISE = 16  # pixels of a picture are drawn from so many times fewer random ones: as large files as photographs


@dataclass(slots=True)
class Timed:
    """One request. Seconds from its begin; begin: from the run's. tokens: when text came, an event each; error: why it
    has no answer, and then the rest says nothing."""

    begin: float
    images: int
    first_token: float | None = None
    tokens: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Taken:
    """seconds: of the whole run."""

    requests: list[Timed]
    seconds: float


async def measure(options: BenchOptions, model: str | None) -> tuple[str, Taken]:
    """The model's name, and what was measured. SiglaneError when the server cannot be asked at all."""
    slots = options.concurrency
    async with StreamingClient(options.base_url, options.api_key, slots, options.answer_timeout) as client:
        name = model or await client.first_model()
        bodies = [body_of(options, name, number) for number in range(options.requests + options.warmup)]
        for body in bodies[: options.warmup]:
            async for _ in client.pieces(body):
                pass
        return name, await _run(options, client, bodies[options.warmup :])


async def _run(options: BenchOptions, client: StreamingClient, bodies: Sequence[Mapping[str, Any]]) -> Taken:
    places, start = asyncio.Semaphore(options.concurrency), time.perf_counter()
    times = random.Random(options.seed)
    asked: list[asyncio.Task[Timed]] = []
    with tqdm(total=len(bodies), unit="request", disable=None) as bar:

        async def ask(body: Mapping[str, Any]) -> Timed:
            async with places:
                found = await _ask(client, body, options.images, start)
            bar.update()
            return found

        for body in bodies:
            asked.append(asyncio.create_task(ask(body)))
            if options.request_rate:
                await asyncio.sleep(times.expovariate(options.request_rate))
        done = await asyncio.gather(*asked)
    return Taken(done, time.perf_counter() - start)


async def _ask(client: StreamingClient, body: Mapping[str, Any], images: int, start: float) -> Timed:
    begin = time.perf_counter()
    timed = Timed(begin - start, images)
    try:
        async for piece in client.pieces(body):
            if piece.text or piece.reasoning:
                timed.tokens.append(time.perf_counter() - begin)
            if piece.usage is not None:
                timed.prompt_tokens = piece.usage.get("prompt_tokens")
                timed.completion_tokens = piece.usage.get("completion_tokens")
    except SiglaneError as error:
        timed.error = str(error)
    timed.first_token = timed.tokens[0] if timed.tokens else None
    timed.end = time.perf_counter() - begin
    return timed


def body_of(options: BenchOptions, model: str, number: int) -> dict[str, Any]:
    """The same for equal options and numbers; pictures and words of each number are others."""
    draw = random.Random(f"{options.seed} {number}")
    text = " ".join(draw.choices(WORDS.split(), k=options.words))
    pictures = []
    for index in range(options.images):
        size = options.pixels[(number * options.images + index) % len(options.pixels)]
        data = base64.b64encode(picture(size, options.format, draw.getrandbits(32))).decode()
        pictures.append({"type": "image_url", "image_url": {"url": f"data:image/{options.format};base64,{data}"}})
    return {
        "model": model,
        "messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": text}]}],
        "max_tokens": options.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def picture(size: tuple[int, int], format: str, seed: int) -> bytes:
    """A file of smooth noise."""
    width, height = size
    small = (-(-height // NOISE), -(-width // NOISE), 3)
    noise = np.random.default_rng(seed).integers(0, 256, small, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()
