"""/v1/responses as the openai client uses it: whole and as events, with pictures and tools; what needs a memory is
refused by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import pytest
from calling import BOTH, IN_BERN, NOW, bias
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from scripted_checkpoint import AND, ANSWER, SEE, THOUGHT
from serving import RunningServer, ask_good, assert_error, assert_unharmed, data_url, image_part, picture

RESPONSES = "/v1/responses"
FLAT = [{"type": "function", **one["function"]} for one in BOTH]
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def body(server: RunningServer, *said: str, **fields: Any) -> dict[str, Any]:
    bare = {"model": "tiny", "input": "How warm is it?", "max_output_tokens": 120, "temperature": 0}
    return {**bare, "tools": FLAT, "logit_bias": bias(server, *said), **fields}


def events(server: RunningServer, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Each is of its type as OpenAI's client knows it, and the data of an event of that name."""
    with server.http() as client, client.stream("POST", RESPONSES, json={**asked, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        blocks = [block for block in response.read().decode().split("\n\n") if block and not block.startswith(":")]
    found = []
    for number, block in enumerate(blocks):
        name, data = (line.partition(": ")[2] for line in block.split("\n"))
        found.append(json.loads(data))
        EVENT.validate_python(found[-1])
        assert (found[-1]["type"], found[-1]["sequence_number"]) == (name, number)
    return found


def without_ids(reply: dict[str, Any]) -> dict[str, Any]:
    """What is the same for two requests."""
    kept = {key: value for key, value in reply.items() if key not in ("id", "created_at", "completed_at")}
    names = ("id", "call_id")
    kept["output"] = [{key: value for key, value in item.items() if key not in names} for item in reply["output"]]
    kept["usage"] = {**reply["usage"], "input_tokens_details": None}
    return kept


CASES: dict[str, tuple[tuple[str, ...], list[tuple[Any, ...]]]] = {
    "text": ((), [("message", ANSWER)]),
    "calls": (("<tool_call>", AND), [("function_call", *IN_BERN), ("function_call", *NOW)]),
    "both": ((SEE,), [("message", SEE.strip()), ("function_call", *IN_BERN)]),
}


def items_of(reply: dict[str, Any]) -> list[tuple[Any, ...]]:
    told: dict[str, Callable[[dict[str, Any]], tuple[Any, ...]]] = {
        "message": lambda item: (item["content"][0]["text"],),
        "reasoning": lambda item: (item["content"][0]["text"],),
        "function_call": lambda item: (item["name"], item["arguments"]),
    }
    return [(item["type"], *told[item["type"]](item)) for item in reply["output"]]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("thinks", [True, False])
def test_items_whole_or_as_events(caller: RunningServer, name: str, thinks: bool) -> None:
    said, expected = CASES[name]
    asked = body(caller, *said, chat_template_kwargs={"enable_thinking": thinks})
    answer = caller.post_to(RESPONSES, **asked)
    assert answer.status_code == 200, answer.text
    reply = answer.json()
    Response.model_validate(reply)
    assert items_of(reply) == [("reasoning", THOUGHT)] * thinks + expected
    assert (reply["status"], reply["store"], reply["error"]) == ("completed", False, None)
    assert "x-siglane-ignored-fields" not in answer.headers
    told = events(caller, asked)
    assert [event["type"] for event in told[:2]] == ["response.created", "response.in_progress"]
    assert told[-1]["type"] == "response.completed"
    assert without_ids(told[-1]["response"]) == without_ids(reply)
    assert told[0]["response"]["output"] == []
    for number, item in enumerate(told[-1]["response"]["output"]):
        of_item = [event for event in told if event.get("output_index") == number]
        assert of_item[0]["type"] == "response.output_item.added"
        assert of_item[-1] == {**of_item[-1], "type": "response.output_item.done", "item": item}
        assert {event["item_id"] for event in of_item[1:-1]} == {item["id"]}
        growth = "".join(event["delta"] for event in of_item if event["type"].endswith(".delta"))
        assert growth == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def test_an_answer_that_is_cut_is_incomplete(caller: RunningServer) -> None:
    asked = body(caller, max_output_tokens=11)
    reply = caller.post_to(RESPONSES, **asked).json()
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert items_of(reply)[-1] == ("message", "x")
    assert events(caller, asked)[-1]["type"] == "response.incomplete"
    (nothing,) = caller.post_to(RESPONSES, **body(caller, max_output_tokens=2)).json()["output"]
    assert nothing["content"][0]["text"] == ""


def test_what_was_said_before_is_read_as_in_a_chat(caller: RunningServer) -> None:
    url = data_url(picture(24, 30))
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}, {"type": "input_image", "image_url": url}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": IN_BERN[1], "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "20"},
        {"type": "function_call_output", "call_id": "c2", "output": [
            {"type": "input_text", "text": "12:00"}, {"type": "input_image", "image_url": url}]},
    ]  # fmt: skip
    reply = caller.post_to(RESPONSES, **body(caller, input=items, instructions="Be brief.")).json()
    functions = [{"name": "weather", "arguments": IN_BERN[1]}, {"name": "time", "arguments": "{}"}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}, image_part(picture(24, 30))]},
        {"role": "assistant", "content": "Let me see.",
         "tool_calls": [{"type": "function", "function": function} for function in functions]},
        {"role": "tool", "content": "20"},
        {"role": "tool", "content": [{"type": "text", "text": "12:00"}, image_part(picture(24, 30))]},
    ]  # fmt: skip
    chat = caller.post({"model": "tiny", "messages": messages, "tools": BOTH, "max_tokens": 1}).json()
    assert reply["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


class Seen(BaseModel):
    colour: Literal["red", "green"]
    count: Literal[1, 2]


def test_the_openai_client(caller: RunningServer) -> None:
    with caller.openai() as client:
        parsed = client.responses.parse(
            model="tiny", input="What is it?", text_format=Seen, max_output_tokens=400, temperature=0
        )
        assert isinstance(parsed.output_parsed, Seen)
        asked = body(caller, SEE, AND)
        extra = {"logit_bias": asked.pop("logit_bias")}
        with client.responses.stream(**asked, extra_body=extra) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_response()
        assert "response.function_call_arguments.done" in kinds
        assert final.output_text == SEE.strip()
        calls = [item for item in final.output if item.type == "function_call"]
        assert [(call.name, call.arguments) for call in calls] == [IN_BERN, NOW]
        results = [{"type": "function_call_output", "call_id": call.call_id, "output": "20"} for call in calls]
        again = client.responses.create(
            model="tiny",
            input=[{"role": "user", "content": "How warm is it?"}, *final.output, *results],  # type: ignore[list-item]
            tools=FLAT,  # type: ignore[arg-type]
            max_output_tokens=120,
            store=False,
            include=["reasoning.encrypted_content"],
            temperature=0,
        )
        assert again.output_text == ANSWER
        forced = client.responses.create(
            model="tiny",
            input="Hi",
            tools=FLAT,  # type: ignore[arg-type]
            tool_choice={"type": "function", "name": "weather"},
            parallel_tool_calls=False,
            max_output_tokens=400,
        )
        (call,) = (item for item in forced.output if item.type == "function_call")
        assert call.name == "weather"


def user(*parts: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": [*parts]}]}


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "an earlier response": ({"previous_response_id": "resp_1"}, "unsupported_field", "previous_response_id"),
    "storing": ({"store": True}, "unsupported_field", "store"),
    "the background": ({"background": True}, "unsupported_field", "background"),
    "a conversation": ({"conversation": "conv_1"}, "unsupported_field", "conversation"),
    "a stored prompt": ({"prompt": {"id": "p"}}, "unsupported_field", "prompt"),
    "cutting": ({"truncation": "auto"}, "unsupported_field", "truncation"),
    "log-probabilities": ({"include": ["message.output_text.logprobs"]}, "unsupported_field", "include"),
    "a chat's field": ({"messages": [{"role": "user", "content": "x"}]}, "unsupported_field", "messages"),
    "a field that no server has": ({"web_search_options": {"a": 1}}, "unsupported_field", "web_search_options"),
    "a built-in tool": ({"tools": [{"type": "web_search"}]}, "invalid_value", "tools[0].type"),
    "a tool's schema": (
        {"tools": [{"type": "function", "name": "f", "parameters": {"type": "string"}}]},
        "invalid_value",
        "tools[0].parameters",
    ),
    "a choice": ({"tool_choice": {"type": "function", "name": "rain"}}, "invalid_value", "tool_choice"),
    "no input": ({"input": None}, "invalid_value", "input"),
    "an empty one": ({"input": []}, "invalid_value", "input"),
    "an item": ({"input": [{"type": "item_reference", "id": "x"}]}, "unsupported_content_type", "input[0].type"),
    "no role": ({"input": [{"content": "x"}]}, "missing_field", "input[0].role"),
    "a part": (user({"type": "input_file", "file_id": "f"}), "unsupported_content_type", "input[0].content[0].type"),
    "a picture": (user({"type": "input_image", "file_id": "f"}), "missing_field", "input[0].content[0].image_url"),
    "a picture that is none": (
        user({"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": data_url(b"no")}),
        "image_decode_failed",
        "input[0].content[1]",
    ),
    "a forbidden picture": (
        user({"type": "input_image", "image_url": "http://127.0.0.1:1/a.png"}),
        "image_url_forbidden",
        "input[0].content[0]",
    ),
    "a result that is no picture": (
        {
            "input": [
                {
                    "type": "function_call_output",
                    "call_id": "c",
                    "output": [
                        {"type": "input_text", "text": "x"},
                        {"type": "input_image", "image_url": data_url(b"no")},
                    ],
                }
            ]
        },
        "image_decode_failed",
        "input[0].output[1]",
    ),
    "a file as a result": (
        {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file"}]}]},
        "unsupported_content_type",
        "input[0].output[0].type",
    ),
    "a picture of the system": (
        {"input": [{"role": "system", "content": [{"type": "input_image", "image_url": data_url(b"no")}]}]},
        "unsupported_content_type",
        "input[0].content[0]",
    ),
    "a schema": (
        {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"not": {}}}}},
        "invalid_json_schema",
        "text.format.schema",
    ),
    "no schema": ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "missing_field", "text.format.schema"),
    "too many tokens": ({"max_output_tokens": 100_000}, "context_length_exceeded", "max_output_tokens"),
    "a long input": ({"input": "x " * 200_000}, "context_length_exceeded", "input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_its_field(name: str, caller: RunningServer) -> None:
    fields, code, param = REFUSED[name]
    for stream in (False, True):
        answer = caller.post_to(RESPONSES, **body(caller, **{**fields, "stream": stream}))
        assert_error(answer, 400, code, param)
        assert "messages[" not in answer.json()["error"]["message"]


def test_what_is_refused_harms_nobody(caller: RunningServer) -> None:
    alone = ask_good(caller)

    def ask() -> None:
        for fields, code, param in REFUSED.values():
            assert_error(caller.post_to(RESPONSES, **body(caller, **fields)), 400, code, param)

    assert_unharmed(caller, alone, ask)


def test_what_asks_for_nothing_is_taken(caller: RunningServer) -> None:
    quiet = {"store": False, "background": False, "previous_response_id": None, "truncation": "disabled", "n": 1}
    ignored = {"user": "me", "reasoning": {"effort": "low"}, "service_tier": "auto"}
    answer = caller.post_to(RESPONSES, **body(caller, **quiet, **ignored, metadata={"a": "b"}, instructions=None))
    assert answer.status_code == 200, answer.text
    assert answer.json()["metadata"] == {"a": "b"}
    assert {*answer.headers["x-siglane-ignored-fields"].split(",")} == {*ignored}
    assert caller.post_to(RESPONSES, **body(caller, model="other")).status_code == 404


def test_a_response_is_not_stored(caller: RunningServer) -> None:
    with caller.http() as client:
        for path in (f"{RESPONSES}/resp_1", f"{RESPONSES}/resp_1/input_items"):
            refused = client.get(path)
            assert_error(refused, 404, "not_found")
            assert "not stored" in refused.json()["error"]["message"]


@pytest.mark.usefixtures("broken_after_three")
def test_an_engine_that_fails_ends_the_stream_with_its_reason(caller: RunningServer) -> None:
    told = events(caller, body(caller))
    assert told[-1]["type"] == "response.failed"
    assert told[-1]["response"]["status"] == "failed"
    assert told[-1]["response"]["error"] == {"code": "server_error", "message": "it broke"}
