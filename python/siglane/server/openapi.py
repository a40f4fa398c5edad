"""The OpenAPI document: what FastAPI cannot read from the routes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter

from siglane.server.errors import ErrorBody
from siglane.server.messages.protocol import AnthropicFailure
from siglane.server.served import ChatModel, Served, ServedModel
from siglane.tiling.rule import LIMITS, MOST_TILES, known_limits

REASONS = {
    400: "the request cannot be served; the body names the field",
    401: "the API key is missing or wrong",
    404: "the model, file or batch that the request names is not here",
    408: "the body did not arrive in time",
    409: "a file or batch is not in the state for it",
    413: "the body is too large, or the files of a key are",
    415: "the body is no plain JSON",
    429: "the API key has had its share; try again after Retry-After seconds",
    499: "the request was aborted by its client",
    500: "the request failed here; no other one is harmed",
    507: "the disk is full",
    503: "the server is starting, full or shutting down; try again",
}
GENERATING = ("ChatCompletionRequest", "CompletionRequest")
DECIDING = ("DecisionRequest", "SystemOneRequest", "ScoreRequest")
TRANSLATED = ("ResponsesRequest", "MessagesRequest", "CountRequest")
OF_CHAT = (*GENERATING, *DECIDING, *TRANSLATED, "TokenizeRequest", "DetokenizeRequest", "ImageTokensRequest")
OF_TOWERS = ("EmbeddingRequest", "ClassificationRequest", "PairsRequest")
PLACE = "#/components/schemas/"
FAILURES: tuple[type[Any], ...] = (ErrorBody, AnthropicFailure)
OF_A_BODY = (400, 401, 404, 408, 413, 415, 429, 499, 500, 503)

RED = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAQAQMAAAAlPW0iAAAAA1BMVEXIHh4WiPieAAAADElEQVR42mNgIA0AAAAwAAE"
    "odEl9AAAAAElFTkSuQmCC"
)


WEATHER = {
    "name": "weather",
    "description": "How warm it is in a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def failures(*statuses: int, body: type[Any] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """body: one of FAILURES. A reference, not a `model`: FastAPI would build a validator for each status of each
    route, which is half of the time that the application takes to be made."""
    content = {"application/json": {"schema": {"$ref": PLACE + body.__name__}}}
    return {status: {"description": REASONS[status], "content": content} for status in statuses}


def examples(**bodies: Mapping[str, Any]) -> dict[str, Any]:
    """For `openapi_extra` of a route that reads a body."""
    shown = {name: {"summary": name.replace("_", " "), "value": body} for name, body in bodies.items()}
    return {"requestBody": {"content": {"application/json": {"examples": shown}}}}


def chat_examples(chat: ChatModel) -> dict[str, Any]:
    model = chat.name

    def ask(*content: Any, **fields: Any) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": list(content)}], "max_tokens": 16, **fields}

    text = {"type": "text", "text": "What do you see?"}
    bodies = {"a_question": ask(text), "a_stream": ask(text, stream=True, stream_options={"include_usage": True})}
    if chat.processor.config.images is not None:
        bodies["a_picture"] = ask({"type": "image_url", "image_url": {"url": RED}}, text)
    answers = {"enum": ["yes", "no"]}
    bodies["a_schema"] = ask(text, response_format={"type": "json_schema", "json_schema": {"schema": answers}})
    if offers_tools(chat):
        bodies["a_tool"] = ask(text, tools=[{"type": "function", "function": WEATHER}], tool_choice="required")
    earlier = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    earlier += [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "What can you do?"}]
    bodies["a_conversation"] = {"model": model, "messages": earlier, "max_tokens": 16, "temperature": 0}
    return examples(**bodies)


def completion_examples(model: str) -> dict[str, Any]:
    text = {"model": model, "prompt": "A red", "max_tokens": 8, "temperature": 0}
    scored = {"model": model, "prompt": ["A red square", "A blue square"], "max_tokens": 0, "echo": True, "logprobs": 1}
    return examples(a_text=text, a_stream=text | {"stream": True}, probabilities_of_prompts=scored)


def decision_examples(model: str, sees: bool) -> dict[str, Any]:
    about: dict[str, Any] = {"model": model, "input": "The sea is blue today."} | ({"images": [RED]} if sees else {})
    yes_no = {"id": "sea", "type": "yes_no", "question": "Is it about the sea?"}
    choice = {"id": "colour", "type": "choice", "question": "Which?", "options": [{"name": "red"}, {"name": "blue"}]}
    score = {"id": "good", "type": "score", "question": "How good?", "levels": ["bad", "fair", "good"]}
    labels = {"id": "words", "type": "labels", "question": "What do you see?", "labels": ["a red square", "a sign"]}
    predicate = {"name": "sea", "type": "predicate", "instructions": "It is about the sea."}
    return examples(
        typed_questions=about | {"questions": [yes_no, choice, score]},
        labels_as_they_stand=about | {"questions": [labels]},
        as_openai_asks=about | {"questions": [predicate]},
    )


def system_one_examples(model: str, sees: bool) -> dict[str, Any]:
    about: dict[str, Any] = {"model": model, "state": {"weather": "sunny"}} | ({"images": [RED]} if sees else {})
    questions = {
        "rain": {"type": "noul", "instructions": "It rains."},
        "wear": {"type": "choice", "instructions": "What to wear?", "criteria": {"coat": "when cold", "hat": None}},
        "warm": {"type": "score", "instructions": "How warm?", "criteria": ["cold", "mild", "hot"]},
    }
    return examples(questions=about | {"questions": questions})


def score_examples(model: str) -> dict[str, Any]:
    pairs = {"model": model, "query": "Is this true? ", "items": ["The sea is wet.", "Ice is hot."]}
    labels = {"labels": ["yes", "no"], "apply_softmax": True}
    return examples(labels=pairs | labels, tokens=pairs | {"label_token_ids": [5, 6]})


def pair_examples(model: str) -> dict[str, Any]:
    picture = {"content": [{"type": "image_url", "image_url": {"url": RED}}]}
    one = {"model": model, "text_1": picture, "text_2": ["a red square", "the sea at night"]}
    return examples(a_picture_and_texts=one, texts={"model": model, "queries": "a cat", "documents": ["a dog"]})


def embedding_examples(model: str) -> dict[str, Any]:
    texts = {"model": model, "input": ["a red square", "the sea at night"], "encoding_format": "float"}
    return examples(
        texts=texts,
        a_picture_and_a_text={"model": model, "input": [{"image": RED}, "a red square"]},
        pictures={"model": model, "input": [RED], "modality": "image"},
    )


def classification_examples(model: str) -> dict[str, Any]:
    labels = {"model": model, "images": [RED], "labels": ["a red square", "the sea"]}
    return examples(labels=labels, templates=labels | {"templates": ["a photo of {label}", "{label}"]})


def events_of(what: str, example: str = "") -> dict[str, Any]:
    """A stream's content. what: an event's data is."""
    # itemSchema: of one event, as OpenAPI 3.2 has it and FastAPI writes it; `schema` would be of the whole body
    data = {"type": "string", "description": what}
    stream = {"itemSchema": {"type": "object", "required": ["data"], "properties": {"data": data}}}
    return {"text/event-stream": stream | ({"example": example} if example else {})}


STREAM = events_of(
    "a chat.completion.chunk, at the end [DONE]",
    'data: {"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"A"}}]}\n\ndata: [DONE]\n\n',
)


def document(app: FastAPI, served: Served, open_paths: frozenset[str]) -> Callable[[], dict[str, Any]]:
    """Makes the document anew for each that asks: what fits into a context is known once the engine is ready."""

    def make() -> dict[str, Any]:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        components = found["components"]
        components["schemas"] |= _schemas_of_failures()
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}] if served.clients.by_key else [{"key": []}, {}]
        if served.config.root_path:
            found["servers"] = [{"url": served.config.root_path}]
        for path, methods in found["paths"].items():
            for operation in methods.values():
                operation["responses"].pop("422", None)  # FastAPI's own, which is a 400 here
                if path in open_paths:
                    operation["security"] = []
        _state_limits(found, served)
        _drop_unused(found)
        return found

    return make


def _schemas_of_failures() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for body in FAILURES:
        schema = TypeAdapter(body).json_schema(mode="serialization", ref_template=PLACE + "{model}")
        found |= {**schema.pop("$defs"), body.__name__: schema}
    return found


def _state_limits(found: Mapping[str, Any], served: Served) -> None:
    """The names that are served, and what these models can take."""
    schemas = found["components"]["schemas"]
    of_requests = dict.fromkeys(OF_CHAT, served.chat) | dict.fromkeys(OF_TOWERS, served.embed)
    for title, model in of_requests.items():
        if model is not None:
            names = {model.name, served.models[0].name, *served.config.model_aliases}
            schemas[title]["properties"]["model"] = {"enum": [*sorted(names), None]}
    (name,) = found["paths"]["/v1/models/{name}"]["get"]["parameters"]
    name["schema"]["enum"] = sorted({model.name for model in served.models} | set(served.config.model_aliases))
    if served.embed is not None:
        _state_limits_of_images(schemas, "InputUrl", served.embed)
        schemas["EmbeddingRequest"]["properties"]["dimensions"]["anyOf"][0] = {"const": served.embed.width}
        for name in ("images", "input"):
            (several,) = (
                one for one in schemas["ClassificationRequest"]["properties"][name]["anyOf"] if "items" in one
            )
            several["maxItems"] = min(several["maxItems"], served.config.max_images)
    if served.chat is not None:
        for kind in ("ImageUrl", "VideoUrl", "PictureSize", "ItemImage"):
            _state_limits_of_images(schemas, kind, served.chat)
        _state_chat(schemas, served.chat)


def _state_limits_of_images(schemas: Mapping[str, Any], kind: str, model: ServedModel) -> None:
    """Leaves out the limits that the model does not know."""
    known = [] if model.images is None else known_limits(model.images.preprocess.rule)
    for name in {*LIMITS} - {*known}:
        del schemas[kind]["properties"][name]
    if "max_tiles" in known:
        schemas[kind]["properties"]["max_tiles"]["anyOf"][0]["maximum"] = MOST_TILES


def _state_chat(schemas: Mapping[str, Any], chat: ChatModel) -> None:
    facts, vocabulary = chat.processor.config, chat.processor.config.language.vocab_size
    for fields in (schemas[title]["properties"] for title in reversed(GENERATING)):
        for name in {"max_tokens", "max_completion_tokens", "min_tokens"} & fields.keys():
            fields[name]["anyOf"][0]["maximum"] = chat.context_length
        fields["stop_token_ids"]["anyOf"][0]["items"]["maximum"] = vocabulary - 1
    for title, names in (("CompletionRequest", ("prompt",)), ("ScoreRequest", ("query", "items", "label_token_ids"))):
        for name in names:
            _state_largest(schemas[title]["properties"][name], vocabulary - 1)
    _state_largest(schemas["DetokenizeRequest"]["properties"]["tokens"], len(chat.processor.tokenizer) - 1)
    if facts.images is not None and facts.images.video is not None:
        limits = (facts.images.video.most_frames, chat.config.max_video_frames)
        most = min(limit for limit in limits if limit is not None)
        for kind in ("VideoUrl", "PictureSize"):
            schemas[kind]["properties"]["num_frames"]["anyOf"][0]["maximum"] = most
    else:
        del schemas["PictureSize"]["properties"]["num_frames"]
    schemas["MessagesRequest"]["properties"]["max_tokens"]["maximum"] = chat.context_length
    schemas["ResponsesRequest"]["properties"]["max_output_tokens"]["anyOf"][0]["maximum"] = chat.context_length
    if facts.thinking is None:
        for name in ("thinking_budget", "thinking_token_budget"):
            del fields[name]
    _state_messages(schemas, chat)


def _state_largest(node: Any, most: int) -> None:
    """Of the token ids in a schema, which are its only integers."""
    if isinstance(node, list):
        for one in node:
            _state_largest(one, most)
    elif isinstance(node, dict):
        if node.get("type") == "integer":
            node["maximum"] = most
        _state_largest([*node.values()], most)


def _state_messages(schemas: Mapping[str, Any], chat: ChatModel) -> None:
    """Leaves out the parts that the model has no eyes for, and calls of tools where its template has no place for them.
    An earlier answer's audio is heard by none."""
    images = chat.processor.config.images
    unread = {"VideoUrlPart": images is None or images.video is None, "ImageUrlPart": images is None}
    unread["ToolMessage"] = chat.processor.tools is None
    unread |= dict.fromkeys(("ItemImage", "ImageBlock"), images is None)
    unread |= dict.fromkeys(("ItemCall", "ItemCallOutput", "ToolUseBlock", "ToolResultBlock"), unread["ToolMessage"])
    contents = [
        schemas[title]["properties"]["content"] for title in ("UserMessage", "ItemMessage", "UserTurn", "AnswerTurn")
    ]
    several = [one["oneOf"][1]["items"] for one in (*contents, schemas["ResponsesRequest"]["properties"]["input"])]
    for choices in (*several, schemas["ChatCompletionRequest"]["properties"]["messages"]["items"]):
        choices["oneOf"] = [one for one in choices["oneOf"] if not unread.get(one["$ref"].rpartition("/")[2], False)]
    answer = schemas["AssistantMessage"]["properties"]
    for name in ("audio", *(("tool_calls", "function_call") if unread["ToolMessage"] else ())):
        del answer[name]
    if not offers_tools(chat):
        for title in OF_CHAT:
            for name in {"tools", "tool_choice", "parallel_tool_calls"} & schemas[title]["properties"].keys():
                del schemas[title]["properties"][name]


def offers_tools(chat: ChatModel) -> bool:
    """Whether the model can be told of tools."""
    return chat.processor.call_format is not None


def _drop_unused(found: Mapping[str, Any]) -> None:
    """Until nothing refers to what is left out."""
    schemas = found["components"]["schemas"]
    unused = [""]
    while unused:
        told = json.dumps(found)
        unused = [name for name in schemas if f'"{PLACE}{name}"' not in told]
        for name in unused:
            del schemas[name]
