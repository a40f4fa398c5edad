"""A server under clients that come, go, err and ask for everything: nothing is lost, mixed up or left behind.

    python benchmark/soak.py [--seconds 600] [--clients 200] [--out benchmark/results/soak.json]

A tiny model of random weights, whose template knows tools, answers plain chats, chats about one and two pictures, JSON
schemas, expressions, choices and calls of tools, streamed or not, greedy or with a seed. Each request was answered
alone before, and has to be answered the same under load. A fifth of the clients' requests are left before their answer
has ended, a twentieth hold a picture that is none. Exits with 1 when a bar is missed:

- every request that is sent is answered, or left by its own client, and the server counted as many;
- no answer differs from the one that the same request had alone;
- no page of the KV cache and no byte in flight is held once all is quiet;
- descriptors, threads and processes are then as before, and so is memory, within 5 %, and in the run's last tenth as in
  its second. A run under two minutes tells these and is not held to them: what grows once may not have grown.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from machine import description
from PIL import Image
from serving import Server  # which makes tests/ importable
from soak_model import write_model
from soak_watch import Sample, Watch, plot

OPTIONS = (
    *("--device", "cpu", "--threads", "1", "--kv-tokens", "32768", "--max-queue", "400"),
    *("--feature-cache-bytes", "262144", "--patch-cache-bytes", "2097152", "--log-level", "error"),
)
LEFT, BAD = 0.2, 0.05  # of all requests
JOBS = 60
GROWTH = 1.05  # of memory
LONG = 120.0  # seconds
QUESTIONS = ("What is it?", "Which colours are there?", "Say more.", "How many are in the picture?", "Is it red?")
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green", "blue"]}, "count": {"type": "integer", "minimum": 0}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": SCHEMA, "strict": True}}
NAMED = {"type": "json_schema", "json_schema": {"name": "seen", "schema": SCHEMA, "strict": True}}
KINDS: dict[str, dict[str, Any]] = {
    "text": {},
    "picture": {},
    "two pictures": {},
    "schema": {"response_format": NAMED, "max_tokens": 60},
    "expression": {"structured_outputs": {"regex": "[a-f0-9]{12}"}},
    "choice": {"structured_outputs": {"choice": ["yes", "no", "perhaps"]}},
    "tools": {"tools": [TOOL], "max_tokens": 60},
    "a call": {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 90},
}
PICTURES = {"text": 0, "two pictures": 2}


@dataclass(frozen=True)
class Job:
    kind: str
    body: dict[str, Any]


@dataclass
class Tally:
    """What clients saw. seconds: of the answers, with the time at which they came."""

    sent: int = 0
    left: int = 0
    refused: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[tuple[float, float]] = field(default_factory=list)


def jobs(seed: int) -> list[Job]:
    """The same for the same seed."""
    found = []
    for number in range(JOBS):
        kind = list(KINDS)[number % len(KINDS)]
        pictures = [image_part(picture(1000 * seed + 10 * number + one)) for one in range(PICTURES.get(kind, 1))]
        content = [*pictures, {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
        sampled = {"temperature": 1.0, "seed": number} if number % 3 == 0 else {"temperature": 0}
        streamed = number // len(KINDS) % 2 == 0
        fields = {"max_tokens": 24, **sampled, **KINDS[kind], "stream": streamed, "logprobs": number % 4 == 0}
        found.append(Job(kind, {"messages": [{"role": "user", "content": content}], **fields}))
    return found


def picture(seed: int) -> bytes:
    draw = np.random.default_rng(seed)
    width, height = draw.integers(24, 72, 2)
    buffer = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def image_part(data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def bad(job: Job, draw: random.Random) -> dict[str, Any]:
    """The job's request with a picture that ends early or is none."""
    data = picture(draw.getrandbits(30))
    broken = draw.choice((data[: len(data) // 2], b"no picture", b""))
    text = {"type": "text", "text": "What is it?"}
    return {**job.body, "messages": [{"role": "user", "content": [image_part(broken), text]}]}


async def ask(port: int, body: dict[str, Any], leave: float | None = None) -> tuple[int, bytes] | None:
    """Status and body of an answer. leave: seconds after which the client hangs up if it has none; None is returned."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n"
        writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + data)
        await writer.drain()
        try:
            async with asyncio.timeout(leave):
                answer = await reader.read()
        except TimeoutError:
            return None
    finally:
        writer.close()
    head, _, data = answer.partition(b"\r\n\r\n")
    chunked = b"transfer-encoding: chunked" in head.lower()
    return int(head.split(b" ", 2)[1]), b"".join(chunks(data)) if chunked else data


def chunks(data: bytes) -> Iterator[bytes]:
    """ValueError where the last one is missing."""
    place = 0
    while True:
        end = data.index(b"\r\n", place)
        if not (size := int(data[place:end], 16)):
            return
        yield data[end + 2 : end + 2 + size]
        place = end + 4 + size


def told(data: bytes, streamed: bool) -> Any:
    """What an answer says, without what differs from request to request: ids, times, what a cache had."""
    if not streamed:
        return essence([json.loads(data)], "message")
    events = [line.removeprefix(b"data: ") for line in data.splitlines() if line.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        return {"cut": len(events)}
    return essence([json.loads(event) for event in events[:-1]], "delta")


def essence(bodies: list[dict[str, Any]], key: str) -> Any:
    content, calls, reasons, chosen = "", "", [], []
    for body in bodies:
        if "error" in body:
            return body["error"]
        for choice in body["choices"]:
            said = choice[key]
            content += said.get("content") or ""
            for call in said.get("tool_calls") or ():
                calls += (call["function"].get("name") or "") + call["function"]["arguments"]
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            chosen += [token["bytes"] for token in ((choice.get("logprobs") or {}).get("content") or ())]
    return {"content": content, "calls": calls, "reasons": reasons, "tokens": chosen}


async def client(port: int, asked: list[Job], alone: list[Any], until: float, tally: Tally, seed: int) -> None:
    draw = random.Random(seed)
    while (begin := time.monotonic()) < until:
        number = draw.randrange(len(asked))
        job, broken = asked[number], draw.random() < BAD
        body = bad(job, draw) if broken else job.body
        salt = {"cache_salt": str(draw.getrandbits(60))} if draw.random() < 0.5 else {}  # half find nothing cached
        leave = draw.expovariate(1 / 0.5) if draw.random() < LEFT else None
        tally.sent += 1
        answer = await ask(port, body | salt, leave)
        if answer is None:
            tally.left += 1
            continue
        status, data = answer
        tally.answered[f"{'bad picture' if broken else job.kind} {status}"] += 1
        if broken:
            right = status == 400 and json.loads(data)["error"]["code"] == "image_decode_failed"
        else:
            tally.seconds.append((time.monotonic(), time.monotonic() - begin))
            right = status == 200 and told(data, job.body["stream"]) == alone[number]
        if not right:
            tally.wrong.append({"job": number, "status": status, "told": data.decode(errors="replace")[:2000]})


async def load(server: Server, watch: Watch, clients: int, seconds: float, asked: list[Job], alone: list[Any]) -> Tally:
    """All clients for some seconds, then quiet."""
    port, tally, until = int(server.url.rpartition(":")[2]), Tally(), time.monotonic() + seconds
    sampling = asyncio.create_task(watch.sample(until))
    numbers = range(clients)
    await asyncio.gather(*(client(port, asked, alone, until, tally, number) for number in numbers), sampling)
    await watch.quiet()
    return tally


async def soak(server: Server, clients: int, seconds: float, picture_file: Path) -> dict[str, Any]:
    watch, asked, port = Watch(server.process.pid, server.url), jobs(1), int(server.url.rpartition(":")[2])
    alone = [told(data, job.body["stream"]) for job in asked for _, data in [await ask(port, job.body)]]  # type: ignore[misc]
    await load(server, watch, clients, min(20.0, seconds / 3), asked, alone)  # pools, caches and tables grow once
    watch.samples.clear()
    before, counted = watch.now(), watch.requests()
    tally = await load(server, watch, clients, seconds, asked, alone)
    after, counted = watch.now(), watch.requests() - counted
    plot(watch.samples, tally.seconds, picture_file)
    return {
        "clients": clients,
        "seconds": seconds,
        "sent": tally.sent,
        "left": tally.left,
        "answered": dict(sorted(tally.answered.items())),
        "counted_by_server": dict(sorted(counted.items())),
        "wrong": tally.wrong[:10],
        "seconds_of_an_answer": quantiles([seconds for _, seconds in tally.seconds]),
        "before": vars(before),
        "after": vars(after),
        "bars": bars_of(tally, before, after, counted, watch.samples),
    }


def bars_of(
    tally: Tally, before: Sample, after: Sample, counted: Counter[str], samples: list[Sample]
) -> dict[str, tuple[bool | None, str]]:
    """Whether each holds, None where the run was too short to tell, and the figures."""
    answered = sum(tally.answered.values())
    bars: dict[str, tuple[bool | None, str]] = {
        "sent = answered + left": (tally.sent == answered + tally.left, f"{tally.sent} = {answered} + {tally.left}"),
        "counted by the server": (counted.total() == tally.sent, f"{counted.total()}"),
        "no wrong answer": (not tally.wrong, f"{len(tally.wrong)}"),
        "pages back": (after.pages_held == 0, f"{after.pages_held} held"),
        "bytes in flight": (after.inflight_bytes == 0, f"{after.inflight_bytes}"),
    }
    is_long, tenth = samples[-1].at - samples[0].at >= 0.9 * LONG, max(1, len(samples) // 10)
    early, late = (
        statistics.median(one.bytes for one in part) for part in (samples[tenth : 2 * tenth], samples[-tenth:])
    )
    for name, was, now in (("under load", early, late), ("at rest", before.bytes, after.bytes)):
        told_ = f"{was / 1e6:.0f} -> {now / 1e6:.0f} MB"
        bars[f"memory {name}"] = (now <= GROWTH * was if is_long else None, told_)
    for name in ("descriptors", "threads", "processes"):
        was, now = getattr(before, name), getattr(after, name)
        bars[f"{name} back"] = (now <= was if is_long else None, f"{was} -> {now}")
    return bars


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {f"p{part}": round(ordered[min(len(ordered) - 1, len(ordered) * part // 100)], 3) for part in (50, 90, 99)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        model = Path(temporary) / "tiny"
        write_model(model)
        server = Server(model, *OPTIONS)
        try:
            report = asyncio.run(soak(server, arguments.clients, arguments.seconds, arguments.out.with_suffix(".png")))
        finally:
            server.close()
    report = {"command": "python benchmark/soak.py " + " ".join(sys.argv[1:]), "machine": description(), **report}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{report['sent']} requests, {report['answered']}, seconds {report['seconds_of_an_answer']}")
    words = {True: "PASS", False: "FAIL", None: "told"}
    for name, (holds, told_) in report["bars"].items():
        print(f"{words[holds]}  {name}: {told_}")
    return 1 if any(holds is False for holds, _ in report["bars"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
