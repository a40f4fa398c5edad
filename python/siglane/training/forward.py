"""The training forward of every family: prompts with their images, and the answers that the model should give.

    model = load_model(checkpoint, processor.config, device="cpu", dtype=torch.float32)
    optimiser = torch.optim.AdamW(unfreeze(model, "projector", "language"), lr=1e-4)
    prompt = processor.prompt([Message("user", (ImagePart(0), "What is this?"))], layouts)
    answer_loss(model, [Example(prompt, answer_ids, prompt.in_order(patches))]).loss.backward()

All images of all examples are one packed vision forward and all texts one packed language forward, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from siglane.families.model import VisionLanguageModel
from siglane.families.splice import ImageRows, image_rows, splice
from siglane.lm.attention import SegmentAttention
from siglane.types import ImagePatches, Prompt

Part = Literal["tower", "projector", "language"]
PARTS: tuple[Part, ...] = get_args(Part)

IGNORED = -100  # the target that torch's cross-entropy leaves out


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A prompt and what the model should answer. ValueError when one of the two is empty, or the images do not have the
    prompt's layouts."""

    prompt: Prompt  # up to where the answer begins (`Processor.prompt`)
    answer: tuple[int, ...]  # with the end of the answer when the model should learn to stop
    images: tuple[ImagePatches, ...] = ()  # the prompt's, in its order (`Prompt.in_order`)

    def __post_init__(self) -> None:
        self.prompt.check_images(self.images)
        if not self.prompt.token_ids or not self.answer:
            raise ValueError("an example has a prompt and an answer of at least one token each")

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: the prompt, then the answer without its last token, which predicts nothing."""
        return (*self.prompt.token_ids, *self.answer[:-1])

    @property
    def targets(self) -> tuple[int, ...]:
        """For each of `inputs` the answer's token that follows it, IGNORED where a token of the prompt does."""
        return (IGNORED,) * (len(self.prompt.token_ids) - 1) + self.answer


@dataclass(frozen=True, slots=True, eq=False)
class AnswerLoss:
    """loss: mean cross-entropy over the answer tokens of all examples, a float32 scalar; targets: i64 `[T]`, example
    after example; logits: `[T, vocab_size]` of the same places when they were asked for."""

    loss: torch.Tensor
    targets: torch.Tensor
    logits: torch.Tensor | None = None


def answer_loss(model: VisionLanguageModel, examples: Sequence[Example], *, logits: bool = False) -> AnswerLoss:
    """The loss on the answers, through which gradients flow to every part that `unfreeze` has made trainable.

    logits: those of all places, otherwise only the answers' are computed. RuntimeError when an image gives another
    number of rows than its prompt has places; ValueError without examples. The model must be whole on one rank.
    """
    if not examples:
        raise ValueError("there is nothing to learn from no examples")
    language = model.language
    device = language.norm.weight.device
    lengths = [len(example.inputs) for example in examples]
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    targets = torch.tensor([target for example in examples for target in example.targets], device=device)
    hidden = language(spliced(model, examples), positions, SegmentAttention(lengths))
    answers = (targets != IGNORED).nonzero()[:, 0]
    everything = language.logits(hidden) if logits else None
    predicted = language.logits(hidden[answers]) if everything is None else everything[answers]
    return AnswerLoss(F.cross_entropy(predicted.float(), targets[answers]), targets, everything)


def spliced(model: VisionLanguageModel, examples: Sequence[Example]) -> torch.Tensor:
    """What the language model reads, `[T, hidden_size]`: embeddings of the inputs, the images' rows in their places."""
    language = model.language
    device = language.norm.weight.device
    embeds = language.embed(torch.tensor([token for example in examples for token in example.inputs], device=device))
    images = [image for example in examples for image in example.images]
    if not images:
        return embeds
    encoded = iter(model.see(images).split())
    spans: list[ImageRows] = []
    rows: list[torch.Tensor] = []
    start = 0
    for example in examples:
        own = [next(encoded) for _ in example.images]
        for span in image_rows(example.prompt):
            spans.append(span.moved(start))
            rows.append(own[span.image])
        start += len(example.inputs)
    return splice(embeds, spans, rows)


def unfreeze(model: VisionLanguageModel, *parts: Part) -> list[nn.Parameter]:
    """Makes the parameters of `parts` trainable and all others not; returns the trainable ones, for an optimiser.

    A loaded model is frozen. A learned newline or visual vocabulary belongs to the projector, tied embeddings to the
    language model. ValueError for a part that does not exist.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"a model has no part {unknown[0]!r}; its parts are {', '.join(PARTS)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def part_of(name: str) -> Part:
    """The part to which the parameter called `name` belongs."""
    if name.startswith("language."):
        return "language"
    return "tower" if name.startswith("vision.encoder.") else "projector"
