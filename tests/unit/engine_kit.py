"""What the engine's tests share: requests made by hand, and a scheduler whose model is arithmetic, no network."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from siglane.engine.batch import Chunk
from siglane.engine.batch import Sequence as Running
from siglane.engine.cache.features import FeatureCache
from siglane.engine.cache.kv import PageAllocator
from siglane.engine.cache.prefix import PrefixCache
from siglane.engine.scheduler import Scheduler, Step, StepBudget
from siglane.families.splice import splice
from siglane.types import (
    Box,
    Grid,
    ImageLayout,
    ImagePatches,
    ImagePlaceholder,
    ImageSpan,
    Prompt,
    Request,
    Resize,
    SamplingParams,
    Size,
    Tile,
    digest_of,
)

PLACEHOLDER = 99  # what stands at image positions
LINE_FEED = 98
VOCABULARY = 97


def image(name: int, rows: int = 4, patches: int = 4) -> ImagePatches:
    """An image of which only identity and sizes matter; equal numbers are equal images."""
    tile = Tile((Resize(Size(patches, 1), "bicubic"),), Box(0, 0, patches, 1), Grid(1, patches))
    layout = ImageLayout(Size(patches, 1), (tile,), (ImagePlaceholder(rows),), Grid(1, 1), projected=(Grid(1, rows),))
    return ImagePatches(torch.zeros(patches, 1), layout, digest_of(b"kit", f"{name} {rows} {patches}".encode()))


@dataclass(frozen=True)
class Tiled:
    """An image whose rows stand in several pieces, a line feed after each."""

    image: ImagePatches
    pieces: tuple[int, ...]


Part = int | ImagePatches | Tiled


class Asked(NamedTuple):
    """A prompt and its images, in its order: what a request is about."""

    prompt: Prompt
    images: tuple[ImagePatches, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.prompt.token_ids

    def request(
        self, name: str, sampling: SamplingParams, max_tokens: int, salt: str = "", batch: bool = False
    ) -> Request:
        return Request(name, self.prompt, sampling, max_tokens, salt, self.images, batch=batch)

    def cache_ids(self) -> tuple[int, ...]:
        return self.request("", SamplingParams(), 1).cache_ids()


def prompt(*parts: Part) -> Asked:
    """Token ids and images in reading order."""
    ids: list[int] = []
    spans: list[ImageSpan] = []
    images: list[ImagePatches] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        tiled = part if isinstance(part, Tiled) else None
        for rows in tiled.pieces if tiled else (part.layout.image_tokens,):
            spans.append(ImageSpan(len(ids), len(ids) + rows, len(images)))
            ids += [PLACEHOLDER] * rows
            ids += [LINE_FEED] if tiled else []
        images.append(tiled.image if tiled else part)
    layouts = tuple(one.layout for one in images)
    return Asked(Prompt(tuple(ids), tuple(spans), layouts, tuple(range(len(images)))), tuple(images))


def request(
    name: str, asked: Asked, max_tokens: int = 4, salt: str = "", batch: bool = False, **sampling: object
) -> Request:
    return asked.request(name, SamplingParams(**sampling), max_tokens, salt, batch)  # type: ignore[arg-type]


def continuation(asked: Asked | Request, count: int) -> list[int]:
    """What `Rig` answers: each token follows from everything before it, images included."""
    known = list(asked.cache_ids())
    length = len(known)
    for _ in range(count):
        known.append(next_token(known))
    return known[length:]


def next_token(known: Sequence[int]) -> int:
    return zlib.crc32(repr(list(known)).encode()) % VOCABULARY


class Rig:
    """The scheduler with a model that reads its KV pages honestly and looks for every mistake while it does.

    A "key" in a page is the hash of all cache ids up to its position. Computing a chunk checks that the pages hold the
    keys of everything before it, as attention would read them, that every placeholder gets its image's row, that the
    budgets hold and that every page has exactly one owner.
    """

    def __init__(
        self,
        *,
        tokens: int = 8,
        patches: int = 8,
        running: int = 4,
        pages: int = 32,
        page_size: int = 4,
        prefix_cache: bool = True,
        feature_bytes: int = 1 << 20,
    ) -> None:
        self.budget = StepBudget(tokens, patches, running)
        self.allocator = PageAllocator(pages)
        self.cache = PrefixCache(self.allocator, page_size) if prefix_cache else None
        self.features = FeatureCache(feature_bytes)
        self.scheduler = Scheduler(self.budget, self.allocator, self.cache, self.features, page_size)
        self.page_size = page_size
        self.memory: dict[tuple[int, int], int] = {}  # (page, offset) -> key
        self.alive: dict[str, Running] = {}
        self.answers: dict[str, list[int]] = {}
        self.encoded: list[bytes] = []
        self.steps: list[list[tuple[str, int, int]]] = []  # per step: (request, start, stop) of its chunks

    def add(self, *requests: Request) -> None:
        for one in requests:
            sequence = Running.of(one, len(self.answers), seed=0)
            self.alive[one.request_id] = sequence
            self.answers[one.request_id] = []
            self.scheduler.add(sequence)

    def abort(self, name: str) -> None:
        self.scheduler.finish(self.alive.pop(name))
        self.check_pages()

    def run(self, limit: int = 1000) -> None:
        """Until everything has ended; an engine that cannot finish its work fails here."""
        for _ in range(limit):
            if not self.alive:
                return
            self.step()
        raise AssertionError(f"not finished after {limit} steps: {list(self.alive)}")

    def step(self) -> Step:
        step = self.scheduler.plan()
        self.check_plan(step)
        self.check_pages()
        for key, wanting in step.images_to_encode.items():
            asked, number = wanting[0][0].request, wanting[0][1]
            rows = rows_of(asked.images[number])
            self.encoded.append(asked.images[number].digest)
            self.features.keep(key, rows)
            for sequence, index in wanting:
                sequence.features[index] = rows
        for chunk in step.chunks:
            self.compute(chunk)
        self.scheduler.commit(step.chunks)
        for chunk in step.chunks:
            sequence = chunk.sequence
            if chunk.stop == len(sequence.token_ids):
                token_id = next_token(sequence.cache_ids)
                sequence.append(token_id)
                self.answers[sequence.request.request_id].append(token_id)
                if len(sequence.output_ids) == sequence.request.max_tokens:
                    self.scheduler.finish(self.alive.pop(sequence.request.request_id))
        self.steps.append([(chunk.sequence.request.request_id, chunk.start, chunk.stop) for chunk in step.chunks])
        self.check_pages()
        return step

    def compute(self, chunk: Chunk) -> None:
        sequence, salt = chunk.sequence, chunk.sequence.request.cache_salt
        keys = running_hashes(salt, sequence.cache_ids[: chunk.stop])
        read = [self.memory.get(self.slot(sequence, position)) for position in range(chunk.start)]
        assert read == keys[: chunk.start], "the pages do not hold what was computed for this prompt"
        for position in range(chunk.start, chunk.stop):
            self.memory[self.slot(sequence, position)] = keys[position]
        embeds = torch.full((chunk.tokens, 1), -1, dtype=torch.float64)
        embeds = splice(embeds, chunk.spans, [chunk.rows(span.image) for span in chunk.spans])
        expected = [-1.0] * len(sequence.token_ids)
        rows = [iter(rows_of(picture).flatten().tolist()) for picture in sequence.request.images]
        for start, stop, number in sequence.request.prompt.spans:
            expected[start:stop] = [next(rows[number]) for _ in range(start, stop)]
        assert embeds.flatten().tolist() == expected[chunk.start : chunk.stop]

    def slot(self, sequence: Running, position: int) -> tuple[int, int]:
        return sequence.block_table[position // self.page_size], position % self.page_size

    def check_plan(self, step: Step) -> None:
        assert step.chunks, "an empty step although there is work"
        assert sum(chunk.tokens for chunk in step.chunks) <= self.budget.tokens
        assert len(self.scheduler.running) <= self.budget.running
        patches = [
            wanting[0][0].request.images[wanting[0][1]].layout.patches for wanting in step.images_to_encode.values()
        ]
        assert sum(patches) <= self.budget.patches or len(patches) == 1
        names = [chunk.sequence.request.request_id for chunk in step.chunks]
        assert len(set(names)) == len(names)
        for chunk in step.chunks:
            assert chunk.start == chunk.sequence.computed < chunk.stop <= len(chunk.sequence.token_ids)

    def check_pages(self) -> None:
        """Every page is free, or owned by one request, or owned by the tree."""
        own = [page for one in self.scheduler.running for page in one.block_table[len(one.prefix_nodes) :]]
        shared = {node.page for one in self.scheduler.running for node in one.prefix_nodes}
        cached = self.cache.pages if self.cache else 0
        assert len(set(own)) == len(own)
        assert not shared & set(own)
        assert self.allocator.free + len(own) + cached == self.allocator.total
        assert all(not one.block_table and not one.prefix_nodes for one in self.scheduler.waiting)
        orders = [one.order for one in self.scheduler.waiting]
        assert orders == sorted(orders), "somebody in the queue was overtaken"
        for one in self.scheduler.running:
            assert one.block_table[: len(one.prefix_nodes)] == [node.page for node in one.prefix_nodes]

    def check_idle(self) -> None:
        """Nothing is left behind: no request, and no page that cannot be had back."""
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        evictable = self.cache.evictable if self.cache else 0
        assert self.allocator.free + evictable == self.allocator.total


def rows_of(picture: ImagePatches) -> torch.Tensor:
    """`[rows, 1]`, different for every image and row."""
    first = zlib.crc32(picture.digest)
    return torch.arange(first, first + picture.layout.image_tokens, dtype=torch.float64)[:, None]


def running_hashes(salt: str, ids: Iterable[int]) -> list[int]:
    keys, key = [], hash(salt)
    for number in ids:
        key = hash((key, number))
        keys.append(key)
    return keys
