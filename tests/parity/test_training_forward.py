"""The training forward: loss and every gradient against the transformers-composed references, and it learns.

A family joins the tests that need no reference by one line in WRITERS, the others by one line in REFERENCES.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nanovlm_reference
import numpy as np
import ovis2_5_reference
import pytest
import reference as vila
import torch
import torch.nn.functional as F
from checkpoints import Reference, State, write_nvila_checkpoint
from llava_onevision_checkpoint import LlavaOnevision, write_llava_onevision_checkpoint
from nanovlm_checkpoint import NanoVlm, stored, write_nanovlm_checkpoint
from ovis2_5_checkpoint import OvisReference, write_ovis2_5_checkpoint
from PIL import Image
from torch import nn

from siglane.families.model import VisionLanguageModel, load_model
from siglane.families.processor import Processor, load_processor
from siglane.families.registry import vlm_family
from siglane.lm.attention import SegmentAttention
from siglane.training.forward import IGNORED, PARTS, Example, Part, answer_loss, part_of, spliced, unfreeze
from siglane.types import DecodedImage, ImagePart, Message, Prompt
from siglane.weights.hub import open_checkpoint
from siglane.weights.load import StrictLoad

Write = Callable[[Path], Any]


@dataclass
class Sample:
    """One user message, its images first, and the ids of its answer."""

    sizes: list[tuple[int, int]]
    question: str
    answer: tuple[int, ...]

    @property
    def images(self) -> list[Image.Image]:
        return [vila.picture(*size, seed=seed) for seed, size in enumerate(self.sizes)]


SAMPLES = [
    Sample([(130, 70)], "What is in the image?", (17, 44, 201, 5)),
    Sample([(60, 60), (33, 90)], "Compare.", (9,)),
    Sample([], "Hello there", (100, 101)),
    Sample([(20, 13)], "Describe the picture.", (300, 12, 7, 7, 80, 3)),
]


# Differentiable references: what the language model reads of one sample, the language model, every gradient by name.


@dataclass(frozen=True)
class ReferenceFamily:
    embedded: Callable[[Any, list[Image.Image], str], torch.Tensor]
    speaker: Callable[[Any], Any]
    gradients: Callable[[Any], State]


def nanovlm_embedded(reference: NanoVlm, images: list[Image.Image], question: str) -> torch.Tensor:
    seen = [nanovlm_reference.see(reference, image) for image in images]
    rows = torch.empty(0, 48)
    if seen:
        features: Any = reference.tower(pixel_values=torch.cat([one.tiles for one in seen])).last_hidden_state
        rows = reference.projection(nanovlm_reference.shuffle(reference, features)).flatten(0, 1)
    text = nanovlm_reference.prompt(reference, [one.grid for one in seen], question)
    return nanovlm_reference.embeds(reference, text, rows)[1]


def nanovlm_gradients(reference: NanoVlm) -> State:
    modules = [with_gradients(module) for module in (reference.tower, reference.projection, reference.language)]
    tensors = stored(*modules)
    del tensors["decoder.rotary_embd.inv_freq"]
    return tensors


def vila_embedded(reference: Reference, images: list[Image.Image], question: str) -> torch.Tensor:
    """NVILA-Lite: a picture alone in tiles with a thumbnail, several one tile each."""
    alone, side = len(images) == 1, reference.side
    blocks = []
    for image in images:
        columns, rows = vila.closest_grid(*image.size, side, 1, 12) if alone else (1, 1)
        tiles = vila.cut(image, columns, rows, side)
        tiles += vila.cut(image, 1, 1, side) if len(tiles) > 1 else []
        pixels = torch.stack([torch.from_numpy(np.array(tile)).permute(2, 0, 1) for tile in tiles])
        states: Any = reference.tower(pixel_values=(pixels / 255 - 0.5) / 0.5, output_hidden_states=True)
        assert reference.projector is not None
        blocks.append(list(reference.projector(states.hidden_states[-2])))
    value = "".join("<image>\n" * len(image) if alone else "<image>" for image in blocks)
    ids = vila.prompt_ids(reference, vila.chat(value + question), blocks)
    waiting, place = iter([row for image in blocks for block in image for row in block]), reference.token("<image>")
    table = reference.language.get_input_embeddings().weight
    return torch.stack([next(waiting) if token == place else table[token] for token in ids])


def vila_gradients(reference: Reference) -> State:
    assert reference.projector is not None
    return (
        gradients_of(reference.tower, "vision_tower.")
        | gradients_of(reference.projector, "mm_projector.layers.")
        | gradients_of(reference.language, "llm.")
    )


def llava_embedded(reference: LlavaOnevision, images: list[Image.Image], question: str) -> torch.Tensor:
    content: list[dict[str, str]] = [{"type": "image"}] * len(images)
    turn = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    inputs = reference.inputs(reference.processor.apply_chat_template(turn, add_generation_prompt=True), images)
    ids = inputs["input_ids"][0]
    embeds = reference.model.get_input_embeddings()(ids)
    if not images:
        return embeds
    place = reference.tokenizer.get_vocab()["<image>"]
    return embeds.index_copy(0, (ids == place).nonzero()[:, 0], torch.cat(reference.rows(inputs)))


def ovis_embedded(reference: OvisReference, images: list[Image.Image], question: str) -> torch.Tensor:
    """The reference's functions without their no_grad."""
    see: Any = ovis2_5_reference.see
    embeds: Any = ovis2_5_reference.embeds
    reference.vte.requires_grad_()
    seen = [see.__wrapped__(reference, [image]) for image in images]
    value = "<image>\n" * len(images) + question
    text = f"<|im_start|>user\n{value}<|im_end|>\n<|im_start|>assistant\n"
    return embeds.__wrapped__(reference, ovis2_5_reference.prompt_ids(reference, text, seen), seen)


def ovis_gradients(reference: OvisReference) -> State:
    assert reference.vte.grad is not None
    return (
        gradients_of(reference.tower, "visual_tokenizer.vit.")
        | gradients_of(reference.head, "visual_tokenizer.head.")
        | gradients_of(reference.language, "llm.")
        | {"vte.weight": reference.vte.grad}
    )


def gradients_of(module: nn.Module, prefix: str) -> State:
    """Zeros for parameters that nothing used."""
    return {
        prefix + name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in module.named_parameters()
    }


def with_gradients(module: Any) -> Any:
    """A copy whose parameters are their own gradients."""
    twin = copy.deepcopy(module)
    for parameter, own in zip(twin.parameters(), module.parameters(), strict=True):
        parameter.data = torch.zeros_like(own) if own.grad is None else own.grad
    return twin


NANOVLM = ReferenceFamily(nanovlm_embedded, lambda reference: reference.language, nanovlm_gradients)
VILA = ReferenceFamily(vila_embedded, lambda reference: reference.language, vila_gradients)
LLAVA = ReferenceFamily(
    llava_embedded, lambda reference: reference.model, lambda reference: gradients_of(reference.model, "")
)
OVIS = ReferenceFamily(ovis_embedded, lambda reference: reference.language, ovis_gradients)

WRITERS: dict[str, Write] = {
    "nanovlm": write_nanovlm_checkpoint,
    "nanovlm 0.1": partial(write_nanovlm_checkpoint, era="0.1"),
    "nvila lite": write_nvila_checkpoint,
    "nvila": partial(write_nvila_checkpoint, lite=False, tied=True, qwen3=True),
    "llava onevision": write_llava_onevision_checkpoint,
    "ovis 2.5": write_ovis2_5_checkpoint,
}
REFERENCES: dict[str, tuple[Write, ReferenceFamily]] = {
    "nanovlm": (write_nanovlm_checkpoint, NANOVLM),
    "nanovlm 0.1": (partial(write_nanovlm_checkpoint, era="0.1"), NANOVLM),
    "nvila lite": (write_nvila_checkpoint, VILA),
    "nvila lite, tied": (partial(write_nvila_checkpoint, tied=True, layout="hf"), VILA),
    "llava onevision": (write_llava_onevision_checkpoint, LLAVA),
    "ovis 2.5": (write_ovis2_5_checkpoint, OVIS),
    "ovis 2.5, tied": (partial(write_ovis2_5_checkpoint, tied=True), OVIS),
}
EVERY_FAMILY = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[VisionLanguageModel, Processor]:
    checkpoint = open_checkpoint(folder)
    processor = load_processor(checkpoint)
    return load_model(checkpoint, processor.config, device="cpu", dtype=dtype), processor


def example_of(processor: Processor, sample: Sample) -> Example:
    decoded = [DecodedImage.from_rgb(np.array(image)) for image in sample.images]
    layouts = processor.layouts([image.size for image in decoded])
    patches = [processor.patches(image, layout) for image, layout in zip(decoded, layouts, strict=True)]
    message = Message("user", (*map(ImagePart, range(len(patches))), sample.question))
    prompt = processor.prompt([message], layouts)
    return Example(prompt, sample.answer, prompt.in_order(patches))


def examples_of(processor: Processor, samples: Iterable[Sample] = SAMPLES) -> list[Example]:
    return [example_of(processor, sample) for sample in samples]


def reference_loss(family: ReferenceFamily, reference: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The mean over all answer tokens, sample after sample, and the logits of each sample."""
    speaker = family.speaker(reference)
    for module in vars(reference).values():
        if isinstance(module, nn.Module):
            module.requires_grad_(True)
    table = speaker.get_input_embeddings().weight
    losses, all_logits = [], []
    for sample in SAMPLES:
        prompt = family.embedded(reference, sample.images, sample.question)
        embeds = torch.cat([prompt, table[list(sample.answer)]])
        logits = speaker(inputs_embeds=embeds[None]).logits[0, :-1]
        losses.append(F.cross_entropy(logits[len(prompt) - 1 :], torch.tensor(sample.answer), reduction="none"))
        all_logits.append(logits)
    return torch.cat(losses).mean(), all_logits


@pytest.mark.parametrize(("write", "family"), REFERENCES.values(), ids=REFERENCES)
def test_loss_and_every_gradient_are_the_references(tmp_path: Path, write: Write, family: ReferenceFamily) -> None:
    reference = write(tmp_path)
    model, processor = load(tmp_path)
    unfreeze(model, *PARTS)
    ours = answer_loss(model, examples_of(processor), logits=True)
    ours.loss.backward()
    theirs, logits = reference_loss(family, reference)
    theirs.backward()
    print(f"loss {ours.loss.item():.6f}, the reference's {theirs.item():.6f}")
    assert abs(ours.loss.item() - theirs.item()) <= 1e-5
    assert ours.logits is not None
    assert (ours.logits - torch.cat(logits)).abs().max() <= 2e-4

    expected = copy.deepcopy(model).requires_grad_(False)
    registered = vlm_family(open_checkpoint(tmp_path))
    with StrictLoad(registered.plan(processor.config), expected) as filling:
        for name, gradient in family.gradients(reference).items():
            filling.take(name, gradient)
    worst = 0.0
    for (name, parameter), gradient in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert parameter.grad is not None, name
        largest = gradient.abs().max().item()
        assert largest > 1e-7, f"{name}: the reference's gradient is zero, nothing is compared"
        difference = (parameter.grad - gradient).abs().max().item() / largest
        cosine = F.cosine_similarity(parameter.grad.double().flatten(), gradient.double().flatten(), dim=0).item()
        worst = max(worst, difference)
        assert difference <= 1e-4, f"{name} differs by {difference:.1e} of its largest value"
        assert cosine >= 0.99999, f"{name} has cosine {cosine:.7f}"
    print(f"gradients: worst difference {worst:.1e} of a parameter's largest")


@EVERY_FAMILY
def test_gradients_are_the_slope_of_the_loss(tmp_path: Path, write: Write) -> None:
    """A step along a random direction in each part changes the loss as its gradient says."""
    write(tmp_path)
    model, processor = load(tmp_path, torch.float64)
    examples = examples_of(processor, SAMPLES[:2])
    unfreeze(model, *PARTS)
    answer_loss(model, examples).loss.backward()
    generator = torch.Generator().manual_seed(0)
    for part in PARTS:
        parameters = [parameter for name, parameter in model.named_parameters() if part_of(name) == part]
        directions = [torch.randn(parameter.shape, generator=generator).double() for parameter in parameters]
        # half of it along the gradient, so that the slope is large beside the rounding of the float32 parts
        gradients = [parameter.grad for parameter in parameters]
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
        length = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients if gradient is not None))
        noise = math.sqrt(sum(direction.square().sum().item() for direction in directions))
        slope, steps = 0.0, []
        for direction, gradient in zip(directions, gradients, strict=True):
            assert gradient is not None
            steps.append(direction / noise + gradient / length)
            slope += (steps[-1] * gradient).sum().item()
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                for parameter, step in zip(parameters, steps, strict=True):
                    parameter.add_(step, alpha=sign * 1e-3)
                losses.append(answer_loss(model, examples).loss.item())
        with torch.no_grad():
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.add_(step, alpha=1e-3)
        measured = (losses[0] - losses[1]) / 2e-3
        print(f"{part}: slope {measured:.6f}, its gradient says {slope:.6f}")
        assert measured == pytest.approx(slope, rel=2e-3)


@EVERY_FAMILY
def test_packed_samples_are_the_mean_of_their_tokens(tmp_path: Path, write: Write) -> None:
    write(tmp_path)
    model, processor = load(tmp_path)
    trained = unfreeze(model, *PARTS)
    examples = examples_of(processor)
    tokens = sum(len(example.answer) for example in examples)
    packed = answer_loss(model, examples)
    packed.loss.backward()
    together = [parameter.grad for parameter in trained]
    model.zero_grad()
    alone = torch.stack([answer_loss(model, [one]).loss * len(one.answer) / tokens for one in examples]).sum()
    alone.backward()
    assert alone.item() == pytest.approx(packed.loss.item(), abs=1e-5)
    for parameter, gradient in zip(trained, together, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert (parameter.grad - gradient).abs().max() <= 1e-4 * max(1.0, gradient.abs().max().item())


@EVERY_FAMILY
def test_the_forward_is_the_one_that_serves(tmp_path: Path, write: Write) -> None:
    """The same rows and logits as without gradients, where other kernels run."""
    write(tmp_path)
    model, processor = load(tmp_path)
    (example,) = examples_of(processor, SAMPLES[:1])
    with torch.no_grad():
        embeds = spliced(model, [example])
        hidden = model.language(embeds, torch.arange(len(embeds)), SegmentAttention([len(embeds)]))
        served = model.language.logits(hidden)
    unfreeze(model, *PARTS)
    found = answer_loss(model, [example], logits=True)
    assert found.logits is not None
    assert (found.logits.detach() - served).abs().max() < 1e-4
    assert found.targets.tolist() == [IGNORED] * (len(embeds) - 4) + list(example.answer)
    assert answer_loss(model, [example]).loss.item() == pytest.approx(found.loss.item(), abs=1e-6)
    assert answer_loss(model, [example]).logits is None


@EVERY_FAMILY
def test_it_learns_one_sample_and_a_frozen_tower_stays(tmp_path: Path, write: Write) -> None:
    write(tmp_path)
    model, processor = load(tmp_path)
    examples = examples_of(processor, SAMPLES[:1])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimiser = torch.optim.AdamW(unfreeze(model, "projector", "language"), lr=1e-2, weight_decay=0.0)
    first = answer_loss(model, examples).loss.item()
    for _ in range(40):
        optimiser.zero_grad()
        loss = answer_loss(model, examples).loss
        loss.backward()
        optimiser.step()
        if loss.item() < 5e-3:
            break
    last = answer_loss(model, examples).loss.item()
    print(f"loss {first:.3f} -> {last:.5f}")
    assert first > 1
    assert last < 0.02
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[name])
        assert same == (part_of(name) == "tower"), name
        assert (parameter.grad is None) == (part_of(name) == "tower"), name
    hidden = model.language(spliced(model, examples), *_places(examples))
    answer = examples[0].answer
    assert model.language.logits(hidden[-len(answer) :]).argmax(-1).tolist() == list(answer)


def _places(examples: list[Example]) -> tuple[torch.Tensor, SegmentAttention]:
    length = len(examples[0].inputs)
    return torch.arange(length), SegmentAttention([length])


@pytest.mark.parametrize("part", PARTS)
def test_one_part_alone(tmp_path: Path, part: Part) -> None:
    """Gradients reach the tower through a frozen language model."""
    write_nanovlm_checkpoint(tmp_path)
    model, processor = load(tmp_path)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    trained = unfreeze(model, part)
    answer_loss(model, examples_of(processor, SAMPLES[:1])).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained)
    assert {part_of(name) for name, parameter in model.named_parameters() if parameter.grad is not None} == {part}
    assert unfreeze(model) == []
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_learnt(tmp_path: Path) -> None:
    write_nanovlm_checkpoint(tmp_path)
    model, processor = load(tmp_path)
    known = example_of(processor, SAMPLES[0])
    assert known.images
    with pytest.raises(ValueError, match="an answer of at least one token"):
        Example(known.prompt, (), known.images)
    with pytest.raises(ValueError, match="an answer of at least one token"):
        Example(Prompt(()), (1,))
    with pytest.raises(ValueError, match=f"the prompt has {len(known.images)} images, 0 are given"):
        Example(known.prompt, (1,))
    with pytest.raises(ValueError, match="no examples"):
        answer_loss(model, [])
    with pytest.raises(ValueError, match="no part 'head'; its parts are tower, projector, language"):
        unfreeze(model, "head")  # type: ignore[arg-type]


def test_half_precision_has_a_float32_loss(tmp_path: Path) -> None:
    write_nanovlm_checkpoint(tmp_path)
    model, processor = load(tmp_path, torch.bfloat16)
    unfreeze(model, *PARTS)
    found = answer_loss(model, examples_of(processor))
    found.loss.backward()
    assert found.loss.dtype == torch.float32
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
