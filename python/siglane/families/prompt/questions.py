"""Questions behind what they are about."""

from __future__ import annotations

from collections.abc import Sequence

from siglane.types import Message, Question


def asked_behind(messages: Sequence[Message], question: Question) -> tuple[Message, ...]:
    """The conversation with the question at the end of its last turn, which is the user's."""
    *before, last = messages if messages and messages[-1].role == "user" else (*messages, Message("user", ()))
    *parts, text = last.parts if last.parts and isinstance(last.parts[-1], str) else (*last.parts, "")
    return (*before, Message("user", (*parts, f"{text}\n\n{question.text}" if text else question.text)))
