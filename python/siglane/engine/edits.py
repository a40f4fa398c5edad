"""What a request adds to its logits before a token is chosen: bias, minimum length and penalties, as few pairs of
token and value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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

    def applied(self, logits: torch.Tensor) -> torch.Tensor:
        """logits `[vocab_size]` -> others, in vLLM's order and with its meanings."""
        scores, params = logits.clone(), self.params
        if params.logit_bias:
            ids, values = zip(*params.logit_bias, strict=True)
            scores.index_add_(0, scores.new_tensor(ids, dtype=torch.long), scores.new_tensor(values))
        if self.banned:
            scores[_inside(scores, self.banned)] = -torch.inf
        if self.tally is None:
            return scores
        if params.repetition_penalty != 1:  # placeholders may lie outside the vocabulary
            seen, penalty = _inside(scores, self.tally.times), params.repetition_penalty
            before = scores[seen]
            scores[seen] = torch.where(before > 0, before / penalty, before * penalty)
        answered = {token_id: times for token_id, times in self.tally.times.items() if times}
        if answered and (params.frequency_penalty or params.presence_penalty):
            ids_answered = scores.new_tensor(list(answered), dtype=torch.long)
            times = scores.new_tensor(list(answered.values()))
            scores[ids_answered] -= params.frequency_penalty * times + params.presence_penalty
        return scores


def _inside(scores: torch.Tensor, token_ids: Iterable[int]) -> torch.Tensor:
    ids = scores.new_tensor(list(token_ids), dtype=torch.long)
    return ids[(ids >= 0) & (ids < len(scores))]
