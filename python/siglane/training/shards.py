"""The samples of a WebDataset shard: which files of a tar are a picture and its caption.

A sample's key is a file's name up to the first dot behind its folders (WebDataset). Names with more dots are told apart
by all but their extension first: `IMG.2023.jpg` belongs to `IMG.2023.txt`, not to `IMG.2024.txt`. What one key has left
is one pair where it is one picture and one caption: `s.input.jpg` and `s.output.txt`.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from siglane.config.preprocess import PICTURE_SUFFIXES
from siglane.training.report import BadRow
from siglane.training.texts import read_text

CAPTION = ".txt"


@dataclass(frozen=True, slots=True)
class Sample:
    """key: the sample's, or its files' name without the extension; start, size: of the picture's bytes in the tar."""

    key: str
    caption: str
    start: int
    size: int


@dataclass(slots=True)
class _Files:
    """Files of one stem."""

    pictures: list[tarfile.TarInfo] = field(default_factory=list)
    captions: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class _Group:
    """Files of one key. stems: those that are pictures or captions, by name without extension; others: extensions of
    the rest."""

    stems: dict[str, _Files] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def read_samples(file: Path) -> Iterator[Sample | BadRow]:
    """Every sample of a tar without compression, and what cannot be one. A tar that ends early gives those before."""
    groups: dict[str, _Group] = {}
    bad: list[BadRow] = []
    try:
        with tarfile.open(file, "r:") as tar:
            bad += _read_members(tar, file, groups)
    except (tarfile.TarError, OSError) as error:
        bad.append(BadRow(str(file), f"not a readable tar: {error}", "not a readable tar"))
    for key, group in groups.items():
        for found in _pair_up(key, group):
            yield BadRow(f"{file}:{found.name}", found.reason, found.kind) if isinstance(found, BadRow) else found
    yield from bad


def _read_members(tar: tarfile.TarFile, file: Path, groups: dict[str, _Group]) -> Iterator[BadRow]:
    """Fills `groups`; what belongs to none is named."""
    stored: dict[str, tarfile.TarInfo] = {}
    for entry in tar:
        folder, slash, name = entry.name.rpartition("/")
        stem, dot, extension = name.rpartition(".")
        key, suffix = name.partition(".")[0], (dot + extension).lower()
        if entry.isdir() or not dot:
            continue
        if not key:
            if suffix in (*PICTURE_SUFFIXES, CAPTION):
                yield BadRow(f"{file}:{entry.name}", "a hidden file: its name begins with a dot", "a hidden file")
            continue
        group = groups.setdefault(folder + slash + key, _Group())
        place = stored.get(entry.linkname, entry) if entry.islnk() else entry  # tar keeps a file's second name so
        if not place.isreg() or suffix not in (*PICTURE_SUFFIXES, CAPTION):
            group.others.append(suffix)
            continue
        stored[entry.name] = place
        files = group.stems.setdefault(folder + slash + stem, _Files())
        if suffix != CAPTION:
            files.pictures.append(place)
        elif (text := tar.extractfile(place)) is not None:
            files.captions.append(text.read())


def _pair_up(key: str, group: _Group) -> Iterator[Sample | BadRow]:
    if not group.stems:
        held = ", ".join(dict.fromkeys(group.others))
        yield BadRow(key, f"neither picture nor caption, only {held}", "neither picture nor caption")
        return
    whole = {stem: files for stem, files in group.stems.items() if files.pictures and files.captions}
    for stem, files in whole.items():
        yield _sample(stem, files)
    rest = {stem: files for stem, files in group.stems.items() if stem not in whole}
    if not rest or key in whole:  # further files of a sample that is used: a mask, a depth map
        return
    left = _Files(
        [picture for files in rest.values() for picture in files.pictures],
        [caption for files in rest.values() for caption in files.captions],
    )
    if not whole and left.pictures and left.captions:
        yield _sample(key, left)
    else:
        for stem, files in rest.items():
            yield _sample(stem, files)


def _sample(name: str, files: _Files) -> Sample | BadRow:
    for found, what in ((files.pictures, "picture"), (files.captions, "caption")):
        if len(found) != 1:
            return BadRow(name, f"more than one {what}" if found else f"no {what}")
    try:
        caption = read_text(files.captions[0]).strip()
    except ValueError as error:
        return BadRow(name, f"the caption is {error}")
    picture = files.pictures[0]
    return Sample(name, caption, picture.offset_data, picture.size) if caption else BadRow(name, "no caption")
