"""Answers of any OpenAI-compatible server, event by event."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import httpx2

from siglane.batch.remote import CONNECT_SECONDS, answer_of
from siglane.batch.row import CHAT
from siglane.cli.common import check_base_url
from siglane.errors import EngineError, UserError


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event adds to the first choice. usage: of the whole answer, once it is told."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: Mapping[str, Any] | None = None
    timings: Mapping[str, float] = field(default_factory=dict)


class StreamingClient:
    """An asynchronous context manager, which owns the connections."""

    def __init__(self, url: str, api_key: str | None = None, connections: int = 1, timeout: float = 600.0) -> None:
        self.url = check_base_url(url)
        self._client = httpx2.AsyncClient(
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx2.Timeout(timeout, connect=CONNECT_SECONDS, pool=None),
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.aclose()

    async def first_model(self) -> str:
        """The one that the server names first. UserError when it names none."""
        try:
            response = await self._client.get(f"{self.url}/v1/models", timeout=CONNECT_SECONDS)
        except httpx2.RequestError as error:
            raise self._unreachable(error) from error
        body = answer_of(response.status_code, response.content).body
        if response.status_code != 200:
            raise _refused(response.status_code, body)
        try:
            return str(body["data"][0]["id"])
        except (LookupError, TypeError) as error:
            raise UserError(f"{self.url} names no model; give MODEL", code="bad_option") from error

    async def pieces(self, body: Mapping[str, Any]) -> AsyncGenerator[Piece]:
        """Of one streamed answer. UserError and EngineError for what the server refuses, by its own words, and for
        one that ends before it is whole."""
        ended = False
        try:
            async with self._client.stream("POST", self.url + CHAT, json=dict(body)) as response:
                if response.status_code != 200:
                    raise _refused(response.status_code, answer_of(response.status_code, await response.aread()).body)
                async for line in response.aiter_lines():
                    name, _, data = line.partition(":")
                    if name != "data" or not data.strip():
                        continue
                    if data.strip() == "[DONE]":
                        return
                    piece = _piece(data)
                    ended = ended or piece.finish_reason is not None
                    yield piece
        except httpx2.RequestError as error:
            raise self._unreachable(error) from error
        if not ended:
            raise EngineError("the stream ended before its answer did")

    def _unreachable(self, error: httpx2.RequestError) -> EngineError:
        reason = f"{type(error).__name__}: {error}".removesuffix(": ")
        return EngineError(f"{self.url} does not answer: {reason}", code="connection_failed", status=502)


def _refused(status: int, body: Mapping[str, Any]) -> UserError | EngineError:
    """An error as the server told it."""
    error = body["error"] if isinstance(body.get("error"), Mapping) else {}
    message = f"the server answers {status}: {error.get('message', 'no reason given')}"
    code = str(error.get("code") or f"http_{status}")
    return EngineError(message, code=code, status=status) if status >= 500 else UserError(message, code=code)


def _piece(data: str) -> Piece:
    try:
        event = json.loads(data)
        if "error" in event:
            raise _refused(500, event if isinstance(event["error"], dict) else {"error": {"message": event["error"]}})
        choice: Mapping[str, Any] = next(iter(event.get("choices") or ()), {})
        delta = choice.get("delta") or {}
        return Piece(
            delta.get("content") or "",
            delta.get("reasoning_content") or delta.get("reasoning") or "",
            choice.get("finish_reason"),
            event.get("usage"),
            (event.get("siglane") or {}).get("timings") or {},
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise EngineError(f"the server sent an event that is none of OpenAI's: {data[:200]!r}") from error
