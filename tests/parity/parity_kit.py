"""What the parity tests share: pictures, a checkpoint as both sides hold it, siglane's steps one by one, the bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from siglane.families.model import VisionLanguageModel, load_model
from siglane.families.processor import ImageProcessor, Processor, load_processor
from siglane.lm.attention import SegmentAttention
from siglane.nn.plan import WeightPlan
from siglane.tiling.rule import ImageBudget
from siglane.types import DecodedImage, ImagePart, ImagePatches, Message, Prompt
from siglane.verify.references.decoder import PLACE
from siglane.verify.references.reference import Seen
from siglane.weights.hub import open_checkpoint
from siglane.weights.load import StrictLoad

MAX_ABS, MIN_COSINE = 2e-4, 0.99999
ROUND = 64

Written = TypeVar("Written")
Family = TypeVar("Family")
Module = TypeVar("Module", bound=nn.Module)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise, so that resizing and order both matter."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(seed).integers(0, 40, (height, width, 3))
    colours = np.stack([x * 200 // width, y * 200 // height, (x + 2 * y + 37 * seed) % 200], axis=-1)
    return Image.fromarray((colours + noise).astype(np.uint8))


def noise(seed: int, size: tuple[int, int] = (80, 60)) -> Image.Image:
    """size: width and height."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@dataclass
class Pair(Generic[Written, Family]):
    """A checkpoint as its writer made it, as the reference loads it and as siglane does."""

    written: Written
    reference: Family
    processor: Processor
    model: VisionLanguageModel

    def see(self, images: Sequence[Any]) -> Seen:
        """What the reference makes of the images, or videos, of one request."""
        return self.reference.see(images) if images else Seen()

    def their_ids(self, text: str, seen: Seen) -> list[int]:
        """The reference's ids of a finished text, siglane's placeholder in the places of image rows."""
        return [
            self.processor.config.image_token_id if token == PLACE else token
            for token in self.reference.ids(text, seen)
        ]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[VisionLanguageModel, Processor]:
    checkpoint = open_checkpoint(folder)
    processor = load_processor(checkpoint)
    return load_model(checkpoint, processor.config, device="cpu", dtype=dtype), processor


def build(
    folder: Path, write: Callable[..., Written], family: Callable[..., Family], **options: Any
) -> Pair[Written, Family]:
    """family: the reference's class."""
    written = write(folder, **options)
    return Pair(written, family(folder, torch.device("cpu"), torch.float32), *reversed(load(folder)))


def filled(model: Module, plan: WeightPlan, reference: nn.Module) -> tuple[Module, set[str]]:
    """Our `model` with the weights of a reference, and the names of the tensors that the plan leaves out."""
    with StrictLoad(plan, model) as load:
        for name, tensor in reference.state_dict().items():
            load.take(name, tensor)
    return model.eval(), {name for name, _ in load.ignored}


def patches_of(
    processor: ImageProcessor, images: Sequence[Image.Image], budget: ImageBudget | None = None
) -> list[ImagePatches]:
    """Of one request that holds all of them."""
    decoded = [DecodedImage.from_rgb(np.array(image)) for image in images]
    layouts = processor.layouts([image.size for image in decoded], [budget] * len(decoded))
    return [processor.patches(image, layout) for image, layout in zip(decoded, layouts, strict=True)]


def ask(processor: Processor, patches: Sequence[ImagePatches], question: str) -> Prompt:
    """A user's message: the images, then the question."""
    message = Message("user", (*map(ImagePart, range(len(patches))), question))
    return processor.prompt([message], [one.layout for one in patches])


def spliced(model: VisionLanguageModel, prompt: Prompt, patches: Sequence[ImagePatches]) -> torch.Tensor:
    """`[T, hidden_size]`, every span filled with the next rows of its image. patches: in the messages' order."""
    embeds = model.language.embed(torch.tensor(prompt.token_ids))
    rows = [iter(image) for image in model.vision(prompt.in_order(patches)).split()]
    for start, stop, image in prompt.spans:
        embeds[start:stop] = torch.stack([next(rows[image]) for _ in range(stop - start)])
    return embeds


def logits(
    model: VisionLanguageModel, embeds: torch.Tensor, taps: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    hidden = model.language(embeds, torch.arange(len(embeds)), SegmentAttention([len(embeds)]), taps)
    return model.language.logits(hidden)


def greedy(model: VisionLanguageModel, embeds: torch.Tensor, steps: int) -> list[int]:
    """Rows of zeros behind the last token change none before it: with them all steps, and most prompts, have as many
    rows, for each number of which oneDNN compiles its products anew."""
    first, chosen = len(embeds), list[int]()
    embeds = torch.cat([embeds, embeds.new_zeros(ROUND - (first + steps) % ROUND + steps, embeds.shape[1])])
    for place in range(first, first + steps):
        chosen.append(int(logits(model, embeds)[place - 1].argmax()))
        embeds[place] = model.language.embed(torch.tensor(chosen[-1:]))[0]
    return chosen


def generated(model: Any, embeds: torch.Tensor, steps: int) -> list[int]:
    """What transformers' own `generate` answers to the prompt `embeds` `[T, hidden_size]`."""
    found = model.generate(
        inputs_embeds=embeds[None], attention_mask=torch.ones(1, len(embeds)), max_new_tokens=steps,
        min_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    chosen: list[int] = found[0].tolist()
    return chosen


def assert_parity(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Fails below the bar of docs/structures.md; `pytest -s` shows how far above it the numbers are."""
    assert ours.shape == theirs.shape, f"{name}: {tuple(ours.shape)}, the reference has {tuple(theirs.shape)}"
    assert theirs.abs().max() > 0.1, f"{name}: the reference is nearly zero, nothing is compared"
    difference = (ours - theirs).abs().max().item()
    cosine = torch.nn.functional.cosine_similarity(ours.double(), theirs.double(), dim=-1).min().item()
    print(f"{name}: max abs {difference:.1e}, cosine {cosine:.8f}")
    assert difference <= MAX_ABS, f"{name} differs by {difference:.2e}"
    assert cosine >= MIN_COSINE, f"{name} has cosine {cosine:.7f}"
