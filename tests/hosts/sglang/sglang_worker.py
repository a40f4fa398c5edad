"""One offline SGLang engine, driven through a pipe by `sglang_host.sglang_engine`. SGLang's own processes import this
file too (multiprocessing's spawn), so it imports nothing at the top that costs time.
"""

from __future__ import annotations

import asyncio
import sys
from multiprocessing.connection import Connection
from typing import Any


def opened(media: Any) -> Any:
    """A picture with fields beside its URL, as SGLang's OpenAI route hands it on."""
    from sglang.srt.utils.common import ImageData

    return ImageData(**media) if isinstance(media, dict) else media


async def answer(engine: Any, request: dict[str, Any], sampling: dict[str, Any]) -> dict[str, Any]:
    media = {name: [opened(one) for one in request[name]] for name in ("image_data",) if name in request}
    try:
        result: dict[str, Any] = await engine.async_generate(**{"sampling_params": sampling, **request, **media})
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return result


async def answer_all(engine: Any, requests: list[dict[str, Any]], sampling: dict[str, Any]) -> list[dict[str, Any]]:
    return await asyncio.gather(*(answer(engine, request, sampling) for request in requests))


def call(engine: Any, method: str, arguments: dict[str, Any]) -> Any:
    if method == "generate":
        return engine.loop.run_until_complete(answer_all(engine, **arguments))
    try:
        return getattr(engine, method)(**arguments)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def main(pipe: Connection) -> None:
    from sglang import Engine

    engine = Engine(**pipe.recv())
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        pipe.send(call(engine, *job))
    engine.shutdown()


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
