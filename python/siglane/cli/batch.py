"""`siglane batch`: many requests from a file, or one question about many pictures, to a file."""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from siglane.batch.rows import CannotWrite
from siglane.cli.batch_input import InputOptions, open_input
from siglane.cli.batch_report import Report
from siglane.cli.batch_servers import RAY, REMOTE, Answerer, RemoteOptions, answerer_of
from siglane.cli.common import MODEL, MODEL_ARGUMENT
from siglane.errors import EngineError, UserError
from siglane.settings.engine import EngineConfig
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import MediaConfig
from siglane.settings.options import CommandOptions
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import ImageBudget

if TYPE_CHECKING:
    from siglane.batch.output import Output
    from siglane.batch.parquet import Tables
    from siglane.batch.pool import Server
    from siglane.batch.requests import BadRow, Row, Source

SHARD = re.compile(r"([1-9]\d*)/([1-9]\d*)")
# of the server's options those that a batch has a use for
SERVER = (
    "served_model_name", "model_aliases", "tagger", "sampling_defaults", "default_temperature", "max_inflight_bytes",
    "text_cache_bytes", "patch_cache_bytes", "fetch_threads", "decode_threads",
)  # fmt: skip
JOB = ("order", "shard", "seed")
QUESTION = ("prompt", "body", "image_column", "id_column")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions(CommandOptions):
    COMMAND = "batch"

    output: Path = field(
        metadata={
            "help": "answers, as OpenAI gives them (.jsonl), with errors and a manifest beside it; or a table "
            "(.parquet), which is made of these when they are complete",
            "short": "-o",
        }
    )
    order: Literal["input", "done"] = field(default="input", metadata={"help": "of the answers in the output"})
    limit: int | None = field(default=None, metadata={"help": "only the first so many rows of the input"})
    shard: str | None = field(default=None, metadata={"help": "I/N: every N-th row, from the I-th on"})
    max_errors: int | None = field(default=None, metadata={"help": "stop when more rows fail; none: never"})
    seed: int = field(default=0, metadata={"help": "with the custom_id, the seed of rows that name none"})
    window: int = field(
        default=1024, metadata={"help": "rows read ahead, among which those about equal pictures are asked together"}
    )
    json: bool = field(default=False, metadata={"help": "print the summary as one JSON object"})

    def __post_init__(self) -> None:
        if self.shard is not None:
            found = SHARD.fullmatch(self.shard)
            if found is None or int(found[1]) > int(found[2]):
                raise UserError(f"--shard {self.shard!r} is not I/N with I from 1 to N", code="bad_option")
        for name in ("limit", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} must be at least 1, got {value}", code="bad_option")
        if self.max_errors is not None and self.max_errors < 0:
            raise UserError(f"--max-errors must not be negative, got {self.max_errors}", code="bad_option")

    @property
    def as_table(self) -> bool:
        return self.output.suffix.lower() == ".parquet"

    @property
    def lines(self) -> Path:
        """Where the answers stand as JSON Lines."""
        if not self.as_table:
            return self.output
        from siglane.batch.parquet_output import journal_of

        return journal_of(self.output)

    def holds(self, number: int) -> bool:
        """Whether row `number`, from 1, is one of this shard's."""
        if self.shard is None:
            return True
        index, shards = map(int, self.shard.split("/"))
        return number % shards == index % shards


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
        from siglane.batch.output import Output

        answerer = answerer_of(arguments, LOCAL)
    except ImportError as error:
        message = f"a batch needs more packages ({error}); pip install 'siglane[server]'"
        raise UserError(message, code="missing_extra") from error
    remote = read_options(RemoteOptions, arguments).base_url is not None
    max_line = read_options(ServerConfig, arguments).max_body_bytes
    source, tables = open_input(asked, max_line, remote=remote, as_table=options.as_table)
    job = {"input": source.digest, **answerer.made_from, **{name: getattr(options, name) for name in JOB}}
    job |= {name: getattr(asked, name) for name in QUESTION}
    with Output(options.lines, job) as output:
        report = Report(output, source, output.found)
        rows = (row for row in islice(source.rows, options.limit) if options.holds(row.number) and not output.has(row))
        first = next(rows, None)
        if first is not None:  # else no model is loaded
            _run(answerer, chain([first], rows), output, options, report)
        if options.as_table and report.stopped is None:
            _write_table(options, output, source, tables, report)
        return report.close(out, as_json=options.json)


def _run(
    answerer: Answerer, rows: Iterator[Row | BadRow], output: Output, options: BatchOptions, report: Report
) -> None:
    """Answers the rows; notes what stopped it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # while the model loads
    try:
        with answerer.serving() as server, report:
            asyncio.run(_answer(rows, server, output, options, report))
    except KeyboardInterrupt:
        report.stopped = "stopped by a signal; the same command continues"
    except CannotWrite as error:
        report.stopped = str(error)
    finally:
        signal.signal(signal.SIGTERM, before)


def _write_table(options: BatchOptions, output: Output, source: Source, tables: Tables | None, report: Report) -> None:
    from siglane.batch.parquet_output import Journal, write_table

    journal = Journal(output.path, output.errors_path)
    try:
        report.table_rows = write_table(options.output, journal, source, tables, options.holds, options.limit)
    except CannotWrite as error:
        report.stopped = str(error)


async def _answer(
    rows: Iterator[Row | BadRow],
    connection: AbstractAsyncContextManager[Server],
    output: Output,
    options: BatchOptions,
    report: Report,
) -> None:
    from siglane.batch.run import Plan, Stopped, run_batch

    stop = asyncio.Event()
    plan = Plan(order=options.order, window=options.window, seed=options.seed, max_errors=options.max_errors)
    try:
        async with connection as server:
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await run_batch(rows, server, output, plan, stop=stop, written=report.note)
    except Stopped as error:
        report.stopped = str(error)
    except EngineError as error:  # it is down for good
        report.stopped = f"{error}; the same command continues"
