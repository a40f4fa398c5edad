"""`siglane tag`: which of many labels fit pictures, by SigLIP's zero-shot scores."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from siglane.batch.pictures import expand
from siglane.batch.rows import RowFile
from siglane.cli.common import (
    IMAGES,
    MODEL,
    MODEL_ARGUMENT,
    Argument,
    CommonOptions,
    ModelOptions,
    emit_json,
    emit_line,
)
from siglane.errors import ConfigError
from siglane.settings.flags import OptionGroup, read_options, stated_in
from siglane.settings.media import DecodeOptions
from siglane.settings.options import CommandOptions, at_least, options_of
from siglane.settings.tagging import TEMPLATES, TagSettings, read_settings

FROM_SETTINGS = "-"
# MODEL and --threshold stand for the settings that have no flag of their own name
SETTINGS = ("batch_size", "attention", "dtype", "quantization", "device", "max_tags", "max_num_patches")


@dataclass(frozen=True, slots=True, kw_only=True)
class TagOptions(CommandOptions):
    COMMAND = "tag"

    labels: Path = field(metadata={"help": "a text file with one label per line"})
    template: tuple[str, ...] = field(
        default=TEMPLATES, metadata={"help": "texts around a label; the mean of their embeddings is used"}
    )
    threshold: float | None = field(
        default=None, metadata={"help": "tags below it are left out; 0.01 where settings do not say otherwise"}
    )
    top_k: int | None = field(default=None, metadata={"help": "so many tags per picture, whatever their confidence"})
    output: Path | None = field(
        default=None,
        metadata={"help": "JSON Lines, written as it goes; pictures already in it are skipped", "short": "-o"},
    )
    json: bool = field(default=False, metadata={"help": "print one JSON list"})
    cache: Path | None = field(default=None, metadata={"help": "folder of label matrices; ~/.cache/siglane/labels"})

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be between 0 and 1, got {self.threshold}")
        if self.top_k is not None:
            at_least("top_k", self.top_k, 1)


ARGUMENTS = (MODEL_ARGUMENT, Argument("images", "IMAGE", "pictures, folders of pictures, patterns or URLs", nargs="+"))
OPTIONS = (OptionGroup(TagOptions, "tag"), OptionGroup(TagSettings, "tagger", only=SETTINGS), MODEL, IMAGES)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(TagOptions, arguments)
    settings = _settings(arguments, options)
    pictures = list(dict.fromkeys(name for given in arguments.images for name in expand(given)))
    if options.output is None:
        return _emit(_rows(pictures, arguments, options, settings), None, options, out)
    with RowFile(options.output, "image") as file:
        waiting = [name for name in pictures if name not in file.known]
        if len(waiting) < len(pictures):
            print(f"siglane: {len(pictures) - len(waiting)} pictures are already in {file.path}", file=sys.stderr)
        return _emit(_rows(waiting, arguments, options, settings), file, options, out)


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


def _rows(
    pictures: Sequence[str], arguments: argparse.Namespace, options: TagOptions, settings: TagSettings
) -> Iterator[dict[str, Any]]:
    """One row per picture, as they come; without pictures no model is loaded."""
    if not pictures:
        return
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
        pictures,
        labels,
        threshold=settings.confidence_threshold,
        max_tags=settings.max_tags,
        top_k=options.top_k,
    )
    quiet = len(pictures) == 1 or not sys.stderr.isatty()
    for name, tagged in zip(pictures, tqdm(found, total=len(pictures), unit="image", disable=quiet), strict=True):
        yield {"image": name} | tagged.as_json()


def _emit(rows: Iterator[dict[str, Any]], file: RowFile | None, options: TagOptions, out: TextIO) -> int:
    """Every row as soon as it is known, but for the one JSON list. 1 when no picture could be read."""
    kept: list[dict[str, Any]] = []
    count = failed = 0
    for row in rows:
        count, failed = count + 1, failed + ("error" in row)
        if file is not None:
            file.append(row)
        elif not options.json:
            emit_line(_line(row), out)
            out.flush()
        if options.json:
            kept.append(row)
    if options.json:
        emit_json(kept, out)
    elif file is not None:
        emit_line(f"{file.path}: {count - failed} pictures tagged, {failed} unreadable", out)
    return 1 if count and failed == count else 0


def _line(row: dict[str, Any]) -> str:
    tags = ", ".join(f"{tag['label']} {tag['confidence']:.3f}" for tag in row["tags"])
    return f"{row['image']}: {'error: ' + row['error'] if 'error' in row else tags or 'no tags'}"
