"""The engine: requests in, token deltas out, one step at a time. Runs in the caller's thread (`process/supervisor.py`
gives it a process of its own)."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch

from siglane.config.vlm import Thinking
from siglane.engine.answers.thinking import thinking_budget, thinking_start
from siglane.engine.batch import Chunk, Sequence, StepBatch
from siglane.engine.cache.features import FeatureCache, FeatureKey
from siglane.engine.cache.kv import SCRATCH_PAGES, PageAllocator
from siglane.engine.cache.prefix import PrefixCache
from siglane.engine.constraints.constraint import Constrained, Grammars
from siglane.engine.device import Result, build_device, finite
from siglane.engine.limits import step_budget
from siglane.engine.lookup import Lookup
from siglane.engine.sampling.parameters import check_for_model
from siglane.engine.sampling.sampler import SampledToken, bad_logits
from siglane.engine.scheduler import Scheduler
from siglane.errors import EngineError, UserError
from siglane.families.model import VisionLanguageModel
from siglane.settings.engine import EngineConfig
from siglane.types import Finished, FinishReason, Readout, Request, TokenDelta

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for /metrics and tests; counters only grow."""

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    pages_cached: int
    feature_bytes: int
    feature_hits: int
    feature_misses: int
    encoded_images: int
    cached_tokens: int
    computed_tokens: int
    steps: int


class Encoded(NamedTuple):
    """An image behind the tower, which may have given NaN. wanting: who has it, and under which number."""

    key: FeatureKey
    wanting: list[tuple[Sequence, int]]
    rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class Grown:
    """What a step did for one sequence. chunk: what of it remains; tokens: those it was given; readouts: what it was
    told of its prompt; reason: why the answer ends; error: why the sequence ends after them."""

    chunk: Chunk
    tokens: list[SampledToken]
    readouts: tuple[Readout, ...] = ()
    reason: FinishReason | None = None
    error: EngineError | None = None


class Engine:
    """Continuous batching over a paged cache. A request that fails ends alone, with an "error" delta.

    thinking: how the model marks its reasoning, None for one that does not reason. context_length: tokens of a prompt
    and its answer together, the model's or the fewer that the KV cache holds. grammars: that answers can be held to,
    None for none.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        config: EngineConfig,
        eos_token_ids: tuple[int, ...],
        thinking: Thinking | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.config, self.eos_token_ids, self.thinking = config, frozenset(eos_token_ids), thinking
        self._grammars = grammars
        budget = step_budget(config, model.language.norm.weight.device.type)
        self.runner = build_device(model, config, budget, self.eos_token_ids)
        self.allocator = PageAllocator(self.runner.kv.tokens // config.page_size, SCRATCH_PAGES)
        self.prefix_cache = PrefixCache(self.allocator, config.page_size) if config.prefix_cache else None
        self.features = FeatureCache(config.feature_bytes(model.language.config, self.runner.dtype))
        self.scheduler = Scheduler(budget, self.allocator, self.prefix_cache, self.features, config.page_size)
        positions, capacity = model.language.config.max_position_embeddings, self.scheduler.capacity
        self.context_length = min(positions, capacity)
        if capacity < positions:
            message = "the KV cache holds %d tokens, fewer than the model's %d; see kv_tokens"
            logger.warning(message, capacity, positions)
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = 0
        self._encoded_images = self._cached_tokens = self._computed_tokens = self._steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def has_clients(self) -> bool:
        """Whether it works for anybody but a batch."""
        return self.scheduler.has_clients

    def add(self, request: Request) -> None:
        """Queues a request. UserError when it can never run: no room for an answer, sampling that cannot be done."""
        length, sampling = len(request.prompt.token_ids), request.sampling
        if request.request_id in self._sequences:
            raise ValueError(f"request id {request.request_id!r} is in use")
        if length == 0:
            raise UserError("the prompt is empty; give it at least one token", code="empty_prompt")
        if length + min(1, request.max_tokens) > self.context_length:
            raise UserError(
                f"the prompt has {length} tokens, the context holds {self.context_length}; shorten it",
                code="context_length_exceeded",
            )
        check_for_model(sampling, self.runner.vocab_size, self.thinking)
        if not all(0 <= token_id < self.runner.vocab_size for read in request.reads for token_id in read.token_ids):
            raise UserError(f"token ids are below {self.runner.vocab_size}", code="invalid_value")
        budget = thinking_budget(sampling, request.prompt.token_ids, self.thinking, self.eos_token_ids)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        guessed = sampling.num_speculative_tokens
        most = self.config.num_speculative_tokens if guessed is None else guessed
        lookup = Lookup(most) if most else None
        sequence = Sequence.of(request, self._arrivals, seed, budget, self._constrained(request), lookup)
        self._arrivals += 1
        self._sequences[request.request_id] = sequence
        self.scheduler.add(sequence)

    def warm_up(self) -> None:
        """What only a first request would find missing."""
        if self._grammars is not None:
            self._grammars.warm_up()

    def _constrained(self, request: Request) -> Constrained | None:
        constraint = request.sampling.constraint
        if constraint is None:
            return None
        if self._grammars is None:
            raise UserError(
                "this engine knows no tokenizer, so it holds no answer to a grammar", code="unsupported_field"
            )
        prompt_ids, thinking = request.prompt.token_ids, None if request.raw else self.thinking
        start = "closed" if thinking is None else thinking_start(prompt_ids, thinking, self.eos_token_ids)
        return self._grammars.start(constraint, thinking, start)

    def abort(self, request_id: str) -> TokenDelta | None:
        """Ends a request now and frees its pages. None when it has already ended."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else self._end(sequence, "abort")

    @torch.inference_mode()
    def step(self) -> list[TokenDelta]:
        """One forward: what it adds to each request, in the order of the batch."""
        step = self.scheduler.plan()
        self._note_start(step.chunks)
        encoded, deltas = self._encode(step.images_to_encode)
        all_finite = finite([one.rows for one in encoded])
        computed, failed = self._compute([chunk for chunk in step.chunks if self._is_alive(chunk)])
        deltas += failed + self._settle(encoded, all_finite.tolist())
        alive = [one for one in computed if self._is_alive(one.chunk)]
        grown = [self._grow(one) for one in alive]
        self.scheduler.commit(one.chunk for one in grown if one.error is None)  # nobody reuses NaN
        self._computed_tokens += sum(one.chunk.tokens for one in alive)
        self._steps += 1
        return deltas + [delta for one in grown for delta in self._deltas(one)]

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            pages_total=self.allocator.total,
            pages_free=self.allocator.free,
            pages_cached=self.prefix_cache.pages if self.prefix_cache else 0,
            feature_bytes=self.features.bytes,
            feature_hits=self.features.hits,
            feature_misses=self.features.misses,
            encoded_images=self._encoded_images,
            cached_tokens=self._cached_tokens,
            computed_tokens=self._computed_tokens,
            steps=self._steps,
        )

    def _is_alive(self, chunk: Chunk) -> bool:
        return chunk.sequence.request.request_id in self._sequences

    def _note_start(self, chunks: list[Chunk]) -> None:
        now = time.monotonic()
        for chunk in chunks:
            if not chunk.sequence.started:
                chunk.sequence.started = now
                chunk.sequence.cached_tokens = chunk.start
                self._cached_tokens += chunk.start

    def _encode(
        self, images_to_encode: dict[FeatureKey, list[tuple[Sequence, int]]]
    ) -> tuple[list[Encoded], list[TokenDelta]]:
        """Gives every miss its features; those, and the deltas of requests whose image cannot be encoded."""
        if not images_to_encode:
            return [], []
        begin = time.monotonic()
        images = [wanting[0][0].request.images[wanting[0][1]] for wanting in images_to_encode.values()]
        found = self.runner.encode_isolated(images)
        seconds = time.monotonic() - begin
        for sequence in {sequence for wanting in images_to_encode.values() for sequence, _ in wanting}:
            # one that still waits has no part in it; again after a preemption it is a part of its decode time
            if sequence.started and not sequence.prefilled:
                sequence.encode_seconds += seconds
        encoded, failed = list[Encoded](), list[TokenDelta]()
        for (key, wanting), rows in zip(images_to_encode.items(), found, strict=True):
            if isinstance(rows, EngineError):
                failed += self._fail(wanting, rows)
                continue
            encoded.append(Encoded(key, wanting, rows))
            for sequence, image in wanting:
                sequence.features[image] = rows
        return encoded, failed

    def _settle(self, encoded: list[Encoded], finite: list[bool]) -> list[TokenDelta]:
        """Keeps the images whose rows are finite for others, and ends the requests of all others."""
        failed = list[TokenDelta]()
        for one, good in zip(encoded, finite, strict=True):
            if good:
                self.features.keep(one.key, one.rows)
                self._encoded_images += 1
                one.wanting[0][0].encoded_images += 1
            else:
                message = "the vision tower gave NaN or infinite features for an image"
                failed += self._fail(one.wanting, EngineError(message, code="engine_nan"))
        return failed

    def _fail(self, wanting: list[tuple[Sequence, int]], error: EngineError) -> list[TokenDelta]:
        """Ends who wants an image that is none."""
        failed = list[TokenDelta]()
        for sequence, _ in wanting:
            if sequence.request.request_id in self._sequences:
                logger.error("a request failed: %s", error, extra=sequence.request.log_fields)
                failed.append(self._end(sequence, "error", error=error))
        return failed

    def _compute(self, chunks: list[Chunk]) -> tuple[list[Result], list[TokenDelta]]:
        """The chunks that were computed, and the deltas of requests that failed."""
        if not chunks:
            return [], []
        try:
            return self._run(chunks), []
        except torch.AcceleratorError:
            raise
        except Exception as error:
            message = "a step of %d requests failed (%s); trying each alone"
            logger.warning(message, len(chunks), type(error).__name__, exc_info=len(chunks) > 1)
        computed, failed = list[Result](), []
        for chunk in chunks:
            try:
                computed += self._run([chunk])
            except torch.AcceleratorError:
                raise
            except Exception as error:
                logger.exception("a request failed", extra=chunk.sequence.request.log_fields)
                reason = EngineError(f"the request could not be computed ({type(error).__name__})")
                failed.append(self._end(chunk.sequence, "error", error=reason))
        return computed, failed

    def _run(self, chunks: list[Chunk]) -> list[Result]:
        return self.runner(self.runner.plan(StepBatch(tuple(chunks)))).result()

    def _grow(self, result: Result) -> Grown:
        """Adds to a sequence what was chosen behind it, as long as that is what was guessed, and one more."""
        chunk, choices, readouts = result
        sequence, tokens = chunk.sequence, list[SampledToken]()
        if any(math.isnan(logprob) for readout in readouts for logprob in readout.logprobs):
            return Grown(chunk, tokens, error=bad_logits())
        sequence.reads_told += len(readouts)
        if chunk.ends and not sequence.prefilled:
            sequence.prefilled = time.monotonic()
        reason: FinishReason | None = None if choices or not chunk.ends else "length"  # there, of no tokens
        for guess, choice in itertools.zip_longest(chunk.guesses, choices):
            if isinstance(choice, EngineError):
                return Grown(chunk, tokens, readouts, error=choice)
            sequence.append(choice.token_id)
            tokens.append(choice)
            reason = self._end_reason(sequence)
            if reason is not None or choice.token_id != guess:
                break
        right = sum(token.token_id == guess for token, guess in zip(tokens, chunk.guesses, strict=False))
        if sequence.lookup is not None and chunk.guesses:
            sequence.lookup.note(len(chunk.guesses), right)
        return Grown(chunk.kept(right), tokens, readouts, reason)

    def _end_reason(self, sequence: Sequence) -> FinishReason | None:
        """Whether its last token ends an answer."""
        request, params, token_id = sequence.request, sequence.request.sampling, sequence.token_ids[-1]
        ends = token_id in self.eos_token_ids and not (params.ignore_eos and params.constraint is None)
        if ends or token_id in params.stop_token_ids:
            return "stop"
        full = sequence.answered >= request.max_tokens or len(sequence.token_ids) >= self.context_length
        return "length" if full else None

    def _deltas(self, grown: Grown) -> list[TokenDelta]:
        sequence, tokens, request_id = grown.chunk.sequence, grown.tokens, grown.chunk.sequence.request.request_id
        plain = tokens[:-1] if grown.reason else tokens
        deltas = [TokenDelta(request_id, readouts=grown.readouts)] if grown.readouts else []
        deltas += [TokenDelta(request_id, token.token_id, token.logprob) for token in plain]
        if grown.error is not None:
            return [*deltas, self._end(sequence, "error", error=grown.error)]
        last = tokens[-1] if tokens else None
        return deltas if grown.reason is None else [*deltas, self._end(sequence, grown.reason, last)]

    def _end(
        self, sequence: Sequence, reason: FinishReason, last: SampledToken | None = None, error: Exception | None = None
    ) -> TokenDelta:
        request_id, lookup = sequence.request.request_id, sequence.lookup
        del self._sequences[request_id]
        self.scheduler.finish(sequence)
        finished = Finished(
            reason,
            matched_stop=last.token_id if last and reason == "stop" else None,
            error=error,
            cached_tokens=sequence.cached_tokens,
            encoded_images=sequence.encoded_images,
            accepted_prediction_tokens=0 if lookup is None else lookup.accepted,
            rejected_prediction_tokens=0 if lookup is None else lookup.rejected,
            timings=sequence.timings(time.monotonic()),
        )
        return TokenDelta(request_id, last and last.token_id, last and last.logprob, finished)
