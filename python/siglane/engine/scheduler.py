"""Which tokens and which images the next step computes.

Continuous batching: sequences that decode come first, then prompts that are half read, then waiting requests in order
of arrival. Two budgets bind together: tokens for the language model and patches for the encoder.

Requests of a batch get what the others leave: nothing in a step that reads another's prompt, otherwise the next token
of their answers, and new prompts in proportion to what the others read. Their places and pages go first. One that is
passed over for long stops yielding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from siglane.engine.batch import Chunk, Sequence
from siglane.engine.cache.features import FeatureCache, FeatureKey
from siglane.engine.cache.kv import PageAllocator
from siglane.engine.cache.prefix import NextPage, PrefixCache

# while others are about, 1/BATCH_SHARE of what is read is a batch's, and at most so much of a step; it leaves as much
# of the places. Who comes next waits for a short step and finds room
BATCH_SHARE = 4
COMPANY_STEPS = 16  # since somebody else was there; clients that answer take some time to ask again
PATIENCE_STEPS = 64  # that a batch is passed over before its oldest request becomes one like any other


@dataclass(frozen=True, slots=True)
class StepBudget:
    """What one step may cost, and how many requests may run. guessing: rows of a step up to which its answers are
    guessed ahead."""

    tokens: int
    patches: int
    running: int
    guessing: int = 0


@dataclass(slots=True)
class Step:
    """A planned step. images_to_encode: first, and for each the sequences that want it, now or when they run, with its
    number there."""

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
        self._steps_without_company = COMPANY_STEPS
        self._steps_passed_over = 0
        self._credit = 0.0  # of a batch, in full steps that it may read

    @property
    def capacity(self) -> int:
        """Tokens one sequence can hold at most."""
        return self.allocator.total * self.page_size

    @property
    def has_clients(self) -> bool:
        """Whether somebody is here who does not yield."""
        return any(not one.yields for one in (*self.running, *self.waiting))

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def plan(self) -> Step:
        """The next step; its chunks have pages. Empty only when nothing waits or runs."""
        self._steps_without_company = 0 if self.has_clients else self._steps_without_company + 1
        for sequence in self._decodes_first():
            if sequence in self.running:  # growing an older one may have put it back into the queue
                self._grow(sequence)
        step = Step(tokens_left=self.budget.tokens, patches_left=self.budget.patches)
        self._decode(step, yields=False)
        nobody_waits = self._read(step, yields=False)
        self._credit = min(1.0, self._credit + self._work_since(step) / (BATCH_SHARE - 1))
        if nobody_waits and not any(chunk.reads for chunk in step.chunks):
            self._add_batch(step)
        self._note_passed_over(step)
        self._keep_images(step)
        self._guess(step)
        return step

    def commit(self, chunks: Iterable[Chunk]) -> None:
        """Marks chunks as computed and offers their full pages for reuse."""
        for sequence, start, stop, _ in chunks:
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

    @property
    def _has_company(self) -> bool:
        """Whether a batch shares the engine with others."""
        return self._steps_without_company < COMPANY_STEPS

    def _decodes_first(self) -> list[Sequence]:
        return sorted(self.running, key=lambda sequence: sequence.remaining > 1)

    def _decode(self, step: Step, yields: bool) -> None:
        for sequence in self.running:
            if sequence.yields == yields and sequence.remaining == 1:
                self._schedule(sequence, step)

    def _read(self, step: Step, yields: bool) -> bool:
        """Adds what is half read, then what waits; False when one of those has no room."""
        for sequence in self.running:
            if sequence.yields == yields and sequence.remaining > 1:
                self._schedule(sequence, step)
        return self._admit(step, yields)

    def _add_batch(self, step: Step) -> None:
        """What a batch gets of a step that reads nobody else's prompt."""
        if not self._has_company:
            self._decode(step, yields=True)
            self._read(step, yields=True)
            return
        step.tokens_left = min(step.tokens_left, max(1, self.budget.tokens // BATCH_SHARE))
        step.patches_left = min(step.patches_left, max(1, self.budget.patches // BATCH_SHARE))
        self._decode(step, yields=True)
        if self._credit > 0 or not step.chunks:
            before = step.tokens_left, step.patches_left
            self._read(step, yields=True)
            self._credit -= self._work_since(step, before)

    def _work_since(self, step: Step, before: tuple[int, int] | None = None) -> float:
        """In full steps. before: tokens and patches that were left then, None for all."""
        tokens, patches = before or (self.budget.tokens, self.budget.patches)
        return (tokens - step.tokens_left) / self.budget.tokens + (patches - step.patches_left) / self.budget.patches

    def _note_passed_over(self, step: Step) -> None:
        """However busy the others keep the engine, one request of a batch after the other gets its turn."""
        batch = [one for one in (*self.running, *self.waiting) if one.request.batch]
        if not batch or any(chunk.sequence.request.batch for chunk in step.chunks):
            self._steps_passed_over = 0
            return
        self._steps_passed_over += 1
        if self._steps_passed_over >= PATIENCE_STEPS:
            self._steps_passed_over = 0
            min(batch, key=lambda one: (not one.yields, one.order)).yields = False

    def _keep_images(self, step: Step) -> None:
        """Whoever waits and has an image that the step encodes for another keeps it: by his turn the cache may not."""
        if not step.images_to_encode:
            return
        for sequence in self.waiting:
            for image in range(len(sequence.request.images)):
                wanting = step.images_to_encode.get(sequence.feature_key(image))
                if wanting is not None and image not in sequence.features:
                    wanting.append((sequence, image))

    def _guess(self, step: Step) -> None:
        """Lengthens answers by tokens that may follow, with rows and pages that nobody else needs."""
        answering = [number for number, chunk in enumerate(step.chunks) if chunk.samples]
        rows = min(step.tokens_left, self.budget.guessing - len(answering))
        for place, number in enumerate(answering):
            chunk = step.chunks[number]
            sequence = chunk.sequence
            if sequence.lookup is None:
                continue
            share = max(1, rows // (len(answering) - place))
            room = min(rows, share, sequence.request.max_tokens - sequence.answered - 1)
            guesses = sequence.lookup.guess(sequence.cache_ids, room)
            guesses = guesses[: self._room_behind(sequence, len(guesses))]
            step.chunks[number] = chunk.with_guesses(guesses)
            step.tokens_left -= len(guesses)
            rows -= len(guesses)

    def _room_behind(self, sequence: Sequence, wanted: int) -> int:
        """Tokens that fit behind the known ones, on more pages as long as there are free ones for everybody else."""
        pages, length = sequence.block_table, len(sequence.token_ids)
        while length + wanted > len(pages) * self.page_size and self.allocator.free > len(self.running):
            pages += self.allocator.take(1, pages[-1])
        return len(pages) * self.page_size - length

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
            rows = self.features.rows(key, layout.rows)
            if rows is not None:
                sequence.features[image] = rows
                continue
            if step.images_to_encode and layout.patches > step.patches_left:
                return min(span.start for span in sequence.spans if span.image == image)
            step.images_to_encode[key] = [(sequence, image)]
            step.patches_left -= layout.patches
        return stop

    def _admit(self, step: Step, yields: bool) -> bool:
        """Starts waiting requests of one kind; False when one has no room. One whose next page a running neighbour is
        about to compute waits for that page."""
        under_way = self._pages_under_way(yields)
        for sequence in [one for one in self.waiting if one.yields == yields]:
            if step.tokens_left == 0:
                return False
            following = self._match(sequence)
            if following in under_way:
                self._give_pages(sequence)
                continue
            if not (self._find_place(sequence) and self._grow(sequence) and self._schedule(sequence, step)):
                self._give_pages(sequence)
                return False
            self.waiting.remove(sequence)
            taken = {one.table_row for one in self.running}
            sequence.table_row = next(row for row in range(self.budget.running) if row not in taken)
            self.running.append(sequence)
            if following is not None:
                under_way.add(following)
        return True

    def _find_place(self, sequence: Sequence) -> bool:
        """Whether a waiting request may run; one that does not yield takes the place of one that does."""
        places = self.budget.running
        if sequence.yields and self._has_company:
            places -= places // BATCH_SHARE
        if len(self.running) < places:
            return True
        victim = self._victim_of(sequence)
        if victim is not None:
            self._preempt(victim)
        return victim is not None

    def _match(self, sequence: Sequence) -> NextPage | None:
        """Takes the cached prefix of a waiting sequence; returns the page it has to compute first."""
        if self.prefix_cache is None:
            return None
        nodes, following = self.prefix_cache.match(sequence.cache_ids, sequence.request.cache_salt, sequence.next_read)
        self.prefix_cache.lock(nodes)
        sequence.prefix_nodes = nodes
        sequence.block_table = [node.page for node in nodes]
        sequence.computed = len(nodes) * self.page_size
        return following if following.key is not None else None

    def _pages_under_way(self, yields: bool) -> set[NextPage]:
        """The next page of every running sequence that is still reading its prompt. yields: of whoever would wait for
        it; nobody waits for one that yields to him."""
        if self.prefix_cache is None:
            return set()
        reading = (one for one in self.running if one.remaining > 1 and (yields or not one.yields))
        return {self.prefix_cache.match(one.cache_ids, one.request.cache_salt)[1] for one in reading}

    def _grow(self, sequence: Sequence) -> bool:
        """Gives a sequence pages for all of its known tokens.

        When none are left, cached prefixes go first, then `_victim_of` one after the other. False when it did not get
        its pages.
        """
        needed = -(-len(sequence.token_ids) // self.page_size) - len(sequence.block_table)
        if needed <= 0:
            return True
        while not self._make_room(needed):
            victim = self._victim_of(sequence)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        last = sequence.block_table[-1] if sequence.block_table else None
        sequence.block_table += self.allocator.take(needed, last)
        return True

    def _victim_of(self, sequence: Sequence) -> Sequence | None:
        """Who is put back into the queue for it: the youngest that yields, else for a running sequence the youngest, at
        last itself, and for a waiting one nobody."""
        running = sequence in self.running
        candidates = [one for one in self.running if running or (one.yields and not sequence.yields)]
        return max(candidates, key=lambda one: (one.yields, one.order), default=None)

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
            self.prefix_cache.insert(
                sequence.cache_ids,
                sequence.block_table,
                sequence.request.cache_salt,
                sequence.prefix_nodes,
                sequence.computed,
            )

    def _release(self, sequence: Sequence) -> None:
        self._give_pages(sequence)
        sequence.features = {}

    def _give_pages(self, sequence: Sequence) -> None:
        self.allocator.give(sequence.block_table[len(sequence.prefix_nodes) :])
        if self.prefix_cache is not None:
            self.prefix_cache.unlock(sequence.prefix_nodes)
        sequence.block_table, sequence.page_runs, sequence.prefix_nodes = [], [], []
        sequence.computed = 0
