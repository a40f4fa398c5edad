"""torch's packed attention is called as each release declares it, on stand-ins that compute what its kernel does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from test_kernel_trial import shape
from torch.nn.attention import varlen

from siglane.engine.attention.cuda import VarlenKernels, tried_kernels
from siglane.engine.attention.plain import TorchKernels
from siglane.engine.attention.trial import prefilled
from siglane.nn.attention import sdpa, tried_backend
from siglane.nn.cuda.varlen import accepted
from siglane.nn.trial import fault

CPU = torch.device("cpu")
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def kernel(
    tensors: Tensors, cu_q: torch.Tensor, cu_k: torch.Tensor, longest: tuple[int, int], scale: float, causal: bool
) -> torch.Tensor:
    """What the CUDA kernel computes and what it insists on; a causal mask is aligned to the end."""
    q, k, v = tensors
    assert q.shape[-1] % 8 == 0
    assert all(x.stride(-1) == 1 for x in tensors)
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert longest == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    rows = []
    for (first, last), (start, stop) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        queries, keys = last - first, stop - start
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if causal else None
        own = (q[None, first:last], k[None, start:stop], v[None, start:stop])
        rows.append(sdpa(*(x.float() for x in own), scale=scale, mask=seen)[0])
    return torch.cat(rows).to(q.dtype)


Window = tuple[int, int]
T = torch.Tensor


def torch_2_10(
    query: T, key: T, value: T, cu_seq_q: T, cu_seq_k: T, max_q: int, max_k: int, is_causal: bool = False,
    return_aux: Any = None,
) -> T:  # fmt: skip
    scale = query.shape[-1] ** -0.5
    return kernel((query, key, value), cu_seq_q, cu_seq_k, (max_q, max_k), scale, is_causal)


def torch_2_11(
    query: T, key: T, value: T, cu_seq_q: T, cu_seq_k: T, max_q: int, max_k: int, *, return_aux: Any = None,
    scale: float | None = None, window_size: Window = (-1, -1),
) -> T:  # fmt: skip
    assert window_size in ((-1, -1), (-1, 0))
    assert scale is not None
    return kernel((query, key, value), cu_seq_q, cu_seq_k, (max_q, max_k), scale, window_size == (-1, 0))


def torch_2_12(
    query: T, key: T, value: T, cu_seq_q: T, cu_seq_k: T | None, max_q: int, max_k: int, *, return_aux: Any = None,
    scale: float | None = None, window_size: Window = (-1, -1), enable_gqa: bool = False, seqused_k: T | None = None,
    block_table: T | None = None, num_splits: int | None = None,
) -> T:  # fmt: skip
    """2.13 too. 2.14 and 2.15 as well, which take cuDNN unless num_splits is 1."""
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError("Expected query and key to have the same number of heads unless enable_gqa is set")
    assert num_splits == 1
    assert cu_seq_k is not None
    return torch_2_11(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size
    )  # fmt: skip


RELEASES = pytest.mark.parametrize("release", [torch_2_10, torch_2_11, torch_2_12])


@RELEASES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_tower_and_a_prefill_pass_their_trial(
    monkeypatch: pytest.MonkeyPatch, release: Callable[..., T], dtype: torch.dtype
) -> None:
    """head_dim 72 without padding, fewer key heads, chunks behind a prefix."""
    monkeypatch.setattr(varlen, "varlen_attn", release)
    assert tried_backend(("torch_varlen",), CPU, dtype, 4, 72) == "torch_varlen"
    run, expected = prefilled(shape(14, 2, 72, dtype))
    assert fault(lambda: run(VarlenKernels), expected) is None


def test_keys_are_repeated_where_the_kernel_takes_no_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    def equal_heads(q: T, k: T, v: T, *starts: Any, **how: Any) -> T:
        assert q.shape == (*q.shape[:1], *k.shape[1:])
        return torch_2_11(q, k, v, *starts, **how)

    equal_heads.__wrapped__ = torch_2_11  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", equal_heads)
    wanted = shape(dtype=torch.bfloat16)
    steps = {"torch": TorchKernels}
    prefilling = tried_kernels(wanted, wanted.cache(4), steps).prefilling
    assert isinstance(prefilling, VarlenKernels)
    assert not prefilling.grouped


def test_a_mask_aligned_to_the_beginning_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def top_left(q: T, k: T, v: T, cu_q: T, cu_k: T, max_q: int, max_k: int, is_causal: bool = False) -> T:
        rows = []
        for (first, last), (start, stop) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
            seen = torch.ones(last - first, stop - start, dtype=torch.bool).tril()
            rows.append(sdpa(q[None, first:last], k[None, start:stop], v[None, start:stop], scale=0.125, mask=seen)[0])
        return torch.cat(rows)

    monkeypatch.setattr(varlen, "varlen_attn", top_left)
    wanted = shape(dtype=torch.bfloat16)
    assert type(tried_kernels(wanted, wanted.cache(4), {"torch": TorchKernels}).prefilling) is TorchKernels


def test_the_installed_release_is_one_of_them() -> None:
    """One with other names would be called wrongly, and its trial would then leave it out."""
    required = {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"}
    options = accepted(varlen.varlen_attn) - required
    assert required <= accepted(varlen.varlen_attn)
    assert {"is_causal"} <= options or {"scale", "window_size"} <= options
    known = {"is_causal", "return_aux", "scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits"}
    assert options <= known, "a new option: see what it is by default"
