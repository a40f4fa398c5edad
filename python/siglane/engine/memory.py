"""How much memory the KV cache gets: on a GPU what a measured largest step leaves, elsewhere a fixed share."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from siglane.engine.batch import Sequence
from siglane.engine.sampling.sampler import Choose
from siglane.errors import UserError
from siglane.families.model import VisionLanguageModel
from siglane.lm.attention import SegmentAttention
from siglane.types import PackedPatches, Prompt, Request, SamplingParams

logger = logging.getLogger(__name__)

KV_BYTES_ON_CPU = 1 << 30
SHARE_OF_GPU = 0.9
GRAPH_BYTES = 512 << 20  # of decode steps' graphs, their logits among it
HARDEST = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=20)


class MemoryPlan(NamedTuple):
    """Bytes. total: of the device; others: what is taken outside torch's allocator; peak: of weights and the largest
    step; kv: what is left of `SHARE_OF_GPU`, without encoded images and graphs."""

    total: int
    others: int
    peak: int
    kv: int


def kv_bytes(model: VisionLanguageModel, rows: LargestStep, feature_bytes: int, choose: Choose) -> int:
    """What the KV cache may take where nobody states it. choose: of the device. UserError when a GPU is too small."""
    device = model.language.norm.weight.device
    if device.type != "cuda":
        return KV_BYTES_ON_CPU
    plan = plan_memory(device, measured_peak(model, rows, choose), feature_bytes)
    giga = [round(number / 1e9, 2) for number in plan]
    logger.info("GPU memory in GB: %s in all, %s of others, %s at most in a step, %s for the KV cache", *giga)
    return plan.kv


class LargestStep(NamedTuple):
    """patches of one packed forward, tokens of one step, rows whose next token is chosen."""

    patches: int
    tokens: int
    running: int


def plan_memory(device: torch.device, peak: int, feature_bytes: int) -> MemoryPlan:
    """peak: bytes in torch's allocator during the largest step."""
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    kv = int(total * SHARE_OF_GPU) - others - peak - feature_bytes - GRAPH_BYTES
    if kv <= 0:
        raise UserError(
            f"{device} has {total / 1e9:.1f} GB, {(others + peak + feature_bytes) / 1e9:.1f} of them are needed beside "
            "the KV cache; lower max_batch_tokens, max_batch_patches or feature_cache_bytes, or take fewer bits",
            code="out_of_memory",
        )
    return MemoryPlan(total, others, peak, kv)


@torch.inference_mode()
def measured_peak(model: VisionLanguageModel, rows: LargestStep, choose: Choose) -> int:
    """Bytes that torch's allocator held at most while the largest forwards ran: the tower's, a prefill's without a
    cache, the output head's and choices by all that a request can ask for."""
    language = model.language
    device = language.norm.weight.device
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    if model.vision is not None:
        encoder = model.vision.encoder
        grid, size = encoder.tower.config.usual_grid, encoder.tower.config.patch_dim
        grids = (grid,) * max(1, rows.patches // grid.area)
        patches = torch.zeros(sum(one.area for one in grids), size, dtype=encoder.dtype, device=device)
        encoder.tower(PackedPatches(patches, grids))
    tokens = torch.zeros(rows.tokens, dtype=torch.long, device=device)
    embeds, places = language.embed_turned(tokens), torch.arange(rows.tokens, device=device)
    hidden = language.decode(embeds, places, SegmentAttention([rows.tokens]))
    logits = language.logits(hidden[: rows.running])
    request = Request("largest", Prompt((0,)), HARDEST, 1)
    choose(logits, [Sequence.of(request, 0, 0).next_token()] * len(logits), frozenset())()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # which the KV cache is to have
    return torch.cuda.max_memory_allocated(device)
