"""Random numbers without a state: each is a hash of a request's seed, the place in its answer and a token's id.

Neighbours, the order of a batch, chunks, preemption and the device change none of them. Adding Gumbel noise to scaled
logits and taking the greatest draws from their softmax (Gumbel 1954; arXiv:1411.0030 section 2).
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch

Words = npt.NDArray[np.uint32]
MIX = (16, 0x7FEB352D), (15, 0x846CA68B)  # shifts, and factors behind them
MASK64 = (1 << 64) - 1
NOISE_BITS = 23  # with one more, the number next to 1 would round to it and its noise be infinite
MOST_NOISE = 16.64  # no noise of so few bits is greater: -log(-log(1 - 2^-24)) is 16.6355
LUCKY = 0xFF000000  # a token of 256 has such a hash or a greater one, and more noise than all others:
LUCK = 5.545  # theirs is smaller: -log(-log(255 / 256)) is 5.5432


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """Two words i32 for the token at `position` of the answer; any `seed` will do, 64 bits of it count."""
    mixed = _mix64(_mix64(seed & MASK64) + position)
    return _signed(mixed & 0xFFFFFFFF), _signed(mixed >> 32)


def gumbel_noise(token_ids: torch.Tensor, key: tuple[int, int] | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """token_ids i32 -> float32 of the same shape; with keys of several rows, i32 `[N, 1]`, `[N, tokens]`."""
    mixed = _mix32(_mix32(token_ids ^ key[0]).add_(key[1]))
    bits = mixed.bitwise_right_shift_(32 - NOISE_BITS).bitwise_and_((1 << NOISE_BITS) - 1)
    uniform = bits.float().add_(0.5).mul_(2.0**-NOISE_BITS)
    return uniform.log_().neg_().log_().neg_()


class _Scratch(threading.local):
    """Of `lucky_tokens`: memory that is allocated anew costs more than what is done with it."""

    def __init__(self) -> None:
        self.token_ids, self.words, self.other = np.empty((3, 0), np.uint32)

    def of(self, count: int) -> tuple[Words, Words, Words]:
        if len(self.words) != count:
            self.token_ids = np.arange(count, dtype=np.uint32)
            self.words, self.other = np.empty((2, count), np.uint32)
        return self.token_ids, self.words, self.other


_scratch = _Scratch()


def lucky_tokens(count: int, key: tuple[int, int]) -> torch.Tensor:
    """Tokens of the first `count` whose noise may be `LUCK` or more, one of 256, i64 in order: found without a
    logarithm, and by numpy, which needs half of torch's time for the same words."""
    first, second = (np.uint32(word & 0xFFFFFFFF) for word in key)
    token_ids, words, scratch = _scratch.of(count)
    np.bitwise_xor(token_ids, first, out=words)
    _mix_words(words, scratch)
    words += second
    _mix_words(words, scratch)
    return torch.from_numpy(np.flatnonzero(words >= np.uint32(LUCKY)))


def _mix_words(x: Words, scratch: Words) -> None:
    """`_mix32`"""
    for shift, factor in MIX:
        x ^= np.right_shift(x, np.uint32(shift), out=scratch)
        x *= np.uint32(factor)
    x ^= np.right_shift(x, np.uint32(16), out=scratch)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """In place; products wrap around in 32 bits on every device (prospector's lowbias32)."""
    for shift, factor in MIX:
        x ^= (x >> shift).bitwise_and_((1 << (32 - shift)) - 1)
        x *= _signed(factor)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _mix64(x: int) -> int:
    """Stafford's 13th variant, as splitmix64 has it."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
