"""Checkpoints to what an engine's process runs: a chat model's engine, a SigLIP's towers, or both."""

from __future__ import annotations

import logging
import time

import torch
from transformers import PreTrainedTokenizerFast

from siglane.config.vlm import VlmConfig
from siglane.engine.constraints.constraint import Grammars
from siglane.engine.engine import Engine
from siglane.errors import ConfigError
from siglane.families.model import VisionLanguageModel, load_model
from siglane.families.processor import load_facts
from siglane.families.two_tower import LoadedTwoTower, load_two_tower
from siglane.nn.attention import runnable_backends
from siglane.nn.cpu.optimise import optimise
from siglane.nn.cuda.optimise import optimise_on_cuda
from siglane.settings.engine import EngineConfig
from siglane.vision.tower import SiglipVisionModel
from siglane.weights.demo import opened
from siglane.weights.hub import Checkpoint
from siglane.weights.quantised import codes_format

logger = logging.getLogger(__name__)


def load_engine(model: str | Checkpoint, config: EngineConfig) -> Engine:
    """The engine of a folder, a hub id or "demo". UserError when it cannot be used here, naming the reason."""
    checkpoint = opened(model)
    return build_engine(checkpoint, *load_facts(checkpoint), config)


def build_engine(
    checkpoint: Checkpoint, stated: VlmConfig, tokenizer: PreTrainedTokenizerFast, config: EngineConfig
) -> Engine:
    """Loads the weights. stated, tokenizer: the checkpoint's own."""
    return _started(_load(checkpoint, stated, config), stated, tokenizer, config)


def load_with_tagger(
    model: str | Checkpoint, tagger: str | Checkpoint, config: EngineConfig
) -> tuple[Engine, LoadedTwoTower]:
    """`load_engine`, and both towers of the SigLIP `tagger`: its image tower is the chat model's own where their
    weights are equal. Layers of fewer bits are never shared, because codes do not tell whether they are."""
    checkpoint, siglip = opened(model), opened(tagger)
    stated, tokenizer = load_facts(checkpoint)
    loaded = _load(checkpoint, stated, config)
    fewer_bits = config.bits is not None or any(map(codes_format, (checkpoint, siglip)))
    shared = None if loaded.vision is None or fewer_bits else loaded.vision.encoder.tower
    two_tower = _load_towers(siglip, config, shared)
    if fewer_bits:
        two_tower = two_tower._replace(not_shared_because="layers of fewer bits are not shared")
    engine = _started(
        loaded, stated, tokenizer, config
    )  # optimises it, after which its layers can no longer be loaded into
    optimise(two_tower.model)
    return engine, two_tower


def load_tagger(model: str | Checkpoint, config: EngineConfig) -> LoadedTwoTower:
    """Both towers of a SigLIP without a chat model. UserError when it cannot be used here, naming the reason."""
    if config.threads:
        torch.set_num_threads(config.threads)
    two_tower = _load_towers(opened(model), config)
    optimise(two_tower.model)
    return two_tower


def _load_towers(
    checkpoint: Checkpoint, config: EngineConfig, tower: SiglipVisionModel | None = None
) -> LoadedTwoTower:
    begin = time.monotonic()
    device, _, dtype = placement(config)
    two_tower = load_two_tower(
        checkpoint,
        device=device,
        dtype=dtype,
        attention_backend=config.attention_backend,
        tower=tower,
        quantization=config.bits,
    )
    logger.info("loaded %s in %.1f s (%s, %s)", checkpoint.root.name, time.monotonic() - begin, device, dtype)
    return two_tower


def _load(checkpoint: Checkpoint, stated: VlmConfig, config: EngineConfig) -> VisionLanguageModel:
    begin = time.monotonic()
    device, dtype, vision_dtype = placement(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    model = load_model(
        checkpoint,
        stated,
        device=device,
        dtype=dtype,
        vision_dtype=vision_dtype,
        attention_backend=config.attention_backend,
        quantization=config.bits,
    )
    if model.vision is not None:  # on CUDA with a trial, of which the first image should not have to wait
        model.vision.encoder.tower.backend_for(device, vision_dtype)
    logger.info("loaded %s in %.1f s (%s, %s)", checkpoint.root.name, time.monotonic() - begin, device, dtype)
    return model


def _started(
    model: VisionLanguageModel, stated: VlmConfig, tokenizer: PreTrainedTokenizerFast, config: EngineConfig
) -> Engine:
    optimise(model)
    optimise_on_cuda(model.language, config.batch_invariant)
    grammars = Grammars(tokenizer, stated.language.vocab_size, stated.eos_token_ids)
    return Engine(model, config, stated.eos_token_ids, stated.thinking, grammars)


def placement(config: EngineConfig) -> tuple[torch.device, torch.dtype, torch.dtype]:
    """Device, dtype of the language model and of the tower.

    ConfigError when this machine cannot do what is asked: a wrong choice fails here, not at the first image.
    """
    device = config.resolve_device()
    if device.type == "cuda":  # tensors know their device by number
        device = torch.device("cuda", device.index or 0)
    if config.batch_invariant and device.type != "cuda":
        raise ConfigError(
            "batch_invariant is promised on CUDA only: a CPU's products round by their number of rows; for the same "
            "there, leave it out and compute one request at a time (max_running 1, no prefix_cache)"
        )
    dtype, vision_dtype = config.resolve_dtypes(device)
    runnable_backends(config.attention_backend, device, vision_dtype)
    return device, dtype, vision_dtype
