"""What the engine knows of one request while it runs, and what one step computes."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from siglane.engine.answers.thinking import ThinkingBudget
from siglane.engine.cache.features import FeatureKey
from siglane.engine.cache.prefix import Node
from siglane.engine.constraints.constraint import Constrained
from siglane.engine.edits import Tally
from siglane.engine.lookup import Lookup
from siglane.families.splice import ImageRows, image_rows
from siglane.types import Read, Request, Timings


class PageRun(NamedTuple):
    """Pages `first..first + pages` that lie one after another."""

    first: int
    pages: int


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way. `computed` tokens are in the KV cache, in the pages of `block_table`, the first of
    them shared by locked `prefix_nodes`; `page_runs` are for `runs` alone.

    seed: of all its noise; constrained: its place in the grammar that its answer has to match; lookup: None where
    nothing is guessed; features: rows of the images that the rest of the
    prompt still needs, by image number; reads_told: how many of the request's reads have been; yields: to sequences
    that do not, as a batch's do until they were passed over for long; table_row: of the device's table of pages, no
    other's while it runs.
    """

    request: Request
    order: int
    token_ids: list[int]
    cache_ids: list[int]
    spans: tuple[ImageRows, ...]
    seed: int
    thinking_budget: ThinkingBudget | None = None
    tally: Tally | None = None
    constrained: Constrained | None = None
    lookup: Lookup | None = None
    yields: bool = False
    computed: int = 0
    block_table: list[int] = field(default_factory=list)
    page_runs: list[PageRun] = field(default_factory=list)
    prefix_nodes: list[Node] = field(default_factory=list)
    table_row: int = 0
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    reads_told: int = 0
    cached_tokens: int = 0
    encoded_images: int = 0
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    prefilled: float = 0.0
    encode_seconds: float = 0.0

    @classmethod
    def of(
        cls,
        request: Request,
        order: int,
        seed: int,
        thinking_budget: ThinkingBudget | None = None,
        constrained: Constrained | None = None,
        lookup: Lookup | None = None,
    ) -> Sequence:
        token_ids, cache_ids = list(request.prompt.token_ids), list(request.cache_ids())
        spans = image_rows(request.prompt)
        tally = Tally.wanted(request.sampling, token_ids)
        chosen_by = seed, thinking_budget, tally, constrained, lookup
        return cls(request, order, token_ids, cache_ids, spans, *chosen_by, request.batch)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt.token_ids)

    @property
    def answered(self) -> int:
        """Tokens of the answer."""
        return len(self.token_ids) - self.prompt_length

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    def next_token(self, guesses: tuple[int, ...] = ()) -> NextToken:
        """What its next token is chosen by, were `guesses` its last ones."""
        budget, tally = self.thinking_budget, self.tally
        if guesses and tally is not None:
            tally = tally.with_more(guesses)
        forced_id = None if budget is None else budget.forced_id([*self.output_ids, *guesses])
        answered = self.answered + len(guesses)
        return NextToken(self.request, self.seed, answered, forced_id, tally, self.constrained, guesses)

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed; 1 while decoding."""
        return len(self.token_ids) - self.computed

    @property
    def open_reads(self) -> tuple[Read, ...]:
        """Those that have not been told."""
        return self.request.reads[self.reads_told :]

    @property
    def next_read(self) -> int | None:
        """The first place that must be computed, whatever a cache has."""
        return self.request.reads[self.reads_told].position if self.reads_told < len(self.request.reads) else None

    def images_in(self, start: int, stop: int) -> list[int]:
        """Images with rows in positions `start..stop`, in order."""
        return list(dict.fromkeys(span.image for span in self.spans if span.start < stop and start < span.stop))

    def feature_key(self, image: int) -> FeatureKey:
        return self.request.cache_salt, self.request.images[image].digest

    def runs(self) -> list[PageRun]:
        """The pages of `block_table` as stretches; only those that are new since the last call are looked at."""
        runs, known = self.page_runs, sum(run.pages for run in self.page_runs)
        for page in self.block_table[known:]:
            if runs and page == runs[-1].first + runs[-1].pages:
                runs[-1] = runs[-1]._replace(pages=runs[-1].pages + 1)
            else:
                runs.append(PageRun(page, 1))
        return runs

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.cache_ids.append(token_id)
        if self.tally is not None:
            self.tally.add(token_id)
        if self.constrained is not None:
            self.constrained.append(token_id)

    def drop_used_features(self) -> None:
        """Features of images whose last row has been computed are not needed again."""
        needed = {span.image for span in self.spans if span.stop > self.computed}
        self.features = {image: rows for image, rows in self.features.items() if image in needed}

    def timings(self, now: float) -> Timings:
        started = self.started or now
        prefilled = self.prefilled or now
        return Timings(
            queue=started - self.arrived,
            encode=self.encode_seconds,
            prefill=prefilled - started - self.encode_seconds,
            decode=now - prefilled,
        )


class NextToken(NamedTuple):
    """What of a request its next token depends on, beside the logits.

    answered: tokens of the answer before it, the last of them `guesses`; forced_id: where a spent thinking budget
    decides it; tally, constrained: read at once.
    """

    request: Request
    seed: int
    answered: int
    forced_id: int | None
    tally: Tally | None
    constrained: Constrained | None = None
    guesses: tuple[int, ...] = ()


class Chunk(NamedTuple):
    """Positions `start..stop` of one sequence; `start` is its first not yet computed token.

    guesses: tokens behind the known ones, in the chunk's last positions.
    """

    sequence: Sequence
    start: int
    stop: int
    guesses: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def token_ids(self) -> list[int]:
        return [*self.sequence.token_ids[self.start : self.stop], *self.guesses]

    @property
    def reads(self) -> bool:
        """Whether it holds a part of the prompt."""
        return self.start < self.sequence.prompt_length

    @property
    def ends(self) -> bool:
        """Whether nothing known is left behind it."""
        return self.stop == len(self.sequence.token_ids) + len(self.guesses)

    @property
    def wanted(self) -> tuple[Read, ...]:
        """The request's reads in it."""
        return tuple(itertools.takewhile(lambda read: read.position < self.stop, self.sequence.open_reads))

    @property
    def samples(self) -> bool:
        """Whether the chunk ends the known tokens, so that the next one is to be chosen."""
        return self.ends and self.sequence.request.max_tokens > 0

    @property
    def next_tokens(self) -> list[NextToken]:
        """One to be chosen behind the known tokens, and one behind each guess, as though it were right."""
        if not self.samples:
            return []
        return [self.sequence.next_token(self.guesses[:count]) for count in range(len(self.guesses) + 1)]

    def with_guesses(self, guesses: tuple[int, ...]) -> Chunk:
        return self._replace(stop=self.stop + len(guesses), guesses=guesses)

    def kept(self, count: int) -> Chunk:
        """What of it remains true with the first `count` guesses, which are known tokens by now."""
        return self._replace(stop=self.stop - len(self.guesses) + count, guesses=())

    @property
    def spans(self) -> list[ImageRows]:
        """What images fill of the chunk; positions count from its own start."""
        inside = []
        for start, stop, image, row in self.sequence.spans:
            first, last = max(start, self.start), min(stop, self.stop)
            if first < last:
                inside.append(ImageRows(first - self.start, last - self.start, image, row + first - start))
        return inside

    def rows(self, image: int) -> torch.Tensor:
        """The features of an image, `[rows, hidden_size]`. RuntimeError when they are missing or not as many as its
        layout says: a request fails rather than answers about half an image."""
        rows = self.sequence.features.get(image)
        needed = self.sequence.request.prompt.layouts[image].rows
        if rows is None or rows.shape[0] != needed:
            raise RuntimeError(f"image {image} needs {needed} rows, it has {'none' if rows is None else rows.shape[0]}")
        return rows


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward of the language model: chunks in the order of their rows."""

    chunks: tuple[Chunk, ...]

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.chunks)

    def slots(self, page_size: int) -> list[int]:
        """Where the keys and values of each token are kept: page number * page_size + offset in the page."""
        return [
            chunk.sequence.block_table[position // page_size] * page_size + position % page_size
            for chunk in self.chunks
            for position in range(chunk.start, chunk.stop)
        ]
