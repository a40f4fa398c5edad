"""What a chat template takes as the content of a message, found out by trying it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from siglane.errors import ConfigError, UserError
from siglane.types import Role

PROBE = "siglane probe"

Render = Callable[[list[dict[str, Any]]], str]


def roles_with_parts(render: Render, image_token: str) -> frozenset[Role]:
    """The roles whose content the template takes as a list of parts; the others get one string.

    render: the template, from turns to text. ConfigError when it fails on a plain text or does not finish.
    """
    as_text = _tried(render, [{"role": "user", "content": PROBE}])
    if isinstance(as_text, UserError):
        raise ConfigError(f"the chat template does not work: {as_text}")
    text, image = {"type": "text", "text": PROBE}, {"type": "image"}
    user = {"role": "user", "content": [image, text]}
    if not _prints_parts(_tried(render, [user]), image_token, probes=1):
        return frozenset()
    others: tuple[Role, ...] = ("system", "assistant")
    trials = {role: _tried(render, [{"role": role, "content": [text]}, user]) for role in others}
    return frozenset({"user", *(role for role in others if _prints_parts(trials[role], image_token, probes=2))})


def _prints_parts(rendered: str | UserError, image_token: str, *, probes: int) -> bool:
    """A template that does not know lists either fails or prints them as Python writes them."""
    if isinstance(rendered, UserError) or "'type'" in rendered:
        return False
    return rendered.count(PROBE) == probes and rendered.count(image_token) == 1


def _tried(render: Render, turns: list[dict[str, Any]]) -> str | UserError:
    """ConfigError for a template that has to be ended: it would do so again."""
    try:
        return render(turns)
    except UserError as error:
        if error.code != "chat_template_failed":
            raise ConfigError(f"the chat template does not work: {error}") from error
        return error
