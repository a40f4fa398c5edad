"""Reading intermediates of a running module through forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Rows = Callable[[torch.Tensor], torch.Tensor]


def rows_of(output: torch.Tensor) -> torch.Tensor:
    """`[B, C, h, w]` or `[B, N, C]` -> `[rows, C]`, batch entry after batch entry, raster order inside."""
    if output.ndim == 4:
        output = output.flatten(2).transpose(1, 2)
    return output.flatten(0, -2)


@contextmanager
def tapping(modules: Mapping[str, nn.Module], rows: Rows = rows_of) -> Iterator[dict[str, torch.Tensor]]:
    """Fills the dict it yields with what each module gives in the block, on the CPU, as `rows` makes it."""
    taps: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found = output[0] if isinstance(output, tuple) else output
            taps[name] = rows(found).cpu()

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
