"""Keys, metrics, logs: who may ask, and what the operator sees."""

from __future__ import annotations

import json
import logging
import re
import sys

import httpx2
import pytest
from openai import AuthenticationError
from serving import RunningServer, assert_error, chat, image_part, image_url, picture, running, stream
from waiting import eventually

from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor
from siglane.server.logs import JsonFormatter, TextFormatter

KEY = "correct horse"


def test_everything_but_the_probes_needs_the_key(processor: Processor, engine: EngineProcess) -> None:
    """No key, a wrong one, one in another header, and headers that pretend the path is a probe's."""
    with running(processor, engine, api_key=KEY) as server, server.http() as client:
        for path in ("/health", "/ready", "/metrics"):
            assert client.get(path).status_code == 200
        wrong: list[dict[str, str]] = [
            {},
            {"authorization": KEY},
            {"authorization": f"Basic {KEY}"},
            {"authorization": f"Bearer {KEY}x"},
            {"authorization": f"Bearer {KEY[:-1]}"},
            {"authorization": "Bearer"},
            {"authorization": "Bearer é"},
            {"x-api-key": KEY},
            {"host": "127.0.0.1/health", "authorization": "Bearer no"},
            {"x-forwarded-prefix": "/health", "x-original-url": "/health"},
        ]
        for headers in wrong:
            raw = {name.encode(): value.encode("latin-1") for name, value in headers.items()}
            assert_error(client.get("/v1/models", headers=raw), 401, "invalid_api_key")
        two = [("authorization", "Bearer x"), ("authorization", f"Bearer {KEY}")]
        assert_error(client.get("/v1/models", headers=two), 401)
        # what only looks like a probe is none, and what looks like no route is not open either
        for path in ("/health/", "//health", "/HEALTH", "/health/../v1/models", "//v1/models", "/v1/Models", "/nope"):
            assert_error(client.get(httpx2.URL(server.url).copy_with(raw_path=path.encode())), 401, "invalid_api_key")
        for path in ("/openapi.json", "/v1/models?x=/health", "/%2e%2e/v1/models"):
            assert_error(client.get(path), 401, "invalid_api_key")
        assert_error(client.post("/v1/chat/completions", json=chat("x")), 401, "invalid_api_key")
        right = {"authorization": f"Bearer {KEY}"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert_error(client.get("/nope", headers=right), 404, "not_found")
        assert server.openai(api_key=KEY).chat.completions.create(**chat("x")).usage
        with pytest.raises(AuthenticationError) as caught:
            server.openai(api_key="wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        assert KEY not in repr(server.served.config)


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


def test_clients_cannot_add_series(processor: Processor, engine: EngineProcess) -> None:
    """Random paths, methods, model names and fields: what a client invents never becomes a label."""

    def roam(server: RunningServer, word: str) -> None:
        with server.http() as client:
            for number in range(100):
                client.get(f"/{word}/{number}")
                client.get(f"/v1/models/{word}{number}")
            client.request(word.upper(), "/v1/models")
            client.post("/v1/chat/completions", json=chat("x", model=word))
            client.post("/v1/chat/completions", json={**chat("x"), word: 1})

    with running(processor, engine) as server:
        series(server)
        roam(server, "first")
        known = series(server)
        roam(server, "second")
        assert series(server) == known
        assert 'siglane_http_requests_total{method="GET",route="other",status="404"}' in known
        assert 'siglane_http_requests_total{method="GET",route="/v1/models/{name:path}",status="404"}' in known
        assert 'siglane_http_requests_total{method="other",route="/v1/models",status="405"}' in known
        assert not [name for name in known if "first" in name.partition("{")[2]]


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


def test_the_log_names_requests_and_holds_nothing_of_theirs(
    processor: Processor, engine: EngineProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """Line breaks in what a client sends cannot forge a line, and no text, picture or query of a URL is written."""
    secret = "http://127.0.0.1:9/a.png?token=s3cret"
    with running(processor, engine) as server, caplog.at_level(logging.DEBUG, "siglane"):
        mine = {"x-request-id": "mine"}
        server.post(chat(image_part(picture()), "a private text", wild=1), headers=mine)
        server.post(chat(image_url(secret)), headers=mine)
        server.post(chat("x", model="evil\n2026 error forged"), headers=mine)
        server.post(chat("x", **{"wild\nfield": 1}))
        with server.http() as client:
            client.get("/path%0aforged?token=s3cret")
    lines = [TextFormatter().format(record) for record in caplog.records if record.name.startswith("siglane.server")]
    text = "\n".join(lines)
    assert len([line for line in lines if "[mine] POST /v1/chat/completions: " in line]) == 3
    assert re.search(r"\[mine\] POST /v1/chat/completions: image_url_forbidden in \d+ ms", text)
    assert not any(word in text for word in ("s3cret", "private", "127.0.0.1:9", "base64", "forged"))
    assert all("\n" not in line for line in lines)
    assert [line.rpartition(": ")[2] for line in lines if "have no effect here" in line] == ["wild", "wild?field"]


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
