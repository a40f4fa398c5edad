"""Every field that OpenAI's clients may send is honoured, refused by name, or named in the header of ignored ones."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from checkpoints import write_nvila_checkpoint
from openai.types import EmbeddingCreateParams
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartImageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionFunctionMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat.chat_completion_content_part_image_param import ImageURL
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)
from pydantic import ValidationError
from serving import (
    RunningServer,
    ask_good,
    assert_error,
    assert_unharmed,
    chat,
    image_part,
    picture,
    running,
    stream,
)
from waiting import eventually

from siglane.engine.process.supervisor import EngineProcess
from siglane.errors import UserError
from siglane.families.processor import Processor, load_processor
from siglane.families.prompt import renderers
from siglane.llm import LLM
from siglane.server.embedding.protocol import EmbeddingRequest
from siglane.server.generation_fields import StreamOptions
from siglane.server.protocol import (
    AssistantMessage,
    ChatCompletionRequest,
    ImageUrl,
    ImageUrlPart,
    RequestModel,
    SystemMessage,
    TextPart,
    ToolMessage,
    UserMessage,
    ignored_fields,
)
from siglane.types import SamplingParams
from siglane.weights.hub import open_checkpoint

SPECIAL = "<|endoftext|>"
ASSISTANT = {"role": "assistant", "content": "Hello!"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def message(role: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x"}, {"role": role, "content": "x", **fields}]}


def part(kind: str, **fields: Any) -> dict[str, Any]:
    found = {"type": "text", "text": "x"} if kind == "text" else IMAGE
    return {"messages": [{"role": "user", "content": [{**found, **fields}]}]}


def judged(request: type[RequestModel], body: dict[str, Any], field: str) -> str:
    """What becomes of a field that nobody here knows of: "refused", or the dotted name that the client is told."""
    try:
        parsed = request.model_validate(body)
    except ValidationError as error:
        refusal = error.errors()[0].get("ctx", {}).get("error")
    else:
        (name,) = ignored_fields(parsed)
        return name
    assert isinstance(refusal, UserError), refusal
    assert (refusal.code, refusal.param) == ("unsupported_field", field)
    return "refused"


def asked_for(kind: Any) -> set[str]:
    return set(get_type_hints(kind))


@pytest.mark.parametrize("kind", [CompletionCreateParamsNonStreaming, CompletionCreateParamsStreaming])
def test_every_field_of_a_chat(kind: Any) -> None:
    fields = asked_for(kind)
    assert len(fields) > 30
    for field in fields - {*ChatCompletionRequest.model_fields}:
        assert judged(ChatCompletionRequest, {**chat("x"), field: {"some": "thing"}}, field) in ("refused", field)
    honoured = fields & {*ChatCompletionRequest.model_fields}
    assert {"messages", "model", "stop", "seed", "logit_bias", "max_tokens", "n", "stream_options"} <= honoured


@pytest.mark.parametrize(
    ("kind", "model", "role"),
    [
        (ChatCompletionDeveloperMessageParam, SystemMessage, "developer"),
        (ChatCompletionSystemMessageParam, SystemMessage, "system"),
        (ChatCompletionUserMessageParam, UserMessage, "user"),
        (ChatCompletionAssistantMessageParam, AssistantMessage, "assistant"),
        (ChatCompletionToolMessageParam, ToolMessage, "tool"),
        (ChatCompletionFunctionMessageParam, ToolMessage, "function"),
    ],
)
def test_every_field_of_a_message(kind: Any, model: type[RequestModel], role: str) -> None:
    assert {"role", "content"} <= {*model.model_fields}
    for field in asked_for(kind) - {*model.model_fields}:
        assert judged(ChatCompletionRequest, message(role, **{field: "thing"}), field) == f"messages.{field}"


def test_every_field_of_a_part_and_of_stream_options() -> None:
    for kind, model, name in (
        (ChatCompletionContentPartTextParam, TextPart, "text"),
        (ChatCompletionContentPartImageParam, ImageUrlPart, "image_url"),
    ):
        for field in asked_for(kind) - {*model.model_fields}:
            body = part(name, **{field: {"mode": "explicit"}})
            assert judged(ChatCompletionRequest, body, field) == f"messages.content.{field}"
    assert asked_for(ImageURL) <= {*ImageUrl.model_fields}
    for field in asked_for(ChatCompletionStreamOptionsParam) - {*StreamOptions.model_fields}:
        body = {**chat("x"), "stream": True, "stream_options": {field: True}}
        assert judged(ChatCompletionRequest, body, field) == f"stream_options.{field}"


def test_every_field_of_an_embedding() -> None:
    for field in asked_for(EmbeddingCreateParams) - {*EmbeddingRequest.model_fields}:
        assert judged(EmbeddingRequest, {"input": "x", field: "thing"}, field) == field


@pytest.mark.parametrize(
    "field",
    [
        "include_stop_str_in_output",
        "no_stop_trim",
        "return_token_ids",
        "allowed_token_ids",
        "length_penalty",
        "moderation",
    ],
)
def test_what_others_honour_and_would_change_the_answer_is_refused(server: RunningServer, field: str) -> None:
    assert_error(
        server.post(chat("x", **{field: {"some": 1} if field == "moderation" else 2})), 400, "unsupported_field", field
    )


def test_what_others_do_unless_told_not_to_cannot_be_turned_off(server: RunningServer) -> None:
    for field in ("add_generation_prompt", "include_reasoning", "separate_reasoning"):
        response = server.post(chat("x", max_tokens=1, **{field: True}))
        assert response.status_code == 200
        assert "x-siglane-ignored-fields" not in response.headers
        assert_error(server.post(chat("x", **{field: False})), 400, "unsupported_field", field)


def forced(processor: Processor, *texts: str) -> dict[str, float]:
    """Leaves a model these tokens alone; the first has the largest bias."""
    ids = [processor.tokenizer.convert_tokens_to_ids(text) for text in texts]
    return {str(one): 100 - 50 * place for place, one in enumerate(ids)}


@pytest.mark.parametrize("streamed", [False, True])
def test_special_tokens_are_shown_where_a_request_says_so(
    server: RunningServer, processor: Processor, streamed: bool
) -> None:
    for skip, shown in ((None, ""), (True, ""), (False, SPECIAL * 3)):
        body = chat("x", max_tokens=3, logit_bias=forced(processor, SPECIAL), skip_special_tokens=skip)
        if streamed:
            assert stream(server, body).text == shown
            continue
        response = server.post(body)
        assert response.json()["choices"][0]["message"]["content"] == shown
        assert "x-siglane-ignored-fields" not in response.headers
    assert_error(server.post(chat("x", skip_special_tokens="no")), 400, "invalid_value", "skip_special_tokens")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_that_is_a_special_token(server: RunningServer, processor: Processor, streamed: bool) -> None:
    """It has no text, and ends the answer all the same."""
    body = chat("x", max_tokens=16, logit_bias=forced(processor, SPECIAL), stop=[SPECIAL])
    if streamed:
        told = stream(server, body)
        assert (told.text, told.finish_reasons, told.usage["completion_tokens"]) == ("", ["stop"], 1)
        return
    answer = server.post(body).json()
    (choice,) = answer["choices"]
    assert answer["usage"]["completion_tokens"] == 1
    assert (choice["finish_reason"], choice["matched_stop"], choice["message"]["content"]) == ("stop", SPECIAL, "")
    unstopped = server.post({**body, "stop": None}).json()
    assert unstopped["usage"]["completion_tokens"] == 16
    assert unstopped["choices"][0]["finish_reason"] == "length"
    twice = server.post({**body, "stop": SPECIAL * 2}).json()
    assert twice["usage"]["completion_tokens"] == 2
    later = server.post({**body, "min_tokens": 5}).json()
    assert later["usage"]["completion_tokens"] == 6  # the first five cannot end it


def test_min_tokens_hold_for_stop_strings_as_for_stop_tokens(server: RunningServer, processor: Processor) -> None:
    body = chat("x", max_tokens=16, min_tokens=4, logit_bias=forced(processor, "a"))
    by_text = server.post({**body, "stop": "a"}).json()
    assert by_text["choices"][0]["message"]["content"] == "aaaa"
    assert by_text["choices"][0]["finish_reason"] == "stop"
    (a,) = forced(processor, "a")
    by_id = server.post({**body, "stop_token_ids": [int(a)], "logit_bias": forced(processor, "a", "b")}).json()
    assert by_id["choices"][0]["message"]["content"] == "bbbb"
    assert by_id["choices"][0]["matched_stop"] == int(a)


HISTORIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "null": ({"content": None}, {"content": ""}),
    "missing": ({}, {"content": ""}),
    "no parts": ({"content": []}, {"content": ""}),
    "refusal": ({"content": None, "refusal": "I cannot."}, {"content": "I cannot."}),
    "refusal part": ({"content": [{"type": "refusal", "refusal": "I cannot."}]}, {"content": "I cannot."}),
    "output text": ({"content": [{"type": "output_text", "text": "Hello"}]}, {"content": "Hello"}),
    "an answer dumped whole": (
        {"content": "Hello", "refusal": None, "audio": None, "function_call": None, "tool_calls": None},
        {"content": "Hello"},
    ),
    "no calls": ({"content": "Hello", "tool_calls": []}, {"content": "Hello"}),
    "reasoning": ({"content": "Hello", "reasoning_content": "hm"}, {"content": "Hello"}),
}


@pytest.mark.parametrize("name", HISTORIES)
def test_an_earlier_answer_is_taken_as_clients_send_it(server: RunningServer, name: str) -> None:
    first, last = {"role": "user", "content": "Hi"}, {"role": "user", "content": "And now?"}
    sent, plain = (
        server.post({**chat(), "messages": [first, {"role": "assistant", **turn}, last]}) for turn in HISTORIES[name]
    )
    assert sent.status_code == 200, sent.text
    assert sent.json()["choices"] == plain.json()["choices"]
    assert sent.json()["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]
    assert "x-siglane-ignored-fields" not in sent.headers


def test_what_no_model_reads_is_told(server: RunningServer) -> None:
    turn = {**ASSISTANT, "annotations": [], "reasoning": "hm"}
    body = {
        **chat(),
        "messages": [{"role": "user", "content": "Hi", "name": "ann"}, turn, {"role": "user", "content": "x"}],
    }
    told = server.post(body).headers["x-siglane-ignored-fields"]
    assert told == "messages.name,messages.annotations,messages.reasoning"


TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name ~ (c.function.arguments | tojson) }}{% endfor %}"
    "{% if 'spin' in m.content %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    "{% endif %}{% if 'swell' in m.content %}{% set n = namespace(s='x') %}"
    "{% for a in range(64) %}{% set n.s = n.s ~ n.s %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model under a template that knows tools, and loops for one word."""
    folder = tmp_path_factory.mktemp("nvila") / "tools"
    write_nvila_checkpoint(folder, chat_template=TOOLS)
    return folder


@pytest.fixture(scope="module")
def other_template(other_folder: Path) -> Processor:
    return load_processor(open_checkpoint(other_folder))


CALL = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "user", "content": "How warm is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "20"},
]


def test_tools_of_the_history_are_written_by_a_template_that_knows_them(
    other_template: Processor, engine: EngineProcess
) -> None:
    turns = WITH_TOOLS
    with running(other_template, engine) as server:
        answer = server.post({**chat(), "messages": turns})
        assert answer.status_code == 200, answer.text
        assert "x-siglane-ignored-fields" not in answer.headers
        said = {"role": "assistant", "content": 'weather{"city": "Bern"}'}
        plain = server.post({**chat(), "messages": [turns[0], said, turns[2]]})
        assert answer.json()["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"]
        with server.openai() as client:
            parsed = client.chat.completions.create(model="tiny", messages=turns, max_tokens=4)  # type: ignore[arg-type]
        assert parsed.usage is not None


def test_a_template_that_never_ends_costs_its_request_alone(
    other_template: Processor, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there are processes; pixels are decoded and neighbours answered meanwhile."""
    monkeypatch.setattr(renderers, "RENDER_SECONDS", 0.5)
    with running(other_template, engine, decode_threads=1) as server:
        alone = ask_good(server)

        def spin() -> None:
            answers: list[Any] = []
            threads = [threading.Thread(target=lambda: answers.append(server.post(chat("spin")))) for _ in range(6)]
            for thread in threads:
                thread.start()
            assert server.post(chat(image_part(picture()), "x", max_tokens=1)).status_code == 200
            for thread in threads:
                thread.join()
            for answer in answers:
                assert_error(answer, 400, "template_timeout", "messages")
            assert_error(server.post(chat("swell")), 400, param="messages")

        assert_unharmed(server, alone, spin)


def test_the_library_reads_the_same_and_goes_on_behind_a_template_that_never_ends(
    other_folder: Path, other_template: Processor, engine: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(other_folder, device="cpu", kv_tokens=4096)
    with running(other_template, engine) as server:
        usage = server.post({**chat(), "messages": WITH_TOOLS}).json()["usage"]
    (told,) = llm.chat(WITH_TOOLS, SamplingParams(max_tokens=2))
    assert told.usage.prompt_tokens == usage["prompt_tokens"]
    monkeypatch.setattr(renderers, "RENDER_SECONDS", 0.3)
    answers = llm.generate(["one", "spin", "two"], SamplingParams(max_tokens=2))
    assert [getattr(answer.error, "code", None) for answer in answers] == [None, "template_timeout", None]


def test_a_clients_mistake_leaves_no_traceback(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    bodies: list[dict[str, Any]] = [
        chat("x", n=0),
        chat(image_part(b"nothing")),
        chat(image_part(picture()[:60])),
        chat("x" * 200_000),
        chat("x", logit_bias={"999999": 1}),
        chat("x", model="other"),
        {**chat(), "messages": [{"role": "tool", "content": "x"}]},
        chat("x", chat_template_kwargs={"messages": "x"}),
    ]

    def ours() -> list[logging.LogRecord]:
        return [one for one in caplog.records if one.name.startswith(("siglane", "uvicorn", "asyncio"))]

    with caplog.at_level(logging.INFO):
        for body in bodies:
            assert server.post(body).status_code in (400, 404)
            assert server.post({**body, "stream": True}).status_code in (400, 404)
        with server.http() as client:
            assert (
                client.post(
                    "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}
                ).status_code
                == 400
            )
        # a line is written when its answer has been sent
        eventually(lambda: sum("POST" in one.getMessage() for one in ours()) == 2 * len(bodies) + 1)
    records = ours()
    assert [one for one in records if one.exc_info] == []
    assert max(one.levelno for one in records) == logging.INFO


def unions(schema: Any, place: str) -> list[str]:
    """Places of unions without tags in what pydantic made of a model, apart from what only the document reads."""
    if isinstance(schema, dict):
        inner = [unions(found, f"{place}.{key}") for key, found in schema.items() if key != "json_schema_input_schema"]
        plain = schema.get("type") == "union" and len(schema["choices"]) > 1
        return [place] * plain + [found for several in inner for found in several]
    if isinstance(schema, list | tuple):
        return [found for one in schema for found in unions(one, place)]
    return []


def every(model: type[RequestModel]) -> Iterator[type[RequestModel]]:
    for one in model.__subclasses__():
        yield one
        yield from every(one)


def test_errors_name_no_branch_of_a_union() -> None:
    """pydantic's own names for branches would stand in `param`: tags begin with #, and are left out."""
    models = {one for one in every(RequestModel) if one.__module__.startswith("siglane.")}
    assert len(models) > 50
    assert not [place for one in models for place in unions(one.__pydantic_core_schema__, one.__name__)]
