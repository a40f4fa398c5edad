"""/v1/messages as Anthropic's clients use it: whole and as events, with pictures and tools, errors in its shape."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from calling import BOTH, IN_BERN, NOW, bias
from httpx2 import Response
from scripted_checkpoint import AND, ANSWER, SEE, THOUGHT
from serving import RunningServer, ask_good, assert_unharmed, image_part, picture, running

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
TOOLS = [
    {"input_schema" if key == "parameters" else key: value for key, value in one["function"].items()} for one in BOTH
]


def body(server: RunningServer, *said: str, **fields: Any) -> dict[str, Any]:
    bare = {"model": "tiny", "messages": [{"role": "user", "content": "How warm is it?"}], "max_tokens": 120}
    return {**bare, "temperature": 0, "tools": TOOLS, "logit_bias": bias(server, *said), **fields}


def events(server: RunningServer, asked: dict[str, Any]) -> list[dict[str, Any]]:
    with server.http() as client, client.stream("POST", MESSAGES, json={**asked, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        blocks = [block for block in response.read().decode().split("\n\n") if block]
    found = []
    for block in blocks:
        name, data = (line.partition(": ")[2] for line in block.split("\n"))
        found.append(json.loads(data))
        assert found[-1]["type"] == name
    return found


def joined(told: list[dict[str, Any]]) -> dict[str, Any]:
    """A message as Anthropic's clients put it together."""
    assert (told[0]["type"], told[-1]["type"]) == ("message_start", "message_stop")
    message: dict[str, Any] = told[0]["message"]
    pieces: dict[int, str] = {}
    for event in told[1:-1]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
                pieces[event["index"]] = ""
            case "content_block_delta":
                (text,) = (value for key, value in event["delta"].items() if key != "type")
                pieces[event["index"]] += text
            case "content_block_stop":
                block, text = message["content"][event["index"]], pieces[event["index"]]
                if block["type"] == "tool_use":
                    block["input"] = json.loads(text or "{}")
                else:
                    block[block["type"]] += text
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    return message


def bare(reply: dict[str, Any]) -> dict[str, Any]:
    """What is the same for two requests."""
    content = [{key: value for key, value in block.items() if key != "id"} for block in reply["content"]]
    usage = reply["usage"]
    read = usage["input_tokens"] + usage["cache_read_input_tokens"]
    return {**reply, "id": None, "content": content, "usage": (read, usage["output_tokens"])}


def use(name: str, arguments: str) -> dict[str, Any]:
    return {"type": "tool_use", "name": name, "input": json.loads(arguments)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


CASES: dict[str, tuple[tuple[str, ...], list[dict[str, Any]], str]] = {
    "text": ((), [text(ANSWER)], "end_turn"),
    "calls": (("<tool_call>", AND), [use(*IN_BERN), use(*NOW)], "tool_use"),
    "both": ((SEE,), [text(SEE.strip()), use(*IN_BERN)], "tool_use"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("thinks", [True, False])
def test_blocks_whole_or_as_events(caller: RunningServer, name: str, thinks: bool) -> None:
    said, expected, reason = CASES[name]
    thinking = {"type": "enabled", "budget_tokens": 1024} if thinks else {"type": "disabled"}
    asked = body(caller, *said, thinking=thinking)
    answer = caller.post_to(MESSAGES, **asked)
    assert answer.status_code == 200, answer.text
    reply = answer.json()
    thought = {"type": "thinking", "thinking": THOUGHT, "signature": ""}
    assert bare(reply)["content"] == [thought] * thinks + expected
    assert (reply["type"], reply["role"], reply["stop_reason"]) == ("message", "assistant", reason)
    assert "x-siglane-ignored-fields" not in answer.headers
    told = events(caller, asked)
    assert bare(joined(told)) == bare(reply)


def test_how_an_answer_ends(caller: RunningServer) -> None:
    cut = caller.post_to(MESSAGES, **body(caller, max_tokens=11)).json()
    assert (cut["stop_reason"], cut["content"][-1]) == ("max_tokens", text("x"))
    stopped = body(caller, stop_sequences=["z"])
    for reply in (caller.post_to(MESSAGES, **stopped).json(), joined(events(caller, stopped))):
        assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "z")
        assert reply["content"][-1] == text("xy")
    for choice, names in (({"type": "any"}, {"weather", "time"}), ({"type": "tool", "name": "time"}, {"time"})):
        asked = body(caller, tool_choice={**choice, "disable_parallel_tool_use": True}, max_tokens=400)
        (called,) = (
            block for block in caller.post_to(MESSAGES, **asked).json()["content"] if block["type"] == "tool_use"
        )
        assert called["name"] in names
    schema = {"format": {"type": "json_schema", "schema": {"enum": ["yes"]}}}
    said = caller.post_to(MESSAGES, **body(caller, tools=None, output_config=schema)).json()["content"][-1]
    assert said == text('"yes"')


def test_what_was_said_before_is_read_as_in_a_chat(caller: RunningServer) -> None:
    data = base64.b64encode(picture(24, 30)).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    calls = [{**use(*IN_BERN), "id": "c1"}, {**use(*NOW), "id": "c2"}]
    messages = [
        {"role": "user", "content": [text("Hi"), {"type": "image", "source": source}]},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm", "signature": ""}, text("Well."), *calls],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": "20"},
                {
                    "type": "tool_result",
                    "tool_use_id": "c2",
                    "content": [text("12:00"), {"type": "image", "source": source}],
                },
                text("And now?"),
            ],
        },
    ]
    system = [{**text("Be brief."), "cache_control": {"type": "ephemeral"}}]
    asked = body(caller, messages=messages, system=system)
    usage = caller.post_to(MESSAGES, **asked).json()["usage"]
    functions = [{"name": "weather", "arguments": IN_BERN[1]}, {"name": "time", "arguments": "{}"}]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text("Hi"), image_part(picture(24, 30))]},
        {"role": "assistant", "content": "Well.",
         "tool_calls": [{"type": "function", "function": function} for function in functions]},
        {"role": "tool", "content": "20"},
        {"role": "tool", "content": [text("12:00"), image_part(picture(24, 30))]},
        {"role": "user", "content": "And now?"},
    ]  # fmt: skip
    plain = caller.post({"model": "tiny", "messages": chat, "tools": BOTH, "max_tokens": 1}).json()
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == plain["usage"]["prompt_tokens"]
    counted = caller.post_to(COUNT, model="tiny", messages=messages, system=system, tools=TOOLS)
    assert counted.json() == {"input_tokens": plain["usage"]["prompt_tokens"]}


def user(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [*blocks]}]}


def image(**source: Any) -> dict[str, Any]:
    return {"type": "image", "source": source}


RESULT = {"type": "tool_result", "tool_use_id": "c1"}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no messages": ({"messages": []}, "invalid_value", "messages"),
    "no tokens": ({"max_tokens": None}, "invalid_value", "max_tokens"),
    "a role": ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages[0].role"),
    "nothing said": ({"messages": [{"role": "user", "content": ""}]}, "invalid_value", "messages[0].content"),
    "a beginning": (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "I"}]},
        "unsupported_field",
        "messages[1].role",
    ),
    "a document": (user({"type": "document", "source": {}}), "unsupported_content_type", "messages[0].content[0].type"),
    "no block": (user("x"), "invalid_value", "messages[0].content[0]"),
    "no source": (user({"type": "image", "source": "x"}), "invalid_value", "messages[0].content[0].source"),
    "a file": (
        user(image(type="file", file_id="f")),
        "unsupported_content_type",
        "messages[0].content[0].source.type",
    ),
    "no picture": (
        user(text("x"), image(type="base64", media_type="image/png", data="bm8=")),
        "image_decode_failed",
        "messages[0].content[1]",
    ),
    "a forbidden picture": (
        user(RESULT, image(type="url", url="http://127.0.0.1:1/a.png")),
        "image_url_forbidden",
        "messages[0].content[1]",
    ),
    "a document as a result": (
        user({**RESULT, "content": [{"type": "document", "source": {}}]}),
        "unsupported_content_type",
        "messages[0].content[0].content[0].type",
    ),
    "no picture as a result": (
        user({**RESULT, "content": [text("x"), image(type="base64", data="bm8=")]}),
        "image_decode_failed",
        "messages[0].content[0].content[1]",
    ),
    "a use of the user's": (user({**use(*NOW), "id": "c"}), "unsupported_content_type", "messages[0].content[0].type"),
    "a tool of theirs": ({"tools": [{"type": "web_search_20250305", "name": "s"}]}, "invalid_value", "tools[0].type"),
    "a schema": (
        {"tools": [{"name": "f", "input_schema": {"type": "string"}}]},
        "invalid_value",
        "tools[0].input_schema",
    ),
    "a choice": ({"tool_choice": {"type": "tool", "name": "rain"}}, "invalid_value", "tool_choice"),
    "a choice of none": ({"tool_choice": {"type": "tool"}}, "invalid_value", "tool_choice.name"),
    "a container": ({"container": "c"}, "unsupported_field", "container"),
    "other servers": ({"mcp_servers": [{"url": "x"}]}, "unsupported_field", "mcp_servers"),
    "an answer's schema": (
        {"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
        "invalid_json_schema",
        "output_config.format.schema",
    ),
    "stops": ({"stop_sequences": [""]}, "invalid_value", "stop_sequences"),
    "too many tokens": ({"max_tokens": 100_000}, "context_length_exceeded", "max_tokens"),
    "too long": ({"system": "x " * 200_000}, "context_length_exceeded", "messages"),
}


def assert_failed(response: Response, status: int, kind: str, code: str, param: str | None) -> None:
    assert response.status_code == status, response.text
    told = response.json()
    assert told.keys() == {"type", "error", "request_id"}
    assert (told["type"], told["request_id"]) == ("error", response.headers["x-request-id"])
    error = told["error"]
    assert (error["type"], error["code"], error["param"]) == (kind, code, param)
    assert error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_names_its_field(name: str, caller: RunningServer) -> None:
    fields, code, param = REFUSED[name]
    for stream in (False, True):
        answer = caller.post_to(MESSAGES, **body(caller, **{**fields, "stream": stream}))
        assert_failed(answer, 400, "invalid_request_error", code, param)


def test_what_is_refused_harms_nobody(caller: RunningServer) -> None:
    alone = ask_good(caller)

    def ask() -> None:
        for fields, code, param in REFUSED.values():
            answer = caller.post_to(MESSAGES, **body(caller, **fields))
            assert_failed(answer, 400, "invalid_request_error", code, param)

    assert_unharmed(caller, alone, ask)


def test_every_failure_is_in_anthropics_shape(caller: RunningServer, server: RunningServer) -> None:
    for path in (MESSAGES, COUNT):
        unknown = caller.post_to(path, **body(caller, model="other"))
        assert_failed(unknown, 404, "not_found_error", "model_not_found", "model")
        with caller.http() as client:
            assert_failed(client.get(path), 405, "invalid_request_error", "method_not_allowed", None)
            form = client.post(path, content=b"a=b", headers={"content-type": "text/plain"})
            assert_failed(form, 415, "invalid_request_error", "unsupported_media_type", None)
        plain = server.post_to(path, **body(caller, logit_bias=None))
        assert_failed(plain, 400, "invalid_request_error", "unsupported_field", "tools")
    with caller.http() as client:
        assert_failed(client.get(f"{MESSAGES}/batches"), 404, "not_found_error", "not_found", None)
    thinking = {"type": "enabled", "budget_tokens": 64}
    unable = server.post_to(MESSAGES, **body(caller, tools=None, logit_bias=None, thinking=thinking))
    assert_failed(unable, 400, "invalid_request_error", "invalid_value", "thinking")


def test_the_key_comes_in_anthropics_header(caller: RunningServer) -> None:
    chat = caller.served.chat
    assert chat is not None
    with running(chat.processor, caller.served.engine, api_key="secret") as server, server.http() as client:
        asked = body(caller)
        assert client.post(MESSAGES, json=asked, headers={"x-api-key": "secret"}).status_code == 200
        assert client.post(MESSAGES, json=asked, headers={"authorization": "Bearer secret"}).status_code == 200
        for headers in ({}, {"x-api-key": "other"}, {"x-api-key": "secret", "authorization": "Bearer other"}):
            refused = client.post(MESSAGES, json=asked, headers=headers)
            assert_failed(refused, 401, "authentication_error", "invalid_api_key", None)
        assert client.get("/v1/models", headers={"x-api-key": "secret"}).status_code == 401


@pytest.mark.usefixtures("broken_after_three")
def test_an_engine_that_fails_ends_the_stream_with_its_reason(caller: RunningServer) -> None:
    told = events(caller, body(caller))
    assert told[0]["type"] == "message_start"
    assert (told[-1]["type"], told[-1]["error"]["type"], told[-1]["error"]["message"]) == (
        "error",
        "api_error",
        "it broke",
    )


def test_anthropics_client(caller: RunningServer) -> None:
    anthropic = pytest.importorskip("anthropic", reason="Anthropic's client is not installed")
    client = anthropic.Anthropic(base_url=caller.url, api_key="none", max_retries=0)
    asked = body(caller, SEE, AND)
    extra = {name: asked.pop(name) for name in ("logit_bias", "temperature")}  # newer clients have no temperature
    whole = client.messages.create(**asked, extra_body=extra)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
    with client.messages.stream(**asked, extra_body=extra) as stream:
        words = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert words == SEE.strip()
    assert [block.to_dict() | {"id": ""} for block in final.content] == [
        block.to_dict() | {"id": ""} for block in whole.content
    ]
    assert final.usage.output_tokens == whole.usage.output_tokens
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "20"}
        for block in whole.content
        if block.type == "tool_use"
    ]
    history = [
        *asked["messages"],
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": results},
    ]
    again = client.messages.create(
        model="tiny", messages=history, tools=TOOLS, max_tokens=120, extra_body={"temperature": 0}
    )
    assert again.content[-1].text == ANSWER
    counted = client.messages.count_tokens(model="tiny", messages=history, tools=TOOLS)
    assert counted.input_tokens == again.usage.input_tokens + again.usage.cache_read_input_tokens
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", messages=history, max_tokens=1)
