"""What a request adds to its logits before a token is chosen: bias, minimum length and penalties, as few pairs of
token and value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from siglane.types import SamplingParams


class Tally:
    """How often each token of a sequence was answered, kept as it grows; those of its prompt that were not, 0 times."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self.times = dict.fromkeys(prompt_ids, 0)

    @classmethod
    def wanted(cls, params: SamplingParams, prompt_ids: Iterable[int]) -> Tally | None:
        """None where no penalty would read it."""
        if params.repetition_penalty != 1:
            return cls(prompt_ids)
        return cls(()) if params.frequency_penalty or params.presence_penalty else None

    def with_more(self, token_ids: Iterable[int]) -> Tally:
        """A copy that has seen those too."""
        more = Tally(())
        more.times = dict(self.times)
        for token_id in token_ids:
            more.add(token_id)
        return more

    def add(self, token_id: int) -> None:
        self.times[token_id] = self.times.get(token_id, 0) + 1


@dataclass(slots=True)
class Pairs:
    """What is to be done where, in host numbers, for rows of scores one behind another: a place is `row * vocab_size +
    token id`. biases are added, banned become -inf, repeated are made less likely by the factors of `penalties`,
    amounts are subtracted: in this order."""

    biased: list[int] = field(default_factory=list)
    biases: list[float] = field(default_factory=list)
    banned: list[int] = field(default_factory=list)
    repeated: list[int] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    amounts: list[float] = field(default_factory=list)


class PairTensors(NamedTuple):
    """`Pairs` where the scores lie: places i64, numbers float32."""

    biased: torch.Tensor
    biases: torch.Tensor
    banned: torch.Tensor
    repeated: torch.Tensor
    penalties: torch.Tensor
    counted: torch.Tensor
    amounts: torch.Tensor


def edit(scores: torch.Tensor, pairs: PairTensors) -> None:
    """scores float32, flat: are written to. In vLLM's order and with its meanings; nothing is read on the host."""
    if len(pairs.biased):
        scores.index_add_(0, pairs.biased, pairs.biases)
    if len(pairs.banned):
        scores.index_fill_(0, pairs.banned, -torch.inf)
    if len(pairs.repeated):
        before = scores.index_select(0, pairs.repeated)
        after = torch.where(before > 0, before / pairs.penalties, before * pairs.penalties)
        scores.index_copy_(0, pairs.repeated, after)
    if len(pairs.counted):
        scores.index_add_(0, pairs.counted, pairs.amounts, alpha=-1)


@dataclass(frozen=True, slots=True)
class Edits:
    """For one row, in host numbers. banned: ids that may not be chosen yet; tally: the sequence's own, read at once."""

    params: SamplingParams
    banned: tuple[int, ...]
    tally: Tally | None

    @classmethod
    def of(
        cls, params: SamplingParams, answered: int, tally: Tally | None, eos_token_ids: frozenset[int]
    ) -> Edits | None:
        """None where logits stay as they are. answered: tokens of the answer so far."""
        early = answered < params.min_tokens
        banned = tuple(sorted({*eos_token_ids, *params.stop_token_ids})) if early else ()
        if params.logit_bias or banned or tally is not None:
            return cls(params, banned, tally)
        return None

    @property
    def most(self) -> int:
        """Pairs that `note` adds at most."""
        return len(self.params.logit_bias) + len(self.banned) + (2 * len(self.tally.times) if self.tally else 0)

    def note(self, pairs: Pairs, row: int, vocab_size: int) -> None:
        """Adds this row's to `pairs`. Placeholders and ends may lie outside the vocabulary."""
        params, first = self.params, row * vocab_size
        for token_id, bias in params.logit_bias:
            pairs.biased.append(first + token_id)
            pairs.biases.append(bias)
        pairs.banned += [first + token_id for token_id in self.banned if 0 <= token_id < vocab_size]
        if self.tally is None:
            return
        times = self.tally.times
        if params.repetition_penalty != 1:
            seen = [first + token_id for token_id in times if 0 <= token_id < vocab_size]
            pairs.repeated += seen
            pairs.penalties += [params.repetition_penalty] * len(seen)
        if params.frequency_penalty or params.presence_penalty:
            answered = [token_id for token_id, count in times.items() if count]
            pairs.counted += [first + token_id for token_id in answered]
            amounts = (params.frequency_penalty * times[token_id] + params.presence_penalty for token_id in answered)
            pairs.amounts += amounts

    def applied(self, logits: torch.Tensor) -> torch.Tensor:
        """logits `[vocab_size]` of the host -> others."""
        scores, pairs = logits.clone(), Pairs()
        self.note(pairs, 0, len(scores))
        edit(
            scores,
            PairTensors(
                torch.tensor(pairs.biased, dtype=torch.long),
                scores.new_tensor(pairs.biases),
                torch.tensor(pairs.banned, dtype=torch.long),
                torch.tensor(pairs.repeated, dtype=torch.long),
                scores.new_tensor(pairs.penalties),
                torch.tensor(pairs.counted, dtype=torch.long),
                scores.new_tensor(pairs.amounts),
            ),
        )
        return scores
