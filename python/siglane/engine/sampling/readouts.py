"""What a step tells of its own prompts: log-probabilities behind places that a request wants read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from siglane.engine.batch import Chunk
from siglane.engine.sampling.sampler import likeliest
from siglane.lm.qwen import QwenModel
from siglane.types import Read, Readout

READ_ROWS = 64  # whose logits are held at one time: those of a whole chunk would take hundreds of megabytes

Readouts = tuple[Readout, ...]


def read(language: QwenModel, hidden: torch.Tensor, chunks: Sequence[Chunk]) -> list[Readouts]:
    """hidden `[T, hidden_size]`, of all chunks one after another -> what each wants of its rows. Waits for the device,
    where anything is wanted."""
    wanted: list[tuple[int, Read]] = []
    first = 0
    for chunk in chunks:
        wanted += [(first + one.position - chunk.start, one) for one in chunk.wanted]
        first += chunk.tokens
    some = (wanted[start : start + READ_ROWS] for start in range(0, len(wanted), READ_ROWS))
    found = itertools.chain.from_iterable(_read_some(language, hidden, one) for one in some)
    return [tuple(itertools.islice(found, len(chunk.wanted))) for chunk in chunks]


def _read_some(language: QwenModel, hidden: torch.Tensor, wanted: Sequence[tuple[int, Read]]) -> list[Readout]:
    """wanted: rows of `hidden`, and what to tell of each."""
    rows = torch.tensor([row for row, _ in wanted], device=hidden.device)
    logprobs = language.logits(hidden[rows]).float().cpu().log_softmax(-1)
    return [_readout(row, one) for row, (_, one) in zip(logprobs, wanted, strict=True)]


def _readout(logprobs: torch.Tensor, wanted: Read) -> Readout:
    """logprobs float32 `[vocab_size]`."""
    asked = tuple(logprobs[list(wanted.token_ids)].tolist())
    if not wanted.top:
        return Readout(wanted.position, asked)
    top = likeliest(logprobs, wanted.top)
    pairs = zip(top.token_ids[: wanted.top].tolist(), top.scores[: wanted.top].tolist(), strict=True)
    return Readout(wanted.position, asked, tuple(pairs))
