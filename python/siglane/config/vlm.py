"""A whole model: its eyes, where it has any, its language model and the few facts that join them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig


@dataclass(frozen=True, slots=True)
class Thinking:
    """start, end: token ids of `<think>` and `</think>`; forced: ids that end the reasoning of a model whose budget is
    spent, `end` among them (formats.md 3.6)."""

    start: int
    end: int
    forced: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmConfig:
    """family: name in `families/registry.py`; images: None for a model without eyes; image_token: an image's text in a
    chat template; image_token_id: what stands at every placeholder (may lie outside the embedding table, it is never
    looked up); eos_token_ids: end an answer; thinking: how it marks its reasoning, None for one that does not;
    special_tokens_are_text: whether answers show special tokens where a request does not say."""

    family: str
    images: ImageFacts | None
    language: LanguageConfig
    image_token: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    thinking: Thinking | None
    sampling: Mapping[str, Any]  # the fields of `SamplingParams` that the checkpoint states, by name
    special_tokens_are_text: bool = False
