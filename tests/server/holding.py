"""`python holding.py N WORDS...`: a command of siglane whose batch rows get N answers and wait for more, so that a
test can stop it in the middle however slow the machine is."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from itertools import count
from typing import Any


def hold(answers: int) -> None:
    from siglane.batch.form import Answer
    from siglane.server.local import LocalServer

    ask, given = LocalServer.ask, count(1)

    async def ask_some(self: LocalServer, url: str, body: Mapping[str, Any]) -> Answer:
        if next(given) > answers:
            await asyncio.Event().wait()
        return await ask(self, url, body)

    LocalServer.ask = ask_some  # type: ignore[method-assign]


if __name__ == "__main__":  # an engine reads this file too
    from siglane.cli.main import main

    hold(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
