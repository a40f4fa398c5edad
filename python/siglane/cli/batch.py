"""`siglane batch`: many requests from a file, or one question about many pictures, to a file."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import glob
import json
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from siglane.batch.rows import CannotWrite
from siglane.cli.batch_report import Report
from siglane.cli.common import MODEL, MODEL_ARGUMENT, ModelOptions
from siglane.errors import EngineError, UserError
from siglane.settings.engine import EngineConfig
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import MediaConfig
from siglane.settings.options import CommandOptions
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import ImageBudget

if TYPE_CHECKING:
    from siglane.batch.output import Output
    from siglane.batch.requests import BadRow, Row, Source
    from siglane.engine.child import EngineSpec
    from siglane.server.served import Served
    from siglane.weights.hub import Checkpoint

RESTARTS = 50  # of the engine in a few minutes: every row may kill it twice
SHARD = re.compile(r"([1-9]\d*)/([1-9]\d*)")
# of the server's options those that a batch has a use for
SERVER = (
    "served_model_name", "model_aliases", "tagger", "sampling_defaults", "default_temperature", "max_body_bytes",
    "max_inflight_bytes", "text_cache_bytes", "fetch_threads", "decode_threads",
)  # fmt: skip
JOB = ("prompt", "body", "order", "shard", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions(CommandOptions):
    COMMAND = "batch"

    input: str = field(
        metadata={"help": "OpenAI batch requests (.jsonl), or a folder or pattern of pictures", "short": "-i"}
    )
    output: Path = field(
        metadata={"help": "answers, as OpenAI gives them; errors and a manifest stand beside it", "short": "-o"}
    )
    prompt: str | None = field(default=None, metadata={"help": "what every picture is asked", "short": "-p"})
    body: str = field(
        default="{}", metadata={"help": "further fields of every picture's request: '{\"max_tokens\": 64}'"}
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

    def holds(self, number: int) -> bool:
        """Whether row `number`, from 1, is one of this shard's."""
        if self.shard is None:
            return True
        index, shards = map(int, self.shard.split("/"))
        return number % shards == index % shards


ARGUMENTS = (MODEL_ARGUMENT,)
OPTIONS = (
    OptionGroup(BatchOptions, "batch"),
    MODEL,
    OptionGroup(ServerConfig, "answers", only=SERVER),
    OptionGroup(MediaConfig, "images and videos of requests"),
    OptionGroup(ImageBudget, "budget of every image; requests may ask for less"),
    OptionGroup(EngineConfig, "engine"),
)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(BatchOptions, arguments)
    config, spec = _deployment(arguments)
    try:
        from siglane.batch.output import Output
        from siglane.server.launch import serving
    except ImportError as error:
        message = f"a batch needs more packages ({error}); pip install 'siglane[server]'"
        raise UserError(message, code="missing_extra") from error

    checkpoint = spec.open()
    source = _open_source(options, config)
    limits = read_options(ImageBudget, arguments)
    with Output(options.output, _job(options, config, spec, limits, source, checkpoint)) as output:
        report = Report(output, source, output.found)
        rows = (row for row in islice(source.rows, options.limit) if options.holds(row.number) and not output.has(row))
        first = next(rows, None)
        if first is None:  # nothing is left: no model is loaded
            return report.close(out, as_json=options.json)
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # while the model loads
        try:
            with serving(config, spec, limits, RESTARTS) as served, report:
                served.engine.wait_ready()
                asyncio.run(_answer(chain([first], rows), served, spec.config.max_running, output, options, report))
        except KeyboardInterrupt:
            report.stopped = "stopped by a signal; the same command continues"
        except CannotWrite as error:
            report.stopped = str(error)
        finally:
            signal.signal(signal.SIGTERM, before)
        return report.close(out, as_json=options.json)


async def _answer(
    rows: Iterator[Row | BadRow], served: Served, slots: int, output: Output, options: BatchOptions, report: Report
) -> None:
    from siglane.batch.run import Plan, Stopped, run_batch
    from siglane.server.local import LocalServer

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    plan = Plan(order=options.order, window=options.window, seed=options.seed, max_errors=options.max_errors)
    try:
        await run_batch(rows, LocalServer(served, slots), output, plan, stop=stop, written=report.note)
    except Stopped as error:
        report.stopped = str(error)
    except EngineError as error:  # it is down for good
        report.stopped = f"{error}; the same command continues"


def _deployment(arguments: argparse.Namespace) -> tuple[ServerConfig, EngineSpec]:
    from siglane.engine.child import EngineSpec
    from siglane.weights.demo import FOLDERS, demo_folder

    config, model = read_options(ServerConfig, arguments), arguments.model
    if model in FOLDERS:
        config = dataclasses.replace(config, served_model_name=config.served_model_name or model)
        model = str(demo_folder() / FOLDERS[model])
    named = dataclasses.asdict(read_options(ModelOptions, arguments))
    return config, EngineSpec(model, read_options(EngineConfig, arguments), tagger=config.tagger, **named)


def _open_source(options: BatchOptions, config: ServerConfig) -> Source:
    from siglane.batch.pictures import expand
    from siglane.batch.requests import ask_pictures, open_requests

    if options.prompt is None:
        if not Path(options.input).is_file():
            reason = "a folder or pattern of pictures needs a --prompt" if expandable(options.input) else "no such file"
            raise UserError(f"cannot read {options.input}: {reason}", code="bad_input")
        return open_requests(Path(options.input), config.max_body_bytes)
    try:
        fields = json.loads(options.body)
    except ValueError as error:
        raise UserError(f"--body is not JSON: {error}", code="bad_option") from error
    if not isinstance(fields, dict) or "messages" in fields:
        raise UserError("--body must be a JSON object without messages", code="bad_option")
    return ask_pictures(expand(options.input), options.prompt, fields)


def expandable(name: str) -> bool:
    return Path(name).is_dir() or glob.has_magic(name)


def _job(
    options: BatchOptions,
    config: ServerConfig,
    spec: EngineSpec,
    limits: ImageBudget,
    source: Source,
    checkpoint: Checkpoint,
) -> dict[str, Any]:
    """What the answers are made from, by the names that a user knows."""
    from siglane.server.job import job_of

    asked = {name: getattr(options, name) for name in JOB}
    return {"input": source.digest, **asked, **job_of(config, spec, limits, checkpoint)}
