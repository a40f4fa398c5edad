"""The OpenAPI document is valid, says what the server does, and its examples are answered."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.openapi.models import OpenAPI
from serving import CHAT, RunningServer, chat, config_of, listening, running, stream
from two_tower_checkpoint import write_two_tower_checkpoint

from siglane.engine.process.child import EngineSpec
from siglane.engine.process.supervisor import EngineProcess
from siglane.families.processor import Processor
from siglane.server.launch import serving
from siglane.settings.engine import EngineConfig

PROBES = ("/health", "/ready", "/metrics")
BODIES = (CHAT, "/v1/responses", "/v1/embeddings", "/v1/classify", "/v1/images/view", "/abort")


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder: Path = tmp_path_factory.mktemp("two_tower") / "siglip2"
    write_two_tower_checkpoint(folder, "siglip2")
    with serving(config_of(), EngineSpec(str(folder), EngineConfig(device="cpu", threads=1))) as served:
        served.engine.wait_ready()
        with listening(served) as one:
            yield one


@pytest.fixture(scope="module", params=["server", "embedding", "stored"])
def either(request: pytest.FixtureRequest) -> RunningServer:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, RunningServer)
    return found


def document(server: RunningServer) -> dict[str, Any]:
    with server.http() as client:
        found: dict[str, Any] = client.get("/openapi.json").json()
        assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
    return found


@pytest.fixture(scope="module")
def told(either: RunningServer) -> dict[str, Any]:
    return document(either)


def operations(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {path: one for path, methods in found["paths"].items() for one in methods.values()}


def references(value: Any) -> Iterator[str]:
    match value:
        case dict():
            if isinstance(found := value.get("$ref"), str):
                yield found
            for inner in value.values():
                yield from references(inner)
        case list():
            for inner in value:
                yield from references(inner)


def test_it_is_an_openapi_document(told: dict[str, Any]) -> None:
    OpenAPI.model_validate(told)
    assert told["openapi"].startswith("3.1")
    schemas = told["components"]["schemas"]
    used = set(references(told))
    assert used == {f"#/components/schemas/{name}" for name in schemas}  # none is missing, none is left over
    every = [(path, one) for path, methods in told["paths"].items() for one in methods.values()]
    names = [one["operationId"] for _, one in every]
    assert len({*names}) == len(names)
    for path, one in every:
        in_path = {parameter["name"] for parameter in one.get("parameters", ()) if parameter["in"] == "path"}
        assert in_path == {name.partition(":")[0] for name in re.findall(r"{(.*?)}", path)}
        for status, response in one["responses"].items():
            assert re.fullmatch("[1-5][0-9][0-9]", status)  # no wildcards
            assert response["description"]
            assert all(content.get("schema") or content["itemSchema"] for content in response["content"].values())


def test_every_status_is_named(told: dict[str, Any]) -> None:
    found = operations(told)
    assert {path: set(found[path]["responses"]) for path in PROBES} == {
        "/health": {"200", "503"}, "/ready": {"200", "503"}, "/metrics": {"200"},
    }  # fmt: skip
    for path in BODIES:
        if path in found:
            assert set(found[path]["responses"]) == {
                *["200", "400", "401", "404", "408", "413", "415", "429", "499", "500", "503"]
            }
            failed = [one for status, one in found[path]["responses"].items() if status != "200"]
            refs = {one["content"]["application/json"]["schema"]["$ref"] for one in failed}
            assert refs == {"#/components/schemas/ErrorBody"}
    assert set(found["/metrics"]["responses"]["200"]["content"]) == {"text/plain"}


def test_a_chat_is_json_or_a_stream(server: RunningServer) -> None:
    found = document(server)
    content = operations(found)[CHAT]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
    request = found["components"]["schemas"]["ChatCompletionRequest"]
    assert "messages" in request["required"]
    assert request["properties"]["model"]["enum"] == ["tiny", None]
    assert request["properties"]["max_tokens"]["anyOf"][0]["maximum"] == server.served.chat.context_length
    assert request["properties"]["stop"]["anyOf"][1]["maxItems"] == 16
    assert "thinking_budget" not in request["properties"]  # this model does not think
    with server.http() as client, client.stream("POST", CHAT, json=chat("x", stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        response.read()


def test_the_key_is_a_scheme_and_probes_need_none(processor: Processor, engine: EngineProcess) -> None:
    with running(processor, engine, api_key="key") as server, server.http() as client:
        found = client.get("/openapi.json", headers={"authorization": "Bearer key"}).json()
    assert found["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    assert found["security"] == [{"key": []}]
    for path, one in operations(found).items():
        assert one.get("security") == ([] if path in PROBES else None)


def test_it_is_open_where_no_key_is_asked_for(server: RunningServer) -> None:
    assert document(server)["security"] == [{"key": []}, {}]


def test_every_example_is_answered(either: RunningServer, told: dict[str, Any]) -> None:
    asked = 0
    for path, one in operations(told).items():
        if path not in BODIES:
            continue
        for name, example in one["requestBody"]["content"]["application/json"]["examples"].items():
            body = example["value"]
            if body.get("stream") and path == CHAT:
                assert stream(either, body).done
            else:
                with either.http() as client:
                    response = client.post(path, json=body)
                assert response.status_code == 200, (path, name, response.text)
                assert "x-siglane-ignored-fields" not in response.headers
            asked += 1
    assert asked >= 4
