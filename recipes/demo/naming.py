"""Dense supervision that only training has: what every patch shows, and what every row of the projector stands for.

Answers alone give a picture of 144 patches a handful of bits; these losses give each patch and each row its own. A row
covers `block` x `block` patches and is asked two things:

- in the language model's own vocabulary, which words belong here: `row . embedding("red")` is high where something red
  is. Rows and words then share one space before the language model reads its first question, and answering begins as
  looking up and copying;
- through linear heads, which shape stands at each rank from the left and which character at each place of the word.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from recipes.demo.scenes import CHARACTERS, COLOURS, KINDS, LABELS, SIZES
from siglane.types import Grid

NONE_WEIGHT = 0.1  # of patches and rows that show nothing: they are the great majority
RANKS, PLACES = LABELS["rank"] - 1, LABELS["index"] - 1
SLOTS = (LABELS["kind"], LABELS["colour"]) * RANKS + (LABELS["character"],) * PLACES


class NamingHeads(nn.Module):
    """The heads of both losses; thrown away when the model is exported."""

    def __init__(self, tokenizer: Tokenizer, vision_size: int, language_size: int, block: int) -> None:
        super().__init__()
        self.block = block
        self.patches = nn.Linear(vision_size, sum(LABELS.values()))
        self.slots = nn.Linear(language_size, sum(SLOTS))
        self.word_bias = nn.Parameter(torch.tensor([-3.0]))  # few words belong to a row
        self.word_ids: torch.Tensor
        self.word_classes: torch.Tensor
        ids, classes = _vocabulary(tokenizer)
        self.register_buffer("word_ids", ids, persistent=False)
        self.register_buffer("word_classes", classes, persistent=False)

    def patch_loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """features `[B * h * w, vision_size]`, labels i64 `[B, h * w, 6]` (`scenes.patch_labels`)."""
        return _cross_entropies(self.patches(features), tuple(LABELS.values()), labels.flatten(0, 1))

    def row_loss(self, rows: torch.Tensor, labels: torch.Tensor, embedding: torch.Tensor, grid: Grid) -> torch.Tensor:
        """rows `[B * R, language_size]` of patches on `grid`; embedding: the language model's table."""
        blocks = self._blocks(labels, grid)  # [B * R, patches, 6]
        named = torch.cat([F.one_hot(blocks[..., n], size) for n, size in enumerate(LABELS.values())], -1).amax(1)
        words = rows @ embedding[self.word_ids].T + self.word_bias
        word_loss = F.binary_cross_entropy_with_logits(words.float(), named[:, self.word_classes].float())
        kind, colour, _, rank, character, index = blocks.unbind(-1)
        slots = [
            torch.where(key == number, value, 0).amax(1)
            for keys, key, values in ((RANKS, rank, (kind, colour)), (PLACES, index, (character,)))
            for number in range(1, keys + 1)
            for value in values
        ]
        return 10 * word_loss + _cross_entropies(self.slots(rows), SLOTS, torch.stack(slots, -1)) / PLACES

    def _blocks(self, labels: torch.Tensor, grid: Grid) -> torch.Tensor:
        rows, columns = grid.h // self.block, grid.w // self.block
        x: torch.Tensor = labels.unflatten(1, (rows, self.block, columns, self.block)).transpose(2, 3)
        return x.flatten(3, 4).flatten(0, 2)


def _cross_entropies(logits: torch.Tensor, sizes: tuple[int, ...], targets: torch.Tensor) -> torch.Tensor:
    """logits `[N, sum(sizes)]`, targets i64 `[N, len(sizes)]` whose class 0 means nothing. The sum over the heads."""
    losses = []
    for number, part in enumerate(logits.float().split(sizes, -1)):
        weight = torch.ones(part.shape[-1], device=part.device)
        weight[0] = NONE_WEIGHT
        losses.append(F.cross_entropy(part, targets[:, number], weight))
    return torch.stack(losses).sum()


def _vocabulary(tokenizer: Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of the words for kinds, colours, sizes and characters, and for each the one-hot label it names.

    A word is one token at the start of an answer and another after a space; both name it.
    """
    ids, classes = [], []
    start = 0
    names = {"kind": KINDS, "colour": tuple(COLOURS), "size": SIZES, "character": tuple(CHARACTERS)}
    for column, size in LABELS.items():
        for number, word in enumerate(names.get(column, ()), 1):
            for text in (word, f" {word}") if len(word) > 1 else (word,):
                token = tokenizer.encode(text).ids
                if len(token) == 1:
                    ids.append(token[0])
                    classes.append(start + number)
        start += size
    return torch.tensor(ids), torch.tensor(classes)
