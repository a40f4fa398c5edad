"""`siglane train`: a SigLIP on image-text pairs, from a model or from scratch."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from siglane.cli.common import Argument
from siglane.cli.output import emit_json, emit_line
from siglane.errors import UserError
from siglane.settings.flags import OptionGroup, read_options
from siglane.settings.options import CommandOptions, described, option
from siglane.settings.training import TrainConfig

if TYPE_CHECKING:
    from siglane.training.contrastive import Trainer
    from siglane.training.report import CaptionLosses, Skipped
    from siglane.weights.hub import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(CommandOptions):
    COMMAND = "train"

    out: Path = field(metadata=described("folder for model/, checkpoint.pt, log.jsonl and loss.png"))
    model: str | None = option(None, "folder or hub id of a SigLIP with both towers")
    revision: str | None = option(None, "branch, tag or commit of a hub id")
    adapter: str | None = option(None, "folder or hub id of a LoRA adapter (PEFT) to merge into the model first")
    from_scratch: Path | None = option(
        None, "config.json of a SigLIP with fresh weights; files beside it are used, or made where absent"
    )
    resume: bool = option(False, "go on from the checkpoint in the folder, if there is one")
    strict: bool = option(False, "stop at a pair that cannot be used instead of skipping it")
    store: Literal["float32", "bfloat16", "float16"] = option("float32", "dtype of the weights in model/")
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    minutes: float | None = option(None, "stop after this long; --resume continues")
    json: bool = option(False, "print one JSON document about the run")

    def __post_init__(self) -> None:
        if (self.model is None) == (self.from_scratch is None):
            raise UserError("give either --model or --from-scratch", code="bad_option")
        if self.adapter is not None and self.model is None:
            raise UserError("--adapter needs the --model that it belongs to", code="bad_option")


ARGUMENTS = (Argument("pairs", "PAIRS", "JSON Lines of image and caption, or a folder of WebDataset tars", type=Path),)
OPTIONS = (OptionGroup(RunOptions, "run"), OptionGroup(TrainConfig, "training"))


def run(arguments: argparse.Namespace, out: TextIO) -> int:
    options = read_options(RunOptions, arguments)
    source = _source(options)

    from siglane.nn.device import DTYPES, resolve_device
    from siglane.training.pairs import open_pairs
    from siglane.training.report import CaptionLosses, Skipped, caption_losses, say_losses
    from siglane.training.run import Share, join_ranks, leave_ranks, open_run, train

    config = read_options(TrainConfig, arguments)
    if config.fresh_text and options.from_scratch:
        raise UserError("--fresh-text needs a --model whose image tower stays", code="bad_option")
    device = join_ranks(resolve_device(options.device))
    pairs, bad = open_pairs(arguments.pairs)
    skipped = Skipped(options.strict)
    skipped.add(bad)
    trainer = open_run(source, pairs, options.out, config, device, resume=options.resume)
    first, losses = Share.of(trainer.group).rank == 0, CaptionLosses()
    if first:
        losses = caption_losses(((pair.name, pair.caption) for pair in pairs.pairs), trainer.two_tower.texts)
        say_losses(losses, trainer.two_tower.texts)
    minutes = math.inf if options.minutes is None else options.minutes
    train(trainer, pairs, options.out, skipped=skipped, store=DTYPES[options.store], minutes=minutes)
    leave_ranks()
    return _report(trainer, pairs.size + len(bad), skipped, losses, options, out) if first else 0


def _report(
    trainer: Trainer, rows: int, skipped: Skipped, losses: CaptionLosses, options: RunOptions, out: TextIO
) -> int:
    """The curve, and what became of every row. rows: of the source, those that were skipped included."""
    from siglane.training.curve import CURVE, draw_curve
    from siglane.training.pairs import drawn_pairs
    from siglane.training.run import LOG, MODEL

    model, config, size = options.out / MODEL, trainer.config, trainer.pairs.size
    if not draw_curve(options.out / LOG, options.out / CURVE):
        print(f"no {CURVE}: drawing needs matplotlib (pip install matplotlib)", file=sys.stderr)
    assert size is not None
    drawn = drawn_pairs(size, config.batch_size, config.seed, trainer.step * config.accumulate)
    used = rows - len(skipped.names)
    print(f"{used} pairs can be used, steps so far drew {drawn} of {size}; {skipped}", file=sys.stderr)
    if options.json:
        counts = {"step": trainer.step, "steps": trainer.steps, "skipped": len(skipped.names)}
        pairs = {"used": used, "drawn": drawn, "reasons": skipped.as_json(), "cut_captions": len(losses.cut)}
        emit_json({"model": str(model)} | counts | pairs, out)
    else:
        rest = "" if trainer.done else "; --resume continues"
        emit_line(f"{model}: step {trainer.step} of {trainer.steps}, {len(skipped.names)} pairs skipped{rest}", out)
    return 0


def _source(options: RunOptions) -> Checkpoint | Path:
    """Where the weights come from, found before the slow imports."""
    if options.from_scratch is not None:
        if not options.from_scratch.is_file():
            raise UserError(f"there is no file {options.from_scratch}; give a SigLIP's config.json", code="bad_option")
        return options.from_scratch
    from siglane.weights.demo import open_model

    assert options.model is not None
    return open_model(options.model, options.revision, adapter=options.adapter)
