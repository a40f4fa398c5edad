"""How models write calls of tools into their answers: one value for each form that is known."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

NEXT = ", "  # between calls of one list


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One form. A call is `{"name": ..., ARGUMENTS: {...}}`.

    opening, closing: the tags around calls, "" where a call is all of an answer, which then holds one at most; before,
    after: what stands between the tags and the calls; arguments: the key of a call's arguments.
    """

    opening: str
    before: str
    arguments: str
    after: str
    closing: str

    @property
    def listed(self) -> bool:
        """Whether one pair of tags holds all calls, as a list; else each call has its own."""
        return self.before == "["

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(tag for tag in (self.opening, self.closing) if tag)

    @property
    def example(self) -> str:
        return f"{self.opening}{self.before}{self.head('...')}{{...}}}}{self.after}{self.closing}".replace("\n", "")

    def head(self, name: str) -> str:
        """What stands before the arguments of a call."""
        return f'{{"name": {json.dumps(name)}, "{self.arguments}": '

    def written_in(self, prompt: str, answer_begins: str, name: str, arguments: dict[str, str]) -> bool:
        """Whether a prompt holds this call in this form. answer_begins: what stands before an answer."""
        call = json.dumps({"name": name, self.arguments: arguments})
        around = (self.opening or answer_begins, self.before.strip(), call, self.after.strip(), self.closing)
        spaced = r"\s*".join(re.escape(piece).replace(r"\ ", r"\s*") for piece in around)
        return re.search(spaced, prompt) is not None


HERMES = CallFormat("<tool_call>", "\n", "arguments", "\n", "</tool_call>")  # Qwen2.5's and Qwen3's
LISTED = CallFormat("<tool_call>", "[", "arguments", "]", "</tool_call>")  # SmolLM2's
BARE = CallFormat("", "", "parameters", "", "")  # Llama 3's, whose template refuses several calls in one answer
FORMATS = (HERMES, LISTED, BARE)
