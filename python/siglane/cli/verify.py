"""`siglane verify`: compares a checkpoint, stage by stage, with its reference. Exit code 1 names the first stage that
diverges."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from siglane.cli.common import MODEL, MODEL_ARGUMENT, ModelOptions, checkpoint_of
from siglane.cli.output import check_writable, emit_json, writing
from siglane.settings.engine import Quantization
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.options import CommandOptions, option

if TYPE_CHECKING:
    from siglane.verify import Comparison, Report


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions(CommandOptions):
    COMMAND = "verify"

    images: tuple[str, ...] = option((), "pictures to compare on: paths or URLs")
    random: int | None = option(None, "draw that many pictures of awkward shapes; 3 when no images are given")
    threshold: float | None = option(
        None,
        "every row's cosine with the reference must be above it; 0.99 when not given, with fewer bits each "
        "kind of stage then has its own",
    )
    reference: str = option(
        "transformers",
        "transformers (its modules with this checkpoint's tensors), the folder of another checkpoint for "
        "those modules (an original against its copy), or golden values, FILE.safetensors",
    )
    save_golden: Path | None = option(None, "keep the reference's values and the pictures in this safetensors file")
    prompt: str | None = option(None, "what a language model is asked about the pictures")
    steps: int | None = option(None, "greedy tokens to compare; 8 when it is not given")
    device: str = option("cpu", "auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] = option("float32", "of both sides: float32, bfloat16 or float16")
    quantization: Quantization = option("none", "bits that siglane's side keeps weights of linear layers in")
    json: bool = option(False, "print the numbers as one JSON object")
    report: Path | None = option(None, "write an HTML page with plots and pictures")


ARGUMENTS = (MODEL_ARGUMENT,)
OPTIONS = (OptionGroup(VerifyOptions, "verify"), MODEL)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(VerifyOptions, arguments)
    for path in (options.report, options.save_golden):
        if path is not None:
            check_writable(path)
    checkpoint_of(arguments)

    from siglane.verify import report as pages
    from siglane.verify import verify

    report = verify(
        arguments.model,
        options.images or None,
        random=options.random,
        threshold=options.threshold,
        reference=options.reference,
        prompt=options.prompt,
        steps=options.steps,
        device=options.device,
        dtype=options.dtype,
        quantization=options.quantization,
        **asdict(read_options(ModelOptions, arguments)),
        save=options.save_golden,
    )
    if options.report is not None:
        with writing(options.report):
            options.report.write_text(pages.html(report), encoding="utf-8")
    if options.json:
        emit_json(report.to_dict(), out)
    else:
        out.writelines(line + "\n" for line in _table(report))
        out.write(f"{'ok' if report.ok else 'NOT OK'}: {pages.verdict(report)}\n")
    return 0 if report.ok else 1


def _table(report: Report) -> list[str]:
    from siglane.verify.stages import summary

    rows = [summary(cases) for _, cases in report.stages()]
    few = report.quantization is not None
    head = f"{'stage':<16} {'shape':>17} {'max abs error':>13} {'mean cosine':>12} {'min cosine':>12}"
    head += f" {'mean above':>10} {'min above':>10}" if few else ""
    return [f"{head}  ok", *(_line(one, few) for one in rows)]


def _line(one: Comparison, few: bool) -> str:
    from siglane.verify.report import number, shape

    numbers = f"{number(one.max_abs_error, '.2e'):>13} {number(one.mean_cosine, '.8f'):>12}"
    numbers += f" {number(one.min_cosine, '.8f'):>12}"
    if few:
        numbers += f" {number(one.mean_threshold, 'g'):>10} {number(one.min_threshold, 'g'):>10}"
    note = f"  {one.note}" if one.note and one.stage != "packing" else ""
    return f"{one.stage:<16} {shape(one):>17} {numbers}  {'yes' if one.ok else 'NO'}{note}"
