"""The tagger's settings: a TOML section, overridden by environment variables, overridden by flags."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from siglane.errors import ConfigError, UserError
from siglane.settings.engine import DTYPE_HELP, QUANTIZATION_HELP, Dtype, Quantization
from siglane.settings.options import at_least, one_of, option, options_of, resolve
from siglane.settings.tables import read_table

logger = logging.getLogger(__name__)

Attention = Literal["auto", "sdpa", "flash_attention_2", "eager"]

SECTION = ("plugins", "siglip")
TEMPLATES = ("This is a photo of {label}.",)  # what SigLIP's zero-shot scores are made with (formats.md 1.6)
UNUSUAL_THRESHOLD = 0.5
CONFIDENCE_THRESHOLD = 0.01
MAX_TAGS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class TagSettings:
    """`[plugins.siglip]` of a TOML file. ConfigError names a field that cannot be."""

    enabled: bool = option(True, "off: tagging is refused")
    model: str | None = option(None, "a checkpoint folder or a hub id")
    batch_size: int = option(0, "pictures of one forward; 0: 8 on CPU, 32 on CUDA")
    attention: Attention = option("auto", "attention of both towers; auto: what is fastest")
    dtype: Dtype = option("auto", DTYPE_HELP)
    quantization: Quantization = option("none", QUANTIZATION_HELP)
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    confidence_threshold: float = option(CONFIDENCE_THRESHOLD, "tags below it are left out; sigmoid scores are low")
    max_tags: int = option(MAX_TAGS, "tags of one picture")
    # without it what the checkpoint says
    max_num_patches: int | None = option(None, "patches of a picture, for NaFlex models")

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise ConfigError(f"batch_size must not be negative, got {self.batch_size}")
        for one in options_of(type(self)):
            if one.choices:
                one_of(one.name, getattr(self, one.name), one.choices)
        if self.max_num_patches is not None:
            at_least("max_num_patches", self.max_num_patches, 1)
        check_limits(self.confidence_threshold, self.max_tags, threshold_name="confidence_threshold")

    def required_model(self) -> str:
        """UserError where there is none, or tagging is switched off."""
        if not self.enabled:
            raise UserError("tagging is switched off; set enabled to true", code="tagging_disabled", param="enabled")
        if self.model is None:
            raise UserError("no model is given; name one, or set model", code="bad_settings", param="model")
        return self.model


def check_limits(threshold: float, max_tags: int, *, threshold_name: str = "threshold") -> None:
    """ConfigError for a threshold that is no probability or a number of tags below 1; warns of an unusual threshold."""
    if not 0 <= threshold <= 1:
        raise ConfigError(f"{threshold_name} must be between 0 and 1, got {threshold}")
    at_least("max_tags", max_tags, 1)
    if threshold >= UNUSUAL_THRESHOLD:
        logger.warning(
            "%s %s leaves out almost everything: sigmoid scores are low, a clear match may have 0.1; usual is %s",
            threshold_name, threshold, CONFIDENCE_THRESHOLD,
        )  # fmt: skip


def read_settings(
    file: Path | None = None, flags: Mapping[str, Any] | None = None, table: Mapping[str, Any] | None = None
) -> TagSettings:
    """`flags`, then the environment, then `table`, then the file's section, then the defaults.

    UserError names the file's key, the variable or the flag at fault.
    """
    stated = (_read_file(file) if file is not None else {}) | dict(table or {})
    return resolve(TagSettings, flags or {}, stated)


def _read_file(file: Path) -> dict[str, Any]:
    stated = read_table(file, SECTION, options_of(TagSettings))
    try:
        TagSettings(**stated)
    except ConfigError as error:
        raise ConfigError(f"{file}.{'.'.join(SECTION)}: {error.message}") from error
    return stated
