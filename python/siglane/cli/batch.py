"""`siglane batch`: many requests from a file, or one question about many pictures, to a file."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from siglane.cli.batch_input import BatchCommand, InputOptions, open_input
from siglane.cli.batch_report import Report
from siglane.cli.batch_servers import RAY, REMOTE, RemoteOptions, answerer_of
from siglane.cli.common import MODEL, MODEL_ARGUMENT
from siglane.cli.rows import RowOptions, Task, is_table, write_rows
from siglane.errors import EngineError, UserError
from siglane.settings.engine import EngineConfig
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import MediaConfig
from siglane.settings.options import described, option
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import ImageBudget

if TYPE_CHECKING:
    from siglane.batch.output import Output
    from siglane.batch.pool import Server
    from siglane.batch.row import BadRow, Row

# of the server's options those that a batch has a use for
SERVER = (
    "served_model_name", "model_aliases", "tagger", "sampling_defaults", "default_temperature", "max_inflight_bytes",
    "text_cache_bytes", "patch_cache_bytes", "fetch_threads", "decode_threads",
)  # fmt: skip
JOB = ("order", "seed")
QUESTION = ("prompt", "body")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions(RowOptions, BatchCommand):
    output: Path = field(
        metadata=described(
            "answers, as OpenAI gives them (.jsonl), with errors and a manifest beside it; or a table "
            "(.parquet), which is made of these when they are complete",
            short="-o",
        )
    )
    order: Literal["input", "done"] = option("input", "of the answers in the output")
    seed: int = option(0, "with the custom_id, the seed of rows that name none")
    window: int = option(1024, "rows read ahead, among which those about equal pictures are asked together")
    json: bool = option(False, "print the summary as one JSON object")

    def __post_init__(self) -> None:
        RowOptions.__post_init__(self)
        if self.window < 1:
            raise UserError(f"--window must be at least 1, got {self.window}", code="bad_option")


ARGUMENTS = (MODEL_ARGUMENT,)
LOCAL = (
    MODEL,
    OptionGroup(ServerConfig, "answers", only=SERVER),
    OptionGroup(MediaConfig, "images and videos of requests"),
    OptionGroup(ImageBudget, "budget of every image; requests may ask for less"),
    OptionGroup(EngineConfig, "engine"),
)
OPTIONS = (
    OptionGroup(InputOptions, "input"),
    OptionGroup(ServerConfig, "requests", only=("max_body_bytes",)),
    OptionGroup(BatchOptions, "batch"),
    REMOTE,
    RAY,
    *LOCAL,
)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options, asked = read_options(BatchOptions, arguments), read_options(InputOptions, arguments)
    try:
        import siglane.batch.run  # noqa: F401

        answerer = answerer_of(arguments, LOCAL)
    except ImportError as error:
        message = f"a batch needs more packages ({error}); pip install 'siglane[server]'"
        raise UserError(message, code="missing_extra") from error
    remote = read_options(RemoteOptions, arguments).base_url is not None
    max_line = read_options(ServerConfig, arguments).max_body_bytes
    source, tables = open_input(asked, options, max_line, remote=remote, as_table=is_table(options.output))
    job = {**answerer.made_from, **{name: getattr(options, name) for name in JOB}}
    job |= {name: getattr(asked, name) for name in QUESTION}
    task = Task(output=options.output, options=options, source=source, tables=tables, job=job, as_json=options.json)

    def answer(rows: Iterator[Row | BadRow], output: Output, report: Report) -> None:
        with answerer.serving() as server, report:
            asyncio.run(_answer(rows, server, output, options, report))

    return write_rows(task, answer, out)


async def _answer(
    rows: Iterator[Row | BadRow],
    connection: AbstractAsyncContextManager[Server],
    output: Output,
    options: BatchOptions,
    report: Report,
) -> None:
    from siglane.batch.run import Plan, run_batch

    stop = asyncio.Event()
    plan = Plan(order=options.order, window=options.window, seed=options.seed)
    try:
        async with connection as server:
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await run_batch(rows, server, output, plan, stop=stop, written=report.note)
    except EngineError as error:  # it is down for good
        report.stopped = f"{error}; the same command continues"
