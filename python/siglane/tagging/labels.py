"""Labels and templates: read, checked, and turned into the texts that the text tower reads."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from siglane.errors import UserError
from siglane.text.tokens import TextTokens, is_unicode

logger = logging.getLogger(__name__)

PLACE = "{label}"
NAMED = 3  # labels in one warning
SHOWN = 40  # characters of a long label


def read_labels(file: Path) -> tuple[str, ...]:
    """One label per line, in UTF-8. UserError names the line that is empty or a repetition."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", code="bad_labels") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line} is not UTF-8; save the labels as UTF-8", code="bad_labels") from error
    lines = text.removesuffix("\n").split("\n")
    if lines == [""]:
        raise UserError(f"{file} holds no labels; write one per line", code="bad_labels")
    if _is_json(text) or _is_json(lines[0]):
        raise UserError(f"{file} holds JSON, whose letters are no labels; write one label per line", code="bad_labels")
    return check_labels(lines, [f"{file}, line {number}" for number in range(1, len(lines) + 1)])


def _is_json(text: str) -> bool:
    """Whether it is a JSON list or object: a label may begin with a bracket."""
    if not text.lstrip().startswith(("[", "{")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def check_labels(labels: Sequence[str], places: Sequence[str] | None = None) -> tuple[str, ...]:
    """The labels without surrounding white space.

    places: what messages call each, by default `labels[0]` and so on. UserError for none, an empty or a repeated one.
    """
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise UserError("labels must be a list of strings", code="bad_labels", param="labels")
    if not labels:
        raise UserError("labels is empty; give at least one", code="bad_labels", param="labels")
    places = places or [f"labels[{number}]" for number in range(len(labels))]
    first: dict[str, str] = {}
    for label, place in zip((label.strip() for label in labels), places, strict=True):
        if not is_unicode(label):
            raise UserError(f"{place} is not Unicode text: {label!r}", code="bad_labels", param="labels")
        if not label:
            raise UserError(f"{place} is empty; remove it", code="bad_labels", param="labels")
        if label in first:
            message = f"{place} repeats {shown(label)} of {first[label]}; remove one"
            raise UserError(message, code="bad_labels", param="labels")
        first[label] = place
    return tuple(first)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """UserError for none, or one in which no label has its place."""
    if isinstance(templates, str) or not templates:
        raise UserError("templates must be a list of at least one text", code="bad_template", param="templates")
    for template in templates:
        if PLACE not in template:
            message = f"template {template!r} has no place for the label; write {PLACE} where it stands"
            raise UserError(message, code="bad_template", param="templates")
    return tuple(templates)


def texts_of(template: str, labels: Sequence[str]) -> list[str]:
    """The template with each label in its place; braces inside a label are text."""
    return [template.replace(PLACE, label) for label in labels]


def warn_of_losses(labels: Sequence[str], templates: Sequence[str], tokens: TextTokens) -> None:
    """Logs the labels whose texts are longer than the model reads, and those of which nothing reaches it."""
    _warn([shown(label) for label in labels if not tokens.prepared(label)], "hold nothing that the model reads")
    _warn(list(_cut(labels, templates, tokens)), f"are longer than the {tokens.rule.length} tokens the model reads")


def _cut(labels: Sequence[str], templates: Sequence[str], tokens: TextTokens) -> Iterator[str]:
    for label in labels:
        for template in templates:
            (text,) = texts_of(template, [label])
            if lost := tokens.lost(text):
                kept = tokens.kept(text)
                yield f"{shown(label)} ({kept} of {kept + lost} tokens are kept)"
                break


def _warn(found: Sequence[str], what: str) -> None:
    if found:
        more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
        logger.warning("%d labels %s: %s%s", len(found), what, ", ".join(found[:NAMED]), more)


def shown(label: str) -> str:
    return repr(label if len(label) <= SHOWN else label[: SHOWN - 1] + "…")
