"""Zero-shot scores: vectors of images, and of labels in their templates, to the labels that fit each image."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F

from siglane.families.two_tower import Calibration


def label_vectors(by_template: Iterable[torch.Tensor]) -> torch.Tensor:
    """by_template: for each template the unit vectors f32 `[labels, D]` of its texts -> f32 `[labels, D]`, unit length:
    a label's vector is the mean of its texts'."""
    return F.normalize(functools.reduce(torch.add, by_template), dim=-1)


def sigmoid_scores(images: torch.Tensor, labels: torch.Tensor, calibration: Calibration) -> torch.Tensor:
    """How likely each pair belongs together: unit vectors `[I, D]` and `[L, D]` -> `[I, L]` in 0..1. A sigmoid for each
    pair: the scores of an image have no sum."""
    return calibration.logits(images, labels).sigmoid()


def likeliest(scores: torch.Tensor, most: int, threshold: float) -> list[list[tuple[int, float]]]:
    """scores: `[I, L]` -> for each image number and score of at most `most` labels of at least `threshold`, the most
    likely first, among equals the first."""
    values, order = scores.sort(dim=1, descending=True, stable=True)
    rows = zip(order[:, :most].tolist(), values[:, :most].tolist(), strict=True)
    return [[pair for pair in zip(*row, strict=True) if pair[1] >= threshold] for row in rows]
