"""POST /v1/score: how likely labels are behind a text, raw and without a template, as SGLang has it."""

from __future__ import annotations

import functools
import secrets
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.engine.sampling.labels import MOST_LABELS, Ids, label_ids
from siglane.errors import UserError, blaming
from siglane.server.chat import Prepared, answered, usage_reply
from siglane.server.completions.complete import check_ids
from siglane.server.completions.protocol import MAX_IDS
from siglane.server.context import RequestContext
from siglane.server.decisions.labels import MAX_READS, Put, check_size, decisions_of, requests_of, usage_of
from siglane.server.fields import RequestModel, one_of
from siglane.server.generation_fields import CacheSalt, TokenId, prompt_tag
from siglane.server.refused import refuse_fields
from siglane.server.replies import UsageReply
from siglane.server.served import ChatModel
from siglane.server.tokens import ids_of
from siglane.types import Prompt, Question

UNSERVED = (
    "embed_override_token_id",
    "query_embed_overrides",
    "item_embed_overrides",
    "return_pooled_hidden_states",
    "score_extraction_token",
)


def _as_list(items: Any) -> Any:
    return [items] if isinstance(items, str) else items


TextOrIds = Annotated[
    Annotated[str, Tag("#text")] | Annotated[list[TokenId], Field(max_length=MAX_IDS), Tag("#ids")],
    Discriminator(lambda given: "#ids" if isinstance(given, list) else "#text"),
]
Items = Annotated[
    Annotated[list[str], Field(min_length=1, max_length=MAX_READS), Tag("#texts")]
    | Annotated[
        list[Annotated[list[TokenId], Field(max_length=MAX_IDS)]],
        Field(min_length=1, max_length=MAX_READS),
        Tag("#lists"),
    ],
    Discriminator(lambda given: "#lists" if prompt_tag(given) == "#lists" else "#texts"),
]
OneSet = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_LABELS, json_schema_extra={"uniqueItems": True})]
LabelIds = Annotated[
    Annotated[OneSet, Tag("#ids")] | Annotated[list[OneSet], Field(min_length=1, max_length=MAX_READS), Tag("#lists")],
    Discriminator(lambda given: "#lists" if prompt_tag(given) == "#lists" else "#ids"),
]


_TEXTS = {"type": "array", "items": {"type": "string"}}
ALIKE = {  # query and items are both texts or both token ids
    "allOf": [
        {
            "anyOf": [
                {"properties": {"query": {"type": "string"}, "items": {"anyOf": [{"type": "string"}, _TEXTS]}}},
                {"properties": {"query": {"type": "array"}, "items": {"type": "array", "items": {"type": "array"}}}},
            ]
        }
    ]
}


class ScoreRequest(RequestModel):
    """query and items are joined, each item with the query; label_token_ids: tokens, for all items or a list for each;
    labels: texts of any number of tokens instead."""

    model_config = ConfigDict(json_schema_extra=one_of("label_token_ids", "labels") | ALIKE)

    model: str | None = None
    query: TextOrIds
    items: Annotated[Items, BeforeValidator(_as_list, json_schema_input_type=str | Items)]
    label_token_ids: LabelIds | None = None
    labels: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_LABELS)] | None = (
        None
    )
    apply_softmax: bool = False
    temperature: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    return_token_logprobs: bool = False
    item_first: bool = False
    add_special_tokens: bool | None = None
    cache_salt: CacheSalt | None = None

    @model_validator(mode="after")
    def _check(self) -> ScoreRequest:
        refuse_fields(self.model_extra or {})
        for name in UNSERVED:
            if (self.model_extra or {}).get(name):
                raise UserError(f"{name} is not supported by this server", code="unsupported_field", param=name)
        if (self.labels is None) == (self.label_token_ids is None):
            message = "send either label_token_ids or labels"
            raise UserError(message, code="missing_field", param="label_token_ids")
        if isinstance(self.query, str) != isinstance(self.items[0], str):
            message = "query and items are both texts or both token ids"
            raise UserError(message, code="invalid_value", param="items")
        for number, ids in enumerate(sets := self.label_sets):
            if len({*ids}) < len(ids):
                param = f"label_token_ids[{number}]" if len(sets) > 1 else "label_token_ids"
                raise UserError("a label is there twice", code="invalid_value", param=param)
        if len(sets) > 1 and len(sets) != len(self.items):
            message = f"there are {len(sets)} lists of labels for {len(self.items)} items"
            raise UserError(message, code="invalid_value", param="label_token_ids")
        return self

    @property
    def label_sets(self) -> list[list[int]]:
        """Of token ids: one for all items, or one for each."""
        given: Any = self.label_token_ids or []
        return [given] if given and isinstance(given[0], int) else given


class Scores(TypedDict):
    """A row for each item, a number for each label: its probability among all that may follow, or with apply_softmax
    among the labels. token_logprobs: natural logs among all, where they were asked for."""

    object: Literal["scoring"]
    model: str
    scores: list[list[float]]
    token_logprobs: list[list[float]] | None
    usage: UsageReply


async def score(body: ScoreRequest, context: RequestContext, model: ChatModel) -> Scores:
    async with context.turn:
        watch = context.watch
        watch.start()
        puts = await _puts(body, model)
        check_size(puts, "items")
        watch.note("prepare")
        context.answer_id = request_id = f"score-{secrets.token_hex(12)}"
        requests = requests_of(request_id, puts, (), context.client.salt(body.cache_salt), context)
        prepared = Prepared(request_id, puts[0].prompt, requests, [], watch.seconds, context.timings)
    decisions = decisions_of(puts, await answered(prepared, context, model))
    rows = [one.shares(body.temperature) if body.apply_softmax else one.powers for one in decisions]
    return {
        "object": "scoring",
        "model": model.name,
        "scores": rows,
        "token_logprobs": [list(one.logprobs) for one in decisions] if body.return_token_logprobs else None,
        "usage": usage_reply(usage_of(puts, decisions)),
    }


async def _puts(body: ScoreRequest, model: ChatModel) -> list[Put]:
    if isinstance(body.query, str):
        query, texts = body.query, [item for item in body.items if isinstance(item, str)]
        joined = [f"{item}{query}" if body.item_first else f"{query}{item}" for item in texts]
        lists = await ids_of(joined, body.add_special_tokens is not False, model, "items")
    else:
        given, lists = body.query, [item for item in body.items if isinstance(item, list)]
        lists = [[*item, *given] if body.item_first else [*given, *item] for item in lists]
    labels = await model.aside(functools.partial(_labels, body, model))
    puts = []
    for number, ids in enumerate(lists):
        param = f"items[{number}]"
        check_ids(ids, model, param)
        each = labels[number if len(labels) > 1 else 0]
        puts.append(Put.of(Prompt(tuple(ids)), each, tuple(map(str, each)), model, param))
    return puts


def _labels(body: ScoreRequest, model: ChatModel) -> list[tuple[Ids, ...]]:
    if body.labels is not None:
        with blaming("labels"):
            return [label_ids(Question("", tuple(body.labels)), model.processor)]
    size = model.processor.config.language.vocab_size
    for ids in body.label_sets:
        if (largest := max(ids)) >= size:
            message = f"there is a label {largest}; the model's token ids are below {size}"
            raise UserError(message, code="invalid_value", param="label_token_ids")
    return [tuple((token_id,) for token_id in ids) for ids in body.label_sets]
