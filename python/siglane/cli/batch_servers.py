"""Who answers a batch: the models of MODEL in this process, or the server of `--base-url`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from siglane.cli.common import ModelOptions
from siglane.errors import UserError
from siglane.settings.engine import EngineConfig
from siglane.settings.flags import OptionGroup, read_options, stated_in
from siglane.settings.options import CommandOptions
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import ImageBudget

if TYPE_CHECKING:
    from siglane.batch.run import Server

RESTARTS = 50  # of the engine in a few minutes: every row may kill it twice


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions(CommandOptions):
    COMMAND = "batch"

    base_url: str | None = field(
        default=None,
        metadata={"help": "ask this OpenAI-compatible server, which calls its model MODEL; none is loaded here"},
    )
    api_key: str | None = field(
        default=None, repr=False, metadata={"help": "its key; other users of this machine can read it from a flag"}
    )
    concurrency: int = field(default=16, metadata={"help": "requests that it gets at one time"})
    retries: int = field(
        default=8, metadata={"help": "of a row that it cannot take: 408, 409, 425, 429, 5xx, broken connections"}
    )
    answer_timeout: float = field(default=600.0, metadata={"help": "seconds for one answer"})

    def __post_init__(self) -> None:
        if self.base_url is not None and (urlsplit(self.base_url).scheme not in ("http", "https")):
            message = f"--base-url {self.base_url!r} is no http:// or https:// address"
            raise UserError(message, code="bad_option", param="base_url")
        if self.concurrency < 1 or self.retries < 0 or not self.answer_timeout > 0:
            message = "--concurrency must be at least 1, --retries at least 0 and --answer-timeout above 0"
            raise UserError(message, code="bad_option")


@dataclass(frozen=True, slots=True)
class Answerer:
    """made_from: what its answers depend on, by the names that a user knows; serving: the server from its start to its
    end, which lives on one event loop."""

    made_from: Mapping[str, Any]
    serving: Callable[[], AbstractContextManager[AbstractAsyncContextManager[Server]]]


def answerer_of(arguments: argparse.Namespace, local: tuple[OptionGroup, ...]) -> Answerer:
    """local: options of models in this process. UserError for a model that cannot be found, or options that would have
    no effect."""
    options = read_options(RemoteOptions, arguments)
    if options.base_url is not None:
        _refuse(arguments, local, "has no effect with --base-url: the server decides it")
        return _other_server(options, arguments.model)
    _refuse(arguments, (OptionGroup(RemoteOptions, ""),), "belongs to --base-url, which is missing")
    return _own_models(arguments)


def _refuse(arguments: argparse.Namespace, groups: tuple[OptionGroup, ...], why: str) -> None:
    given = {*vars(arguments), *stated_in(arguments)}
    for option in (option for group in groups for option in group.options):
        if option.name in given:
            raise UserError(f"{option.flags[0]} {why}", code="bad_option", param=option.name)


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


def _own_models(arguments: argparse.Namespace) -> Answerer:
    from siglane.engine.child import EngineSpec
    from siglane.server.job import job_of
    from siglane.server.launch import serving
    from siglane.server.local import LocalServer
    from siglane.weights.demo import FOLDERS, demo_folder

    config, model = read_options(ServerConfig, arguments), arguments.model
    if model in FOLDERS:
        config = dataclasses.replace(config, served_model_name=config.served_model_name or model)
        model = str(demo_folder() / FOLDERS[model])
    limits, named = read_options(ImageBudget, arguments), dataclasses.asdict(read_options(ModelOptions, arguments))
    spec = EngineSpec(model, read_options(EngineConfig, arguments), tagger=config.tagger, **named)

    @contextmanager
    def server() -> Iterator[AbstractAsyncContextManager[Server]]:
        with serving(config, spec, limits, RESTARTS) as served:
            served.engine.wait_ready()
            yield nullcontext(LocalServer(served, spec.config.max_running))

    return Answerer(job_of(config, spec, limits, spec.open()), server)
