"""Ranks of tests: processes that talk through gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.multiprocessing.spawn import ProcessContext, start_processes

from siglane.engine.process.children import child_context


def start_ranks(rank: Callable[..., None], arguments: tuple[Any, ...], ranks: int, join: bool = True) -> ProcessContext:
    """`rank(number, *arguments)` in processes forked from the one that engines are forked from. There is one of those
    per run of tests, and it imports what whoever comes first asks for: with less, each engine would import the rest."""
    method = child_context().get_start_method()
    running: ProcessContext = start_processes(rank, arguments, ranks, join=join, start_method=method)
    return running
