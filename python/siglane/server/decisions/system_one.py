"""What clients of `/v1/systemone` send: System One's questions, as vLLM, SGLang and transformers serve them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, Tag, model_validator

from siglane.engine.sampling.labels import MOST_LABELS
from siglane.errors import UserError
from siglane.server.decisions.protocol import (
    LINE,
    MAX_LEVELS,
    MAX_NAME,
    MAX_QUESTIONS,
    Content,
    Decisions,
    Filled,
    by_type,
    check_options,
    checked,
    of_type,
    rendered,
)
from siglane.server.fields import RequestModel
from siglane.types import Question

TYPES = ("noul", "choice", "score")
NAMES: dict[str, Any] = {"propertyNames": {"pattern": LINE, "maxLength": MAX_NAME}}


class NoulCriteria(RequestModel):
    true: Content = None
    false: Content = None


class NoulQuestion(RequestModel):
    type: Literal["noul"]
    instructions: Content = None
    criteria: NoulCriteria | None = None

    @property
    def asked(self) -> Question:
        criteria = self.criteria or NoulCriteria()
        texts = [rendered(one) for one in (self.instructions, criteria.true, criteria.false)]
        if not any(text.strip() for text in texts):
            raise UserError("a noul question needs instructions or criteria", code="missing_field")
        return Question.yes_no(*texts)


class OptionsQuestion(RequestModel):
    type: Literal["choice"]
    instructions: Content = None
    criteria: Annotated[dict[str, Content], Field(min_length=1, max_length=MOST_LABELS, json_schema_extra=NAMES)]

    @property
    def asked(self) -> Question:
        check_options(self.criteria)
        options = {name: rendered(description) for name, description in self.criteria.items()}
        return Question.choice(rendered(self.instructions), options)


class RatingQuestion(RequestModel):
    type: Literal["score"]
    instructions: Content = None
    criteria: Annotated[list[Filled], Field(min_length=1, max_length=MAX_LEVELS)]

    @property
    def asked(self) -> Question:
        return Question.score(rendered(self.instructions), [rendered(level) for level in self.criteria])


OneQuestion = Annotated[
    Annotated[NoulQuestion, Tag("#noul")]
    | Annotated[OptionsQuestion, Tag("#choice")]
    | Annotated[RatingQuestion, Tag("#score")],
    by_type(*TYPES),
    of_type(*TYPES),
]


class SystemOneRequest(Decisions):
    """state: what the questions are about; questions: by the names under which they are answered."""

    about_field = "state"

    state: Content
    questions: Annotated[dict[str, OneQuestion], Field(min_length=1, max_length=MAX_QUESTIONS)]

    @model_validator(mode="after")
    def _check(self) -> SystemOneRequest:
        self.check_extra()
        for name in ("temperature", "prompt_format_version", "return_prompt_token_ids"):
            if (self.model_extra or {}).get(name) is not None:
                message = f"{name} is no part of System One; /v1/decisions has it"
                raise UserError(message, code="unsupported_field", param=name)
        checked(list(self.questions.values()))
        return self
