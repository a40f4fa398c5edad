"""Adapters merged into a checkpoint's tensors while these are read: W + scale * B A in float32, tensor by tensor.

Nothing here knows a model: an adapter's names are read through the plan that reads the checkpoint's, so that names in
memory and on disk, fused layers and tensor-parallel shards need no second rule.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from siglane.errors import WeightError
from siglane.nn.plan import Destination, Elsewhere, Ignore, WeightPlan
from siglane.weights.adapter import LoraConfig
from siglane.weights.hub import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, Source
from siglane.weights.load import Edit, StoredTensor, headers
from siglane.weights.names import Reading, reading, without_wrappers

logger = logging.getLogger(__name__)

ADAPTER_PICKLE, OTHER_TRAINED = "adapter_model.bin", "non_lora_trainables.bin"
PREFIX = "base_model.model."
LOW_RANK = re.compile(r"(.+)\.(lora_(?:embedding_)?)([AB])(?:\.default)?(?:\.(weight|bias))?")
TOKENS = re.compile(r"(.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.default)?")
WRAPPED_BY_PEFT = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of one tensor.

    name: as the adapter calls it; key: of the adapter's tensor, for messages; shape: that it must have, None for an
    axis of any length; whole: the tensor that takes its place, None for an edit of its values; ties: whether what is
    tied to it changes with it.
    """

    name: str
    key: str
    shape: tuple[int | None, ...]
    edit: Edit
    whole: StoredTensor | None = None
    ties: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in folder `root`; every tensor of its file belongs to one of the changes."""

    root: Path
    changes: tuple[Change, ...]

    @classmethod
    def open(cls, root: Path) -> Adapter:
        """Reads headers only. ConfigError or WeightError names what cannot be merged."""
        config = LoraConfig.read(root / ADAPTER_CONFIG)
        found = {_plain(tensor.key): tensor for tensor in headers(root / ADAPTER_WEIGHTS)}
        # a whole tensor may be the base of a product in the same file
        return cls(root, tuple(sorted(_changes(config, found), key=lambda change: change.whole is None)))


def _plain(key: str) -> str:
    """A tensor's name without what PEFT and a training's wrappers put into it."""
    return WRAPPED_BY_PEFT.sub("", without_wrappers(key).removeprefix(PREFIX))


def _changes(config: LoraConfig, found: Mapping[str, StoredTensor]) -> Iterator[Change]:
    for name, tensor in found.items():
        place = f"{tensor.file}: tensor {tensor.key}"
        if tensor.dtype is None:
            raise WeightError(f"{place} is stored as {tensor.stored_as}; siglane merges floats")
        if match := LOW_RANK.fullmatch(name):
            module, kind, side, leaf = match.groups()
            if not (config.adapts(module) or config.keeps_ties):  # then it may be of a head that is tied to a target
                raise WeightError(f"{place} is of a module that target_modules of {config.file} do not name")
            other = found.get(name.replace(f".{kind}{side}", f".{kind}{'AB'[side == 'A']}", 1))
            if leaf == "bias" and side == "B":
                edit: Edit = partial(_shifted, tensor, config.scale(module))
                yield Change(f"{module}.bias", tensor.key, tensor.shape, edit)
            elif other is None or leaf == "bias":
                raise WeightError(f"{place} has no counterpart; is the adapter complete?")
            elif side == "A":
                yield _product(config, module, tensor, other, table=kind != "lora_")
        elif "lora_" in name:
            raise WeightError(f"{place} is of a kind of LoRA that siglane does not merge")
        elif match := TOKENS.fullmatch(name):
            ids = config.tokens_of(match[1])
            if len(ids) != tensor.shape[0]:
                raise WeightError(f"{place} has {tensor.shape[0]} rows for {len(ids)} trainable_token_indices")
            shape = (None, *tensor.shape[1:])
            yield Change(f"{match[1]}.weight", tensor.key, shape, partial(_with_rows, tensor, ids), ties=True)
        else:
            edit = partial(_instead, tensor)
            yield Change(name, tensor.key, tensor.shape, edit, whole=tensor)


def _product(config: LoraConfig, module: str, a: StoredTensor, b: StoredTensor, *, table: bool) -> Change:
    """A `[r, in]` and B `[out, r]` of a layer, `[r, in, k, k]` and `[out, r, 1, 1]` of a convolution, or those of an
    embedding table, transposed. WeightError when they do not have the stated rank."""
    rank = config.rank_of(module)
    if a.shape[0] != rank or len(b.shape) < 2 or math.prod(b.shape[1:]) != rank:
        raise WeightError(
            f"{a.file}: {a.key} {list(a.shape)} and {b.key} {list(b.shape)} have not the rank {rank} of {config.file}"
        )
    shape = (a.shape[1], b.shape[0]) if table else (b.shape[0], *a.shape[1:])
    edit: Edit = partial(_with_product, a, b, config.scale(module), table)
    return Change(f"{module}.weight", a.key, shape, edit)


def _with_product(a: StoredTensor, b: StoredTensor, scale: float, table: bool, base: torch.Tensor) -> torch.Tensor:
    product = b.read().float().flatten(1) @ a.read().float().flatten(1)
    return _wide(base) + (product.T if table else product).reshape(base.shape) * scale


def _shifted(bias: StoredTensor, scale: float, base: torch.Tensor) -> torch.Tensor:
    return _wide(base) + bias.read().float() * scale


def _with_rows(rows: StoredTensor, ids: Sequence[int], base: torch.Tensor) -> torch.Tensor:
    if not all(0 <= one < len(base) for one in ids):
        raise WeightError(f"{rows.file}: trainable_token_indices {list(ids)} are not within {len(base)} tokens")
    return _wide(base).index_copy(0, torch.tensor(ids), _wide(rows.read()))


def _instead(tensor: StoredTensor, base: torch.Tensor) -> torch.Tensor:
    return tensor.read()


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def adapters_of(checkpoint: Checkpoint, sources: Iterable[Source]) -> tuple[Adapter, ...]:
    """The adapters of a checkpoint: the one it is opened with, or those that lie beside its weights.

    WeightError when there are both, for half an adapter, and for one that can only be unpickled.
    """
    folders = dict.fromkeys((checkpoint.root, *(source.folder.root for source in sources)))
    beside = [folder for folder in folders if _holds_adapter(folder)]
    given = checkpoint.adapter
    if given is None or given.resolve() in {folder.resolve() for folder in beside}:
        return tuple(map(Adapter.open, beside))
    if beside:
        raise WeightError(f"{beside[0]} holds an adapter of its own, {given} is another; merge one of them first")
    return (Adapter.open(given),) if _holds_adapter(given) else ()


def _holds_adapter(folder: Path) -> bool:
    names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE, OTHER_TRAINED)
    config, weights, pickle, other = ((folder / name).exists() for name in names)
    if pickle and not weights:
        raise WeightError(
            f"{folder}: {ADAPTER_PICKLE} is pickled and can run code when opened; convert it with "
            f"`safetensors.torch.save_file(torch.load('{ADAPTER_PICKLE}', weights_only=True), '{ADAPTER_WEIGHTS}')`"
        )
    if config != weights:
        there, missing = (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if config else (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
        raise WeightError(
            f"{folder} holds {there} without {missing}; bring the whole adapter, or remove {there} if the weights "
            "already hold it"
        )
    if config and other:
        raise WeightError(
            f"{folder}: {OTHER_TRAINED} holds trained weights beside the adapter, pickled; merge them into the model, "
            "or put them into the adapter as modules_to_save"
        )
    return config


def adapted(
    tensors: Sequence[StoredTensor], plan: WeightPlan, adapter: Adapter, tied: Mapping[str, str] | None = None
) -> tuple[StoredTensor, ...]:
    """`tensors` as `adapter` changes them. tied: parameter -> the one that is tied to it.

    WeightError names a tensor of the adapter that changes none of them; one of what is not loaded is left out.
    """
    found = list(tensors)
    places = {entry: at for at, one in enumerate(found) if isinstance(entry := plan.find(one.name), Destination)}
    read, merged = _reading(adapter, plan), 0
    for change in adapter.changes:
        name = read(change.name)
        entry = _entry(plan, name)
        if isinstance(entry, Ignore | Elsewhere):
            continue
        if entry is None or (entry not in places and change.whole is None):
            raise WeightError(
                f"{adapter.root}: the adapter's tensor {change.key} changes {name}, which this model does not have; is "
                "it another model's?"
            )
        merged += 1
        if change.whole is not None and entry not in places:
            places[entry] = len(found)
            found.append(replace(change.whole, name=name))
            continue
        twin = replace(entry, parameter=(tied or {}).get(entry.parameter, "")) if change.ties else entry
        for at in {places[one] for one in (entry, twin) if one in places}:
            found[at] = _changed(found[at], change, adapter)
    logger.warning("%s: an adapter is merged into the weights, %d tensors of the model change", adapter.root, merged)
    return tuple(found)


def _changed(tensor: StoredTensor, change: Change, adapter: Adapter) -> StoredTensor:
    expected = [other if one is None else one for one, other in zip(change.shape, tensor.shape, strict=False)]
    if len(change.shape) != len(tensor.shape) or expected != list(tensor.shape):
        raise WeightError(
            f"{adapter.root}: the adapter's tensor {change.key} changes one of shape {list(change.shape)}, "
            f"{tensor.name} has {list(tensor.shape)}"
        )
    return replace(tensor, edits=(*tensor.edits, change.edit))


def _entry(plan: WeightPlan, name: str) -> Destination | Ignore | Elsewhere | None:
    """A layer's weight; `nn.MultiheadAttention` calls its own otherwise."""
    return plan.find(name) or plan.find(re.sub(r"\.weight$", ".in_proj_weight", name))


def _reading(adapter: Adapter, plan: WeightPlan) -> Reading:
    """How the adapter's names are read. WeightError when they lack a beginning and several would do."""
    names = [change.name for change in adapter.changes]
    plain = reading(names, lambda name: _entry(plan, name) is not None)
    if all(_entry(plan, plain(name)) for name in names):
        return plain
    meanings: dict[tuple[object, ...], str] = {}
    for beginning in plan.beginnings():
        meaning = tuple(_entry(plan, beginning + name) for name in names)
        if None not in meaning:
            meanings.setdefault(meaning, beginning)
    if len(meanings) > 1:
        raise WeightError(
            f"{adapter.root}: the adapter calls its modules {names[0]!r} and so on, which may be "
            f"{' or '.join(beginning + names[0] for beginning in meanings.values())}; save it from the whole model"
        )
    return next((partial(str.__add__, beginning) for beginning in meanings.values()), plain)
