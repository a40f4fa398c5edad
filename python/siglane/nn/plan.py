"""Which checkpoint tensor fills which parameter: renames, fusions and what is left out, as data.

Patterns are tensor names in which `{i}` and `{e}` stand for numbers, `{leaf}` for `weight` or `bias`, `{rest}` for
anything, and `[...]` encloses text that may be absent. Targets and parts repeat the pattern's `{i}`, `{e}` and
`{leaf}`. Each module's file states its plan beside its parameters; a family joins those of its parts under its
checkpoint's prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PLACEHOLDERS = {"i": r"\d+", "e": r"\d+", "leaf": "weight|bias", "rest": ".+"}


@dataclass(frozen=True, slots=True)
class Rule:
    """Tensors named `pattern` fill `part` of parameter `target` (parts: `nn.linear.ShardedModule`).

    `q+k+v`: the tensor holds several parts one after another along its first dimension. twin: another tensor may hold
    the same values (tied weights stored under both names); the second one only has to be equal.
    """

    pattern: str
    target: str
    part: str = ""
    twin: bool = False


@dataclass(frozen=True, slots=True)
class Ignore:
    """Tensors named `pattern` are not used, for `reason`.

    constant: what a tensor of so many elements holds if it is what the model computes by itself; one that holds
    something else is named in the log.
    """

    pattern: str
    reason: str
    constant: Callable[[int], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Tensors whose name starts with `prefix` belong to another owner, who gets them without the prefix."""

    prefix: str


Entry = Rule | Ignore | Elsewhere


@dataclass(frozen=True, slots=True)
class Destination:
    """The part of a parameter that one tensor fills; twin: as in `Rule`."""

    parameter: str
    part: str
    twin: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """What becomes of every tensor of a checkpoint. The first entry that matches a name decides."""

    entries: tuple[Entry, ...]
    _found: dict[str, Destination | Ignore | Elsewhere | None] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def find(self, name: str) -> Destination | Ignore | Elsewhere | None:
        """None: the plan does not know `name`. A load asks several times, for the tensors of each expert too."""
        if name not in self._found:
            self._found[name] = self._match(name)
        return self._found[name]

    def _match(self, name: str) -> Destination | Ignore | Elsewhere | None:
        for entry in self.entries:
            if isinstance(entry, Elsewhere):
                if name.startswith(entry.prefix):
                    return entry
            elif found := _compile(entry.pattern).fullmatch(name):
                if isinstance(entry, Ignore):
                    return entry
                told = found.groupdict()
                return Destination(entry.target.format(**told), entry.part.format(**told), entry.twin)
        return None

    def source(self, destination: Destination) -> str | None:
        """The tensor that fills `destination`, its optional text written out: the reverse of `find`. None when no rule
        does."""
        for rule in (entry for entry in self.entries if isinstance(entry, Rule)):
            found = _compile(rule.target).fullmatch(destination.parameter)
            part = _compile(rule.part).fullmatch(destination.part) if found else None
            if found and part:
                told = found.groupdict() | part.groupdict()
                return rule.pattern.format(**told).replace("[", "").replace("]", "")
        return None

    def beginnings(self) -> tuple[str, ...]:
        """What whole parts of names stand in front of its patterns: `llm.`, `llm.model.`, ..."""
        found: dict[str, None] = {}
        for entry in self.entries:
            if isinstance(entry, Rule):
                for text in (re.sub(r"\[.*?\]", "", entry.pattern), re.sub(r"[\[\]]", "", entry.pattern)):
                    parts = text.partition("{")[0].split(".")[:-1]
                    found |= {".".join(parts[: count + 1]) + ".": None for count in range(len(parts))}
        return tuple(found)

    def under(self, source: str, target: str) -> WeightPlan:
        """The same plan for tensors called `source` + name and parameters called `target` + name."""
        return WeightPlan(tuple(_moved(entry, source, target) for entry in self.entries))

    def unused(self, reason: str) -> WeightPlan:
        """The same names, none of them loaded."""
        return WeightPlan(
            tuple(Ignore(entry.pattern, reason) if isinstance(entry, Rule) else entry for entry in self.entries)
        )

    def __add__(self, other: WeightPlan) -> WeightPlan:
        return WeightPlan(self.entries + other.entries)


def parts(pattern: str, target: str, names: str, part: str = "*") -> tuple[Rule, ...]:
    """A rule for each part of a fused parameter whose parts the checkpoint stores apart: `*` of `pattern` and `part` is
    the part's name, one of the words of `names`."""
    return tuple(Rule(pattern.replace("*", name), target, part.replace("*", name)) for name in names.split())


def _moved(entry: Entry, source: str, target: str) -> Entry:
    match entry:
        case Rule(pattern, parameter):
            return replace(entry, pattern=source + pattern, target=target + parameter)
        case Ignore(pattern):
            return replace(entry, pattern=source + pattern)
        case Elsewhere(prefix):
            return Elsewhere(source + prefix)


@lru_cache(maxsize=4096)
def _compile(pattern: str) -> re.Pattern[str]:
    expression = re.escape(pattern).replace(r"\[", "(?:").replace(r"\]", ")?")
    for name, matches in PLACEHOLDERS.items():
        expression = expression.replace(re.escape("{" + name + "}"), f"(?P<{name}>{matches})")
    return re.compile(expression)
