"""Calls of tools in an answer's text, found as it comes (`constraints/tool_grammar.py` shows what they look like)."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from siglane.families.prompt.tools import CALL_TAGS, CALL_TAIL, call_head
from siglane.types import Constraint, ToolCall, ToolUse

BEGIN, END = CALL_TAGS
_STEPS = re.compile(r'\\[\s\S]|["{}]')
_OBJECT_BEGINS = re.compile(r'\s*(?:$|\{\s*(?:$|["}]))')
_TAIL = re.compile(rf"\s*{re.escape(CALL_TAIL)}\s*{END}")
_SPACE = re.compile(r"[ \t\r\n]*")


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

    A call is a JSON object between the tags, of a function that may be called and an object of arguments, which stay
    as they were written; the last tag may be missing at the answer's end, or before the next call. What only looks like
    one is text. White space around calls is dropped. exact: a grammar sees to it that every call is one, so that its
    arguments are given out as they come; otherwise they are once it has ended. complete: nothing may follow.
    """

    def __init__(self, use: ToolUse, *, exact: bool) -> None:
        self._exact, self._parallel = exact, use.parallel
        self._heads = {call_head(tool.name): tool.name for tool in use.callable}
        self._head = re.compile("|".join(map(re.escape, self._heads)))
        self._read: Callable[[bool], bool] = self._read_text
        self._held, self._space = "", ""  # not given out yet: behind what was read, and between it and a call
        self._object = _Object()
        self._given = 0  # of the held text, of the arguments that come
        self._calls, self._spoken = 0, False
        self._said: list[str] = []
        self._deltas: list[CallDelta] = []

    @classmethod
    def of(cls, use: ToolUse, constraint: Constraint | None) -> CallStream:
        """constraint: the answer's."""
        return cls(use, exact=constraint is not None and constraint.kind == "tools")

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
        place = self._held.find(BEGIN)
        if place >= 0:
            before = self._held[:place].rstrip()
            self._say(before)
            self._space = self._held[len(before) : place]
            self._held, self._object = self._held[place + len(BEGIN) :], _Object()
            self._read = self._read_head if self._exact else self._read_call
            return True
        if finished:
            self._say(self._held.rstrip() if self._calls else self._held)
            self._held = ""
        else:
            known = _known_text(self._held)
            self._say(known)
            self._held = self._held[len(known) :]
        return False

    def _say(self, text: str) -> None:
        if self._calls and not self._spoken:
            text = text.lstrip()
        if text:
            self._spoken = True
            self._said.append(text)

    def _read_call(self, finished: bool) -> bool:
        """A whole one, or none."""
        held = self._held
        end = self._object.end(held)
        if held.find(BEGIN, 0, end) >= 0 or (end is None and (finished or not _OBJECT_BEGINS.match(held))):
            return self._no_call()
        rest = "" if end is None else held[end:].lstrip()
        cut = any(len(rest) < len(tag) and tag.startswith(rest) for tag in CALL_TAGS)
        if end is None or (cut and not finished):
            return False
        call = _call(held[:end]) if cut or rest.startswith(CALL_TAGS) else None
        if call is None or call[0] not in self._heads.values():
            return self._no_call()
        self._begin(*call)
        self._end_call("" if cut else rest.removeprefix(END))
        return True

    def _no_call(self) -> bool:
        """The tag was text, what stands behind it may hold another."""
        self._say(self._space + BEGIN)
        self._read = self._read_text
        return True

    def _begin(self, name: str, arguments: str) -> None:
        index, self._calls = self._calls, self._calls + 1
        self._deltas.append(CallDelta(index, f"call_{secrets.token_hex(12)}", name))
        if arguments:
            self._deltas.append(CallDelta(index, arguments=arguments))

    def _end_call(self, rest: str) -> None:
        self._held = rest if self._parallel else ""
        self._read = self._read_text if self._parallel else self._read_nothing

    def _read_head(self, finished: bool) -> bool:
        found = self._head.match(self._held)
        if found is None:
            return self._no_call() if finished else False
        self._begin(self._heads[found.group()], "")
        self._held, self._object, self._given = self._held[found.end() :], _Object(), 0
        self._read = self._read_arguments
        return True

    def _read_arguments(self, finished: bool) -> bool:
        end = self._object.end(self._held)
        if new := self._held[self._given : self._object.place]:
            self._deltas.append(CallDelta(self._calls - 1, arguments=new))
        self._given = self._object.place
        if end is None:
            return False
        self._held, self._read = self._held[end:], self._read_tail
        return True

    def _read_tail(self, finished: bool) -> bool:
        found = _TAIL.match(self._held)
        if found is None and not finished:
            return False
        self._end_call("" if found is None else self._held[found.end() :])
        return True

    def _read_nothing(self, finished: bool) -> bool:
        self._held = ""
        return False


class _Object:
    """Finds the end of a JSON object in a text that grows. place: up to where the text was read."""

    def __init__(self) -> None:
        self.place, self._depth, self._in_string, self._ended = 0, 0, False, False

    def end(self, text: str) -> int | None:
        """text: as before, and more."""
        if self._ended:
            return self.place
        for found in _STEPS.finditer(text, self.place):
            self.place = found.end()
            step = found.group()
            if step == '"':
                self._in_string = not self._in_string
            elif not self._in_string and step in "{}":
                self._depth += 1 if step == "{" else -1
                if self._depth <= 0:
                    self._ended = True
                    return self.place
        self.place = len(text) - text.endswith("\\", self.place)  # what is escaped comes next
        return None


def _known_text(text: str) -> str:
    """Without what may stand before a call, or begin its tag."""
    lengths = range(min(len(BEGIN) - 1, len(text)), 0, -1)
    tag = next((length for length in lengths if BEGIN.startswith(text[-length:])), 0)
    return text[: len(text) - tag].rstrip()


def _call(text: str) -> tuple[str, str] | None:
    """The name and the arguments, as they are written, of an object; None where it is no call."""
    try:
        found = _members(text)
        name, arguments = json.loads(found["name"]), found.get("arguments", "{}")
    except (KeyError, ValueError, RecursionError):
        return None
    return (name, arguments) if isinstance(name, str) and arguments.startswith("{") else None


def _members(text: str) -> dict[str, str]:
    """The values of a JSON object as they are written. ValueError where it is none."""
    if not isinstance(json.loads(text, parse_constant=_no_json), dict):
        raise ValueError("no object")
    decoder, found, place = json.JSONDecoder(), {}, text.index("{") + 1
    while text[place := _behind_space(text, place)] != "}":
        key, place = decoder.raw_decode(text, place)
        begin = _behind_space(text, text.index(":", place) + 1)
        _, place = decoder.raw_decode(text, begin)
        found[key] = text[begin:place]
        place = _behind_space(text, place)
        place += text[place] == ","
    return found


def _behind_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
