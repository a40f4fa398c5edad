"""A vision stack over ranks: cut, divided by images or repeated, every rank has the rows that one rank gives.

The ranks are processes that talk through gloo. One set of them is started per group size and answers every question.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoints import write_nvila_checkpoint
from hypothesis import example, given
from hypothesis import strategies as st
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint
from ranks import start_ranks
from video_llama_3_checkpoint import write_video_llama_3_checkpoint

from siglane.config.images import ImageFacts
from siglane.config.vlm import VlmConfig
from siglane.families.parallel import EncoderParallel, ParallelStack, divide, resolve
from siglane.families.processor import load_processor
from siglane.families.registry import vlm_family
from siglane.families.stack import VisionStack
from siglane.nn.parallel import TensorParallel
from siglane.types import DecodedImage, DecodedVideo, ImagePatches, ImageTokens
from siglane.weights.hub import Checkpoint
from siglane.weights.load import fill, stored_tensors

WRITERS: dict[str, Callable[[Path], object]] = {
    "nvila": write_nvila_checkpoint,
    "llava_onevision": write_llava_onevision_checkpoint,
    "ovis2_5": write_ovis2_5_checkpoint,
    "nanovlm": write_nanovlm_checkpoint,
    "smolvlm2": write_idefics3_checkpoint,
    "video_llama_3": write_video_llama_3_checkpoint,
}
WISHES: tuple[EncoderParallel, ...] = get_args(EncoderParallel)
RANKS = (2, 3)
SIZES = ((90, 50), (20, 30), (1, 1), (200, 40), (64, 64), (64, 64), (33, 170))
# numbers of the images of one call
CALLS: dict[str, tuple[int, ...]] = {
    "mixed sizes": tuple(range(len(SIZES))),
    "another order": (6, 2, 0, 4),
    "one image": (0,),
    "two alike": (4, 5),
    "none": (),
}

# what tensor parallelism cuts of a tower
CUT = (
    "attention.qkv.weight", "attention.qkv.bias", "attention.out_proj.weight", "mlp.fc1.weight", "mlp.fc1.bias",
    "mlp.fc2.weight",
)  # fmt: skip


@dataclass(frozen=True)
class Told:
    """What one rank tells of a family and a wish. rows and lengths by call; patches: what its tower read in each call;
    sizes: elements of its parameters."""

    parallel: str
    rows: dict[str, torch.Tensor]
    lengths: dict[str, tuple[int, ...]]
    patches: dict[str, int]
    sizes: dict[str, int]


def pictures(folder: Path) -> list[ImagePatches]:
    processor = load_processor(Checkpoint(folder))
    random = np.random.default_rng(0)
    found: list[DecodedImage | DecodedVideo] = [
        DecodedImage.from_rgb(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES
    ]
    layouts = processor.layouts([one.size for one in found])
    return [processor.patches(one, layout) for one, layout in zip(found, layouts, strict=True)]


def loaded(folder: Path, tp: TensorParallel, wish: EncoderParallel) -> ParallelStack:
    checkpoint = Checkpoint(folder)
    family, config = vlm_family(checkpoint), load_processor(checkpoint).config
    model = ParallelStack(config.images, tp, wish)
    fill(model.stack, family.vision_plan(config.images), vision_tensors(checkpoint, config))
    return model.eval()


def vision_tensors(checkpoint: Checkpoint, config: VlmConfig) -> list[Any]:
    family = vlm_family(checkpoint)
    plan = family.vision_plan(config.images)
    return [one for one in stored_tensors(family.vision_sources(checkpoint)) if plan.find(one.name) is not None]


@torch.no_grad()
def tell(folder: Path, tp: TensorParallel, wish: EncoderParallel) -> Told:
    model, images = loaded(folder, tp, wish), pictures(folder)
    seen: Counter[str] = Counter()
    answers: dict[str, ImageTokens] = {}
    for call, numbers in CALLS.items():
        hook = model.stack.encoder.tower.register_forward_pre_hook(
            lambda module, inputs, call=call: seen.update({call: len(inputs[0].pixels)})
        )
        answers[call] = model([images[number] for number in numbers])
        hook.remove()
    return Told(
        model.parallel,
        {call: answer.embeds for call, answer in answers.items()},
        {call: answer.lengths for call, answer in answers.items()},
        {call: seen[call] for call in CALLS},
        {name: parameter.numel() for name, parameter in model.stack.named_parameters()},
    )


def be_a_rank(rank: int, size: int, checkpoints: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    tp = TensorParallel.from_group()
    told = {(name, wish): tell(Path(checkpoints, name), tp, wish) for name in WRITERS for wish in WISHES}
    torch.save(told, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


@pytest.fixture(scope="module")
def told(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[Any, Told]]]:
    """What every rank of every group says."""
    groups = {}
    for size in RANKS:
        folder = tmp_path_factory.mktemp(f"ranks{size}")
        start_ranks(be_a_rank, (size, str(checkpoints), str(folder)), size)
        groups[size] = [torch.load(folder / str(rank), weights_only=False) for rank in range(size)]
    return groups


@pytest.fixture(scope="module")
def alone(checkpoints: Path) -> dict[str, Told]:
    return {name: tell(checkpoints / name, TensorParallel.single(), "auto") for name in WRITERS}


@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.slow
class TestRanks:
    def test_every_one_has_the_rows_of_a_single_one(
        self, told: Any, alone: dict[str, Told], name: str, wish: str, size: int
    ) -> None:
        for rank in told[size]:
            one = rank[name, wish]
            assert one.lengths == alone[name].lengths
            torch.testing.assert_close(one.rows, alone[name].rows, atol=1e-5, rtol=0)

    def test_heads_that_do_not_divide_divide_the_images(self, told: Any, name: str, wish: str, size: int) -> None:
        """Two heads on three ranks."""
        expected = {2: "tp", 3: "dp"}[size] if wish == "auto" else wish
        assert {rank[name, wish].parallel for rank in told[size]} == {expected}

    def test_each_encodes_its_share(
        self, told: Any, checkpoints: Path, alone: dict[str, Told], name: str, wish: str, size: int
    ) -> None:
        images = pictures(checkpoints / name)
        for number, rank in enumerate(told[size]):
            one = rank[name, wish]
            for call, numbers in CALLS.items():
                if one.parallel != "dp":
                    assert one.patches[call] == alone[name].patches[call]
                    continue
                patches = [images[image].layout.patches for image in numbers]
                share = divide(patches, size)[number]
                assert one.patches[call] == sum(patches[place] for place in share)

    def test_each_holds_its_share(self, told: Any, alone: dict[str, Told], name: str, wish: str, size: int) -> None:
        whole = alone[name].sizes
        for rank in told[size]:
            one = rank[name, wish]
            assert one.sizes.keys() == whole.keys()
            if one.parallel != "tp":
                assert one.sizes == whole
                continue
            # two heads and 40 columns are cut by 2 and whole on 3; nobody's biases of a sum are cut
            for key in (key for key in whole if key.startswith("encoder.tower.")):
                assert one.sizes[key] == whole[key] // (2 if size == 2 and key.endswith(CUT) else 1), key
            assert sum(one.sizes.values()) < sum(whole.values())


def test_one_rank_is_the_stack_itself(checkpoints: Path, alone: dict[str, Told]) -> None:
    config = load_processor(Checkpoint(checkpoints / "nvila")).config
    assert alone["nvila"].parallel == "replicate"
    assert alone["nvila"].sizes == {name: one.numel() for name, one in VisionStack(config.images).named_parameters()}
    assert alone["nvila"].rows["none"].shape == (0, config.language.hidden_size)


class TestResolve:
    @pytest.fixture(scope="class")
    def facts(self, checkpoints: Path) -> ImageFacts:
        return load_processor(Checkpoint(checkpoints / "nvila")).facts

    @staticmethod
    def ranks(size: int) -> TensorParallel:
        return TensorParallel(0, size, lambda tensor: tensor, lambda tensor: tensor)

    @pytest.mark.parametrize(
        ("heads", "inner", "size", "expected"),
        [
            (16, 4304, 2, "tp"), (16, 4304, 4, "tp"), (16, 4304, 8, "tp"), (16, 4304, 16, "tp"),
            (16, 4304, 3, "dp"), (16, 4304, 32, "dp"), (12, 3072, 8, "dp"), (12, 3072, 6, "tp"), (8, 50, 4, "dp"),
        ],
    )  # fmt: skip
    def test_auto(self, facts: ImageFacts, heads: int, inner: int, size: int, expected: str) -> None:
        vision = replace(facts.vision, num_attention_heads=heads, intermediate_size=inner, hidden_size=heads * 8)
        assert resolve("auto", replace(facts, vision=vision), self.ranks(size)) == expected

    @pytest.mark.parametrize("wish", WISHES)
    def test_a_wish_is_kept_and_one_rank_has_nothing_to_divide(self, facts: ImageFacts, wish: Any) -> None:
        assert resolve(wish, facts, self.ranks(1)) == "replicate"
        assert wish == "auto" or resolve(wish, facts, self.ranks(3)) == wish


def loads(patches: Sequence[int], shares: Sequence[Sequence[int]]) -> list[int]:
    return [sum(patches[image] for image in share) for share in shares]


class TestDivide:
    @given(patches=st.lists(st.integers(1, 20000), max_size=40), ranks=st.integers(1, 17))
    @example(patches=[], ranks=3)
    @example(patches=[7], ranks=5)
    @example(patches=[3, 3, 3, 3], ranks=2)
    def test_every_image_is_one_ranks_and_the_loads_are_alike(self, patches: list[int], ranks: int) -> None:
        shares = divide(patches, ranks)
        assert len(shares) == ranks
        assert sorted(image for share in shares for image in share) == list(range(len(patches)))
        assert all(list(share) == sorted(share) for share in shares)
        assert divide(tuple(patches), ranks) == shares
        found = loads(patches, shares)
        assert max(found) - min(found) <= max(patches, default=0)
        assert min(map(len, shares)) >= 1 or len(patches) < ranks

    @given(patches=st.lists(st.integers(1, 9), max_size=12), ranks=st.integers(1, 5), random=st.randoms())
    def test_the_order_of_the_images_does_not_change_the_loads(
        self, patches: list[int], ranks: int, random: Any
    ) -> None:
        other = random.sample(patches, len(patches))
        assert loads(patches, divide(patches, ranks)) == loads(other, divide(other, ranks))

    @pytest.mark.parametrize(
        ("patches", "ranks", "expected"),
        [
            ([5, 5, 5, 5, 5], 2, ((0, 2, 4), (1, 3))),
            ([1, 2, 3, 4], 1, ((0, 1, 2, 3),)),
            ([1, 9], 3, ((1,), (0,), ())),
            ([10, 1, 1, 1, 7], 2, ((0,), (1, 2, 3, 4))),
            ([], 2, ((), ())),
        ],
    )
    def test_by_hand(self, patches: list[int], ranks: int, expected: tuple[tuple[int, ...], ...]) -> None:
        assert divide(patches, ranks) == expected
