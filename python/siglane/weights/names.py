"""Names that a training's wrappers have left on tensors, and what a model calls them.

`torch.compile` writes `_orig_mod.` in front of the names of what it compiles, FSDP `_fsdp_wrapped_module.`, activation
checkpointing `_checkpoint_wrapped_module.`, DistributedDataParallel and DeepSpeed `module.`, and a trainer the name of
the attribute that holds its model. What is known without them is taken without them.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, takewhile

from siglane.errors import WeightError
from siglane.nn.plan import WeightPlan
from siglane.weights.load import StoredTensor

logger = logging.getLogger(__name__)

# no model has submodules called so
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module")
UNMERGED = re.compile(r"\.(base_layer|original_module|modules_to_save|lora_\w+)\.")  # PEFT's names inside a model
MOST_PREFIX = 3  # segments in front of all names that are tried to be left out

Reading = Callable[[str], str]


def known_names(tensors: Sequence[StoredTensor], plan: WeightPlan) -> tuple[StoredTensor, ...]:
    """The tensors under names that `plan` knows, each folder's read in one way; the change is named in the log.

    WeightError when a wrapper's name can be left out in no way, or in a way that gives two tensors one name.
    """
    found: list[StoredTensor] = []
    for folder, group in groupby(tensors, key=lambda tensor: tensor.file.parent):
        stored = tuple(group)
        prefix = stored[0].name.removesuffix(stored[0].key)
        read = reading([tensor.key for tensor in stored], partial(_is_known, plan, prefix))
        renamed = [replace(tensor, name=prefix + read(tensor.key)) for tensor in stored]
        _check(str(folder), [tensor.key for tensor in stored], [tensor.name for tensor in renamed], plan)
        found += renamed
    return tuple(found)


def reading(keys: Sequence[str], known: Callable[[str], bool]) -> Reading:
    """How `keys` are to be read so that as many as can be are `known`; as they are, where that is as good."""
    if all(map(known, keys)):
        return _as_it_is
    ways: list[Reading] = [_as_it_is, without_wrappers, _inside]
    columns = zip(*(without_wrappers(key).split(".") for key in keys), strict=False)
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    ways += [partial(_cut, ".".join(shared[:count]) + ".") for count in range(1, min(len(shared), MOST_PREFIX) + 1)]
    return min(ways, key=lambda way: sum(not known(way(key)) for key in keys))


def _is_known(plan: WeightPlan, prefix: str, key: str) -> bool:
    return plan.find(prefix + key) is not None


def without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _as_it_is(key: str) -> str:
    return key


def _inside(key: str) -> str:
    """What a wrapper holds, without the name of what holds the wrapper."""
    parts = key.split(".")
    last = max((at for at, part in enumerate(parts[:MOST_PREFIX]) if part in WRAPPERS), default=-1)
    return without_wrappers(".".join(parts[last + 1 :]))


def _cut(beginning: str, key: str) -> str:
    """Without wrappers and without a beginning that all names share."""
    return without_wrappers(key).removeprefix(beginning)


def _check(place: str, keys: Sequence[str], names: Sequence[str], plan: WeightPlan) -> None:
    """Says what was left out, or why it cannot be."""
    pairs = list(zip(keys, names, strict=True))
    wrapped = [name for key, name in pairs if without_wrappers(key) != key]
    if wrapped and not any(map(plan.find, wrapped)):
        example = next(key for key in keys if without_wrappers(key) != key)
        prefix = next(part for part in example.split(".") if part in WRAPPERS)
        raise WeightError(
            f"{place}: tensors are called {example!r} and so on; {prefix!r} is what a training's wrapper "
            f"(torch.compile, DataParallel, FSDP) leaves, and without it the rest is not known to this model; save the "
            "state_dict of the model inside the wrapper"
        )
    if left := next((key for key, name in pairs if UNMERGED.search(key) and not plan.find(name)), None):
        raise WeightError(
            f"{place}: tensor {left!r} is an adapter's that was not merged before the model was saved; save it again "
            "after PEFT's merge_and_unload(), or save base and adapter apart"
        )
    changed = [(key, name) for key, name in pairs if not name.endswith(key)]
    counts = Counter(names)
    for key, name in changed:
        if counts[name] > 1:
            other = next(one for one, its in pairs if its == name and one != key)
            raise WeightError(
                f"{place}: {key!r} and {other!r} are one tensor once a wrapper's name is left out; keep one of them"
            )
    if changed:
        logger.warning("%s: %d tensors are read without a wrapper's name, %s as %s", place, len(changed), *changed[0])
