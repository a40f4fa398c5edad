"""`siglane COMMAND ...`: finds the command, turns every error into one line and an exit code.

Exit codes: 0 done, 1 something failed, 2 the caller's mistake, 3 a batch that was stopped and can be continued, 130
interrupted. Results go to stdout, everything else to stderr. Each command is a module with `ARGUMENTS`, `OPTIONS` and
`run(arguments, out) -> exit code`; only the one asked for is imported, so that `siglane --help` needs no torch.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import logging
import os
import select
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import TextIO

from siglane.cli.common import COMMON, CommonOptions
from siglane.cli.output import emit_line
from siglane.errors import SiglaneError, UserError
from siglane.settings.flags import OptionGroup, Parser, add_options, named, read_file, read_options

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk, a quota or a limit says
COMMANDS = {
    "generate": "ask a model one question about pictures",
    "serve": "serve a model over the OpenAI API",
    "chat": "talk with a model about pictures, in the terminal",
    "batch": "answer many requests, or one question about many pictures, from a file to a file",
    "encode": "write the vision features of pictures to a file",
    "embed": "write the vectors of pictures and texts",
    "tag": "say which of many labels fit pictures",
    "tokens": "count the prompt tokens of pictures from their headers",
    "verify": "compare a model, stage by stage, with its reference implementation",
    "quantize": "write a model's folder in 8 or 4 bits, which loads in seconds",
    "train": "train a SigLIP on image-text pairs",
    "look": "draw what the model sees of a picture",
    "bench": "measure any OpenAI-compatible server under load",
    "doctor": "check this machine",
    "demo": "try the model that ships with siglane, through a real server",
}
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    parsed, groups = argparse.Namespace(), ()
    try:
        out = _standard_output()
    except SiglaneError as error:
        return _report(error, debug)
    try:
        parsed = _parse(words)
        common = read_options(CommonOptions, parsed)
        debug = common.debug
        _configure_logging(debug)
        command = importlib.import_module(f"siglane.cli.{parsed.command}")
        groups = command.OPTIONS
        read_file(parsed, common.config, groups)
        with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints must not mix with the result
            code: int = command.run(parsed, out)
        out.flush()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone(out):
            return 1
        return _report(named(error, parsed, groups) if isinstance(error, UserError) else error, debug)


def _standard_output() -> TextIO:
    """stdout, which prints any file name whatever its encoding. UserError when it is closed."""
    if sys.stderr is None:  # `2>&-`; print would take stdout in its place
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise UserError("stdout is closed; send it to a file, or to /dev/null", code="cannot_write")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return sys.stdout


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="siglane", description="SigLIP vision for language models.")
    parser.add_argument("--version", action="version", version=f"siglane {version('siglane')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    asked = next((word for word in words if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == asked:
            module = importlib.import_module(f"siglane.cli.{name}")
            for argument in module.ARGUMENTS:
                command.add_argument(
                    argument.name,
                    metavar=argument.metavar,
                    help=argument.help,
                    nargs=argument.nargs,
                    type=argument.type,
                )
            add_options(command, [*module.OPTIONS, *COMMON])
    parsed, unknown = parser.parse_known_args(words)
    if unknown:
        commands.choices[parsed.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return parsed


def command_options() -> dict[str, tuple[OptionGroup, ...]]:
    """The options of every command, by its name; imports them all."""
    return {name: importlib.import_module(f"siglane.cli.{name}").OPTIONS for name in COMMANDS}


def _configure_logging(debug: bool) -> None:
    """Warnings to stderr, one line each; with --debug everything of ours, tracebacks too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("siglane: %(message)s"))
    if not debug:
        handler.addFilter(_without_traceback)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("siglane").setLevel(logging.DEBUG if debug else logging.WARNING)


def _without_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = record.exc_text = None
    return True


def _reader_is_gone(out: TextIO) -> bool:
    """Whether it is stdout that broke (`siglane tokens ... | head`); then nothing more is written to it."""
    watch = select.poll()
    watch.register(out, 0)  # errors are always reported
    if not watch.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    return True


def _report(error: Exception, debug: bool) -> int:
    """The one line about `error`, and the exit code it stands for."""
    message = str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        place = error.filename or "the output"
        message = f"{place} cannot be written: {error.strerror}; make room, or write somewhere else"
    elif not isinstance(error, SiglaneError):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
        message += "" if debug else " (this is a bug or a broken machine; --debug shows where)"
    emit_line(f"siglane: error: {' '.join(message.split())}", sys.stderr)
    if debug:
        traceback.print_exception(error)
    return error.exit_code if isinstance(error, SiglaneError) else 1


if __name__ == "__main__":
    sys.exit(main())
