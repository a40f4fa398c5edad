"""`siglane batch` against the same rows sent by clients over HTTP, and what the order of its work is worth.

    python benchmark/batch.py [--repeats 3] [--rows 48] [--out benchmark/results/batch.json]

On the model of `serving.py`, three comparisons, contenders in turn in every repeat:

- different images: a row each, by `siglane batch` and by 16 clients of `siglane serve`. Bar: 1.0 of the clients'
  rows/s.
- ten rows an image, spread over the file, while the feature cache holds a tenth of the images: the same two. Bar: 1.5.
- the same rows sorted worst (equal images as far apart as can be) and best (next to each other), both by `siglane
  batch`. Bar: the worst at 0.95 of the best.

The seconds of a side are those between its first row and its last; loading the model is left out on both. Images are
new in every repeat.
"""

from __future__ import annotations

import argparse
import base64
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import serving
from machine import description
from serving import QUESTIONS, Server, picture
from serving_model import LANGUAGE, ROWS, write_checkpoint
from serving_reference import Job

CLIENTS, TOKENS, ROWS_PER_IMAGE = 16, 16, 10
FEATURE_BYTES = ROWS * LANGUAGE["hidden_size"] * 4  # of one image


@dataclass(frozen=True)
class Contender:
    """name; jobs: in the order of the file; cache: bytes of the engine's feature cache, None for its own."""

    name: str
    jobs: list[Job]
    cache: int | None = None


def spread(images: int, rows: int, seed: int) -> list[Job]:
    """Rows about `images` pictures, equal ones as far apart as can be."""
    pictures = [picture(seed * 10_000 + number) for number in range(images)]
    return [Job(pictures[n % images], f"{QUESTIONS[n % len(QUESTIONS)]} ({n})", TOKENS) for n in range(rows)]


def sorted_best(jobs: list[Job]) -> list[Job]:
    return sorted(jobs, key=lambda job: job.png)


def flags(cache: int | None) -> list[str]:
    return [] if cache is None else ["--feature-cache-bytes", str(cache)]


def by_batch(folder: Path, contender: Contender, temporary: Path) -> float:
    """Seconds from the first row that is asked, when the model is loaded, to the last answer."""
    source, out = temporary / "in.jsonl", temporary / "out.jsonl"
    for path in temporary.glob("out.*"):
        path.unlink()
    lines = [json.dumps(row(number, job)) for number, job in enumerate(contender.jobs)]
    source.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "siglane.cli.main", "batch", str(folder), "-i", str(source), "-o", str(out)]
    done = subprocess.run([*command, "--json", *flags(contender.cache)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if found["answered"] != len(contender.jobs):
        raise SystemExit(f"{found['failed']} of {contender.name} failed")
    return float(found["seconds"])


def row(number: int, job: Job) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(job.png).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": job.question}]
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": job.tokens,
        "min_tokens": job.tokens,
        "temperature": 0,
    }
    return {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}


def by_clients(folder: Path, contender: Contender) -> float:
    server = Server(folder, *flags(contender.cache))
    try:
        begin = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as clients:
            list(clients.map(server.answer, contender.jobs))
        return time.perf_counter() - begin
    finally:
        server.close()


def measure(folder: Path, rows: int, seed: int, temporary: Path, *, swapped: bool) -> dict[str, float]:
    """rows/s of every side; swapped: the second of each pair first."""
    images = max(1, rows // ROWS_PER_IMAGE)
    different, shared = spread(rows, rows, 3 * seed), spread(images, rows, 3 * seed + 1)
    small = max(1, images // 10) * FEATURE_BYTES
    order = spread(images, rows, 3 * seed + 2)
    sides = {
        "different, batch": lambda: by_batch(folder, Contender("different", different), temporary),
        "different, clients": lambda: by_clients(folder, Contender("different", different)),
        "shared, batch": lambda: by_batch(folder, Contender("shared", shared, small), temporary),
        "shared, clients": lambda: by_clients(folder, Contender("shared", shared, small)),
        "sorted worst": lambda: by_batch(folder, Contender("worst", order, small), temporary),
        "sorted best": lambda: by_batch(folder, Contender("best", sorted_best(order), small), temporary),
    }
    names = list(sides)
    if swapped:
        names = [name for first, second in zip(names[::2], names[1::2], strict=True) for name in (second, first)]
    found = {name: rows / sides[name]() for name in names}
    return {name: found[name] for name in sides}


BARS = (
    ("different images, batch / clients", "different, batch", "different, clients", 1.0),
    ("ten rows an image, batch / clients", "shared, batch", "shared, clients", 1.5),
    ("sorted worst / best", "sorted worst", "sorted best", 0.95),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "batch.json")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "benchmark"
        write_checkpoint(folder)
        for repeat in range(arguments.repeats):
            runs.append(measure(folder, arguments.rows, repeat + 1, Path(temporary), swapped=repeat % 2 == 1))
            print(json.dumps(runs[-1]), file=sys.stderr)
    medians = serving.medians(runs)
    ratios = {name: statistics.median(run[one] / run[other] for run in runs) for name, one, other, _ in BARS}
    report = {
        "command": "python benchmark/batch.py " + " ".join(sys.argv[1:]),
        "machine": description(),
        "rows": arguments.rows,
        "clients": CLIENTS,
        "tokens": TOKENS,
        "rows_per_second": medians,
        "ratios": ratios,
        "bars": {name: bar for name, _, _, bar in BARS},
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for name, one, other, bar in BARS:
        print(f"{name:36} {medians[one]:6.2f} / {medians[other]:6.2f} rows/s = {ratios[name]:.2f}  (bar {bar})")


if __name__ == "__main__":
    main()
