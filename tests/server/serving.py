"""Real servers for tests: real sockets, a real engine process, a tiny random model."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from openai import DefaultHttpxClient, OpenAI
from PIL import Image
from waiting import PATIENCE, eventually

from siglane.engine.engine import EngineStats
from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor, load_processor
from siglane.server.app import create_app
from siglane.server.http import Server, uvicorn_config
from siglane.server.launch import listen, listen_at
from siglane.server.metrics import Metrics
from siglane.server.served import ChatModel, Deployment, Served
from siglane.server.traces import Traces
from siglane.settings.engine import EngineConfig
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget
from siglane.weights.hub import open_checkpoint

MODEL = "tiny"
HOST = "127.0.0.1"
NOTHING_GUESSED = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0}
CHAT = "/v1/chat/completions"


@dataclass
class RunningServer:
    """A server on a thread of this process. `url` ends with the port."""

    served: Served
    server: Server
    port: int
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def openai(self, api_key: str = "none", timeout: float = PATIENCE) -> OpenAI:
        http = DefaultHttpxClient(verify=False)  # reading the system's certificates takes 45 ms, and nobody shows one
        return OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=timeout, http_client=http)

    def http(self, timeout: float = PATIENCE) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=timeout, trust_env=False, verify=False)

    def post(self, body: Any, **options: Any) -> httpx2.Response:
        with self.http() as client:
            return client.post(CHAT, json=body, **options)

    def post_to(self, path: str, **body: Any) -> httpx2.Response:
        with self.http() as client:
            return client.post(path, json=body)

    def connect(self) -> socket.socket:
        return socket.create_connection((HOST, self.port), timeout=PATIENCE)

    def metric(self, name: str, **labels: str) -> float:
        value = self.served.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value


@contextmanager
def running(
    processor: Processor,
    engine: EngineProcess,
    *,
    budget: ImageBudget = CHECKPOINT_LIMITS,
    traces: Traces | None = None,
    **options: Any,
) -> Iterator[RunningServer]:
    config, metrics = config_of(**options), Metrics()
    chat = ChatModel(Deployment(MODEL, "folder/of-tiny", engine, config, metrics, budget), processor)
    with listening(Served(config, engine, metrics, chat), traces) as server:
        yield server


@contextmanager
def serving_folder(folder: Path) -> Iterator[RunningServer]:
    """`running`, of a small model's folder, with an engine of its own."""
    engine = EngineProcess(EngineSpec(str(folder), EngineConfig(device="cpu", threads=1, kv_tokens=8192)))
    engine.start()
    with running(load_processor(open_checkpoint(folder)), engine) as server:
        yield server
    engine.close()


def at_rest(engine: EngineProcess, ask: Callable[[], object]) -> EngineStats:
    """Its figures, which are half a second old while it works, behind all that it was asked for so far.
    ask: for anything."""
    before = engine.stats()
    ask()

    def rests() -> bool:
        found = engine.stats()
        return found is not None and found != before and found.running == found.waiting == 0

    eventually(rests)
    found = engine.stats()
    assert found is not None
    return found


@contextmanager
def stopped(engine: EngineProcess) -> Iterator[None]:
    """What is sent meanwhile waits at the engine's door."""
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def config_of(**options: Any) -> ServerConfig:
    return ServerConfig(**{"port": 0, "served_model_name": MODEL, "drain_timeout": 5.0, **options})


def key_file(folder: Path, *keys: str) -> Path:
    """For `api_keys`. keys: texts, or TOML tables without their header."""
    tables = any("=" in key for key in keys)
    file = folder / ("keys.toml" if tables else "keys.txt")
    file.write_text("\n".join(f"[[keys]]\n{key}" if tables else key for key in keys))
    return file


class QuickServer(Server):
    """Looks a hundred times a second whether it is to end, not ten times."""

    async def main_loop(self) -> None:
        for tick in count():
            if await self.on_tick(tick):
                return
            await asyncio.sleep(0.01)


@contextmanager
def listening(served: Served, traces: Traces | None = None) -> Iterator[RunningServer]:
    """A server of `served` on a thread; closes it at the end."""
    config = served.config
    listener = listen(HOST, config.port) if config.uds is None else listen_at(config.uds)
    server = QuickServer(uvicorn_config(create_app(served, traces), config), served)
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        eventually(lambda: server.started)
        port = 0 if config.uds is not None else listener.getsockname()[1]
        yield RunningServer(served, server, port, thread)
    finally:
        server.drain()
        server.drain()  # twice: do not wait for what a failed test left running
        thread.join(timeout=PATIENCE)
        served.close()
        listener.close()


def head(path: str = CHAT, **headers: object) -> bytes:
    """Of a request over a plain socket."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def rounded(value: Any, **bounds: float) -> Any:
    """A body to compare another with whose numbers may have been rounded otherwise, as
    in requests that share a forward. bounds: of `pytest.approx`."""
    if isinstance(value, float):
        return pytest.approx(value, **bounds)
    if isinstance(value, dict):
        return {key: rounded(item, **bounds) for key, item in value.items()}
    return [rounded(item, **bounds) for item in value] if isinstance(value, list) else value


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while data := connection.recv(65536):
        found += data
    return found


def chat(*content: Any, **fields: Any) -> dict[str, Any]:
    """The body of a greedy request with one user message. content: texts and image parts."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    defaults = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    return {"messages": [{"role": "user", "content": parts}], **defaults, **fields}


def image_url(url: str, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def image_part(data: bytes, **fields: Any) -> dict[str, Any]:
    return image_url(data_url(data), **fields)


def video_part(data: bytes, **fields: Any) -> dict[str, Any]:
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    return {"type": "video_url", "video_url": {"url": url, **fields}}


@dataclass
class DoneBatch:
    """answers: bodies by custom_id; errors: the whole file of those that have none."""

    answers: dict[str, Any]
    errors: str
    usage: Any


def run_batch(client: OpenAI, url: str, bodies: Sequence[dict[str, Any]]) -> DoneBatch:
    """A batch of `bodies`, numbered from "0" on, of which at least one is answered and one is not."""
    rows = [
        {"custom_id": str(number), "method": "POST", "url": url, "body": body} for number, body in enumerate(bodies)
    ]
    file = client.files.create(file=("rows.jsonl", "\n".join(map(json.dumps, rows)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")  # type: ignore[arg-type]
    eventually(lambda: client.batches.retrieve(batch.id).status == "completed")
    done = client.batches.retrieve(batch.id)
    assert done.output_file_id is not None
    assert done.error_file_id is not None
    found = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    answers = {row["custom_id"]: row["response"]["body"] for row in found}
    return DoneBatch(answers, client.files.content(done.error_file_id).text, done.usage)


def picture(width: int = 60, height: int = 40, seed: int = 0, format: str = "PNG", **options: Any) -> bytes:
    """A file of coloured noise."""
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode(Image.fromarray(rgb), format, **options)


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# a request that runs for some time, so that something else can happen beside it
GOOD_TOKENS = 30
GOOD = chat(
    image_part(picture(90, 50, seed=1)),
    "Describe the picture.",
    image_part(picture(30, 30, seed=2)),
    max_tokens=GOOD_TOKENS,
    ignore_eos=True,
    logprobs=True,
    stream=True,
    stream_options={"include_usage": True},
)


@dataclass
class Told:
    """All that a client learns from a stream."""

    text: str
    tokens: list[list[int]]
    finish_reasons: list[str]
    usage: dict[str, Any]
    error: dict[str, Any] | None
    done: bool
    chunks: list[dict[str, Any]]


def read_events(lines: Iterator[str]) -> Iterator[str]:
    """The data of every event; comments are left out."""
    for line in lines:
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
        else:
            assert line == "" or line.startswith(":"), line


def told_by(lines: Iterator[str], on_chunk: Callable[[], None] = lambda: None) -> Told:
    told = Told("", [], [], {}, None, False, [])
    for data in read_events(lines):
        assert not told.done, "something follows [DONE]"
        if data == "[DONE]":
            told.done = True
            continue
        chunk = json.loads(data)
        told.chunks.append(chunk)
        told.error = chunk.get("error")
        told.usage = chunk.get("usage") or told.usage
        for choice in chunk.get("choices", ()):
            told.text += choice["delta"].get("content", "")
            told.tokens += [token["bytes"] for token in (choice["logprobs"] or {"content": []})["content"]]
            told.finish_reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
        on_chunk()
    return told


def stream(server: RunningServer, body: dict[str, Any], on_chunk: Callable[[], None] = lambda: None) -> Told:
    body = {"stream_options": {"include_usage": True}, **body, "stream": True}
    with server.http() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        return told_by(response.iter_lines(), on_chunk)


def ask_good(server: RunningServer, on_chunk: Callable[[], None] = lambda: None) -> Told:
    """The good request, in a cache of its own, so that its usage does not depend on who came before."""
    return stream(server, {**GOOD, "cache_salt": secrets.token_hex(8)}, on_chunk)


def assert_unharmed(server: RunningServer, alone: Told, fault: Callable[[], object]) -> None:
    """The neighbour invariant: a good request gets exactly what it gets alone while `fault` happens beside it."""
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(ask_good, server, begun.set)
        good.add_done_callback(lambda _: begun.set())
        begun.wait()
        fault()
    beside = good.result()
    assert (beside.text, beside.tokens, beside.usage) == (alone.text, alone.tokens, alone.usage)
    assert (beside.finish_reasons, beside.error, beside.done) == (["length"], None, True)


# what no answer may ever hold: addresses, paths, tracebacks, media
LEAKS = re.compile(r"0x[0-9a-f]{6,}|/(home|tmp|work|usr|root|proc)\b|Traceback|BytesIO|[A-Za-z0-9+/]{120,}")


def assert_error(response: httpx2.Response, status: int, code: str | None = None, param: str | None = None) -> None:
    """The answer has the shape that clients expect, says what it should, and gives nothing away."""
    assert response.status_code == status, response.text[:500]
    body = response.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    kind = "server_error" if status >= 500 else "invalid_request_error"
    assert error["type"] == kind
    assert code is None or error["code"] == code
    assert param is None or error["param"] == param
    assert 0 < len(error["message"]) < 500
    assert "\n" not in error["message"]
    assert not LEAKS.search(response.text), response.text
    assert response.headers["x-request-id"]
    if status == 503:
        assert response.headers["retry-after"] == "1"
    elif status >= 500:
        assert response.headers["x-should-retry"] == "false"
