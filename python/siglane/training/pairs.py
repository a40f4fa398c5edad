"""Image-text pairs: JSON Lines or a WebDataset folder, indexed once, and batches that are pure functions of a seed.

JSON Lines (paths are relative to the file)         WebDataset (`name.jpg` and `name.txt` are one pair)
    {"image": "cats/1.jpg", "caption": "a cat"}          shards/00000.tar: 000.jpg 000.txt 001.png 001.txt ...

Batch number i is the same whoever asks, so a run resumes by counting.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from siglane.config.preprocess import LOCAL_DECODE
from siglane.errors import ImageError, UserError
from siglane.families.processor import ImageProcessor
from siglane.image.decode import decode
from siglane.media.source import open_file
from siglane.types import DecodedImage, ImagePatches

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
CAPTION = ".txt"

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
    """A picture that is a file, or `size` bytes of one from `start`."""

    name: str
    caption: str
    file: Path
    start: int = 0
    size: int = -1

    def picture(self) -> DecodedImage:
        with open_file(self.file) as file:
            file.seek(self.start)
            return decode(file.read(self.size), LOCAL_DECODE)


@dataclass(frozen=True, slots=True)
class StoredPairs:
    pairs: tuple[StoredPair, ...]

    @property
    def size(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int, /) -> StoredPair:
        return self.pairs[index]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A pair that cannot be used. name: file and line, or shard and key."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def open_pairs(path: Path) -> tuple[StoredPairs, tuple[BadRow, ...]]:
    """The pairs of a JSON Lines file or of a folder of tars, and the rows that were left out.

    Captions and the places of pictures are held in memory, pictures are not; whether one can be decoded is seen when
    it is used. UserError when there is nothing to read, or no usable pair.
    """
    if path.is_dir():
        rows = list(_shard_rows(path))
    elif path.is_file():
        rows = list(_line_rows(path))
    else:
        raise UserError(f"there is no file or folder {path}; give JSON Lines or a folder of tars", code="bad_pairs")
    pairs = tuple(row for row in rows if isinstance(row, StoredPair))
    bad = tuple(row for row in rows if isinstance(row, BadRow))
    if not pairs:
        first = f"; the first row left out is {bad[0]}" if bad else ""
        raise UserError(f"{path} holds no usable pair of image and caption{first}", code="bad_pairs")
    return StoredPairs(pairs), bad


def _line_rows(file: Path) -> Iterator[StoredPair | BadRow]:
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            name = f"{file}:{number}"
            if line.strip():
                try:
                    yield _stored_pair(name, line, file.parent)
                except ValueError as error:
                    yield BadRow(name, str(error))


def _stored_pair(name: str, line: str, folder: Path) -> StoredPair:
    """ValueError says what is wrong with the line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError('not an object {"image": path, "caption": text}')
    image, caption = row.get("image"), row.get("caption")
    if not isinstance(image, str) or not image:
        raise ValueError("no image")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("no caption")
    if not (folder / image).is_file():
        raise ValueError(f"the picture {image} is missing")
    return StoredPair(name, caption, folder / image)


def _shard_rows(folder: Path) -> Iterator[StoredPair | BadRow]:
    files = sorted(folder.glob("*.tar"))
    if not files:
        raise UserError(f"{folder} holds no *.tar; compressed shards are not supported", code="bad_pairs")
    for file in files:
        try:
            with tarfile.open(file, "r:") as tar:
                rows = _sample_rows(tar, file)
        except (tarfile.TarError, OSError) as error:
            rows = [BadRow(str(file), f"not a readable tar: {error}")]
        yield from rows


def _sample_rows(tar: tarfile.TarFile, file: Path) -> list[StoredPair | BadRow]:
    """A sample's key ends at the first dot of its files' names (WebDataset)."""
    pictures: dict[str, list[tarfile.TarInfo]] = {}
    captions: dict[str, str] = {}
    for entry in tar:
        folder, slash, name = entry.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        key, extension = folder + slash + stem, (dot + extension).lower()
        if not entry.isreg() or not stem:
            continue
        if extension in PICTURES:
            pictures.setdefault(key, []).append(entry)
        elif extension == CAPTION and (text := tar.extractfile(entry)) is not None:
            captions[key] = text.read().decode("utf-8", errors="replace").strip()
    rows: list[StoredPair | BadRow] = []
    for key in dict.fromkeys((*pictures, *captions)):
        name, found, caption = f"{file}:{key}", pictures.get(key, ()), captions.get(key)
        if len(found) != 1:
            rows.append(BadRow(name, "more than one picture" if found else "no picture"))
        elif not caption:
            rows.append(BadRow(name, "no caption"))
        else:
            rows.append(StoredPair(name, caption, file, found[0].offset_data, found[0].size))
    return rows


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
            bad.append(BadRow(pair.name, error.message))
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
