"""What lies between a decoder's products, a Triton kernel each: torch's own operations round the same places."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

HEADS = 4  # that one program turns
COLUMNS = 1024  # that one program multiplies


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, in_float32: bool) -> torch.Tensor:
    """`RMSNorm` of `nn/norm.py`, or its `InputRMSNorm`: x `[..., N]`, its last two dimensions next to each other."""
    size = x.shape[-1]
    within = x.shape[-2] if x.dim() == 3 else 1
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norm_row[(x.numel() // size,)](
        x, weight, out, eps, x.stride(0), within, SIZE=size, BLOCK=triton.next_power_of_2(size), IN_FLOAT32=in_float32
    )
    return out


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    q_heads: int = 0,
    eps: float = 0.0,
) -> torch.Tensor:
    """`rotate` of `nn/rope.py`: x `[T, heads, head_dim]`, the heads of a token next to each other; with the gains of
    its norms its `NormedRotation`."""
    tokens, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gains = (cos, cos) if q_norm is None else (q_norm, k_norm)
    turn_heads[(triton.cdiv(heads, HEADS), tokens)](
        x, cos, sin, *gains, out, x.stride(0), heads, q_heads, eps,
        HALF=head_dim // 2, BLOCK=triton.next_power_of_2(head_dim // 2), HEADS=HEADS, NORMED=q_norm is not None,
    )  # fmt: skip
    return out


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`swiglu` of `nn/act.py`: contiguous `[..., 2 * N]`, gate first -> `[..., N]`."""
    size = gate_up.shape[-1] // 2
    out = torch.empty((*gate_up.shape[:-1], size), dtype=gate_up.dtype, device=gate_up.device)
    gate_row[(triton.cdiv(size, COLUMNS), out.numel() // size)](gate_up, out, size, BLOCK=COLUMNS)
    return out


def store(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """k and v `[T, kv_heads, head_dim]`, the heads of a token next to each other, into `slots` i64 `[T]` of keys and
    values `[slots, kv_heads, head_dim]`."""
    size = k.shape[1] * k.shape[2]
    store_token[(len(k),)](
        k, v, keys, values, slots, k.stride(0), v.stride(0), SIZE=size, BLOCK=triton.next_power_of_2(size)
    )


@triton.jit
def norm_row(x, weight, out, eps, stride, within, SIZE: tl.constexpr, BLOCK: tl.constexpr, IN_FLOAT32: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    kind = out.dtype.element_ty
    mask = columns < SIZE
    source = x + row // within * stride + row % within * SIZE
    values = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
    gains = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if IN_FLOAT32:
        root = 1 / tl.sqrt(tl.sum(values * values, 0) / SIZE + eps)
    else:
        squares = (values * values).to(kind).to(tl.float32)
        mean = (tl.sum(squares, 0) / SIZE).to(kind).to(tl.float32)
        root = (1 / tl.sqrt((mean + eps).to(kind).to(tl.float32))).to(kind).to(tl.float32)
    normed = (values * root).to(kind).to(tl.float32)
    tl.store(out + row * SIZE + columns, (normed * gains).to(kind), mask=mask)


@triton.jit
def turn_heads(
    x, cos, sin, q_gains, k_gains, out, stride, heads, q_heads, eps,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """Pairs are (i, i + HALF); the first half of sin is negated. NORMED: heads are normed before, as `RMSNorm` does."""
    token = tl.program_id(1).to(tl.int64)
    head, column = tl.program_id(0) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    kind = out.dtype.element_ty
    inside = column < HALF
    mask = (head < heads)[:, None] & inside[None, :]
    places = head[:, None] * 2 * HALF + column[None, :]
    first = tl.load(x + token * stride + places, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + token * stride + places + HALF, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        squares = tl.sum(first * first + second * second, 1)
        root = (1 / tl.sqrt(squares / (2 * HALF) + eps))[:, None]
        own = (head < q_heads)[:, None]
        low = tl.where(own, gain(q_gains, column, HALF), gain(k_gains, column, HALF))
        high = tl.where(own, gain(q_gains + HALF, column, HALF), gain(k_gains + HALF, column, HALF))
        first = ((first * root).to(kind).to(tl.float32) * low).to(kind).to(tl.float32)
        second = ((second * root).to(kind).to(tl.float32) * high).to(kind).to(tl.float32)
    angles = token * 2 * HALF + column
    for half in tl.static_range(2):
        own, other = (first, second) if half == 0 else (second, first)
        turn = tl.load(cos + angles + half * HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
        cross = tl.load(sin + angles + half * HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
        turned = (own * turn).to(kind).to(tl.float32) + (other * cross).to(kind).to(tl.float32)
        tl.store(out + token * heads * 2 * HALF + places + half * HALF, turned.to(kind), mask=mask)


@triton.jit
def gain(gains, column, size):
    """One row of a norm's weight, or of its half."""
    return tl.load(gains + column, mask=column < size, other=0.0).to(tl.float32)[None, :]


@triton.jit
def gate_row(gate_up, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kind = out.dtype.element_ty
    mask = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=mask, other=0.0).to(tl.float32)
    gated = (gate / (1 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out + row * size + columns, (gated * up).to(kind), mask=mask)


@triton.jit
def store_token(k, v, keys, values, slots, k_stride, v_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, slot = columns < SIZE, tl.load(slots + token)
    tl.store(keys + slot * SIZE + columns, tl.load(k + token * k_stride + columns, mask=mask), mask=mask)
    tl.store(values + slot * SIZE + columns, tl.load(v + token * v_stride + columns, mask=mask), mask=mask)
