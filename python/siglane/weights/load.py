"""Strict loading, one tensor at a time: every parameter is filled exactly once and every tensor is accounted for.

A load runs twice over the same code. First a rehearsal: the model's parameters and the checkpoint's tensors are all on
torch's `meta` device, so names and shapes are compared and nothing is allocated; a configuration that does not belong
to its weights fails here, in milliseconds. Then the parameters are allocated and the tensors are read.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from siglane.errors import ConfigError, OtherWeights, WeightError
from siglane.nn.device import short_of_memory
from siglane.nn.linear import ShardedModule, copy_checked
from siglane.nn.plan import Destination, Elsewhere, Ignore, WeightPlan
from siglane.weights.files import open_weights, weight_files
from siglane.weights.hub import Source

logger = logging.getLogger(__name__)

READ_BYTES = 64 << 20
LISTED = 5  # names in a message about missing tensors

# the storage types a parameter can be cast from; anything else needs scales, i.e. is quantised
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTISED = f"siglane reads {', '.join(DTYPES)}, quantised checkpoints are not supported"

Edit = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, known by its header: `key` inside the file, `name` with its source's prefix.

    stored_as: the storage type, in safetensors' words; edits: what an adapter makes of its values, one after another.
    """

    name: str
    file: Path
    key: str
    shape: tuple[int, ...]
    stored_as: str
    edits: tuple[Edit, ...] = ()

    @property
    def dtype(self) -> torch.dtype | None:
        """None for a storage type that no parameter is cast from: quantised weights, integer buffers."""
        return DTYPES.get(self.stored_as)

    def read(self, handle: Any = None) -> torch.Tensor:
        """The values, edited. handle: of its file, where that is open."""
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(open_weights(self.file)) if handle is None else handle
            return self.edited(opened.get_tensor(self.key))

    def edited(self, values: torch.Tensor) -> torch.Tensor:
        for edit in self.edits:
            values = edit(values)
        return values


def stored_tensors(sources: Iterable[Source]) -> tuple[StoredTensor, ...]:
    """The tensors of all files of `sources`, in file order. Reads headers only.

    WeightError names a file that is missing, cut short, empty, a Git LFS pointer or a pickle.
    """
    return tuple(
        tensor for source in sources for file in weight_files(source.folder) for tensor in headers(file, source.prefix)
    )


def headers(file: Path, prefix: str = "") -> Iterator[StoredTensor]:
    """The tensors of one file. WeightError as `open_weights`."""
    with open_weights(file) as handle:
        for key in handle.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
            piece = handle.get_slice(key)
            yield StoredTensor(prefix + key, file, key, tuple(piece.get_shape()), piece.get_dtype())


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a module that is made smaller as soon as it is loaded, so that no two parts are large at a time.

    begin: gives its parameters memory, when its first tensor comes; end: called when the last one is in.
    """

    begin: Callable[[nn.Module], None]
    end: Callable[[nn.Module], None]


NO_STAGES: Mapping[str, Stage] = MappingProxyType({})


class StrictLoad:
    """Fills the parameters of `module` from named tensors by `plan`; leaving the block checks that all are filled.

        with StrictLoad(plan, module) as load:
            host.load_weights(load.route(iterator))

    `ignored` lists (name, reason) of what the plan leaves out. held: parameters that have their values; their tensors
    have to be the same, once cast. stages: by the paths of parts of `module`.
    """

    def __init__(
        self, plan: WeightPlan, module: nn.Module, held: Collection[str] = (), stages: Mapping[str, Stage] = NO_STAGES
    ) -> None:
        self.plan, self.module, self.held = plan, module, frozenset(held)
        self.ignored: list[tuple[str, str]] = []
        self._owners = {name: owner_of(module, name) for name, _ in module.named_parameters()}
        self._waiting = {
            Destination(name, part): None
            for name, (owner, leaf) in self._owners.items()
            for part in (owner.parts(leaf) if isinstance(owner, ShardedModule) else ("",))
        }
        self._filled_by: dict[Destination, str] = {}
        self._stages = stages
        self._paths = {
            f"{path}.{name}": path for path in stages for name, _ in module.get_submodule(path).named_parameters()
        }
        self._begun: set[str] = set()
        self._left = Counter(self._paths.get(destination.parameter, "") for destination in self._waiting)

    def __enter__(self) -> StrictLoad:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._waiting:
            missing = [f"{one.parameter} ({one.part})" if one.part else one.parameter for one in self._waiting]
            more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
            raise WeightError(
                f"the checkpoint fills {len(self._filled_by)} of {len(self._filled_by) + len(missing)} parameters; "
                f"missing: {', '.join(missing[:LISTED])}{more}"
            )

    def route(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Takes what the plan knows and yields what it places elsewhere, without the prefix. One pass."""
        for name, tensor in weights:
            rest = self.take(name, tensor)
            if rest is not None:
                yield rest, tensor

    def take(self, name: str, tensor: torch.Tensor, file: Path | None = None) -> str | None:
        """Loads or ignores one tensor; returns its other owner's name for it when the plan places it elsewhere.

        tensor: whole, any floating dtype; it is cast. WeightError names tensor and `file` when the plan does not know
        the name, the model has no such parameter, the parameter is already filled, the shapes differ or the values are
        quantised; OtherWeights when the parameter is held, or tied, and has other values.
        """
        place = f"{file}: tensor {name}" if file else f"tensor {name}"
        match self.plan.find(name):
            case None:
                raise WeightError(f"{place} is not known to this model; the configuration may be another model's")
            case Ignore() as entry:
                self.ignored.append((name, entry.reason))
                _check_constant(entry, tensor, place)
            case Elsewhere(prefix):
                return name.removeprefix(prefix)
            case Destination(twin=True) as destination if destination in self._filled_by:
                first = f"{self._filled_by[destination]}, to which it is tied"
                self._compare(destination, tensor, place, first)
                self.ignored.append((name, f"equal to {first}"))
            case Destination(parameter, part):
                if tensor.dtype not in DTYPES.values():
                    raise WeightError(f"{place} is stored as {tensor.dtype}; {QUANTISED}")
                parts = [Destination(parameter, one) for one in part.split("+")]
                for destination in parts:
                    self._claim(destination, name, place)
                for destination, piece in zip(parts, self._pieces(parts, tensor, place), strict=True):
                    if parameter in self.held:
                        self._compare(destination, piece, place, f"the loaded {parameter}")
                    else:
                        self._fill_staged(destination, piece, place)
        return None

    def _fill_staged(self, destination: Destination, tensor: torch.Tensor, place: str) -> None:
        path = self._paths.get(destination.parameter)
        if path is None:
            self._fill(destination, tensor, place)
            return
        part, stage = self.module.get_submodule(path), self._stages[path]
        if path not in self._begun:
            self._begun.add(path)
            stage.begin(part)
        self._fill(destination, tensor, place)
        self._left[path] -= 1
        if not self._left[path]:
            # nothing of it is filled again, and what it replaces is to leave memory
            self._owners = {name: owner for name, owner in self._owners.items() if self._paths.get(name) != path}
            stage.end(part)

    def _compare(self, destination: Destination, tensor: torch.Tensor, place: str, first: str) -> None:
        """A second copy of the weights: loaded over the first, it changes nothing."""
        owner, leaf = self._owners[destination.parameter]
        parameter = owner.get_parameter(leaf)
        before = parameter.detach().clone()
        self._fill(destination, tensor, place)
        if not parameter.is_meta and not torch.equal(before, parameter):
            parameter.data.copy_(before)
            raise OtherWeights(f"{place} differs from {first}")

    def _pieces(self, parts: list[Destination], tensor: torch.Tensor, place: str) -> tuple[torch.Tensor, ...]:
        """A tensor that holds several parts, cut along its first dimension; a stack of matrices is one below the
        other."""
        if len(parts) == 1:
            return (tensor,)
        tensor = tensor.flatten(0, 1) if tensor.ndim == 3 else tensor
        owner, _ = self._owners[parts[0].parameter]
        assert isinstance(owner, ShardedModule)
        sizes = [owner.part_size(destination.part) for destination in parts]
        rows = tensor.shape[0] if tensor.ndim else 0
        if rows != sum(sizes):
            raise WeightError(f"{place} has {rows} rows, the model needs {'+'.join(map(str, sizes))}")
        return tensor.split(sizes)

    def _claim(self, destination: Destination, name: str, place: str) -> None:
        if destination in self._filled_by:
            raise WeightError(f"{place} comes twice: {self._filled_by[destination]} already filled its parameter")
        if destination not in self._waiting:
            raise WeightError(
                f"{place} has no parameter to fill ({destination.parameter}); the configuration describes a model "
                "with fewer layers or without it"
            )
        del self._waiting[destination]
        self._filled_by[destination] = name

    def _fill(self, destination: Destination, tensor: torch.Tensor, place: str) -> None:
        owner, leaf = self._owners[destination.parameter]
        try:
            if isinstance(owner, ShardedModule):
                owner.load_part(leaf, destination.part, tensor)
            else:
                parameter = owner.get_parameter(leaf)
                copy_checked(parameter, tensor)
        except ValueError as error:
            raise WeightError(f"{place} {error}") from error


def owner_of(module: nn.Module, parameter: str) -> tuple[nn.Module, str]:
    """The submodule that holds a parameter, and the parameter's name there."""
    path, _, leaf = parameter.rpartition(".")
    return module.get_submodule(path), leaf


def _check_constant(entry: Ignore, tensor: torch.Tensor, place: str) -> None:
    """Names in the log a buffer that does not hold what the model computes in its place."""
    if entry.constant is None or tensor.is_meta:
        return
    expected, stored = entry.constant(tensor.numel()), tensor.detach().cpu().flatten()
    limits = torch.finfo(stored.dtype) if stored.is_floating_point() else None
    rtol, atol = (4 * limits.eps, limits.tiny) if limits else (0.0, 0.0)
    if not torch.allclose(stored.double(), expected.double(), rtol, atol):
        logger.warning("%s is not used (%s) and holds other values", place, entry.reason)


def rehearse(module: nn.Module, plan: WeightPlan, tensors: Iterable[StoredTensor]) -> None:
    """Compares names and shapes of a `module` built on the meta device with the headers. WeightError as StrictLoad."""
    with StrictLoad(plan, module) as load:
        for tensor in tensors:
            entry = plan.find(tensor.name)
            if tensor.dtype is None and (entry is None or isinstance(entry, Destination)):
                unknown = "" if entry else "and not known to this model; "
                raise WeightError(
                    f"{tensor.file}: tensor {tensor.key} is stored as {tensor.stored_as}; {unknown}{QUANTISED}"
                )
            load.take(tensor.name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), tensor.file)


def allocate(module: nn.Module, device: torch.device, dtype: torch.dtype, later: Collection[nn.Module] = ()) -> None:
    """Gives the parameters of `module` that are on the meta device memory, not yet filled and without gradients; those
    of the parts in `later` stay there.

    Buffers move to `device` and keep their dtype. ConfigError when there is not so much memory.
    """
    left_out = {id(parameter) for part in later for parameter in part.parameters()}
    wanted = [one for one in module.parameters() if one.is_meta and id(one) not in left_out]
    size = sum(parameter.numel() for parameter in wanted) * dtype.itemsize
    message = f"the weights take {size / 1e9:.1f} GB as {dtype}, more than {device} gives; use a smaller dtype or model"
    with short_of_memory(size, device, ConfigError(message)):
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if not parameter.is_meta or id(parameter) in left_out:
                    continue
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                setattr(owner, name, nn.Parameter(empty, requires_grad=False))
            for name, buffer in owner.named_buffers(recurse=False):
                setattr(owner, name, buffer.to(device))


def fill(
    module: nn.Module,
    plan: WeightPlan,
    tensors: Iterable[StoredTensor],
    held: Collection[str] = (),
    stages: Mapping[str, Stage] = NO_STAGES,
) -> tuple[tuple[str, str], ...]:
    """Reads and loads the tensors, one in memory at a time. Returns (name, reason) of the ignored ones.

    held, stages: as of `StrictLoad`.
    """
    # on a terminal, for loads that one waits for
    shown = tqdm(list(tensors), desc="weights", unit="tensor", delay=1, leave=False, disable=None)
    with StrictLoad(plan, module, held, stages) as load:
        for file, batch in _batches(shown):
            with open_weights(file) as handle:
                for tensor in batch:
                    entry = plan.find(tensor.name)
                    if isinstance(entry, Destination) or (isinstance(entry, Ignore) and entry.constant):
                        load.take(tensor.name, tensor.read(handle), file)
                    else:  # its values do not matter
                        load.take(tensor.name, torch.empty(tensor.shape, device="meta"), file)
    return tuple(load.ignored)


def _batches(tensors: Iterable[StoredTensor]) -> Iterator[tuple[Path, list[StoredTensor]]]:
    """Neighbours of one file, of about READ_BYTES: what is read of a file stays in memory until it is closed."""
    for file, group in groupby(tensors, key=lambda tensor: tensor.file):
        batch, size = [], 0
        for tensor in group:
            batch.append(tensor)
            size += math.prod(tensor.shape) * (tensor.dtype or torch.int64).itemsize
            if size >= READ_BYTES:
                yield file, batch
                batch, size = [], 0
        if batch:
            yield file, batch
