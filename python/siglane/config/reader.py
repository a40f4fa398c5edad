"""Reading model configurations strictly: a key has the right type, or its documented default, or it is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from siglane.errors import ConfigError

T = TypeVar("T", int, float, bool, str)
Choice = TypeVar("Choice")

RawConfig = Mapping[str, Any]
LFS_POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in a file's place
LARGEST_SIZE = 1 << 24  # no width, depth or vocabulary of a real model is larger; beyond it the file is corrupt


class ConfigReader:
    """One JSON object with a name for messages.

    `size` reads positive integers, `value` anything else. A key that is absent or null takes `default`; without a
    default its absence is a ConfigError, and so is a value of another type.
    """

    def __init__(self, raw: RawConfig, name: str) -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{name} must be an object, got {type(raw).__name__}")
        self.raw = raw
        self.name = name

    def value(self, key: str, kind: type[T], default: T | None = None) -> T:
        found = self.raw.get(key)
        if found is None:
            if default is None:
                raise ConfigError(f"{self.name}: key {key!r} is missing")
            return default
        if kind is float and isinstance(found, int) and not isinstance(found, bool):
            found = float(found) if found.bit_length() < 1024 else math.inf  # beyond it float() overflows
        if not isinstance(found, kind) or (kind is not bool and isinstance(found, bool)):
            raise ConfigError(f"{self.name}: {key} must be {kind.__name__}, got {found!r}")
        if isinstance(found, float) and not math.isfinite(found):
            raise ConfigError(f"{self.name}: {key} must be finite, got {found!r}")
        return found

    def size(self, key: str, default: int | None = None) -> int:
        found = self.value(key, int, default)
        if not 0 < found <= LARGEST_SIZE:
            raise ConfigError(f"{self.name}: {key} must be between 1 and {LARGEST_SIZE}, got {found}")
        return found

    def choice(self, key: str, allowed: Mapping[str, Choice], default: str | None = None) -> Choice:
        found = self.value(key, str, default)
        if found not in allowed:
            raise ConfigError(f"{self.name}: {key} {found!r} is not known; siglane knows {', '.join(sorted(allowed))}")
        return allowed[found]

    def only(self, key: str, known: T) -> None:
        """ConfigError where it states anything but `known`, which its absence means too."""
        if (found := self.value(key, type(known), known)) != known:
            raise ConfigError(f"{self.name}: {key} {found!r} is not known; siglane knows {known}")

    def agree(self, key: str, fact: int, whose: str, default: int | None = None) -> None:
        """ConfigError where it states another size than `fact`. whose: the fact is, for the message; default: what its
        absence means, None for the fact itself."""
        if (found := self.size(key, default or fact)) != fact:
            raise ConfigError(f"{self.name}: {key} {found} is not {whose} {fact}")

    def has(self, key: str) -> bool:
        return self.raw.get(key) is not None

    def section(self, key: str, default: RawConfig | None = None) -> ConfigReader:
        if self.has(key):
            return ConfigReader(self.raw[key], f"{self.name}.{key}")
        if default is None:
            raise ConfigError(f"{self.name}: section {key!r} is missing")
        return ConfigReader(default, self.name)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. ConfigError when it is unreadable, not JSON or not an object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def refuse_pointer(path: Path) -> None:
    """ConfigError where a pointer of Git LFS stands in the place of a file, which cannot be read because of it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError:  # which is why, then
        return
    if start == LFS_POINTER:
        raise ConfigError(f"{path} is a Git LFS pointer, not the file; run `git lfs pull` or download it again")
