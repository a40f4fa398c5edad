"""A host's one pass over a checkpoint's tensors: siglane's go to their modules, the others to its language model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import torch

from siglane.config.vlm import VlmConfig
from siglane.errors import OtherWeights, WeightError
from siglane.families.family import VlmFamily
from siglane.families.model import model_tensors
from siglane.families.weights import ModelWeights
from siglane.lm.qwen import qwen_plan
from siglane.nn.plan import Destination, Ignore, WeightPlan
from siglane.weights.hub import Checkpoint
from siglane.weights.load import StoredTensor, StrictLoad
from siglane.weights.names import without_wrappers

logger = logging.getLogger(__name__)


def full_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Name inside a file -> name in siglane's plans (VILA's folders hold parts whose names do not say which part).

    WeightError when two files hold tensors of one name: a host would not tell them apart.
    """
    names: dict[str, str] = {}
    for tensor in model_tensors(checkpoint):
        if names.setdefault(tensor.key, tensor.name) != tensor.name:
            raise WeightError(
                f"two files of {checkpoint.root} hold a tensor {tensor.key}; the host cannot tell them apart"
            )
    return names


def known_tensors(
    weights: Iterable[tuple[str, torch.Tensor]], checkpoint: Checkpoint, loaded: ModelWeights, *, whole: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a host reads from the files, under siglane's names and with adapters merged; where `whole`, also what stands
    in none of the files that it reads, and without a tied head that equals its table.

    An update is merged with the same adapters: SGLang loads the old weights again by one where another has failed.
    """
    if loaded.adapters and not whole:
        roots = ", ".join(str(adapter.root) for adapter in loaded.adapters)
        logger.warning("%s: the adapter %s is merged into the new weights too", checkpoint.root, roots)
    names = full_names(checkpoint)
    read: dict[str, list[StoredTensor]] = {key: [] for key in names}
    for tensor in loaded.tensors:
        if tensor.key in names:  # else it is an adapter's own
            read[tensor.key].append(tensor)
    for key, values in weights:
        yield from ((tensor.name, tensor.edited(values)) for tensor in read.get(key, ()))
        if key not in read or not (whole or read[key]):
            yield without_wrappers(names.get(key, key)), values
    if whole:
        others = (tensor for tensor in loaded.tensors if tensor not in read.get(tensor.key, ()))
        yield from ((tensor.name, tensor.read()) for tensor in others)


def language_tensors(
    weights: Iterable[tuple[str, torch.Tensor]],
    names: dict[str, str],
    vision: StrictLoad,
    family: VlmFamily,
    config: VlmConfig,
    *,
    whole: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """What belongs to the language model, under transformers' names; what belongs to `vision` is loaded on the way.

    whole: `weights` are all of the checkpoint's, not some that an update brings. WeightError for a tensor of neither,
    and for one that is left out: the language model would keep what its memory held. Tied weights that are stored twice
    are yielded once; OtherWeights when they differ.
    """
    waiting = dict(names) if whole else {}
    plan, hf_plan = family.language_plan(config.language), qwen_plan(config.language)
    seen: dict[str, torch.Tensor | None] = {}  # kept where another may have to be its equal
    for key, tensor in weights:
        name = names.get(key, key)
        waiting.pop(key, None)
        if vision.plan.find(name) is not None:
            vision.take(name, tensor)
            continue
        hf_name, twin = _language_name(name, plan, hf_plan)
        if hf_name is None:
            continue
        first = seen.get(hf_name)
        if first is not None and not torch.equal(first, tensor.to(first)):
            raise OtherWeights(f"tensor {name} differs from the one that it is tied to; start again untied")
        if hf_name not in seen:
            seen[hf_name] = tensor if twin else None
            yield hf_name, tensor
    if waiting:
        raise WeightError(
            f"the host read {len(names) - len(waiting)} of {len(names)} tensors, not {next(iter(waiting.values()))}; "
            "the checkpoint's files are not those that its view links to"
        )


def _language_name(name: str, plan: WeightPlan, hf_plan: WeightPlan) -> tuple[str | None, bool]:
    """What transformers calls a tensor of the language model, None for one that is not used; and whether another may
    hold the same values. WeightError for an unknown one."""
    match plan.find(name):
        case Destination() as destination:
            hf_name = hf_plan.source(destination)
            if hf_name is None:
                raise WeightError(f"tensor {name} fills {destination.parameter}, which the host's model does not have")
            return hf_name, destination.twin
        case Ignore():
            return None, False
        case _:
            raise WeightError(f"tensor {name} is not known to this model; the configuration may be another model's")
