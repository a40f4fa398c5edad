"""What fills a model: tensors under names that are known, adapters merged, and a head that is tied or is not."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from siglane.config.vlm import VlmConfig
from siglane.families.registry import vlm_family
from siglane.nn.plan import Destination, WeightPlan
from siglane.weights.checksum import check_files
from siglane.weights.hub import ADAPTER_WEIGHTS, Checkpoint, Source
from siglane.weights.load import StoredTensor, stored_tensors
from siglane.weights.merge import Adapter, adapted, adapters_of
from siglane.weights.names import known_names
from siglane.weights.quantised import refuse_codes

logger = logging.getLogger(__name__)

TABLE, HEAD = "language.embed_tokens.weight", "language.lm_head.weight"  # parameters of `VisionLanguageModel`
TIED = {TABLE: HEAD, HEAD: TABLE}
COMPARED_ROWS = 4096  # of head and table at a time


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """config: the checkpoint's, except that a head that has values of its own is not tied; plan: of these tensors;
    adapters: those that are merged into them."""

    config: VlmConfig
    plan: WeightPlan
    tensors: tuple[StoredTensor, ...]
    adapters: tuple[Adapter, ...]


def model_weights(checkpoint: Checkpoint, config: VlmConfig) -> ModelWeights:
    """Everything that fills a model that answers. Reads headers, and values where a tied head has to be compared.

    WeightError for files, names or adapters that cannot be used.
    """
    family, sources = vlm_family(checkpoint), model_sources(checkpoint)
    apart = replace(config, language=replace(config.language, tie_embeddings=False))
    plan = family.plan(apart)
    tensors, adapters = read_weights(checkpoint, sources, plan)
    if not config.language.tie_embeddings:
        return ModelWeights(config, plan, merged(tensors, plan, adapters), adapters)
    tensors = merged(_with_both(tensors, plan), plan, adapters, TIED)
    ends = _ends(tensors, plan)
    if len(ends) < len(TIED) or _are_one(ends[TABLE], ends[HEAD]):
        return ModelWeights(
            config, family.plan(config), tuple(one for one in tensors if one is not ends.get(HEAD)), adapters
        )
    if family.one_table and not (ends[TABLE].edits or ends[HEAD].edits):
        return ModelWeights(config, family.plan(config), tensors, adapters)  # loading names what differs
    logger.warning(
        "%s: tie_word_embeddings is stated, but %s has other values than %s; each is used, as transformers 5 does",
        checkpoint.root, ends[HEAD].name, ends[TABLE].name,
    )  # fmt: skip
    return ModelWeights(apart, plan, tensors, adapters)


def model_sources(checkpoint: Checkpoint) -> tuple[Source, ...]:
    """The folders that hold the tensors of a model that answers. UserError for a folder of codes."""
    refuse_codes(checkpoint)
    family = vlm_family(checkpoint)
    return tuple(dict.fromkeys((*family.vision_sources(checkpoint), *family.language_sources(checkpoint))))


def read_weights(
    checkpoint: Checkpoint, sources: Sequence[Source], plan: WeightPlan
) -> tuple[tuple[StoredTensor, ...], tuple[Adapter, ...]]:
    """The tensors of `sources` under names that `plan` knows, not yet merged with the adapters beside them.

    Their files are compared with their checksums as `checkpoint` asks. WeightError as `model_weights`; UserError for a
    folder of codes.
    """
    refuse_codes(checkpoint)
    tensors, adapters = stored_tensors(sources), adapters_of(checkpoint, sources)
    files = [*dict.fromkeys(tensor.file for tensor in tensors), *(one.root / ADAPTER_WEIGHTS for one in adapters)]
    check_files(checkpoint, files)
    return known_names(tensors, plan), adapters


def tower_weights(checkpoint: Checkpoint, sources: Sequence[Source], plan: WeightPlan) -> tuple[StoredTensor, ...]:
    """Everything that fills a model without a head to tie. WeightError as `model_weights`."""
    tensors, adapters = read_weights(checkpoint, sources, plan)
    return merged(tensors, plan, adapters)


def merged(
    tensors: Sequence[StoredTensor],
    plan: WeightPlan,
    adapters: Iterable[Adapter],
    tied: Mapping[str, str] | None = None,
) -> tuple[StoredTensor, ...]:
    """`tensors` as all `adapters` change them. tied: as of `adapted`."""
    for adapter in adapters:
        tensors = adapted(tensors, plan, adapter, tied)
    return tuple(tensors)


def _ends(tensors: Sequence[StoredTensor], plan: WeightPlan) -> dict[str, StoredTensor]:
    """The tensors of embedding table and head, by parameter."""
    entries = ((plan.find(one.name), one) for one in tensors)
    return {
        entry.parameter: one for entry, one in entries if isinstance(entry, Destination) and entry.parameter in TIED
    }


def _with_both(tensors: Sequence[StoredTensor], plan: WeightPlan) -> tuple[StoredTensor, ...]:
    """`tensors`, where only one of table and head is stored, with it under the other's name too: an adapter may change
    one of them."""
    ends = _ends(tensors, plan)
    if len(ends) != 1:
        return tuple(tensors)
    ((parameter, stored),) = ends.items()
    name = plan.source(Destination(TIED[parameter], ""))
    return tuple(tensors) if name is None else (*tensors, replace(stored, name=name))


def _are_one(table: StoredTensor, head: StoredTensor) -> bool:
    """Whether they hold the same values, whatever their storage types."""
    if (table.file, table.key, table.edits) == (head.file, head.key, head.edits):
        return True
    if table.shape != head.shape or table.dtype is None or head.dtype is None:
        return False
    wide = torch.promote_types(table.dtype, head.dtype)
    pairs = zip(table.read().split(COMPARED_ROWS), head.read().split(COMPARED_ROWS), strict=True)
    return all(torch.equal(one.to(wide), other.to(wide)) for one, other in pairs)
