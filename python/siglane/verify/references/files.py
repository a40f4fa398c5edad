"""A checkpoint's files as the references read them: JSON as it stands, tensors by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from siglane.errors import ConfigError, WeightError

Raw = dict[str, Any]


def read_json(path: Path) -> Raw:
    """The object in `path`; {} when there is no such file. ConfigError when it is not JSON."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return found


@dataclass(frozen=True, slots=True)
class Tensors:
    """Tensors by name, each read when it is asked for. Reading one holds no other in memory."""

    readers: Mapping[str, Callable[[], torch.Tensor]]

    @classmethod
    def of(cls, folder: Path) -> Tensors:
        """All safetensors files of `folder`. WeightError when there are none, or one cannot be opened."""
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with _opened(file) as handle:
                readers.update({name: partial(_read, file, name) for name in handle.keys()})  # noqa: SIM118 (no dict)
        if not readers:
            raise WeightError(f"{folder} holds no *.safetensors file for the reference to load")
        return cls(readers)

    def under(self, *prefixes: str) -> Tensors:
        """Those under the first of `prefixes` that any name begins with, called without it. WeightError when none."""
        for prefix in prefixes:
            found = {name.removeprefix(prefix): read for name, read in self.readers.items() if name.startswith(prefix)}
            if found:
                return Tensors(found)
        raise WeightError(f"the reference finds no tensor called {' or '.join(prefixes)}...")

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The same under other names: new name -> name here. WeightError when one is missing."""
        return Tensors({new: self.reader(name) for new, name in names.items()})

    def reader(self, name: str) -> Callable[[], torch.Tensor]:
        """WeightError when there is no such tensor."""
        if name not in self.readers:
            raise WeightError(f"the reference finds no tensor {name}")
        return self.readers[name]

    def __contains__(self, name: str) -> bool:
        return name in self.readers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.reader(name)()


def _read(file: Path, name: str) -> torch.Tensor:
    with _opened(file) as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
        return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{file} is not a usable safetensors file: {error}") from error


def ready(module: nn.Module, tensors: Tensors, device: torch.device, dtype: torch.dtype) -> None:
    """`module` in `dtype` on `device`, for evaluation, every parameter filled from the tensor of its name.

    Buffers keep their dtype, as transformers loads them. WeightError when a tensor is missing or of another shape;
    tensors that are left over belong to other modules.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(dtype)
            tensor = tensors[name]
            if tensor.shape != parameter.shape:
                raise WeightError(
                    f"tensor {name} has shape {list(tensor.shape)}, the reference needs {list(parameter.shape)}"
                )
            parameter.copy_(tensor)
    module.to(device).eval().requires_grad_(False)
