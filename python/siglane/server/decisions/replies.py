"""What clients of `/v1/decisions` and `/v1/systemone` get, each in the shape of its questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.server.decisions.protocol import ChoiceValue, LevelsQuestion, PredicateQuestion, ValuesQuestion
from siglane.server.replies import InputUsage, SiglaneReport, UsageReply
from siglane.types import Decision


class DecisionAnswer(TypedDict):
    """SGLang's. label_mass: the probability that the model writes any of the labels; prompt_token_ids,
    label_token_ids: where they were asked for."""

    type: str
    probabilities: dict[str, float]
    label_mass: float
    choice: NotRequired[str]
    score: NotRequired[float]
    prompt_token_ids: NotRequired[list[int]]
    label_token_ids: NotRequired[list[list[int]]]


class DecisionReply(TypedDict):
    object: Literal["decisions"]
    model: str
    prompt_format_version: int
    answers: dict[str, DecisionAnswer]
    usage: UsageReply
    siglane: SiglaneReport


class PredicateAnswer(TypedDict):
    type: Literal["predicate"]
    name: str | None
    probability: float


class ValueProbability(TypedDict):
    value: str | bool
    probability: float


class ValueAnswer(TypedDict):
    type: Literal["choice"]
    name: str | None
    choice: str | bool
    confidence: float
    probabilities: list[ValueProbability]


class LevelProbability(TypedDict):
    value: int
    label: str
    probability: float


class LevelAnswer(TypedDict):
    type: Literal["score"]
    name: str | None
    score: float
    confidence: float
    probabilities: list[LevelProbability]


OpenaiAnswer = PredicateAnswer | ValueAnswer | LevelAnswer


class OpenaiDecision(TypedDict):
    """In the order of the questions."""

    model: str
    answers: list[OpenaiAnswer]
    usage: InputUsage
    siglane: SiglaneReport


class NoulAnswer(TypedDict):
    """x_label_mass: as `label_mass`."""

    type: Literal["noul"]
    noul: float
    x_label_mass: float


class OptionAnswer(TypedDict):
    type: Literal["choice"]
    choice: str
    confidence: float
    probabilities: dict[str, float]
    x_label_mass: float


class RatingAnswer(TypedDict):
    type: Literal["score"]
    score: float
    confidence: float
    legend: dict[str, Any]
    probabilities: dict[str, float]
    x_label_mass: float


OneAnswer = NoulAnswer | OptionAnswer | RatingAnswer


class SystemOneReply(TypedDict):
    model: str
    answers: dict[str, OneAnswer]
    usage: InputUsage
    siglane: SiglaneReport


def expected_level(shares: Sequence[float]) -> float:
    return math.fsum(level * share for level, share in enumerate(shares))


def choice_confidence(shares: Sequence[float]) -> float:
    """How far the likeliest stands above what chance gives it, from 0 to 1."""
    count = len(shares)
    return 1.0 if count == 1 else min(1.0, max(0.0, (count * max(shares) - 1) / (count - 1)))


def score_confidence(shares: Sequence[float]) -> float:
    """One less the distance from the likeliest level, as a share of what it is where all are equally likely."""
    count = len(shares)
    if count == 1:
        return 1.0
    best = shares.index(max(shares))
    distance = math.fsum(share * abs(level - best) for level, share in enumerate(shares))
    by_chance = math.fsum(abs(level - (count - 1) / 2) for level in range(count)) / count
    return max(0.0, 1 - distance / by_chance)


def sglang_answer(kind: str, decision: Decision, temperature: float) -> DecisionAnswer:
    shares = decision.shares(temperature)
    answer: DecisionAnswer = {
        "type": kind,
        "probabilities": dict(zip(decision.names, shares, strict=True)),
        "label_mass": decision.mass,
    }
    if kind in ("choice", "labels"):
        answer["choice"] = decision.choice
    elif kind == "score":
        answer["score"] = expected_level(shares)
    return answer


def openai_answer(
    question: PredicateQuestion | ValuesQuestion | LevelsQuestion, decision: Decision, temperature: float
) -> OpenaiAnswer:
    shares, name = decision.shares(temperature), question.name
    if isinstance(question, PredicateQuestion):
        return {"type": "predicate", "name": name, "probability": shares[0]}
    if isinstance(question, ValuesQuestion):
        values: list[ChoiceValue] = question.choices
        pairs = zip(values, shares, strict=True)
        return {
            "type": "choice",
            "name": name,
            "choice": values[shares.index(max(shares))].value,
            "confidence": choice_confidence(shares),
            "probabilities": [{"value": one.value, "probability": share} for one, share in pairs],
        }
    return {
        "type": "score",
        "name": name,
        "score": expected_level(shares),
        "confidence": score_confidence(shares),
        "probabilities": [
            {"value": number, "label": level.label, "probability": share}
            for number, (level, share) in enumerate(zip(question.levels, shares, strict=True))
        ],
    }


def system_one_answer(kind: str, levels: Sequence[Any], decision: Decision) -> OneAnswer:
    """levels: of a score, as they were sent."""
    shares, mass = decision.shares(), decision.mass
    if kind == "noul":
        return {"type": "noul", "noul": shares[0], "x_label_mass": mass}
    probabilities = dict(zip(decision.names, shares, strict=True))
    if kind == "choice":
        confidence = choice_confidence(shares)
        return {
            "type": "choice",
            "choice": decision.choice,
            "confidence": confidence,
            "probabilities": probabilities,
            "x_label_mass": mass,
        }
    return {
        "type": "score",
        "score": expected_level(shares),
        "confidence": score_confidence(shares),
        "legend": dict(zip(decision.names, levels, strict=True)),
        "probabilities": probabilities,
        "x_label_mass": mass,
    }
