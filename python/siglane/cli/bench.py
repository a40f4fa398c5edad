"""`siglane bench`: load on any OpenAI-compatible server, and how long its answers take."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from typing import Any, TextIO

from siglane.cli.bench_options import BenchOptions
from siglane.cli.common import Argument
from siglane.cli.output import check_writable, emit_json, emit_line, writing
from siglane.errors import SiglaneError
from siglane.settings.flags import OptionGroup, read_options

ARGUMENTS = (Argument("model", "MODEL", "the server's name of the model; none: the first it names", "?"),)
OPTIONS = (OptionGroup(BenchOptions, "bench"),)


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(BenchOptions, arguments)
    for path in (options.output, options.plot):
        if path is not None:
            check_writable(path)

    from siglane.cli.bench_load import measure
    from siglane.cli.bench_report import draw, lines, summary

    model, taken = asyncio.run(measure(options, arguments.model))
    failed = [one for one in taken.requests if one.error is not None]
    if len(failed) == len(taken.requests):
        raise SiglaneError(f"no request was answered: {failed[0].error}")
    found: dict[str, Any] = {"model": model, "settings": _settings(options), **summary(taken)}
    if options.output is not None:
        rows = [dataclasses.asdict(one) for one in taken.requests]
        with writing(options.output), options.output.open("w", encoding="utf-8") as file:
            emit_json({**found, "requests": rows}, file)
    if options.plot is not None and not draw(taken, options.plot):
        print("siglane: no plot: drawing needs matplotlib (pip install matplotlib)", file=sys.stderr)
    if options.json:
        emit_json(found, out)
    else:
        for line in lines(found):
            emit_line(line, out)
    return 0


def _settings(options: BenchOptions) -> dict[str, Any]:
    """What the numbers depend on, and no key."""
    left_out = ("api_key", "output", "plot", "json")
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in left_out}
