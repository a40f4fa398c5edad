"""Bodies that schemathesis generates from the OpenAPI document: what it describes is what the server answers."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.hooks import HookContext
from schemathesis.schemas import APIOperation
from scripted_checkpoint import write_calling_checkpoint
from serving import RunningServer, config_of, listening
from two_tower_checkpoint import write_two_tower_checkpoint

from siglane.engine.process.child import EngineSpec
from siglane.server.launch import serving
from siglane.settings.engine import EngineConfig

EXAMPLES = 50  # of each operation and mode
CONTEXT = 512  # tokens: an answer that no field bounds ends soon
NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
# of the bodies that fit the document; what is left out are conditions between fields that JSON schema cannot say
LEAST_ANSWERED = {
    "POST /v1/chat/completions": 0.6,
    "POST /v1/completions": 0.6,
    "POST /v1/decisions": 0.2,  # what it generates is often longer than CONTEXT
    "POST /v1/systemone": 0.2,
    "POST /v1/score": 0.2,
    "POST /score": 0.2,
    "POST /v1/responses": 0.5,
    "POST /v1/messages": 0.2,
    "POST /v1/messages/count_tokens": 0.2,
    "POST /v1/embeddings": 0.4,
    "POST /v1/classify": 0.75,
    "POST /tokenize": 0.6,
    "POST /detokenize": 0.4,
    "POST /v1/images/tokens": 0.4,
    "POST /v1/images/view": 0.4,
    "POST /abort": 0.9,
    "POST /v1/files": 1.0,
    "POST /v1/batches": 1.0,
}
TOLD_OF_TOOLS = {
    "POST /v1/chat/completions",
    "POST /v1/responses",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /tokenize",
}


@schemathesis.hook
def before_load_schema(context: HookContext, raw_schema: dict[str, Any]) -> None:
    """A length beside a pattern is counted into it: 65,536 of a letter take seconds to compile, and no text that is
    drawn is as long."""
    stack: list[Any] = [raw_schema]
    while stack:
        found = stack.pop()
        if isinstance(found, dict):
            if "pattern" in found:
                found.pop("maxLength", None)
            stack.extend(found.values())
        elif isinstance(found, list):
            stack.extend(found)


def gif_url(color: str) -> str:
    """A picture, and a video of one frame."""
    file = io.BytesIO()
    Image.new("RGB", (20, 14), color).save(file, "GIF")
    return f"data:image/gif;base64,{base64.b64encode(file.getvalue()).decode()}"


URLS = [gif_url("red"), gif_url("blue")]
load_all_checks()
schemathesis.openapi.format("uri", st.sampled_from(URLS))


@pytest.fixture(scope="module")
def everything(nvila_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A model that chats, one that embeds, files and batches."""
    folder = tmp_path_factory.mktemp("everything")
    write_two_tower_checkpoint(folder / "siglip2", "siglip2")
    with started(nvila_folder, folder, tagger=str(folder / "siglip2")) as one:
        yield one


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A model whose chat template knows tools, and that reasons."""
    folder = tmp_path_factory.mktemp("caller")
    write_calling_checkpoint(folder / "tiny")
    with started(folder / "tiny", folder) as one:
        yield one


@contextmanager
def started(model: Path, folder: Path, **options: Any) -> Iterator[RunningServer]:
    spec = EngineSpec(str(model), EngineConfig(device="cpu", threads=1, kv_tokens=CONTEXT), **options)
    with serving(config_of(data_dir=folder / "data", max_images=64, max_videos=64), spec) as served:
        served.engine.wait_ready()
        with listening(served) as one:
            yield one


def file_of(server: RunningServer) -> str:
    line = b'{"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"input": "a cat"}}'
    return server.openai().files.create(file=("a.jsonl", line), purpose="batch").id


def batch_of(server: RunningServer) -> str:
    created = server.openai().batches.create(
        input_file_id=file_of(server), endpoint="/v1/embeddings", completion_window="24h"
    )
    return created.id


MADE: dict[str, Callable[[RunningServer], str]] = {"file_id": file_of, "batch_id": batch_of}


def with_ids(case: Case, server: RunningServer) -> None:
    """Ids that the server gave out, where any string fits the document."""
    for name in MADE.keys() & case.path_parameters.keys():
        case.path_parameters[name] = MADE[name](server)
    if case.operation.label == "POST /v1/batches":
        case.body["input_file_id"] = file_of(server)


def answered(server: RunningServer, operation: APIOperation[Any, Any, Any], mode: GenerationMode) -> Counter[str]:
    """How often each status or refusal came, to generated requests that fit the document (positive) or do not. What
    the document does not allow is raised."""
    found: Counter[str] = Counter()
    positive = mode is GenerationMode.POSITIVE
    checks = [CHECKS.get_one(name) for name in (*NAMES, *(() if positive else ("negative_data_rejection",)))]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Case) -> None:
        if positive:
            with_ids(case, server)
        response = case.call(timeout=60)
        found["200" if response.status_code == 200 else response.json()["error"]["message"]] += 1
        case.validate_response(response, checks=checks)

    ask()
    return found


def operations(server: RunningServer) -> dict[str, APIOperation[Any, Any, Any]]:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return {operation.label: operation for found in schema.get_all_operations() for operation in [found.ok()]}


@pytest.mark.slow
def test_much_of_it_is_answered_and_nothing_else(everything: RunningServer) -> None:
    operations_by_label = operations(everything)
    assert operations_by_label.keys() > LEAST_ANSWERED.keys()
    for label, operation in operations_by_label.items():
        found = answered(everything, operation, GenerationMode.POSITIVE)
        assert found["200"] >= LEAST_ANSWERED.get(label, 0) * found.total(), (label, found)
        if operation.body:  # nearly every string fits a path or a query
            assert not answered(everything, operation, GenerationMode.NEGATIVE)["200"], label


@pytest.mark.slow
@pytest.mark.parametrize("label", sorted(TOLD_OF_TOOLS))
def test_tools_are_read_as_they_are_described(calling: RunningServer, label: str) -> None:
    """Of what tells a model of tools; elsewhere they are refused, and the document has none."""
    operation = operations(calling)[label]
    found = answered(calling, operation, GenerationMode.POSITIVE)
    assert found["200"] >= 0.1 * found.total(), (label, found)  # most schemas have keywords that are refused
    assert not answered(calling, operation, GenerationMode.NEGATIVE)["200"], label
