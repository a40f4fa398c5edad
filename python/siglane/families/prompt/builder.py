"""Messages -> token ids: what the reference's template and tokenizer give, and a user's text is never more than text.

Two measures keep the roles apart. Before the template runs, every reserved string (an added token of the tokenizer or
the image placeholder) in a message is broken by a random mark, so that the reserved strings of the rendered prompt are
all the template's own. Then the marks are removed and the text between the reserved strings is tokenised by a copy of
the tokenizer that has no added tokens, so that no text can become a special id. Template text beside a user's text is
tokenised together with it, as in the reference.
"""

from __future__ import annotations

import inspect
import json
import re
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, assert_never

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from siglane.config.video import VideoRule
from siglane.errors import ConfigError, UserError
from siglane.families.family import PromptRules
from siglane.families.prompt.template import self_contained
from siglane.tiling.rule import no_video
from siglane.types import (
    ImagePart,
    ImagePatches,
    ImagePlaceholder,
    ImageSpan,
    Indicator,
    Marker,
    Message,
    Piece,
    Prompt,
    Role,
    Token,
)

PROBE = "siglane probe"
PROBE_SECONDS = 5.0
TEMPLATE_PARAMETERS = {*inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters, "messages"}

Parts = tuple[str | ImagePart, ...]


class ReservedStrings:
    """The strings that mean more than their letters: how to break them in a text, how to find them in a prompt."""

    def __init__(self, tokens: Sequence[AddedToken], *others: str) -> None:
        self._strips_left = {token.content for token in tokens if token.lstrip}
        self._strips_right = {token.content for token in tokens if token.rstrip}
        # the tokenizer searches for the leftmost one, and for the longest of those
        self._strings = sorted({*(token.content for token in tokens), *others}, key=len, reverse=True)
        self._anywhere = re.compile(f"(?={_either(map(re.escape, self._strings))})")
        self._heads = tuple({text[:length] for text in self._strings for length in range(1, len(text))})
        self._tails = tuple({text[start:] for text in self._strings for start in range(1, len(text))})

    def broken(self, text: str, mark: str) -> str:
        """`text` with `mark` inside every reserved string, and where the text around it could complete one."""
        pieces, start = [], 0
        for found in self._anywhere.finditer(text):
            pieces += [text[start : found.start() + 1], mark]
            start = found.start() + 1
        inside = "".join([*pieces, text[start:]])
        before = mark if text.startswith(self._tails) else ""
        after = mark if text.endswith(self._heads) or any(text in string for string in self._strings) else ""
        return before + inside + after

    def split(self, rendered: str, mark: str) -> list[str]:
        """Plain text and reserved strings in turn, plain first and last; the plain text without its marks.

        A reserved string of one letter cannot be broken inside: the mark behind it says that it is not the template's.
        """
        long = [re.escape(string) for string in self._strings if len(string) > 1]
        short = [f"{re.escape(string)}(?!{mark})" for string in self._strings if len(string) == 1]
        pieces = [piece.replace(mark, "") for piece in re.split(_either(long + short), rendered)]
        for place in range(1, len(pieces), 2):
            if pieces[place] in self._strips_left:
                pieces[place - 1] = pieces[place - 1].rstrip()
            if pieces[place] in self._strips_right:
                pieces[place + 1] = pieces[place + 1].lstrip()
        return pieces


class PromptBuilder:
    """Makes the prompts of one checkpoint. ConfigError when its chat template cannot be used."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        rules: PromptRules,
        *,
        image_token: str,
        image_token_id: int,
        video: VideoRule | None = None,
    ) -> None:
        added = tokenizer.added_tokens_decoder
        self._tokenizer, self._rules = tokenizer, rules
        self._image_token, self._image_token_id, self._video = image_token, image_token_id, video
        # what stands for a medium in a rendered prompt; a video's is only reserved where the model has one
        self._placeholders = (image_token,) if video is None else (image_token, video.token)
        self._special_ids = {token.content: number for number, token in added.items()}
        self._reserved = ReservedStrings(list(added.values()), *self._placeholders)
        self._reserved_in_text = ReservedStrings([t for t in added.values() if t.content not in self._placeholders])
        self._plain = without_added_tokens(tokenizer)
        self._template = rules.template or _only_template(tokenizer.chat_template, rules.default_template)
        self._roles_with_parts = self._probe()

    def chat(self, messages: Sequence[Message], images: Sequence[ImagePatches], arguments: Mapping[str, Any]) -> Prompt:
        """The prompt of a conversation, up to where the assistant's answer begins.

        images: pictures and videos, numbered together; arguments: extra variables of the chat template, each a string,
        number, boolean or None. UserError when the messages do not use each image exactly once, mix pictures and videos
        where the model reads one kind, or are refused by the template.
        """
        conversation = [self._parts(message) for message in messages]
        order = [part.image for parts in conversation for part in parts if isinstance(part, ImagePart)]
        if sorted(order) != list(range(len(images))):
            raise UserError(
                f"the messages refer to images {order} and the request holds {len(images)}; use each exactly once",
                code="image_count_mismatch",
                param="messages",
            )
        tokens = [self._placeholder(image) for image in images]
        if self._video is not None and not self._video.with_images and len(set(tokens)) > 1:
            message = "this model reads either images or videos in one request; send one kind"
            raise UserError(message, code="mixed_media", param="messages")
        mark = f"\ue000{secrets.randbits(128)}\ue001"
        turns = [
            {"role": message.role, "content": self._content(message.role, parts, tokens, mark)}
            for message, parts in zip(messages, conversation, strict=True)
        ]
        pieces = self._reserved.split(self._render(turns, self._variables(arguments, mark)), mark)
        return self._written(pieces, tokens, self._pieces(conversation, images), images, order)

    def template(self) -> str:
        """The checkpoint's chat template for engines that render it themselves (`families/prompt/template.py`)."""
        video = None if self._video is None else self._video.token
        return self_contained(self._template, self._rules, self._roles_with_parts, self._image_token, video)

    def rendered(self, text: str, images: Sequence[ImagePatches]) -> Prompt:
        """The prompt of a conversation that `template()` has rendered; its placeholders stand for `images` in order,
        pictures and videos counted apart.

        Special tokens written in `text` count, whoever wrote them: here nobody can tell the template's words from a
        user's. UserError when placeholders and images do not match one to one.
        """
        mark = f"\ue000{secrets.randbits(128)}\ue001"
        pieces = self._reserved.split(text, mark)
        tokens = [self._placeholder(image) for image in images]
        layouts = {number: image.layout.pieces for number, image in enumerate(images)}
        for place, number in _placeholders(pieces, tokens, self._placeholders):
            text, following = pieces[place + 1], "".join(pieces[place + 2 : place + 3])
            if self._rules.strip_messages and not text and following not in self._placeholders:
                layouts[number] = _without_trailing_space(layouts[number])
        return self._written(pieces, tokens, layouts, images)

    def text(self, text: str) -> Prompt:
        """`text` as it is, no template. Special tokens written in it count, the image placeholder is plain text."""
        writer = _Writer(self._encode, self._special_ids, self._image_token_id)
        for place, piece in enumerate(self._reserved_in_text.split(text, f"\ue000{secrets.randbits(128)}\ue001")):
            if place % 2 == 0:
                writer.text(piece)
            else:
                writer.token(self._special_ids[piece])
        return Prompt(writer.finish())

    def _written(
        self,
        pieces: Sequence[str],
        tokens: Sequence[str],
        layouts: Mapping[int, tuple[Piece, ...]],
        images: Sequence[ImagePatches],
        order: Sequence[int] | None = None,
    ) -> Prompt:
        """The ids of a rendered prompt. pieces: as `ReservedStrings.split` gives them; tokens: the placeholder of each
        image; layouts: what stands for each; order: of the images in the messages, None for their own."""
        places = dict(_placeholders(pieces, tokens, self._placeholders, order))
        writer = _Writer(self._encode, self._special_ids, self._image_token_id)
        for place, piece in enumerate(pieces):
            if place % 2 == 0:
                writer.text(piece)
            elif place in places:
                writer.image(layouts[places[place]])
            else:
                writer.token(self._special_ids[piece])
        return Prompt(writer.finish(), tuple(writer.spans), tuple(images[number] for number in places.values()))

    def _parts(self, message: Message) -> Parts:
        parts = message.parts
        if message.role == "assistant" and self._rules.thinking_end:
            parts = answer_alone(parts, self._rules.thinking_end)
        if self._rules.images_first:
            parts = tuple(sorted(parts, key=lambda part: isinstance(part, str)))
        return stripped(parts) if self._rules.strip_messages else parts

    def _placeholder(self, image: ImagePatches) -> str:
        if not image.layout.frames:
            return self._image_token
        if self._video is None:
            raise no_video()
        return self._video.token

    def _content(self, role: Role, parts: Parts, tokens: Sequence[str], mark: str) -> str | list[dict[str, str]]:
        """tokens: the placeholder of each image and video of the request."""
        if role not in self._roles_with_parts:
            return self._rules.joint.join(
                self._reserved.broken(part, mark) if isinstance(part, str) else tokens[part.image] for part in parts
            )
        return [
            {"type": "text", "text": self._reserved.broken(part, mark)}
            if isinstance(part, str)
            else {"type": "image" if tokens[part.image] == self._image_token else "video"}
            for part in parts
        ]

    def _pieces(self, conversation: Sequence[Parts], images: Sequence[ImagePatches]) -> dict[int, tuple[Piece, ...]]:
        """What stands in the prompt for each image."""
        found = {}
        for parts in conversation:
            for place, part in enumerate(parts):
                if isinstance(part, ImagePart):
                    last = self._rules.strip_messages and place == len(parts) - 1
                    pieces = images[part.image].layout.pieces
                    found[part.image] = _without_trailing_space(pieces) if last else pieces
        return found

    def _variables(self, arguments: Mapping[str, Any], mark: str) -> dict[str, Any]:
        for name, value in arguments.items():
            if name in TEMPLATE_PARAMETERS or not isinstance(value, str | int | float | bool | None):
                raise UserError(
                    f"chat_template_kwargs: {name!r} cannot be set; give the template's own variables as strings, "
                    "numbers or booleans",
                    code="invalid_chat_template_kwargs",
                    param="chat_template_kwargs",
                )
        return {
            name: self._reserved.broken(value, mark) if isinstance(value, str) else value
            for name, value in arguments.items()
        }

    def _render(self, turns: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """transformers renders in jinja2's immutable sandbox."""
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns, chat_template=self._template, tokenize=False, add_generation_prompt=True, **variables
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise UserError(
                f"the chat template refused the messages: {error}", code="chat_template_failed", param="messages"
            ) from error
        if not isinstance(rendered, str):
            raise TypeError(f"a chat template renders text, got {type(rendered).__name__}")
        return rendered

    def _probe(self) -> frozenset[Role]:
        """The roles whose content the template takes as a list of parts; the others get one string."""
        as_text = self._tried([{"role": "user", "content": PROBE}])
        if isinstance(as_text, Exception):
            raise ConfigError(f"the chat template does not work: {as_text}")
        text, image = {"type": "text", "text": PROBE}, {"type": "image"}
        user = {"role": "user", "content": [image, text]}
        if not self._prints_parts(self._tried([user]), probes=1):
            return frozenset()
        others: tuple[Role, ...] = ("system", "assistant")
        trials = {role: self._tried([{"role": role, "content": [text]}, user]) for role in others}
        return frozenset({"user", *(role for role in others if self._prints_parts(trials[role], probes=2))})

    def _prints_parts(self, rendered: str | Exception, *, probes: int) -> bool:
        """A template that does not know lists either fails or prints them as Python writes them."""
        if isinstance(rendered, Exception) or "'type'" in rendered:
            return False
        return rendered.count(PROBE) == probes and rendered.count(self._image_token) == 1

    def _tried(self, turns: list[dict[str, Any]]) -> str | Exception:
        return within_seconds(lambda: self._render(turns, {}), PROBE_SECONDS)

    def _encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids


class _Writer:
    """Collects ids. Text is held back until something that is not text follows, so that neighbours join."""

    def __init__(self, encode: Callable[[str], list[int]], special_ids: Mapping[str, int], image_token_id: int) -> None:
        self.spans: list[ImageSpan] = []
        self._encode, self._special_ids, self._image_token_id = encode, special_ids, image_token_id
        self._ids: list[int] = []
        self._text: list[str] = []
        self._images = 0

    def text(self, text: str) -> None:
        self._text.append(text)

    def token(self, token_id: int) -> None:
        self._flush()
        self._ids.append(token_id)

    def image(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            match piece:
                case ImagePlaceholder(rows):
                    self._rows(rows)
                case Indicator():
                    self._rows(1)
                case Token(text):
                    if text not in self._special_ids:
                        raise ConfigError(f"the tokenizer has no token {text!r}, which this model puts beside images")
                    self.token(self._special_ids[text])
                case Marker(text, isolated=True):
                    self._flush()
                    self._ids += self._encode(text)
                case Marker(text):
                    self.text(text)
                case _:
                    assert_never(piece)
        self._images += 1

    def _rows(self, rows: int) -> None:
        """Placeholders; those that follow each other directly are one span."""
        self._flush()
        start = len(self._ids)
        if self.spans and self.spans[-1].stop == start and self.spans[-1].image == self._images:
            start = self.spans.pop().start
        self._ids += [self._image_token_id] * rows
        self.spans.append(ImageSpan(start, len(self._ids), self._images))

    def finish(self) -> tuple[int, ...]:
        self._flush()
        return tuple(self._ids)

    def _flush(self) -> None:
        self._ids += self._encode("".join(self._text))
        self._text.clear()


def without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The same normaliser, splitter and vocabulary, but every text is only text."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    plain: Tokenizer = Tokenizer.from_str(json.dumps(definition))
    return plain


def _placeholders(
    pieces: Sequence[str], tokens: Sequence[str], known: Sequence[str], order: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(number of the piece, number of its image) of every placeholder. UserError when they do not match one to one.

    A template may put images before videos, but keeps the order within each kind.
    """
    numbers = range(len(tokens)) if order is None else order
    waiting = {token: deque(number for number in numbers if tokens[number] == token) for token in known}
    for kind, token in zip(("image", "video"), known, strict=False):
        written = pieces[1::2].count(token)  # not in the plain pieces: there it is a user's text
        if written != len(waiting[token]):
            raise UserError(
                f"the chat template wrote {written} {kind} placeholders for {len(waiting[token])} {kind}s",
                code="chat_template_failed",
                param="messages",
            )
    return [(place, waiting[piece].popleft()) for place, piece in enumerate(pieces) if place % 2 and piece in waiting]


def _either(patterns: Iterable[str]) -> str:
    """A group that matches one of `patterns`, nothing when there are none."""
    return f"({'|'.join(patterns) or '(?!)'})"


def stripped(parts: Parts) -> Parts:
    """A message without the white space at its two ends; a text in between keeps its own."""
    kept = list(parts)
    while kept and isinstance(first := kept[0], str):
        kept[0] = first.lstrip()
        if kept[0]:
            break
        del kept[0]
    while kept and isinstance(last := kept[-1], str):
        kept[-1] = last.rstrip()
        if kept[-1]:
            break
        del kept[-1]
    return tuple(kept)


def answer_alone(parts: Parts, thinking_end: str) -> Parts:
    """What follows the last `thinking_end` of a turn, all of it when there is none, without leading line feeds.

    A text of nothing else is dropped, so that no joint stands in front of the answer. Qwen's and Ovis' templates do
    this too, but could not find the string once it is broken (`ReservedStrings`).
    """
    ends = [place for place, part in enumerate(parts) if isinstance(part, str) and thinking_end in part]
    kept = list(parts[ends[-1] :] if ends else parts)
    while kept and isinstance(first := kept[0], str):
        kept[0] = first.rpartition(thinking_end)[2].lstrip("\n")
        if kept[0]:
            break
        del kept[0]
    return tuple(kept)


def _without_trailing_space(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The text after an image that ends its message is stripped too; its isolated markers are no text."""
    while isinstance(last := pieces[-1], Marker) and not last.isolated and not last.text.strip():
        pieces = pieces[:-1]
    return pieces


def _only_template(found: str | dict[str, str] | None, default: str) -> str:
    if isinstance(found, dict):
        if "default" not in found:
            raise ConfigError(f"the tokenizer has the chat templates {', '.join(sorted(found))} and none is 'default'")
        return found["default"]
    return found or default


def within_seconds(work: Callable[[], str], seconds: float) -> str | Exception:
    """What `work` returns or raises. ConfigError when it takes longer: a template may loop for ever."""
    outcome: list[str | Exception] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="chat-template-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise ConfigError(f"the chat template did not finish within {seconds:g} s")
    return outcome[0]
