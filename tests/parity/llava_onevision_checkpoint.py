"""Tiny random LLaVA-OneVision checkpoints with transformers' own model behind them, under each of the names that its
tensors go by: the hub's, those that transformers 5 saves, and those that it has in memory; of its relatives too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoints import (
    State,
    build_tokenizer,
    instead,
    merged,
    preprocessor_of,
    randomise,
    write_checkpoint,
    write_json,
)
from PIL import Image
from tokenizers import AddedToken
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from siglane.verify.references.files import unset
from siglane.verify.references.r_4b import PreNormProjector

Names = Literal["hub", "saved", "memory"]

MEDIA = ("<image>", "<video>")
THINKING = ("<think>", "</think>")
PATCH = 14

# the hub's file: every image, then every video, then the texts (transformers' conversion script writes it)
HUB_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN3 = {"model_type": "qwen3", "head_dim": 16}
R_4B_TEMPLATE = (  # stands for R-4B's own, which takes this variable
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}"
    "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if thinking_mode is defined and thinking_mode == 'long' %}{{ '<think>\n' }}{% endif %}"
)
RELATIVES: dict[str, dict[str, Any]] = {
    "r_4b": {"relative": ("RForConditionalGeneration", 1), "text": QWEN3, "chat_template": R_4B_TEMPLATE},
    "bee": {
        "relative": ("BeeForConditionalGeneration", 4), "text": QWEN3, "names": "memory", "tied": False,
        "chat_template": HUB_TEMPLATE,
    },
    "varco": {"text": QWEN3, "tied": False},
    "varco, tied": {"text": QWEN3, "head_stored": False},
    "varco of patches of 16": {"text": QWEN3, "patch": 16, "image_size": 72},
}  # fmt: skip


class Processor(LlavaOnevisionProcessor):
    """transformers' own; its base class cannot name the class of a video processor without torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type | None:
        return None


@dataclass
class LlavaOnevision:
    """What a checkpoint holds, as transformers runs it; its model carries no usable types."""

    folder: Path
    model: Any
    processor: Any
    tokenizer: PreTrainedTokenizerFast

    @property
    def patch(self) -> int:
        size = self.model.config.vision_config.patch_size
        assert isinstance(size, int)
        return size

    @property
    def side(self) -> int:
        """Pixels of a tile."""
        side = self.model.config.vision_config.image_size
        assert isinstance(side, int)
        return side

    def inputs(self, text: str, images: list[Image.Image]) -> Any:
        """Ids and pixels of one request."""
        return self.processor(text=text, images=[images] if images else None, return_tensors="pt")

    def rows(self, inputs: Any) -> tuple[torch.Tensor, ...]:
        """Per image what the language model reads, `[rows, hidden_size]`."""
        keys = ("pixel_values", "image_sizes", "batch_num_images")
        found = self.model.get_image_features(**{key: inputs[key] for key in keys}).pooler_output
        assert all(isinstance(rows, torch.Tensor) for rows in found)
        return tuple(found)


def write_llava_onevision_checkpoint(
    folder: Path,
    *,
    names: Names = "hub",
    image_size: int = 60,
    most: int = 3,
    tied: bool = True,
    head_stored: bool = True,
    bias: bool = True,
    nested: bool = False,
    chat_template: str | None = None,
    seed: int = 0,
    keys: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    patch: int = PATCH,
    text: Mapping[str, Any] | None = None,
    relative: tuple[str, int] | None = None,
) -> LlavaOnevision:
    """text: keys of text_config; relative: class and widening of one with a norm in front of its projector; image_size:
    pixels of a tile, the last few of 60 are read by no patch; most: pinpoints of 1..most tiles along each side;
    head_stored: a tied head has a tensor too; nested: processor_config.json instead of preprocessor_config.json; keys,
    processor: added to config.json and the processor's file, None takes a key out."""
    tokenizer = build_tokenizer(MEDIA)
    if text is not None and text["model_type"] == "qwen3":  # not special in Qwen3's tokenizer either
        tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINKING])
    pinpoints = [[image_size * i, image_size * j] for i in range(1, most + 1) for j in range(1, most + 1)]
    config = _config(tokenizer, image_size, pinpoints, patch, text or {}, tied=tied, bias=bias, keys=keys or {})
    model: Any = unset(lambda: LlavaOnevisionForConditionalGeneration(config)).eval()
    if relative is not None:
        model.model.multi_modal_projector = PreNormProjector(config, relative[1])
    randomise(model, seed)
    pictures = merged(
        preprocessor_of(
            "LlavaOnevisionImageProcessor", 3, do_pad=True, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.25, 0.4],
            size={"height": image_size, "width": image_size}, image_grid_pinpoints=pinpoints,
        ),
        processor,
    )  # fmt: skip
    side = image_size // patch
    facts = {"num_image_tokens": side * side, "vision_feature_select_strategy": "full"}
    facts["vision_aspect_ratio"] = config.vision_aspect_ratio
    whole = {"processor_class": "LlavaOnevisionProcessor", **facts}
    tokenizer.chat_template = chat_template
    generation = {"eos_token_id": [tokenizer.eos_token_id]}
    stated: dict[str, Any] = {
        "tie_word_embeddings": False
    }  # as on the hub, where only text_config says that the head is tied
    if relative is not None:
        stated |= {"architectures": [relative[0]], "model_type": relative[0].partition("For")[0]}
    write_checkpoint(
        folder, merged(config.to_dict() | stated, keys),
        _renamed(model.state_dict(), names, head=head_stored or not tied), tokenizer,
        preprocessor=None if nested else pictures, generation=generation,
    )  # fmt: skip
    if names == "saved":
        model.save_pretrained(folder)
        write_json(folder / "generation_config.json", generation)
    write_json(folder / "processor_config.json", whole | ({"image_processor": pictures} if nested else {}))
    reference = Processor(
        LlavaOnevisionImageProcessorPil(**pictures),
        tokenizer,
        None,
        chat_template=chat_template or HUB_TEMPLATE,
        **facts,
    )
    return LlavaOnevision(folder, model, reference, tokenizer)


def write_relative(folder: Path, name: str, **more: Any) -> LlavaOnevision:
    """One of RELATIVES. more: options of `write_llava_onevision_checkpoint`."""
    return write_llava_onevision_checkpoint(folder, **{**RELATIVES[name], **more})


def _config(
    tokenizer: PreTrainedTokenizerFast,
    image_size: int,
    pinpoints: list[list[int]],
    patch: int,
    text: Mapping[str, Any],
    *,
    tied: bool,
    bias: bool,
    keys: Mapping[str, Any],
) -> Any:
    known = tokenizer.get_vocab()
    raw: dict[str, Any] = {
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
            "num_attention_heads": 2, "image_size": image_size, "patch_size": patch, "vision_use_head": False,
        },
        "text_config": {
            "model_type": "qwen2", "vocab_size": math.ceil(len(known) / 8) * 8, "hidden_size": 48,
            "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "tie_word_embeddings": tied, "rope_theta": 10000.0,
            **text, **instead,
        },
        "image_token_index": known["<image>"], "video_token_index": known["<video>"], "projector_hidden_act": "gelu",
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2",
        "multimodal_projector_bias": bias, "image_grid_pinpoints": pinpoints, "tie_word_embeddings": False,
    }  # fmt: skip
    return LlavaOnevisionConfig(**merged(raw, keys), architectures=["LlavaOnevisionForConditionalGeneration"])


def _renamed(state: State, names: Names, *, head: bool) -> State:
    """`model.language_model.layers...` and its like as the hub has them. head: whether the head is among them."""
    found = {name: tensor for name, tensor in state.items() if head or "lm_head" not in name}
    if names == "memory":
        return found
    places = (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    )
    return {_moved(name, places): tensor for name, tensor in found.items()}


def _moved(name: str, places: tuple[tuple[str, str], ...]) -> str:
    before, after = next(place for place in places if name.startswith(place[0]))
    return after + name.removeprefix(before)
