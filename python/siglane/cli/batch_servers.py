"""Who answers a batch: the models of MODEL in this process or in workers of Ray, or the server of `--base-url`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from siglane.cli.batch_input import BatchCommand
from siglane.cli.common import ModelOptions, check_base_url
from siglane.errors import UserError
from siglane.settings.engine import EngineConfig
from siglane.settings.flags import OptionGroup, read_options, stated_in
from siglane.settings.options import above_zero, at_least, option
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import ImageBudget

if TYPE_CHECKING:
    from siglane.batch.pool import Server
    from siglane.engine.process.child import EngineSpec

Serving = Callable[[], AbstractContextManager["AbstractAsyncContextManager[Server]"]]

RESTARTS = 50  # of the engine in a few minutes: every row may kill it twice
PATCH_CACHE_BYTES = 32 << 20  # rows about equal pictures are asked one after the other
CPU_STEP_PATCHES = 4096  # nobody waits for a first token, so that several pictures and more answers share a step


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions(BatchCommand):
    base_url: str | None = option(
        None, "ask this OpenAI-compatible server, which calls its model MODEL; none is loaded here"
    )
    api_key: str | None = option(None, "its key; other users of this machine can read it from a flag", repr=False)
    concurrency: int = option(16, "requests that it gets at one time")
    retries: int = option(8, "of a row that it cannot take: 408, 409, 425, 429, 5xx, broken connections")
    answer_timeout: float = option(600.0, "seconds for one answer")

    def __post_init__(self) -> None:
        if self.base_url is not None:
            check_base_url(self.base_url)
        if self.concurrency < 1 or self.retries < 0 or not self.answer_timeout > 0:
            message = "--concurrency must be at least 1, --retries at least 0 and --answer-timeout above 0"
            raise UserError(message, code="bad_option")


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions(BatchCommand):
    ray: str | None = option(
        None,
        "host:port of a Ray cluster whose workers answer, `auto` for the one that this machine belongs to; "
        "bare: RAY_ADDRESS, or a Ray of its own on this machine",
        bare="",
    )
    ray_workers: int | None = option(None, "each with an engine of its own; none: as many as there is room for")
    ray_cpus: float = option(1, "reserved for each worker")
    ray_gpus: float = option(0, "reserved for each worker; parts are possible")
    ray_timeout: float = option(600.0, "seconds until the first worker has loaded its model")

    def __post_init__(self) -> None:
        if self.ray_workers is not None:
            at_least("ray_workers", self.ray_workers, 1)
        for name in ("ray_cpus", "ray_gpus"):
            at_least(name, getattr(self, name), 0)
        above_zero("ray_cpus or ray_gpus", self.ray_cpus + self.ray_gpus)
        above_zero("ray_timeout", self.ray_timeout)

    @property
    def address(self) -> str:
        from siglane.batch.cluster import LOCAL

        return self.ray or os.environ.get("RAY_ADDRESS") or LOCAL


@dataclass(frozen=True, slots=True)
class Answerer:
    """made_from: what its answers depend on, by the names that a user knows; serving: the server from its start to its
    end, which lives on one event loop."""

    made_from: Mapping[str, Any]
    serving: Serving


REMOTE, RAY = OptionGroup(RemoteOptions, "another server"), OptionGroup(RayOptions, "Ray")


def answerer_of(arguments: argparse.Namespace, local: tuple[OptionGroup, ...]) -> Answerer:
    """local: options of models in this process. UserError for a model that cannot be found, or options that would have
    no effect."""
    remote, ray = read_options(RemoteOptions, arguments), read_options(RayOptions, arguments)
    if remote.base_url is not None:
        _refuse(arguments, (*local, RAY), "has no effect with --base-url: the server decides it")
        return _other_server(remote, arguments.model)
    _refuse(arguments, (REMOTE,), "belongs to --base-url, which is missing")
    made_from, own_models = _own_models(arguments)
    if ray.ray is not None:
        return Answerer(made_from, _workers(ray, own_models))
    _refuse(arguments, (RAY,), "belongs to --ray, which is missing")
    return Answerer(made_from, own_models)


def _refuse(arguments: argparse.Namespace, groups: tuple[OptionGroup, ...], why: str) -> None:
    given = {*vars(arguments), *stated_in(arguments)}
    for one in (one for group in groups for one in group.options):
        if one.name in given:
            raise UserError(f"{one.flags[0]} {why}", code="bad_option", param=one.name)


def _other_server(options: RemoteOptions, model: str) -> Answerer:
    """Its address is no part of the job: a fleet may move."""
    from siglane.batch.remote import RemoteServer

    url = options.base_url
    assert url is not None

    def server() -> nullcontext[AbstractAsyncContextManager[Server]]:
        return nullcontext(
            RemoteServer(
                url,
                model,
                api_key=options.api_key,
                slots=options.concurrency,
                retries=options.retries,
                timeout=options.answer_timeout,
            )
        )

    return Answerer({"model": model, "base_url": "given"}, server)


def _own_models(arguments: argparse.Namespace) -> tuple[Mapping[str, Any], Serving]:
    """What their answers depend on, and the server: here or, as it is picklable, in another process."""
    from siglane.engine.process.child import EngineSpec
    from siglane.server.stored.job import job_of
    from siglane.weights.demo import FOLDERS, demo_folder

    config, model = read_options(ServerConfig, arguments), arguments.model
    if config.patch_cache_bytes is None:
        config = dataclasses.replace(config, patch_cache_bytes=PATCH_CACHE_BYTES)
    if model in FOLDERS:
        config = dataclasses.replace(config, served_model_name=config.served_model_name or model)
        model = str(demo_folder() / FOLDERS[model])
    limits, named = read_options(ImageBudget, arguments), dataclasses.asdict(read_options(ModelOptions, arguments))
    spec = EngineSpec(model, read_options(EngineConfig, arguments), tagger=config.tagger, **named)
    return job_of(config, spec, limits, spec.open()), functools.partial(_local_server, config, spec, limits)


@contextmanager
def _local_server(
    config: ServerConfig, spec: EngineSpec, limits: ImageBudget
) -> Iterator[AbstractAsyncContextManager[Server]]:
    from siglane.server.launch import serving
    from siglane.server.local import LocalServer

    engine = spec.config
    if not engine.max_batch_patches and engine.resolve_device().type == "cpu":
        spec = dataclasses.replace(spec, config=dataclasses.replace(engine, max_batch_patches=CPU_STEP_PATCHES))
    with serving(config, spec, limits, RESTARTS) as served:
        served.engine.wait_ready()
        yield nullcontext(LocalServer(served, spec.config.max_running))


def _workers(options: RayOptions, own_models: Serving) -> Serving:
    """Where rows are computed is no part of the job."""
    from siglane.batch.cluster import RayServer, Workers, connected, import_ray

    import_ray()
    workers = Workers(
        count=options.ray_workers, cpus=options.ray_cpus, gpus=options.ray_gpus, patience=options.ray_timeout
    )

    @contextmanager
    def server() -> Iterator[AbstractAsyncContextManager[Server]]:
        with connected(options.address, workers) as count:
            print(f"siglane: Ray at {options.address}: {count} workers with {workers} each", file=sys.stderr)
            yield RayServer(own_models, workers, count)

    return server
