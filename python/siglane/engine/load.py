"""A checkpoint to a running engine."""

from __future__ import annotations

import logging
import time

from siglane.engine.config import EngineConfig
from siglane.engine.engine import Engine
from siglane.families.model import load_model
from siglane.families.processor import load_processor
from siglane.nn.parallel import TensorParallel
from siglane.weights.hub import open_checkpoint

logger = logging.getLogger(__name__)


def load_engine(model: str, config: EngineConfig, revision: str | None = None) -> Engine:
    """Loads weights and builds the engine. UserError when the checkpoint cannot be used, naming the reason."""
    begin = time.monotonic()
    checkpoint = open_checkpoint(model, revision)
    processor = load_processor(checkpoint)
    device = config.resolve_device()
    dtype, vision_dtype = config.resolve_dtypes(device)
    loaded = load_model(
        checkpoint,
        processor.config,
        device=device,
        dtype=dtype,
        vision_dtype=vision_dtype,
        tp=TensorParallel.single(),
        attention_backend=config.attention_backend,
    )
    logger.info("loaded %s in %.1f s (%s, %s)", model, time.monotonic() - begin, device, dtype)
    return Engine(loaded, config, processor.eos_token_ids)
