"""What `siglane bench` says of the times it took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from siglane.cli.bench_load import Taken, Timed

PERCENTILES = (50, 90, 95, 99)
NAMES = {"ttft": "first token", "itl": "between tokens", "tpot": "a token, on average", "e2e": "whole answer"}


def summary(taken: Taken) -> dict[str, Any]:
    """Times in milliseconds. tokens_are: `usage` where every answer tells it, else the events with text are counted."""
    done = [one for one in taken.requests if one.error is None]
    told = all(one.completion_tokens is not None for one in done)
    seconds = taken.seconds
    output = sum(_tokens(one) for one in done)
    prompt = sum(one.prompt_tokens or 0 for one in done)
    return {
        "completed": len(done),
        "failed": len(taken.requests) - len(done),
        "errors": dict(Counter(one.error for one in taken.requests if one.error is not None).most_common(5)),
        "seconds": seconds,
        "tokens_are": "usage" if told else "events",
        "requests_per_second": len(done) / seconds,
        "images_per_second": sum(one.images for one in done) / seconds,
        "prompt_tokens_per_second": prompt / seconds,
        "output_tokens_per_second": output / seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "milliseconds": {name: _distribution(values) for name, values in _times(done).items() if values},
    }


def _tokens(one: Timed) -> int:
    return len(one.tokens) if one.completion_tokens is None else one.completion_tokens


def _times(done: Sequence[Timed]) -> dict[str, list[float]]:
    """Seconds, under the names that vLLM's and SGLang's benchmarks have for them."""
    several = [one for one in done if one.first_token is not None and _tokens(one) > 1]
    return {
        "ttft": [one.first_token for one in done if one.first_token is not None],
        "itl": [later - earlier for one in done for earlier, later in zip(one.tokens, one.tokens[1:], strict=False)],
        "tpot": [(one.end - one.tokens[0]) / (_tokens(one) - 1) for one in several],
        "e2e": [one.end for one in done],
    }


def _distribution(seconds: Sequence[float]) -> dict[str, float]:
    values = np.asarray(seconds) * 1000
    found = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {"mean": float(values.mean()), **found, "max": float(values.max())}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """For people."""
    failed = f", {found['failed']} failed" if found["failed"] else ""
    yield f"{found['model']}: {found['completed']} answers in {found['seconds']:.2f} s{failed}"
    for reason, count in found["errors"].items():
        yield f"  {count} x {reason}"
    yield (
        f"{found['requests_per_second']:.2f} requests/s, {found['images_per_second']:.2f} images/s, "
        f"{found['prompt_tokens_per_second']:.0f} prompt and {found['output_tokens_per_second']:.0f} output tokens/s"
        f"{'' if found['tokens_are'] == 'usage' else ' (events with text: the server tells no usage)'}"
    )
    columns = ("mean", *(f"p{p}" for p in PERCENTILES), "max")
    yield f"{'milliseconds':<20}" + "".join(f"{column:>10}" for column in columns)
    for name, values in found["milliseconds"].items():
        yield f"{NAMES[name]:<20}" + "".join(f"{values[column]:>10.1f}" for column in columns)


def draw(taken: Taken, picture: Path) -> bool:
    """What share of requests (or tokens) took at most how long; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    times = _times([one for one in taken.requests if one.error is None])
    for axes, name in zip(figure.subplots(1, 3), ("ttft", "itl", "e2e"), strict=True):
        values = np.sort(np.asarray(times[name])) * 1000
        if len(values):
            axes.step(values, np.arange(1, len(values) + 1) / len(values), where="post")
        axes.set(title=NAMES[name], xlabel="milliseconds", ylim=(0, 1), xlim=(0, None))
    figure.savefig(picture, dpi=150)
    return True
