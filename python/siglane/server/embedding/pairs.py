"""What clients of `/score` send and get: pairs of texts and images, in the spellings of vLLM's `/score`."""

from __future__ import annotations

from typing import Literal, NotRequired

from pydantic import ConfigDict, model_validator
from typing_extensions import TypedDict  # pydantic reads no other on Python 3.11

from siglane.errors import UserError
from siglane.server.embedding.protocol import EncoderReport, EncoderUsage, Input, InputItem, Inputs, read_inputs
from siglane.server.fields import RequestModel, only
from siglane.server.refused import refuse_fields

SPELLINGS = (("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"))


class PairsRequest(RequestModel):
    """Two inputs, texts or images, or lists of them: as many of the second as of the first, or any number for one."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {
                    "allOf": [
                        only(first, *(name for pair in SPELLINGS if pair[0] != first for name in pair)),
                        only(second),
                    ]
                }
                for first, second in SPELLINGS
            ]
        }
    )

    model: str | None = None
    text_1: Inputs | None = None
    text_2: Inputs | None = None
    queries: Inputs | None = None
    documents: Inputs | None = None
    data_1: Inputs | None = None
    data_2: Inputs | None = None

    @model_validator(mode="after")
    def _check(self) -> PairsRequest:
        refuse_fields(self.model_extra or {})
        first, second = self.inputs()
        if len(first) not in (1, len(second)):
            message = f"there are {len(second)} inputs for {len(first)}; send as many of both, or one first"
            raise UserError(message, code="invalid_value", param=self.spelling[1])
        return self

    @property
    def spelling(self) -> tuple[str, str]:
        named = [pair for pair in SPELLINGS if any(self._given()[name] is not None for name in pair)]
        if len(named) != 1:
            message = "send text_1 and text_2, or queries and documents, or data_1 and data_2"
            raise UserError(message, code="missing_field", param="text_1")
        return named[0]

    def inputs(self) -> tuple[list[Input], list[Input]]:
        first, second = (self._one(name) for name in self.spelling)
        return first, second

    def _one(self, name: str) -> list[Input]:
        items = self._given()[name]
        if items is None:
            raise UserError(f"{name} is required", code="missing_field", param=name)
        return read_inputs(items, name)

    def _given(self) -> dict[str, list[str | InputItem] | None]:
        return {
            "text_1": self.text_1,
            "text_2": self.text_2,
            "queries": self.queries,
            "documents": self.documents,
            "data_1": self.data_1,
            "data_2": self.data_2,
        }


class PairScore(TypedDict):
    """score: the cosine of the two vectors; probability: of an image and a text, that they belong together."""

    index: int
    object: Literal["score"]
    score: float
    probability: NotRequired[float]


class PairScores(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[PairScore]
    usage: EncoderUsage
    siglane: EncoderReport
