"""POST /v1/embeddings and /v1/classify: a server around both towers of a SigLIP."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pybase64
import torch
import torch.nn.functional as F

from siglane.config.two_tower import TwoTowerConfig
from siglane.engine.embed_worker import Embedding, Item
from siglane.errors import EngineError, UserError
from siglane.families.pipeline import report_image
from siglane.families.report import ImageReport
from siglane.media.item import MediaItem
from siglane.server.context import RequestContext
from siglane.server.embedder import Embedder, EngineEmbedder
from siglane.server.embedding_protocol import (
    Classification,
    ClassificationList,
    ClassificationRequest,
    EmbeddingList,
    EmbeddingRequest,
    EncoderReport,
    EncoderUsage,
    Input,
    PromptDetails,
    TextInput,
)
from siglane.server.middleware import shutting_down
from siglane.server.state import ModelState
from siglane.server.stopwatch import Stopwatch
from siglane.settings.server import ServerConfig
from siglane.settings.tagging import TEMPLATES
from siglane.tagging.labels import check_labels, check_templates, texts_of
from siglane.text.tokens import TextTokens
from siglane.tiling.rule import CHECKPOINT_LIMITS, ImageBudget

KEPT_TEXTS = 16384  # vectors; labels come again with every request


@dataclass(frozen=True, slots=True, eq=False)
class _Vector:
    """f32 `[D]`, unit length. tokens: of a text, or patches of a picture; cut: whether a text was too long."""

    vector: torch.Tensor
    tokens: int
    cut: bool = False


class _Read(NamedTuple):
    """A text as the tower reads it. ids: i64 `[length]`; kept: how many of them are not padding."""

    ids: torch.Tensor
    kept: int
    cut: bool


@dataclass(frozen=True, slots=True)
class _Embedded:
    vectors: list[_Vector]
    images: list[ImageReport]
    usage: EncoderUsage


class EmbeddingState(ModelState):
    """One SigLIP behind one server. `model` is its folder or hub id."""

    def __init__(
        self,
        config: ServerConfig,
        model: str,
        facts: TwoTowerConfig,
        tokens: TextTokens,
        embedder: Embedder | EngineEmbedder,
        budget: ImageBudget = CHECKPOINT_LIMITS,
        beside: ModelState | None = None,
    ) -> None:
        super().__init__(config, model, facts, facts.images, embedder, budget, beside=beside)
        self._facts, self.tokens, self.embedder = facts, tokens, embedder
        self.width = facts.text.projection_size
        self.known: OrderedDict[str, _Vector] = OrderedDict()

    @property
    def context_length(self) -> int:
        return self._facts.text.length

    @property
    def prepared_as(self) -> str:
        """How texts are prepared, in words."""
        rule = self.tokens.rule
        punctuation = "without punctuation" if rule.delete_punctuation else "with punctuation"
        return f"lower case, {punctuation}, cut and padded to {rule.length} tokens with id {rule.pad_id}"

    def fail_all(self) -> None:
        super().fail_all()
        self.embedder.fail_all(shutting_down())

    def close(self) -> None:
        super().close()
        self.embedder.close()

    def remember(self, texts: Mapping[str, _Vector]) -> None:
        """Keeps the vectors of the texts that were asked for last."""
        for text, vector in texts.items():
            self.known[text] = vector
            self.known.move_to_end(text)
        while len(self.known) > KEPT_TEXTS:
            self.known.popitem(last=False)


async def embed(body: EmbeddingRequest, context: RequestContext, state: EmbeddingState) -> EmbeddingList:
    """The vectors of all inputs, in order. UserError or EngineError names the first input without one."""
    state.check_model(body.model)
    if body.dimensions not in (None, state.width):
        message = f"the vectors of {state.name!r} have {state.width} dimensions; leave dimensions out"
        raise UserError(message, code="invalid_value", param="dimensions")
    inputs = list(body.inputs())
    found = await _embed(inputs, context, state)
    as_text = body.encoding_format == "base64"
    return {
        "object": "list",
        "model": state.name,
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(one.vector, as_text)}
            for index, one in enumerate(found.vectors)
        ],
        "usage": found.usage,
        "siglane": _report(found, inputs, state),
    }


async def classify(body: ClassificationRequest, context: RequestContext, state: EmbeddingState) -> ClassificationList:
    """The labels that fit each picture, by sigmoid scores."""
    state.check_model(body.model)
    labels = check_labels(body.labels)
    given = body.templates or ([body.template] if body.template is not None else TEMPLATES)
    templates = check_templates(given)
    texts = [text for template in templates for text in texts_of(template, labels)]
    pictures = list(body.pictures())
    where = [f"labels[{number}]" for _ in templates for number in range(len(labels))]
    inputs: list[Input] = [*pictures, *map(TextInput, texts, where)]
    found = await _embed(inputs, context, state)
    vectors = torch.stack([one.vector for one in found.vectors])
    images, written = vectors[: len(pictures)], vectors[len(pictures) :]
    tags = await state.media.run(_tags, images, written, labels, state, body.threshold, body.max_tags)
    return {
        "object": "list",
        "model": state.name,
        "data": tags,
        "usage": found.usage,
        "siglane": _report(found, inputs, state),
    }


@torch.inference_mode()
def _tags(
    images: torch.Tensor,
    written: torch.Tensor,
    labels: Sequence[str],
    state: EmbeddingState,
    threshold: float,
    most: int,
) -> list[Classification]:
    """images `[I, D]`, written `[templates * labels, D]`: a label's vector is the mean of its templates'."""
    matrix = F.normalize(written.unflatten(0, (-1, len(labels))).sum(0), dim=-1)
    confidences, order = state.embedder.scores(images, matrix).sort(dim=1, descending=True, stable=True)
    rows = zip(confidences[:, :most].tolist(), order[:, :most].tolist(), strict=True)
    return [
        {
            "object": "classification",
            "index": index,
            "tags": [
                {"label": labels[number], "confidence": value}
                for value, number in zip(values, numbers, strict=True)
                if value >= threshold
            ],
        }
        for index, (values, numbers) in enumerate(rows)
    ]


async def _embed(inputs: Sequence[Input], context: RequestContext, state: EmbeddingState) -> _Embedded:
    """Pictures and texts side by side. What is known of a text is taken from the state."""
    watch = Stopwatch()
    items = [one for one in inputs if isinstance(one, MediaItem)]
    _admit(items, state)
    await state.media.fetch(items, "", context.lease)
    watch.note("fetch")
    await state.media.lay_out(items)
    await state.media.preprocess(items, context.lease)
    watch.add("decode", sum(item.decoding for item in items))
    watch.add("prepare", sum(item.cutting for item in items))
    written = {one.text: state.known.get(one.text) for one in inputs if isinstance(one, TextInput)}
    new = [text for text, vector in written.items() if vector is None]
    read = await state.media.run(_read, new, state.tokens)
    places = {one.text: one.param for one in reversed(inputs) if isinstance(one, TextInput)}
    done = await _computed(
        [*(item.patches for item in items), *(text.ids for text in read)],
        [*(item.param for item in items), *(places[text] for text in new)],
        state,
    )
    if done:
        watch.add("queue", max(one.queue for one in done))
        watch.add("encode", max(one.encode for one in done))
    pictures = [_Vector(one.vector, item.layout.patches) for one, item in zip(done, items, strict=False)]
    fresh = (_Vector(one.vector, text.kept, text.cut) for one, text in zip(done[len(items) :], read, strict=True))
    known = {text: vector for text, vector in written.items() if vector is not None}
    texts = known | dict(zip(new, fresh, strict=True))
    state.remember(texts)
    state.metrics.observe_stages(watch.seconds)
    state.metrics.images.inc(len(items))
    remaining = iter(pictures)
    vectors = [texts[one.text] if isinstance(one, TextInput) else next(remaining) for one in inputs]
    return _Embedded(vectors, list(map(report_image, items)), _usage(inputs, vectors, state))


def _admit(items: Sequence[MediaItem], state: EmbeddingState) -> None:
    try:
        state.media.admit(items)
    except UserError as error:  # of all of them together, it blames a chat's messages
        raise (error.at(items[0].param.partition("[")[0]) if error.param == "messages" else error) from None


def _read(texts: Sequence[str], tokens: TextTokens) -> list[_Read]:
    counts = [tokens.count(text) for text in texts]
    most = tokens.rule.length - 1  # the last one is the end
    return [
        _Read(ids, min(count, most) + 1, count > most) for ids, count in zip(tokens.ids(texts), counts, strict=True)
    ]


async def _computed(items: Sequence[Item], places: Sequence[str], state: EmbeddingState) -> list[Embedding]:
    """All embeddings, or the error of the first item without one, which names it."""
    if state.ended:
        raise shutting_down()
    futures = [asyncio.wrap_future(state.embedder.submit(item)) for item in items]
    results = await asyncio.gather(*futures, return_exceptions=True)
    done: list[Embedding] = []
    for place, result in zip(places, results, strict=True):
        if isinstance(result, EngineError) and result.status == 500:
            raise EngineError(f"{place}: {result.message}", code=result.code)
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    return done


def _usage(inputs: Sequence[Input], vectors: Sequence[_Vector], state: EmbeddingState) -> EncoderUsage:
    """Counts an answer that was given in full."""
    pairs = list(zip(inputs, vectors, strict=True))
    patches = sum(vector.tokens for one, vector in pairs if isinstance(one, MediaItem))
    tokens = sum(vector.tokens for one, vector in pairs if isinstance(one, TextInput))
    state.metrics.count_tokens(prompt=patches + tokens, cached=0, image=patches, completion=0)
    details: PromptDetails = {"image_tokens": patches, "text_tokens": tokens}
    return {"prompt_tokens": patches + tokens, "total_tokens": patches + tokens, "prompt_tokens_details": details}


def _report(found: _Embedded, inputs: Sequence[Input], state: EmbeddingState) -> EncoderReport:
    pairs = zip(inputs, found.vectors, strict=True)
    cut = list(dict.fromkeys(one.param for one, vector in pairs if vector.cut))
    report: EncoderReport = {"images": found.images, "texts": state.prepared_as}
    return {**report, "cut": cut} if cut else report


def _encoded(vector: torch.Tensor, as_text: bool) -> list[float] | str:
    values = vector.numpy().astype("<f4")
    return pybase64.b64encode(values.tobytes()).decode() if as_text else values.tolist()
