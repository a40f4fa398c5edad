"""`siglane tag`: which of many labels fit pictures, by SigLIP's zero-shot scores."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from siglane.batch.form import Answer, PlainForm, failed
from siglane.batch.stream import in_order
from siglane.cli.common import IMAGES, MODEL, MODEL_ARGUMENT, Argument, CommonOptions, ModelOptions
from siglane.cli.output import emit_json, emit_line
from siglane.cli.picture_rows import job_of, line_of, open_pictures, refuse_without_rows, write_in_order
from siglane.cli.rows import RowOptions, Task, write_rows
from siglane.errors import ConfigError
from siglane.settings.flags import OptionGroup, read_options, stated_in
from siglane.settings.media import DecodeOptions
from siglane.settings.options import at_least, described, option, options_of
from siglane.settings.tagging import TEMPLATES, TagSettings, read_settings

if TYPE_CHECKING:
    from siglane.batch.output import Output
    from siglane.batch.row import BadRow, Row
    from siglane.cli.batch_report import Report

FROM_SETTINGS = "-"
# MODEL and --threshold stand for the settings that have no flag of their own name
SETTINGS = ("batch_size", "attention", "dtype", "quantization", "device", "max_tags", "max_num_patches")


@dataclass(frozen=True, slots=True, kw_only=True)
class TagOptions(RowOptions):
    COMMAND = "tag"

    labels: Path = field(metadata=described("a text file with one label per line"))
    template: tuple[str, ...] = option(TEMPLATES, "texts around a label; the mean of their embeddings is used")
    threshold: float | None = option(None, "tags below it are left out; 0.01 where settings do not say otherwise")
    top_k: int | None = option(None, "so many tags per picture, whatever their confidence")
    output: Path | None = option(
        None,
        "JSON Lines (.jsonl), written as it goes and continued by the same command; or a table (.parquet), "
        "which is made of these when they are complete",
        short="-o",
    )
    json: bool = option(False, "print one JSON list; with --output the summary as one object")
    cache: Path | None = option(None, "folder of label matrices; ~/.cache/siglane/labels")

    def __post_init__(self) -> None:
        RowOptions.__post_init__(self)
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be between 0 and 1, got {self.threshold}")
        if self.top_k is not None:
            at_least("top_k", self.top_k, 1)


ARGUMENTS = (MODEL_ARGUMENT, Argument("images", "IMAGE", "pictures, folders of pictures, patterns or URLs", nargs="+"))
OPTIONS = (OptionGroup(TagOptions, "tag"), OptionGroup(TagSettings, "tagger", only=SETTINGS), MODEL, IMAGES)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(TagOptions, arguments)
    settings = _settings(arguments, options)
    source, tables, form = open_pictures(arguments.images, options, options.output, "tags")
    if options.output is None:
        refuse_without_rows(options)
        count = None if options.limit or options.shard else source.count
        found = in_order(options.chosen(source), lambda rows: _answers(rows, arguments, options, settings, count))
        return _print(found, form, options, out)
    task = Task(
        output=options.output, options=options, source=source, tables=tables, form=form, as_json=options.json,
        job=_job(arguments, options, settings),
    )  # fmt: skip

    def answer(rows: Iterator[Row | BadRow], output: Output, report: Report) -> None:
        write_in_order(rows, lambda asked: _answers(asked, arguments, options, settings), output, report)

    return write_rows(task, answer, out)


def _job(arguments: argparse.Namespace, options: TagOptions, settings: TagSettings) -> dict[str, Any]:
    from siglane.tagging.labels import read_labels

    labels = json.dumps(read_labels(options.labels))
    return {
        **job_of(arguments, settings),
        "labels": hashlib.sha256(labels.encode()).hexdigest(),
        "template": options.template,
        "threshold": settings.confidence_threshold,
        "max_tags": settings.max_tags,
        "top_k": options.top_k,
    }


def _settings(arguments: argparse.Namespace, options: TagOptions) -> TagSettings:
    """The file of `--config` may hold the tagger's section beside the command's."""
    table = {name: value for name, value in stated_in(arguments).items() if name in SETTINGS}
    return read_settings(read_options(CommonOptions, arguments).config, _flags(arguments, options), table)


def _flags(arguments: argparse.Namespace, options: TagOptions) -> dict[str, Any]:
    given = vars(arguments)
    flags = {option.name: given[option.name] for option in options_of(TagSettings) if option.name in given}
    if flags["model"] == FROM_SETTINGS:
        del flags["model"]
    return flags if options.threshold is None else flags | {"confidence_threshold": options.threshold}


def _answers(
    rows: Iterator[Row],
    arguments: argparse.Namespace,
    options: TagOptions,
    settings: TagSettings,
    count: int | None = 1,
) -> Iterator[Answer]:
    """Of each row, in order. count: of the rows, where progress is to be shown."""
    from tqdm import tqdm

    from siglane.tagging.labels import read_labels
    from siglane.tagging.tagger import Tagger

    labels = read_labels(options.labels)
    tagger = Tagger.from_settings(
        settings,
        **asdict(read_options(ModelOptions, arguments)),
        templates=options.template,
        cache=options.cache,
        decode=read_options(DecodeOptions, arguments).local,
    )
    print(f"siglane: {tagger.summary}", file=sys.stderr)
    found = tagger.stream(
        (row.pictures[0] for row in rows),
        labels,
        threshold=settings.confidence_threshold,
        max_tags=settings.max_tags,
        top_k=options.top_k,
    )
    quiet = count == 1 or not sys.stderr.isatty()
    for tagged in tqdm(found, total=count, unit="image", disable=quiet):
        if tagged.error is None:
            yield Answer(200, tagged.as_json())
        else:
            yield failed(400, tagged.code or "failed", tagged.error)


def _print(
    found: Iterator[tuple[Row | BadRow, Answer | None]], form: PlainForm, options: TagOptions, out: TextIO
) -> int:
    """Every row as soon as it is known, but for the one JSON list. 1 when no picture could be read."""
    kept: list[dict[str, Any]] = []
    count = bad = 0
    for row, answer in found:
        line = line_of(row, answer, form)
        count, bad = count + 1, bad + ("error" in line)
        if options.json:
            kept.append(line if "error" not in line else {"tags": [], **line})
        else:
            emit_line(_line(line, form), out)
            out.flush()
    if options.json:
        emit_json(kept, out)
    return 1 if count and bad == count else 0


def _line(line: Mapping[str, Any], form: PlainForm) -> str:
    tags = ", ".join(f"{tag['label']} {tag['confidence']:.3f}" for tag in line.get("tags", ()))
    return f"{line[form.key]}: {'error: ' + line['error'] if 'error' in line else tags or 'no tags'}"
