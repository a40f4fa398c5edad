"""What runs on the device: images to features, a step's tokens to logits and choices, over memory that stays.

A step is three calls: `Device.plan` writes integers on the host, the device is called and enqueues, `Pending.result` is
the only one that waits.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from siglane.engine.attention.by_rows import PREFILLS_ALIKE, STEPS_ALIKE
from siglane.engine.attention.compiled import compiled_kernels, kept_dtype
from siglane.engine.attention.cuda import tried_kernels
from siglane.engine.attention.kernels import DecodeRows, Kernels, PrefillRows, StepAttention
from siglane.engine.attention.plain import EagerKernels, TorchKernels
from siglane.engine.attention.runs import RunKernels
from siglane.engine.attention.trial import Shape
from siglane.engine.batch import Chunk, StepBatch
from siglane.engine.blocks import CompiledBlocks, compiled_blocks
from siglane.engine.cache.kv import PagedKV
from siglane.engine.graphs import Capture, buckets_up_to, capture_on_cuda, record
from siglane.engine.limits import StepLimits, padded_rows
from siglane.engine.memory import LargestStep, kv_bytes
from siglane.engine.sampling.cuda import DeviceSampler, tried_choices
from siglane.engine.sampling.readouts import Readouts, read, rows_to_read
from siglane.engine.sampling.sampler import Choices, Choose, SampledToken, choose_on_host
from siglane.engine.scheduler import StepBudget
from siglane.engine.words import Held, PageTable, Written
from siglane.errors import EngineError
from siglane.families.model import VisionLanguageModel
from siglane.families.splice import ImageRows, splice
from siglane.lm.qwen import QwenModel
from siglane.settings.engine import EngineConfig
from siglane.types import ImagePatches

logger = logging.getLogger(__name__)


def build_device(
    model: VisionLanguageModel, config: EngineConfig, budget: StepBudget, eos_token_ids: frozenset[int]
) -> Device:
    """Allocates the KV cache: as large as asked, else as memory allows. UserError where there is not enough."""
    language, parameter = model.language, model.language.norm.weight
    device, dtype, on_cuda = parameter.device, parameter.dtype, parameter.is_cuda
    if on_cuda:  # which builds a plan for every new shape: 0.4 s for each page that a sequence grows by
        torch.backends.cuda.enable_cudnn_sdp(False)
    choose: Choose = choose_on_host
    if on_cuda:
        choose = DeviceSampler(budget.tokens, device, tried_choices(device, language.config.vocab_size))
    backend = config.resolve_paged_backend()
    kept = kept_dtype(language) if (device.type, backend) == ("cpu", "auto") else dtype
    pages = config.stated_pages
    if pages is None:
        largest = LargestStep(budget.patches, budget.tokens, budget.running)
        available = kv_bytes(model, largest, config.feature_bytes(language.config, dtype), choose)
        pages = config.pages_within(available, language.config, language.kv_heads, kept)
    kv = PagedKV(language.config, language.kv_heads, pages=pages, page_size=config.page_size, dtype=kept, device=device)
    limits = StepLimits.of(budget, min(language.config.max_position_embeddings, kv.tokens), config.page_size)
    kernels = choose_kernels(backend, kv, language, config.batch_invariant)
    buckets = buckets_up_to(budget.running) if on_cuda and kernels.records else ()
    packing = config.enable_packing and not config.batch_invariant
    blocks = compiled_blocks(language, kernels)
    made = Device(
        model, kv, kernels, limits, eos_token_ids, packing=packing, buckets=buckets, choose=choose, blocks=blocks
    )
    if buckets:
        with torch.cuda.device(device):  # whose streams a capture uses
            made.record(capture_on_cuda)
    return made


def choose_kernels(choice: str, kv: PagedKV, language: QwenModel, batch_invariant: bool = False) -> Kernels:
    """choice: auto, torch or eager. batch_invariant: on CUDA; EngineError where no kernel is that is right."""
    if batch_invariant:
        return tried_kernels(Shape.of(language, kv), kv, STEPS_ALIKE, PREFILLS_ALIKE)
    if choice == "eager":
        return EagerKernels(kv)
    if kv.keys.device.type == "cpu":
        return (compiled_kernels(kv, language) if choice == "auto" else None) or RunKernels(kv)
    return TorchKernels(kv) if choice == "torch" else tried_kernels(Shape.of(language, kv), kv)


class StepPlan(NamedTuple):
    """One step as the host knows it. chunks: the first `decodes` are a row each; batch: the same in the order in which
    they were planned; bucket: rows of a step that only decodes and is padded to so many; written, held: its numbers,
    and the pages that are new in them; spans, images: what images fill of the step's rows, and all rows of each."""

    chunks: tuple[Chunk, ...]
    batch: tuple[Chunk, ...]
    decodes: int
    bucket: int | None
    written: Written
    held: list[Held]
    spans: list[ImageRows]
    images: list[torch.Tensor]


class Computed(NamedTuple):
    """What a forward gives. logits `[N, vocab_size]`: a row for every token that its chunks choose, in order; readouts:
    of each chunk what it wants of its own prompt."""

    logits: torch.Tensor
    readouts: list[Readouts]


class Result(NamedTuple):
    """What a step gives one of its chunks: what was chosen behind it, and what it was told of its prompt."""

    chunk: Chunk
    choices: list[SampledToken | EngineError]
    readouts: Readouts


class Pending(NamedTuple):
    """A step under way. counts: tokens chosen behind each of the plan's chunks; choices: waits for them."""

    plan: StepPlan
    readouts: list[Readouts]
    counts: list[int]
    choices: Callable[[], Choices]

    def result(self) -> list[Result]:
        """In the order of the batch."""
        chunks, choices = self.plan.chunks, iter(self.choices())
        found = {
            chunk.sequence: Result(chunk, list(itertools.islice(choices, count)), readouts)
            for chunk, count, readouts in zip(chunks, self.counts, self.readouts, strict=True)
        }
        return [found[chunk.sequence] for chunk in self.plan.batch]


class Device:
    """One for each engine. Steps are rows of static memory: numbers come in through `Written`, pages through a
    `PageTable`, keys and values stay in `kv`.

    buckets: sizes to which steps that only decode are padded; without any, a step has as many rows as there are. With
    kernels that record, every step of a size is the same operations on the same memory. choose: tokens from logits.
    blocks: what computes steps that only decode in one call, where there is such a thing.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        kv: PagedKV,
        kernels: Kernels,
        limits: StepLimits,
        eos_token_ids: frozenset[int] = frozenset(),
        *,
        packing: bool = True,
        buckets: Sequence[int] = (),
        choose: Choose = choose_on_host,
        blocks: CompiledBlocks | None = None,
    ) -> None:
        self.model, self.kv, self.kernels, self.limits = model, kv, kernels, limits
        self.device, self.dtype = kv.keys.device, model.language.norm.weight.dtype
        self.vocab_size = model.language.config.vocab_size
        self.packing, self.eos_token_ids = packing, eos_token_ids
        self.buckets = tuple(sorted(buckets))
        self.choose, self._blocks = choose, blocks
        self._table = PageTable(limits.running + 1, limits.columns, self.device)
        self._words = torch.zeros(limits.numbers, dtype=torch.int64, device=self.device)
        self._replays: dict[int, Callable[[], torch.Tensor]] = {}
        self._turns = itertools.cycle([Written(limits.numbers, self.device) for _ in range(2)])

    @torch.inference_mode()
    def record(self, capture: Capture) -> None:
        """Steps of all `buckets` are replayed from now on, where they can be captured; for kernels that record."""
        self._replays = record(self.buckets, self._padding_alone, capture)

    @property
    def recorded(self) -> tuple[int, ...]:
        """Sizes of steps that are replayed."""
        return tuple(sorted(self._replays))

    def encode(self, images: Sequence[ImagePatches]) -> tuple[torch.Tensor, ...]:
        """All images in one packed forward, or each in its own -> each image's rows `[layout.rows, hidden_size]`, in
        the basis of the language model's blocks."""
        groups = [images] if self.packing else [[image] for image in images]
        found = (rows.to(self.dtype) for group in groups for rows in self.model.see(group).split())
        return tuple(self.model.language.turned(rows) for rows in found)

    def encode_isolated(self, images: Sequence[ImagePatches]) -> list[torch.Tensor | EngineError]:
        """All images together; when that raises, each alone, so that one image never takes others with it."""
        try:
            return list(self.encode(images))
        except torch.AcceleratorError:  # the device is lost for this process: end it, its supervisor starts another
            raise
        except Exception as error:
            message = "encoding %d images failed (%s); trying each alone"
            logger.warning(message, len(images), type(error).__name__, exc_info=len(images) > 1)
        encoded: list[torch.Tensor | EngineError] = []
        for image in images:
            try:
                encoded.append(self.encode([image])[0])
            except torch.AcceleratorError:
                raise
            except Exception as error:
                logger.exception("encoding one image failed")
                encoded.append(EngineError(f"an image could not be encoded ({type(error).__name__})"))
        return encoded

    def plan(self, batch: StepBatch) -> StepPlan:
        """RuntimeError when an image has other rows than its layout says."""
        chunks = tuple(sorted(batch.chunks, key=lambda chunk: chunk.tokens > 1))
        decodes = sum(chunk.tokens == 1 for chunk in chunks)
        spans, images, first = list[ImageRows](), list[torch.Tensor](), 0
        for chunk in chunks:
            for span in chunk.spans if chunk.reads else ():
                spans.append(span.moved(first))
                images.append(chunk.rows(span.image))
            first += chunk.tokens
        padded = decodes == len(chunks) and not spans and not any(chunk.wanted for chunk in chunks)
        bucket = next((size for size in self.buckets if size >= decodes), None) if padded else None
        written = next(self._turns)
        held = [Held(one.table_row, one.block_table, len(one.block_table)) for one, *_ in chunks]
        written.write(self._numbers(chunks, decodes, 0 if bucket is None else bucket - decodes, held))
        return StepPlan(chunks, batch.chunks, decodes, bucket, written, held, spans, images)

    def __call__(self, plan: StepPlan) -> Pending:
        """Enqueues the step. Running the same plan again gives the same."""
        logits, readouts = self.forward(plan)
        wanted = [chunk.next_tokens for chunk in plan.chunks]  # while the device computes
        every = list(itertools.chain.from_iterable(wanted))
        choices = self.choose(logits, every, self.eos_token_ids) if every else list
        return Pending(plan, readouts, [len(own) for own in wanted], choices)

    def forward(self, plan: StepPlan) -> Computed:
        """Writes the step's keys and values."""
        tokens, positions, slots, rows, lengths, chosen, reading, *others = plan.written.copy_to(self._words)
        prefill_rows, cu_seqlens_q, cu_seqlens_k, *news = others
        self._table.put(plan.held, *news)
        if plan.bucket is not None:
            replay = self._replays.get(plan.bucket)
            logits = self._padded_logits(plan.bucket, plan.chunks) if replay is None else replay()
            return Computed(_rows(logits, chosen, len(plan.chunks)), [()] * len(plan.chunks))
        table, decodes, prefills = self._table.pages, None, None
        if plan.decodes:
            decodes = DecodeRows(table, rows, lengths, plan.chunks[: plan.decodes])
        if plan.decodes < len(plan.chunks):
            chunks = plan.chunks[plan.decodes :]
            prefills = PrefillRows(table, prefill_rows, cu_seqlens_q.int(), cu_seqlens_k.int(), chunks)
        embeds = splice(self.model.language.embed_turned(tokens), plan.spans, plan.images)
        hidden = self._hidden(embeds, positions, slots, decodes, prefills)
        readouts = read(self.model.language, hidden, reading, plan.chunks)
        return Computed(self.model.language.logits(_rows(hidden, chosen, len(hidden))), readouts)

    def _padded_logits(self, bucket: int, chunks: tuple[Chunk, ...] = ()) -> torch.Tensor:
        """`[bucket, vocab_size]` of a step that only decodes, from what lies at the beginning of the words."""
        tokens, positions, slots, rows, lengths = self._words[: 5 * bucket].view(5, bucket).unbind()
        decodes = DecodeRows(self._table.pages, rows, lengths, () if self.kernels.records else chunks)
        hidden = self._hidden(self.model.language.embed_turned(tokens), positions, slots, decodes, None)
        return self.model.language.logits(hidden)

    def _padding_alone(self, bucket: int) -> Callable[[], torch.Tensor]:
        """A step of so many rows that are nobody's."""
        written = next(self._turns)
        written.write(self._numbers((), 0, bucket, ()))
        written.copy_to(self._words)
        return partial(self._padded_logits, bucket)

    def _hidden(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        decodes: DecodeRows | None,
        prefills: PrefillRows | None,
    ) -> torch.Tensor:
        kernels, blocks = self.kernels, self._blocks
        if prefills is None and decodes is not None and blocks is not None and len(embeds) <= blocks.most:
            return blocks(embeds, positions, slots, decodes)
        attention = StepAttention(
            kernels,
            slots,
            0 if decodes is None else len(decodes.rows),
            None if decodes is None else kernels.decode(decodes),
            None if prefills is None else kernels.prefill(prefills),
        )
        rows = len(embeds)
        if padding := padded_rows(rows, self.device.type) - rows:
            embeds, positions = F.pad(embeds, (0, 0, 0, padding)), F.pad(positions, (0, padding))
        return self.model.language.decode(embeds, positions, attention)[:rows]

    def _numbers(self, chunks: tuple[Chunk, ...], decodes: int, padding: int, held: Sequence[Held]) -> list[list[int]]:
        """tokens, positions, slots; rows of the table and lengths of what decodes; rows that choose a token, rows that
        are read; of prefills the table's rows and where their queries and keys begin; what is new in the table: rows,
        columns, pages."""
        zeros = [0] * padding
        places = [range(chunk.start, chunk.stop) for chunk in chunks]
        reading = chunks[decodes:]
        starts_q = itertools.accumulate((chunk.tokens for chunk in reading), initial=0)
        starts_k = itertools.accumulate((chunk.stop for chunk in reading), initial=0)
        return [
            [token_id for chunk in chunks for token_id in chunk.token_ids] + zeros,
            [*itertools.chain.from_iterable(places), *zeros],
            StepBatch(chunks).slots(self.kv.page_size) + zeros,
            [chunk.sequence.table_row for chunk in chunks[:decodes]] + [self.limits.running] * padding,
            [chunk.stop for chunk in chunks[:decodes]] + [1] * padding,
            _choosing(chunks),
            rows_to_read(chunks),
            [chunk.sequence.table_row for chunk in reading],
            [*starts_q],
            [*starts_k],
            *self._table.news(held),
        ]


def _choosing(chunks: Sequence[Chunk]) -> list[int]:
    """Rows behind which a token is chosen: the last of a chunk that ends what is known, those of its guesses too."""
    rows, end = list[int](), 0
    for chunk in chunks:
        end += chunk.tokens
        if chunk.samples:
            rows += range(end - 1 - len(chunk.guesses), end)
    return rows


def finite(encoded: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each image whether all of its rows are, bool `[B]` where they lie: to be read with the step's result."""
    return torch.stack([rows.isfinite().all() for rows in encoded]) if encoded else torch.empty(0)


def _rows(rows: torch.Tensor, chosen: torch.Tensor, count: int) -> torch.Tensor:
    """Those that are chosen of the first `count`, which all of them mostly are."""
    return rows[:count] if len(chosen) == count else rows.index_select(0, chosen)
