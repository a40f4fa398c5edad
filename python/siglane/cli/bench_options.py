"""What `siglane bench` asks a server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from siglane.cli.common import check_base_url
from siglane.errors import ConfigError
from siglane.settings.options import CommandOptions, above_zero, at_least, described, option

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions(CommandOptions):
    COMMAND = "bench"

    base_url: str = field(metadata=described("an OpenAI-compatible server, with or without /v1"))
    api_key: str | None = option(None, "its key; other users of this machine can read it from a flag", repr=False)
    requests: int = option(64, "how many are measured", short="-n")
    warmup: int = option(2, "how many are asked before, and not measured")
    concurrency: int = option(8, "requests at one time", short="-c")
    request_rate: float = option(0.0, "requests a second, at random times (Poisson); 0: as soon as a place is free")
    words: int = option(64, "random words of each prompt")
    max_tokens: int = option(64, "tokens of each answer, where the server knows ignore_eos")
    images: int = option(1, "pictures of each request, each another one")
    sizes: tuple[str, ...] = option(("640x480",), "of the pictures, in turn")
    format: Literal["jpeg", "png", "webp"] = option("jpeg", "of the pictures")
    seed: int = option(0, "of prompts, pictures and times: equal seeds ask the same")
    answer_timeout: float = option(600.0, "seconds of silence after which an answer is lost")
    output: Path | None = option(None, "JSON file with every request's times", short="-o")
    plot: Path | None = option(None, "PNG file of the times; needs matplotlib")
    json: bool = option(False, "print the summary as one JSON object")

    def __post_init__(self) -> None:
        check_base_url(self.base_url)
        for name in ("requests", "concurrency", "words", "max_tokens"):
            at_least(name, getattr(self, name), 1)
        for name in ("warmup", "images", "request_rate"):
            at_least(name, getattr(self, name), 0)
        above_zero("answer_timeout", self.answer_timeout)
        _ = self.pixels

    @property
    def pixels(self) -> tuple[tuple[int, int], ...]:
        """Width and height of the pictures. SiglaneError for what is no size."""
        found = [SIZE.fullmatch(text) for text in self.sizes]
        if not found or not all(found):
            raise ConfigError(f"sizes must be like 640x480, got {' '.join(self.sizes) or 'none'}")
        return tuple((int(one[1]), int(one[2])) for one in found if one)
