"""`/v1/files` and `/v1/batches` by the `openai` client: every answer once, whatever stops the server."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import APIStatusError, OpenAI
from openai.types import Batch as ClientBatch
from ports import free_port
from serving import (
    CHAT,
    LEAKS,
    MODEL,
    RunningServer,
    ask_good,
    assert_error,
    chat,
    image_part,
    key_file,
    picture,
    running,
)
from waiting import eventually, wait_for_lines

from siglane.batch.form import Answer
from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import RESTART_WINDOW_SECONDS, EngineProcess
from siglane.errors import UserError
from siglane.families.processor import Processor
from siglane.server.local import LocalServer
from siglane.server.stored import batch_runner
from siglane.server.stored.deaths import MOST_DEATHS, DeathBudget
from siglane.server.stored.store import Batch, Store, StoredFile, new_id
from siglane.types import Request

Start = Callable[..., Any]
KEY = "a-key-of-somebody"
ANSWERED = 3  # rows of a batch that is held
ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture
def start(processor: Processor, engine: EngineProcess, tmp_path: Path) -> Start:
    """A server over the same folder, whenever it is called."""

    @contextmanager
    def begin(**options: Any) -> Iterator[RunningServer]:
        with running(processor, engine, data_dir=tmp_path / "data", **options) as server:
            yield server

    return begin


@pytest.fixture
def stored(start: Start) -> Iterator[RunningServer]:
    with start() as server:
        yield server


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Batches get so many answers and wait for more until it is undone."""
    ask, given = LocalServer.ask, count(1)

    async def ask_some(self: LocalServer, url: str, body: Mapping[str, Any]) -> Answer:
        if next(given) > ANSWERED:
            await asyncio.Event().wait()
        return await ask(self, url, body)

    with monkeypatch.context() as patch:
        patch.setattr(LocalServer, "ask", ask_some)
        patch.setattr(batch_runner, "COUNT_SECONDS", 0.0)
        yield patch


def stopped_in_the_middle(client: OpenAI, *lines: str) -> str:
    """A batch of which ANSWERED rows are answered, and not one more."""
    batch_id = create(client, upload(client, *lines)).id

    def answered() -> bool:
        counts = client.batches.retrieve(batch_id).request_counts
        return counts is not None and counts.completed == ANSWERED

    eventually(answered)
    return batch_id


def line(number: int, url: str = CHAT, **fields: Any) -> str:
    body = chat(image_part(picture(30 + number % 3, 30, seed=number % 3)), f"Question {number}?", **fields)
    return json.dumps({"custom_id": f"row {number}", "method": "POST", "url": url, "body": body})


def text_of(*lines: str) -> bytes:
    return "\n".join(lines).encode()


def upload(client: OpenAI, *lines: str, name: str = "in.jsonl") -> str:
    return client.files.create(file=(name, text_of(*lines)), purpose="batch").id


def create(client: OpenAI, file_id: str, **fields: Any) -> ClientBatch:
    return client.batches.create(input_file_id=file_id, **{"endpoint": CHAT, "completion_window": "24h", **fields})


def ended(client: OpenAI, batch_id: str) -> ClientBatch:
    eventually(lambda: client.batches.retrieve(batch_id).status in ENDED)
    return client.batches.retrieve(batch_id)


def rows_of(client: OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(one) for one in client.files.content(file_id).text.splitlines()]


def refused(call: Callable[[], object]) -> tuple[int, str | None]:
    with pytest.raises(APIStatusError) as error:
        call()
    return error.value.status_code, error.value.code


def test_from_upload_to_download(stored: RunningServer) -> None:
    client = stored.openai()
    lines = [line(number) for number in range(5)]
    lines[1:1] = ["{not JSON", "", line(0), line(9, model="gpt-4o")]
    data = text_of(*lines)
    file = client.files.create(file=("dir/../my rows.jsonl", data), purpose="batch")
    assert (file.filename, file.bytes, file.purpose, file.status) == ("my rows.jsonl", len(data), "batch", "processed")
    assert client.files.content(file.id).content == data
    assert client.files.retrieve(file.id) == file

    batch = create(client, file.id, metadata={"for": "a test"})
    assert (batch.object, batch.status, batch.endpoint) == ("batch", "validating", CHAT)
    assert (batch.model, batch.usage) == (MODEL, None)
    assert batch.expires_at == batch.created_at + 24 * 3600
    found = ended(client, batch.id)
    assert (found.status, found.metadata, found.errors) == ("completed", {"for": "a test"}, None)
    assert found.request_counts is not None
    assert found.request_counts.model_dump() == {"total": 8, "completed": 5, "failed": 3}
    assert found.created_at <= (found.in_progress_at or 0) <= (found.finalizing_at or 0) <= (found.completed_at or 0)

    answers = {row["custom_id"]: row for row in rows_of(client, found.output_file_id)}
    assert answers.keys() == {f"row {number}" for number in range(5)}
    for row in answers.values():
        asked = json.loads(lines[0]) if row["custom_id"] == "row 0" else None
        assert row["response"]["status_code"] == 200
        if asked is not None:
            assert row["response"]["body"]["choices"] == stored.post(asked["body"]).json()["choices"]
    used = [row["response"]["body"]["usage"] for row in answers.values()]
    assert found.usage is not None
    assert found.model == MODEL
    assert found.usage.model_dump() == {
        "input_tokens": sum(one["prompt_tokens"] for one in used),
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": sum(one["completion_tokens"] for one in used),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": sum(one["total_tokens"] for one in used),
    }
    errors = [(row["line"], row["error"]["code"]) for row in rows_of(client, found.error_file_id)]
    assert sorted(errors) == [(2, "invalid_json"), (4, "duplicate_custom_id"), (5, "model_not_found")]

    assert client.files.retrieve(found.output_file_id or "").purpose == "batch_output"
    assert [one.id for one in client.batches.list()] == [batch.id]
    assert {one.id for one in client.files.list()} == {file.id, found.output_file_id, found.error_file_id}
    assert client.files.delete(file.id).deleted
    assert refused(lambda: client.files.retrieve(file.id)) == (404, "file_not_found")
    assert refused(lambda: client.files.content(file.id)) == (404, "file_not_found")
    assert refused(lambda: client.batches.cancel(batch.id)) == (409, "invalid_status")
    assert stored.served.inflight_bytes.used == 0


def test_a_restarted_server_finishes_it(start: Start, held: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lines = [line(number) for number in range(12)] + ["torn {"]
    with start() as server:
        batch_id = stopped_in_the_middle(server.openai(), *lines)
    store = Store(tmp_path / "data")
    assert store.batch(batch_id).status == "in_progress"
    before = store.output_path(batch_id).read_bytes()
    store.close()
    assert before.count(b"\n") == ANSWERED
    held.undo()
    with start() as server:
        client = server.openai()
        found = ended(client, batch_id)
        assert found.request_counts is not None
        assert found.request_counts.model_dump() == {"total": 13, "completed": 12, "failed": 1}
        assert client.files.content(found.output_file_id or "").content.startswith(before)
        answers = {row["custom_id"]: row["response"]["body"] for row in rows_of(client, found.output_file_id)}
        assert answers.keys() == {f"row {number}" for number in range(12)}
        for number in (0, 11):
            expected = server.post(json.loads(lines[number])["body"]).json()
            assert answers[f"row {number}"]["choices"] == expected["choices"]


def test_another_server_does_not_go_on(start: Start, held: pytest.MonkeyPatch) -> None:
    """The rest would not be what the beginning is: it fails and keeps what there is."""
    with start() as server:
        batch_id = stopped_in_the_middle(server.openai(), *map(line, range(12)))
    held.undo()
    with start(default_temperature=0.5) as server:
        client = server.openai()
        found = ended(client, batch_id)
        assert found.status == "failed"
        assert found.errors is not None
        assert [(one.code, one.param) for one in found.errors.data or ()] == [("another_server", "default_temperature")]
        assert len(rows_of(client, found.output_file_id)) == ANSWERED


def test_cancelled_it_keeps_what_is_answered(stored: RunningServer, held: pytest.MonkeyPatch) -> None:
    client = stored.openai()
    batch_id = stopped_in_the_middle(client, *map(line, range(80)))
    file_id = client.batches.retrieve(batch_id).input_file_id
    assert refused(lambda: client.files.delete(file_id)) == (409, "file_in_use")
    assert client.batches.cancel(batch_id).status == "cancelling"
    found = ended(client, batch_id)
    assert found.status == "cancelled"
    assert found.cancelled_at is not None
    assert len(rows_of(client, found.output_file_id)) == ANSWERED
    assert client.files.delete(file_id).deleted
    eventually(lambda: stored.served.inflight_bytes.used == 0)
    assert ask_good(stored).done


def test_one_that_waits_for_its_turn_is_cancelled_at_once(stored: RunningServer, held: pytest.MonkeyPatch) -> None:
    """A key's batches are answered one after the other."""
    client = stored.openai()
    first = stopped_in_the_middle(client, *map(line, range(8)))
    second = create(client, upload(client, line(1))).id
    eventually(lambda: client.batches.retrieve(second).status == "in_progress")
    client.batches.cancel(second)
    found = ended(client, second)
    assert (found.status, found.output_file_id) == ("cancelled", None)
    assert client.batches.retrieve(first).status == "in_progress"


@pytest.mark.parametrize(
    ("data", "fields", "codes"),
    [
        (b"\x89PNG\r\n\x1a\n\x00\x00", {}, ["invalid_json"] * 3),
        (line(1).encode("utf-16"), {}, ["invalid_input_file"]),
        (b"\n \n", {}, ["empty_file"]),
        (text_of(line(1), line(2, url="/v1/embeddings"), line(3, url="/v1/nothing")), {}, ["invalid_url"] * 2),
        (text_of(*map(line, range(4))), {"max_batch_rows": 3}, ["too_many_rows"]),
        (text_of(*map(line, range(4))), {"max_queued_rows": 3}, ["queue_limit_exceeded"]),
    ],
)
def test_an_input_that_cannot_be_used_fails(
    start: Start, data: bytes, fields: dict[str, Any], codes: list[str]
) -> None:
    with start(**fields) as server:
        client = server.openai()
        found = ended(client, create(client, client.files.create(file=("in", data), purpose="batch").id).id)
        assert (found.status, found.output_file_id, found.error_file_id) == ("failed", None, None)
        assert found.errors is not None
        assert [one.code for one in found.errors.data or ()] == codes
        assert not LEAKS.search(found.to_json())
        if codes == ["invalid_url"] * 2:
            assert [one.line for one in found.errors.data or ()] == [2, 3]


def test_what_cannot_be_created(stored: RunningServer) -> None:
    client = stored.openai()
    file_id = upload(client, line(1))
    assert refused(lambda: create(client, "file-none")) == (404, "file_not_found")
    assert refused(lambda: create(client, file_id, endpoint="/v1/embeddings")) == (400, "invalid_value")
    assert refused(lambda: create(client, file_id, endpoint="/v1/files")) == (400, "invalid_value")
    assert refused(lambda: create(client, file_id, completion_window="soon")) == (400, "invalid_value")
    assert refused(lambda: create(client, file_id, metadata={"x": "y" * 513})) == (400, "invalid_value")
    assert refused(lambda: create(client, file_id, metadata={str(n): "" for n in range(17)})) == (400, "invalid_value")
    assert refused(lambda: create(client, file_id, extra_body={"priority": 1})) == (400, "invalid_value")
    assert refused(lambda: client.batches.retrieve("batch_none")) == (404, "batch_not_found")
    assert refused(lambda: client.batches.cancel("batch_none")) == (404, "batch_not_found")
    assert client.batches.list().data == []


def test_pages(stored: RunningServer) -> None:
    client = stored.openai()
    names = [client.files.create(file=(f"{n}", b"x" * (n + 1)), purpose="batch").id for n in range(5)]
    batches = [create(client, names[0]).id for _ in range(5)]
    page = client.files.list(limit=2, order="asc")
    assert ([one.id for one in page.data], page.has_more) == (names[:2], True)
    assert [one.id for one in client.files.list(limit=2, order="asc")] == names  # from page to page
    assert [one.id for one in client.files.list()] == names[::-1]
    assert [one.id for one in client.files.list(after=names[2])] == names[1::-1]
    assert client.files.list(purpose="batch_output").data == []
    assert [one.id for one in client.batches.list(limit=2)] == batches[::-1]
    with stored.http() as http:
        found = http.get("/v1/files?limit=2").json()
        assert (found["first_id"], found["last_id"], found["has_more"]) == (names[4], names[3], True)
        assert_error(http.get("/v1/files?after=file-none"), 400, "invalid_value", "after")
        assert_error(http.get("/v1/files?limit=0"), 400, "invalid_value", "limit")
        assert_error(http.get("/v1/files?order=up"), 400, "invalid_value", "order")
        assert_error(http.get("/v1/batches?limit=101"), 400, "invalid_value", "limit")


def test_a_key_sees_its_own_alone(start: Start, tmp_path: Path) -> None:
    with start(api_key=KEY, api_keys=key_file(tmp_path, "two", "three")) as server:
        mine, other = server.openai(KEY), server.openai("two")
        assert refused(lambda: server.openai("four").files.list()) == (401, "invalid_api_key")
        file_id = upload(mine, line(1))
        batch = ended(mine, create(mine, file_id).id)
        assert other.files.list().data == []
        assert other.batches.list().data == []
        for call in (other.files.retrieve, other.files.content, other.files.delete):
            assert refused(lambda call=call: call(file_id)) == (404, "file_not_found")  # type: ignore[misc]
            assert refused(lambda call=call: call(batch.output_file_id)) == (404, "file_not_found")  # type: ignore[misc]
        assert refused(lambda: create(other, file_id)) == (404, "file_not_found")
        assert refused(lambda: other.batches.retrieve(batch.id)) == (404, "batch_not_found")
        assert refused(lambda: other.batches.cancel(batch.id)) == (404, "batch_not_found")
        assert refused(lambda: other.files.list(after=file_id).data) == (400, "invalid_value")
        assert len(mine.files.list().data) == 2
        kept = b"".join(path.read_bytes() for path in (tmp_path / "data").iterdir() if path.is_file())
        assert batch.id.encode() in kept
        assert KEY.encode() not in kept
    with start(api_key=KEY) as server:  # the key stands for its owner after a restart too
        assert server.openai(KEY).files.retrieve(file_id).id == file_id


def test_without_its_key_a_batch_waits(
    start: Start, held: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody may ask in its name; others' go on, and so does it when the key is back."""
    both, one = key_file(tmp_path, "one", "two"), tmp_path / "one.txt"
    one.write_text("one")
    with start(api_keys=both) as server:
        batch_id = stopped_in_the_middle(server.openai("two"), *map(line, range(8)))
    held.undo()
    with start(api_keys=one) as server:
        client = server.openai("one")
        for _ in range(2):
            assert ended(client, create(client, upload(client, line(1))).id).status == "completed"
    assert [row.message for row in caplog.records if "its key" in row.message] == [
        f"batch {batch_id} waits: its key is none of the server's"
    ]
    store = Store(tmp_path / "data")
    assert (store.batch(batch_id).status, store.batch(batch_id).completed) == ("in_progress", ANSWERED)
    store.close()
    with start() as server:  # open to all: neither theirs
        eventually(lambda: sum("its key" in row.message for row in caplog.records) == 2)
    with start(api_keys=both) as server:
        found = ended(client := server.openai("two"), batch_id)
        assert found.status == "completed"
        assert len(rows_of(client, found.output_file_id)) == 8


def test_limits_of_uploads(start: Start, tmp_path: Path) -> None:
    with start(api_key="a", api_keys=key_file(tmp_path, "b"), max_file_bytes=5000, max_stored_bytes=8000) as server:
        client = server.openai("a")
        files = server.served.config.data_dir / "files"  # type: ignore[operator]
        assert refused(lambda: upload(client, "x" * 5001)) == (413, "file_too_large")
        kept = upload(client, "x" * 5000)
        assert refused(lambda: upload(client, "x" * 3001)) == (413, "file_too_large")
        assert refused(lambda: upload(client, "")) == (400, "empty_file")
        assert refused(lambda: client.files.create(file=b"x", purpose="vision")) == (400, "invalid_value")
        upload(client, "x" * 3000)
        assert refused(lambda: upload(client, "x")) == (413, "storage_limit_exceeded")
        upload(server.openai("b"), "x" * 5000)
        client.files.delete(kept)
        upload(client, "x")
        assert len(list(files.iterdir())) == 3  # nothing is left of what was refused
        expiring = client.files.create(
            file=b"x", purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
        )
        assert expiring.expires_at == expiring.created_at + 3600


def test_without_a_folder_they_are_not_served(server: RunningServer) -> None:
    with server.http() as http:
        for method, path in (
            ("POST", "/v1/files"), ("GET", "/v1/files"), ("DELETE", "/v1/files/x"), ("GET", "/v1/files/x/content"),
            ("POST", "/v1/batches"), ("GET", "/v1/batches/x"), ("POST", "/v1/batches/x/cancel"),
        ):  # fmt: skip
            response = http.request(method, path)
            assert_error(response, 404, "not_found")
            assert "--data-dir" in response.json()["error"]["message"]
        assert not any("/v1/files" in path for path in http.get("/openapi.json").json()["paths"])


def test_the_schema_has_them(stored: RunningServer) -> None:
    with stored.http() as http:
        paths = http.get("/openapi.json").json()["paths"]
    assert {path: set(methods) for path, methods in paths.items() if path.startswith(("/v1/files", "/v1/batches"))} == {
        "/v1/files": {"get", "post"},
        "/v1/files/{file_id}": {"get", "delete"},
        "/v1/files/{file_id}/content": {"get"},
        "/v1/batches": {"get", "post"},
        "/v1/batches/{batch_id}": {"get"},
        "/v1/batches/{batch_id}/cancel": {"post"},
    }
    assert "multipart/form-data" in paths["/v1/files"]["post"]["requestBody"]["content"]


def test_its_requests_yield(stored: RunningServer, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Request] = []
    submit = engine.submit

    def watch(requests: Any, on_delta: Any) -> None:
        seen.extend(requests)
        submit(requests, on_delta)

    monkeypatch.setattr(engine, "submit", watch)
    client = stored.openai()
    ended(client, create(client, upload(client, line(1))).id)
    assert stored.post(chat("hello")).status_code == 200
    assert [one.batch for one in seen] == [True, False]


DEADLY = 13  # tokens that a row asks for which ends its engine


def die_of_some(deaths: Path) -> None:
    """In the child, before it loads: requests for DEADLY tokens end it, and add a byte to a file."""
    from siglane.engine.engine import Engine

    add = Engine.add

    def poisoned(self: Engine, request: Request) -> None:
        if request.max_tokens == DEADLY:
            with deaths.open("ab") as file:
                file.write(b".")
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, request)

    Engine.add = poisoned  # type: ignore[method-assign]


@pytest.mark.slow
def test_rows_that_kill_the_engine_cost_themselves_alone(
    processor: Processor, spec: EngineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three do so whenever they run. They may end the engine twice in a while; the server and its clients go on."""
    deaths, now, seen = tmp_path / "deaths", [0.0], [0]
    deaths.write_bytes(b"")
    monkeypatch.setattr(batch_runner, "DeathBudget", lambda seconds: DeathBudget(seconds, lambda: now[0]))
    monkeypatch.setattr("siglane.server.local.LONGEST_WAIT", 0.05)
    engine = EngineProcess(spec, restarts_allowed=20, prepare=partial(die_of_some, deaths))
    engine.start()
    try:
        with running(processor, engine, data_dir=tmp_path / "data") as server:
            client = server.openai()
            lines = [line(number, max_tokens=DEADLY if number in (2, 5, 6) else 4) for number in range(8)]
            batch_id = create(client, upload(client, *lines)).id

            def ended_or_waits() -> bool:
                batch = client.batches.retrieve(batch_id)
                return batch.status in ENDED or "engine died 2 times" in str(batch.errors)

            while client.batches.retrieve(batch_id).status not in ENDED:
                eventually(ended_or_waits, 120)
                eventually(lambda: server.post(chat("hello")).status_code == 200, 120)
                seen.append(len(deaths.read_bytes()))
                now[0] += RESTART_WINDOW_SECONDS  # of the batches alone: no time passes for them but here
            found = ended(client, batch_id)
            assert (found.status, found.errors) == ("completed", None)
            assert {row["custom_id"] for row in rows_of(client, found.output_file_id)} == {
                f"row {number}" for number in (0, 1, 3, 4, 7)
            }
            errors = rows_of(client, found.error_file_id)
            assert {row["custom_id"]: row["error"]["code"] for row in errors} == {
                f"row {number}": "engine_died" for number in (2, 5, 6)
            }
    finally:
        engine.close()
    assert 4 <= seen[-1] <= 6  # each row is asked twice, the second time alone; what they are first may be one engine
    assert all(later - earlier <= MOST_DEATHS for earlier, later in pairwise(seen))


def test_what_is_out_of_time_expires(start: Start, held: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with start() as server:
        batch_id = stopped_in_the_middle(server.openai(), *map(line, range(9)), "torn {")
    store = Store(tmp_path / "data")
    store.update(batch_id, lambda one: replace(one, expires_at=int(time.time()) - 1))
    store.close()
    with start() as server:
        client = server.openai()
        found = ended(client, batch_id)
        assert found.status == "expired"
        assert found.expired_at is not None
        assert len(rows_of(client, found.output_file_id)) == ANSWERED
        codes = [row["error"]["code"] for row in rows_of(client, found.error_file_id)]
        assert sorted(codes) == ["batch_expired"] * (9 - ANSWERED) + ["invalid_json"]
        assert found.request_counts is not None
        assert found.request_counts.model_dump() == {"total": 10, "completed": ANSWERED, "failed": 10 - ANSWERED}


def test_time_runs_out_while_it_is_answered(stored: RunningServer, held: pytest.MonkeyPatch) -> None:
    client = stored.openai()
    batch_id = stopped_in_the_middle(client, *map(line, range(9)))
    held.setattr(batch_runner, "_is_late", lambda _: True)
    found = ended(client, batch_id)
    assert found.status == "expired"
    assert len(rows_of(client, found.error_file_id)) == 9 - ANSWERED


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Of all that this process writes, bytecode left out; what is longer is refused as on a full disk."""
    before, writes_none = resource.getrlimit(resource.RLIMIT_FSIZE), sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        sys.dont_write_bytecode = writes_none


@pytest.mark.slow  # a server is started
def test_a_full_disk_stops_a_batch_and_nothing_else(stored: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_runner, "PAUSE_SECONDS", 0.5)
    client = stored.openai()
    lines = [line(n, max_tokens=40, ignore_eos=True, logprobs=True, top_logprobs=20) for n in range(12)]
    file_id = upload(client, *lines)
    with files_of_at_most(400_000):
        assert refused(lambda: upload(client, "x" * 500_000)) == (507, "storage_full")
        batch_id = create(client, file_id).id
        eventually(lambda: client.batches.retrieve(batch_id).errors is not None)
        waiting = client.batches.retrieve(batch_id)
        assert waiting.status == "in_progress"
        assert waiting.errors is not None
        (problem,) = waiting.errors.data or ()
        assert (problem.code, "disk is full" in (problem.message or "")) == ("waiting", True)
        assert stored.post(chat("hello")).status_code == 200
    found = ended(client, batch_id)
    assert (found.status, found.errors) == ("completed", None)
    assert {row["custom_id"] for row in rows_of(client, found.output_file_id)} == {f"row {n}" for n in range(12)}
    assert not list((stored.served.config.data_dir or Path()).glob("files/*.part"))


def test_a_full_disk_under_sqlite(start: Start, tmp_path: Path) -> None:
    with start() as server:
        client = server.openai()
        file_id = upload(client, line(1))
        with files_of_at_most(1000):
            assert refused(lambda: create(client, file_id)) == (507, "storage_full")
            assert client.files.retrieve(file_id).id == file_id
            assert client.batches.list().data == []
        assert ended(client, create(client, file_id).id).status == "completed"


# --- the store


def test_a_folder_is_one_servers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(UserError, match="another server's"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used"):
        Store(tmp_path / "file" / "below")


def stored_batch(**fields: Any) -> Batch:
    needed = {"owner": "", "input_file_id": "file-x", "endpoint": CHAT, "completion_window": "24h"}
    return Batch(id=new_id("batch_"), created_at=1, expires_at=2, file_seconds=0, **needed, **fields)


def test_a_kill_between_the_files_and_the_end_of_a_batch(tmp_path: Path) -> None:
    """The answers were moved, the database does not know: ending it again finds them, a sweep leaves them alone."""
    store = Store(tmp_path)
    add_file(store, "file-x")
    batch = stored_batch(status="finalizing")
    store.add_batch(batch)
    answer = json.dumps({"response": {"body": {"usage": {"prompt_tokens": 2, "total_tokens": 3}}}}).encode()
    store.output_path(batch.id).write_bytes(answer)

    def die(one: Batch) -> Batch:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Batch, "turned", lambda self, *_, **__: die(self))
        with pytest.raises(KeyboardInterrupt):
            store.finish(batch.id, "completed")
    (tmp_path / "files" / "file-unknown").write_bytes(b"")
    (tmp_path / "batches" / f"{new_id('batch_')}.jsonl").write_bytes(b"")
    store.close()

    store = Store(tmp_path)
    assert store.batch(batch.id).status == "finalizing"
    done = store.finish(batch.id, "completed")
    assert done.status == "completed"
    assert done.output_file_id is not None
    assert done.error_file_id is None
    assert store.path_of(done.output_file_id).read_bytes() == answer
    assert store.file(done.output_file_id, "").bytes == len(answer)
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"file-x", done.output_file_id}
    assert not list((tmp_path / "batches").iterdir())
    store.close()


def add_file(store: Store, name: str, expires_at: int | None = None) -> None:
    part = store.part_path()
    part.write_bytes(b"{}")
    store.add_file(StoredFile(name, "", "batch", "x", 2, 1, expires_at), part, 100)


def test_files_go_when_their_time_has_come(tmp_path: Path) -> None:
    store, now = Store(tmp_path), int(time.time())
    for name, expires in (("file-old", now - 1), ("file-read", now - 1), ("file-new", now + 100), ("file-kept", None)):
        add_file(store, name, expires)
    batch = replace(stored_batch(), input_file_id="file-read")
    store.add_batch(batch)
    store.expire_files()
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"file-read", "file-new", "file-kept"}
    store.finish(batch.id, "failed")
    store.expire_files()
    assert {path.name for path in (tmp_path / "files").iterdir()} == {"file-new", "file-kept"}
    store.close()


@pytest.mark.slow
def test_killed_it_goes_on(nvila_folder: Path, tmp_path: Path) -> None:
    """`siglane serve` by itself, killed twice: every answer once, those before a kill untouched."""
    command = ["serve", str(nvila_folder), "--data-dir", str(tmp_path), "--device", "cpu", "--threads", "1"]
    command += ["--kv-tokens", "16384", "--max-running", "2", "--port"]
    holding = Path(__file__).with_name("holding.py")
    lines = [line(number, max_tokens=30, ignore_eos=True, model=None) for number in range(40)]
    batch_id, output, before = "", Path(), b""
    for killed in (True, True, False):
        port = free_port()
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        program = [sys.executable, str(holding), "10" if killed else "40", *command, str(port)]
        with subprocess.Popen(program, stderr=subprocess.DEVNULL) as process:
            try:
                eventually(lambda port=port: is_ready(port))  # type: ignore[misc]
                if not batch_id:
                    batch_id = create(client, upload(client, *lines)).id
                    output = tmp_path / "batches" / f"{batch_id}.jsonl"
                assert not output.exists() or output.read_bytes().startswith(before)
                if killed:
                    wanted = before.count(b"\n") + 5
                    wait_for_lines(output, wanted, process)
                    process.kill()
                    process.wait()
                    before = output.read_bytes()
                    before = before[: before.rfind(b"\n") + 1]
                    continue
                found = ended(client, batch_id)
                answers = rows_of(client, found.output_file_id)
            finally:
                process.terminate()
    assert (found.status, len(answers)) == ("completed", 40)
    assert {row["custom_id"] for row in answers} == {f"row {number}" for number in range(40)}


def is_ready(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/ready", trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False
