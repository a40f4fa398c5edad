"""Tiny random Idefics3 and SmolVLM checkpoints with transformers' own model behind them: files as on the hub and as of
transformers 5, tokenizers with and without the tokens beside tiles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoints import build_tokenizer, instead, merged, preprocessor_of, randomise, write_checkpoint, write_json
from tokenizers import AddedToken
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from siglane.verify.references.files import unset

Kind = Literal["smolvlm", "smolvlm2", "2.2b", "docling"]
KINDS: tuple[Kind, ...] = ("smolvlm", "smolvlm2", "2.2b", "docling")

CLASSES: dict[str, tuple[Any, Any]] = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}
AROUND = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
PLACES = ("<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)))
DOCLING = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<doctag>", "</doctag>", "<text>", "<loc_7>")

# the hub's of SmolVLM, which has no place for videos, and granite-docling's
SMOLVLM_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DOCLING_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- elif part['type'] == 'image' -%}{{- '<image>' -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|end_of_text|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant' -}}"
    "{%- if controls -%}{{- ' ' + controls | tojson() -}}{%- endif -%}{{- '<|end_of_role|>' -}}{%- endif -%}"
)


@dataclass
class Idefics3:
    """What a checkpoint holds, as transformers runs it; its model and processors carry no usable types."""

    folder: Path
    model: Any
    processor: Any
    tokenizer: PreTrainedTokenizerFast


def write_idefics3_checkpoint(
    folder: Path,
    kind: Kind = "smolvlm2",
    *,
    tied: bool | None = None,
    head_stored: bool = False,
    in_memory: bool = False,
    nested: bool = False,
    template: str | None = "",
    seed: int = 0,
    keys: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Idefics3:
    """tied: as config.json states at its top (docling: true); head_stored: a tied head has a tensor too;
    in_memory: tensors without `model.`; nested: transformers 5's processor_config.json instead of
    preprocessor_config.json; template: None for no chat template anywhere; keys, processor: added to config.json and
    the image processor's file, None takes a key out."""
    tied = kind == "docling" if tied is None else tied
    tokenizer = _tokenizer(kind)
    template = (DOCLING_TEMPLATE if kind == "docling" else SMOLVLM_TEMPLATE) if template == "" else template
    config = _config(kind, tokenizer, tied, keys or {})
    model: Any = unset(lambda: CLASSES[config.model_type][1](config)).eval()
    randomise(model, seed)
    vision = config.vision_config
    pictures = merged(_pictures(kind, vision.image_size), processor)
    rows = (pictures["max_image_size"]["longest_edge"] // vision.patch_size // config.scale_factor) ** 2
    state = {
        name: tensor for name, tensor in model.state_dict().items() if head_stored or not (tied and "head" in name)
    }
    tokenizer.chat_template = template if kind == "docling" else None  # the others have it beside their processor
    write_checkpoint(
        folder, merged(config.to_dict(), keys),
        {name.removeprefix("model.") if in_memory else name: tensor for name, tensor in state.items()}, tokenizer,
        preprocessor=None if nested else pictures, generation={"eos_token_id": [tokenizer.eos_token_id]}, dtype=dtype,
    )  # fmt: skip
    whole: dict[str, Any] = {"processor_class": "Idefics3Processor", "image_seq_len": rows}
    if nested:
        whole |= {"image_processor": pictures} | ({"video_processor": pictures} if kind == "smolvlm2" else {})
    write_json(folder / "processor_config.json", whole)
    if template is not None and kind != "docling":
        write_json(folder / "chat_template.json", {"chat_template": template})
    known = {name: value for name, value in pictures.items() if name != "video_sampling"}
    theirs = Idefics3Processor(Idefics3ImageProcessorPil(**known), tokenizer, rows, chat_template=template)
    return Idefics3(folder, model, theirs, tokenizer)


def _tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """Of 2.2B only what stands around tiles is a token, not what says where they are."""
    tokenizer = build_tokenizer((*AROUND, *(() if kind == "2.2b" else PLACES), *(DOCLING if kind == "docling" else ())))
    tokenizer.eos_token = AddedToken("<|end_of_text|>" if kind == "docling" else "<end_of_utterance>", special=True)
    return tokenizer


def _pictures(kind: Kind, side: int) -> dict[str, Any]:
    found = preprocessor_of(
        "SmolVLMImageProcessor" if kind == "smolvlm2" else "Idefics3ImageProcessor", 1, do_image_splitting=True,
        do_pad=True, do_convert_rgb=True, max_image_size={"longest_edge": side}, size={"longest_edge": 4 * side},
    )  # fmt: skip
    sampling = {"fps": 1, "max_frames": 6, "video_size": {"longest_edge": side}}
    return found | ({"video_sampling": sampling} if kind == "smolvlm2" else {})


def _config(kind: Kind, tokenizer: PreTrainedTokenizerFast, tied: bool, keys: Mapping[str, Any]) -> Any:
    """Keys as on the hub, where those of the tower are few."""
    odd = kind == "2.2b"
    raw: dict[str, Any] = {
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 45 if odd else 32, "patch_size": 7 if odd else 8,
        },
        "text_config": {
            "model_type": "llama", "vocab_size": math.ceil(len(tokenizer) / 8) * 8, "hidden_size": 48,
            "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 12, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
            "rope_theta": 273768.0 if odd else 100000.0, "tie_word_embeddings": tied, "qk_layer_norms": False,
            **instead,
        },
        "scale_factor": 3 if odd else 2, "image_token_id": tokenizer.get_vocab()["<image>"],
        "tie_word_embeddings": tied, "pad_token_id": 0,
    }  # fmt: skip
    config, model = CLASSES["smolvlm" if kind == "smolvlm2" else "idefics3"]
    return config(**merged(raw, keys), architectures=[model.__name__])
