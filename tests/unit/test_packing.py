"""Packing: an image's features do not depend on what is packed beside it, whatever attention runs them."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from siglane.config.vision import PositionResize, VisionConfig
from siglane.lm.attention import Past, SegmentAttention
from siglane.nn.attention import (
    AttentionBackend,
    Segments,
    choose_backend,
    cu_seqlens_of,
    packed_attention,
    runnable_backends,
)
from siglane.nn.cpu import attention as cpu_attention
from siglane.nn.cpu.attention import LONG
from siglane.nn.cpu.chunks import CHUNK_ROWS, ChunkedBlock, ChunkedMLP, groups_of
from siglane.nn.cpu.optimise import optimise
from siglane.types import Grid, PackedPatches
from siglane.vision.tower import SiglipVisionModel

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

SQUARE = [Grid(6, 6)] * 10
EQUAL_COUNTS = [Grid(4, 9), Grid(6, 6), Grid(9, 4), Grid(6, 6), Grid(4, 9)] * 2  # 36 patches each, other positions
MIXED = [Grid(4, 9), Grid(1, 1), Grid(6, 6), Grid(6, 6), Grid(2, 31), Grid(9, 4), Grid(7, 3), Grid(1, 50), *SQUARE[:2]]
# so many patches that they are computed in pieces, the long ones head by head
LARGE = [*(Grid(33, 33), Grid(18, 18), Grid(1, 50), Grid(18, 18), Grid(20, 16), Grid(16, 20), Grid(40, 30)), *MIXED[:3]]


@pytest.fixture(scope="module")
def tower() -> SiglipVisionModel:
    """A small tower with random weights, its norms and biases too."""
    raw = {"hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 56, "num_hidden_layers": 3}
    config = VisionConfig.from_hf({**raw, "image_size": 24, "patch_size": 4}, feature_layer=-1, post_norm=True)
    model = SiglipVisionModel(replace(config, position_resize="bilinear_antialias")).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            scaled = drawn * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3 * drawn
            parameter.copy_(1 + scaled if "norm" in name and name.endswith("weight") else scaled)
    return model


def image(number: int, grid: Grid, patch_dim: int = 48) -> torch.Tensor:
    return torch.randn(grid.area, patch_dim, generator=torch.Generator().manual_seed(number))


@torch.no_grad()
def encode(tower: SiglipVisionModel, images: Sequence[torch.Tensor], grids: Sequence[Grid]) -> list[torch.Tensor]:
    """Features and the pooled embedding, as a last row, of each image; all of them in one call."""
    features = tower(PackedPatches(torch.cat(list(images)), tuple(grids)))
    pooled = tower.pool(features, grids)
    lengths = [grid.area for grid in grids]
    return [torch.cat((own, row[None])) for own, row in zip(features.split(lengths), pooled, strict=True)]


class TestCompany:
    @pytest.mark.few("*-square", "*-equal counts", "*-mixed", "True-bicubic-large")
    @pytest.mark.parametrize(
        "grids", [SQUARE, EQUAL_COUNTS, MIXED, LARGE], ids=["square", "equal counts", "mixed", "large"]
    )
    @pytest.mark.parametrize("rule", ["bilinear_antialias", "bicubic"])
    @pytest.mark.parametrize("optimised", [False, True])
    def test_an_image_alone_in_company_and_in_another_order_is_the_same(
        self, tower: SiglipVisionModel, grids: list[Grid], rule: PositionResize, optimised: bool
    ) -> None:
        state = tower.state_dict()
        tower = SiglipVisionModel(replace(tower.config, position_resize=rule))
        tower.load_state_dict(state)
        if optimised:
            optimise(tower)
        images = [image(number, grid) for number, grid in enumerate(grids)]
        alone = [encode(tower, [one], [grid])[0] for one, grid in zip(images, grids, strict=True)]
        for order in (list(range(10)), list(range(9, -1, -1)), [3, 0, 7, 1, 9, 8, 2, 6, 5, 4]):
            packed = encode(tower, [images[number] for number in order], [grids[number] for number in order])
            for number, features in zip(order, packed, strict=True):
                torch.testing.assert_close(features, alone[number], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("rope_theta", [None, 10000.0])
    def test_an_optimised_tower_gives_the_same_features(
        self, tower: SiglipVisionModel, rope_theta: float | None
    ) -> None:
        config = replace(tower.config, hidden_size=64, rope_theta=rope_theta)
        fresh = SiglipVisionModel(config)
        for number, parameter in enumerate(fresh.parameters()):
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))
        images = [image(number, grid) for number, grid in enumerate(LARGE)]
        plain = encode(fresh, images, LARGE)
        optimise(fresh)
        assert {type(block) for block in fresh.blocks} == {ChunkedBlock}
        assert {type(block.mlp) for block in fresh.blocks} == {ChunkedMLP}
        for one, other in zip(plain, encode(fresh, images, LARGE), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)

    def test_a_neighbour_of_nan_harms_nobody(self, tower: SiglipVisionModel) -> None:
        images = [image(number, grid) for number, grid in enumerate(MIXED)]
        broken = [torch.full_like(one, torch.nan) if number in (0, 3) else one for number, one in enumerate(images)]
        for number, (one, other) in enumerate(
            zip(encode(tower, images, MIXED), encode(tower, broken, MIXED), strict=True)
        ):
            assert torch.equal(one, other) or number in (0, 3)
            assert not other.isnan().any() or number in (0, 3)

    def test_positions_follow_the_grid_not_the_count(self, tower: SiglipVisionModel) -> None:
        """The same 36 patches on 4x9 and on 6x6 are different images."""
        pixels = image(0, Grid(6, 6))
        wide, square = encode(tower, [pixels, pixels], [Grid(4, 9), Grid(6, 6)])
        assert (wide - square).abs().max() > 0.1

    def test_patches_that_do_not_fill_the_grids_are_refused(self) -> None:
        with pytest.raises(ValueError, match="grids hold 36 patches, pixels are"):
            PackedPatches(torch.zeros(37, 48), (Grid(6, 6),))


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], scale: float, causal: bool
) -> torch.Tensor:
    """Attention written out in float64: of each segment one matrix of all scores."""
    groups = q.shape[1] // k.shape[1]
    parts = (x.double().split(list(lengths)) for x in (q, *(x.repeat_interleave(groups, 1) for x in (k, v))))
    outputs = []
    for own_q, own_k, own_v in zip(*parts, strict=True):
        scores = torch.einsum("qhd,khd->hqk", own_q, own_k) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0]).tril() == 0, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), own_v))
    return torch.cat(outputs).to(q.dtype)


def qkv(rows: int, heads: int, kv_heads: int, head_dim: int) -> Tensors:
    generator = torch.Generator().manual_seed(rows)
    q, k, v = (torch.randn(rows, count, head_dim, generator=generator) for count in (heads, kv_heads, kv_heads))
    return q, k, v


LENGTHS = [[7], [5, 5, 5], [1, 9, 9, 2, 9, 1], [36, 36], [3, 1, 4, 1, 5]]
HEADS = [(4, 16), (6, 12), (2, 72), (9, 5)]
GROUPED = [*((heads, heads, head_dim) for heads, head_dim in HEADS), (4, 2, 8), (6, 1, 12), (9, 3, 5)]


@pytest.fixture(params=[True, False], ids=["AVX2", "others"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long segments are attended to as on a processor of AVX2, or of others."""
    monkeypatch.setattr(cpu_attention, "_is_avx2", lambda: request.param)


class TestAttention:
    @pytest.mark.parametrize("backend", ["eager", "sdpa", "onednn"])
    @pytest.mark.parametrize(("heads", "head_dim"), HEADS)
    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_a_backend_is_the_dense_masked_attention(
        self, lengths: list[int], heads: int, head_dim: int, backend: AttentionBackend
    ) -> None:
        q, k, v = qkv(sum(lengths), heads, heads, head_dim)
        ours = packed_attention(q, k, v, Segments.of(lengths, CPU), scale=0.37, backend=backend)
        torch.testing.assert_close(ours, dense(q, k, v, lengths, 0.37, causal=False), atol=1e-5, rtol=0)

    @pytest.mark.few("AVX2-*", "others-lengths0-*", "others-lengths2-2-72")
    @pytest.mark.usefixtures("processor")
    @pytest.mark.parametrize(("heads", "head_dim"), [(4, 16), (2, 72)])
    @pytest.mark.parametrize("lengths", [[LONG], [LONG - 1, LONG + 1], [1100, 40, 1100, 1100], [3000]])
    def test_long_segments_too(self, lengths: list[int], heads: int, head_dim: int) -> None:
        """oneDNN computes them head by head, very long ones in parts, but not where a gradient is wanted."""
        q, k, v = qkv(sum(lengths), heads, heads, head_dim)
        expected = dense(q, k, v, lengths, 0.37, causal=False)
        segments = Segments.of(lengths, CPU)
        for x in (q, q.clone().requires_grad_()):
            ours = packed_attention(x, k, v, segments, scale=0.37, backend="onednn")
            assert ours.requires_grad == x.requires_grad
            torch.testing.assert_close(ours.detach(), expected, atol=1e-5, rtol=0)

    @pytest.mark.usefixtures("processor")
    @pytest.mark.parametrize("spread", [1, 30, 1000])
    @pytest.mark.parametrize("shift", [-1000, -80, -50, 0, 50, 80, 1000])
    def test_scores_of_any_size(self, shift: int, spread: int) -> None:
        """Exponentials beyond float32's range change nothing; the scores are whole numbers, thus exact."""
        q, k, v = qkv(LONG, 2, 2, 8)
        q, k = (q * spread).round().clamp(-spread, spread), k.sign()
        q[..., 0], k[..., 0] = shift, 1
        segments = Segments.of([LONG], CPU)
        ours = packed_attention(q, k, v, segments, scale=1.0, backend="onednn")
        torch.testing.assert_close(ours, dense(q, k, v, [LONG], 1.0, causal=False), atol=5e-5, rtol=0)

    def test_autocast_decides_the_dtype(self) -> None:
        q, k, v = qkv(LONG, 2, 2, 8)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            ours = packed_attention(q, k, v, Segments.of([LONG], CPU), scale=1.0, backend="onednn")
        assert ours.dtype == torch.bfloat16


class TestSegmentAttention:
    @pytest.mark.parametrize("heads", GROUPED)
    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_it_is_the_dense_causal_attention(self, lengths: list[int], heads: tuple[int, int, int]) -> None:
        q, k, v = qkv(sum(lengths), *heads)
        expected = dense(q, k, v, lengths, heads[2] ** -0.5, causal=True)
        torch.testing.assert_close(SegmentAttention(lengths)(0, q, k, v), expected, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("heads", GROUPED)
    def test_a_mask_says_what_is_seen(self, heads: tuple[int, int, int]) -> None:
        q, k, v = qkv(3 * 6, *heads)
        mask = torch.ones(3, 6, 6, dtype=torch.bool).tril()
        expected = dense(q, k, v, [6] * 3, heads[2] ** -0.5, causal=True)
        torch.testing.assert_close(SegmentAttention([6] * 3, mask=mask)(0, q, k, v), expected, atol=1e-5, rtol=0)
        mask[1] = torch.eye(6, dtype=torch.bool)
        alone = SegmentAttention([6] * 3, mask=mask)(0, q, k, v)
        values = v.repeat_interleave(heads[0] // heads[1], 1)
        torch.testing.assert_close(alone[6:12], values[6:12])
        torch.testing.assert_close(alone[12:], expected[12:], atol=1e-5, rtol=0)

    @pytest.mark.parametrize("heads", GROUPED)
    def test_one_token_after_another_is_the_whole(self, heads: tuple[int, int, int]) -> None:
        """Of every layer by itself."""
        q, k, v = qkv(9, *heads)
        past: Past = {}
        for layer, factor in enumerate((1.0, 0.5)):
            expected = dense(q, factor * k, v, [9], heads[2] ** -0.5, causal=True)
            steps = [slice(0, 6), slice(6, 7), slice(7, 8), slice(8, 9)]
            found = [
                SegmentAttention([len(q[step])], past=past)(layer, q[step], factor * k[step], v[step]) for step in steps
            ]
            torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=0)


def flash_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    scale: float | None,
) -> torch.Tensor:
    """What the CUDA kernels compute and what they insist on."""
    assert q.shape[-1] % 8 == 0
    assert cu_seqlens.dtype == torch.int32
    lengths = cu_seqlens.diff().tolist()
    assert longest == max(lengths)
    assert q.shape == k.shape == v.shape
    return dense(q, k, v, lengths, q.shape[-1] ** -0.5 if scale is None else scale, causal=False)


def install_torch_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed torch's own signature, computed on the CPU."""
    signature = inspect.signature(varlen.varlen_attn)

    @wraps(varlen.varlen_attn)
    def varlen_attn(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        q, k, v, cu_seqlens, _, longest, _ = given.args[:7]
        assert tuple(given.arguments.get("window_size") or (-1, -1)) == (-1, -1)
        return flash_kernel(q, k, v, cu_seqlens, longest, given.kwargs.get("scale"))

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


def install_oldest_torch_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.10's signature: neither a scale nor a window."""

    def varlen_attn(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor,
        max_q: int, max_k: int, is_causal: bool = False, return_aux: None = None,
    ) -> torch.Tensor:  # fmt: skip
        assert not is_causal
        return flash_kernel(q, k, v, cu_q, max_q, None)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


def install_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_varlen_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        assert not causal
        return flash_kernel(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)

    module: Any = ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


def install_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper:
        def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
            assert float_workspace_buffer.dtype == torch.uint8

        def plan(
            self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, num_qo_heads: int, num_kv_heads: int,
            head_dim_qk: int, *, causal: bool, sm_scale: float, q_data_type: torch.dtype,
        ) -> None:  # fmt: skip
            assert head_dim_qk in (64, 128, 256)
            self.shapes = (num_qo_heads, head_dim_qk), (num_kv_heads, head_dim_qk)
            self.lengths, self.scale, self.causal = qo_indptr.diff().tolist(), sm_scale, causal

        def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            assert (q.shape[1:], k.shape[1:]) == self.shapes
            return dense(q, k, v, self.lengths, self.scale, self.causal)

    module: Any = ModuleType("flashinfer")
    module.BatchPrefillWithRaggedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)


KERNELS: dict[str, tuple[AttentionBackend, Callable[[pytest.MonkeyPatch], None]]] = {
    "torch": ("torch_varlen", install_torch_varlen),
    "torch 2.10": ("torch_varlen", install_oldest_torch_varlen),
    "flash_attn": ("flash_attn", install_flash_attn),
    "flashinfer": ("flashinfer", install_flashinfer),
}


class TestKernels:
    """How the kernels of a GPU are called; they themselves are stand-ins here, tests/gpu runs the real ones."""

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize(("heads", "head_dim"), HEADS)
    def test_padding_the_heads_keeps_the_true_scale(
        self, monkeypatch: pytest.MonkeyPatch, kernel: str, heads: int, head_dim: int
    ) -> None:
        """head_dim 12 runs as 16, 72 as 128 in flashinfer: the scale stays 12 ** -0.5 and 72 ** -0.5."""
        backend, install = KERNELS[kernel]
        install(monkeypatch)
        lengths = [1, 9, 9, 2]
        q, k, v = qkv(sum(lengths), heads, heads, head_dim)
        segments = replace(Segments.of(lengths, CPU), cu_seqlens=cu_seqlens_of(lengths))
        ours = packed_attention(q, k, v, segments, scale=head_dim**-0.5, backend=backend)
        torch.testing.assert_close(ours, dense(q, k, v, lengths, head_dim**-0.5, causal=False), atol=1e-5, rtol=0)


class TestSegments:
    @pytest.mark.parametrize(
        ("lengths", "runs"),
        [
            ([4, 4, 4], ((4, 3),)),
            ([4, 9, 9, 4], ((4, 1), (9, 2), (4, 1))),
            ([1], ((1, 1),)),
            ([], ()),
        ],
    )
    def test_neighbours_of_equal_length_run_together(
        self, lengths: list[int], runs: tuple[tuple[int, int], ...]
    ) -> None:
        segments = Segments.of(lengths, CPU)
        assert segments.lengths == tuple(lengths)
        assert segments.runs == runs
        assert segments.max_len == max(lengths, default=0)
        assert segments.cu_seqlens is None  # nothing reads it on the CPU

    @pytest.mark.parametrize("lengths", [[CHUNK_ROWS], [1000, 24, 1], [5000, 3], [900, 900, 200, 100, 25], [7] * 400])
    def test_chunks_are_the_same_segments(self, lengths: list[int]) -> None:
        groups = groups_of(lengths)
        assert [length for group in groups for length in group] == lengths
        assert all(sum(group) <= CHUNK_ROWS or len(group) == 1 for group in groups)
        assert all(sum(one) + other[0] > CHUNK_ROWS for one, other in pairwise(groups))

    def test_cumulative_lengths_start_at_zero(self) -> None:
        lengths = cu_seqlens_of([3, 1, 4])
        assert lengths.dtype == torch.int32
        assert lengths.tolist() == [0, 3, 4, 8]
        assert cu_seqlens_of([]).tolist() == [0]

    def test_a_device_gets_them_once(self) -> None:
        cu_seqlens = Segments.of([3, 1, 4], torch.device("meta")).cu_seqlens
        assert cu_seqlens is not None
        assert (cu_seqlens.device.type, cu_seqlens.dtype, cu_seqlens.shape) == ("meta", torch.int32, (4,))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends a GPU of a compute capability on which exactly these packages are installed."""

    def pretend(capability: tuple[int, int], *installed: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in installed else None)

    return pretend


class TestChoice:
    @pytest.mark.parametrize(
        ("dtype", "chosen"), [(torch.float32, "onednn"), (torch.float16, "sdpa"), (torch.bfloat16, "sdpa")]
    )
    def test_the_cpu_takes_onednn_or_sdpa(
        self, dtype: torch.dtype, chosen: AttentionBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, "siglane"):
            assert choose_backend("auto", CPU, dtype, 4, 12) == chosen
            assert choose_backend("sdpa", CPU, dtype, 4, 12) == "sdpa"
        assert caplog.messages[0] == f"vision attention: {chosen} (cpu, {dtype}, asked for auto)"
        assert caplog.messages[1].endswith("asked for sdpa)")

    @pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.bfloat16), (CUDA, torch.float32)])
    def test_onednn_is_for_float32_on_cpus(self, device: torch.device, dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match=f"'onednn' cannot run on {device} in {dtype}; use 'auto'"):
            runnable_backends("onednn", device, dtype)

    @pytest.mark.parametrize("choice", ["torch_varlen", "flash_attn", "flashinfer"])
    @pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.float16), (CUDA, torch.float32)])
    def test_a_kernel_that_cannot_run_is_refused(
        self, choice: AttentionBackend, device: torch.device, dtype: torch.dtype
    ) -> None:
        with pytest.raises(ValueError, match=f"'{choice}' cannot run on {device} in {dtype}; use 'auto'"):
            runnable_backends(choice, device, dtype)

    @pytest.mark.parametrize(
        ("capability", "installed", "candidates"),
        [
            ((9, 0), ("flash_attn", "flashinfer"), ("torch_varlen", "sdpa")),
            ((8, 0), (), ("torch_varlen", "sdpa")),
            ((7, 5), ("flash_attn", "flashinfer"), ("sdpa",)),
        ],
    )
    def test_a_gpu_tries_torch_alone(
        self,
        on_gpu: Callable[..., None],
        capability: tuple[int, int],
        installed: tuple[str, ...],
        candidates: tuple[AttentionBackend, ...],
    ) -> None:
        """flash-attn and flashinfer are taken by name only."""
        on_gpu(capability, *installed)
        assert runnable_backends("auto", CUDA, torch.float16) == candidates
        assert runnable_backends("auto", CUDA, torch.float32) == ("sdpa",)

    def test_a_choice_that_is_installed_is_kept(self, on_gpu: Callable[..., None]) -> None:
        on_gpu((9, 0), "flashinfer")
        assert runnable_backends("flashinfer", CUDA, torch.bfloat16) == ("flashinfer",)
        assert runnable_backends("sdpa", CUDA, torch.bfloat16) == ("sdpa",)
        with pytest.raises(ValueError, match="'flash_attn' cannot run"):
            runnable_backends("flash_attn", CUDA, torch.bfloat16)

    def test_a_tower_chooses_when_it_first_runs(
        self, tower: SiglipVisionModel, caplog: pytest.LogCaptureFixture
    ) -> None:
        fresh = SiglipVisionModel(tower.config)
        fresh.load_state_dict(tower.state_dict())
        with caplog.at_level(logging.INFO, "siglane"):
            encode(fresh, [image(0, Grid(6, 6))], [Grid(6, 6)])
            encode(fresh, [image(1, Grid(6, 6))], [Grid(6, 6)])
        assert len(caplog.messages) == 1

    def test_a_tower_refuses_a_kernel_that_cannot_run(self, tower: SiglipVisionModel) -> None:
        with pytest.raises(ValueError, match="'flash_attn' cannot run on cpu"):
            SiglipVisionModel(tower.config, attention_backend="flash_attn")(
                PackedPatches(image(0, Grid(6, 6)), (Grid(6, 6),))
            )
