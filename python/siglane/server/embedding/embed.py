"""POST /v1/embeddings and /v1/classify: vectors and tags by both towers of a SigLIP."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pybase64
import torch

from siglane.engine.process.embed_worker import Embedding, Item
from siglane.errors import EngineError, UserError
from siglane.families.pipeline import report_image
from siglane.families.report import ImageReport
from siglane.media.item import MediaItem
from siglane.server.context import RequestContext
from siglane.server.embedding.pairs import PairScore, PairScores, PairsRequest
from siglane.server.embedding.protocol import (
    Classification,
    ClassificationList,
    ClassificationRequest,
    EmbeddingList,
    EmbeddingObject,
    EmbeddingRequest,
    EncoderReport,
    EncoderUsage,
    Input,
    PromptDetails,
    TextInput,
)
from siglane.server.embedding.text_cache import Vector
from siglane.server.served import EmbedModel
from siglane.server.stopwatch import Stopwatch
from siglane.settings.tagging import TEMPLATES
from siglane.tagging.labels import check_labels, check_templates, texts_of
from siglane.tagging.scoring import label_vectors, likeliest, sigmoid_scores
from siglane.text.tokens import TextTokens

PIECE_TEXTS = 256
PIECE_CHARACTERS = 1 << 17


class _ReadText(NamedTuple):
    """A text as the tower reads it. ids: i64 `[length]`; kept: how many of them are not padding."""

    ids: npt.NDArray[np.int64]
    kept: int
    cut: bool


@dataclass(frozen=True, slots=True)
class _Embedded:
    """Vectors of the images and of the texts, each in their order. seconds: by stage, where they are asked for."""

    images: list[Vector]
    texts: list[Vector]
    reports: list[ImageReport]
    seconds: dict[str, float] | None


async def embed(body: EmbeddingRequest, context: RequestContext, model: EmbedModel) -> EmbeddingList:
    """The vectors of all inputs, in order. UserError or EngineError names the first input without one."""
    if body.dimensions not in (None, model.width):
        message = f"the vectors of {model.name!r} have {model.width} dimensions; leave dimensions out"
        raise UserError(message, code="invalid_value", param="dimensions")
    inputs = list(body.inputs())
    found, vectors = await _embed_all(inputs, context, model)
    return {
        "object": "list",
        "model": model.name,
        "data": await model.media.run(_rows, vectors, body.encoding_format == "base64"),
        "usage": _usage(found, model),
        "siglane": _report(found, _texts_of(inputs), model),
    }


async def score_pairs(body: PairsRequest, context: RequestContext, model: EmbedModel) -> PairScores:
    """How alike the two of each pair are."""
    firsts, seconds = body.inputs()
    inputs = [*firsts, *seconds]
    found, vectors = await _embed_all(inputs, context, model)
    pairs = [(0 if len(firsts) == 1 else number, len(firsts) + number) for number in range(len(seconds))]
    return {
        "id": f"score-{secrets.token_hex(12)}",
        "object": "list",
        "created": int(time.time()),
        "model": model.name,
        "data": [_score(number, pair, inputs, vectors, model) for number, pair in enumerate(pairs)],
        "usage": _usage(found, model),
        "siglane": _report(found, _texts_of(inputs), model),
    }


def _score(
    index: int, pair: tuple[int, int], inputs: Sequence[Input], vectors: Sequence[Vector], model: EmbedModel
) -> PairScore:
    first, second = (torch.from_numpy(vectors[number].vector)[None] for number in pair)
    score: PairScore = {"index": index, "object": "score", "score": float((first * second).sum())}
    if isinstance(inputs[pair[0]], TextInput) != isinstance(inputs[pair[1]], TextInput):
        score["probability"] = float(sigmoid_scores(first, second, model.calibration))
    return score


def _texts_of(inputs: Sequence[Input]) -> list[TextInput]:
    return [one for one in inputs if isinstance(one, TextInput)]


async def _embed_all(
    inputs: Sequence[Input], context: RequestContext, model: EmbedModel
) -> tuple[_Embedded, list[Vector]]:
    """The vectors in the order of the inputs too."""
    images = [one for one in inputs if isinstance(one, MediaItem)]
    found = await _embed(images, _texts_of(inputs), context, model)
    of_images, of_texts = iter(found.images), iter(found.texts)
    return found, [next(of_texts if isinstance(one, TextInput) else of_images) for one in inputs]


async def classify(body: ClassificationRequest, context: RequestContext, model: EmbedModel) -> ClassificationList:
    """The labels that fit each image, by sigmoid scores."""
    given = body.templates or ([body.template] if body.template is not None else TEMPLATES)
    count, most = len(body.labels) * len(given), model.config.max_label_texts
    if count > most:
        message = f"{len(body.labels)} labels in {len(given)} templates are {count} texts; at most {most} are accepted"
        raise UserError(message, code="too_many_texts", param="labels")
    labels, texts = await model.media.run(_label_texts, body.labels, given)
    found = await _embed(list(body.media()), texts, context, model)
    tags = await model.media.run(_tags, found, labels, model, body)
    return {
        "object": "list",
        "model": model.name,
        "data": tags,
        "usage": _usage(found, model),
        "siglane": _report(found, texts, model),
    }


def _label_texts(labels: Sequence[str], templates: Sequence[str]) -> tuple[Sequence[str], list[TextInput]]:
    """The labels, and each template with each of them. UserError for labels or templates that cannot be used."""
    labels, templates = check_labels(labels), check_templates(templates)
    where = [f"labels[{number}]" for number in range(len(labels))]
    texts = (zip(texts_of(template, labels), where, strict=True) for template in templates)
    return labels, [TextInput(text, param) for one in texts for text, param in one]


@torch.inference_mode()
def _tags(
    found: _Embedded, labels: Sequence[str], model: EmbedModel, body: ClassificationRequest
) -> list[Classification]:
    images, texts = (torch.from_numpy(np.stack([one.vector for one in some])) for some in (found.images, found.texts))
    scores = sigmoid_scores(images, label_vectors(texts.unflatten(0, (-1, len(labels)))), model.calibration)
    return [
        {
            "object": "classification",
            "index": index,
            "tags": [{"label": labels[number], "confidence": score} for number, score in likely],
        }
        for index, likely in enumerate(likeliest(scores, body.max_tags, body.threshold))
    ]


async def _embed(
    images: Sequence[MediaItem], texts: Sequence[TextInput], context: RequestContext, model: EmbedModel
) -> _Embedded:
    """Images are cut into patches and texts that are new into tokens, then the engine embeds them: the images and the
    first piece of the texts side by side, then one piece after the other, so that no request holds a thread or the
    event loop for as long as all of its texts take."""
    watch, salt = context.watch, context.client.salt(None)
    watch.start()
    if images:
        model.media.admit(images, images[0].param.partition("[")[0])
    await model.media.fetch(images, salt, context.lease)
    watch.note("fetch")
    await model.media.lay_out(images)
    context.client.take_patches(sum(image.layout.patches for image in images), context.batch)
    await model.media.preprocess(images, salt, context.lease)
    watch.share({"decode": sum(one.decoding for one in images), "prepare": sum(one.cutting for one in images)})
    first, *others = _pieces(texts)
    of_images, of_texts = await _vectors(images, first, context, model, watch)
    for piece in others:
        of_texts += (await _vectors((), piece, context, model, watch))[1]
    model.metrics.observe_stages(watch.seconds)
    model.metrics.images.inc(len(images))
    return _Embedded(of_images, of_texts, list(map(report_image, images)), watch.seconds if context.timings else None)


def _pieces(texts: Sequence[TextInput]) -> list[list[TextInput]]:
    """At least one: so many texts and letters as take a moment to tokenise."""
    pieces: list[list[TextInput]] = [[]]
    letters = 0
    for text in texts:
        letters += len(text.text)
        if pieces[-1] and (len(pieces[-1]) >= PIECE_TEXTS or letters > PIECE_CHARACTERS):
            pieces.append([])
            letters = len(text.text)
        pieces[-1].append(text)
    return pieces


async def _vectors(
    images: Sequence[MediaItem],
    texts: Sequence[TextInput],
    context: RequestContext,
    model: EmbedModel,
    watch: Stopwatch,
) -> tuple[list[Vector], list[Vector]]:
    """Of images and texts that are embedded side by side. What is known is not embedded again."""
    params: dict[str, str] = {}  # where each text stands first
    for one in texts:
        params.setdefault(one.text, one.param)
    known = {text: vector for text in params if (vector := model.texts.get(text)) is not None}
    new = {text: param for text, param in params.items() if text not in known}
    read = await model.media.run(_read, list(new), model.tokens) if new else []
    items: list[Item] = [*(image.patches for image in images), *(text.ids for text in read)]
    watch.start()
    context.admit()
    found = await model.embed(items, context.batch)
    done = _computed(found, [*(image.param for image in images), *new.values()], watch)
    for text, ids, embedding in zip(new, read, done[len(images) :], strict=True):
        known[text] = Vector(embedding.vector, ids.kept, ids.cut)
        model.texts.keep(text, known[text])
    of_images = [Vector(embedding.vector, image.layout.patches) for image, embedding in zip(images, done, strict=False)]
    return of_images, [known[one.text] for one in texts]


def _read(texts: Sequence[str], tokens: TextTokens) -> list[_ReadText]:
    counts = [tokens.count(text) for text in texts]
    most = tokens.rule.length - 1  # the last one is the end
    rows = zip(tokens.ids(texts).numpy(), counts, strict=True)
    return [_ReadText(ids, min(count, most) + 1, count > most) for ids, count in rows]


def _computed(results: Sequence[Embedding | BaseException], params: Sequence[str], watch: Stopwatch) -> list[Embedding]:
    """All embeddings, or the error of the first item without one, which names it."""
    done: list[Embedding] = []
    for param, result in zip(params, results, strict=True):
        if isinstance(result, EngineError) and result.status == 500:
            raise EngineError(f"{param}: {result.message}", code=result.code)
        if isinstance(result, BaseException):
            raise result
        done.append(result)
    if done:
        watch.share({"queue": max(one.queue for one in done), "encode": max(one.encode for one in done)})
    return done


def _usage(found: _Embedded, model: EmbedModel) -> EncoderUsage:
    """Counts an answer that was given in full."""
    patches, tokens = (sum(vector.tokens for vector in some) for some in (found.images, found.texts))
    model.metrics.count_tokens(prompt=patches + tokens, cached=0, image=patches, completion=0)
    details: PromptDetails = {"image_tokens": patches, "text_tokens": tokens}
    return {"prompt_tokens": patches + tokens, "total_tokens": patches + tokens, "prompt_tokens_details": details}


def _report(found: _Embedded, texts: Sequence[TextInput], model: EmbedModel) -> EncoderReport:
    cut = list(dict.fromkeys(one.param for one, vector in zip(texts, found.texts, strict=True) if vector.cut))
    report: EncoderReport = {"images": found.reports, "texts": model.prepared_as}
    if found.seconds is not None:
        report["timings"] = {stage: round(value, 6) for stage, value in found.seconds.items()}
    return {**report, "cut": cut} if cut else report


def _rows(vectors: Sequence[Vector], as_text: bool) -> list[EmbeddingObject]:
    """Written out here, a row at a time: all at once they would hold up the event loop."""
    written: list[Any] = [orjson.Fragment(orjson.dumps(_encoded(one, as_text))) for one in vectors]
    return [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(written)]


def _encoded(vector: Vector, as_text: bool) -> list[float] | str:
    values = vector.vector.astype("<f4")
    return pybase64.b64encode(values.tobytes()).decode() if as_text else values.tolist()
