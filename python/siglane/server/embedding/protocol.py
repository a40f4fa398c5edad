"""What clients of `/v1/embeddings` and `/v1/classify` send and get.

An input is a text or an image, in any of the shapes that servers of today read: OpenAI's strings, SGLang's
`{"text"}` / `{"image"}`, llama.cpp's `{"content": [parts]}`, and vLLM's `messages`. Bounds are checked here, and a
field is honoured, refused or reported as ignored, as in a chat.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from typing_extensions import TypedDict

from siglane.errors import UserError
from siglane.families.report import ImageReport
from siglane.image.signature import format_in_base64
from siglane.media.item import MediaItem
from siglane.media.messages import url_item
from siglane.server.fields import WHOLE, RequestModel, Url, as_url, not_both, one_of
from siglane.server.protocol import (
    TEXTS,
    ImageUrl,
    ImageUrlPart,
    Parts,
    TextPart,
    content_tag,
    of_types,
    part_tag,
    plain,
)
from siglane.server.refused import refuse_fields
from siglane.settings.tagging import CONFIDENCE_THRESHOLD, MAX_TAGS

MAX_INPUTS = 2048
MAX_LABELS = 16384
MAX_TEMPLATES = 128
MAX_CHARACTERS = 1 << 16  # of a text; the model reads its first few dozen tokens
DATA_URL = re.compile(r"\s*data:(image|video|audio)/[^\s,]*,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class TextInput:
    """param: where it stands, as `input[0]`."""

    text: str
    param: str


Input = TextInput | MediaItem


Words = Annotated[str, Field(json_schema_extra={"minLength": 1})]  # with modality "image" it may be a URL of any length


class InputUrl(ImageUrl):
    """The limits of an image are this model's, which may stand beside one that chats."""


Image = Annotated[InputUrl, BeforeValidator(as_url, json_schema_input_type=Url | InputUrl)]


class InputImagePart(ImageUrlPart):
    image_url: InputUrl


InputPart = Annotated[
    Annotated[TextPart, Tag("#text")] | Annotated[InputImagePart, Tag("#image_url")],
    Discriminator(part_tag),
    of_types(*TEXTS, "image_url", others={"video_url": "videos are not embedded"}),
]
InputContent = Annotated[
    Annotated[Words, Tag("#string")] | Annotated[list[InputPart], Parts, Tag("#parts")], Discriminator(content_tag)
]


class InputItem(RequestModel):
    model_config = ConfigDict(json_schema_extra=one_of("text", "image", "content"))

    text: Annotated[Words, Field(max_length=MAX_CHARACTERS)] | None = None
    image: Image | None = None
    content: InputContent | None = None


class InputMessage(RequestModel):
    """Who says it makes no difference to a vector."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: InputContent


Modality = Literal["text", "image"]


def _input_tag(item: Any) -> str:
    return "#text" if isinstance(item, str) else "#item"


def _as_list(value: Any) -> Any:
    values = [value] if isinstance(value, str | dict) else value
    if not isinstance(values, list):
        raise UserError("must be a text, an object, or a list of them", code="invalid_value")
    if not 1 <= len(values) <= MAX_INPUTS:
        raise UserError(f"between 1 and {MAX_INPUTS} items are accepted", code="invalid_value")
    if any(isinstance(item, int | list) for item in values):
        raise UserError("token ids are not accepted; send texts", code="invalid_value")
    return values


Item = Annotated[Annotated[Words, Tag("#text")] | Annotated[InputItem, Tag("#item")], Discriminator(_input_tag)]
Several = Annotated[list[Item], Field(min_length=1, max_length=MAX_INPUTS)]
Inputs = Annotated[list[Item], BeforeValidator(_as_list, json_schema_input_type=Item | Several)]


class EmbeddingRequest(RequestModel):
    """modality: what a bare string of `input` is, the URL of an image or a text; by default a text, but no data URL of
    an image: whoever sends one as a text is asked which of the two it is."""

    model_config = ConfigDict(json_schema_extra=one_of("input", "messages"))

    model: str | None = None
    input: Inputs | None = None
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1), WHOLE] | None = None
    modality: Modality | None = None

    @model_validator(mode="after")
    def _check(self) -> EmbeddingRequest:
        refuse_fields(self.model_extra or {})
        if (self.input is None) == (self.messages is None):
            raise UserError("send either input or messages", code="missing_field", param="input")
        list(self.inputs())  # UserError for an item that is not one text or one image
        return self

    def inputs(self) -> Iterator[Input]:
        """In the order of the answer's vectors."""
        yield from read_inputs(self.input or (), "input", self.modality)
        for message in self.messages or ():
            read = _of_content(message.content or "", "messages[0].content", self.modality)
            yield _of_kind(read, self.modality)


def _one_is_a_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


Template = Annotated[str, Field(json_schema_extra={"pattern": r"\{label\}"})]
Label = Annotated[str, Field(json_schema_extra={"pattern": r"\S", "maxLength": MAX_CHARACTERS})]


class ImageItem(RequestModel):
    """An image where texts may stand too."""

    image: Image


ImageItems = Annotated[list[Url | ImageItem], Field(min_length=1, max_length=MAX_INPUTS)]
Images = Annotated[list[Image], Field(min_length=1, max_length=MAX_INPUTS)]


class ClassificationRequest(RequestModel):
    """images: URLs, or objects with a URL and a budget; `input` is another name for it."""

    model_config = ConfigDict(
        json_schema_extra={"allOf": [one_of("images", "input"), not_both("template", "templates")]}
    )

    model: str | None = None
    images: Annotated[Images, BeforeValidator(_one_is_a_list, json_schema_input_type=Image | Images)] | None = None
    input: Annotated[Inputs, BeforeValidator(_as_list, json_schema_input_type=Url | ImageItem | ImageItems)] | None = (
        None
    )
    labels: Annotated[list[Label], Field(min_length=1, max_length=MAX_LABELS, json_schema_extra={"uniqueItems": True})]
    template: Template | None = None
    templates: Annotated[list[Template], Field(min_length=1, max_length=MAX_TEMPLATES)] | None = None
    threshold: Annotated[float, Field(ge=0, le=1)] = CONFIDENCE_THRESHOLD
    max_tags: Annotated[int, Field(ge=1), WHOLE] = MAX_TAGS
    modality: Literal["image"] | None = None

    @model_validator(mode="after")
    def _check(self) -> ClassificationRequest:
        refuse_fields(self.model_extra or {})
        if (self.images is None) == (self.input is None):
            raise UserError("send either images or input", code="missing_field", param="images")
        if self.template is not None and self.templates is not None:
            raise UserError("template and templates are the same; send one", code="invalid_value", param="template")
        for name, texts in (("labels", self.labels), ("templates", self.templates or [self.template or ""])):
            if any(len(text) > MAX_CHARACTERS for text in texts):
                raise UserError(f"a text has at most {MAX_CHARACTERS} characters", code="invalid_value", param=name)
        for number, label in enumerate(self.labels):
            _check_words(label, f"labels[{number}]", "a label is a text")
        list(self.media())
        return self

    def media(self) -> Iterator[MediaItem]:
        for number, image in enumerate(self.images or ()):
            yield url_item(plain(image), f"images[{number}]")
        for number, item in enumerate(self.input or ()):
            param = f"input[{number}]"
            read = _read(item, param, "image")
            if isinstance(read, TextInput):
                raise UserError("only images are classified", code="invalid_value", param=read.param)
            yield read


def read_inputs(items: Sequence[str | InputItem], param: str, modality: Modality | None = None) -> list[Input]:
    """UserError for an item that is not one text or one image, or of another kind."""
    return [_of_kind(_read(item, f"{param}[{n}]", modality), modality) for n, item in enumerate(items)]


def _read(item: str | InputItem, param: str, modality: Modality | None) -> Input:
    if isinstance(item, str):
        return _bare(item, param, modality)
    if item.content is not None:
        if item.text is not None or item.image is not None:
            raise UserError("content stands alone, without text and image", code="invalid_value", param=param)
        return _of_content(item.content, f"{param}.content", modality)
    if item.image is None:
        if item.text is None:
            raise UserError("an item needs text, image or content", code="missing_field", param=param)
        return _text(item.text, f"{param}.text")
    return _only([item.text or ""], [url_item(plain(item.image), f"{param}.image")], param)


def _bare(text: str, param: str, modality: Modality | None) -> Input:
    """A string that does not say what it is."""
    if modality == "image":
        return MediaItem(text, param)
    if modality is None:
        _check_words(text, param, 'an image is sent as {"image": URL} or with modality "image", letters with "text"')
    return _text(text, param)


def _check_words(text: str, param: str, hint: str) -> None:
    """UserError for a picture's data URL, or its base64 alone, where a text is read: its letters mean nothing."""
    if DATA_URL.match(text):
        raise UserError(f"{param} is a data URL; {hint}", code="ambiguous_input", param=param)
    if name := format_in_base64(text):
        raise UserError(f"{param} is {name} in base64; {hint}", code="ambiguous_input", param=param)


def _of_kind(read: Input, modality: Modality | None) -> Input:
    kind = "text" if isinstance(read, TextInput) else "image"
    if modality not in (None, kind):
        message = f"the modality is {modality}, and {read.param} is of kind {kind}"
        raise UserError(message, code="invalid_value", param=read.param)
    return read


def _of_content(content: str | Sequence[Any], param: str, modality: Modality | None) -> Input:
    if isinstance(content, str):
        return _bare(content, param, modality)
    texts = [part.text for part in content if isinstance(part, TextPart)]
    images = [
        url_item(plain(part.image_url), f"{param}[{number}]")
        for number, part in enumerate(content)
        if isinstance(part, ImageUrlPart)
    ]
    return _only(texts, images, param)


def _only(texts: Sequence[str], images: Sequence[MediaItem], param: str) -> Input:
    """One text or one image. Each has a tower of its own: there is no vector of both."""
    if not images:
        return _text("\n".join(texts), param)
    if len(images) > 1 or any(texts):
        message = "an item is one text or one image, the model has no vector of several; send them as items"
        raise UserError(message, code="invalid_value", param=param)
    return images[0]


def _text(text: str, param: str) -> TextInput:
    if not 0 < len(text) <= MAX_CHARACTERS:
        raise UserError(f"a text has between 1 and {MAX_CHARACTERS} characters", code="invalid_value", param=param)
    return TextInput(text, param)


class PromptDetails(TypedDict):
    image_tokens: int
    text_tokens: int


class EncoderUsage(TypedDict):
    """Patches of images and tokens of texts, the end token among them and what is cut off not."""

    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class EmbeddingObject(TypedDict):
    """embedding: numbers, or in base64 the bytes of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EncoderReport(TypedDict):
    """texts: how they are prepared; cut: the texts that were longer than the model reads; timings: seconds by
    stage, when the header x-siglane-timings asks for them."""

    images: list[ImageReport]
    texts: str
    timings: NotRequired[dict[str, float]]
    cut: NotRequired[list[str]]


class EmbeddingList(TypedDict):
    object: Literal["list"]
    model: str
    data: list[EmbeddingObject]
    usage: EncoderUsage
    siglane: EncoderReport


class TagReply(TypedDict):
    label: str
    confidence: float


class Classification(TypedDict):
    """tags: the most likely first, among equals in the order of the request's labels."""

    object: Literal["classification"]
    index: int
    tags: list[TagReply]


class ClassificationList(TypedDict):
    object: Literal["list"]
    model: str
    data: list[Classification]
    usage: EncoderUsage
    siglane: EncoderReport
