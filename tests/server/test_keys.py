"""Keys with limits of their own, over HTTP: who waits, who is refused, and that nobody else notices."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import RateLimitError
from serving import (
    CHAT,
    HOST,
    RunningServer,
    Told,
    assert_error,
    assert_unharmed,
    chat,
    image_part,
    image_url,
    key_file,
    picture,
    read_events,
    running,
)
from waiting import eventually

from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor
from siglane.server.clients import Bucket, owner_of

LONG = chat("x", max_tokens=3000, ignore_eos=True)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def assert_limited(response: httpx2.Response, words: str, least: int, most: int) -> None:
    assert response.status_code == 429
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert words in error["message"]
    assert least <= int(response.headers["retry-after"]) <= most


def test_requests_and_patches_a_minute(processor: Processor, engine: EngineProcess, tmp_path: Path) -> None:
    file = key_file(
        tmp_path, 'key = "a"\nname = "few"\nrequests_per_minute = 3', 'key = "b"\npatches_per_minute = 10', 'key = "c"'
    )
    short = chat("x", max_tokens=1)
    seen = chat(image_part(picture()), "x", max_tokens=1)
    with running(processor, engine, api_keys=file) as server:
        for _ in range(3):
            assert server.post(short, headers=bearer("a")).status_code == 200
        assert_limited(server.post(short, headers=bearer("a")), "3 requests a minute", 15, 20)
        with pytest.raises(RateLimitError):
            server.openai("a").chat.completions.create(**short)
        assert server.post(seen, headers=bearer("b")).status_code == 200
        assert_limited(server.post(seen, headers=bearer("b")), "10 image patches a minute", 2, 10**6)
        assert server.post(short, headers=bearer("b")).status_code == 200
        for body in (short, seen):
            assert server.post(body, headers=bearer("c")).status_code == 200
        assert_error(server.post(short, headers=bearer("d")), 401, "invalid_api_key")
        assert server.metric("siglane_key_requests_total", key="few", outcome="ok") == 3
        eventually(lambda: server.metric("siglane_key_requests_total", key="few", outcome="rejected") == 2)


def test_requests_at_a_time(processor: Processor, engine: EngineProcess, tmp_path: Path) -> None:
    file = key_file(tmp_path, 'key = "a"\nconcurrency = 1', 'key = "b"')
    with running(processor, engine, api_keys=file) as server, server.http() as client:
        with client.stream("POST", CHAT, json={**LONG, "stream": True}, headers=bearer("a")) as response:
            lines = response.iter_lines()
            next(lines)
            assert_limited(server.post(chat("x"), headers=bearer("a")), "1 requests at a time", 1, 1)
            assert server.post(chat("x"), headers=bearer("b")).status_code == 200
        eventually(lambda: server.metric("siglane_requests_in_flight") == 0)
        assert server.post(chat("x"), headers=bearer("a")).status_code == 200


def test_keys_share_no_cache(processor: Processor, engine: EngineProcess, tmp_path: Path) -> None:
    """Unless the operator says so; a request's own salt divides further, and never joins."""
    file = key_file(
        tmp_path,
        *(
            f'key = "{key}"' + (f'\ncache_salt = "{key[0]}"' if key[0] == "w" else "")
            for key in ("u1", "v", "w1", "w2")
        ),
    )
    body = chat("A prompt of many words, of which there is more than one page " * 4, max_tokens=1)

    def cached(server: RunningServer, key: str, **fields: str) -> bool:
        usage = server.post({**body, **fields}, headers=bearer(key)).json()["usage"]
        return bool(usage["prompt_tokens_details"]["cached_tokens"])

    with running(processor, engine, api_keys=file) as server:
        found = [cached(server, key) for key in ("u1", "u1", "v", "v", "w1", "w2")]
        assert found == [False, True, False, True, False, True]
        assert [cached(server, key, cache_salt="own") for key in ("u1", "u1", "v")] == [False, True, False]
        assert not cached(server, "u1", cache_salt="w")


def abort(server: RunningServer, key: str, **body: object) -> dict[str, list[str]]:
    with server.http() as client:
        response = client.post("/abort", json=body, headers=bearer(key))
    assert response.status_code == 200, response.text
    found: dict[str, list[str]] = response.json()
    return found


@pytest.fixture(scope="module")
def both(
    processor: Processor, engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """With the keys a and b."""
    file = key_file(tmp_path_factory.mktemp("keys"), "a", "b")
    with running(processor, engine, api_keys=file, allow_private_addresses=True, image_timeout=30.0) as server:
        yield server


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_stream_is_aborted_by_the_id_of_its_answer(path: str, both: RunningServer) -> None:
    """Others' requests are unknown to a key, whatever their ids."""
    body = {**LONG, "stream": True}
    if path != CHAT:
        body["prompt"] = "x"
        del body["messages"]
    aborted = both.metric("siglane_key_requests_total", key=owner_of("a")[:8], outcome="cancelled")
    with both.http() as client, client.stream("POST", path, json=body, headers=bearer("a")) as response:
        events = read_events(response.iter_lines())
        answer_id = json.loads(next(events))["id"]
        assert abort(both, "b", request_id=answer_id) == {"aborted": [], "unknown": [answer_id]}
        assert abort(both, "a", rid=answer_id) == {"aborted": [answer_id], "unknown": []}
        rest = list(events)
    assert rest[-1] == "[DONE]"
    assert json.loads(rest[-2])["error"]["code"] == "request_aborted"
    assert not any('"finish_reason":"' in data for data in rest)
    eventually(lambda: both.metric("siglane_requests_in_flight") == 0)
    assert abort(both, "a", request_id=answer_id)["unknown"] == [answer_id]
    eventually(lambda: both.metric("siglane_key_requests_total", key=owner_of("a")[:8], outcome="cancelled") > aborted)


def test_a_whole_answer_and_one_that_waits_for_its_picture_are_aborted(both: RunningServer) -> None:
    with socket.create_server((HOST, 0)) as site, ThreadPoolExecutor(2) as clients:  # a site that never answers
        slow = chat(image_url(f"http://{HOST}:{site.getsockname()[1]}/x.png"), "x")
        asked = {
            name: clients.submit(both.post, body, headers={**bearer("a"), "x-request-id": name})
            for name, body in (("long", LONG), ("slow", slow))
        }
        eventually(lambda: both.metric("siglane_requests_in_flight") == 2)
        assert abort(both, "a", request_ids=["long", "slow", "none"]) == {
            "aborted": ["long", "slow"],
            "unknown": ["none"],
        }
        for answer in asked.values():
            assert_error(answer.result(), 499, "request_aborted")
    eventually(lambda: both.metric("siglane_requests_in_flight") == 0)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({}, "missing_field"),
        ({"rid": "x", "request_id": "x"}, "missing_field"),
        ({"request_id": 1}, "invalid_value"),
        ({"request_ids": []}, "invalid_value"),
        ({"request_ids": ["x"] * 1025}, "invalid_value"),
        ({"rid": "x", "abort_all": True}, "unsupported_field"),
    ],
)
def test_what_is_no_abort(body: dict[str, Any], code: str, both: RunningServer) -> None:
    with both.http() as client:
        assert_error(client.post("/abort_request", json=body, headers=bearer("a")), 400, code)
        assert_error(client.post("/abort", json=body), 401, "invalid_api_key")


def test_aborts_harm_no_neighbour(server: RunningServer, alone: Told) -> None:
    def fault() -> None:
        for _ in range(3):
            with ThreadPoolExecutor(1) as clients, server.http() as client:
                asked = clients.submit(server.post, LONG, headers={"x-request-id": "mine"})
                body = {"request_id": "mine"}
                eventually(lambda: bool(client.post("/abort", json=body).json()["aborted"]))  # noqa: B023
                assert_error(asked.result(), 499, "request_aborted")

    assert_unharmed(server, alone, fault)


def test_rows_of_a_batch_wait_for_their_key(processor: Processor, engine: EngineProcess, tmp_path: Path) -> None:
    """None is refused, and the key's client is not kept waiting by them."""
    file = key_file(tmp_path, 'key = "a"\nrequests_per_minute = 600\nconcurrency = 2\nmax_queued_rows = 8')
    clock = [0.0]
    with running(processor, engine, api_keys=file, data_dir=tmp_path / "data") as server:
        mine = server.served.clients.by_key["a"]
        mine._requests = Bucket(10, lambda: clock[0])  # of which batches may have five
        client = server.openai("a")
        rows = [{"custom_id": str(n), "method": "POST", "url": CHAT, "body": chat("x", max_tokens=1)} for n in range(9)]
        text = "\n".join(map(json.dumps, rows))
        too_many = client.files.create(file=("rows.jsonl", text.encode()), purpose="batch")
        eight = client.files.create(file=("rows.jsonl", text.rpartition("\n")[0].encode()), purpose="batch")

        def create(file_id: str) -> str:
            return client.batches.create(endpoint=CHAT, input_file_id=file_id, completion_window="24h").id

        refused, batch_id = create(too_many.id), create(eight.id)
        eventually(lambda: client.batches.retrieve(refused).status == "failed")
        eventually(lambda: mine._requests.wait(keep=0.5) > 0)
        time.sleep(0.2)
        assert mine._requests.wait() == 0
        assert server.post(chat("x", max_tokens=1), headers=bearer("a")).status_code == 200
        assert client.batches.retrieve(batch_id).status == "in_progress"
        clock[0] += 60
        eventually(lambda: client.batches.retrieve(batch_id).status == "completed")
        counts = client.batches.retrieve(batch_id).request_counts
        assert counts is not None
        assert (counts.completed, counts.failed) == (8, 0)
