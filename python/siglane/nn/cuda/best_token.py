"""The choice of a token with noise over a whole vocabulary, in one pass over the scores: a Triton kernel.

What `engine/sampling/noise.py` computes, for each token where it is read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096  # tokens of one program
FIRST_FACTOR = tl.constexpr(0x7FEB352D)
SECOND_FACTOR = tl.constexpr(0x846CA68B - (1 << 32))  # signed, or the product would have 64 bits
SHIFT, MASK, STEP = tl.constexpr(9), tl.constexpr(0x7FFFFF), tl.constexpr(2.0**-23)  # the upper 23 bits


def best_token(
    scores: torch.Tensor, peaks: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor
) -> torch.Tensor:
    """scores float32 `[N, vocab_size]`, contiguous; peaks: the greatest of each row; temperatures float32 `[N]`, 0
    where there is no noise; keys i64 `[2, N]`, contiguous, the words of `noise_key` -> token ids i64 `[N]`, of equal
    ones the first."""
    count, size = scores.shape
    blocks = triton.cdiv(size, BLOCK)
    values = torch.empty((count, blocks), dtype=torch.float32, device=scores.device)
    token_ids = torch.empty((count, blocks), dtype=torch.int64, device=scores.device)
    best_of_block[(blocks, count)](scores, peaks, temperatures, keys, values, token_ids, size, BLOCK=BLOCK)
    return token_ids.gather(1, values.argmax(1, keepdim=True))[:, 0]


@triton.jit
def mixed(x):
    """32 bits, which wrap around (prospector's lowbias32)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * FIRST_FACTOR
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * SECOND_FACTOR
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit(do_not_specialize_on_alignment=["keys"])  # see `paged_decode.py`
def best_of_block(
    scores, peaks, temperatures, keys, values, token_ids, size, BLOCK: tl.constexpr
):  # fmt: skip
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < size
    score = tl.load(scores + row * size + tokens, mask=inside, other=float("-inf"))
    temperature = tl.load(temperatures + row)
    hot = temperature > 0
    first, second = tl.load(keys + row).to(tl.int32), tl.load(keys + tl.num_programs(1) + row).to(tl.int32)
    bits = (mixed(mixed(tokens ^ first) + second) >> SHIFT) & MASK
    uniform = (bits.to(tl.float32) + 0.5) * STEP
    noise = -tl.log(-tl.log(uniform))
    scaled = tl.div_rn(score - tl.load(peaks + row), tl.where(hot, temperature, 1.0))
    value = tl.where(hot, scaled + noise, score)
    value = tl.where(value == value, value, float("-inf"))  # NaN is found out elsewhere; here it would name no token
    blocks = tl.num_programs(0)
    tl.store(values + row * blocks + block, tl.max(value, 0))
    tl.store(token_ids + row * blocks + block, (block * BLOCK + tl.argmax(value, 0)).to(tl.int64))
