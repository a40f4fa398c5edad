"""Scores of tokens that a grammar does not allow become -inf where they lie: a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # tokens of one program


def mask_scores(scores: torch.Tensor, masks: torch.Tensor, rows: torch.Tensor) -> None:
    """scores float32 `[N, vocab_size]`, contiguous: are written to, in `rows` i64 `[M]`, none of them twice; masks i32
    `[M, words]`, contiguous, a bit for each token, the first of 32 in the lowest."""
    size, count = scores.shape[1], len(rows)
    mask_block[(triton.cdiv(size, BLOCK), count)](scores, masks, rows, size, masks.shape[1], BLOCK=BLOCK)


@triton.jit(do_not_specialize_on_alignment=["masks", "rows"])  # see `paged_decode.py`
def mask_block(scores, masks, rows, size, words, BLOCK: tl.constexpr):
    place = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < size
    word = tl.load(masks + place * words + (tokens >> 5), mask=inside, other=-1)
    banned = ((word >> (tokens & 31)) & 1) == 0
    own = scores + tl.load(rows + place) * size
    tl.store(own + tokens, float("-inf"), mask=inside & banned)
