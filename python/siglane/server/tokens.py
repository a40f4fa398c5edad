"""POST /tokenize, /detokenize, /v1/images/tokens: what a request would cost, from texts and the headers of its media.

Fields and answers are vLLM's and SGLang's (`prompt`, `messages`, `tokens`), texts also llama.cpp's (`content`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, NotRequired

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.errors import UserError
from siglane.families.pipeline import report_image
from siglane.families.report import ImageReport
from siglane.media.item import MediaItem
from siglane.media.messages import read_limits, url_item
from siglane.media.tools import read_tools
from siglane.server.chat import lay_out_prompt
from siglane.server.context import RequestContext
from siglane.server.fields import WHOLE, RequestModel, TemplateKwargs, Url, as_url, one_of
from siglane.server.generation_fields import CacheSalt, TokenId, prompt_tag
from siglane.server.protocol import Budgets, ImageUrl, Limit, Messages, plain
from siglane.server.refused import refuse_fields
from siglane.server.served import ChatModel
from siglane.server.stopwatch import Stopwatch
from siglane.server.tool_fields import Tools
from siglane.types import Size, Tool, VideoSize

MAX_TEXTS = 1024
MAX_IDS = 1 << 20
MAX_PICTURES = 2048
MAX_SIDE = 1 << 24

Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]
Ids = Annotated[list[TokenId], Field(max_length=MAX_IDS)]
IdLists = Annotated[list[Ids], Field(min_length=1, max_length=MAX_TEXTS)]
OneOrMoreTexts = Annotated[
    Annotated[str, Tag("#text")] | Annotated[Texts, Tag("#texts")],
    Discriminator(lambda given: "#texts" if isinstance(given, list) else "#text"),
]
OneOrMoreIds = Annotated[
    Annotated[Ids, Tag("#ids")] | Annotated[IdLists, Tag("#lists")],
    Discriminator(lambda given: "#lists" if prompt_tag(given) == "#lists" else "#ids"),
]


class TokenizeRequest(RequestModel):
    """Texts as they stand, special tokens in them counted as such, or a conversation through the chat template."""

    model_config = ConfigDict(json_schema_extra=one_of("prompt", "content", "messages"))

    model: str | None = None
    prompt: OneOrMoreTexts | None = None
    content: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: Tools | None = None
    chat_template_kwargs: TemplateKwargs = None
    cache_salt: CacheSalt | None = None

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        refuse_fields(self.model_extra or {})
        given = [value for value in (self.prompt, self.content, self.messages) if value is not None]
        if len([value for value in given if value != ""] or given[:1]) != 1:  # as documented, "" says nothing
            raise UserError("send either prompt or messages", code="missing_field", param="prompt")
        if self.tools and self.messages is None:
            raise UserError("tools are only accepted together with messages", code="invalid_value", param="tools")
        _ = self.told_tools
        return self

    @cached_property
    def told_tools(self) -> tuple[Tool, ...]:
        use = read_tools(plain(self.tools))
        return () if use is None else use.tools


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: OneOrMoreIds
    skip_special_tokens: bool | None = None


class TokenList(TypedDict):
    """tokens: an image's rows hold its placeholder; token_strs: where they were asked for. Of a conversation also what
    the model would see of each image, and the bytes that its keys and values would take."""

    count: int | list[int]
    max_model_len: int
    tokens: list[int] | list[list[int]]
    token_strs: list[str] | list[list[str]] | None
    image_tokens: NotRequired[int]
    images: NotRequired[list[ImageReport]]
    kv_bytes: NotRequired[int | None]


class DetokenizedText(TypedDict):
    """The same text under each server's name for it."""

    prompt: str | list[str]
    text: str | list[str]
    content: str | list[str]


async def tokenize(body: TokenizeRequest, context: RequestContext, model: ChatModel) -> TokenList:
    if body.messages is not None:
        return await _conversation(body, context, model)
    given = body.prompt or body.content or ""
    lists = await ids_of([given] if isinstance(given, str) else given, body.add_special_tokens is not False, model)
    words = await model.aside(lambda: [_texts_of(model, ids) for ids in lists]) if body.return_token_strs else None
    if isinstance(given, str):
        return _listed(len(lists[0]), lists[0], words and words[0], model)
    return _listed([len(ids) for ids in lists], lists, words, model)


async def _conversation(body: TokenizeRequest, context: RequestContext, model: ChatModel) -> TokenList:
    """Only the headers of its media are read."""
    assert body.messages is not None
    salt, watch = context.client.salt(body.cache_salt), Stopwatch()
    arguments = body.chat_template_kwargs
    prompt, media = await lay_out_prompt(body.messages, arguments, salt, context, model, watch, body.told_tools)
    ids = list(prompt.token_ids)
    words = await model.aside(lambda: _texts_of(model, ids)) if body.return_token_strs else None
    bytes_each = model.kv_bytes_per_token
    return {
        **_listed(len(ids), ids, words, model),
        "image_tokens": prompt.image_tokens,
        "images": list(map(report_image, media)),
        "kv_bytes": None if bytes_each is None else bytes_each * len(ids),
    }


def _listed(count: int | list[int], tokens: Any, words: Any, model: ChatModel) -> TokenList:
    return {"count": count, "max_model_len": model.context_length, "tokens": tokens, "token_strs": words}


async def ids_of(texts: Sequence[str], special: bool, model: ChatModel, param: str = "prompt") -> list[list[int]]:
    """Of texts as they stand, special tokens written in them counted as such. special: whether the tokenizer adds its
    own. UserError for a text that no context has room for, before it is read."""
    room = model.context_length * model.longest_token
    for text in texts:
        if len(text) > room:
            message = f"a text has {len(text)} characters, more than any that the model could read"
            raise UserError(message, code="context_length_exceeded", param=param)
    tokenizer = model.processor.tokenizer
    return await model.aside(lambda: [tokenizer(text, add_special_tokens=special).input_ids for text in texts])


def _texts_of(model: ChatModel, ids: Sequence[int]) -> list[str]:
    """A token's own text; a part of a character becomes U+FFFD."""
    return [model.token_texts.bytes_of(token_id).decode(errors="replace") for token_id in ids]


async def detokenize(body: DetokenizeRequest, context: RequestContext, model: ChatModel) -> DetokenizedText:
    several = bool(body.tokens) and isinstance(body.tokens[0], list)
    lists: list[list[int]] = body.tokens if several else [body.tokens]  # type: ignore[assignment, list-item]
    known = len(model.processor.tokenizer)
    for token_id in (token_id for ids in lists for token_id in ids):
        if token_id >= known:
            message = f"token {token_id} is not in the vocabulary, which ends at {known - 1}"
            raise UserError(message, code="invalid_value", param="tokens")
    skip = body.skip_special_tokens is True
    decode = model.processor.tokenizer.decode
    texts = await model.aside(lambda: [str(decode(ids, skip_special_tokens=skip)) for ids in lists])
    text: str | list[str] = texts if several else texts[0]
    return {"prompt": text, "text": text, "content": text}


Side = Annotated[int, Field(ge=1, le=MAX_SIDE), WHOLE]


class PictureSize(Budgets):
    """A picture or video that need not exist, beside the fields of `ImageBudget`."""

    width: Side
    height: Side
    num_frames: Limit | None = None


def _tag(value: Any) -> str:
    return "#url" if isinstance(value, ImageUrl) or (isinstance(value, dict) and "url" in value) else "#size"


Picture = Annotated[
    Annotated[ImageUrl, Tag("#url")] | Annotated[PictureSize, Tag("#size")],
    Discriminator(_tag),
    BeforeValidator(as_url, json_schema_input_type=Url | ImageUrl | PictureSize),
]


class ImageTokensRequest(RequestModel):
    """together: whether they are the pictures of one request; otherwise each is alone in its own."""

    model: str | None = None
    images: Annotated[list[Picture], Field(min_length=1, max_length=MAX_PICTURES)]
    together: bool | None = None


class ImageTokens(TypedDict):
    """tokens: of all images."""

    tokens: int
    images: list[ImageReport]


async def image_tokens(body: ImageTokensRequest, context: RequestContext, model: ChatModel) -> ImageTokens:
    items = [_item(picture, f"images[{number}]") for number, picture in enumerate(body.images)]
    requests = [items] if body.together else [[item] for item in items]
    for request in requests:
        model.media.admit(request)
    for item, picture in zip(items, body.images, strict=True):
        if isinstance(picture, PictureSize):  # of a video as many frames as are shown, whatever was asked for
            size = Size(picture.width, picture.height)
            item.size = VideoSize(size, item.frames) if item.frames else size
    await model.media.fetch([item for item in items if item.size is None], context.client.salt(None), context.lease)
    await asyncio.gather(*(model.media.lay_out(request) for request in requests))
    reports = list(map(report_image, items))
    return {"tokens": sum(report["tokens"] for report in reports), "images": reports}


def _item(picture: ImageUrl | PictureSize, param: str) -> MediaItem:
    fields = plain(picture)
    if isinstance(picture, ImageUrl):
        return url_item(fields, param)
    video = picture.num_frames is not None
    return MediaItem(None, param, read_limits(fields, param), video, picture.num_frames)
