"""What clients of `/v1/decisions` send: what it is about, and typed questions, each a `siglane.types.Question`.

SGLang's questions (`id`, `question`) and OpenAI's (`name`, `instructions`) are read, those of a request in one of both.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import orjson
from pydantic import BeforeValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator

from siglane.engine.sampling.labels import MOST_LABELS
from siglane.errors import UserError, blaming
from siglane.server.fields import WHOLE, RequestModel, TemplateKwargs
from siglane.server.generation_fields import CacheSalt
from siglane.server.protocol import UrlOrImage, kind_of
from siglane.server.refused import refuse_fields
from siglane.types import Question

MAX_QUESTIONS = 64
MAX_IMAGES = 2048
MAX_LEVELS = 10  # their labels are digits
MAX_NAME = 512


def rendered(content: Any) -> str:
    """A text as it is, anything else as compact JSON, None as nothing."""
    if content is None or isinstance(content, str):
        return content or ""
    try:
        return orjson.dumps(content).decode()
    except orjson.JSONEncodeError as error:
        raise UserError("is nested too deeply", code="invalid_value") from error


def _content(value: Any) -> Any:
    if value is not None and not isinstance(value, str | dict | list):
        raise UserError("must be a text, an object or a list", code="invalid_value")
    rendered(value)
    return value


def _filled(value: Any) -> Any:
    if not rendered(_content(value)).strip() or not value:
        raise UserError("must not be empty", code="invalid_value")
    return value


_ANY = {"type": ["string", "object", "array"]}
_SOME = {
    "anyOf": [{"type": "string", "pattern": r"\S"}, {"type": ["object", "array"], "minItems": 1, "minProperties": 1}]
}
Content = Annotated[Any, BeforeValidator(_content), WithJsonSchema({"type": [*_ANY["type"], "null"]})]
Filled = Annotated[Any, BeforeValidator(_filled), WithJsonSchema(_SOME)]
Name = Annotated[str, Field(pattern=r"\S", max_length=MAX_NAME)]
_BREAK = r"\x00-\x1f\x7f-\x9f\u2028\u2029"
LINE = rf"^[^{_BREAK}]*[^\s{_BREAK}][^{_BREAK}]*$"
Line = Annotated[str, Field(pattern=LINE, max_length=MAX_NAME)]


def check_options(names: Iterable[str]) -> None:
    """UserError for names that would not be lines of their own, or read alike."""
    seen: set[str] = set()
    for name in names:
        alike = name.strip().casefold()
        if (
            not alike
            or len(name) > MAX_NAME
            or any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name)
        ):
            message = f"an option's name must be one line of 1 to {MAX_NAME} letters"
            raise UserError(message, code="invalid_value")
        if alike in seen:
            raise UserError(f"the option {name[:40]!r} is there twice", code="invalid_value")
        seen.add(alike)


def _choice(question: str, options: Sequence[tuple[str, str]]) -> Question:
    """options: names and descriptions. UserError as `check_options`."""
    check_options(name for name, _ in options)
    return Question.choice(question, dict(options))


class Option(RequestModel):
    name: Line
    description: Content = None


class _WithId(RequestModel):
    id: Name
    question: Filled


class YesNoQuestion(_WithId):
    """yes, no: what each of them means."""

    type: Literal["yes_no"]
    yes: Content = None
    no: Content = None

    @property
    def asked(self) -> Question:
        return Question.yes_no(rendered(self.question), rendered(self.yes), rendered(self.no))


class ChoiceQuestion(_WithId):
    type: Literal["choice"]
    options: Annotated[list[Option], Field(min_length=2, max_length=MOST_LABELS)]

    @property
    def asked(self) -> Question:
        return _choice(rendered(self.question), [(one.name, rendered(one.description)) for one in self.options])


class ScoreQuestion(_WithId):
    """levels: from the lowest on."""

    type: Literal["score"]
    levels: Annotated[list[Filled], Field(min_length=2, max_length=MAX_LEVELS)]

    @property
    def asked(self) -> Question:
        return Question.score(rendered(self.question), [rendered(level) for level in self.levels])


class LabelsQuestion(_WithId):
    """siglane's own: the question is put as it stands, and the labels are what the model would write."""

    type: Literal["labels"]
    labels: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MOST_LABELS)]

    @property
    def asked(self) -> Question:
        return Question(rendered(self.question), tuple(self.labels))


class TextInput(RequestModel):
    type: Literal["input_text", "text"]
    text: str


def _instructions(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


TextInputs = Annotated[list[TextInput], Field(min_length=1, max_length=64)]
Instructions = Annotated[TextInputs, BeforeValidator(_instructions, json_schema_input_type=str | TextInputs)]


class _Instructed(RequestModel):
    name: Annotated[str, Field(max_length=MAX_NAME)] | None = None
    instructions: Instructions

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.instructions)


class PredicateQuestion(_Instructed):
    type: Literal["predicate"]

    @property
    def asked(self) -> Question:
        return Question.yes_no(self.text)


LineOrBool = Annotated[
    Annotated[Line, Tag("#line")] | Annotated[bool, Tag("#bool")],
    Discriminator(lambda given: "#bool" if isinstance(given, bool) else "#line"),
]


class ChoiceValue(RequestModel):
    value: LineOrBool
    description: str | None = None

    @property
    def name(self) -> str:
        return str(self.value).lower() if isinstance(self.value, bool) else self.value


class ValuesQuestion(_Instructed):
    """OpenAI's choice."""

    type: Literal["choice"]
    choices: Annotated[list[ChoiceValue], Field(min_length=2, max_length=MOST_LABELS)]

    @property
    def asked(self) -> Question:
        return _choice(self.text, [(choice.name, choice.description or "") for choice in self.choices])


class Level(RequestModel):
    label: Line
    description: str | None = None


class LevelsQuestion(_Instructed):
    """OpenAI's score."""

    type: Literal["score"]
    levels: Annotated[list[Level], Field(min_length=2, max_length=MAX_LEVELS)]

    @property
    def asked(self) -> Question:
        named = [f"{level.label} - {level.description}" if level.description else level.label for level in self.levels]
        return Question.score(self.text, named)


def of_type(*kinds: str) -> BeforeValidator:
    """UserError for an object of another type, before its fields are looked at."""

    def check(question: Any) -> Any:
        if isinstance(question, dict) and question.get("type") not in kinds:
            raise UserError(f"must be one of {', '.join(kinds)}", code="invalid_value", param="type")
        return question

    return BeforeValidator(check)


def by_type(*kinds: str) -> Discriminator:
    """A question's tag is its type; the first one's where it has none."""

    def tag(question: Any) -> str:
        kind = kind_of(question)
        return f"#{kind if kind in kinds else kinds[0]}"

    return Discriminator(tag)


SGLANG, OPENAI = ("yes_no", "choice", "score", "labels"), ("predicate", "choice", "score")
SglangQuestion = Annotated[
    Annotated[YesNoQuestion, Tag("#yes_no")]
    | Annotated[ChoiceQuestion, Tag("#choice")]
    | Annotated[ScoreQuestion, Tag("#score")]
    | Annotated[LabelsQuestion, Tag("#labels")],
    by_type(*SGLANG),
    of_type(*SGLANG),
]
OpenaiQuestion = Annotated[
    Annotated[PredicateQuestion, Tag("#predicate")]
    | Annotated[ValuesQuestion, Tag("#choice")]
    | Annotated[LevelsQuestion, Tag("#score")],
    by_type(*OPENAI),
    of_type(*OPENAI),
]
Several = Field(min_length=1, max_length=MAX_QUESTIONS)


def _asks_as(questions: Any) -> str:
    """The first question says it for all of them."""
    first = questions[0] if isinstance(questions, list) and questions else None
    instructed = isinstance(first, _Instructed) or (isinstance(first, dict) and "instructions" in first)
    return "#openai" if instructed else "#sglang"


Questions = Annotated[
    Annotated[list[SglangQuestion], Several, Tag("#sglang")] | Annotated[list[OpenaiQuestion], Several, Tag("#openai")],
    Discriminator(_asks_as),
]


class Decisions(RequestModel):
    """about_field: what holds what the questions are about."""

    about_field: ClassVar[str]

    model: str | None = None
    images: Annotated[list[UrlOrImage], Field(max_length=MAX_IMAGES)] | None = None
    chat_template_kwargs: TemplateKwargs = None
    cache_salt: CacheSalt | None = None
    include_timings: bool | None = None

    def check_extra(self) -> None:
        extra = self.model_extra or {}
        refuse_fields(extra)
        if extra.get("assets"):
            message = "assets are not read; send images, which stand in front of what the questions are about"
            raise UserError(message, code="unsupported_field", param="assets")


def checked(questions: Sequence[Any]) -> tuple[Question, ...]:
    """UserError names the one that is none."""
    found = []
    for number, question in enumerate(questions):
        with blaming(f"questions[{number}]"):
            found.append(question.asked)
    return tuple(found)


class DecisionRequest(Decisions):
    """input: what the questions are about; a list is OpenAI's messages where the questions are OpenAI's, else JSON."""

    about_field = "input"

    input: Filled
    questions: Questions
    temperature: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    prompt_format_version: Annotated[Literal[1], WHOLE] | None = None
    return_prompt_token_ids: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> DecisionRequest:
        self.check_extra()
        if not self.is_openai:
            ids = [question.id for question in self.questions if isinstance(question, _WithId)]
            if len({*ids}) < len(ids):
                raise UserError("each question needs an id of its own", code="invalid_value", param="questions")
        checked(self.questions)
        return self

    @property
    def is_openai(self) -> bool:
        return isinstance(self.questions[0], _Instructed)
