"""JSON that stays as it was written: where a value of a growing text ends, and what an object or a list holds."""

from __future__ import annotations

import json
import re
from typing import Any

_STEPS = re.compile(r'\\[\s\S]|["{}\[\]]')
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonEnd:
    """Finds the end of an object or a list in a text that grows. place: up to where the text was read."""

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
            elif not self._in_string and step in "{}[]":
                self._depth += 1 if step in "{[" else -1
                if self._depth <= 0:
                    self._ended = True
                    return self.place
        self.place = len(text) - text.endswith("\\", self.place)  # what is escaped comes next
        return None


def read_json(text: str) -> Any:
    """ValueError or RecursionError where it is none."""
    return json.loads(text, parse_constant=_no_json)


def members(text: str) -> dict[str, str]:
    """The values of an object that `read_json` takes, as they are written."""
    decoder, found, place = json.JSONDecoder(), {}, text.index("{") + 1
    while text[place := _behind_space(text, place)] != "}":
        key, place = decoder.raw_decode(text, place)
        begin = _behind_space(text, text.index(":", place) + 1)
        _, end = decoder.raw_decode(text, begin)
        found[key] = text[begin:end]
        place = _behind_comma(text, end)
    return found


def elements(text: str) -> list[str]:
    """The same of a list."""
    decoder, found, place = json.JSONDecoder(), [], text.index("[") + 1
    while text[place := _behind_space(text, place)] != "]":
        _, end = decoder.raw_decode(text, place)
        found.append(text[place:end])
        place = _behind_comma(text, end)
    return found


def _behind_comma(text: str, place: int) -> int:
    place = _behind_space(text, place)
    return place + (text[place] == ",")


def _behind_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


def _no_json(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
