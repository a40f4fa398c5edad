"""POST /v1/embeddings and /v1/classify: vectors and tags by both towers of a SigLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pybase64
import torch

from siglane.engine.embed_worker import Embedding, Item
from siglane.errors import EngineError, UserError
from siglane.families.pipeline import report_image
from siglane.families.report import ImageReport
from siglane.media.item import MediaItem
from siglane.server.context import RequestContext
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
from siglane.server.served import EmbedModel
from siglane.server.stopwatch import Stopwatch
from siglane.server.text_cache import Vector
from siglane.settings.tagging import TEMPLATES
from siglane.tagging.labels import check_labels, check_templates, texts_of
from siglane.tagging.scoring import label_vectors, likeliest, sigmoid_scores
from siglane.text.tokens import TextTokens


class _ReadText(NamedTuple):
    """A text as the tower reads it. ids: i64 `[length]`; kept: how many of them are not padding."""

    ids: npt.NDArray[np.int64]
    kept: int
    cut: bool


@dataclass(frozen=True, slots=True)
class _Embedded:
    """vectors: of all inputs, in their order."""

    vectors: list[Vector]
    images: list[ImageReport]
    usage: EncoderUsage


async def embed(body: EmbeddingRequest, context: RequestContext, model: EmbedModel) -> EmbeddingList:
    """The vectors of all inputs, in order. UserError or EngineError names the first input without one."""
    if body.dimensions not in (None, model.width):
        message = f"the vectors of {model.name!r} have {model.width} dimensions; leave dimensions out"
        raise UserError(message, code="invalid_value", param="dimensions")
    inputs = list(body.inputs())
    found = await _embed(inputs, context, model)
    as_text = body.encoding_format == "base64"
    return {
        "object": "list",
        "model": model.name,
        "data": [
            {"object": "embedding", "index": index, "embedding": _encoded(one.vector, as_text)}
            for index, one in enumerate(found.vectors)
        ],
        "usage": found.usage,
        "siglane": _report(found, inputs, model),
    }


async def classify(body: ClassificationRequest, context: RequestContext, model: EmbedModel) -> ClassificationList:
    """The labels that fit each image, by sigmoid scores."""
    labels = check_labels(body.labels)
    given = body.templates or ([body.template] if body.template is not None else TEMPLATES)
    templates = check_templates(given)
    texts = [text for template in templates for text in texts_of(template, labels)]
    images = list(body.media())
    where = [f"labels[{number}]" for _ in templates for number in range(len(labels))]
    inputs: list[Input] = [*images, *map(TextInput, texts, where)]
    found = await _embed(inputs, context, model)
    vectors = torch.from_numpy(np.stack([one.vector for one in found.vectors]))
    by_template = vectors[len(images) :].unflatten(0, (len(templates), len(labels)))
    tags = await model.media.run(_tags, vectors[: len(images)], by_template, labels, model, body)
    return {
        "object": "list",
        "model": model.name,
        "data": tags,
        "usage": found.usage,
        "siglane": _report(found, inputs, model),
    }


@torch.inference_mode()
def _tags(
    images: torch.Tensor,
    by_template: torch.Tensor,
    labels: Sequence[str],
    model: EmbedModel,
    body: ClassificationRequest,
) -> list[Classification]:
    """images `[I, D]`, by_template `[templates, labels, D]`."""
    scores = sigmoid_scores(images, label_vectors(by_template), model.calibration)
    return [
        {
            "object": "classification",
            "index": index,
            "tags": [{"label": labels[number], "confidence": score} for number, score in found],
        }
        for index, found in enumerate(likeliest(scores, body.max_tags, body.threshold))
    ]


async def _embed(inputs: Sequence[Input], context: RequestContext, model: EmbedModel) -> _Embedded:
    """Images are cut into patches and texts that are new into tokens, then the engine embeds them side by side."""
    watch = Stopwatch()
    images = [one for one in inputs if isinstance(one, MediaItem)]
    _admit(images, model)
    await model.media.fetch(images, "", context.lease)
    watch.note("fetch")
    await model.media.lay_out(images)
    await model.media.preprocess(images, "", context.lease)
    watch.add("decode", sum(image.decoding for image in images))
    watch.add("prepare", sum(image.cutting for image in images))
    texts: dict[str, str] = {}  # where each stands first
    for one in inputs:
        if isinstance(one, TextInput):
            texts.setdefault(one.text, one.param)
    known = {text: vector for text in texts if (vector := model.texts.get(text)) is not None}
    new = {text: param for text, param in texts.items() if text not in known}
    read = await model.media.run(_read, list(new), model.tokens)

    items: list[Item] = [*(image.patches for image in images), *(text.ids for text in read)]
    done = await _computed(items, [*(image.param for image in images), *new.values()], model, watch)

    for text, ids, embedding in zip(new, read, done[len(images) :], strict=True):
        known[text] = Vector(embedding.vector, ids.kept, ids.cut)
        model.texts.put(text, known[text])
    in_order = iter(done)  # images come first
    vectors = [
        known[one.text] if isinstance(one, TextInput) else Vector(next(in_order).vector, one.layout.patches)
        for one in inputs
    ]
    model.metrics.observe_stages(watch.seconds)
    model.metrics.images.inc(len(images))
    return _Embedded(vectors, list(map(report_image, images)), _usage(inputs, vectors, model))


def _admit(images: Sequence[MediaItem], model: EmbedModel) -> None:
    try:
        model.media.admit(images)
    except UserError as error:  # of all of them together, it blames a chat's messages
        raise (error.at(images[0].param.partition("[")[0]) if error.param == "messages" else error) from None


def _read(texts: Sequence[str], tokens: TextTokens) -> list[_ReadText]:
    counts = [tokens.count(text) for text in texts]
    most = tokens.rule.length - 1  # the last one is the end
    rows = zip(tokens.ids(texts).numpy(), counts, strict=True)
    return [_ReadText(ids, min(count, most) + 1, count > most) for ids, count in rows]


async def _computed(
    items: Sequence[Item], params: Sequence[str], model: EmbedModel, watch: Stopwatch
) -> list[Embedding]:
    """All embeddings, or the error of the first item without one, which names it."""
    done: list[Embedding] = []
    for param, result in zip(params, await model.embed(items), strict=True):
        if isinstance(result, EngineError) and result.status == 500:
            raise EngineError(f"{param}: {result.message}", code=result.code)
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    if done:
        watch.add("queue", max(one.queue for one in done))
        watch.add("encode", max(one.encode for one in done))
    return done


def _usage(inputs: Sequence[Input], vectors: Sequence[Vector], model: EmbedModel) -> EncoderUsage:
    """Counts an answer that was given in full."""
    pairs = list(zip(inputs, vectors, strict=True))
    patches = sum(vector.tokens for one, vector in pairs if isinstance(one, MediaItem))
    tokens = sum(vector.tokens for one, vector in pairs if isinstance(one, TextInput))
    model.metrics.count_tokens(prompt=patches + tokens, cached=0, image=patches, completion=0)
    details: PromptDetails = {"image_tokens": patches, "text_tokens": tokens}
    return {"prompt_tokens": patches + tokens, "total_tokens": patches + tokens, "prompt_tokens_details": details}


def _report(found: _Embedded, inputs: Sequence[Input], model: EmbedModel) -> EncoderReport:
    pairs = zip(inputs, found.vectors, strict=True)
    cut = list(dict.fromkeys(one.param for one, vector in pairs if vector.cut))
    report: EncoderReport = {"images": found.images, "texts": model.prepared_as}
    return {**report, "cut": cut} if cut else report


def _encoded(vector: npt.NDArray[np.float32], as_text: bool) -> list[float] | str:
    values = vector.astype("<f4")
    return pybase64.b64encode(values.tobytes()).decode() if as_text else values.tolist()
