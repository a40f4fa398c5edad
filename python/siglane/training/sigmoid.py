"""The pairwise sigmoid loss of SigLIP (arXiv:2303.15343, section 3): every image with every text is a yes or a no.

    logits = exp(t') * images @ texts.T + b                     [n, n]
    loss   = -sum(log_sigmoid(labels * logits)) / n             labels: +1 on the diagonal, -1 elsewhere

No softmax runs over a row or a column, so the sum can be cut anywhere: into chunks of texts, which never need the whole
matrix, and over ranks, between which the texts travel in a ring while the images stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from siglane.settings.training import CHUNK

INITIAL_LOG_SCALE = math.log(10)

Group = dist.ProcessGroup


def sigmoid_loss(
    images: torch.Tensor, texts: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The formula above in as many words. images, texts: unit length `[n, D]`, pair i in row i; log_scale (t') and
    bias: one element each. A scalar."""
    logits = images @ texts.T * log_scale.exp() + bias
    labels = 2 * torch.eye(len(images), dtype=logits.dtype, device=logits.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(images)


def chunked_sigmoid_loss(
    images: torch.Tensor,
    texts: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    chunk: int = CHUNK,
    group: Group | None = None,
) -> torch.Tensor:
    """`sigmoid_loss` in memory for `[n, chunk]` logits, forward and backward, computed in float32 or float64.

    group: ranks that hold different pairs, in any number each. Every rank gets the share of its own images in the loss
    of all pairs, and t' and b the share of their gradients, so that both add up over ranks; embeddings get their whole
    gradient. At no time does a rank hold the texts of more than two. All ranks must call this, and backward, together.
    ValueError when images and texts do not pair up or there is nothing to compare.
    """
    if images.shape != texts.shape or images.ndim != 2:
        raise ValueError(f"images {list(images.shape)} and texts {list(texts.shape)} do not pair up")
    if chunk < 1:
        raise ValueError(f"a chunk holds at least one text, not {chunk}")
    ring = Ring.of(group, len(images), images.device)
    if ring.total == 0:
        raise ValueError("there is no pair to compare")
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    with torch.autocast(images.device.type, enabled=False):
        leaves = (images.to(wide), texts.to(wide), log_scale.to(wide), bias.to(wide))
        loss: torch.Tensor = _SigmoidLoss.apply(*leaves, chunk, ring)  # type: ignore[no-untyped-call]
    return loss


@dataclass(frozen=True, slots=True)
class Ring:
    """The ranks among which blocks travel, each sending to the next; sizes: pairs of every rank.

    `group` None with one size is this process alone.
    """

    rank: int
    sizes: tuple[int, ...]
    group: Group | None = field(default=None, compare=False)

    @classmethod
    def of(cls, group: Group | None, own: int, device: torch.device) -> Ring:
        """own: this rank's pairs."""
        if group is None or dist.get_world_size(group) == 1:
            return cls(0, (own,))
        rank = dist.get_rank(group)
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=device)
        sizes[rank] = own
        dist.all_reduce(sizes, group=group)
        return cls(rank, tuple(sizes.tolist()), group)

    @property
    def total(self) -> int:
        return sum(self.sizes)

    def owner(self, hops: int) -> int:
        """Whose block is here after `hops` hops of all blocks."""
        return (self.rank - hops) % len(self.sizes)

    def passed(self, hops: int, *blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Sends what is here after `hops` hops to the next rank; returns what the one before had, of equal kinds."""
        if self.group is None:
            return blocks
        size = len(self.sizes)
        following, before = ((self.rank + step) % size for step in (1, -1))
        rows = self.sizes[self.owner(hops + 1)]
        arriving = tuple(block.new_empty(rows, *block.shape[1:]) for block in blocks)
        operations = []
        for ours, theirs in zip(blocks, arriving, strict=True):
            if len(ours):
                operations.append(self._operation(dist.isend, ours.contiguous(), following))
            if rows:
                operations.append(self._operation(dist.irecv, theirs, before))
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        return arriving

    def _operation(self, kind: Any, block: torch.Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(kind, block, group=self.group, group_peer=peer)


class _SigmoidLoss(torch.autograd.Function):
    """Only the embeddings are kept for backward, which computes each chunk's logits once more."""

    @staticmethod
    def forward(
        context: Any,
        images: torch.Tensor,
        texts: torch.Tensor,
        log_scale: torch.Tensor,
        bias: torch.Tensor,
        chunk: int,
        ring: Ring,
    ) -> torch.Tensor:
        context.save_for_backward(images, texts, log_scale, bias)
        context.chunk, context.ring = chunk, ring
        total = torch.zeros((), dtype=torch.float64, device=images.device)
        scale, block = log_scale.exp(), texts
        for hops in range(len(ring.sizes)):
            for start, part in _chunks(block, chunk):
                logits = torch.addmm(bias, images, (part * scale).T)
                if hops == 0:  # softplus(z) is the loss of a pair that should be a no, softplus(z) - z of a yes
                    total -= logits.diagonal(-start).sum()
                total += F.softplus(logits).sum()
                del logits  # before the next chunk's are made
            if hops + 1 < len(ring.sizes):
                (block,) = ring.passed(hops, block)
        return (total / ring.total).to(images.dtype)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, texts, log_scale, bias = context.saved_tensors
        ring: Ring = context.ring
        scale, block = log_scale.exp(), texts
        to_images, to_block = torch.zeros_like(images), torch.zeros_like(texts)
        to_scale, to_bias = torch.zeros_like(log_scale), torch.zeros_like(bias)
        for hops in range(len(ring.sizes)):
            for start, part in _chunks(block, context.chunk):
                scaled = part * scale
                cosines = images @ scaled.T  # times the scale
                slope = torch.add(cosines, bias).sigmoid_()
                if hops == 0:
                    slope.diagonal(-start).sub_(1)
                slope.mul_(gradient / ring.total)
                to_images.addmm_(slope, scaled)
                to_block[start : start + len(part)].addmm_(slope.T, images * scale)
                to_bias += slope.sum()
                to_scale += cosines.mul_(slope).sum()
                del slope, cosines
            block, to_block = ring.passed(hops, block, to_block)  # the last hop brings both home
        return to_images, to_block, to_scale, to_bias, None, None


def _chunks(texts: torch.Tensor, chunk: int) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, len(texts), chunk):
        yield start, texts[start : start + chunk]
