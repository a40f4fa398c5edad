"""Tiny random VideoLLaMA3 checkpoints in transformers' layout and the authors', with transformers' own model behind
them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from checkpoints import build_tokenizer, instead, merged, preprocessor_of, randomise, write_checkpoint, write_json
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, VideoLlama3Config, VideoLlama3ForConditionalGeneration

from siglane.verify.references.files import unset

Layout = Literal["hf", "authors"]
LAYOUTS: tuple[Layout, ...] = ("hf", "authors")
PATCH = 4
MEDIA = ("<image>", "<|image_pad|>", "<|video_pad|>", "<|stream_start|>", "<|stream_end|>")
NAMES = (
    ("model.vision_model.", "model.vision_encoder."),
    ("model.projector.", "model.mm_projector."),
    ("model.language_model.", "model."),
    ("", ""),
)
# what the authors' processor gives its template: `image_token`, and of a video the number of its frames
AUTHORS_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if add_system_prompt and loop.first and message['role'] != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' -}}{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for content in message['content'] -%}"
    "{%- if content['type'] == 'image' or 'image' in content -%}{{- image_token + '\n' -}}"
    "{%- elif content['type'] == 'video' or 'video' in content -%}{%- for i in range(content['num_frames']) -%}"
    "{%- if 'timestamps' in content -%}{{- 'Time ' + content['timestamps'][i] | round(1) | string + 's:' -}}"
    "{%- endif -%}{{- image_token + (',' if i < content['num_frames'] - 1 else '\n') -}}{%- endfor -%}"
    "{%- elif content['type'] == 'text' -%}{{- content['text'] -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
HF_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}"
    "{%- for content in message['content'] -%}"
    "{{- content['text'] if content['type'] == 'text' else '<|' + content['type'] + '_pad|>\n' -}}{%- endfor -%}"
    "{%- endif -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


@dataclass
class VideoLlama3:
    """What a checkpoint holds, as transformers runs it; the model carries no usable types."""

    folder: Path
    model: Any
    tokenizer: PreTrainedTokenizerFast


def write_video_llama_3_checkpoint(
    folder: Path,
    layout: Layout = "hf",
    *,
    tied: bool = False,
    seed: int = 0,
    nested: bool = False,
    bounds: tuple[int, int] = (8, 256),
    template: bool = False,
    keys: Mapping[str, Any] | None = None,
    processor: Mapping[str, Any] | None = None,
    videos: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> VideoLlama3:
    """nested: transformers 5's processor_config.json in place of files of their own; bounds: patches of a picture,
    merged rows of a frame and a video; template: written down, of the authors' processor; keys, processor, videos:
    added to config.json and to the files of pictures' and videos' processors, None takes a key out."""
    tokenizer = build_tokenizer((*MEDIA, "<tool_call>", "</tool_call>"))
    tokenizer.eos_token = AddedToken("<|im_end|>", special=True)
    config: Any = VideoLlama3Config(**_parts(tokenizer, tied), architectures=["VideoLlama3ForConditionalGeneration"])
    model: Any = unset(lambda: VideoLlama3ForConditionalGeneration(config)).eval()
    randomise(model, seed)
    state = {name: one for name, one in model.state_dict().items() if not (tied and name.startswith("lm_head"))}
    raw, pictures = config.to_dict(), _pictures(layout, bounds)
    if layout == "authors":
        state, raw = {_renamed(name): one for name, one in state.items()}, _flat(raw, tokenizer)
    pictures, whole = merged(pictures, processor), {}
    if layout == "authors":
        whole = merged({"image_merge_size": 1, "video_merge_size": 2, "fps": 1, "max_frames": 8}, videos)
    else:
        frames = merged(_frames(pictures, bounds), videos)
        whole = {"processor_class": "VideoLlama3Processor"} | (
            {"image_processor": pictures, "video_processor": frames} if nested else {}
        )
    write_checkpoint(
        folder, merged(raw, keys), state, tokenizer, preprocessor=None if nested else pictures,
        generation={"eos_token_id": [tokenizer.eos_token_id]}, dtype=dtype,
    )  # fmt: skip
    write_json(folder / "processor_config.json", whole)
    if layout == "hf" and not nested:
        write_json(folder / "video_preprocessor_config.json", frames)
    if template:
        text = AUTHORS_TEMPLATE if layout == "authors" else HF_TEMPLATE
        write_json(folder / "chat_template.json", {"chat_template": text})
    return VideoLlama3(folder, model, tokenizer)


def _parts(tokenizer: PreTrainedTokenizerFast, tied: bool) -> dict[str, Any]:
    vocabulary = tokenizer.get_vocab()
    return {
        "vision_config": {
            "model_type": "video_llama_3_vision", "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 2, "patch_size": PATCH,
        },
        "text_config": {
            "model_type": "qwen2", "vocab_size": math.ceil(len(tokenizer) / 8) * 8, "hidden_size": 48,
            "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "rope_theta": 1000000.0, "tie_word_embeddings": tied,
        } | instead,
        "image_token_id": vocabulary["<|image_pad|>"], "video_token_id": vocabulary["<|video_pad|>"],
        "tie_word_embeddings": tied,
    }  # fmt: skip


def _flat(raw: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    text, tower = dict(raw["text_config"]), dict(raw["vision_config"])
    del tower["rope_parameters"]
    return text | {
        "architectures": ["Videollama3Qwen2ForCausalLM"], "model_type": "videollama3_qwen2", "vision_encoder": None,
        "vision_encoder_config": tower | {"model_type": "videollama3_vision_encoder"},
        "mm_projector_type": "mlp2x_gelu", "use_token_compression": True,
        "image_token_index": tokenizer.get_vocab()["<image>"], "tie_word_embeddings": raw["tie_word_embeddings"],
    }  # fmt: skip


def _pictures(layout: Layout, bounds: tuple[int, int]) -> dict[str, Any]:
    least, most = bounds
    if layout == "authors":
        found = preprocessor_of("Videollama3ImageProcessor", 3, do_convert_rgb=True, patch_size=PATCH)
        return found | {"min_tokens": least, "max_tokens": most}
    size = {"shortest_edge": least * PATCH**2, "longest_edge": most * PATCH**2}
    return preprocessor_of(
        "VideoLlama3ImageProcessor", 3, do_convert_rgb=True, patch_size=PATCH, temporal_patch_size=1, merge_size=1,
        size=size,
    )  # fmt: skip


def _frames(pictures: Mapping[str, Any], bounds: tuple[int, int]) -> dict[str, Any]:
    least, most = (count * (2 * PATCH) ** 2 for count in bounds)
    return {
        **{key: value for key, value in pictures.items() if key != "image_processor_type"},
        "video_processor_type": "VideoLlama3VideoProcessor", "merge_size": 2, "fps": 1, "max_frames": 8,
        "min_frames": 4, "use_token_compression": True, "size": {"shortest_edge": least, "longest_edge": most},
    }  # fmt: skip


def _renamed(name: str) -> str:
    before, after = next(pair for pair in NAMES if name.startswith(pair[0]))
    return after + name.removeprefix(before)
