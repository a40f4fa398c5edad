"""Which device and dtype "auto" stands for on this machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from siglane.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

MEMINFO = Path("/proc/meminfo")  # macOS tells no program how much is free
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device called `name`: auto, cpu, cuda or cuda:N. ConfigError when it is not known or not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {name!r} was asked for, but torch finds no CUDA here; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ConfigError(f"device {name!r} was asked for, torch finds {found} from cuda:0 on; use one of them")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; auto: bfloat16 on CUDA, float32 elsewhere. ConfigError when it is not known."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype {name!r} is not known; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def free_memory(device: torch.device) -> int | None:
    """Bytes that `device` can still give; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if not MEMINFO.exists():
        return None
    lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree")) * 1024


def host_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Of the host, pinned where `device` then copies from it by itself; pageable, with a warning, where none can be."""
    if device.type == "cuda":
        try:
            return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=True)
        except RuntimeError as error:
            logger.warning("no pinned memory (%s): copies to %s wait", error, device)
    return torch.empty(shape, dtype=dtype, device="cpu")


@contextmanager
def short_of_memory(needed: int, device: torch.device, shortage: UserError) -> Iterator[None]:
    """Around an allocation of `needed` bytes: raises `shortage` when they are not there, instead of the allocator's
    message or of an end by the system."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise shortage
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch's allocators raise lines about themselves
        raise shortage from error
