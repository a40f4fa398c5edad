"""Several servers as one, and what becomes of a row whose server dies under it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from siglane.batch.form import Answer, failed
from siglane.batch.requests import pictures_of

PATIENCE = 0.05  # seconds between looks for a server that has room
REMEMBERED = 4096  # rows' pictures of which it is known who was asked about them
CROWDED = 1.25  # times its slots that a server may have because it knows the pictures


DEATHS_IN_COMPANY = 5  # of engines under one row, where others were there each time, who may have been the cause


class EngineDied(Exception):
    """The engine was lost while it worked at a row. alone: and at nothing else."""

    def __init__(self, *, alone: bool = True) -> None:
        super().__init__()
        self.alone = alone


class Server(Protocol):
    """slots: rows that it works at in one time, 0 while it has to be waited for. It is asked in the order in which rows
    are best computed."""

    @property
    def slots(self) -> int: ...

    async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        """Waits while the server is not ready. Raises EngineDied, and SiglaneError when it will never be."""
        ...


@dataclass(slots=True, eq=False)
class _Place:
    """asked: rows that the server has at the moment; alone: it has one that nothing may be beside."""

    server: Server
    asked: int = 0
    alone: bool = False

    @property
    def load(self) -> float:
        """1 where all slots are taken."""
        return self.asked / self.server.slots


class Pool:
    """A row goes to the server with the most room, or to the one that had its pictures before, which are encoded
    already, as long as that is not crowded (consistent hashing with bounded loads has the same rule).

    A row under which its server dies is asked once more with nothing of the batch beside it, by whichever can; the
    others go on meanwhile. When it dies under the row again the row is at fault, and an error, unless a server's own
    clients were there too.
    """

    def __init__(self, servers: Sequence[Server]) -> None:
        self._places = [_Place(server) for server in servers]
        self._known: OrderedDict[int, _Place] = OrderedDict()
        self._suspects = 0  # rows that wait for a server of their own
        self._emptied: _Place | None = None  # takes nothing else, because they wait for it

    @property
    def slots(self) -> int:
        return sum(place.server.slots for place in self._places)

    async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        """SiglaneError when a server will never be ready."""
        place = await self._roomiest(body)
        place.asked += 1
        try:
            return await place.server.ask(url, body)
        except EngineDied:
            pass
        finally:
            place.asked -= 1
        deaths, at_fault = 1, False
        while not at_fault and deaths < DEATHS_IN_COMPANY:
            try:
                return await self._ask_alone(url, body)
            except EngineDied as died:
                deaths += 1
                at_fault = died.alone
        return failed(500, "engine_died", f"the engine died {deaths} times under this row")

    async def _ask_alone(self, url: str, body: Mapping[str, Any]) -> Answer:
        place = await self._empty()
        place.asked, place.alone = 1, True
        try:
            return await place.server.ask(url, body)
        finally:
            place.asked, place.alone = 0, False

    async def _roomiest(self, body: Mapping[str, Any]) -> _Place:
        while not (found := [one for one in self._ready() if not one.alone and one is not self._emptied]):
            await asyncio.sleep(PATIENCE)
        chosen = min(found, key=lambda place: place.load)
        if len(self._places) > 1 and (pictures := tuple(pictures_of(body))):
            near = self._known.pop(hash(pictures), chosen)
            if near in found and near.load < CROWDED:
                chosen = near
            self._known[hash(pictures)] = chosen
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        return chosen

    async def _empty(self) -> _Place:
        """One that is ready, when all that it was asked is answered; meanwhile it gets nothing new."""
        self._suspects += 1
        try:
            while True:
                ready = self._ready()
                if ready and self._emptied not in ready:
                    self._emptied = min(ready, key=lambda place: place.load)
                if self._emptied is not None and self._emptied in ready and not self._emptied.asked:
                    return self._emptied
                await asyncio.sleep(PATIENCE)
        finally:
            self._suspects -= 1
            if not self._suspects:
                self._emptied = None

    def _ready(self) -> list[_Place]:
        return [place for place in self._places if place.server.slots]
