"""Batches beside the server's clients: each moves from status to status, on threads of its own, and goes on where a
stopped server has left it. Rows are read, asked, written and resumed as `siglane batch` does (`batch/run.py`)."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import Any

from siglane.batch.form import Answer
from siglane.batch.output import Output, Stopped
from siglane.batch.requests import open_requests
from siglane.batch.row import OF_CHAT, BadRow, Row, Source
from siglane.batch.rows import CannotWrite
from siglane.batch.run import Plan, run_batch
from siglane.engine.process.supervisor import RESTART_WINDOW_SECONDS
from siglane.errors import EngineError, SiglaneError, UserError
from siglane.server.context import InflightShare
from siglane.server.local import LocalServer
from siglane.server.served import Served
from siglane.server.stored.deaths import MOST_DEATHS, DeathBudget
from siglane.server.stored.job import job_of
from siglane.server.stored.store import Batch, Status, Store

logger = logging.getLogger(__name__)

AT_ONCE = 4  # batches that are answered, each another key's
TICK_SECONDS = 2.0
PAUSE_SECONDS = 30.0  # before a batch goes on that the disk or the engine has stopped
COUNT_SECONDS = 1.0
MAX_ERRORS = 100  # told of a batch that cannot be run
PLAN = Plan(order="done", window=256)
EMBEDDING_SLOTS = 16  # rows of many texts each

Failure = Mapping[str, Any]  # OpenAI's: code, line, message, param


class BatchRunner:
    """Runs what `store` has of batches, by `served`, while the server runs."""

    def __init__(self, store: Store, served: Served) -> None:
        self._store, self._served, self._config = store, served, served.config
        self._inflight = InflightShare(served.inflight_bytes, served.inflight_bytes.limit // 2)
        self._pool = ThreadPoolExecutor(AT_ONCE + 1, thread_name_prefix="batch")
        self._lock = threading.Lock()  # of what follows
        self._moving: dict[str, Batch] = {}
        self._stops: dict[str, Callable[[], object]] = {}
        self._paused: dict[str, tuple[float, str]] = {}  # until when, and why
        self._keyless = set[str]()  # batches that wait for their key
        self._deaths = DeathBudget(RESTART_WINDOW_SECONDS)
        self._closed = False

    @asynccontextmanager
    async def running(self, app: object) -> AsyncIterator[None]:
        """The application's lifespan."""
        self._loop, self._woken = asyncio.get_running_loop(), asyncio.Event()
        # an image of a client's finds a free thread
        threads = min(model.media.decode_threads for model in self._served.models)
        self._turns = asyncio.Semaphore(max(1, threads // 2))
        ticking = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            ticking.cancel()
            await asyncio.to_thread(self._close)

    def wake(self) -> None:
        """From any thread: a batch has changed."""
        with suppress(RuntimeError):  # the loop has ended, and with it the server
            self._loop.call_soon_threadsafe(self._woken.set)

    def why_paused(self, batch_id: str) -> str | None:
        """What keeps a batch from going on, until it does."""
        if (why := self._paused.get(batch_id, (0.0, None))[1]) is not None:
            return why
        seconds = self._deaths.rest
        if not seconds or batch_id not in self._stops:
            return None
        return f"the engine died {MOST_DEATHS} times under requests of batches; they go on in {seconds:.0f} s"

    async def _tick(self) -> None:
        while True:
            self._woken.clear()
            try:
                await asyncio.to_thread(self._look)
            except Exception:
                logger.exception("batches cannot be looked after; trying again")
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_SECONDS):
                    await self._woken.wait()

    def _look(self) -> None:
        """Starts what can move on, and stops what was cancelled or is out of time."""
        self._store.expire_files()
        for batch in self._store.active_batches():
            with self._lock:
                if self._ends:
                    return
                moving = self._moving.get(batch.id)
                if moving is None and self._may_move(batch):
                    self._moving[batch.id] = batch
                    self._pool.submit(self._move, batch)
                elif moving is not None and (batch.status != moving.status or _is_late(batch)):
                    self._stops.get(batch.id, _nothing)()

    @property
    def _ends(self) -> bool:
        return self._closed or self._served.draining

    def _may_move(self, batch: Batch) -> bool:
        if batch.status != "in_progress":
            return True
        answering = [one.owner for one in self._moving.values() if one.status == "in_progress"]
        if batch.owner in answering or len(answering) >= AT_ONCE:
            return False
        resting = time.monotonic() < self._paused.get(batch.id, (0.0, ""))[0]
        return _is_late(batch) or not (resting or self._is_keyless(batch))

    def _is_keyless(self, batch: Batch) -> bool:
        """Whether the server would not take its requests from whoever has it. With the key it goes on."""
        if self._served.clients.of_owner(batch.owner) is not None:
            return False
        if batch.id not in self._keyless:
            self._keyless.add(batch.id)
            logger.warning("batch %s waits: its key is none of the server's", batch.id)
        return True

    def _move(self, batch: Batch) -> None:
        """From one status to the next."""
        try:
            match batch.status:
                case "validating":
                    self._validate(batch)
                case "in_progress":
                    self._answer(batch)
                case "cancelling":
                    self._store.finish(batch.id, "cancelled")
                case "finalizing":
                    self._store.finish(batch.id, "completed")
        except Stopped:
            pass  # by a client, by its time or by the server's end: the next look knows
        except (CannotWrite, EngineError) as error:
            self._pause(batch, error)
        except UserError as error:
            self._fail(batch, [_failure(error.code, error.message, param=error.param)])
        except Exception:
            logger.exception("batch %s failed", batch.id)
            self._fail(batch, [_failure("internal_error", "internal error; the server's log has it")])
        finally:
            with self._lock:
                del self._moving[batch.id]
            self.wake()

    def _pause(self, batch: Batch, error: SiglaneError) -> None:
        logger.warning("batch %s waits: %s", batch.id, error)
        full = isinstance(error, CannotWrite) or (isinstance(error, EngineError) and error.status == 507)
        reason = "the server's disk is full, or cannot be written" if full else str(error)
        until = time.monotonic() + PAUSE_SECONDS
        self._paused[batch.id] = until, f"{reason}; nothing is lost, the batch goes on when it can"

    def _fail(self, batch: Batch, failures: list[Failure]) -> None:
        try:
            self._store.finish(batch.id, "failed", errors=failures)
        except EngineError as error:
            self._pause(batch, error)

    def _open(self, batch: Batch) -> Source:
        path = self._store.path_of(batch.input_file_id)
        try:
            return open_requests(path, self._config.max_body_bytes)
        except UserError as error:
            message = error.message.replace(str(path), batch.input_file_id)
            raise UserError(message, code="invalid_input_file", param="input_file_id") from error

    def _validate(self, batch: Batch) -> None:
        """Reads the whole input. A line that cannot be asked costs itself; a line for another endpoint, none that can
        be asked, or too many cost the batch."""
        total = good = 0
        bad: list[Failure] = []
        elsewhere: list[Failure] = []
        for row in self._open(batch).rows:
            total += 1
            if (row.code == "invalid_url") if isinstance(row, BadRow) else (row.url != batch.endpoint):
                message = f"the url of every line must be the endpoint of the batch, {batch.endpoint}"
                elsewhere.append(_failure("invalid_url", message, line=row.number, param="url"))
            elif isinstance(row, Row):
                good += 1
            elif len(bad) < MAX_ERRORS:
                bad.append(_failure(row.code, row.message, line=row.number))
            if self._ends or len(elsewhere) >= MAX_ERRORS or total > self._config.max_batch_rows:
                break
        if self._ends:
            return
        failures = elsewhere or self._too_many(batch, total)
        if not failures and not good:
            failures = bad or [_failure("empty_file", "the input file has no requests", param="input_file_id")]
        if failures:
            self._fail(batch, failures)
        else:
            self._turn(batch, "validating", "in_progress", total=total)

    def _too_many(self, batch: Batch, total: int) -> list[Failure]:
        if total > (most := self._config.max_batch_rows):
            return [
                _failure("too_many_rows", f"a batch has at most {most} requests; make several", param="input_file_id")
            ]
        others = [one for one in self._store.active_batches() if one.owner == batch.owner and one.id != batch.id]
        queued = sum(one.total - one.completed - one.failed for one in others)
        client = self._served.clients.of_owner(batch.owner)
        most = (client and client.limits.max_queued_rows) or self._config.max_queued_rows
        if queued + total <= most:
            return []
        message = f"your batches have {queued} requests before them, with these more than {most}; wait for some"
        return [_failure("queue_limit_exceeded", message, param="input_file_id")]

    def _answer(self, batch: Batch) -> None:
        """Asks what is not written yet. Stopped, CannotWrite and EngineError when it is to go on later."""
        source, late = self._open(batch), _is_late(batch)
        with self._output(batch, source.digest) as output:
            try:
                if not late:
                    asyncio.run(self._ask(batch, source, output))
            except Stopped:
                late = _is_late(batch)
                if not late or self._ends or self._store.batch(batch.id).status != "in_progress":
                    raise
            finally:
                with suppress(EngineError):  # they are counted again when it goes on
                    self._count(batch, output)
            if late:
                self._write_late(batch, output)
                self._count(batch, output)
        with self._lock:
            self._paused.pop(batch.id, None)
        if late:
            self._store.finish(batch.id, "expired")
        else:
            self._turn(batch, "in_progress", "finalizing")

    async def _ask(self, batch: Batch, source: Source, output: Output) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        counted = 0.0

        def note(row: Row | BadRow, answer: Answer | None) -> None:
            nonlocal counted
            if time.monotonic() - counted > COUNT_SECONDS:
                counted = time.monotonic()
                self._count(batch, output)
                self._paused.pop(batch.id, None)  # it goes on

        rows = (row for row in source.rows if not output.has(row))
        with self._stoppable(batch, lambda: loop.call_soon_threadsafe(stop.set)):
            await run_batch(rows, self._server_for(batch), output, PLAN, stop=stop, written=note)

    @contextmanager
    def _stoppable(self, batch: Batch, stop: Callable[[], object]) -> Iterator[None]:
        with self._lock:
            self._stops[batch.id] = stop
        try:
            yield
        finally:
            with self._lock:
                del self._stops[batch.id]

    def _server_for(self, batch: Batch) -> _OnItsLoop:
        slots = self._served.engine.spec.config.max_running if batch.endpoint in OF_CHAT else EMBEDDING_SLOTS
        client = self._served.clients.of_owner(batch.owner)
        assert client is not None, "a batch without a key was started"
        server = LocalServer(self._served, slots, self._inflight, self._turns, client, self._deaths)
        return _OnItsLoop(server, self._loop, lambda: self._ends)

    def _write_late(self, batch: Batch, output: Output) -> None:
        message = "the completion window ended before the request was asked"
        for row in self._open(batch).rows:
            if not output.has(row):
                late = BadRow(row.number, "batch_expired", message, row.custom_id)
                output.write(late if isinstance(row, Row) else row, None)

    def _count(self, batch: Batch, output: Output) -> None:
        answered, failed = output.answered, output.found - output.answered
        self._store.update(batch.id, lambda one: replace(one, completed=answered, failed=failed))

    def _turn(self, batch: Batch, before: Status, after: Status, **changes: Any) -> None:
        """Unless it was cancelled in between."""
        self._store.update(batch.id, lambda one: one.turned(after, **changes) if one.status == before else one)

    def _close(self) -> None:
        """Every batch stops where it is; the next server goes on."""
        with self._lock:
            self._closed = True
            for stop in self._stops.values():
                stop()
        self._pool.shutdown()
        self._store.close()

    def _output(self, batch: Batch, digest: str) -> Output:
        spec = self._served.engine.spec
        job = job_of(
            self._config, spec, self._served.models[0].image_limits, replace(spec, verify_weights=False).open()
        )
        try:
            return Output(self._store.output_path(batch.id), {"input": digest, **job})
        except UserError as error:
            if error.code == "cannot_write":
                raise CannotWrite(error.message) from error
            message = f"the server has another {error.param} than when the batch began; create the rest as a new one"
            raise UserError(message, code="another_server", param=error.param) from error


class _OnItsLoop:
    """A server whose loop runs on another thread than the batch. Stopped when it ends; what it answers while it does
    is no answer."""

    def __init__(self, server: LocalServer, loop: asyncio.AbstractEventLoop, ends: Callable[[], bool]) -> None:
        self.slots, self._server, self._loop, self._ends = server.slots, server, loop, ends

    async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        if self._ends():
            raise Stopped("the server is shutting down")
        asked = asyncio.run_coroutine_threadsafe(self._server.ask(url, body), self._loop)
        answer = await asyncio.wrap_future(asked)
        if answer.status >= 500 and self._ends():
            raise Stopped("the server is shutting down")
        return answer


def _is_late(batch: Batch) -> bool:
    return time.time() >= batch.expires_at


def _failure(code: str, message: str, line: int | None = None, param: str | None = None) -> Failure:
    return {"code": code, "message": message, "line": line, "param": param}


def _nothing() -> None:
    """What stops a batch that cannot be stopped at the moment."""
