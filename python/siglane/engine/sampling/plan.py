"""What the choices of a step go by: numbers of the host, and the same where the logits lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from siglane.engine.batch import NextToken
from siglane.engine.constraints.constraint import Words, mask_words
from siglane.engine.edits import Edits, Pairs, PairTensors
from siglane.engine.sampling.noise import noise_key
from siglane.engine.sampling.sampler import SMALLEST_TEMPERATURE, WINDOW

PAIRS = 1 << 16  # of all rows of a step: with more, a row is the host's
MASK_WORDS = 1 << 18  # the same of grammars' masks: those of 110 rows of a vocabulary of 151,936
ROW_NUMBERS = 10  # that a row has at most, beside its pairs and its mask
NO_WORDS: Words = np.empty(0, np.int64)


def most_numbers(rows: int) -> int:
    """Of a plan of at most so many rows."""
    return ROW_NUMBERS * rows + 2 * PAIRS + MASK_WORDS


class Row(NamedTuple):
    """Both keys of its noise; forced: the id that is chosen, else -1."""

    first_key: int
    second_key: int
    temperature: float
    forced: int


class Filter(NamedTuple):
    """Of a row with top-k, top-p or min-p."""

    row: int
    top_k: int
    top_p: float
    min_p: float


@dataclass(slots=True)
class SamplingPlan:
    """A step's rows in numbers of the host. reported: rows whose log-probabilities are wanted, and of how many tokens,
    `top` at most; masked: rows that are held to a grammar, and their masks; host: rows that are not chosen here."""

    rows: list[Row] = field(default_factory=list)
    filters: list[Filter] = field(default_factory=list)
    reported: dict[int, int] = field(default_factory=dict)
    masked: dict[int, Words] = field(default_factory=dict)
    pairs: Pairs = field(default_factory=Pairs)
    host: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, next_tokens: Sequence[NextToken], eos_token_ids: frozenset[int], vocab_size: int) -> SamplingPlan:
        plan, room, most_masks = cls(), PAIRS, MASK_WORDS // mask_words(vocab_size)
        for row, one in enumerate(next_tokens):
            params = one.request.sampling
            edits = Edits.of(params, one.answered, one.tally, eos_token_ids) if one.forced_id is None else None
            pairs = 0 if edits is None else edits.most
            temperature = max(params.temperature, SMALLEST_TEMPERATURE) if params.temperature else 0.0
            forced = -1 if one.forced_id is None else one.forced_id
            plan.rows.append(Row(*noise_key(one.seed, one.answered), temperature, forced))
            held, mask = _mask(one)
            crowded = pairs > room or (mask is not None and len(plan.masked) == most_masks)
            if not held or crowded or max(params.top_k, params.logprobs or 0) > WINDOW:
                plan.host.append(row)
                continue
            room -= pairs
            if mask is not None:
                plan.masked[row] = mask
            if edits is not None:
                edits.note(plan.pairs, row, vocab_size)
            if params.temperature and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0):
                plan.filters.append(Filter(row, params.top_k, params.top_p, params.min_p))
            if params.logprobs is not None:
                plan.reported[row] = params.logprobs
        return plan

    @property
    def top(self) -> int:
        return max(self.reported.values(), default=0)

    def words(self) -> list[Sequence[int] | Words]:
        """As `Numbers.of` takes them apart."""
        first_keys, second_keys, temperatures, forced = _columns(self.rows, len(Row._fields))
        filtered, top_k, top_p, min_p = _columns(self.filters, len(Filter._fields))
        pairs = self.pairs
        return [
            first_keys + second_keys, _bits(temperatures), forced,
            filtered, top_k, _bits(top_p), _bits(min_p), [*self.reported],
            pairs.biased, _bits(pairs.biases), pairs.banned, pairs.repeated, _bits(pairs.penalties),
            pairs.counted, _bits(pairs.amounts), [*self.masked], np.concatenate([*self.masked.values(), NO_WORDS]),
        ]  # fmt: skip


def _mask(one: NextToken) -> tuple[bool, Words | None]:
    """What it may be, None for anything. The first is False where its grammar cannot say: the host asks it again, and
    tells the request why."""
    if one.constrained is None or one.forced_id is not None:
        return True, None
    try:
        return True, one.constrained.mask(one.guesses)
    except Exception:
        return False, None


class Filters(NamedTuple):
    """rows i64 `[F]`; top_k i64, top_p float64, min_p float32 `[F, 1]`."""

    rows: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


class Numbers(NamedTuple):
    """`SamplingPlan` on the device: keys i64 `[2, N]`, temperatures float32, forced i64 `[N]`; reported i64 `[R]`;
    masked i64 `[M]`, masks i32 `[M, words]`."""

    keys: torch.Tensor
    temperatures: torch.Tensor
    forced: torch.Tensor
    filters: Filters
    reported: torch.Tensor
    pairs: PairTensors
    masked: torch.Tensor
    masks: torch.Tensor

    @property
    def edited(self) -> bool:
        """Whether any row's scores are others than its logits."""
        return any(map(len, self.pairs)) or len(self.masked) > 0

    @classmethod
    def of(cls, words: Sequence[torch.Tensor]) -> Numbers:
        keys, temperatures, forced, rows, top_k, top_p, min_p, reported, *pairs, masked, masks = words
        filters = Filters(rows, top_k[:, None], _floats(top_p)[:, None], _floats(min_p)[:, None].float())
        biased, biases, banned, repeated, penalties, counted, amounts = pairs
        edits = PairTensors(
            biased, _floats(biases).float(), banned, repeated, _floats(penalties).float(), counted,
            _floats(amounts).float(),
        )  # fmt: skip
        masks = masks.view(torch.int32).view(len(masked), -1) if len(masked) else masks
        return cls(keys.view(2, -1), _floats(temperatures).float(), forced, filters, reported, edits, masked, masks)


def _columns(rows: Sequence[tuple[Any, ...]], width: int) -> list[tuple[Any, ...]]:
    """rows of `width` numbers each -> `width` columns, empty ones where there are no rows."""
    return [*zip(*rows, strict=True)] or [()] * width


def _bits(numbers: Sequence[float]) -> list[int]:
    """As integers that the same memory would hold."""
    found: list[int] = np.asarray(numbers, np.float64).view(np.int64).tolist()
    return found


def _floats(words: torch.Tensor) -> torch.Tensor:
    return words.view(torch.float64)
