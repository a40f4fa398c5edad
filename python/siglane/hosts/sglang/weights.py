"""SGLang's one pass over a checkpoint's tensors: siglane's go to their modules, the rest to SGLang's language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from siglane.config.vlm import VlmConfig
from siglane.errors import WeightError
from siglane.families.family import VlmFamily
from siglane.families.model import model_tensors
from siglane.lm.qwen import qwen_plan
from siglane.nn.plan import Destination, Ignore
from siglane.weights.hub import Checkpoint
from siglane.weights.load import StrictLoad


def full_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Name inside a file -> name in siglane's plans (VILA's folders hold parts whose names do not say which part).

    WeightError when two files hold tensors of one name: SGLang would not tell them apart.
    """
    names: dict[str, str] = {}
    for tensor in model_tensors(checkpoint):
        if names.setdefault(tensor.key, tensor.name) != tensor.name:
            raise WeightError(
                f"two files of {checkpoint.root} hold a tensor {tensor.key}; SGLang cannot tell them apart"
            )
    return names


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
    and for one that is left out: SGLang's language model would keep what its memory held. Tied weights that are stored
    twice are yielded once.
    """
    waiting = dict(names) if whole else {}
    plan, hf_plan = family.language_plan(config.language), qwen_plan(config.language)
    seen: set[str] = set()
    for key, tensor in weights:
        name = names.get(key, key)
        waiting.pop(key, None)
        if vision.plan.find(name) is not None:
            vision.take(name, tensor)
            continue
        match plan.find(name):
            case None:
                raise WeightError(f"tensor {name} is not known to this model; the configuration may be another model's")
            case Destination() as destination:
                hf_name = hf_plan.source(destination)
                if hf_name is None:
                    raise WeightError(
                        f"tensor {name} fills {destination.parameter}, which SGLang's model does not have"
                    )
                if hf_name not in seen:
                    seen.add(hf_name)
                    yield hf_name, tensor
            case Ignore():
                continue
    if waiting:
        raise WeightError(
            f"SGLang read {len(names) - len(waiting)} of {len(names)} tensors, not {next(iter(waiting.values()))}; the "
            "checkpoint's files are not those that its view links to"
        )
