"""What became of every row of the training data: used, left out and why, cut."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tqdm import tqdm

from siglane.errors import UserError
from siglane.text.tokens import TextTokens

NAMED = 3  # rows of one kind in a summary


@dataclass(frozen=True, slots=True)
class BadRow:
    """A pair that cannot be used. name: file and line, or shard and key; reason: in full; kind: what such rows are
    counted under, the reason itself unless it holds more."""

    name: str
    reason: str
    kind: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Skipped:
    """Pairs that were left out, each named once. strict: the first one is a UserError instead.

    kinds: the names of each kind, in the order they were met.
    """

    strict: bool = False
    names: set[str] = field(default_factory=set)
    kinds: dict[str, list[str]] = field(default_factory=dict)

    def add(self, rows: Sequence[BadRow]) -> None:
        for row in rows:
            if self.strict:
                raise UserError(f"{row} (without --strict it would be skipped)", code="bad_pairs")
            if row.name not in self.names:
                self.merge({row.kind or row.reason: [row.name]})
                tqdm.write(f"skipped {row}", file=sys.stderr)

    def merge(self, kinds: Mapping[str, Sequence[str]]) -> None:
        """Counts what has been named elsewhere."""
        for kind, names in kinds.items():
            self.kinds.setdefault(kind, []).extend(name for name in names if name not in self.names)
            self.names.update(names)

    def as_json(self) -> dict[str, Any]:
        """How many of each kind, and which came first."""
        return {kind: {"count": len(names), "first": names[:NAMED]} for kind, names in self.kinds.items()}

    def __str__(self) -> str:
        parts = [f"{len(names)} {kind} ({first_of(names)})" for kind, names in self.kinds.items()]
        return f"{len(self.names)} pairs skipped" + (f": {'; '.join(parts)}" if parts else "")


class CaptionLosses(NamedTuple):
    """Names of the pairs whose caption is longer than the model reads, and of those of which nothing reaches it."""

    cut: Sequence[str] = ()
    empty: Sequence[str] = ()


def caption_losses(named: Iterable[tuple[str, str]], texts: TextTokens) -> CaptionLosses:
    """named: pairs' names and captions."""
    cut, empty = [], []
    for name, caption in named:
        if texts.lost(caption):
            cut.append(name)
        elif not texts.prepared(caption):
            empty.append(name)
    return CaptionLosses(cut, empty)


def say_losses(losses: CaptionLosses, texts: TextTokens) -> None:
    """One line on stderr for each kind of loss."""
    room = texts.rule.length - 1
    if losses.cut:
        message = f"{len(losses.cut)} captions are cut, the model reads {room} tokens: {first_of(losses.cut)}"
        tqdm.write(message, file=sys.stderr)
    if losses.empty:
        message = f"{len(losses.empty)} captions hold nothing that the model reads: {first_of(losses.empty)}"
        tqdm.write(message, file=sys.stderr)


def first_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
