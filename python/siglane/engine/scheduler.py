"""Which tokens and which images the next step computes.

Continuous batching: sequences that decode come first, then prompts that are half read, then waiting requests in order
of arrival. Two budgets bind together: tokens for the language model and patches for the encoder.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from siglane.engine.batch import Chunk, Sequence
from siglane.engine.features import FeatureCache, FeatureKey
from siglane.engine.kv import PageAllocator
from siglane.engine.prefix_cache import NextPage, PrefixCache


@dataclass(frozen=True, slots=True)
class StepBudget:
    """What one step may cost, and how many requests may run."""

    tokens: int
    patches: int
    running: int


@dataclass(slots=True)
class Step:
    """A planned step. images_to_encode: first, and for each the sequences that want it with its number there."""

    chunks: list[Chunk] = field(default_factory=list)
    images_to_encode: dict[FeatureKey, list[tuple[Sequence, int]]] = field(default_factory=dict)
    tokens_left: int = 0
    patches_left: int = 0


class Scheduler:
    """Owns the queues and the pages of every sequence in them. All orders are of arrival: runs repeat exactly."""

    def __init__(
        self,
        budget: StepBudget,
        allocator: PageAllocator,
        prefix_cache: PrefixCache | None,
        features: FeatureCache,
        page_size: int,
    ) -> None:
        self.budget, self.allocator, self.prefix_cache, self.features = budget, allocator, prefix_cache, features
        self.page_size = page_size
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def capacity(self) -> int:
        """Tokens one sequence can hold at most."""
        return self.allocator.total * self.page_size

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def plan(self) -> Step:
        """The next step; its chunks have pages. Empty only when nothing waits or runs."""
        for sequence in self._decodes_first():
            if sequence in self.running:  # growing an older one may have put it back into the queue
                self._grow(sequence)
        step = Step(tokens_left=self.budget.tokens, patches_left=self.budget.patches)
        for sequence in self._decodes_first():
            self._schedule(sequence, step)
        self._admit(step)
        return step

    def commit(self, chunks: Iterable[Chunk]) -> None:
        """Marks chunks as computed and offers their full pages for reuse."""
        for sequence, start, stop in chunks:
            sequence.computed = stop
            sequence.drop_used_features()
            if start // self.page_size < stop // self.page_size:
                self._share(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out and frees its pages; what others can reuse stays in the prefix cache."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._release(sequence)

    def _decodes_first(self) -> list[Sequence]:
        return sorted(self.running, key=lambda sequence: sequence.remaining > 1)

    def _schedule(self, sequence: Sequence, step: Step) -> bool:
        """Adds as much of a sequence as the budgets allow; False when that is nothing."""
        stop = min(len(sequence.token_ids), sequence.computed + step.tokens_left)
        stop = self._gather_images(sequence, stop, step)
        if stop <= sequence.computed:
            return False
        step.chunks.append(Chunk(sequence, sequence.computed, stop))
        step.tokens_left -= stop - sequence.computed
        return True

    def _gather_images(self, sequence: Sequence, stop: int, step: Step) -> int:
        """Makes sure that the images before `stop` have features or are among those the step encodes.

        Returns where the chunk must end: before the first image that the patch budget has no room for. A step takes at
        least one image, however large.
        """
        for image in sequence.images_in(sequence.computed, stop):
            if image in sequence.features:
                continue
            key, layout = sequence.feature_key(image), sequence.request.images[image].layout
            wanting = step.images_to_encode.get(key)
            if wanting is not None:
                wanting.append((sequence, image))
                continue
            rows = self.features.get(key, layout.rows)
            if rows is not None:
                sequence.features[image] = rows
                continue
            if step.images_to_encode and layout.patches > step.patches_left:
                return min(span.start for span in sequence.spans if span.image == image)
            step.images_to_encode[key] = [(sequence, image)]
            step.patches_left -= layout.patches
        return stop

    def _admit(self, step: Step) -> None:
        """Starts waiting requests. One whose next page a running neighbour is about to compute waits for that page."""
        under_way = self._pages_under_way()
        for sequence in list(self.waiting):
            if len(self.running) >= self.budget.running or step.tokens_left == 0:
                return
            following = self._match(sequence)
            if following in under_way:
                self._release(sequence)
                continue
            if not self._grow(sequence, preempt=False):
                self._release(sequence)
                return
            if not self._schedule(sequence, step):
                self._release(sequence)
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            if following is not None:
                under_way.add(following)

    def _match(self, sequence: Sequence) -> NextPage | None:
        """Takes the cached prefix of a waiting sequence; returns the page it has to compute first."""
        if self.prefix_cache is None:
            return None
        nodes, following = self.prefix_cache.match(sequence.cache_ids, sequence.request.cache_salt)
        self.prefix_cache.lock(nodes)
        sequence.prefix_nodes = nodes
        sequence.block_table = [node.page for node in nodes]
        sequence.computed = len(nodes) * self.page_size
        return following if following.key is not None else None

    def _pages_under_way(self) -> set[NextPage]:
        """The next page of every running sequence that is still reading its prompt."""
        if self.prefix_cache is None:
            return set()
        reading = (sequence for sequence in self.running if sequence.remaining > 1)
        return {self.prefix_cache.match(one.cache_ids, one.request.cache_salt)[1] for one in reading}

    def _grow(self, sequence: Sequence, preempt: bool = True) -> bool:
        """Gives a sequence pages for all of its known tokens.

        When none are left, cached prefixes go first, then (for a running sequence) the youngest neighbours are put
        back into the queue, the sequence itself last. False when it did not get its pages.
        """
        needed = -(-len(sequence.token_ids) // self.page_size) - len(sequence.block_table)
        if needed <= 0:
            return True
        while not self._make_room(needed):
            if not preempt:
                return False
            youngest = max(self.running, key=lambda other: other.order)
            self._preempt(youngest)
            if youngest is sequence:
                return False
        last = sequence.block_table[-1] if sequence.block_table else None
        sequence.block_table += self.allocator.take(needed, last)
        return True

    def _make_room(self, pages: int) -> bool:
        """Evicts cached pages where needed; none when that would not be enough, others may still use them."""
        missing = pages - self.allocator.free
        if missing <= 0:
            return True
        if self.prefix_cache is None or missing > self.prefix_cache.evictable:
            return False
        return self.prefix_cache.evict(missing) == missing

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        older = sum(other.order < sequence.order for other in self.waiting)  # those wait for a neighbour's page
        self.waiting.insert(older, sequence)

    def _share(self, sequence: Sequence) -> None:
        if self.prefix_cache is not None:
            known = sequence.cache_ids[: sequence.computed]
            sequence.prefix_nodes = self.prefix_cache.insert(
                known, sequence.block_table, sequence.request.cache_salt, sequence.prefix_nodes
            )

    def _release(self, sequence: Sequence) -> None:
        self.allocator.give(sequence.block_table[len(sequence.prefix_nodes) :])
        if self.prefix_cache is not None:
            self.prefix_cache.unlock(sequence.prefix_nodes)
        sequence.block_table, sequence.prefix_nodes, sequence.features = [], [], {}
        sequence.computed = 0
