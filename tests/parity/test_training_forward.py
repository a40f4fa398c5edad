"""The training forward: loss and every gradient against the references, and it learns.

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

import pytest
import torch
import torch.nn.functional as F
from checkpoints import State, write_nvila_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint, write_relative
from llava_qwen_checkpoint import write_llava_qwen_checkpoint
from nanovlm_checkpoint import stored, write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint, write_ovis2_6_checkpoint
from parity_kit import ask, load, patches_of, picture
from PIL import Image
from torch import nn
from video_llama_3_checkpoint import write_video_llama_3_checkpoint

from siglane.families.processor import Processor
from siglane.families.registry import vlm_family
from siglane.lm.attention import SegmentAttention
from siglane.training.forward import IGNORED, PARTS, Example, Part, answer_loss, part_of, spliced, unfreeze
from siglane.types import Prompt
from siglane.verify.references.bee import Bee
from siglane.verify.references.idefics3 import Idefics3
from siglane.verify.references.llava_onevision import LlavaOnevision
from siglane.verify.references.llava_qwen import LlavaQwen
from siglane.verify.references.nanovlm import NanoVlm
from siglane.verify.references.nvila import Nvila
from siglane.verify.references.ovis2_5 import Ovis2_5
from siglane.verify.references.reference import Seen, VisionLanguageReference
from siglane.verify.references.video_llama_3 import VideoLlama3
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
        return [picture(*size, seed=seed) for seed, size in enumerate(self.sizes)]


SAMPLES = [
    Sample([(130, 70)], "What is in the image?", (17, 44, 201, 5)),
    Sample([(60, 60), (33, 90)], "Compare.", (9,)),
    Sample([], "Hello there", (100, 101)),
    Sample([(20, 13)], "Describe the picture.", (300, 12, 7, 7, 80, 3)),
]


# The weights of a reference, by the prefix that their names have in the checkpoint.

Parts = dict[str, nn.Module | torch.Tensor]


def nanovlm_parts(reference: NanoVlm) -> Parts:
    modules = (reference.tower.model, reference.projector, reference.language.model)
    return dict(zip(("vision_encoder.", "MP.proj.", "decoder."), modules, strict=True))


def nvila_parts(reference: Nvila) -> Parts:
    modules = (reference.tower.model, reference.projector, reference.language.model)
    return dict(zip(("vision_tower.", "mm_projector.layers.", "llm."), modules, strict=True))


def whole_model(reference: LlavaOnevision | Idefics3) -> Parts:
    return {"": reference.model}


def ovis_parts(reference: Ovis2_5) -> Parts:
    return {
        "visual_tokenizer.vit.": reference.tower,
        "visual_tokenizer.head.": reference.head,
        "llm.": reference.language.model,
        "vte.weight": reference.table,
    }


def video_llama_parts(reference: VideoLlama3) -> Parts:
    language = reference.language.model
    return {
        "model.vision_model.": reference.tower,
        "model.projector.": reference.projector,
        "model.language_model.": language.model,
        "lm_head.": language.lm_head,
    }


def llava_qwen_parts(reference: LlavaQwen) -> Parts:
    return {
        "model.vision_tower.vision_tower.vision_model.": reference.tower.model,
        "model.mm_projector.": reference.projector,
        "model.image_newline": reference.newline,
        "": reference.language.model,
    }


def gradients_of(parts: Parts) -> State:
    """By the names of the checkpoint's tensors; zeros for parameters that nothing used."""
    named: dict[str, torch.Tensor] = {}
    for prefix, part in parts.items():
        weights = [("", part)] if isinstance(part, torch.Tensor) else part.named_parameters()
        named |= {prefix + name: weight for name, weight in weights}
    return {name: torch.zeros_like(weight) if weight.grad is None else weight.grad for name, weight in named.items()}


def nanovlm_gradients(parts: Parts) -> State:
    """nanoVLM has other names than transformers, and q, k and v of the tower in one tensor."""
    tensors = stored(*map(with_gradients, parts.values()))
    del tensors["decoder.rotary_embd.inv_freq"]
    return tensors


def with_gradients(module: Any) -> Any:
    """A copy whose parameters are their own gradients."""
    twin = copy.deepcopy(module)
    for parameter, own in zip(twin.parameters(), module.parameters(), strict=True):
        parameter.data = torch.zeros_like(own) if own.grad is None else own.grad
    return twin


WRITERS: dict[str, Write] = {
    "nanovlm": write_nanovlm_checkpoint,
    "nanovlm 0.1": partial(write_nanovlm_checkpoint, era="0.1"),
    "nvila lite": write_nvila_checkpoint,
    "nvila": partial(write_nvila_checkpoint, lite=False, tied=True, qwen3=True),
    "llava onevision": write_llava_onevision_checkpoint,
    "ovis 2.5": write_ovis2_5_checkpoint,
    "ovis 2.6 with experts": partial(write_ovis2_6_checkpoint, moe=True),
    "smolvlm": write_idefics3_checkpoint,
    "video llama 3": partial(write_video_llama_3_checkpoint, tied=True),
}
REFERENCES: dict[str, tuple[Write, Callable[..., Any], Callable[[Any], Parts]]] = {
    "nanovlm": (write_nanovlm_checkpoint, NanoVlm, nanovlm_parts),
    "nanovlm 0.1": (partial(write_nanovlm_checkpoint, era="0.1"), NanoVlm, nanovlm_parts),
    "nvila lite": (write_nvila_checkpoint, Nvila, nvila_parts),
    "nvila lite, tied": (partial(write_nvila_checkpoint, tied=True, layout="hf"), Nvila, nvila_parts),
    "nvila": (partial(write_nvila_checkpoint, lite=False), Nvila, nvila_parts),
    "llava onevision": (write_llava_onevision_checkpoint, LlavaOnevision, whole_model),
    "smolvlm": (write_idefics3_checkpoint, Idefics3, whole_model),
    "docling": (partial(write_idefics3_checkpoint, kind="docling"), Idefics3, whole_model),
    "video llama 3": (write_video_llama_3_checkpoint, VideoLlama3, video_llama_parts),
    "ovis 2.5": (write_ovis2_5_checkpoint, Ovis2_5, ovis_parts),
    "ovis 2.6 with experts": (partial(write_ovis2_6_checkpoint, moe=True), Ovis2_5, ovis_parts),
    "bee": (partial(write_relative, name="bee"), Bee, whole_model),
    "llava original": (partial(write_llava_qwen_checkpoint, tied=False), LlavaQwen, llava_qwen_parts),
    "ovis 2.5, tied": (partial(write_ovis2_5_checkpoint, tied=True), Ovis2_5, ovis_parts),
}
EVERY_FAMILY = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def example_of(processor: Processor, sample: Sample) -> Example:
    patches = patches_of(processor, sample.images)
    prompt = ask(processor, patches, sample.question)
    return Example(prompt, sample.answer, prompt.in_order(patches))


def examples_of(processor: Processor, samples: Iterable[Sample] = SAMPLES) -> list[Example]:
    return [example_of(processor, sample) for sample in samples]


def reference_loss(reference: VisionLanguageReference) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The mean over all answer tokens, sample after sample, and the logits of each sample."""
    language, losses, all_logits = reference.language, [], []
    for sample in SAMPLES:
        seen = reference.see(sample.images) if sample.images else Seen()
        prompt = reference.embeds(reference.text(sample.question, seen), seen)
        logits = language.logits(torch.cat([prompt, language.spliced(sample.answer, [])]))[:-1]
        losses.append(F.cross_entropy(logits[len(prompt) - 1 :], torch.tensor(sample.answer), reduction="none"))
        all_logits.append(logits)
    return torch.cat(losses).mean(), all_logits


@pytest.mark.parametrize(("write", "family", "parts_of"), REFERENCES.values(), ids=REFERENCES)
def test_loss_and_every_gradient_are_the_references(
    tmp_path: Path, write: Write, family: Callable[..., Any], parts_of: Callable[[Any], Parts]
) -> None:
    write(tmp_path)
    reference = family(tmp_path, torch.device("cpu"), torch.float32)
    parts = parts_of(reference)
    for part in parts.values():
        part.requires_grad_(True)
    model, processor = load(tmp_path)
    unfreeze(model, *PARTS)
    ours = answer_loss(model, examples_of(processor), logits=True)
    ours.loss.backward()
    theirs, logits = reference_loss(reference)
    theirs.backward()
    print(f"loss {ours.loss.item():.6f}, the reference's {theirs.item():.6f}")
    assert abs(ours.loss.item() - theirs.item()) <= 1e-5
    assert ours.logits is not None
    assert (ours.logits - torch.cat(logits)).abs().max() <= 2e-4

    expected = copy.deepcopy(model).requires_grad_(False)
    registered = vlm_family(open_checkpoint(tmp_path))
    gradients = nanovlm_gradients(parts) if family is NanoVlm else gradients_of(parts)
    with StrictLoad(registered.plan(processor.config), expected) as filling:
        for name, gradient in gradients.items():
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


SMOOTH = {name: write for name, write in WRITERS.items() if "experts" not in name}  # a step may send a token elsewhere


@pytest.mark.few("nanovlm", "nvila", "ovis 2.5", "smolvlm")
@pytest.mark.parametrize("write", SMOOTH.values(), ids=SMOOTH)
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


@pytest.mark.few("nanovlm", "nvila", "ovis 2.6 with experts", "video llama 3")
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


@pytest.mark.few("nanovlm", "nvila lite", "llava onevision", "ovis 2.6 with experts", "video llama 3")
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
