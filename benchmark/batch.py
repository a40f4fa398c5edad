"""`siglane batch` against the same rows sent by clients over HTTP, and what the order of its work is worth.

    python benchmark/batch.py [--repeats 3] [--rows 48] [--only different beside] [--out benchmark/results/batch.json]

On the model of `serving.py`, contenders in turn in every repeat:

- different images: a row each, by `siglane batch` and by 16 clients of `siglane serve`. Bar: 1.0 of the clients'
  rows/s.
- ten rows an image, spread over the file, each with its question before the image, while the feature cache holds a
  tenth of the images: the same two. Bar: 1.5. Then the same with the image first, for which there is no bar: the KV
  cache has its pages, for clients as well, and no image is encoded twice on either side.
- the same rows sorted worst (equal images as far apart as can be) and best (next to each other), both by `siglane
  batch`. Bar: the worst at 0.95 of the best.
- four clients of `siglane serve`, each with a new image and then the next, without and with a batch of `/v1/batches`
  beside them: the 95th percentile of their seconds to the first token. Bar: 2.0 of those without, and the batch ends.

The seconds of a side are those between its first row and its last; loading the model is left out on both. Images are
new in every repeat. `--only` names the comparisons to run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import serving
from machine import description
from openai import OpenAI
from serving import QUESTIONS, Server, picture
from serving_model import LANGUAGE, ROWS, write_checkpoint
from serving_reference import Job

CLIENTS, TOKENS, ROWS_PER_IMAGE = 16, 16, 10
INTERACTIVE, REQUESTS_PER_CLIENT = 4, 6
FEATURE_BYTES = ROWS * LANGUAGE["hidden_size"] * 4  # of one image


@dataclass(frozen=True)
class Contender:
    """name; jobs: in the order of the file; cache: bytes of the engine's feature cache, None for its own."""

    name: str
    jobs: list[Job]
    cache: int | None = None


def spread(images: int, rows: int, seed: int, *, question_first: bool = False) -> list[Job]:
    """Rows about `images` pictures, equal ones as far apart as can be."""
    pictures = [picture(seed * 10_000 + number) for number in range(images)]
    questions = [f"({n}) {QUESTIONS[n % len(QUESTIONS)]}" for n in range(rows)]
    return [Job(pictures[n % images], questions[n], TOKENS, question_first) for n in range(rows)]


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
    body = {
        "messages": [{"role": "user", "content": job.content()}],
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


def first_tokens(server: Server, seed: int) -> list[float]:
    """Seconds to the first token of every request of four clients, sorted."""

    def ask(client: int) -> list[float]:
        numbers = (seed * 10_000 + 100 * client + number for number in range(REQUESTS_PER_CLIENT))
        return [server.answer(Job(picture(number), QUESTIONS[0], TOKENS))[1] for number in numbers]

    with ThreadPoolExecutor(INTERACTIVE) as clients:
        return sorted(second for seconds in clients.map(ask, range(INTERACTIVE)) for second in seconds)


def beside(folder: Path, rows: int, seed: int, temporary: Path) -> dict[str, float]:
    """The 95th percentile without and with a batch, which has to end."""
    server = Server(folder, "--data-dir", str(temporary / f"data {seed}"))
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    try:
        server.answer(Job(picture(seed), QUESTIONS[0], TOKENS))
        alone = first_tokens(server, 3 * seed)
        lines = [json.dumps(row(number, job)) for number, job in enumerate(spread(rows, rows, 3 * seed + 1))]
        file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        while not (batch := client.batches.retrieve(batch.id)).request_counts or not batch.request_counts.completed:
            time.sleep(0.1)
        busy = first_tokens(server, 3 * seed + 2)
        begin = client.batches.retrieve(batch.id)
        while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
            time.sleep(0.1)
        if batch.request_counts is None or batch.request_counts.completed != rows or begin.status == "completed":
            raise SystemExit(
                f"the batch ended as {batch.status}, {begin.status} when the clients had; give it more rows"
            )
        place = int(0.95 * len(alone))
        return {"beside a batch": busy[place], "without a batch": alone[place]}
    finally:
        server.close()


Sides = dict[str, Callable[[], float]]


def sides_of(name: str, folder: Path, rows: int, seed: int, temporary: Path) -> Sides:
    """rows/s of the two contenders of a comparison."""
    images = rows if name == "different" else max(1, rows // ROWS_PER_IMAGE)
    cache = None if name == "different" else max(1, images // 10) * FEATURE_BYTES
    jobs = spread(images, rows, seed, question_first=name == "shared")
    if name == "sorted":
        return {
            "sorted worst": lambda: rows / by_batch(folder, Contender("worst", jobs, cache), temporary),
            "sorted best": lambda: rows / by_batch(folder, Contender("best", sorted_best(jobs), cache), temporary),
        }
    contender = Contender(name, jobs, cache)
    return {
        f"{name}, batch": lambda: rows / by_batch(folder, contender, temporary),
        f"{name}, clients": lambda: rows / by_clients(folder, contender),
    }


def measure(folder: Path, rows: int, seed: int, temporary: Path, only: Sequence[str]) -> dict[str, float]:
    """Every side of the comparisons, in an even repeat the second of each pair first."""
    found: dict[str, float] = {}
    for number, name in enumerate(only, len(COMPARISONS) * seed):
        if name == "beside":
            found |= beside(folder, rows, number, temporary)
            continue
        sides = sides_of(name, folder, rows, number, temporary)
        for side in sorted(sides, reverse=seed % 2 == 0):
            found[side] = sides[side]()
            print(f"{side}: {found[side]:.2f} rows/s", file=sys.stderr)
    return found


# what is compared: words, one side, the other, the bar
COMPARISONS = {
    "different": ("different images, batch / clients", "different, batch", "different, clients", 1.0),
    "shared": ("ten questions, then their image, batch / clients", "shared, batch", "shared, clients", 1.5),
    "image first": (
        "an image, then its ten questions, batch / clients",
        "image first, batch",
        "image first, clients",
        None,
    ),
    "sorted": ("sorted worst / best", "sorted worst", "sorted best", 0.95),
    "beside": ("first token beside a batch / without, p95", "beside a batch", "without a batch", 2.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--only", nargs="+", choices=list(COMPARISONS), default=list(COMPARISONS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "batch.json")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "benchmark"
        write_checkpoint(folder)
        for repeat in range(arguments.repeats):
            runs.append(measure(folder, arguments.rows, repeat + 1, Path(temporary), arguments.only))
            print(json.dumps(runs[-1]), file=sys.stderr)
    medians = serving.medians(runs)
    chosen = [COMPARISONS[name] for name in arguments.only]
    ratios = {words: statistics.median(run[one] / run[other] for run in runs) for words, one, other, _ in chosen}
    report = {
        "command": "python benchmark/batch.py " + " ".join(sys.argv[1:]),
        "machine": description(),
        "rows": arguments.rows,
        "clients": CLIENTS,
        "tokens": TOKENS,
        "medians": medians,
        "ratios": ratios,
        "bars": {words: bar for words, _, _, bar in chosen},
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    for words, one, other, bar in chosen:
        unit = "s" if one == "beside a batch" else "rows/s"
        print(f"{words:50} {medians[one]:6.2f} / {medians[other]:6.2f} {unit} = {ratios[words]:.2f}  (bar {bar})")


if __name__ == "__main__":
    main()
