"""`siglane embed`: vectors of pictures and texts by a SigLIP with both towers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from siglane.batch.form import Answer, PlainForm, failed
from siglane.batch.row import BadRow, Row
from siglane.cli.common import IMAGES, MODEL, MODEL_ARGUMENT, Argument, ModelOptions
from siglane.cli.output import check_writable, emit_json, emit_line, write_tensors
from siglane.cli.picture_rows import job_of, open_pictures, refuse_without_rows, write_in_order
from siglane.cli.rows import RowOptions, Task, is_table, write_rows
from siglane.errors import UserError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.media import DecodeOptions
from siglane.settings.options import option
from siglane.settings.tagging import TagSettings

if TYPE_CHECKING:
    import torch

    from siglane.batch.output import Output
    from siglane.cli.batch_report import Report
    from siglane.tagging.tagger import Tagger

SETTINGS = ("batch_size", "attention", "dtype", "quantization", "device", "max_num_patches")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedOptions(RowOptions):
    COMMAND = "embed"

    text: tuple[str, ...] = option((), "texts, embedded as they are")
    output: Path | None = option(
        None,
        "a safetensors file: images [I, D] and texts [T, D], float32; or rows of pictures, JSON Lines "
        "(.jsonl), written as it goes and continued by the same command, or a table (.parquet), which is made of "
        "these when they are complete",
        short="-o",
    )
    json: bool = option(False, "print the vectors as one JSON list; of rows the summary as one object")

    def __post_init__(self) -> None:
        RowOptions.__post_init__(self)
        if self.output is None and not self.json:
            raise UserError("nowhere to put the vectors; give --output or --json", code="bad_option")
        if self.as_rows and self.text:
            message = "rows hold pictures alone; leave --text out, or name a .safetensors file"
            raise UserError(message, code="bad_option")

    @property
    def as_rows(self) -> bool:
        return self.output is not None and (self.output.suffix.lower() == ".jsonl" or is_table(self.output))


ARGUMENTS = (MODEL_ARGUMENT, Argument("images", "IMAGE", "pictures, folders of pictures, patterns or URLs", nargs="*"))
OPTIONS = (
    OptionGroup(EmbedOptions, "embed"),
    OptionGroup(TagSettings, "model of both towers", only=SETTINGS),
    MODEL,
    IMAGES,
)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options, settings = read_options(EmbedOptions, arguments), read_options(TagSettings, arguments)
    if not (arguments.images or options.text):
        raise UserError("there is nothing to embed; name pictures, or give --text", code="bad_option")
    if options.output is not None:
        check_writable(options.output)
    if not options.as_rows:
        refuse_without_rows(options)
        return _write_matrix(arguments, options, settings, out)
    assert options.output is not None
    source, tables, form = open_pictures(arguments.images, options, options.output, "embedding")
    task = Task(
        output=options.output, options=options, source=source, tables=tables, form=form, as_json=options.json,
        job=job_of(arguments, settings),
    )  # fmt: skip

    def answer(rows: Iterator[Row | BadRow], output: Output, report: Report) -> None:
        write_in_order(rows, lambda asked: _answers(asked, _tagger(arguments, settings)), output, report)

    return write_rows(task, answer, out)


def _write_matrix(arguments: argparse.Namespace, options: EmbedOptions, settings: TagSettings, out: TextIO) -> int:
    rows: list[Row | BadRow] = []
    form = PlainForm("image", "embedding")
    if arguments.images:
        source, _, form = open_pictures(arguments.images, options, options.output, "embedding", once=False)
        rows = list(options.chosen(source))
    tagger = _tagger(arguments, settings)
    texts, pictures = tagger.embed_texts(options.text), _vectors(rows, tagger)
    errors = [one for one in pictures if isinstance(one, UserError)]
    if errors and (options.output is not None or len(errors) == len(rows) + len(texts)):
        raise errors[0]  # a matrix has a row for each, or is not written
    if options.output is not None:
        import torch

        vectors = [one for one in pictures if not isinstance(one, UserError)]
        write_tensors(
            ({"images": torch.stack(vectors)} if vectors else {}) | ({"texts": texts} if len(texts) else {}),
            options.output,
        )
    if options.json:
        lines = [
            {form.key: row.custom_id or str(row.number), **_shown(one)} for row, one in zip(rows, pictures, strict=True)
        ]
        lines += [{"text": text, **_shown(one)} for text, one in zip(options.text, texts, strict=True)]
        emit_json(lines, out)
    else:
        emit_line(f"{options.output}: {len(rows) + len(options.text)} vectors of {texts.shape[1]}", out)
    return 0


def _tagger(arguments: argparse.Namespace, settings: TagSettings) -> Tagger:
    from siglane.tagging.tagger import Tagger

    return Tagger.from_settings(
        settings, **asdict(read_options(ModelOptions, arguments)), decode=read_options(DecodeOptions, arguments).local
    )


def _vectors(rows: Sequence[Row | BadRow], tagger: Tagger) -> list[torch.Tensor | UserError]:
    found = tagger.stream_embeddings(row.pictures[0] for row in rows if isinstance(row, Row))
    return [next(found) if isinstance(row, Row) else UserError(row.message, code=row.code) for row in rows]


def _shown(found: torch.Tensor | UserError) -> dict[str, Any]:
    return {"error": found.message} if isinstance(found, UserError) else {"embedding": found.tolist()}


def _answers(rows: Iterator[Row], tagger: Tagger) -> Iterator[Answer]:
    """Of each row, in order."""
    for found in tagger.stream_embeddings(row.pictures[0] for row in rows):
        if isinstance(found, UserError):
            yield failed(400, found.code, found.message)
        else:
            yield Answer(200, {"embedding": found.tolist()})
