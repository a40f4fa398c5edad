"""The CUDA form of a step without a GPU: tensors that have a device and a shape, no numbers (torch's FakeTensorMode).

Reading one back raises, as does mixing devices; what else would wait for the device or copy to it is counted. Needs a
build of torch for CUDA (`make test-fake-cuda`); the build for CPUs does not know these devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from causal_lm_checkpoint import Kind, write_causal_lm_checkpoint
from checkpoints import write_nvila_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint, write_relative
from llava_qwen_checkpoint import write_llava_qwen_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint, write_ovis2_6_checkpoint
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from video_llama_3_checkpoint import write_video_llama_3_checkpoint

from siglane.engine import words
from siglane.engine.attention.by_rows import RowKernels
from siglane.engine.attention.cuda import TriedKernels, TritonKernels, VarlenKernels
from siglane.engine.batch import Chunk, Sequence, StepBatch
from siglane.engine.cache import kv as kv_module
from siglane.engine.cache.kv import PagedKV
from siglane.engine.constraints.constraint import mask_words
from siglane.engine.device import Device, finite
from siglane.engine.edits import Tally
from siglane.engine.limits import StepLimits
from siglane.engine.sampling.cuda import ChoiceKernels, DeviceSampler
from siglane.families.model import VisionLanguageModel
from siglane.families.processor import Processor, load_processor
from siglane.families.registry import CHAT_FAMILIES, vlm_family
from siglane.nn import attention, rope
from siglane.nn.cuda.fp8 import Fp8Linear
from siglane.nn.cuda.invariant import make_invariant
from siglane.nn.cuda.low_bits import LowBitLinear
from siglane.nn.cuda.ops import OPS
from siglane.nn.cuda.optimise import KERNELS
from siglane.nn.quantise import LAYERS, quantised
from siglane.types import DecodedImage, ImagePart, ImagePatches, Message, Prompt, Read, Request, SamplingParams
from siglane.weights.hub import open_checkpoint

pytestmark = [
    pytest.mark.fake_cuda,
    pytest.mark.skipif(torch.version.cuda is None, reason="needs a build of torch for CUDA: make test-fake-cuda"),
]

CUDA = torch.device("cuda", 0)
PAGE = 16
LAUNCHES: dict[Kind, int] = {"qwen2": 13, "llama": 13, "qwen3": 13, "qwen3_moe": 16}  # of a layer that decodes
FAMILIES: dict[str, Callable[[Path], object]] = {  # a family, and what else is to be told of its checkpoint
    "nvila": write_nvila_checkpoint,
    "r_4b": partial(write_relative, name="r_4b"),
    "bee": partial(write_relative, name="bee"),
    "llava_onevision, varco": partial(write_relative, name="varco"),
    "ovis2_5": write_ovis2_5_checkpoint,
    "ovis2_6": write_ovis2_6_checkpoint,
    "ovis2_6, experts": partial(write_ovis2_6_checkpoint, moe=True),
    "nanovlm": write_nanovlm_checkpoint,
    "llava_onevision": write_llava_onevision_checkpoint,
    "llava_qwen": write_llava_qwen_checkpoint,
    "idefics3": write_idefics3_checkpoint,
    "video_llama_3": write_video_llama_3_checkpoint,
    "videollama3_qwen2": partial(write_video_llama_3_checkpoint, layout="authors"),
    "causal_lm": write_causal_lm_checkpoint,
    "causal_lm, llama": partial(write_causal_lm_checkpoint, kind="llama"),
    "causal_lm, qwen3": partial(write_causal_lm_checkpoint, kind="qwen3"),
    "causal_lm, experts": partial(write_causal_lm_checkpoint, kind="qwen3_moe"),
}


class Event:
    """Of a stream that is not there."""

    def record(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...


class Seen(TorchDispatchMode):
    """Counts operations that are no views, and those between host and device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [one for one in (*args, *(kwargs or {}).values(), result) if isinstance(one, torch.Tensor)]
        if len({one.device.type for one in tensors if one.ndim}) > 1:
            self.copies.append(str(func))
        if not func.is_view:
            self.operations[str(func)] += 1
        return result


class Lists(TorchFunctionMode):
    """Counts what becomes a tensor of the device from Python's numbers, which is a copy that waits."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "cuda":
            self.count += 1
        return func(*args, **kwargs)


@dataclass
class Rig:
    """A family's model in bfloat16 on a device that is not there."""

    mode: FakeTensorMode
    processor: Processor
    device: Device

    def sequence(self, row: int, length: int, *images: ImagePatches) -> Sequence:
        """Of `length` tokens, all but the last computed; with images the prompt that asks about them."""
        prompt, ordered = Prompt(tuple(range(1, length + 1))), ()
        if images:
            parts = (*(ImagePart(number) for number in range(len(images))), "What is it?")
            prompt = self.processor.prompt([Message("user", parts)], [image.layout for image in images])
            ordered = prompt.in_order(images)
        request = Request(str(row), prompt, SamplingParams(), 9, "", ordered)
        sequence = Sequence.of(request, row, seed=0)
        first = 1 + 40 * row
        sequence.block_table = list(range(first, first + -(-len(sequence.token_ids) // PAGE)))
        sequence.computed, sequence.table_row = (0 if images else length - 1), row
        return sequence

    def decoding(self, count: int) -> list[Chunk]:
        return [Chunk(self.sequence(row, 30 + 20 * row), 29 + 20 * row, 30 + 20 * row) for row in range(count)]

    def run(self, *chunks: Chunk) -> tuple[torch.Tensor, Seen]:
        """Everything of a step but its result."""
        with Lists() as lists:
            plan = self.device.plan(StepBatch(chunks))
            try:
                with self.mode, torch.inference_mode(), Seen() as seen:
                    logits = self.device.forward(plan).logits
            finally:
                assert lists.count == 0
        return logits, seen


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What asks the driver gets the answers of an H100."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(attention, "tried_backend", lambda backends, *_: backends[0])  # a trial reads numbers
    monkeypatch.setattr(kv_module, "short_of_memory", lambda *_: torch.no_grad())
    rope.rotary_frequencies.cache_clear()
    yield
    rope.rotary_frequencies.cache_clear()  # no other test gets tensors without numbers


def build(folder: Path, write: Callable[[Path], object], records: bool = False) -> Rig:
    write(folder)
    processor = load_processor(open_checkpoint(folder))
    mode, limits = FakeTensorMode(allow_non_fake_inputs=True), StepLimits(8, 4096, 64)
    with mode, torch.device(CUDA), pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "host_memory", host_memory)
        with default_dtype(torch.bfloat16):
            model = VisionLanguageModel(processor.config).eval().requires_grad_(False)
        language = model.language
        for module in language.modules():
            module.__class__ = KERNELS.get(type(module), type(module))
        kv = PagedKV(language.config, language.kv_heads, pages=400, page_size=PAGE, dtype=torch.bfloat16, device=CUDA)
        kernels = TriedKernels(TritonKernels(kv), TritonKernels(kv), VarlenKernels(kv, grouped=False))
        choose = DeviceSampler(64, CUDA, ChoiceKernels(OPS.best_token, OPS.mask_scores))
        device = Device(model, kv, kernels, limits, buckets=(1, 2, 4, 8) if records else (), choose=choose)
    return Rig(mode, processor, device)


def host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A fake whose numbers, which only numpy writes, are real."""
    memory, numbers = torch.empty(shape, dtype=dtype, device="cpu"), np.empty(shape, np.int64)
    memory.numpy = lambda: numbers  # type: ignore[method-assign]
    return memory


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Parameters that are fakes cannot be cast."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def picture(processor: Processor, seed: int, count: int) -> ImagePatches:
    """One of `count` images of a prompt."""
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 130, 3), dtype=np.uint8)
    decoded = DecodedImage.from_rgb(pixels)
    return processor.patches(decoded, processor.layouts([decoded.size] * count)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_tower_prefill_and_decode_stay_on_the_device(family: str, tmp_path: Path) -> None:
    """Two prompts, each in a chunk, one behind a prefix; answers beside them."""
    rig = build(tmp_path / family, FAMILIES[family])
    assert vlm_family(open_checkpoint(tmp_path / family)).name == family.split(",")[0]
    vocabulary = rig.processor.config.language.vocab_size
    images = []
    if rig.processor.config.images is not None:
        images = [picture(rig.processor, seed, 2) for seed in range(2)]
    with rig.mode, torch.inference_mode(), Lists() as lists:
        rows = rig.device.encode(images) if images else ()
        flags = finite(rows)
    assert lists.count == 0
    assert [tuple(one.shape) for one in rows] == [
        (image.layout.rows, rig.processor.config.language.hidden_size) for image in images
    ]
    assert all(one.device == CUDA for one in (*rows, *([flags] if rows else [])))
    reading = [rig.sequence(6, 40, *images), rig.sequence(7, 50)]
    reading[0].features = dict(enumerate(rows))
    reading[0].computed = 0
    chunks = [
        *rig.decoding(2),
        Chunk(reading[0], 0, len(reading[0].token_ids)),
        Chunk(reading[1], 20, 50),
        *[chunk.with_guesses((3, 4)) for chunk in rig.decoding(3)[2:]],
    ]
    logits, _ = rig.run(*chunks)
    assert (logits.device, tuple(logits.shape)) == (CUDA, (2 + 1 + 1 + 3, vocabulary))


def test_no_family_is_left_out() -> None:
    assert {name.split(",")[0] for name in FAMILIES} == {family.name for family in CHAT_FAMILIES}


def test_a_decode_step_copies_its_numbers_and_nothing_else(tmp_path: Path) -> None:
    rig = build(tmp_path / "nvila", write_nvila_checkpoint, records=True)
    chunks = rig.decoding(3)
    _, first = rig.run(*chunks)
    logits, seen = rig.run(*chunks)
    assert tuple(logits.shape) == (3, rig.processor.config.language.vocab_size)
    assert seen.copies == ["aten.copy_.default"]
    assert first.copies == seen.copies
    assert first.operations["aten.index_put_.default"] == seen.operations["aten.index_put_.default"] + 1  # the pages


SAMPLING = (
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1, logprobs=3),
    SamplingParams(logit_bias=((3, 1.0),), min_tokens=5, stop_token_ids=(7,), logprobs=0),
    SamplingParams(repetition_penalty=1.2, presence_penalty=0.5),
)


class Held:
    """Stands for a place in a grammar."""

    def __init__(self, vocab_size: int) -> None:
        self.words = np.full(mask_words(vocab_size), 5)

    def mask(self, guesses: tuple[int, ...]) -> Any:
        return self.words


def test_choices_copy_their_numbers_and_wait_for_nothing(tmp_path: Path) -> None:
    """Two copies to the device in a whole step, its own and the sampler's, masks of grammars in it; the result is one
    tensor there."""
    rig = build(tmp_path / "nvila", write_nvila_checkpoint, records=True)
    chunks = rig.decoding(len(SAMPLING))
    for chunk, sampling in zip(chunks, SAMPLING, strict=True):
        chunk.sequence.request = replace(chunk.sequence.request, sampling=sampling)
        chunk.sequence.tally = Tally.wanted(sampling, chunk.sequence.token_ids)
    for chunk in chunks[1:]:
        chunk.sequence.constrained = Held(rig.processor.config.language.vocab_size)  # type: ignore[assignment]
    with Lists() as lists:
        plan = rig.device.plan(StepBatch(tuple(chunks)))
        with rig.mode, torch.inference_mode(), Seen() as seen:
            pending = rig.device(plan)
    assert lists.count == 0
    assert seen.copies == ["aten.copy_.default"] * 2
    assert seen.operations["siglane.mask_scores.default"] == 1
    assert pending.counts == [1] * len(SAMPLING)
    assert isinstance(pending.choices, partial)
    packed, numbers = pending.choices.args[:2]
    assert numbers.host == []
    assert (packed.device, packed.dtype) == (CUDA, torch.int32)
    assert packed.shape == (2 * len(SAMPLING) + 2 * (3 + 4),)  # two are reported, three likeliest of each


@pytest.mark.parametrize(("kind", "most"), LAUNCHES.items())
def test_operations_of_a_layer_are_counted(kind: Kind, most: int, tmp_path: Path) -> None:
    """Each operator of the package is one kernel, but for attention over pages, which is two."""
    counts = []
    for layers in (2, 3):
        write = partial(write_causal_lm_checkpoint, kind=kind, num_hidden_layers=layers)
        rig = build(tmp_path / str(layers), write, records=True)
        rig.run(*rig.decoding(2))
        operations = rig.run(*rig.decoding(2))[1].operations
        counts.append(operations.total() + operations["siglane.paged_decode.default"])
    assert counts[1] - counts[0] == most


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_fewer_bits_are_no_more_operations(bits: int, tmp_path: Path) -> None:
    """A tower, a prefill and steps that decode; a product is one launch, its weight is nowhere made whole."""
    rig = build(tmp_path / "nvila", write_nvila_checkpoint, records=True)
    rig.run(*rig.decoding(2))
    before = rig.run(*rig.decoding(2))[1].operations
    model, make = rig.device.model, partial(LowBitLinear, bits, OPS.coded_product)
    found = [(parent, *child) for parent in model.modules() for child in parent.named_children()]
    with rig.mode, torch.no_grad():
        for parent, name, layer in found:
            if isinstance(layer, LAYERS):
                setattr(parent, name, quantised(layer, make))
    after = rig.run(*rig.decoding(2))[1].operations
    assert after["siglane.coded_product.default"] == 4 * rig.processor.config.language.num_hidden_layers
    assert after.total() <= before.total()
    images = [picture(rig.processor, seed, 2) for seed in range(2)]
    with rig.mode, torch.inference_mode():
        rows = rig.device.encode(images)
    reading = rig.sequence(6, 40, *images)
    reading.features, reading.computed = dict(enumerate(rows)), 0
    logits, _ = rig.run(*rig.decoding(2), Chunk(reading, 0, len(reading.token_ids)))
    assert logits.shape == (3, rig.processor.config.language.vocab_size)


def test_a_tower_in_8_bit_floats_keeps_to_torchs_contract(tmp_path: Path) -> None:
    """Its own check, which knows no numbers: dtypes, strides, scales and multiples of 16. Two launches a product."""
    rig = build(tmp_path / "nvila", write_nvila_checkpoint)
    vision, images = rig.device.model.vision, [picture(rig.processor, seed, 2) for seed in range(2)]
    assert vision is not None
    found = [(parent, *child) for parent in vision.modules() for child in parent.named_children()]
    found = [(parent, name, layer) for parent, name, layer in found if isinstance(layer, LAYERS)]
    with rig.mode, torch.no_grad():
        for parent, name, layer in found:
            setattr(parent, name, quantised(layer, partial(Fp8Linear, OPS.fp8_rows)))
    with rig.mode, torch.inference_mode(), Seen() as seen:
        rows = rig.device.encode(images)
    assert [len(one) for one in rows] == [image.layout.rows for image in images]
    assert all((one.device, one.dtype) == (CUDA, torch.bfloat16) for one in rows)
    assert seen.operations["aten._scaled_mm.default"] == seen.operations["siglane.fp8_rows.default"] == len(found)


LIBRARY = ("mm", "bmm", "addmm", "linear", "convolution", "attention", "mean", "softmax")  # of operations' names


@pytest.mark.parametrize("kind", ["qwen2", "llama", "qwen3"])
def test_what_goes_by_the_number_of_rows_is_no_part_of_an_invariant_step(kind: Kind, tmp_path: Path) -> None:
    """Every product, norm and attention of steps that decode, read a prompt or do both is the package's own."""
    rig = build(tmp_path / kind, partial(write_causal_lm_checkpoint, kind=kind), records=True)
    device = rig.device
    with rig.mode, torch.no_grad():
        make_invariant(device.model.language)
    device.kernels = RowKernels(TritonKernels(device.kv))
    reading = [rig.sequence(6, 300), rig.sequence(7, 50)]
    chunks = Chunk(reading[0], 0, 300), Chunk(reading[1], 20, 50)
    for step in (rig.decoding(3), chunks, [*rig.decoding(2), *chunks]):
        logits, seen = rig.run(*step)
        assert logits.shape[0] == len(step)
        assert seen.copies == ["aten.copy_.default"]
        found = [name for name in seen.operations if any(part in name for part in LIBRARY)]
        assert found == []
        assert seen.operations["siglane.paged_decode.default"] > 0


def test_rows_that_a_request_wants_read_are_no_list_of_the_devices(tmp_path: Path) -> None:
    """Read back they are, which no fake can: it raises there, behind everything else."""
    rig = build(tmp_path / "nvila", write_nvila_checkpoint)
    sequence = rig.sequence(6, 40)
    sequence.request = replace(sequence.request, reads=(Read(30, (1, 2)), Read(39, (3,))))
    with pytest.raises(DataDependentOutputException):
        rig.run(Chunk(sequence, 0, 40))
