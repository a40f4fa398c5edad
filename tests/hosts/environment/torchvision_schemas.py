"""Lets a torchvision built for CUDA be imported beside the CPU build of torch.

Its compiled part does not load there, and the import fails at a fake kernel for "torchvision::nms". Declaring the two
operators before is enough: no test calls either. A .pth file imports this at interpreter start, so it imports torch
only once torchvision is wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[Any] = []  # a Library of torch takes its operators along when it is collected


def declare_operators(binary: Path) -> None:
    """Defines nms and qnms unless `binary`, torchvision's compiled part, does."""
    import torch
    from torch import library

    try:
        torch.ops.load_library(str(binary))
    except OSError:
        fragment = library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            fragment.define(operator + SCHEMA)
        _kept.append(fragment)


class DeclareFirst:
    """A path finder that finds torchvision where it is, and declares its operators before."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None and not _kept:  # looked for more often than imported
            declare_operators(Path(spec.origin).with_name("_C.so"))
        return spec


sys.meta_path.insert(0, DeclareFirst)
