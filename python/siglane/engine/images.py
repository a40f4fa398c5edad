"""Images of one step on their way to features: one that fails takes no other with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from siglane.engine.batch import Sequence as Running
from siglane.engine.features import FeatureKey
from siglane.errors import EngineError
from siglane.types import ImagePatches

logger = logging.getLogger(__name__)

Encode = Callable[[Sequence[ImagePatches]], tuple[torch.Tensor, ...]]


class Encoded(NamedTuple):
    """An image behind the tower, which may have given NaN. wanting: who has it, and under which number."""

    key: FeatureKey
    wanting: list[tuple[Running, int]]
    rows: torch.Tensor


def encode_isolated(encode: Encode, images: Sequence[ImagePatches]) -> list[torch.Tensor | EngineError]:
    """All images together; when that raises, each alone."""
    try:
        return list(encode(images))
    except torch.AcceleratorError:  # the device is lost for this process: end it, its supervisor starts another
        raise
    except Exception as error:
        message = "encoding %d images failed (%s); trying each alone"
        logger.warning(message, len(images), type(error).__name__, exc_info=len(images) > 1)
    encoded: list[torch.Tensor | EngineError] = []
    for image in images:
        try:
            encoded.append(encode([image])[0])
        except torch.AcceleratorError:
            raise
        except Exception as error:
            logger.exception("encoding one image failed")
            encoded.append(EngineError(f"an image could not be encoded ({type(error).__name__})"))
    return encoded


def finite(encoded: Sequence[Encoded]) -> torch.Tensor:
    """Of each image whether all of its rows are, bool `[B]` where they lie: to be read with the step's result."""
    return torch.stack([one.rows.isfinite().all() for one in encoded]) if encoded else torch.empty(0)
