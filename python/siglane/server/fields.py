"""What becomes of each field of a request: it is honoured, or refused with a 400 that names it (`REFUSED`), or reported
back as ignored (`ignored_fields`); none is dropped in silence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from siglane.errors import UserError

MAX_REPORTED_FIELDS = 20

# Fields that change the answer in other servers and are not served here, with the values that ask for nothing.
# None, False and empty values ask for nothing in any of them.
REFUSED: Mapping[str, tuple[object, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "bad_words": (),
    "beam_width": (1,),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (),
    "custom_logit_processor": (),
    "documents": (),
    "ebnf": (),
    "echo": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "input_ids": (),
    "json_schema": (),
    "logits_processors": (),
    "lora_path": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "stop_regex": (),
    "structural_tag": (),
    "structured_outputs": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (),
    "web_search_options": (),
}


class RequestModel(BaseModel):
    # strict: true is not 1 and "1" is not 1; extra: unknown fields are reported, see ignored_fields
    model_config = ConfigDict(strict=True, extra="allow")


def plain(value: Any) -> Any:
    """A validated model as dictionaries and lists; without nulls, and without the fields that have no effect."""
    if isinstance(value, RequestModel):
        fields = ((name, getattr(value, name)) for name in type(value).model_fields)
        return {name: plain(found) for name, found in fields if found is not None}
    return [plain(item) for item in value] if isinstance(value, list) else value


def refuse_fields(extra: Mapping[str, Any], refused: Mapping[str, tuple[object, ...]]) -> None:
    for name, value in extra.items():
        if name in refused and value and value not in refused[name]:
            raise UserError(f"{name} is not supported by this server", code="unsupported_field", param=name)


def ignored_fields(model: BaseModel) -> list[str]:
    """Dotted names of the fields that were sent and have no effect, made safe for a header; at most 20."""
    found: dict[str, None] = {}
    _collect_ignored(model, "", found)
    return list(found)


def _collect_ignored(model: BaseModel, prefix: str, found: dict[str, None]) -> None:
    for name, value in (model.model_extra or {}).items():
        if value is not None and name not in REFUSED and len(found) < MAX_REPORTED_FIELDS:
            found[prefix + re.sub(r"[^A-Za-z0-9_-]", "?", name[:64])] = None
    for name in type(model).model_fields:
        value = getattr(model, name)
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, BaseModel):
                _collect_ignored(item, f"{prefix}{name}.", found)
