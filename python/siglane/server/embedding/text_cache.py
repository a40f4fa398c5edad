"""Vectors of texts: labels come again with every request and are embedded once."""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ENTRY_BYTES = 512  # of an array and its place in the table, beside text and numbers


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """f32 `[D]`, unit length. tokens: of a text, or patches of an image; cut: whether a text was too long."""

    vector: npt.NDArray[np.float32]
    tokens: int
    cut: bool = False


class TextCache:
    """text -> vector; at most `capacity` bytes with the texts themselves, oldest use out first."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self._vectors: OrderedDict[str, Vector] = OrderedDict()

    def get(self, text: str) -> Vector | None:
        if text in self._vectors:
            self._vectors.move_to_end(text)
        return self._vectors.get(text)

    def put(self, text: str, vector: Vector) -> None:
        """Keeps `vector`, which owns its memory."""
        if text not in self._vectors:
            self._vectors[text] = vector
            self.bytes += _bytes(text, vector)
        while self.bytes > self.capacity:
            self.bytes -= _bytes(*self._vectors.popitem(last=False))


def _bytes(text: str, vector: Vector) -> int:
    return ENTRY_BYTES + sys.getsizeof(text) + vector.vector.nbytes
