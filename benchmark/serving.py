"""siglane's server against transformers' `generate`, same weights, same pictures, one run.

    python benchmark/serving.py [--repeats 3] [--quantization 8bit] [--out benchmark/results/serving.json]

Two workloads for eight clients: 16 requests with different images and 32 tokens each (nearly all encoding), and 16
requests about four images with 128 tokens each (features and prompts are shared). Both sides decode and resize the
pictures themselves and give the same text, which is checked. Beside every figure stands the arithmetic floor: the
multiply-adds the workload cannot do without, at the rate of torch's matrix product measured in the same minute.
`--quantization` adds a server of fewer bits to every repeat and its bars: 8 bit at 1.8 times float32's pace on
different images, 2.0 on four; exits with 1 when one is missed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import description, gemm_rate, onednn_rate
from PIL import Image
from serving_model import request_flops, write_checkpoint  # which makes tests/ importable
from serving_reference import Job, TransformersLoop

from tests.ports import free_port

CLIENTS = 8
QUESTIONS = ("What is in the picture?", "Which colours do you see?", "What stands on the left?", "How many things?")


@dataclass(frozen=True)
class Workload:
    name: str
    images: int
    requests: int
    tokens: int

    def jobs(self, seed: int) -> list[Job]:
        """New images for every seed, so that nothing is cached from an earlier repeat."""
        pictures = [picture(seed * 1000 + number) for number in range(self.images)]
        return [
            Job(pictures[n % self.images], QUESTIONS[n // self.images % len(QUESTIONS)], self.tokens)
            for n in range(self.requests)
        ]


WORKLOADS = (Workload("different images", 16, 16, 32), Workload("four images", 4, 16, 128))
BARS = {("different images", "8bit"): 1.8, ("four images", "8bit"): 2.0}  # times float32's pace


def picture(seed: int) -> bytes:
    """A 640x480 PNG of smooth noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


class Server:
    """`siglane serve` in a process of its own, spoken to over HTTP. options: further flags."""

    def __init__(self, folder: Path, *options: str) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "siglane.cli.main", "serve", str(folder), "--port", str(port), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/ready", timeout=5).read()
                return
            except OSError:  # nobody listens yet, or nobody has time to answer
                if self.process.poll() is not None:
                    raise SystemExit("the server did not start") from None
                time.sleep(0.1)

    def answer(self, job: Job, *, ignore_eos: bool = True) -> tuple[str, float, dict[str, Any]]:
        """The text, the seconds to its first token, the usage."""
        body = {
            "model": "benchmark",
            "messages": [{"role": "user", "content": job.content()}],
            "max_tokens": job.tokens,
            "temperature": 0,
            "min_tokens": job.tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        begin = time.perf_counter()
        first, text, usage = 0.0, "", {}
        with urllib.request.urlopen(request, timeout=600) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise SystemExit(f"the server answered {event['error']}")
                first = first or time.perf_counter() - begin
                text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                usage = event.get("usage") or usage
        return text, first, usage

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)


def timed_answers(server: Server, jobs: list[Job]) -> tuple[float, list[tuple[str, float, dict[str, Any]]]]:
    begin = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(server.answer, jobs))
    return time.perf_counter() - begin, answers


def measure(
    workload: Workload, seed: int, reference: TransformersLoop, server: Server, fewer_bits: Server | None
) -> dict[str, Any]:
    """One repeat: all sides on the same jobs, the arithmetic ceiling before and after."""
    jobs = workload.jobs(seed)
    rate_before = gemm_rate()
    begin = time.perf_counter()
    expected = [reference.answer(job) for job in jobs]
    loop_seconds = time.perf_counter() - begin
    server_seconds, answers = timed_answers(server, jobs)
    quantised = {} if fewer_bits is None else quantised_pace(server_seconds, *timed_answers(fewer_bits, jobs), expected)
    rate = max(rate_before, gemm_rate())
    floor = workload_flops(workload, answers) / rate
    return {
        "transformers_seconds": loop_seconds,
        "siglane_seconds": server_seconds,
        "floor_seconds": floor,
        "gemm_gflops": rate / 1e9,
        "onednn_gflops": onednn_rate() / 1e9,
        "equal_texts": sum(text == wanted for (text, _, _), wanted in zip(answers, expected, strict=True)),
        "speedup": loop_seconds / server_seconds,
        "siglane_of_floor": floor / server_seconds,
        "transformers_of_floor": floor / loop_seconds,
        **quantised,
    }


def quantised_pace(
    float_seconds: float, seconds: float, answers: list[tuple[str, float, dict[str, Any]]], expected: list[str]
) -> dict[str, float]:
    """equal_texts are told, no bar: the likeliest of random weights' tokens lie close together."""
    return {
        "quantised_seconds": seconds,
        "quantised_speedup": float_seconds / seconds,
        "quantised_equal_texts": sum(text == wanted for (text, _, _), wanted in zip(answers, expected, strict=True)),
    }


def workload_flops(workload: Workload, answers: list[tuple[str, float, dict[str, Any]]]) -> float:
    """Every request as if alone, but each image encoded once."""
    prompts = [usage["prompt_tokens"] for _, _, usage in answers]
    return sum(
        request_flops(encoded=number < workload.images, prompt=prompt, cached=0, generated=workload.tokens)
        for number, prompt in enumerate(prompts)
    )


def first_token_times(server: Server, seed: int) -> dict[str, float]:
    """Seconds to the first token: a new request, the same again, another question about the same image."""
    png = picture(seed)
    _, new, _ = server.answer(Job(png, QUESTIONS[0], 8))
    _, again, _ = server.answer(Job(png, QUESTIONS[0], 8))
    _, other, _ = server.answer(Job(png, QUESTIONS[1], 8))
    return {"new": new, "same_request": again / new, "new_question": other / new}


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    names = list(report["workloads"])
    for offset, side, colour in (
        (-0.27, "transformers", "#9aa5b1"),
        (0.0, "siglane", "#2f6fde"),
        (0.27, "floor", "#d9d9d9"),
    ):
        heights = [report["workloads"][name]["median"][f"{side}_seconds"] for name in names]
        bars = left.bar([n + offset for n in range(len(names))], heights, 0.26, label=side, color=colour)
        left.bar_label(bars, fmt="%.1f s", fontsize=8)
    left.set_xticks(range(len(names)), names)
    left.set_ylabel("seconds for 16 requests, 8 clients")
    left.legend(frameon=False)
    ttft = report["first_token"]["median"]
    bars = right.bar(
        ["new", "same again", "new question"], [1, ttft["same_request"], ttft["new_question"]], color="#2f6fde"
    )
    right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.set_ylabel("time to first token, new image = 1")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quantization", default="none", choices=("none", "8bit", "4bit"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "benchmark"
        write_checkpoint(folder)
        reference, server = TransformersLoop(folder), Server(folder)
        kind = arguments.quantization
        fewer_bits = None if kind == "none" else Server(folder, "--quantization", kind)
        sides = [side for side in (reference, server, fewer_bits) if side is not None]
        try:
            for side in sides:
                side.answer(Job(picture(1), QUESTIONS[0], 4))
            runs: dict[str, list[dict[str, Any]]] = {workload.name: [] for workload in WORKLOADS}
            first_token = []
            for repeat in range(arguments.repeats):
                for number, workload in enumerate(WORKLOADS):
                    runs[workload.name].append(
                        measure(workload, 10 * repeat + number + 1, reference, server, fewer_bits)
                    )
                    print(workload.name, json.dumps(runs[workload.name][-1]), file=sys.stderr)
                first_token.append(first_token_times(server, 900_000 + repeat))
        finally:
            for side in sides[1:]:
                side.close()
    report: dict[str, Any] = {
        "command": "python benchmark/serving.py " + " ".join(sys.argv[1:]),
        "machine": description(),
        "clients": CLIENTS,
        "quantization": kind,
        "workloads": {
            workload.name: {**asdict(workload), "median": medians(runs[workload.name]), "runs": runs[workload.name]}
            for workload in WORKLOADS
        },
        "first_token": {"median": medians(first_token), "runs": first_token},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    plot(report, arguments.out.with_suffix(".png"))
    print_table(report)
    return 0 if print_bars(report) else 1


def print_bars(report: dict[str, Any]) -> bool:
    """Of the server of fewer bits; whether all hold."""
    kind, all_hold = report["quantization"], True
    for name, workload in report["workloads"].items():
        found = workload["median"].get("quantised_speedup")
        if found is None:
            continue
        bar = BARS.get((name, kind), 1.0)
        all_hold &= found >= bar
        equal = f"{workload['median']['quantised_equal_texts']:.0f}/{workload['requests']} texts as float32's"
        print(f"{'PASS' if found >= bar else 'FAIL'}  {name}: {kind} / float32 = {found:.2f} (at least {bar}); {equal}")
    return all_hold


def print_table(report: dict[str, Any]) -> None:
    print(
        f"{'workload':18} {'transformers':>12} {'siglane':>9} {'floor':>8} {'speed-up':>9} {'of floor':>9}  equal texts"
    )
    for name, workload in report["workloads"].items():
        m = workload["median"]
        print(
            f"{name:18} {m['transformers_seconds']:10.2f} s {m['siglane_seconds']:7.2f} s {m['floor_seconds']:6.2f} s "
            f"{m['speedup']:8.2f}x {m['siglane_of_floor']:9.2f}  {m['equal_texts']:.0f}/{workload['requests']}"
        )
    rates = next(iter(report["workloads"].values()))["median"]
    ttft = report["first_token"]["median"]
    print(f"floor: multiply-adds at the measured {rates['gemm_gflops']:.0f} GFLOP/s of torch's float32 matrix product;")
    print(f"       siglane's layers use oneDNN's, {rates['onednn_gflops']:.0f} GFLOP/s here, so they can be above it")
    print(
        f"time to first token: new image {ttft['new']:.3f} s; the same request again {ttft['same_request']:.3f} of it; "
        f"a new question about the same image {ttft['new_question']:.3f} of it"
    )


if __name__ == "__main__":
    raise SystemExit(main())
