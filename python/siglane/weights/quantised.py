"""Folders of codes that `siglane quantize` writes (formats.md section 10): what they state, and their one file.

The file is safetensors. It is written tensor by tensor, so that no second copy of a model ever exists, and read through
a mapping that is renewed from time to time, so that its pages do not stay in memory beside what was made of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from siglane.config.reader import ConfigReader
from siglane.errors import ConfigError, UserError, WeightError
from siglane.nn.cpu.int4 import GROUP_SIZES
from siglane.nn.quantise import Bits
from siglane.weights.files import SINGLE, open_weights
from siglane.weights.hub import ADAPTER_CONFIG, Checkpoint
from siglane.weights.load import DTYPES, READ_BYTES, headers

CONFIG, SECTION = "config.json", "quantization_config"
METHOD, VERSION = "siglane", 1
BITS: dict[int, Bits] = {8: "8bit", 4: "4bit"}
NAMES = {torch.int8: "I8", torch.uint8: "U8"} | {dtype: name for name, dtype in DTYPES.items()}
NARROW = (torch.bfloat16, torch.float16)
ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class CodesFormat:
    """What a folder of codes states about itself. group_size: inputs that share a scale where weights have 4 bits;
    rotated: whether it holds a decoder, in the turned basis of `lm/rotation.py`."""

    bits: Bits
    group_size: int
    rotated: bool

    @property
    def section(self) -> dict[str, Any]:
        """`quantization_config` of config.json."""
        number = next(number for number, bits in BITS.items() if bits == self.bits)
        grouped = {"group_size": self.group_size} if self.bits == "4bit" else {}
        return {"quant_method": METHOD, "format_version": VERSION, "bits": number, **grouped, "rotated": self.rotated}


def codes_format(checkpoint: Checkpoint) -> CodesFormat | None:
    """None for a folder of floats, or of another method. ConfigError for a version that is not known here."""
    section = checkpoint.optional(CONFIG).get(SECTION)
    if not isinstance(section, Mapping) or section.get("quant_method") != METHOD:
        return None
    reader = ConfigReader(section, f"{checkpoint.path(CONFIG)}: {SECTION}")
    if (version := reader.value("format_version", int)) != VERSION:
        raise ConfigError(
            f"{checkpoint.root} holds codes of format version {version}, this siglane reads {VERSION}; write the "
            "folder again with `siglane quantize`, from the original model"
        )
    bits = reader.value("bits", int)
    if bits not in BITS:
        raise ConfigError(f"{reader.name}: bits {bits} is not known; siglane knows {', '.join(map(str, BITS))}")
    group_size = reader.size("group_size") if BITS[bits] == "4bit" else 0
    if group_size not in (0, *GROUP_SIZES):
        raise ConfigError(f"{reader.name}: group_size {group_size} is not known; siglane knows {GROUP_SIZES}")
    return CodesFormat(BITS[bits], group_size, reader.value("rotated", bool))


def stated_method(checkpoint: Checkpoint) -> str | None:
    """The method by which a checkpoint's weights are quantised already, as any of its configurations states it."""
    configs = [checkpoint.optional(CONFIG), *(_object(path) for path in sorted(checkpoint.root.glob(f"*/{CONFIG}")))]
    for config in configs:
        for part in (config, *config.values()):
            section = part.get(SECTION) if isinstance(part, Mapping) else None
            if isinstance(section, Mapping):
                return str(section.get("quant_method", "an unnamed method"))
    return None


def _object(path: Path) -> Mapping[str, Any]:
    return Checkpoint(path.parent).json(path.name)


def refuse_codes(checkpoint: Checkpoint) -> None:
    """UserError where `checkpoint` is a folder of codes, for all who need floats."""
    found = codes_format(checkpoint)
    if found is not None:
        place = f"{checkpoint.root} holds {found.bits} codes"
        raise _refusal(f"{place}, which only serve, generate, batch, tag, embed and LLM read; give the original model")


def agreed_format(
    checkpoint: Checkpoint, found: CodesFormat, asked: Bits | None, device: torch.device, ranks: int = 1
) -> None:
    """UserError where what is `asked` for cannot be had of a folder of codes."""
    place = f"{checkpoint.root} holds {found.bits} codes"
    if asked not in (None, found.bits):
        raise _refusal(f"{place}; for {asked} give the original model, or leave out quantization", "quantization")
    if checkpoint.adapter is not None or checkpoint.has(ADAPTER_CONFIG):
        reason = "into which no adapter can be merged; give the original model, also to `siglane quantize`"
        raise _refusal(f"{place}, {reason}", "adapter")
    if device.type != "cpu":
        raise _refusal(f"{place}, which CPUs read, not {device}; give the original model", "device")
    if ranks > 1:
        raise _refusal(f"{place}, which are not cut over {ranks} ranks; give the original model")


def _refusal(message: str, param: str = "model") -> UserError:
    return UserError(message, code="unsupported_quantization", param=param)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """dtype: None for floats, of any stored dtype."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]

    def fits(self, dtype: torch.dtype | None, shape: tuple[int, ...]) -> bool:
        floats = self.dtype is None and dtype in DTYPES.values()
        return self.shape == shape and (floats or dtype == self.dtype)


class CodesFile:
    """The file of a folder of codes. WeightError where it cannot be read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.path = checkpoint.path(SINGLE)
        stored_as = {name: dtype for dtype, name in NAMES.items()}
        self.tensors = {one.name: (stored_as.get(one.stored_as), one.shape) for one in headers(self.path)}
        self._handle: Any = None
        self._mapped = 0

    def check(self, specs: Mapping[str, TensorSpec]) -> None:
        """WeightError unless it holds exactly these tensors."""
        if odd := sorted(specs.keys() ^ self.tensors.keys()):
            place = "is missing" if odd[0] in specs else "is not known to this model"
            raise WeightError(f"{self.path}: tensor {odd[0]} {place}; write the folder again with `siglane quantize`")
        for name, spec in specs.items():
            if not spec.fits(*self.tensors[name]):
                dtype, shape = self.tensors[name]
                found = f"{dtype}, {list(shape)}"
                raise WeightError(
                    f"{self.path}: tensor {name} is {found}, the model needs {spec.dtype or 'floats'}, "
                    f"{list(spec.shape)}; write the folder again with `siglane quantize`"
                )

    def read(self, name: str) -> torch.Tensor:
        """A view of the file, which stays mapped as long as the view is kept."""
        if self._handle is None or self._mapped > READ_BYTES:
            self._handle, self._mapped = open_weights(self.path), 0
        tensor: torch.Tensor = self._handle.get_tensor(name)
        self._mapped += tensor.nbytes
        return tensor


def narrowest(values: torch.Tensor) -> torch.Tensor:
    """The same numbers in the smallest dtype that holds them all exactly."""
    for dtype in NARROW:
        if torch.equal(values.to(dtype).to(values.dtype), values):
            return values.to(dtype)
    return values


def write_codes(path: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """A safetensors file of `specs`, whose `tensors` come in any order, each once. OSError where it cannot be written;
    ValueError for a tensor that is not as its spec says."""
    # wide ones first: a float has to lie at a multiple of its size, and the format knows no gaps
    order = sorted(specs, key=lambda name: -_width(specs[name]))
    offsets, end = dict[str, int](), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in order:
        spec, offsets[name] = specs[name], end
        end += math.prod(spec.shape) * _width(spec)
        header[name] = {"dtype": NAMES[_dtype(spec)], "shape": spec.shape, "data_offsets": [offsets[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("xb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        start = stream.tell()
        for name, tensor in tensors:
            if not specs[name].fits(tensor.dtype, tuple(tensor.shape)):
                raise ValueError(f"{name} is {tensor.dtype}, {list(tensor.shape)}, not {specs[name]}")
            stream.seek(start + offsets.pop(name))
            stream.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        if offsets:
            raise ValueError(f"{len(offsets)} tensors never came, {min(offsets)} among them")
        stream.flush()
        os.fsync(stream.fileno())


def _dtype(spec: TensorSpec) -> torch.dtype:
    if spec.dtype is None:
        raise ValueError("what is written has a dtype")
    return spec.dtype


def _width(spec: TensorSpec) -> int:
    return _dtype(spec).itemsize
