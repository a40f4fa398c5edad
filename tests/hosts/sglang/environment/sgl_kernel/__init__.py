"""Stands in for SGLang's compiled kernels, which are not published for a machine without a GPU.

SGLang imports names from here and from modules below; with attention_backend="torch_native" and
sampling_backend="pytorch" it calls none of them, and this says so if it does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn


class Missing:
    """A compiled kernel, or a table of them, under its full name. Calling it raises NotImplementedError."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> Missing:
        return named(self.__name__, name)

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"{self.__name__} is a compiled kernel; this environment runs SGLang without them")


def named(owner: str, name: str) -> Missing:
    if name.startswith("__"):
        raise AttributeError(f"{owner!r} has no attribute {name!r}")
    return Missing(f"{owner}.{name}")


class Kernels(MetaPathFinder, Loader):
    """Every module below this package exists and has every name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith(f"{__name__}.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = lambda name: named(module.__name__, name)


def __getattr__(name: str) -> Missing:
    return named(__name__, name)


sys.meta_path.append(Kernels())
