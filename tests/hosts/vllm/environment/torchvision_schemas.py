"""Makes torchvision importable beside the CPU build of torch, although its wheel is built for CUDA.

Its compiled part does not load there, and the import then fails at a fake kernel for `torchvision::nms`. Declaring
that operator and `qnms` is enough: pictures and frames are resized by torch's own. A .pth file imports this module
whenever the interpreter starts, so torch is imported only when torchvision is about to be.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class OperatorsFirst:
    """Waits for the first search for torchvision, declares its operators, and leaves the search to the others."""

    def __init__(self) -> None:
        self._library: Any = None

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            spec = PathFinder.find_spec(name, path, target)
            if spec is not None and spec.origin is not None:
                self._declare(Path(spec.origin).with_name("_C.so"))

    def _declare(self, compiled: Path) -> None:
        """compiled: declares them itself where it can be loaded."""
        import torch
        from torch import library

        try:
            torch.ops.load_library(str(compiled))
        except OSError:
            self._library = library.Library("torchvision", "DEF")
            for operator in OPERATORS:
                self._library.define(operator + SCHEMA)


_first = OperatorsFirst()  # kept: operators vanish with the library that declares them
sys.meta_path.insert(0, _first)
