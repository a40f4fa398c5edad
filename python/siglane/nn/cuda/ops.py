"""The Triton kernels as operators of torch, which knows their results by shape: a step runs on fake tensors, too.

Triton is imported by the first call. A fake knows no memory, so it says itself that all tensors are on one device.
Where operands are many, the schema alone names them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import library

LIBRARY = library.Library("siglane", "DEF")
OPS = torch.ops.siglane


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Defines `siglane::schema` with the decorated function for CUDA."""
    name = schema.split("(")[0]

    def define(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def on_device(first: torch.Tensor, *args: Any) -> Any:
            with torch.cuda.device(first.device):  # Triton launches on the current one
                return function(first, *args)

        @wraps(function)
        def checked(*args: Any) -> Any:
            devices = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
            if len(devices) > 1:
                raise RuntimeError(f"{name} takes tensors of one device, these are on {sorted(map(str, devices))}")
            return fake(*args)

        LIBRARY.define(schema)
        LIBRARY.impl(name, on_device, "CUDA")
        library.register_fake(f"siglane::{name}", checked, lib=LIBRARY)
        return function

    return define


def _like_first(first: torch.Tensor, *others: object) -> torch.Tensor:
    return first.new_empty(first.shape)


@_operator("rms_norm(Tensor x, Tensor weight, float eps, bool in_float32) -> Tensor", _like_first)
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, in_float32: bool) -> torch.Tensor:
    from siglane.nn.cuda.pointwise import rms_norm

    return rms_norm(x, weight, eps, in_float32)


@_operator("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor", _like_first)
def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    from siglane.nn.cuda.pointwise import rotate

    return rotate(x, cos, sin)


@_operator(
    "rotate_normed(Tensor x, Tensor cos, Tensor sin, Tensor q_norm, Tensor k_norm, int heads, float eps) -> Tensor",
    _like_first,
)
def _rotate_normed(*operands: Any) -> torch.Tensor:
    from siglane.nn.cuda.pointwise import rotate

    return rotate(*operands)


@_operator("swiglu(Tensor gate_up) -> Tensor", lambda x: x.new_empty((*x.shape[:-1], x.shape[-1] // 2)))
def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    from siglane.nn.cuda.pointwise import swiglu

    return swiglu(gate_up)


@_operator("store(Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor slots) -> ()", lambda *args: None)
def _store(k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    from siglane.nn.cuda.pointwise import store

    store(k, v, keys, values, slots)


@_operator(
    "paged_decode(Tensor q, Tensor keys, Tensor values, Tensor table, Tensor rows, Tensor lengths, int page_size, "
    "float scale) -> Tensor",
    _like_first,
)
def _paged_decode(*operands: Any) -> torch.Tensor:
    from siglane.nn.cuda.paged_decode import paged_decode

    return paged_decode(*operands)


def _of_rows(scores: torch.Tensor, *others: object) -> torch.Tensor:
    return scores.new_empty(scores.shape[0], dtype=torch.int64)


@_operator(
    "best_token(Tensor scores, Tensor peaks, Tensor temperatures, Tensor keys) -> Tensor",
    _of_rows,
)
def _best_token(*operands: Any) -> torch.Tensor:
    from siglane.nn.cuda.best_token import best_token

    return best_token(*operands)


@_operator("mask_scores(Tensor(a!) scores, Tensor masks, Tensor rows) -> ()", lambda *args: None)
def _mask_scores(scores: torch.Tensor, masks: torch.Tensor, rows: torch.Tensor) -> None:
    from siglane.nn.cuda.mask import mask_scores

    mask_scores(scores, masks, rows)


def _routed(logits: torch.Tensor, top: int, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
    shape = logits.shape[0], top
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


@_operator("route(Tensor logits, int top, bool normalised) -> (Tensor, Tensor)", _routed)
def _route(logits: torch.Tensor, top: int, normalised: bool) -> tuple[torch.Tensor, torch.Tensor]:
    from siglane.nn.cuda.experts import route

    return route(logits, top, normalised)


def _of_pairs(
    x: torch.Tensor, weight: torch.Tensor, chosen: torch.Tensor, experts: int, scales: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(chosen.numel(), weight.shape[0] // experts)


@_operator(
    "expert_products(Tensor x, Tensor weight, Tensor chosen, int experts, Tensor? scales) -> Tensor",
    _of_pairs,
)
def _expert_products(*operands: Any) -> torch.Tensor:
    from siglane.nn.cuda.experts import expert_products

    return expert_products(*operands)


@_operator(
    "sorted_products(Tensor x, Tensor weight, Tensor chosen, int experts, Tensor? scales) -> Tensor",
    _of_pairs,
)
def _sorted_products(*operands: Any) -> torch.Tensor:
    from siglane.nn.cuda.experts import sorted_products

    return sorted_products(*operands)


def _product(x: torch.Tensor, weight: torch.Tensor, *others: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_operator("fixed_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _product)
def _fixed_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    from siglane.nn.cuda.fixed_product import fixed_product

    return fixed_product(x, weight, bias)


@_operator(
    "coded_product(Tensor x, Tensor codes, Tensor scales, Tensor? lows, Tensor? bias) -> Tensor",
    _product,
)
def _coded_product(*operands: Any) -> torch.Tensor:
    from siglane.nn.cuda.coded_product import coded_product

    return coded_product(*operands)


def _coded_rows(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.shape[0]
    return x.new_empty((rows, width), dtype=torch.float8_e4m3fn), x.new_empty((rows, 1), dtype=torch.float32)


@_operator("fp8_rows(Tensor x, int width) -> (Tensor, Tensor)", _coded_rows)
def _fp8_rows(x: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    from siglane.nn.cuda.fp8_rows import fp8_rows

    return fp8_rows(x, width)
