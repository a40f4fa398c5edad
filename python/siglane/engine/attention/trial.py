"""What kernels over a paged cache are tried with: a few sequences of awkward lengths, NaN wherever nobody may look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from siglane.config.language import LanguageConfig
from siglane.engine.attention.kernels import DecodeRows, Kernels, PrefillRows
from siglane.engine.batch import Chunk, Sequence
from siglane.engine.cache.kv import SCRATCH_PAGES, PagedKV
from siglane.lm.qwen import QwenModel
from siglane.nn.attention import cu_seqlens_of, eager
from siglane.types import Prompt, Request, SamplingParams

Trial = tuple[Callable[[Callable[[PagedKV], Kernels]], torch.Tensor], torch.Tensor]  # what runs it, what is expected

LONG = 700  # tokens: several parts for a kernel that cuts sequences


class Shape(NamedTuple):
    """Of a decoder's attention on this rank, and of its cache."""

    config: LanguageConfig
    heads: int
    kv_heads: int
    page_size: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, language: QwenModel, kv: PagedKV) -> Shape:
        return cls(language.config, language.heads, language.kv_heads, kv.page_size, kv.keys.dtype, kv.keys.device)

    def __str__(self) -> str:
        return f"{self.heads} heads of {self.config.head_dim} over {self.kv_heads} in {self.dtype}"

    def cache(self, pages: int) -> PagedKV:
        """Of one layer."""
        config = replace(self.config, num_hidden_layers=1)
        return PagedKV(
            config, self.kv_heads, pages=pages, page_size=self.page_size, dtype=self.dtype, device=self.device
        )


class Filled(NamedTuple):
    """kv: a small cache; table: a row of pages for each sequence, in no order; keys, values: what each one sees,
    `[length, kv_heads, head_dim]`."""

    kv: PagedKV
    table: torch.Tensor
    lengths: list[int]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    generator: torch.Generator

    @property
    def slots(self) -> list[torch.Tensor]:
        """Of each sequence's tokens."""
        offsets = torch.arange(self.kv.page_size, device=self.table.device)
        places = (self.table.long()[..., None] * self.kv.page_size + offsets).flatten(1)
        return [row[:length] for row, length in zip(places, self.lengths, strict=True)]

    def rows(self, heads: int, count: int) -> torch.Tensor:
        """Loud queries: a sharp softmax shows a wrong scale. Heads beside them, as in the product that made them."""
        _, _, _, _, head_dim = self.kv.keys.shape
        rows = 2 * torch.randn(count, heads + 2, head_dim, generator=self.generator)
        return rows.to(self.kv.keys)[:, :heads]


def filled(shape: Shape, lengths: list[int]) -> Filled:
    """What is in no sequence is NaN."""
    generator = torch.Generator().manual_seed(0)
    columns = -(-max(lengths) // shape.page_size)
    pages = torch.randperm(len(lengths) * columns, generator=generator) + SCRATCH_PAGES
    kv = shape.cache(len(pages))
    table = pages.view(len(lengths), columns).int().to(shape.device)
    made = Filled(kv, table, lengths, [], [], generator)
    for cache, own in ((kv.keys, made.keys), (kv.values, made.values)):
        cache.fill_(torch.nan)
        for slots in made.slots:
            own.append(torch.randn(len(slots), *cache.shape[3:], generator=generator).to(cache))
            cache[0].flatten(0, 1)[slots] = own[-1]
    return made


def decoded(shape: Shape) -> Trial:
    """One token each; the last sees what padding does."""
    made = filled(shape, [1, shape.page_size, shape.page_size + 1, LONG, 1])
    device = shape.device
    made.table[-1] = 0
    made.kv.keys[:, 0, 0] = made.kv.values[:, 0, 0] = 1
    made.keys[-1], made.values[-1] = made.kv.slots[0][0][:1], made.kv.slots[0][1][:1]
    count = len(made.lengths)
    q = made.rows(shape.heads, count)
    rows = torch.arange(count, device=device)
    chunks = tuple(_chunk(row, length - 1, length) for row, length in enumerate(made.lengths))
    step = DecodeRows(made.table, rows, torch.tensor(made.lengths, device=device), chunks)
    return lambda build: build(made.kv).decode(step)(0, q), _expected(made, q.split(1))


def prefilled(shape: Shape) -> Trial:
    """Some begin, some go on: the last query of each sees all of its keys."""
    stops, starts = [7, shape.page_size + 9, 70], [0, shape.page_size + 1, 37]
    made = filled(shape, stops)
    device, tokens = shape.device, [stop - start for start, stop in zip(starts, stops, strict=True)]
    q = made.rows(shape.heads, sum(tokens))
    k, v = (torch.cat([own[start:] for own, start in zip(x, starts, strict=True)]) for x in (made.keys, made.values))
    chunks = tuple(_chunk(row, start, stop) for row, (start, stop) in enumerate(zip(starts, stops, strict=True)))
    rows = torch.arange(len(stops), device=device)
    seqlens = cu_seqlens_of(tokens).to(device), cu_seqlens_of(stops).to(device)
    step = PrefillRows(made.table, rows, *seqlens, chunks)
    return lambda build: build(made.kv).prefill(step)(0, q, k, v), _expected(made, q.split(tokens))


def stored(shape: Shape) -> Trial:
    """Tokens in the middle of pages; nothing else is touched."""
    made = filled(shape, [shape.page_size + 1, 3])
    slots = torch.cat([slots[1:] for slots in made.slots])
    k, v = (made.rows(shape.kv_heads, len(slots)) for _ in range(2))
    before, expected = (torch.stack((made.kv.keys, made.kv.values)).nan_to_num(0) for _ in range(2))
    for cache, rows in zip(expected[:, 0].flatten(1, 2), (k, v), strict=True):
        cache[slots] = rows

    def run(build: Callable[[PagedKV], Kernels]) -> torch.Tensor:
        made.kv.keys.copy_(before[0])
        made.kv.values.copy_(before[1])
        build(made.kv).store(0, slots, k, v)
        return torch.stack((made.kv.keys, made.kv.values))

    return run, expected.float()


def _expected(made: Filled, queries: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """In float32, a sequence after the other."""
    rows = []
    for q, k, v in zip(queries, made.keys, made.values, strict=True):
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        rows.append(eager(q[None].float(), k[None].float(), v[None].float(), scale=q.shape[-1] ** -0.5, mask=seen)[0])
    return torch.cat(rows)


def _chunk(row: int, start: int, stop: int) -> Chunk:
    request = Request("trial", Prompt((0,) * stop), SamplingParams(), 1)
    sequence = Sequence.of(request, 0, 0)
    sequence.table_row, sequence.computed = row, start
    return Chunk(sequence, start, stop)
