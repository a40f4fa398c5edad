"""Ovis' visual vocabulary: a float32 softmax in every dtype, bounded memory, whole tables cut over ranks."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peak import PEAK
from waiting import PATIENCE

from siglane.config.projector import LinearLayer, NormLayer, ProjectorConfig, vocabulary_projector
from siglane.errors import ConfigError
from siglane.nn.parallel import TensorParallel
from siglane.projector.visual_vocabulary import CHUNK_ROWS, VisualVocabulary
from siglane.types import Grid

WORDS, INDICATORS = 3000, 4
GRIDS = [Grid(4, 6), Grid(2, 2), Grid(8, 4)]


def config(words: int = WORDS, *, input_size: int = 8, output_size: int = 6) -> ProjectorConfig:
    return vocabulary_projector(
        2, words + INDICATORS, INDICATORS, head="head", table="vte", input_size=input_size, output_size=output_size
    )


def built(words: int = WORDS, *, dtype: torch.dtype = torch.float32, sharpness: float = 1.0) -> VisualVocabulary:
    module = VisualVocabulary(config(words)).to(dtype)
    generator = torch.Generator().manual_seed(words)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(sharpness * (1 + 0.1 * noise) if name == "norm.weight" else noise)
    return module.requires_grad_(False)


def features(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    patches = sum(grid.area for grid in GRIDS)
    return torch.randn(patches, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def merged(rows: torch.Tensor) -> torch.Tensor:
    """Raster order -> 2 x 2 blocks side by side, with loops."""
    found, start = [], 0
    for h, w in GRIDS:
        tile = rows[start : start + h * w].reshape(h, w, -1)
        found += [
            torch.cat([tile[y, x], tile[y, x + 1], tile[y + 1, x], tile[y + 1, x + 1]])
            for y in range(0, h, 2)
            for x in range(0, w, 2)
        ]
        start += h * w
    return torch.stack(found)


def test_facts() -> None:
    found = config()
    assert (found.merge, found.factor) == ("blocks", 2)
    assert found.layers == (LinearLayer("head.0", 32, WORDS, bias=False), NormLayer("head.1", WORDS, 1e-5))
    with pytest.raises(ConfigError, match="4 rows has none left beside its 4 indicators"):
        config(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_is_the_expected_word_under_a_float32_softmax(dtype: torch.dtype) -> None:
    """Against the whole table and zeros for the indicators, as the reference pads them."""
    module, x = built(dtype=dtype), features(dtype)
    logits = torch.nn.functional.layer_norm(
        merged(x) @ module.head.weight.T, (WORDS,), module.norm.weight, module.norm.bias, 1e-5
    )
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    assert (probabilities.sum(-1) - 1).abs().max() < 1e-5
    padded = torch.cat((probabilities.to(dtype), torch.zeros(len(logits), INDICATORS, dtype=dtype)), -1)
    expected = (padded.double() @ module.table.double()).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(module(x, GRIDS), expected, atol=tolerance, rtol=0)


class Ranks:
    """A group of threads that meet at every collective."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=PATIENCE)
        self._given: list[torch.Tensor] = [torch.empty(0)] * size

    def run(self, work: Callable[[TensorParallel], torch.Tensor]) -> list[torch.Tensor]:
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: work(self._view(rank)), range(self.size)))

    def _view(self, rank: int) -> TensorParallel:
        def meet(mine: torch.Tensor, join: Callable[[list[torch.Tensor]], torch.Tensor]) -> torch.Tensor:
            self._given[rank] = mine
            self._barrier.wait()
            joined = join(self._given)
            self._barrier.wait()
            return joined

        return TensorParallel(
            rank,
            self.size,
            lambda mine: meet(mine, lambda all_: sum(all_[1:], all_[0])),
            lambda mine: meet(mine, concat),
        )


def concat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tensors, -1)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_rank_gives_the_rows_of_one(size: int, dtype: torch.dtype, tolerance: float) -> None:
    """Logits of some hundreds: without the maximum over all ranks the exponentials overflow."""
    whole, x = built(dtype=dtype, sharpness=100.0), features(dtype)

    def work(tp: TensorParallel) -> torch.Tensor:
        module = VisualVocabulary(config(), tp).to(dtype)
        for name in ("weight", "bias"):
            module.norm.load_part(name, "", whole.norm.get_parameter(name))
        module.head.load_part("weight", "", whole.head.weight)
        module.load_part("table", "", whole.table)
        assert module.table.shape == (WORDS // size + INDICATORS, 6)
        with torch.no_grad():  # of the thread
            return torch.cat((module(x, GRIDS), torch.stack([module.indicator(index) for index in range(4)])))

    expected = torch.cat((whole(x, GRIDS), whole.table[-4:]))
    for rows in Ranks(size).run(work):
        torch.testing.assert_close(rows, expected, atol=tolerance, rtol=tolerance)


def test_indicators_cannot_be_mixed_in() -> None:
    module, x = built(), features()
    before = module(x, GRIDS)
    module.table[WORDS:] = 1e9
    assert torch.equal(module(x, GRIDS), before)
    assert torch.equal(torch.stack([module.indicator(index) for index in range(4)]), module.table[-4:])


def test_chunks_do_not_change_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = built(), features()
    whole = module(x, GRIDS)
    monkeypatch.setattr("siglane.projector.visual_vocabulary.CHUNK_ROWS", 5)
    torch.testing.assert_close(module(x, GRIDS), whole, atol=1e-6, rtol=0)


def test_a_table_of_another_size_is_refused() -> None:
    module = VisualVocabulary(config())
    with pytest.raises(ValueError, match=r"has shape \[3000, 6\], the model needs \[3004, 6\]"):
        module.load_part("table", "", torch.empty(WORDS, 6))
    with pytest.raises(ValueError, match=r"has shape \[2999\], the model needs \[3000\]"):
        module.norm.load_part("weight", "", torch.empty(2999))


def test_a_vocabulary_that_does_not_divide_is_whole_on_every_rank() -> None:
    group = TensorParallel(1, 7, lambda tensor: tensor, lambda tensor: tensor)
    assert VisualVocabulary(config(), group).table.shape == (WORDS + INDICATORS, 6)
    assert VisualVocabulary(config(3003), group).table.shape == (3003 // 7 + INDICATORS, 6)


MEASURE = """
import json, sys, torch
from siglane.config.projector import vocabulary_projector
from siglane.projector.visual_vocabulary import VisualVocabulary
from siglane.types import Grid

torch.set_num_threads(1)
config = vocabulary_projector(2, 65536, 4, head="head", table="vte", input_size=2, output_size=8)
module = VisualVocabulary(config).requires_grad_(False)
for parameter in module.parameters():
    torch.nn.init.normal_(parameter)
peaks = [peak()]
with torch.inference_mode():
    for rows in map(int, sys.argv[1:]):
        module(torch.randn(4 * rows, 2), [Grid(2, 2 * rows)])
        peaks.append(peak())
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells a process's peak there")
@pytest.mark.slow  # large pictures
def test_the_peak_memory_does_not_grow_with_the_picture() -> None:
    """A released vocabulary in a process of its own: 1024 rows of float32 logits alone would take 256 MiB."""
    command = [sys.executable, "-c", PEAK + MEASURE, str(CHUNK_ROWS), "1024"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert answer.returncode == 0, answer.stderr
    before, one_chunk, picture = json.loads(answer.stdout)
    print(f"bytes before {before}, after {CHUNK_ROWS} rows {one_chunk}, after 1024 rows {picture}")
    assert one_chunk - before < 4 * 64 << 20
    assert picture - one_chunk < 96 << 20
