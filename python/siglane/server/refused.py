"""Fields that other servers honour and this one refuses with a 400 that names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from siglane.errors import UserError

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


def refuse_fields(extra: Mapping[str, Any], refused: Mapping[str, tuple[object, ...]]) -> None:
    for name, value in extra.items():
        if name in refused and value and value not in refused[name]:
            raise UserError(f"{name} is not supported by this server", code="unsupported_field", param=name)
