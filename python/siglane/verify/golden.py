"""Stored golden values: what a reference gave for some pictures, for machines and checkpoints without it.

A safetensors file. `image.0/features` is stage "features" of the request with picture 0 alone, `together/...` of the
request with all of them; `picture.0` holds the bytes of picture 0's file. The metadata name the format, the family,
the prompt, the reference and the pictures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from siglane.errors import UserError
from siglane.verify.pictures import picture_of
from siglane.verify.stages import ORDER, Picture, Trace

FORMAT = "siglane.verify/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """traces: by case. prompt is None for a model without a language model."""

    family: str
    reference: str
    prompt: str | None
    pictures: tuple[Picture, ...]
    traces: dict[str, Trace]

    @property
    def steps(self) -> int:
        """Greedy tokens of each answer."""
        return max((len(trace["tokens"]) for trace in self.traces.values() if "tokens" in trace), default=0)


def save_golden(golden: Golden, path: Path) -> None:
    """UserError when `path` cannot be written."""
    tensors = {
        f"{case}/{stage}": tensor.contiguous().clone()
        for case, trace in golden.traces.items()
        for stage, tensor in trace.items()
    }
    for number, picture in enumerate(golden.pictures):
        tensors[f"picture.{number}"] = torch.frombuffer(bytearray(picture.data), dtype=torch.uint8)
    metadata = {
        "format": FORMAT,
        "family": golden.family,
        "reference": golden.reference,
        "prompt": json.dumps(golden.prompt),
        "pictures": json.dumps([picture.name for picture in golden.pictures]),
    }
    try:
        save_file(tensors, path, metadata)
    except Exception as error:  # SafetensorError wraps the system's message
        raise UserError(f"cannot write {path}: {error}", code="cannot_write") from error


def load_golden(path: Path) -> Golden:
    """UserError when the file is not one that `save_golden` wrote."""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise _unusable(path, str(error)) from error
    if metadata.get("format") != FORMAT:
        raise _unusable(path, f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
    try:
        names = json.loads(metadata["pictures"])
        pictures = tuple(
            picture_of(name, tensors.pop(f"picture.{number}").numpy().tobytes()) for number, name in enumerate(names)
        )
        traces: dict[str, Trace] = {}
        for name, tensor in tensors.items():
            case, _, stage = name.partition("/")
            if stage.rstrip("0123456789").rstrip(".") not in ORDER:
                raise KeyError(name)
            traces.setdefault(case, {})[stage] = tensor
        return Golden(
            family=metadata["family"],
            reference=metadata["reference"],
            prompt=json.loads(metadata["prompt"]),
            pictures=pictures,
            traces=traces,
        )
    except (KeyError, ValueError) as error:
        raise _unusable(path, f"it lacks or does not explain {error}") from error


def _unusable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} holds no golden values: {reason}; write one with `siglane verify MODEL --save-golden FILE`",
        code="bad_reference",
        param="reference",
    )
