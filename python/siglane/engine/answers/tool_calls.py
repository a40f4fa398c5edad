"""Calls of tools in an answer's text, found as it comes (`constraints/tool_grammar.py` shows what they look like)."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from siglane.engine.answers.written_json import JsonEnd, elements, members, read_json
from siglane.families.prompt.call_format import NEXT, CallFormat
from siglane.types import Constraint, ToolCall, ToolUse

_BEGINS = re.compile(r'\s*(?:$|\[?\s*(?:$|\{\s*(?:$|["}])))')  # calls, whatever of them is there


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What is new of call number `index` of an answer. call_id, name: in its first delta, else empty."""

    index: int
    call_id: str = ""
    name: str = ""
    arguments: str = ""


def joined_calls(deltas: Iterable[CallDelta]) -> tuple[ToolCall, ...]:
    """The calls that deltas make up."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if delta.index == len(calls):
            calls.append(ToolCall(delta.name, delta.arguments, delta.call_id))
        else:
            known = calls[delta.index]
            calls[delta.index] = ToolCall(known.name, known.arguments + delta.arguments, known.call_id)
    return tuple(calls)


class CallStream:
    """Tells the calls in an answer from its text, the same whether it comes at once or letter by letter.

    A call is a JSON object, or one of a list of them, between the tags, of a function that may be called and an object
    of arguments, which stay as they were written; the last tag may be missing at the answer's end, or before the next
    call. In a form without tags it is all of the answer. What only looks like one is text.
    White space around calls is dropped. exact: a grammar sees to it that every call is one, so that its arguments are
    given out as they come; otherwise they are once it has ended. complete: nothing may follow.
    """

    def __init__(self, use: ToolUse, form: CallFormat, *, exact: bool) -> None:
        self._form, self._exact = form, exact
        self._parallel = use.parallel and bool(form.opening)
        self._heads = {form.head(tool.name): tool.name for tool in use.callable}
        self._head = re.compile("|".join(map(re.escape, self._heads)))
        self._tail = re.compile(_tail(form))
        self._read: Callable[[bool], bool] = self._read_text if form.opening else self._read_beginning
        self._held, self._space = "", ""  # not given out yet: behind what was read, and between it and a call
        self._before = ""  # what stands before the next head
        self._json = JsonEnd()
        self._given = 0  # of the held text, of the arguments that come
        self._calls, self._spoken = 0, False
        self._said: list[str] = []
        self._deltas: list[CallDelta] = []

    @classmethod
    def of(cls, use: ToolUse, form: CallFormat, constraint: Constraint | None) -> CallStream:
        """constraint: the answer's."""
        return cls(use, form, exact=constraint is not None and constraint.kind == "tools")

    @property
    def tags(self) -> tuple[str, ...]:
        """What begins and ends calls."""
        return self._form.tags

    @property
    def count(self) -> int:
        """Of the calls so far."""
        return self._calls

    @property
    def unfinished(self) -> bool:
        """Whether a call was begun whose arguments lack their end."""
        return self._read == self._read_arguments

    @property
    def complete(self) -> bool:
        return self._read == self._read_nothing

    def push(self, text: str, finished: bool = False) -> tuple[str, tuple[CallDelta, ...]]:
        """Adds text; the new text outside of calls, and what is new of calls. finished: nothing follows."""
        self._held += text
        while self._read(finished):
            pass
        said, deltas = "".join(self._said), tuple(self._deltas)
        self._said.clear()
        self._deltas.clear()
        return said, deltas

    def _read_text(self, finished: bool) -> bool:
        """Up to the next tag. Like its neighbours true where more can be read."""
        opening = self._form.opening
        place = self._held.find(opening)
        if place >= 0:
            before = self._held[:place].rstrip()
            self._say(before)
            self._space = self._held[len(before) : place]
            return self._open(self._held[place + len(opening) :])
        if finished:
            self._say(self._held.rstrip() if self._calls else self._held)
            self._held = ""
        else:
            known = _known_text(self._held, opening)
            self._say(known)
            self._held = self._held[len(known) :]
        return False

    def _read_beginning(self, finished: bool) -> bool:
        """Of an answer that is a call, or none."""
        begun = self._held.lstrip()
        if not begun and not finished:
            return False
        self._space = self._held[: len(self._held) - len(begun)]
        return self._open(begun) if begun.startswith("{") else self._no_call(begun)

    def _read_all(self, finished: bool) -> bool:
        self._say(self._held)
        self._held = ""
        return False

    def _open(self, held: str) -> bool:
        self._held, self._json, self._before = held, JsonEnd(), self._form.before
        self._read = self._read_head if self._exact else self._read_calls
        return True

    def _say(self, text: str) -> None:
        if self._calls and not self._spoken:
            text = text.lstrip()
        if text:
            self._spoken = True
            self._said.append(text)

    def _read_calls(self, finished: bool) -> bool:
        """Whole ones, or none."""
        held, tags = self._held, self._form.tags
        end = self._json.end(held)
        again = bool(tags) and held.find(self._form.opening, 0, end) >= 0
        if again or (end is None and (finished or not _BEGINS.match(held))):
            return self._no_call(held)
        rest = "" if end is None else held[end:].lstrip()
        cut = any(len(rest) < len(tag) and tag.startswith(rest) for tag in tags) if tags else not rest
        if end is None or (cut and not finished):
            return False
        calls = _calls(held[:end]) if cut or rest.startswith(tags) else ()
        if not calls or any(name not in self._heads.values() for name, _ in calls):
            return self._no_call(held)
        for name, arguments in calls if self._parallel else calls[:1]:
            self._begin(name, arguments)
        self._end_calls("" if cut else rest.removeprefix(self._form.closing))
        return True

    def _no_call(self, held: str) -> bool:
        """The tag was text, what stands behind it may hold another."""
        self._say(self._space + self._form.opening)
        self._held, self._read = held, self._read_text if self._form.opening else self._read_all
        return True

    def _begin(self, name: str, arguments: str) -> None:
        index, self._calls = self._calls, self._calls + 1
        self._deltas.append(CallDelta(index, f"call_{secrets.token_hex(12)}", name))
        if arguments:
            self._deltas.append(CallDelta(index, arguments=arguments))

    def _end_calls(self, rest: str) -> None:
        self._held = rest if self._parallel else ""
        self._read = self._read_text if self._parallel else self._read_nothing

    def _read_head(self, finished: bool) -> bool:
        place = len(self._before)
        found = self._head.match(self._held, place) if self._held.startswith(self._before) else None
        if found is None:
            if not finished and any((self._before + head).startswith(self._held) for head in self._heads):
                return False
            if self._before != NEXT:
                return self._no_call(self._held)
            self._end_calls("")  # a list that was cut off
            return True
        self._begin(self._heads[found.group()], "")
        self._held, self._json, self._given = self._held[found.end() :], JsonEnd(), 0
        self._read = self._read_arguments
        return True

    def _read_arguments(self, finished: bool) -> bool:
        end = self._json.end(self._held)
        if new := self._held[self._given : self._json.place]:
            self._deltas.append(CallDelta(self._calls - 1, arguments=new))
        self._given = self._json.place
        if end is None:
            return False
        self._held, self._read = self._held[end:], self._read_tail
        return True

    def _read_tail(self, finished: bool) -> bool:
        found = self._tail.match(self._held)
        if found is None and not finished:
            return False
        rest = "" if found is None else self._held[found.end() :]
        if found is not None and self._parallel and found.group().endswith(NEXT):
            self._held, self._before, self._read = rest, NEXT, self._read_head
        else:
            self._end_calls(rest)
        return True

    def _read_nothing(self, finished: bool) -> bool:
        self._held = ""
        return False


def _tail(form: CallFormat) -> str:
    """An expression for what stands behind a call's arguments."""
    end = rf"\s*{re.escape('}' + form.after)}\s*{re.escape(form.closing)}"
    return rf"{end}|\s*}}{NEXT}" if form.listed else end


def _known_text(text: str, opening: str) -> str:
    """Without what may stand before a call, or begin its tag."""
    lengths = range(min(len(opening) - 1, len(text)), 0, -1)
    tag = next((length for length in lengths if opening.startswith(text[-length:])), 0)
    return text[: len(text) - tag].rstrip()


def _calls(text: str) -> tuple[tuple[str, str], ...]:
    """Names and arguments, as they are written, of an object or a list of them; none where one is no call. Models mix
    up the keys of arguments that they have seen."""
    try:
        value = read_json(text)
        values, written = (value, elements(text)) if isinstance(value, list) else ([value], [text])
        if not all(isinstance(one, dict) for one in values):
            return ()
        each = [members(one) for one in written]
        calls = tuple((json.loads(one["name"]), one.get("arguments", one.get("parameters", "{}"))) for one in each)
    except (KeyError, ValueError, RecursionError):
        return ()
    return calls if all(isinstance(name, str) and given.startswith("{") for name, given in calls) else ()
