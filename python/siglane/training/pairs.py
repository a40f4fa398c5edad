"""Image-text pairs: JSON Lines or a WebDataset folder, indexed once, and batches that are pure functions of a seed.

JSON Lines (paths are relative to the file)         WebDataset (`training/shards.py` says which files are one pair)
    {"image": "cats/1.jpg", "caption": "a cat"}          shards/00000.tar: 000.jpg 000.txt 001.png 001.txt ...

Batch number i is the same whoever asks, so a run resumes by counting.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from siglane.config.preprocess import LOCAL_DECODE
from siglane.errors import ImageError, UserError
from siglane.families.processor import ImageProcessor
from siglane.image.decode import decode
from siglane.media.source import read_file
from siglane.text.tokens import is_unicode
from siglane.training.report import BadRow
from siglane.training.shards import read_samples
from siglane.training.texts import read_lines
from siglane.types import DecodedImage, ImagePatches

SHARD = ".tar"
COMPRESSED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
UNREADABLE = "the picture cannot be read"
BLOCK = 256

Indices = npt.NDArray[np.int64]


class Pair(Protocol):
    """One picture and its text; crosses process boundaries. name: what messages call it."""

    @property
    def name(self) -> str: ...
    @property
    def caption(self) -> str: ...

    def picture(self) -> DecodedImage:
        """ImageError when it cannot be read."""
        ...


class Pairs(Protocol):
    """Pairs by number. size: how many, None for no end."""

    @property
    def size(self) -> int | None: ...

    def __getitem__(self, index: int, /) -> Pair: ...


@dataclass(frozen=True, slots=True)
class StoredPair:
    """A picture that is a file, or a part of one. size: its bytes when it was listed; start: where they begin in the
    file, None where they are all of it."""

    name: str
    caption: str
    file: Path
    size: int
    start: int | None = None

    def picture(self) -> DecodedImage:
        data = read_file(self.file) if self.start is None else read_file(self.file, self.start, self.size)
        return decode(data, LOCAL_DECODE)


@dataclass(frozen=True, slots=True)
class StoredPairs:
    pairs: tuple[StoredPair, ...]

    @property
    def size(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int, /) -> StoredPair:
        return self.pairs[index]


def open_pairs(path: Path) -> tuple[StoredPairs, tuple[BadRow, ...]]:
    """The pairs of a JSON Lines file, a tar or a folder of tars, and the rows that were left out.

    Captions and the places of pictures are held in memory, pictures are not; whether one can be decoded is seen when
    it is used. UserError when there is nothing to read, or no usable pair.
    """
    if path.is_dir():
        rows = list(_folder_rows(path))
    elif path.is_file():
        rows = list(_shard_rows(path) if path.suffix.lower() == SHARD else _line_rows(path))
    else:
        raise UserError(f"there is no file or folder {path}; give JSON Lines or a folder of tars", code="bad_pairs")
    pairs = tuple(row for row in rows if isinstance(row, StoredPair))
    bad = tuple(row for row in rows if isinstance(row, BadRow))
    if not pairs:
        first = f"; the first row left out is {bad[0]}" if bad else ""
        raise UserError(f"{path} holds no usable pair of image and caption{first}", code="bad_pairs")
    return StoredPairs(pairs), bad


def _line_rows(file: Path) -> Iterator[StoredPair | BadRow]:
    try:
        for number, line in enumerate(read_lines(file), 1):
            name = f"{file}:{number}"
            if isinstance(line, ValueError):
                yield BadRow(name, str(line))
            elif line.strip():
                yield _stored_pair(name, line, file.parent)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", code="bad_pairs") from error


def _stored_pair(name: str, line: str, folder: Path) -> StoredPair | BadRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return BadRow(name, "not JSON")
    if not isinstance(row, dict):
        return BadRow(name, 'not an object {"image": path, "caption": text}', "not an object")
    image, caption = row.get("image"), row.get("caption")
    if not isinstance(image, str) or not image:
        return BadRow(name, "no image")
    if not isinstance(caption, str) or not caption.strip():
        return BadRow(name, "no caption")
    if not is_unicode(caption):
        return BadRow(name, "the caption is not Unicode text")
    try:
        found = (folder / image).stat()
    except (FileNotFoundError, NotADirectoryError):
        return BadRow(name, f"the picture {image} is missing", "the picture is missing")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable path"
        return BadRow(name, f"the picture {image} cannot be read: {reason}", UNREADABLE)
    if not stat.S_ISREG(found.st_mode):
        return BadRow(name, f"the picture {image} is not a file", "the picture is not a file")
    return StoredPair(name, caption, folder / image, found.st_size)


def _folder_rows(folder: Path) -> Iterator[StoredPair | BadRow]:
    names = sorted(folder.iterdir())
    files = [file for file in names if file.suffix.lower() == SHARD]
    if not files:
        raise UserError(f"{folder} holds no *.tar; compressed shards are not supported", code="bad_pairs")
    for file in names:
        if COMPRESSED.search(file.name):
            yield BadRow(str(file), "a compressed shard; unpack it to a .tar", "a compressed shard")
    for file in files:
        yield from _shard_rows(file)


def _shard_rows(file: Path) -> Iterator[StoredPair | BadRow]:
    for found in read_samples(file):
        if isinstance(found, BadRow):
            yield found
        else:
            yield StoredPair(f"{file}:{found.key}", found.caption, file, found.size, found.start)


def fingerprint(pairs: Pairs) -> str:
    """What a resumed run's data must have in common with the first run's: 16 digits for every BLOCK pairs, of their
    captions and of their pictures' names, places and sizes. Empty for pairs that are no files."""
    if not isinstance(pairs, StoredPairs):
        return ""
    blocks = []
    for start in range(0, pairs.size, BLOCK):
        digest = blake2b(digest_size=8)
        for pair in pairs.pairs[start : start + BLOCK]:
            facts = (pair.caption, os.fsencode(pair.file.name).hex(), pair.start, pair.size)
            digest.update(json.dumps(facts).encode() + b"\n")
        blocks.append(digest.hexdigest())
    return "".join(blocks)


def where_data_differ(pairs: Pairs, before: str) -> str | None:
    """The pairs that are not what they were when `before` was their fingerprint; None when all are."""
    now, digits = fingerprint(pairs), 16
    for place in range(0, max(len(now), len(before)), digits):
        if now[place : place + digits] != before[place : place + digits]:
            first = place // digits * BLOCK
            last = min(first + BLOCK, pairs.size or first + BLOCK) - 1
            return f"{pairs[first].name} to {pairs[last].name}"
    return None


def batches_in(size: int, batch_size: int) -> int:
    """Full batches of one epoch; the rest is not seen in it, the next one is shuffled anew. UserError without one."""
    if size < batch_size:
        message = f"{size} pairs do not fill a batch of {batch_size}; choose a smaller batch_size"
        raise UserError(message, code="bad_option", param="batch_size")
    return size // batch_size


def batch_indices(size: int | None, batch_size: int, seed: int, number: int) -> Indices:
    """The pairs of batch `number`: consecutive ones where there is no end, else of epochs shuffled by `seed`."""
    if size is None:
        return np.arange(number * batch_size, (number + 1) * batch_size)
    epoch, place = divmod(number, batches_in(size, batch_size))
    return _shuffled(size, seed, epoch)[place * batch_size : (place + 1) * batch_size]


@lru_cache(maxsize=2)
def _shuffled(size: int, seed: int, epoch: int) -> Indices:
    return np.random.default_rng([seed, epoch]).permutation(size)


def drawn_pairs(size: int, batch_size: int, seed: int, batches: int) -> int:
    """How many of `size` pairs the first batches hold: an epoch leaves out what does not fill its last batch."""
    in_epoch = batches_in(size, batch_size)
    drawn = np.zeros(size, dtype=bool)
    for epoch in range(-(-batches // in_epoch)):
        drawn[_shuffled(size, seed, epoch)[: min(batches - epoch * in_epoch, in_epoch) * batch_size]] = True
        if drawn.all():
            break
    return int(drawn.sum())


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Pairs as the towers take them. numbers: of those that can be used; images: one for each, or unit embeddings
    `[n, D]` where the tower does not change; bad: the others."""

    numbers: tuple[int, ...]
    images: tuple[ImagePatches, ...] | torch.Tensor
    captions: tuple[str, ...]
    bad: tuple[BadRow, ...]


def load_batch(processor: ImageProcessor, numbers: Sequence[int], pairs: Sequence[Pair]) -> Batch:
    """The pairs with these numbers; those whose picture cannot be read are left out and named."""
    found: list[tuple[int, ImagePatches, str]] = []
    bad: list[BadRow] = []
    for number, pair in zip(numbers, pairs, strict=True):
        try:
            picture = pair.picture()
        except ImageError as error:
            bad.append(BadRow(pair.name, error.message, UNREADABLE))
            continue
        (layout,) = processor.layouts([picture.size])
        found.append((number, processor.patches(picture, layout), pair.caption))
    kept, images, captions = zip(*found, strict=True) if found else ((), (), ())
    return Batch(kept, images, captions, tuple(bad))


def loaded_ahead(
    pool: Executor, pairs: Pairs, processor: ImageProcessor, groups: Iterator[Sequence[int]], ahead: int = 4
) -> Iterator[Batch]:
    """The batch of each group of numbers, in order, loaded by the pool up to `ahead` before its use."""
    waiting: list[Future[Batch]] = []
    for numbers in groups:
        waiting.append(pool.submit(load_batch, processor, numbers, [pairs[number] for number in numbers]))
        if len(waiting) > ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()
