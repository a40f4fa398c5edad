"""Processes that render chat templates, so that one which never ends costs its request and nobody else."""

from __future__ import annotations

import atexit
import json
import logging
import os
import signal
from collections.abc import Mapping
from functools import cache
from typing import Any

from siglane.errors import UserError
from siglane.families.prompt import sandbox
from siglane.families.prompt.programs import Programs

logger = logging.getLogger(__name__)

RENDER_SECONDS = 2.0  # a long conversation takes some hundredths
MOST_PROCESSES = 4


class Renderers(Programs):
    """Those of `sandbox.py`."""

    def __init__(self, most: int = MOST_PROCESSES) -> None:
        super().__init__(sandbox.__file__, most)

    def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """variables: JSON. UserError `chat_template_failed` with what the template raised, `template_timeout` when it
        takes longer than `RENDER_SECONDS`, `template_memory` when it needs more than `sandbox.MEMORY_BYTES`."""
        found = self.ask(json.dumps([RENDER_SECONDS, template, variables]).encode())
        if isinstance(found, int):
            raise _ended(found)
        answer: dict[str, str] = json.loads(found)
        if "error" in answer:
            message = f"the chat template refused the messages: {answer['error']}"
            raise UserError(message, code="chat_template_failed", param="messages")
        return answer["text"]


def renderers() -> Renderers:
    """Those of this process: they know no model, so that all models share them."""
    return _of_process(os.getpid())


@cache
def _of_process(pid: int) -> Renderers:
    """pid: a fork must not talk through its parent's pipes."""
    found = Renderers()
    atexit.register(found.close)
    return found


def _ended(exit_code: int) -> UserError:
    """Why it gave no answer."""
    code, message = "chat_template_failed", "the chat template ended its process"
    match exit_code:
        case returncode if returncode == -signal.SIGALRM:
            code, message = "template_timeout", f"the chat template did not finish within {RENDER_SECONDS:g} s"
        case sandbox.OUT_OF_MEMORY:
            most = sandbox.MEMORY_BYTES >> 20
            code, message = "template_memory", f"the chat template needs more than {most} MiB of memory"
    logger.warning("%s; the request ends with an error", message)
    return UserError(f"{message} for these messages", code=code, param="messages")
