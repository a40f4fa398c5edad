"""Keys, metrics, logs: who may ask, and what the operator sees."""

from __future__ import annotations

import json
import logging
import sys

from serving import RunningServer, assert_error, chat, image_part, picture, running, stream
from waiting import eventually

from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor
from siglane.server.logs import JsonFormatter, TextFormatter

KEY = "correct horse"


def test_other_origins_are_closed_unless_opened(processor: Processor, engine: EngineProcess) -> None:
    asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
    with running(processor, engine) as server, server.http() as client:
        answer = client.get("/health", headers={"origin": "https://page.example"})
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert client.options("/v1/chat/completions", headers=asks).status_code == 405
    options = {"cors_origins": ("https://page.example",), "api_key": KEY}
    with running(processor, engine, **options) as server, server.http() as client:
        allowed = client.options("/v1/chat/completions", headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        assert "access-control-allow-credentials" not in allowed.headers
        other = client.options("/v1/chat/completions", headers={**asks, "origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
        answer = client.post("/v1/chat/completions", json=chat("x"), headers={"origin": "https://page.example"})
        assert_error(answer, 401)
        assert answer.headers["access-control-allow-origin"] == "https://page.example"


def series(server: RunningServer) -> set[str]:
    with server.http() as client:
        text = client.get("/metrics").text
    return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


def test_metrics_count_what_was_done(processor: Processor, engine: EngineProcess) -> None:
    with running(processor, engine) as server:
        body = chat(image_part(picture(seed=77)), "x", max_tokens=5, ignore_eos=True)
        usage = server.post(body).json()["usage"]
        told = stream(server, body)
        assert_error(server.post(chat(image_part(b""))), 400)
        assert_error(server.post(chat("x", n=0)), 400)
        count = server.metric
        eventually(lambda: count("siglane_requests_in_flight") == 0)  # counted a moment after the last byte was sent
        eventually(lambda: count("siglane_requests_total", outcome="client_error") == 2)
        assert count("siglane_requests_total", outcome="ok") == 2
        assert count("siglane_tokens_total", kind="completion") == 10
        assert count("siglane_tokens_total", kind="prompt") == 2 * usage["prompt_tokens"]
        cached = [one["prompt_tokens_details"]["cached_tokens"] for one in (usage, told.usage)]
        assert count("siglane_tokens_total", kind="cached") == sum(cached) > 0
        assert count("siglane_tokens_total", kind="image") == 2 * usage["prompt_tokens_details"]["image_tokens"]
        assert count("siglane_images_total") == 2
        assert count("siglane_time_to_first_token_seconds_count") == 2
        for stage in ("fetch", "decode", "prepare", "queue", "encode", "prefill", "generate"):
            assert count("siglane_stage_seconds_count", stage=stage) == 2
        assert count("siglane_stage_seconds_sum", stage="generate") > 0
        assert count("siglane_request_seconds_count") == 2
        assert count("siglane_inflight_bytes") == 0
        names = {name.partition("{")[0] for name in series(server)}
        assert {"siglane_engine_running", "siglane_kv_pages_free", "siglane_encoded_images_total"} <= names


def test_log_lines_cannot_be_forged() -> None:
    message = "a\nb\r\x1b[31mc\u2028d"
    record = logging.LogRecord("siglane", logging.INFO, __file__, 1, "%s", (message,), None)
    record.request_id = "id"
    text = TextFormatter().format(record)
    assert text.endswith(r"info [id] a\nb\r\x1b[31mc\u2028d")
    line = JsonFormatter().format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert (found["message"], found["request_id"], found["level"]) == (message, "id", "info")
    try:
        raise ValueError("why")
    except ValueError:
        record.exc_info = sys.exc_info()
    assert "ValueError: why" in TextFormatter().format(record)
    assert "ValueError: why" in json.loads(JsonFormatter().format(record))["exception"]
