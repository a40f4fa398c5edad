"""Fields that other servers honour and this one refuses with a 400 that names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import model_validator

from siglane.errors import UserError
from siglane.server.constraints import OTHER_NAMES
from siglane.server.fields import RequestModel

# Fields that change the answer in other servers and are not served here, with the values that ask for nothing.
# None, False and empty values ask for nothing in any of them.
REFUSED: Mapping[str, tuple[object, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "beam_width": (1,),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (),
    "custom_logit_processor": (),
    "documents": (),
    "echo": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "grammar": (),
    "include_stop_str_in_output": (),
    "input_ids": (),
    "length_penalty": (1, 1.0),
    "logits_processors": (),
    "lora_path": (),
    "media_io_kwargs": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "no_stop_trim": (),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "return_hidden_states": (),
    "return_token_ids": (),
    "return_tokens_as_token_ids": (),
    "stop_regex": (),
    "structural_tag": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (),
    "web_search_options": (),
}


# What other servers do unless they are told not to: here, always.
ALWAYS_ON = frozenset({"add_generation_prompt", "include_reasoning", "separate_reasoning"})


def refuse_fields(extra: Mapping[str, Any], refused: Mapping[str, tuple[object, ...]] = REFUSED) -> None:
    """UserError for the first field that asks for what is not served."""
    for name, value in extra.items():
        asks = name in refused and value and value not in refused[name]
        if asks or (name in ALWAYS_ON and value is not None and value is not True):
            raise UserError(f"{name} is not supported by this server", code="unsupported_field", param=name)


class TranslatedRequest(RequestModel):
    """Another API's. Null means absent; a chat completion's other fields, such as `seed`, mean what they mean there."""

    NOT_SERVED: ClassVar[Mapping[str, tuple[object, ...]]]

    model: str | None = None

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        refuse_fields(self.model_extra or {}, self.NOT_SERVED)
        return self

    @property
    def passed(self) -> dict[str, Any]:
        """What a chat's request is asked by the same name."""
        return {name: value for name, value in (self.model_extra or {}).items() if name not in self.NOT_SERVED}


def has_no_effect(name: str, value: object) -> bool:
    """Whether a field that `refuse_fields` lets pass is one to tell the client of."""
    return value is not None and not {name} & {*REFUSED, *ALWAYS_ON, *OTHER_NAMES}
