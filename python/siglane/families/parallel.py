"""A vision stack over tensor-parallel ranks: cut, or whole on every rank with the images divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from siglane.config.images import ImageFacts
from siglane.families.stack import VisionStack
from siglane.nn.parallel import TensorParallel
from siglane.types import BackendChoice, ImagePatches, ImageTokens

EncoderParallel = Literal["auto", "tp", "dp", "replicate"]


def resolve(wish: EncoderParallel, facts: ImageFacts, tp: TensorParallel) -> Literal["tp", "dp", "replicate"]:
    """What `auto` means: tensor parallel where the tower's heads and widths divide by the ranks, else its images do."""
    if tp.size == 1:
        return "replicate"
    if wish != "auto":
        return wish
    divides = all(count % tp.size == 0 for count in (facts.vision.num_attention_heads, facts.vision.intermediate_size))
    return "tp" if divides else "dp"


def divide(patches: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """The images of each rank, ascending: the largest first, each to the rank with the fewest patches so far.

    The same on every rank, because it depends on the numbers alone.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for image in sorted(range(len(patches)), key=lambda image: (-patches[image], image)):
        rank = loads.index(min(loads))
        shares[rank].append(image)
        loads[rank] += patches[image]
    return tuple(tuple(sorted(share)) for share in shares)


class ParallelStack(nn.Module):
    """`VisionStack` on one of `tp.size` ranks; every rank is called with the same images and gets all of their rows.

    parallel: "tp" cuts the layers over the ranks (one that does not divide is whole on each), "dp" keeps them whole and
    divides the images by patches, "replicate" has every rank encode everything.
    """

    def __init__(
        self,
        facts: ImageFacts,
        tp: TensorParallel,
        parallel: EncoderParallel = "auto",
        attention_backend: BackendChoice = "auto",
    ) -> None:
        super().__init__()
        self.facts, self.tp, self.parallel = facts, tp, resolve(parallel, facts, tp)
        self.stack = VisionStack(facts, tp if self.parallel == "tp" else TensorParallel.single(), attention_backend)

    def share(self) -> str:
        """How much of the stack this rank holds, for a log."""
        with torch.device("meta"):
            whole = VisionStack(self.facts)
        held, of = (sum(one.numel() for one in stack.parameters()) for stack in (self.stack, whole))
        place = f"rank {self.tp.rank} of {self.tp.size}"
        return f"encoder {self.parallel}, {place} holds {held} of {of} parameters"

    def forward(self, images: Sequence[ImagePatches]) -> ImageTokens:
        """Rows `[T, output_size]` of all images, in order."""
        if self.parallel != "dp" or not images:
            tokens: ImageTokens = self.stack(images)
            return tokens
        shares = divide([image.layout.patches for image in images], self.tp.size)
        lengths = [[images[number].layout.rows for number in share] for share in shares]
        mine: ImageTokens = self.stack([images[number] for number in shares[self.tp.rank]])
        gathered = _gather(mine.embeds, max(map(sum, lengths)), self.tp)
        rows: dict[int, torch.Tensor] = {}
        for share, sizes, held in zip(shares, lengths, gathered, strict=True):
            rows |= dict(zip(share, held[: sum(sizes)].split(sizes), strict=True))
        return ImageTokens(
            torch.cat([rows[number] for number in range(len(images))]), tuple(image.layout.rows for image in images)
        )


def _gather(rows: torch.Tensor, most: int, tp: TensorParallel) -> tuple[torch.Tensor, ...]:
    """Every rank's `rows`, filled up to `most` rows: collectives want equal shapes."""
    padded = rows.new_zeros(most, rows.shape[1])
    padded[: len(rows)] = rows
    return tp.all_gather(padded.T.contiguous()).T.split(most)
