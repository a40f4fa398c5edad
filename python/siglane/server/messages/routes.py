"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages as chats.

    event: content_block_delta
    data: {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "A"}}

An answer is a list of blocks: its thinking, texts and uses of tools. One that fails ends with an event `error`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.responses import Response

from siglane.server.chat import lay_out_prompt, note_answer
from siglane.server.choices import Choices
from siglane.server.context import RequestContext, context_of
from siglane.server.errors import JsonResponse, error_body
from siglane.server.messages.blocks import Blocks, failure
from siglane.server.messages.protocol import (
    AnswerTurn,
    AnthropicFailure,
    Base64Source,
    CountRequest,
    ImageBlock,
    InputTokens,
    MessageReply,
    MessagesRequest,
    MessageUsage,
    StopReason,
    SystemTurn,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserTurn,
)
from siglane.server.openapi import events_of, examples
from siglane.server.protocol import ChatCompletionRequest, plain
from siglane.server.routes import ModelRoutes
from siglane.server.served import ChatModel
from siglane.server.stopwatch import Stopwatch
from siglane.server.stream import named_event
from siglane.server.translated import TranslatedChat, TranslatedStream, Translation, translated

MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"
NAMES = {
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config.format",
    "response_format.json_schema.schema": "output_config.format.schema",
    "stop": "stop_sequences",
    "thinking_budget": "thinking",
}
CHOICES: Mapping[str, str] = {"auto": "auto", "any": "required", "none": "none"}


def translate(body: CountRequest) -> tuple[Translation, ChatCompletionRequest]:
    """UserError names the field of `body` that cannot be served."""
    found = Translation(NAMES, lambda name: name.replace(".parameters", ".input_schema"))
    if body.system:
        found.say("system", plain(body.system), "system")
    for number, turn in enumerate(body.messages):
        _say(found, turn, f"messages[{number}]")
    asked: dict[str, Any] = {**body.passed, **_thinking(body)}
    if isinstance(body, MessagesRequest):
        asked |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences, "stream": body.stream}
        asked |= {"temperature": body.temperature, "top_p": body.top_p, "top_k": body.top_k}
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"schema": body.output_config.format.schema_}
        asked["response_format"] = {"type": "json_schema", "json_schema": schema}
    return found, found.chat(model=body.model, **asked, **_tools(body))


def _tools(body: CountRequest) -> dict[str, Any]:
    tools = [
        {"name": tool.name, "description": tool.description, "parameters": tool.input_schema, "strict": tool.strict}
        for tool in body.tools or ()
    ]
    asked: dict[str, Any] = {"tools": [{"type": "function", "function": tool} for tool in tools] or None}
    if (choice := body.tool_choice) is not None:
        named = {"type": "function", "function": {"name": choice.name}}
        asked["tool_choice"] = CHOICES.get(choice.type, named)
        asked["parallel_tool_calls"] = False if choice.disable_parallel_tool_use else None
    return asked


def _thinking(body: CountRequest) -> dict[str, Any]:
    if body.thinking is None or body.thinking.type == "adaptive":
        return {}
    wanted = body.thinking.type == "enabled"
    given = body.passed.get("chat_template_kwargs")
    switch = {"enable_thinking": wanted} | (given if isinstance(given, dict) else {})
    return {"chat_template_kwargs": switch, "thinking_budget": body.thinking.budget_tokens if wanted else None}


def _say(found: Translation, turn: UserTurn | AnswerTurn | SystemTurn, place: str) -> None:
    if isinstance(turn.content, str):
        found.say(turn.role, turn.content, place)
        return
    parts: list[Any] = []
    places: list[str] = []
    for number, block in enumerate(turn.content):
        where = f"{place}.content[{number}]"
        if isinstance(block, TextBlock | ImageBlock):
            parts.append(_part(block))
            places.append(where)
        elif isinstance(block, ToolUseBlock | ToolResultBlock):
            if parts:
                found.say(turn.role, [*parts], place, [*places])
            parts.clear()
            places.clear()
            if isinstance(block, ToolUseBlock):
                found.call(block.id, block.name, json.dumps(block.input, ensure_ascii=False), where)
            else:
                _result(found, block, where)
    if parts:
        found.say(turn.role, parts, place, places)


def _result(found: Translation, block: ToolResultBlock, where: str) -> None:
    content, places = block.content, []
    if isinstance(content, list):
        places = [f"{where}.content[{number}]" for number in range(len(content))]
    said = list(map(_part, content)) if isinstance(content, list) else content
    found.say("tool", said, where, places, tool_call_id=block.tool_use_id)


def _part(block: TextBlock | ImageBlock) -> dict[str, Any]:
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    source = block.source
    if isinstance(source, Base64Source):
        return {
            "type": "image_url",
            "image_url": {"url": f"data:{source.media_type or 'image/any'};base64,{source.data}"},
        }
    return {"type": "image_url", "image_url": {"url": source.url}}


@dataclass(frozen=True, slots=True)
class Asked:
    """A message that can be asked for. blocks: of its answer so far."""

    body: MessagesRequest
    chat: TranslatedChat
    message_id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    blocks: Blocks = field(default_factory=Blocks)

    def reply(self, choices: Choices, *, ended: bool) -> MessageReply:
        reason = stop_reason(choices) if ended else None
        return {
            "id": self.message_id,
            "type": "message",
            "role": "assistant",
            "model": self.chat.model.name,
            "content": self.blocks.content if ended else [],
            "stop_reason": reason,
            "stop_sequence": str(choices.answers[0].matched_stop) if reason == "stop_sequence" else None,
            "usage": usage_of(choices),
        }


def stop_reason(choices: Choices) -> StopReason:
    (answer,) = choices.answers
    if answer.finish_reason == "tool_calls":
        return "tool_use"
    if answer.finish_reason == "length":
        return "max_tokens"
    return "stop_sequence" if isinstance(answer.matched_stop, str) else "end_turn"


def usage_of(choices: Choices) -> MessageUsage:
    usage = choices.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


async def answer_message(asked: Asked) -> MessageReply:
    """The whole answer at once."""
    choices = await asked.chat.answered(asked.blocks)
    list(asked.blocks.end())
    return asked.reply(choices, ended=True)


class MessageStream(TranslatedStream):
    """The same as events."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked.chat)
        self._asked = asked

    async def _events(self, choices: Choices) -> AsyncIterator[bytes]:
        begun = False
        async for delta in self._deltas(choices):
            if delta is None:
                yield _event({"type": "ping"})
                continue
            if not begun:
                yield _event({"type": "message_start", "message": self._asked.reply(choices, ended=False)})
                begun = True
            yield b"".join(map(_event, self._asked.blocks.take(delta)))
        note_answer(choices, self._prepared, self._context, self._model)
        yield b"".join(map(_event, self._asked.blocks.end()))
        reply = self._asked.reply(choices, ended=True)
        told = {"stop_reason": reply["stop_reason"], "stop_sequence": reply["stop_sequence"]}
        yield _event({"type": "message_delta", "delta": told, "usage": reply["usage"]})
        yield _event({"type": "message_stop"})

    def _failure(self, error: Exception) -> bytes:
        reason = self._failed(error)
        told = failure(reason.status, error_body(reason)["error"], self._context.request_id)
        return named_event("error", told)


def _event(content: Mapping[str, Any]) -> bytes:
    return named_event(content["type"], content)


async def count_tokens(body: CountRequest, context: RequestContext, model: ChatModel) -> InputTokens:
    """Of images only the headers are read."""
    translation, chat = translate(body)
    use, salt = chat.tool_use, context.client.salt(chat.cache_salt)
    tools = () if use is None else use.tools
    with translation.telling():
        prompt, _ = await lay_out_prompt(
            chat.messages, chat.chat_template_kwargs, salt, context, model, Stopwatch(), tools
        )
    return {"input_tokens": len(prompt.token_ids)}


def add_messages(routes: ModelRoutes[ChatModel]) -> None:
    question = {"model": routes.model.name, "messages": [{"role": "user", "content": "What can you do?"}]}
    shown = examples(a_question=question | {"max_tokens": 16}, a_stream=question | {"max_tokens": 16, "stream": True})

    async def create_message(body: MessagesRequest, request: Request) -> Any:
        asked = Asked(body, await translated(body, request, translate, routes))
        if body.stream:
            return MessageStream(asked)
        return JsonResponse(await answer_message(asked), headers=asked.chat.headers)

    async def count_message_tokens(body: CountRequest, request: Request) -> Response:
        routes.check_name(body.model)
        return JsonResponse(await count_tokens(body, context_of(request.scope), routes.model))

    events = events_of("an event of a message")
    routes.post((MESSAGES,), create_message, MessageReply, shown, content=events, failed=AnthropicFailure)
    routes.post(
        (COUNT_TOKENS,), count_message_tokens, InputTokens, examples(a_question=question), failed=AnthropicFailure
    )
