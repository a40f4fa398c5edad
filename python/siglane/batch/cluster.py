"""A batch's servers as workers of a Ray cluster: each an actor with an engine of its own.

Actors rather than Ray Data: `batch/run.py` already reads ahead, orders, writes and resumes row by row, and blames a row
for what it does; Ray Data would run whole blocks again and know nothing of rows. Ray is an extra.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from siglane.batch.form import Answer
from siglane.batch.pool import PATIENCE, EngineDied, Pool, Server
from siglane.errors import EngineError, SiglaneError, UserError

if TYPE_CHECKING:
    from ray.exceptions import RayError

logger = logging.getLogger(__name__)

LOCAL, RUNNING = "local", "auto"  # addresses: a Ray of one's own on this machine; the one that runs here
CONNECT_SECONDS = 10.0
STARTS = 5  # of a worker one after the other that fail before it is given up
PAUSE_SECONDS = 1.0  # between them
MANY = 100_000  # an actor takes as many rows as it is given

Serving = Callable[[], AbstractContextManager[AbstractAsyncContextManager[Server]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """count: None for as many as the cluster has room for; cpus, gpus: that Ray reserves for each, parts too;
    patience: seconds that Ray has to start the first."""

    count: int | None = None
    cpus: float = 1
    gpus: float = 0
    patience: float = 600.0

    def fit(self, cpus: float, gpus: float) -> int:
        """How many there is room for on a machine."""
        return int(min(have // need for have, need in ((cpus, self.cpus), (gpus, self.gpus)) if need))

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs and {self.gpus:g} GPUs"


class _Started(NamedTuple):
    """What a worker says of itself when its engine has loaded."""

    version: str
    slots: int


class _Worker:
    """Runs in a process of Ray's: the server that `serving` makes, on this actor's event loop."""

    def __init__(self, serving: Serving) -> None:
        self._serving, self._open = serving, ExitStack()
        self._connections = AsyncExitStack()

    async def start(self) -> _Started:
        connection = await asyncio.to_thread(self._open.enter_context, self._serving())
        self._server = await self._connections.enter_async_context(connection)
        return _Started(version("siglane"), self._server.slots)

    async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        return await self._server.ask(url, body)


class RayServer(Pool):
    """`count` workers as one server. An asynchronous context manager, entered inside `connected`; the workers live
    while it is open. serving: makes the server of a worker, there; it must be picklable."""

    def __init__(self, serving: Serving, workers: Workers, count: int) -> None:
        import ray

        wanted = {"num_cpus": workers.cpus, "num_gpus": workers.gpus, "max_concurrency": MANY, "max_restarts": 0}
        create = ray.remote(**wanted)(_Worker).remote
        self._workers, self._needs = [_Handle(lambda: create(serving)) for _ in range(count)], workers
        super().__init__(self._workers)

    async def __aenter__(self) -> Self:
        """Returns when the first worker can be asked; the others join when they can. UserError and EngineError when
        none will."""
        for worker in self._workers:
            worker.begin()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._needs.patience):
                await asyncio.wait([worker.settled for worker in self._workers], return_when=asyncio.FIRST_COMPLETED)
        try:
            settled = [worker.settled for worker in self._workers if worker.settled.done()]
            for one in settled:
                one.result()
            if not settled:
                message = f"Ray started no worker with {self._needs} in {self._needs.patience:g} seconds"
                raise UserError(message, code="bad_option")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        for worker in self._workers:
            await worker.end()


class _Handle:
    """A worker from here: an actor, and another one when it has died."""

    def __init__(self, create: Callable[[], Any]) -> None:
        self._create, self.slots = create, 0
        self._actor: Any = None  # Ray's handle
        self._failure: SiglaneError | None = None

    def begin(self) -> None:
        # once: when it can be asked, or why it never can
        self.settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._died = asyncio.Event()
        self._keeping = asyncio.create_task(self._keep())

    async def end(self) -> None:
        import ray

        self._keeping.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._keeping
        if self.settled.done():
            self.settled.exception()  # was told, or is another worker's too
        if self._actor is not None:
            ray.kill(self._actor)

    async def ask(self, url: str, body: Mapping[str, Any]) -> Answer:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        while (actor := self._actor) is None:
            if self._failure is not None:
                raise self._failure
            await asyncio.sleep(PATIENCE)
        try:
            return await actor.ask.remote(url, body)
        except RayActorError as error:
            if actor is self._actor:
                logger.warning("a Ray worker died, another one takes its place: %s", _first_line(error))
                self._actor, self.slots = None, 0
                self._died.set()
                ray.kill(actor)  # one that was only out of reach
            raise EngineDied from error
        except RayTaskError as error:
            raise _cause(error) from error

    async def _keep(self) -> None:
        """Starts the worker whenever there is none."""
        while True:
            self._died.clear()
            try:
                await self._start()
            except SiglaneError as error:
                self._failure, self.slots = error, 1  # so that it is asked, and says so
                if not self.settled.done():
                    self.settled.set_exception(error)
                return
            if not self.settled.done():
                self.settled.set_result(None)
            await self._died.wait()

    async def _start(self) -> None:
        from ray.exceptions import RayActorError, RayError

        for tried in range(1, STARTS + 1):
            actor = self._create()
            try:
                found = await actor.start.remote()
            except RayActorError as error:
                if tried == STARTS:
                    message = f"a Ray worker died {STARTS} times while it started: {_first_line(error)}"
                    raise EngineError(message) from error
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            except RayError as error:
                raise _cause(error) from error
            if found.version != version("siglane"):
                message = f"a Ray worker has siglane {found.version}, this is {version('siglane')}; install the same"
                raise UserError(message, code="bad_option")
            self._actor, self.slots = actor, found.slots
            return


def _cause(error: RayError) -> Exception:
    """What a worker raised, as it was there; EngineError for what is no error of siglane's."""
    from ray.exceptions import RayTaskError

    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, SiglaneError | EngineDied):
        return cause
    return EngineError(f"a Ray worker failed: {type(cause).__name__}: {_first_line(cause)}")


def _first_line(error: Exception) -> str:
    """Ray says much more."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def connected(address: str, workers: Workers) -> Iterator[int]:
    """Inside, this process is a driver of the Ray at `address`, with room for so many workers. UserError when it does
    not answer or has no room, or Ray is missing."""
    import_ray()
    import ray

    _check_address(address)
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        message = f"cannot use the Ray at {address}: {_first_line(error)}"
        raise UserError(message, code="bad_option", param="ray") from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray's own would end a batch without its summary
    try:
        yield _count(workers, address)
    finally:
        ray.shutdown()


def import_ray() -> None:
    """UserError where it is not installed. Ray then sends nobody statistics of its use, unless it is told to."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # noqa: F401
    except ImportError as error:
        message = f"--ray needs one more package ({error}); pip install 'siglane[ray]'"
        raise UserError(message, code="missing_extra") from error


def _check_address(address: str) -> None:
    """Ray itself would wait for minutes."""
    if address in (LOCAL, RUNNING):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        reason = "it is no host:port; start the batch on a node of the cluster, or by `ray job submit`"
    else:
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
    raise UserError(f"cannot use the Ray at {address}: {reason}", code="bad_option", param="ray")


def _count(workers: Workers, address: str) -> int:
    """How many to start. UserError where there is no room, and nobody can make it."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(workers.fit(node.get("CPU", 0), node.get("GPU", 0)) for node in nodes)
    count = room if workers.count is None else workers.count
    if count > room or not count:
        message = f"{count or 1} workers with {workers} each do not fit: Ray has {_shown(nodes)}"
        if address == LOCAL or not count:
            raise UserError(f"{message}; ask for less by --ray-workers, --ray-cpus, --ray-gpus", code="bad_option")
        logger.warning("%s; the rest waits for more nodes", message)
    return count


def _shown(nodes: Sequence[Mapping[str, float]]) -> str:
    return ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes) or "no nodes"
