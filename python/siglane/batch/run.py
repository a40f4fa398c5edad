"""Asks every row of a source, many at a time, and writes what is answered.

The server is whoever answers: siglane's own in this process, or any other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Literal

from siglane.batch.form import Answer, failed
from siglane.batch.output import Output, Stopped
from siglane.batch.pool import Pool, Server
from siglane.batch.row import SEEDED, BadRow, Row
from siglane.batch.window import Window
from siglane.errors import UserError

Order = Literal["input", "done"]
Written = Callable[[Row | BadRow, Answer | None], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a batch is run. window: rows that may be in memory; seed: what a row without one gets its own from."""

    order: Order = "input"
    window: int = 1024
    seed: int = 0


@dataclass(slots=True)
class _Run:
    """A batch on its way. Every row is in exactly one of these places."""

    rows: Iterator[Row | BadRow]
    server: Pool
    output: Output
    plan: Plan
    written: Written
    waiting: Window
    asked: dict[asyncio.Task[Answer], Row] = field(default_factory=dict)
    ended: dict[int, tuple[Row | BadRow, Answer | None]] = field(default_factory=dict)  # wait for those before them
    order: deque[int] = field(default_factory=deque)  # numbers of the rows that are not written, as they were read
    last: asyncio.Event | None = None  # set when the row that was started last has been put to the server
    at_end: bool = False

    def read_ahead(self) -> None:
        while not self.at_end and self.waiting.has_room(len(self.asked) + len(self.ended)):
            row = next(self.rows, None)
            if row is None:
                self.at_end = True
                return
            if self.plan.order == "input":
                self.order.append(row.number)
            if isinstance(row, BadRow):
                self.end(row, None)
            else:
                self.waiting.add(row)

    def start(self) -> None:
        while self.waiting and len(self.asked) < max(1, self.server.slots):
            self._ask(self.waiting.take())

    def _ask(self, row: Row) -> None:
        before, self.last = self.last, asyncio.Event()
        self.asked[asyncio.create_task(_ask(self.server, row, self.plan.seed, before, self.last))] = row

    def take(self, task: asyncio.Task[Answer]) -> None:
        self.end(self.asked.pop(task), task.result())

    def end(self, row: Row | BadRow, answer: Answer | None) -> None:
        """Writes what is ended, in the order that was asked for."""
        if self.plan.order == "done":
            self._write(row, answer)
            return
        self.ended[row.number] = row, answer
        while self.order and self.order[0] in self.ended:
            self._write(*self.ended.pop(self.order.popleft()))

    def _write(self, row: Row | BadRow, answer: Answer | None) -> None:
        self.output.write(row, answer)
        self.written(row, answer)


async def run_batch(
    rows: Iterator[Row | BadRow],
    server: Server,
    output: Output,
    plan: Plan,
    *,
    stop: asyncio.Event,
    written: Written = lambda row, answer: None,
) -> None:
    """Returns when the last row is written. Stopped when `stop` is set or too many rows fail, CannotWrite for a full
    disk, SiglaneError when the server is lost; what is written then stays."""
    run = _Run(rows, Pool([server]), output, plan, written, Window(plan.window))
    stopped = asyncio.create_task(stop.wait())
    try:
        while True:
            run.read_ahead()
            run.start()
            if not run.asked:
                break
            done, _ = await asyncio.wait((*run.asked, stopped), return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in run.asked if task in done]:
                run.take(task)
            if stop.is_set():
                raise Stopped("the batch was stopped; the same command continues it")
        output.sync()
    finally:
        stopped.cancel()
        for task in run.asked:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*run.asked, stopped, return_exceptions=True)


async def _ask(server: Pool, row: Row, seed: int, before: asyncio.Event | None, put: asyncio.Event) -> Answer:
    """Files are read side by side, the server is asked in order: after `before` was set, and then `put`."""
    try:
        body = await asyncio.to_thread(row.read) if row.pictures else row.body
    except UserError as error:
        return failed(error.status, error.code, error.message)
    finally:
        if before is not None:
            await before.wait()
        put.set()  # who waits for it goes on when this task waits itself: when the server has been asked
    return await server.ask(row.url, _with_seed(body, row, seed))


def _with_seed(body: Mapping[str, Any], row: Row, seed: int) -> Mapping[str, Any]:
    """A row's answer must not depend on how often and beside whom it is asked."""
    if row.url not in SEEDED or body.get("seed") is not None:
        return body
    return {**body, "seed": seed_of(seed, row.custom_id)}


def seed_of(seed: int, custom_id: str) -> int:
    """31 bits."""
    digest = blake2b(f"{seed} {custom_id}".encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest) >> 1
