"""The requests that are being answered, by the names that their clients know."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from siglane.server.clients import Client
from siglane.server.context import RequestContext


class Running:
    def __init__(self) -> None:
        self._contexts: dict[int, RequestContext] = {}

    @contextlib.contextmanager
    def noted(self, context: RequestContext) -> Iterator[None]:
        """As long as it is answered."""
        self._contexts[id(context)] = context
        try:
            yield
        finally:
            del self._contexts[id(context)]

    def of(self, client: Client, name: str) -> list[RequestContext]:
        """name: the request's id (x-request-id) or its answer's. Several requests may have one: clients choose it."""
        return [
            context
            for context in self._contexts.values()
            if context.client is client and name in (context.request_id, context.answer_id)
        ]
