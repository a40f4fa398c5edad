"""What a family's `PromptRules` change in messages before the chat template sees them.

`template.py` writes the same rules in Jinja, for engines that render the template themselves.
"""

from __future__ import annotations

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
    kept = list(parts[ends[-1] :] if ends else parts)
    while kept and isinstance(first := kept[0], str):
        kept[0] = first.rpartition(thinking_end)[2].lstrip("\n")
        if kept[0]:
            break
        del kept[0]
    return tuple(kept)
