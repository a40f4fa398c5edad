"""What `siglane doctor MODEL` finds: that a model's files belong together, and that each is what its SHA-256 says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from siglane.errors import WeightError
from siglane.families.model import check_codes, check_model, check_tower, model_files
from siglane.families.processor import load_processor
from siglane.families.registry import is_vision_only
from siglane.families.two_tower import check_two_tower, has_both_towers
from siglane.weights.checksum import SUMS, Stated, compare, digest_of, stated, stated_by_hub, write_sums
from siglane.weights.hub import Checkpoint
from siglane.weights.quantised import codes_format


class Finding(NamedTuple):
    name: str
    status: Literal["ok", "note", "broken"]
    detail: str


def examine(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Every weight file against its checksum, then names and shapes of all tensors against the configuration.

    A checksum that neither the folder nor the hub states is computed and added to SHA256SUMS: it tells of later damage,
    not of damage that is there already. UserError for files that cannot be used.
    """
    files = model_files(checkpoint)
    known = {file: stated(file, checkpoint.root) or stated_by_hub(file) for file in files}
    fresh: dict[Path, str] = {}
    for file in files:
        digest = digest_of(file)
        if (expected := known[file]) is None:
            fresh[file] = digest
        else:
            yield _compared(_name(file, checkpoint.root), file, expected, digest)
    yield from _written(checkpoint.root, fresh)
    unchecked = replace(checkpoint, verify=False)  # just done
    if has_both_towers(checkpoint):
        check_two_tower(unchecked)
    elif codes_format(checkpoint) is not None:
        check_codes(unchecked, load_processor(checkpoint).config)
    elif not is_vision_only(checkpoint):
        check_model(unchecked, load_processor(checkpoint).config)
    else:
        check_tower(unchecked)
    yield Finding("tensors", "ok", "names and shapes are the configuration's")


def _name(file: Path, root: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)


def _compared(name: str, file: Path, expected: Stated, digest: str) -> Finding:
    try:
        compare(file, expected, digest)
    except WeightError as error:
        return Finding(name, "broken", error.message)
    return Finding(name, "ok", f"SHA-256 {digest}, as {expected.by} says")


def _written(root: Path, fresh: dict[Path, str]) -> Iterator[Finding]:
    """Writes down the digests that nobody knew, of files below `root`."""
    inside = {file: digest for file, digest in fresh.items() if file.is_relative_to(root)}
    try:
        if inside:
            write_sums(root, inside)
    except OSError as error:
        yield Finding(SUMS, "note", f"cannot be written in {root}: {error.strerror}; later damage will not be found")
        inside = {}
    for file, digest in fresh.items():
        place = f"written to {root / SUMS}" if file in inside else "which nobody wrote down"
        yield Finding(_name(file, root), "ok" if file in inside else "note", f"SHA-256 {digest}, {place}")
