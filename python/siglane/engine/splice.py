"""Image rows into text embeddings."""

from __future__ import annotations

import torch

from siglane.engine.batch import Chunk


def splice(embeds: torch.Tensor, offset: int, chunk: Chunk) -> None:
    """Overwrites the placeholder rows of one chunk, which begins at row `offset` of embeds `[T, hidden_size]`.

    Every placeholder position in the chunk receives its image's row. RuntimeError when features are missing or short:
    a request fails rather than answers about half an image.
    """
    for start, stop, image, row in chunk.sequence.spans:
        first, last = max(start, chunk.start), min(stop, chunk.stop)
        if first >= last:
            continue
        rows = chunk.sequence.features.get(image)
        if rows is None or rows.shape[0] < row + stop - start:
            raise RuntimeError(f"image {image} needs {row + stop - start} rows, its features are missing or short")
        target = offset + first - chunk.start
        embeds[target : target + last - first] = rows[row + first - start : row + last - start]
