"""What a chat template takes as the content of a message, found out by trying it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from siglane.errors import ConfigError
from siglane.types import Role

PROBE = "siglane probe"
PROBE_SECONDS = 5.0

Render = Callable[[list[dict[str, Any]]], str]


def roles_with_parts(render: Render, image_token: str) -> frozenset[Role]:
    """The roles whose content the template takes as a list of parts; the others get one string.

    render: the template, from turns to text. ConfigError when it fails on a plain text or does not finish.
    """
    as_text = _tried(render, [{"role": "user", "content": PROBE}])
    if isinstance(as_text, Exception):
        raise ConfigError(f"the chat template does not work: {as_text}")
    text, image = {"type": "text", "text": PROBE}, {"type": "image"}
    user = {"role": "user", "content": [image, text]}
    if not _prints_parts(_tried(render, [user]), image_token, probes=1):
        return frozenset()
    others: tuple[Role, ...] = ("system", "assistant")
    trials = {role: _tried(render, [{"role": role, "content": [text]}, user]) for role in others}
    return frozenset({"user", *(role for role in others if _prints_parts(trials[role], image_token, probes=2))})


def _prints_parts(rendered: str | Exception, image_token: str, *, probes: int) -> bool:
    """A template that does not know lists either fails or prints them as Python writes them."""
    if isinstance(rendered, Exception) or "'type'" in rendered:
        return False
    return rendered.count(PROBE) == probes and rendered.count(image_token) == 1


def _tried(render: Render, turns: list[dict[str, Any]]) -> str | Exception:
    return within_seconds(lambda: render(turns), PROBE_SECONDS)


def within_seconds(work: Callable[[], str], seconds: float) -> str | Exception:
    """What `work` returns or raises. ConfigError when it takes longer: a template may loop for ever."""
    outcome: list[str | Exception] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="chat-template-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise ConfigError(f"the chat template did not finish within {seconds:g} s")
    return outcome[0]
