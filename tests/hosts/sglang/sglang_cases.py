"""What SGLang is asked: the cases of tests/host_cases.py through views of their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from host_cases import TOKENS, Case, Drawn, Picture, VideoSize, write_checkpoint
from sglang_host import RunningEngine
from transformers import PreTrainedTokenizerFast

from siglane.hosts.view import write_view
from siglane.llm import Generation
from siglane.weights.hub import Checkpoint

OVERRIDE = {"nvila", "llava_qwen"}  # families that SGLang has classes of its own for


@dataclass(frozen=True, slots=True)
class Served:
    """A checkpoint and its view, which SGLang is to find."""

    folder: Path
    view: Path
    env: Mapping[str, str]
    tokenizer: Any

    def request(self, case: Case, **more: Any) -> dict[str, Any]:
        """Arguments of `Engine.async_generate`: the view's chat template, rendered as SGLang's server does."""
        found: dict[str, Any] = {"prompt": self.rendered(case)}
        if images := [_image(part) for part in case if isinstance(part, Picture | Drawn)]:
            found["image_data"] = images
        if videos := [part.url for part in case if isinstance(part, VideoSize)]:
            found["video_data"] = videos
        return found | more

    def rendered(self, case: Case) -> str:
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else
            {"type": "video" if isinstance(part, VideoSize) else "image"} for part in case
        ]  # fmt: skip
        messages = [{"role": "user", "content": content}]
        text: str = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text


def serve(name: str, folder: Path, **more: str) -> Served:
    """A checkpoint of a family in `folder` and its view. more: variables for SGLang."""
    write_checkpoint(name, folder / name)
    override = {"SIGLANE_SGLANG_OVERRIDE": name} if name in OVERRIDE else {}
    return served(folder / name, folder / "views", {**override, **more})


def served(checkpoint: Path, views: Path, env: Mapping[str, str]) -> Served:
    view = write_view(Checkpoint(checkpoint), views)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(view)
    return Served(checkpoint, view, {**env, "SIGLANE_SGLANG_VIEWS": str(views)}, tokenizer)


def _image(part: Picture | Drawn) -> str | dict[str, Any]:
    if isinstance(part, Drawn) or part.max_tiles is None:
        return part.url
    return {"url": part.url, "max_dynamic_patch": part.max_tiles}


def ask_sglang(
    engine: RunningEngine, requests: Sequence[Mapping[str, Any]], tokens: int = TOKENS, **more: Any
) -> list[dict[str, Any]]:
    """SGLang's greedy answers to requests that are submitted at once."""
    return engine.generate(requests, {"temperature": 0.0, "max_new_tokens": tokens, "ignore_eos": True}, **more)


def compare(theirs: Sequence[Mapping[str, Any]], ours: Sequence[Generation], names: Sequence[str]) -> None:
    """AssertionError names the cases whose answers, or whose prompts' lengths, are not the same."""
    errors = {name: answer["error"] for name, answer in zip(names, theirs, strict=True) if "error" in answer}
    assert not errors, errors
    for found, expected, what in (
        ([one["meta_info"]["prompt_tokens"] for one in theirs], [one.usage.prompt_tokens for one in ours], "lengths"),
        ([one["output_ids"] for one in theirs], [list(one.output_token_ids) for one in ours], "answers"),
    ):
        different = [name for name, one, other in zip(names, found, expected, strict=True) if one != other]
        assert not different, f"{what} of {', '.join(different)} differ from siglane's"
