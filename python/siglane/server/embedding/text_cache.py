"""Vectors of texts: labels come again with every request and are embedded once."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from siglane.types.byte_cache import ByteCache

ENTRY_BYTES = 512  # of an array and its place in the table, beside text and numbers


@dataclass(frozen=True, slots=True, eq=False)
class Vector:
    """f32 `[D]`, unit length. tokens: of a text, or patches of an image; cut: whether a text was too long."""

    vector: npt.NDArray[np.float32]
    tokens: int
    cut: bool = False


class TextCache(ByteCache[str, Vector]):
    """text -> vector."""

    def keep(self, text: str, vector: Vector) -> None:
        """The text itself counts."""
        self.put(text, vector, ENTRY_BYTES + sys.getsizeof(text) + vector.vector.nbytes)
