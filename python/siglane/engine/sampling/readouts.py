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


def rows_to_read(chunks: Sequence[Chunk]) -> list[int]:
    """Those of all chunks, one after another, that are wanted."""
    rows, first = list[int](), 0
    for chunk in chunks:
        rows += [first + one.position - chunk.start for one in chunk.wanted]
        first += chunk.tokens
    return rows


def read(language: QwenModel, hidden: torch.Tensor, rows: torch.Tensor, chunks: Sequence[Chunk]) -> list[Readouts]:
    """hidden `[T, hidden_size]`, of all chunks one after another; rows i64: `rows_to_read`, where hidden lies -> what
    each chunk wants. Waits for the device, where anything is wanted."""
    wanted = [one for chunk in chunks for one in chunk.wanted]
    some = (slice(start, start + READ_ROWS) for start in range(0, len(wanted), READ_ROWS))
    found = itertools.chain.from_iterable(_read_some(language, hidden, rows[one], wanted[one]) for one in some)
    return [tuple(itertools.islice(found, len(chunk.wanted))) for chunk in chunks]


def _read_some(language: QwenModel, hidden: torch.Tensor, rows: torch.Tensor, wanted: Sequence[Read]) -> list[Readout]:
    logprobs = language.logits(hidden.index_select(0, rows)).float().cpu().log_softmax(-1)
    return [_readout(row, one) for row, one in zip(logprobs, wanted, strict=True)]


def _readout(logprobs: torch.Tensor, wanted: Read) -> Readout:
    """logprobs float32 `[vocab_size]`."""
    asked = tuple(logprobs[list(wanted.token_ids)].tolist())
    if not wanted.top:
        return Readout(wanted.position, asked)
    top = likeliest(logprobs, wanted.top)
    pairs = zip(top.token_ids[: wanted.top].tolist(), top.scores[: wanted.top].tolist(), strict=True)
    return Readout(wanted.position, asked, tuple(pairs))
