"""Image rows into text embeddings."""

from __future__ import annotations

import torch

from siglane.engine.batch import Chunk


def splice(embeds: torch.Tensor, offset: int, chunk: Chunk) -> None:
    """Overwrites the placeholder rows of one chunk, which begins at row `offset` of embeds `[T, hidden_size]`.

    Every placeholder position in the chunk receives its image's row. RuntimeError when an image's features are missing
    or are not as many as its layout says: a request fails rather than answers about half an image.
    """
    for start, stop, image, row in chunk.sequence.spans:
        first, last = max(start, chunk.start), min(stop, chunk.stop)
        if first >= last:
            continue
        rows = chunk.sequence.features.get(image)
        needed = chunk.sequence.request.prompt.layouts[image].rows
        if rows is None or rows.shape[0] != needed:
            raise RuntimeError(f"image {image} needs {needed} rows, it has {'none' if rows is None else rows.shape[0]}")
        target = offset + first - chunk.start
        embeds[target : target + last - first] = rows[row + first - start : row + last - start]
