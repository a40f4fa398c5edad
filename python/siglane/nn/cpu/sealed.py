"""Layers whose weights have left the form in which a checkpoint, an optimiser or another device knows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import nn


class Sealed(nn.Module):
    """Refuses whatever would go on without the weights or with others: to be saved, loaded into, moved, cast, copied.

    What changes neither device nor dtype, such as `.float()` or `.cpu()`, does nothing.
    """

    sealed: ClassVar[str]  # what it is, in errors
    sealed_by: ClassVar[str]
    refusal: ClassVar[type[Exception]] = RuntimeError

    def refuse(self, what: str) -> NoReturn:
        raise self.refusal(self._reason(what))

    def _reason(self, what: str) -> str:
        return f"{self.sealed} cannot be {what}; load the model again and do so before {self.sealed_by}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        moved = fn(torch.empty(0))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            self.refuse("moved or cast")
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.refuse("saved")

    def _load_from_state_dict(self, *args: Any) -> None:
        messages, reason = args[-1], self._reason("loaded into")  # one RuntimeError tells them all
        if reason not in messages:
            messages.append(reason)

    def __getstate__(self) -> NoReturn:
        self.refuse("copied or pickled")
