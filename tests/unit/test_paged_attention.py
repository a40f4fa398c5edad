"""Attention over pages against plain attention over the same tokens, however a sequence's pages lie."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine_kit import prompt

from siglane.config.language import LanguageConfig
from siglane.engine.attention.kernels import DecodeRows, Kernels, PrefillRows, StepAttention
from siglane.engine.attention.plain import EagerKernels, TorchKernels
from siglane.engine.attention.runs import FEW_RUNS, RunKernels
from siglane.engine.batch import Chunk, PageRun, Sequence, StepBatch
from siglane.engine.cache.kv import PagedKV
from siglane.nn.attention import cu_seqlens_of
from siglane.types import SamplingParams

PAGE, PAGES, HEADS, KV_HEADS, HEAD_DIM = 4, 64, 6, 2, 8
LAYOUTS = {
    "one run": [7, 8, 9, 10, 11],
    "a prefix and its own part": [30, 31, 32, 3, 4],
    "backwards": [20, 19, 18, 17, 16],
    "few runs": [40, 41, 50, 60, 2],
    "a single page": [13],
}


def language() -> LanguageConfig:
    return LanguageConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=100, max_position_embeddings=999,
        rms_norm_eps=1e-6, rope_theta=1e4, qkv_bias=True, output_bias=False, mlp_bias=False, qk_norm=False,
        norm_dtype="float32", tie_embeddings=True, rope_scaling=None, experts=None,
    )  # fmt: skip


def decoding(pages: list[int], length: int) -> Chunk:
    """The last token of a sequence that has `length`."""
    sequence = Sequence.of(prompt(*range(length)).request("r", SamplingParams(), 1), 0, 0)
    sequence.block_table, sequence.computed = list(pages), length - 1
    return Chunk(sequence, length - 1, length)


def filled_cache() -> PagedKV:
    kv = PagedKV(language(), KV_HEADS, pages=PAGES, page_size=PAGE, dtype=torch.float32, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    kv.keys.copy_(torch.randn(kv.keys.shape, generator=generator))
    kv.values.copy_(torch.randn(kv.values.shape, generator=generator))
    return kv


def step(kernels: Kernels, chunks: list[Chunk]) -> StepAttention:
    """Of chunks that are all one token each, or all prefills."""
    table = torch.zeros(len(chunks), 9, dtype=torch.int32)
    for row, chunk in enumerate(chunks):
        chunk.sequence.table_row, pages = row, chunk.sequence.block_table
        table[row, : len(pages)] = torch.tensor(pages)
    stops = torch.tensor([chunk.stop for chunk in chunks])
    slots, rows = torch.tensor(StepBatch(tuple(chunks)).slots(PAGE)), torch.arange(len(chunks))
    if all(chunk.tokens == 1 for chunk in chunks):
        decode = kernels.decode(DecodeRows(table, rows, stops, tuple(chunks)))
        return StepAttention(kernels, slots, len(chunks), decode, None)
    lengths = [chunk.tokens for chunk in chunks]
    seqlens = cu_seqlens_of(lengths), cu_seqlens_of(stops.tolist())
    return StepAttention(kernels, slots, 0, None, kernels.prefill(PrefillRows(table, rows, *seqlens, tuple(chunks))))


def attend(
    chunks: list[Chunk], queries: dict[int, torch.Tensor], kernels: type[TorchKernels] = RunKernels
) -> tuple[list[torch.Tensor], PagedKV]:
    """Each chunk's row; stale pages hold NaN. queries: q, k and v of the new token, by first page."""
    kv = filled_cache()
    taken = {page for chunk in chunks for page in chunk.sequence.block_table}
    stale = [page for page in range(PAGES) if page not in taken]
    kv.keys[:, stale] = kv.values[:, stale] = torch.nan
    q, k, v = (
        torch.stack([queries[chunk.sequence.block_table[0]][part] for chunk in chunks]).unflatten(1, (-1, HEAD_DIM))
        for part in (slice(0, 48), slice(48, 64), slice(64, 80))
    )
    return list(step(kernels(kv), chunks)(0, q, k, v)), kv


@pytest.mark.parametrize("kernels", [RunKernels, TorchKernels])
@pytest.mark.parametrize("short", range(PAGE))
def test_a_decoding_row_attends_to_its_own_tokens(short: int, kernels: type[TorchKernels]) -> None:
    generator = torch.Generator().manual_seed(1)
    queries = {pages[0]: torch.randn(80, generator=generator) for pages in LAYOUTS.values()}
    chunks = [decoding(pages, len(pages) * PAGE - short) for pages in LAYOUTS.values()]
    rows, kv = attend(chunks, queries, kernels)
    for name, chunk, row in zip(LAYOUTS, chunks, rows, strict=True):
        ks, vs = (x[0][chunk.sequence.block_table].flatten(0, 1)[: chunk.stop] for x in (kv.keys, kv.values))
        q = queries[chunk.sequence.block_table[0]][:48].view(HEADS, 1, HEAD_DIM)
        expected = F.scaled_dot_product_attention(
            q.double(), ks.transpose(0, 1).double(), vs.transpose(0, 1).double(), enable_gqa=True
        )
        assert torch.allclose(row, expected[:, 0].float(), atol=1e-6), name
        assert len(chunk.sequence.runs()) > FEW_RUNS or name != "backwards"


@pytest.mark.parametrize("tokens", [1, 5, 9])
def test_plain_attention_is_the_same(tokens: int) -> None:
    """Of several tokens of one sequence, which see each other up to themselves; and of one beside others."""
    generator = torch.Generator().manual_seed(1)
    chunks = []
    for pages in LAYOUTS.values():
        chunk = decoding(pages, len(pages) * PAGE - 1)
        start = max(0, chunk.stop - tokens)
        chunk.sequence.computed = start
        chunks.append(Chunk(chunk.sequence, start, chunk.stop))
    q, k, v = (
        torch.randn(sum(chunk.tokens for chunk in chunks), heads, HEAD_DIM, generator=generator)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    in_runs, gathered, plain = (
        step(kind(filled_cache()), chunks)(0, q, k, v) for kind in (RunKernels, TorchKernels, EagerKernels)
    )
    torch.testing.assert_close(plain, in_runs, atol=1e-6, rtol=0)
    torch.testing.assert_close(gathered, in_runs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pages", [[7, 8, 9], [7, 9, 12]])
def test_pages_taken_for_tokens_that_did_not_come_are_not_read(pages: list[int]) -> None:
    queries = {pages[0]: torch.randn(80, generator=torch.Generator().manual_seed(1))}
    ((expected,), _) = attend([decoding(pages, 3 * PAGE - 1)], queries)
    ((row,), _) = attend([decoding([*pages, 33, 50], 3 * PAGE - 1)], queries)
    assert torch.equal(row, expected)


def test_neighbours_change_no_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    queries = {pages[0]: torch.randn(80, generator=generator) for pages in LAYOUTS.values()}
    in_place = [decoding(pages, len(pages) * PAGE - 1) for name, pages in LAYOUTS.items() if name != "backwards"]
    together, _ = attend(in_place, queries)
    for chunk, row in zip(in_place, together, strict=True):
        ((alone,), _) = attend([chunk], queries)
        assert torch.equal(row, alone)


def test_runs_grow_with_the_pages() -> None:
    sequence = decoding([5, 6], 8).sequence
    assert sequence.runs() == [PageRun(5, 2)]
    sequence.block_table += [7, 20]
    assert sequence.runs() == sequence.runs() == [PageRun(5, 3), PageRun(20, 1)]
