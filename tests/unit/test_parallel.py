"""Tensor parallelism: any number of ranks gives one rank's answers, and each rank holds only its share.

The ranks are processes that talk through gloo. One set of them is started per group size and answers every question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from math import prod
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import start_ranks
from torch import nn

from siglane.config.language import LanguageConfig
from siglane.config.projector import (
    ProjectorConfig,
    llava_projector,
    pixel_shuffle_projector,
    vila_projector,
    vocabulary_projector,
)
from siglane.config.vision import VisionConfig
from siglane.lm.attention import SegmentAttention
from siglane.lm.qwen import QwenModel
from siglane.nn.linear import ColumnParallelLinear, QKVParallelLinear, ShardedModule, attention_parallel
from siglane.nn.parallel import TensorParallel
from siglane.projector.build import build_projector
from siglane.projector.mlp import Projector
from siglane.types import Grid, PackedPatches
from siglane.vision.tower import SiglipVisionModel

Answers = dict[str, torch.Tensor]
SIZES = (2, 3, 4)
GRIDS = [Grid(2, 6), Grid(4, 4), Grid(4, 4)]


@dataclass(frozen=True)
class Case:
    """A model and questions to it."""

    build: Callable[[TensorParallel], nn.Module]
    ask: Callable[[Any], Answers]


def vision_config(heads: int, inner: int) -> VisionConfig:
    raw = {
        "hidden_size": 48, "num_attention_heads": heads, "intermediate_size": inner, "num_hidden_layers": 2,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    return replace(VisionConfig.from_hf(raw, feature_layer=-1, post_norm=True), position_resize="bicubic")


def navit_config() -> VisionConfig:
    raw = {
        "hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 50, "num_hidden_layers": 3,
        "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    return VisionConfig.from_navit(raw)


def language_config(model_type: str, heads: int, kv_heads: int, **facts: Any) -> LanguageConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96, "head_dim": 6}
    return LanguageConfig.from_hf(
        {**sizes, "model_type": model_type, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **facts}
    )


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ask_tower(tower: SiglipVisionModel) -> Answers:
    packed = PackedPatches(noise(sum(grid.area for grid in GRIDS), tower.config.patch_dim), tuple(GRIDS))
    features = tower(packed)
    return {"features": features} | ({} if tower.head is None else {"pooled": tower.pool(features, GRIDS)})


def ask_projector(projector: Projector) -> Answers:
    features = noise(sum(grid.area for grid in GRIDS), projector.config.input_size)
    return {"rows": projector(features, GRIDS)}


def ask_language_model(model: QwenModel) -> Answers:
    ids = torch.arange(5, 14)
    answers: Answers = {}
    for _ in range(6):
        hidden = model(model.embed(ids), torch.arange(len(ids)), SegmentAttention([len(ids)]))
        logits = model.logits(hidden)
        answers.setdefault("logits", logits)
        ids = torch.cat((ids, logits[-1:].argmax(-1)))
    return answers | {"greedy": ids}


def tower_case(heads: int, inner: int) -> Case:
    return Case(lambda tp: SiglipVisionModel(vision_config(heads, inner), tp), ask_tower)


def projector_case(config: ProjectorConfig) -> Case:
    return Case(lambda tp: Projector(config, tp), ask_projector)


def vocabulary_case(words: int) -> Case:
    config = vocabulary_projector(2, words + 4, 4, head="head", table="vte", input_size=12, output_size=24)
    return Case(lambda tp: build_projector(config, tp), ask_projector)


def language_case(config: LanguageConfig) -> Case:
    return Case(lambda tp: QwenModel(config, tp), ask_language_model)


CASES = {
    "tower of 16 heads, 4304 wide": tower_case(16, 4304),
    "tower of 12 heads, 50 wide": tower_case(12, 50),
    "tower with rotation": Case(lambda tp: SiglipVisionModel(navit_config(), tp), ask_tower),
    "qwen2, 2 key/value heads, 101 words": language_case(language_config("qwen2", 8, 2, vocab_size=101)),
    "qwen3, tied": language_case(language_config("qwen3", 4, 4, tie_word_embeddings=True, intermediate_size=50)),
    "qwen3, 3 key/value heads, biased": language_case(language_config("qwen3", 12, 3, attention_bias=True)),
    "qwen2, 1 key/value head": language_case(language_config("qwen2", 12, 1)),
    **{
        f"{kind} to {width}": projector_case(vila_projector(kind, input_size=12, output_size=width))
        for kind in ("linear", "mlp2x_gelu", "mlp3x_gelu", "mlp_downsample", "mlp_downsample_3x3_fix")
        for width in (24, 25)
    },
    "mlp_downsample_3x3_s2": projector_case(vila_projector("mlp_downsample_3x3_s2", input_size=12, output_size=24)),
    "mlp_downsample_3x3_s2_new": projector_case(
        vila_projector("mlp_downsample_3x3_s2_new", input_size=36, output_size=24)
    ),
    "llava": projector_case(llava_projector(input_size=12, output_size=24)),
    "bee": projector_case(llava_projector(input_size=12, output_size=24, middle_size=96, pre_norm=1e-6)),
    "pixel shuffle": projector_case(pixel_shuffle_projector(2, input_size=12, output_size=24)),
    "visual vocabulary of 120 words": vocabulary_case(120),
    "visual vocabulary of 121 words": vocabulary_case(121),
}


def parts_and_sizes(module: nn.Module, name: str, rows: int) -> dict[str, int]:
    """The parts that parameter `name` is made of on one rank, with their rows."""
    if isinstance(module, QKVParallelLinear):
        return {part: heads * module.head_dim for part, heads in module.whole.items()}
    if isinstance(module, ColumnParallelLinear):
        return module.sections
    return {"": rows}


def whole_model(case: Case) -> nn.Module:
    """The model on one rank, every parameter drawn from the same seed in every process."""
    model = case.build(TensorParallel.single()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            drawn = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1 + drawn if "norm" in name and name.endswith("weight") else drawn)
    return model


def sharded_model(case: Case, whole: nn.Module, tp: TensorParallel) -> nn.Module:
    """The model on the rank of `tp`, loaded from the tensors of `whole` as from a checkpoint."""
    model = case.build(tp).eval()
    for name, parameter in whole.named_parameters():
        path, _, leaf = name.rpartition(".")
        target = model.get_submodule(path)
        sizes = parts_and_sizes(whole.get_submodule(path), leaf, parameter.shape[0])
        if isinstance(target, ShardedModule):
            assert set(sizes) == set(target.parts(leaf))
            for part, tensor in zip(sizes, parameter.detach().split(list(sizes.values())), strict=True):
                target.load_part(leaf, part, tensor)
        else:
            target.get_parameter(leaf).data.copy_(parameter)
    return model


@dataclass(frozen=True)
class Told:
    """What one rank tells: its answers, the sizes of its parameters, and what its collectives gave."""

    answers: dict[str, Answers]
    shares: dict[str, dict[str, int]]
    collectives: Answers


def collectives(tp: TensorParallel) -> Answers:
    mine = torch.arange(6.0).reshape(2, 3) + 10 * tp.rank
    return {
        "sum": tp.all_reduce(mine.clone()),
        "gathered": tp.all_gather(mine),
        "gathered from a transposed tensor": tp.all_gather(mine.T),
    }


@torch.no_grad()
def be_a_rank(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    tp = TensorParallel.from_group()
    answers, shares = {}, {}
    for name, case in CASES.items():
        model: Any = sharded_model(case, whole_model(case), tp)
        shares[name] = {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}
        answers[name] = case.ask(model)
    torch.save(Told(answers, shares, collectives(tp)), f"{folder}/{rank}")
    dist.destroy_process_group()


class Groups(dict[int, list[Told]]):
    """What every rank of a group says, by the group's size; started by whoever asks first."""

    def __init__(self, folders: pytest.TempPathFactory) -> None:
        super().__init__()
        self.folders = folders

    def __missing__(self, size: int) -> list[Told]:
        folder = self.folders.mktemp(f"ranks{size}")
        start_ranks(be_a_rank, (size, str(folder)), size)
        self[size] = [torch.load(folder / str(rank), weights_only=False) for rank in range(size)]
        return self[size]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Groups:
    return Groups(tmp_path_factory)


@pytest.fixture(scope="module")
def alone() -> dict[str, Answers]:
    with torch.no_grad():
        return {name: case.ask(whole_model(case)) for name, case in CASES.items()}


EVERY_SIZE = pytest.mark.parametrize("size", SIZES)


@EVERY_SIZE
@pytest.mark.parametrize("case", CASES)
def test_every_rank_gives_the_answers_of_one(told: Groups, alone: dict[str, Answers], case: str, size: int) -> None:
    for rank in told[size]:
        torch.testing.assert_close(rank.answers[case], alone[case], atol=1e-5, rtol=0)


def share(told: Groups, case: str, size: int, parameter: str) -> int:
    """Elements of `parameter` on a rank; every rank has as many."""
    (elements,) = {rank.shares[case][parameter] for rank in told[size]}
    return elements


@pytest.mark.parametrize(
    ("case", "parameter", "whole", "cuts"),
    [
        # 16 heads and 4304 columns on 3 ranks are kept whole
        ("tower of 16 heads, 4304 wide", "blocks.0.attention.qkv.weight", (3 * 48, 48), {2: 2, 3: 1, 4: 4}),
        ("tower of 16 heads, 4304 wide", "blocks.0.attention.qkv.bias", (3 * 48,), {2: 2, 3: 1, 4: 4}),
        ("tower of 16 heads, 4304 wide", "blocks.1.attention.out_proj.weight", (48, 48), {2: 2, 3: 1, 4: 4}),
        ("tower of 16 heads, 4304 wide", "blocks.1.attention.out_proj.bias", (48,), {2: 1, 3: 1, 4: 1}),
        ("tower of 16 heads, 4304 wide", "blocks.0.mlp.fc1.weight", (4304, 48), {2: 2, 3: 1, 4: 4}),
        ("tower of 16 heads, 4304 wide", "blocks.0.mlp.fc1.bias", (4304,), {2: 2, 3: 1, 4: 4}),
        ("tower of 16 heads, 4304 wide", "blocks.0.mlp.fc2.weight", (48, 4304), {2: 2, 3: 1, 4: 4}),
        ("tower of 16 heads, 4304 wide", "blocks.0.mlp.fc2.bias", (48,), {2: 1, 3: 1, 4: 1}),
        ("tower of 16 heads, 4304 wide", "patch_embedding.weight", (48, 48), {2: 1, 3: 1, 4: 1}),
        # 12 heads are cut on 3 ranks although 50 columns are not
        ("tower of 12 heads, 50 wide", "blocks.0.attention.qkv.weight", (3 * 48, 48), {2: 2, 3: 3, 4: 4}),
        ("tower of 12 heads, 50 wide", "blocks.0.mlp.fc1.weight", (50, 48), {2: 2, 3: 1, 4: 1}),
        # a vocabulary that does not divide is kept whole
        ("qwen2, 2 key/value heads, 101 words", "embed_tokens.weight", (101, 32), {2: 1, 3: 1, 4: 1}),
        ("qwen2, 1 key/value head", "embed_tokens.weight", (96, 32), {2: 2, 3: 3, 4: 4}),
        ("qwen2, 1 key/value head", "lm_head.weight", (96, 32), {2: 2, 3: 3, 4: 4}),
        ("qwen2, 1 key/value head", "blocks.0.mlp.gate_up.weight", (192, 32), {2: 2, 3: 3, 4: 4}),
        ("qwen2, 1 key/value head", "blocks.0.mlp.down_proj.weight", (32, 96), {2: 2, 3: 3, 4: 4}),
        ("qwen3, 3 key/value heads, biased", "blocks.0.attention.qkv.weight", (18 * 6, 32), {2: 1, 3: 3, 4: 1}),
        ("qwen3, 3 key/value heads, biased", "blocks.0.attention.o_proj.bias", (32,), {2: 1, 3: 1, 4: 1}),
        ("qwen3, 3 key/value heads, biased", "blocks.0.attention.q_norm.weight", (6,), {2: 1, 3: 1, 4: 1}),
        # a projector is cut in pairs of linear layers; a layer in front of a norm is cut too and gathers its output
        ("mlp_downsample to 24", "layers.1.weight", (24, 48), {2: 2, 3: 3, 4: 4}),
        ("mlp_downsample to 24", "layers.3.weight", (24, 24), {2: 2, 3: 3, 4: 4}),
        ("mlp_downsample to 25", "layers.3.weight", (25, 25), {2: 1, 3: 1, 4: 1}),
        ("mlp_downsample_3x3_fix to 25", "layers.1.weight", (36, 108), {2: 2, 3: 3, 4: 4}),
        # a visual vocabulary is cut over its words, where they divide
        ("visual vocabulary of 120 words", "head.weight", (120, 48), {2: 2, 3: 3, 4: 4}),
        ("visual vocabulary of 120 words", "norm.bias", (120,), {2: 2, 3: 3, 4: 4}),
        ("visual vocabulary of 121 words", "head.weight", (121, 48), {2: 1, 3: 1, 4: 1}),
        ("visual vocabulary of 121 words", "table", (125, 24), {2: 1, 3: 1, 4: 1}),
    ],
)
def test_a_rank_holds_only_its_share(
    told: Groups, case: str, parameter: str, whole: Sequence[int], cuts: dict[int, int]
) -> None:
    assert {size: share(told, case, size, parameter) for size in SIZES} == {
        size: prod(whole) // cut for size, cut in cuts.items()
    }


@pytest.mark.parametrize(
    ("case", "heads"),
    [  # heads of q + k + v on one rank, by the group's size
        ("qwen2, 2 key/value heads, 101 words", {2: 4 + 1 + 1, 3: 8 + 2 + 2, 4: 2 + 1 + 1}),
        ("qwen2, 1 key/value head", {2: 6 + 1 + 1, 3: 4 + 1 + 1, 4: 3 + 1 + 1}),
        ("qwen3, tied", {2: 2 + 2 + 2, 3: 4 + 4 + 4, 4: 1 + 1 + 1}),
    ],
)
def test_key_value_heads_are_repeated_over_ranks_only_where_they_are_too_few(
    told: Groups, case: str, heads: dict[int, int]
) -> None:
    head = 6 * 32
    assert {size: share(told, case, size, "blocks.1.attention.qkv.weight") / head for size in SIZES} == heads


@EVERY_SIZE
def test_collectives_sum_and_concatenate(told: Groups, size: int) -> None:
    parts = [torch.arange(6.0).reshape(2, 3) + 10 * rank for rank in range(size)]
    for rank in told[size]:
        assert torch.equal(rank.collectives["sum"], torch.stack(parts).sum(0))
        assert torch.equal(rank.collectives["gathered"], torch.cat(parts, -1))
        transposed = torch.cat([part.T for part in parts], -1)
        assert torch.equal(rank.collectives["gathered from a transposed tensor"], transposed)


class TestValue:
    """`TensorParallel` without processes."""

    @staticmethod
    def rank(rank: int, size: int) -> TensorParallel:
        return TensorParallel(rank, size, lambda tensor: tensor, lambda tensor: tensor)

    @pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0), (0, -1), (5, 4)])
    def test_a_rank_outside_its_group_is_refused(self, rank: int, size: int) -> None:
        with pytest.raises(ValueError, match=f"rank {rank} is outside a group of {size}"):
            self.rank(rank, size)

    def test_one_rank_talks_to_nobody(self) -> None:
        single, tensor = TensorParallel.single(), torch.ones(3)
        assert (single.rank, single.size) == (0, 1)
        assert single.all_reduce(tensor) is tensor
        assert single.all_gather(tensor) is tensor
        assert torch.equal(single.shard(tensor, 0), tensor)

    def test_what_does_not_divide_is_replicated(self) -> None:
        group = self.rank(1, 4)
        assert group.divides(8, 12) is group
        assert group.divides() is group
        assert group.divides(8, 6).size == 1
        assert group.divides(4304).size == 4
        assert self.rank(1, 3).divides(4304).size == 1

    def test_a_cut_is_an_equal_share_in_the_order_of_the_ranks(self) -> None:
        tensor = torch.arange(24).reshape(4, 6)
        assert torch.equal(torch.cat([self.rank(rank, 2).shard(tensor, 0) for rank in range(2)]), tensor)
        assert torch.equal(torch.cat([self.rank(rank, 3).shard(tensor, 1) for rank in range(3)], 1), tensor)

    @pytest.mark.parametrize(
        ("heads", "kv_heads", "size", "cut"),
        [
            (16, 16, 2, True),
            (16, 16, 3, False),
            (8, 2, 4, True),
            (8, 2, 8, True),
            (12, 3, 2, False),
            (12, 3, 6, True),
            (28, 4, 4, True),
            (28, 4, 8, False),
            (14, 2, 7, False),
            (6, 6, 12, False),
        ],
    )
    def test_attention_is_cut_where_query_and_key_heads_allow_it(
        self, heads: int, kv_heads: int, size: int, cut: bool
    ) -> None:
        assert attention_parallel(self.rank(0, size), heads, kv_heads).size == (size if cut else 1)
