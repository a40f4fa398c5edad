"""SHA-256 of weight files: where a folder or the hub's cache states them, comparing, and writing them down."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from siglane.errors import WeightError
from siglane.weights.hub import Checkpoint

logger = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
LISTS = (SUMS, "SHA256SUMS.txt", "sha256sums.txt", "sha256sum.txt", "checksums.sha256")
SIDECAR = ".sha256"
DIGEST = re.compile(r"[0-9a-f]{64}")
LINE = re.compile(r"([0-9a-fA-F]{64})(?:[ \t]+\*?(.+))?")  # coreutils' format
TAGGED = re.compile(r"SHA256 \((.+)\) = ([0-9a-fA-F]{64})")  # BSD's


@dataclass(frozen=True, slots=True)
class Stated:
    """A digest in lower-case hexadecimals, and the file or cache that states it."""

    digest: str
    by: str


def stated(file: Path, root: Path) -> Stated | None:
    """What the folder says of `file`: a file of its name with `.sha256` behind it, or a list beside it or in `root`.

    WeightError for a list that cannot be read.
    """
    sidecar = file.with_name(file.name + SIDECAR)
    if sidecar.is_file():
        for digest, name in _lines(sidecar):
            if name in ("", file.name):
                return Stated(digest, str(sidecar))
        raise WeightError(f"{sidecar} states no SHA-256 of {file.name}")
    for folder in dict.fromkeys((file.parent, root)):
        for listed in (folder / name for name in LISTS):
            if listed.is_file():
                for digest, name in _lines(listed):
                    if name and (folder / name).absolute() == file.absolute():
                        return Stated(digest, str(listed))
    return None


def stated_by_hub(file: Path) -> Stated | None:
    """The hub's cache links to files that are called by their SHA-256, where they came by LFS or Xet."""
    name = file.resolve().name
    if file.is_symlink() and DIGEST.fullmatch(name) and file.resolve().parent.name == "blobs":
        return Stated(name, "the hub")
    return None


def digest_of(file: Path) -> str:
    """WeightError when `file` cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise WeightError(f"{file} cannot be read: {error.strerror}; see its permissions") from error


def check_files(checkpoint: Checkpoint, files: Iterable[Path]) -> None:
    """Compares weight files with their checksums, as `checkpoint.verify` asks: not at all, with those that lie in the
    folder (None), or every file, with the hub's too.

    WeightError names a file whose digest is another, or that should be compared and has none.
    """
    if checkpoint.verify is False:
        return
    expected: dict[Path, Stated] = {}
    for file in files:
        found = stated(file, checkpoint.root) or (stated_by_hub(file) if checkpoint.verify else None)
        if found is not None:
            expected[file] = found
        elif checkpoint.verify:
            raise WeightError(
                f"{file} has no checksum to be compared with; `siglane doctor {checkpoint.root}` writes {SUMS}"
            )
    if expected:
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            for file, digest in zip(expected, pool.map(digest_of, expected), strict=True):
                compare(file, expected[file], digest)
        logger.info("%s: %d weight files are what their checksums say", checkpoint.root, len(expected))


def compare(file: Path, expected: Stated, found: str) -> None:
    """WeightError when the digests differ."""
    if found != expected.digest:
        raise WeightError(
            f"{file} is damaged: expected SHA-256 {expected.digest} ({expected.by}), found {found}; download it again"
        )


def write_sums(root: Path, digests: dict[Path, str]) -> Path:
    """Adds files below `root` to its list, in coreutils' format: `sha256sum -c SHA256SUMS` reads it. OSError."""
    listed = root / SUMS
    before = listed.read_text(encoding="utf-8") if listed.exists() else ""
    lines = [f"{digest}  {file.relative_to(root).as_posix()}" for file, digest in digests.items()]
    part = root / f".{SUMS}.part"
    part.write_text("\n".join([*before.splitlines(), *lines]) + "\n", encoding="utf-8")
    part.replace(listed)
    return listed


def _lines(listed: Path) -> list[tuple[str, str]]:
    """(digest, name) of each line; the name is "" where the line has none."""
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise WeightError(f"{listed} cannot be read: {error}") from error
    found = []
    for line in filter(None, map(str.strip, lines)):
        if match := LINE.fullmatch(line):
            found.append((match[1].lower(), (match[2] or "").removeprefix("./")))
        elif match := TAGGED.fullmatch(line):
            found.append((match[2].lower(), match[1].removeprefix("./")))
        elif not line.startswith("#"):
            raise WeightError(f"{listed}: {line[:80]!r} is not a line of SHA-256 and file name")
    return found
