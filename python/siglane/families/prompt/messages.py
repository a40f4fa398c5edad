"""What a family's `PromptRules` change in messages before the chat template sees them.

`template.py` writes the same rules in Jinja, for engines that render the template themselves.
"""

from __future__ import annotations

from collections.abc import Callable

from siglane.families.family import PromptRules
from siglane.types import ImagePart, Marker, Message, Piece

Parts = tuple[str | ImagePart, ...]


def parts_of(message: Message, rules: PromptRules) -> Parts:
    """The parts of a turn as the template gets them."""
    parts = message.parts
    if message.role == "assistant" and rules.thinking_end:
        parts = answer_alone(parts, rules.thinking_end)
    if rules.images_first:
        parts = tuple(sorted(parts, key=lambda part: isinstance(part, str)))
    return stripped(parts) if rules.strip_messages else parts


def stripped(parts: Parts) -> Parts:
    """A message without the white space at its two ends; a text in between keeps its own."""
    return _trimmed(_trimmed(parts, str.lstrip)[::-1], str.rstrip)[::-1]


def without_trailing_space(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The text after an image that ends its message is stripped too; its isolated markers are no text."""
    while isinstance(last := pieces[-1], Marker) and not last.isolated and not last.text.strip():
        pieces = pieces[:-1]
    return pieces


def answer_alone(parts: Parts, thinking_end: str) -> Parts:
    """What follows the last `thinking_end` of a turn, all of it when there is none, without leading line feeds.

    A text of nothing else is dropped, so that no joint stands in front of the answer. Qwen's and Ovis' templates do
    this too, but could not find the string once it is broken (`ReservedStrings`).
    """
    ends = [place for place, part in enumerate(parts) if isinstance(part, str) and thinking_end in part]
    return _trimmed(parts[ends[-1] :] if ends else parts, lambda text: text.rpartition(thinking_end)[2].lstrip("\n"))


def _trimmed(parts: Parts, trim: Callable[[str], str]) -> Parts:
    """The first text by `trim`; it is dropped, and the next one is the first, when nothing of it is left."""
    while parts and isinstance(first := parts[0], str):
        if kept := trim(first):
            return (kept, *parts[1:])
        parts = parts[1:]
    return parts
