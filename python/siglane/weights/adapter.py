"""adapter_config.json of a LoRA adapter as PEFT writes it: which modules it changes, how much, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from siglane.config.reader import ConfigReader, read_json
from siglane.errors import ConfigError

T = TypeVar("T", int, float)

ALL_LINEAR = "all-linear"
# initialisations that leave the base as it is; every other one trains beside changed weights (PEFT `LoraLayer`)
INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

MEANT = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "init_lora_weights", "trainable_token_indices", "ensure_weight_tying",
}  # fmt: skip
# they say how it was trained, or what the file's tensors say by themselves; fan_in_fan_out: of layers stored transposed
# (GPT-2's), of which there are none here, so that PEFT switches it off with a warning
OF_NO_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "runtime_config", "fan_in_fan_out", "bias", "lora_bias", "modules_to_save", "megatron_core",
    "qalora_group_size", "eva_config", "velora_config",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """What of adapter_config.json changes numbers. targets: a regex, suffixes, or None for every module; tokens: ids
    whose embeddings were trained, by the name of their table ("" for the only one); keeps_ties: a head that is tied
    to a target has an adapter of its own.
    """

    file: Path
    rank: int
    alpha: float
    rank_stabilised: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: str | tuple[str, ...] | None
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]
    keeps_ties: bool

    @classmethod
    def read(cls, file: Path) -> LoraConfig:
        """ConfigError names what siglane cannot merge."""
        reader = ConfigReader(read_json(file), str(file))
        _refuse_others(reader)
        raw, tokens = reader.raw, reader.raw.get("trainable_token_indices") or {}
        targets, layers = raw.get("target_modules"), raw.get("layers_to_transform")
        everything = isinstance(targets, str) and targets.lower() == ALL_LINEAR
        try:
            return cls(
                file=file,
                rank=reader.size("r", 8),
                alpha=reader.value("lora_alpha", float, 8.0),
                rank_stabilised=reader.value("use_rslora", bool, False),
                ranks={_regex(key): _positive(one, int) for key, one in (raw.get("rank_pattern") or {}).items()},
                alphas={_regex(key): _positive(one, float) for key, one in (raw.get("alpha_pattern") or {}).items()},
                targets=None if everything or targets is None else _names(targets),
                excluded=_names(raw.get("exclude_modules") or ()),
                layers=(layers,) if isinstance(layers, int) else _ids(layers or ()),
                layers_pattern=_listed(raw.get("layers_pattern") or ()),
                tokens={"": _ids(tokens)}
                if isinstance(tokens, list)
                else {key: _ids(one) for key, one in tokens.items()},
                keeps_ties=reader.value("ensure_weight_tying", bool, False),
            )
        except (TypeError, AttributeError, OverflowError, re.error) as error:
            raise ConfigError(f"{file} is not as PEFT writes it: {error}") from error

    def rank_of(self, module: str) -> int:
        return _by_pattern(self.ranks, module, self.rank)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The trained ids of an embedding table."""
        return next((ids for name, ids in self.tokens.items() if not name or _matches((name,), module)), ())

    def scale(self, module: str) -> float:
        """The factor of B A (arXiv:2106.09685, and arXiv:2312.03732 where ranks are stabilised)."""
        rank = self.rank_of(module)
        return _by_pattern(self.alphas, module, self.alpha) / (rank**0.5 if self.rank_stabilised else rank)

    def adapts(self, module: str) -> bool:
        """Whether PEFT puts an adapter on `module` (peft 0.21 `check_target_module_exists`)."""
        if self.excluded and _matches(self.excluded, module):
            return False
        if self.targets is None:
            return True
        if isinstance(self.targets, str) or not self.layers or module in self.targets:
            return _matches(self.targets, module)
        patterns = self.layers_pattern or (r"[^.]*",)
        found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns]
        return _matches(self.targets, module) and any(int(one[1]) in self.layers for one in found if one)


def _refuse_others(reader: ConfigReader) -> None:
    kind = reader.value("peft_type", str, "LORA")
    if kind.upper() != "LORA":
        raise ConfigError(f"{reader.name}: peft_type {kind!r} cannot be merged into weights; siglane merges LORA")
    if reader.raw.get("init_lora_weights") not in INITIALISATIONS:
        raise ConfigError(
            f"{reader.name}: init_lora_weights {reader.raw['init_lora_weights']!r} changed the base weights before the "
            "training; save the adapter with path_initial_model_for_weight_conversion, or the merged model"
        )
    for key, value in reader.raw.items():
        if key not in MEANT | OF_NO_EFFECT and value:
            raise ConfigError(f"{reader.name}: {key} {value!r} cannot be merged; siglane merges plain LoRA")


def _names(stated: Any) -> str | tuple[str, ...]:
    return _regex(stated) if isinstance(stated, str) else tuple(map(str, stated))


def _listed(stated: Any) -> tuple[str, ...]:
    return (_regex(stated),) if isinstance(stated, str) else tuple(map(_regex, stated))


def _positive(stated: Any, kind: type[T]) -> T:
    """TypeError for what is no such number."""
    if not isinstance(stated, int | kind) or isinstance(stated, bool) or not 0 < stated < math.inf:
        raise TypeError(f"{stated!r} must be a positive {kind.__name__}")
    return kind(stated)


def _ids(stated: Any) -> tuple[int, ...]:
    """TypeError for what are no whole numbers."""
    if not all(type(one) is int for one in stated):
        raise TypeError(f"{stated!r} must be whole numbers")
    return tuple(stated)


def _regex(pattern: str) -> str:
    """`pattern`. re.error when it is none."""
    re.compile(pattern)
    return pattern


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    """A text is a regex of the whole name, a list has whole names or their ends."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """Of the first pattern that the end of the module's name matches (peft `get_pattern_key`)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
