"""What `siglane bench` asks a server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from siglane.cli.common import check_base_url
from siglane.errors import ConfigError
from siglane.settings.options import CommandOptions, above_zero, at_least

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions(CommandOptions):
    COMMAND = "bench"

    base_url: str = field(metadata={"help": "an OpenAI-compatible server, with or without /v1"})
    api_key: str | None = field(
        default=None, repr=False, metadata={"help": "its key; other users of this machine can read it from a flag"}
    )
    requests: int = field(default=64, metadata={"help": "how many are measured", "short": "-n"})
    warmup: int = field(default=2, metadata={"help": "how many are asked before, and not measured"})
    concurrency: int = field(default=8, metadata={"help": "requests at one time", "short": "-c"})
    request_rate: float = field(
        default=0.0, metadata={"help": "requests a second, at random times (Poisson); 0: as soon as a place is free"}
    )
    words: int = field(default=64, metadata={"help": "random words of each prompt"})
    max_tokens: int = field(default=64, metadata={"help": "tokens of each answer, where the server knows ignore_eos"})
    images: int = field(default=1, metadata={"help": "pictures of each request, each another one"})
    sizes: tuple[str, ...] = field(default=("640x480",), metadata={"help": "of the pictures, in turn"})
    format: Literal["jpeg", "png", "webp"] = field(default="jpeg", metadata={"help": "of the pictures"})
    seed: int = field(default=0, metadata={"help": "of prompts, pictures and times: equal seeds ask the same"})
    answer_timeout: float = field(default=600.0, metadata={"help": "seconds of silence after which an answer is lost"})
    output: Path | None = field(default=None, metadata={"help": "JSON file with every request's times", "short": "-o"})
    plot: Path | None = field(default=None, metadata={"help": "PNG file of the times; needs matplotlib"})
    json: bool = field(default=False, metadata={"help": "print the summary as one JSON object"})

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
