"""The attention kernels of a GPU against SDPA in float32 on the same half-precision inputs."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from siglane.nn.attention import AttentionBackend, Segments, packed_attention, runnable_backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; this machine has none"),
]

CUDA = torch.device("cuda")
LENGTHS = [256, 1, 729, 729, 64, 37, 1024]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}

EVERY_KERNEL = pytest.mark.parametrize("backend", ["sdpa", "torch_varlen", "flash_attn", "flashinfer"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def available(backend: AttentionBackend, dtype: torch.dtype) -> AttentionBackend:
    try:
        return runnable_backends(backend, CUDA, dtype)[0]
    except ValueError as error:
        pytest.skip(str(error))


def inputs(heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Loud queries, so that the softmax is sharp and a wrong scale shows."""
    generator = torch.Generator().manual_seed(0)
    shape = (sum(LENGTHS), heads, head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(CUDA, dtype) for _ in range(3))
    return 2 * q, k, v


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float) -> torch.Tensor:
    """One segment after the other, in float32."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    outputs = []
    for start, stop in pairwise(ends):
        qs, ks, vs = (x[start:stop].float().transpose(0, 1)[None] for x in (q, k, v))
        outputs.append(F.scaled_dot_product_attention(qs, ks, vs, scale=scale)[0].transpose(0, 1))
    return torch.cat(outputs)


@EVERY_KERNEL
@EVERY_DTYPE
@pytest.mark.parametrize("head_dim", [64, 72])
def test_a_kernel_gives_the_numbers_of_sdpa(backend: AttentionBackend, dtype: torch.dtype, head_dim: int) -> None:
    kernel, scale = available(backend, dtype), head_dim**-0.5
    q, k, v = inputs(16, head_dim, dtype)
    ours = packed_attention(q, k, v, Segments.of(LENGTHS, CUDA), scale=scale, backend=kernel)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), reference(q, k, v, LENGTHS, scale), atol=TOLERANCE[dtype], rtol=1e-2)


@EVERY_KERNEL
@EVERY_DTYPE
def test_head_dim_72_keeps_its_true_scale(backend: AttentionBackend, dtype: torch.dtype) -> None:
    """Kernels that pad 72 to 80, 96 or 128 must not take the scale of the padded width."""
    kernel = available(backend, dtype)
    q, k, v = inputs(16, 72, dtype)
    ours = packed_attention(q, k, v, Segments.of(LENGTHS, CUDA), scale=72**-0.5, backend=kernel).float()
    distances = {width: (ours - reference(q, k, v, LENGTHS, width**-0.5)).abs().max() for width in (72, 80, 96, 128)}
    assert distances[72] < 0.1 * min(distances[width] for width in (80, 96, 128))


@EVERY_KERNEL
@EVERY_DTYPE
def test_an_image_alone_is_the_same_as_in_company(backend: AttentionBackend, dtype: torch.dtype) -> None:
    kernel, scale = available(backend, dtype), 72**-0.5
    q, k, v = inputs(16, 72, dtype)
    packed = packed_attention(q, k, v, Segments.of(LENGTHS, CUDA), scale=scale, backend=kernel)
    start, stop = sum(LENGTHS[:3]), sum(LENGTHS[:4])
    q, k, v = (x[start:stop] for x in (q, k, v))
    alone = packed_attention(q, k, v, Segments.of([stop - start], CUDA), scale=scale, backend=kernel)
    torch.testing.assert_close(alone, packed[start:stop], atol=TOLERANCE[dtype], rtol=1e-2)
