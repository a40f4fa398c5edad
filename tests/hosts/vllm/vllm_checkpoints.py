"""Tiny random checkpoints that vLLM's own loaders accept: real class names, tensor names, head sizes that its CPU
kernels have and, for Ovis2.5, the real ids of the tokens that vLLM puts beside pictures.

A random model forgets its picture over many equal rows and then repeats one word. Scaled as here, attention chooses
few rows, a visual word is one word and not a mixture of all, and logits lie far apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from checkpoints import (
    decoder_of,
    plain_backend,
    preprocessor_of,
    randomise,
    tower_of,
    write_checkpoint,
)
from llava_onevision_checkpoint import write_llava_onevision_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

QWEN_BASE = 151643  # entries of Qwen2's vocabulary; its special tokens follow
QWEN_SPECIAL = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<|image_pad|>": 151655,
    "<think>": 151667, "</think>": 151668, "<image>": 151669, "<video>": 151670, "<ovis_visual_atom>": 151671,
    "<ovis_image_start>": 151672, "<ovis_image_end>": 151673, "<ovis_video_start>": 151674,
    "<ovis_video_end>": 151675,
}  # fmt: skip
VOCABULARY = 151936
VISUAL_WORDS = 96
LARGER = {
    "ovis2_5": {"embed_tokens": 4.0, "q_norm": 3.0, "lm_head": 4.0, "visual_tokenizer.head.1": 6.0, "vte": 4.0},
    "llava_onevision": {"embed_tokens": 4.0, "model.layers.0.self_attn.q_proj": 2.0, "lm_head": 4.0},
}  # what is multiplied, by the end of its name

# parts in their order with nothing between, so that a test says what stands between two pictures
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<' ~ part['type'] ~ '>' }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def qwen_sized_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE filled up with words that no text contains, so that special tokens get Qwen3's ids."""
    definition = json.loads(plain_backend().to_str())
    vocabulary = definition["model"]["vocab"]
    vocabulary |= {f"\x00unused{number}": number for number in range(len(vocabulary), QWEN_BASE)}
    backend = Tokenizer.from_str(json.dumps(definition))
    names = {number: text for text, number in QWEN_SPECIAL.items()}
    every = [names.get(number, f"<|reserved_{number}|>") for number in range(QWEN_BASE, max(names) + 1)]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in every])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def write_ovis2_5(folder: Path, seed: int = 0) -> None:
    """Ovis2.5 of a few blocks, with the reference's patch size 16 and 32x32 positions."""
    tower = tower_of(
        seed, hidden_size=64, intermediate_size=96, image_size=512, patch_size=16, vision_use_head=False
    )  # fmt: skip
    language = decoder_of(
        "qwen3", seed + 1, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, head_dim=32,
        max_position_embeddings=8192, rope_theta=1e6, tie_word_embeddings=False, eos_token_id=151645,
        pad_token_id=151643, bos_token_id=None,
    )  # fmt: skip
    head = nn.Sequential(nn.Linear(256, VISUAL_WORDS, bias=False), nn.LayerNorm(VISUAL_WORDS))
    table = nn.Embedding(VISUAL_WORDS + 4, 64)
    randomise(head, seed + 2)
    randomise(table, seed + 3)
    state = {f"visual_tokenizer.vit.vision_model.{name}": value for name, value in tower.state_dict().items()}
    state |= {f"llm.{name}": value for name, value in language.state_dict().items()}
    state |= {f"visual_tokenizer.head.{name}": value for name, value in head.state_dict().items()}
    state["vte.weight"] = table.weight
    vision: dict[str, Any] = {
        "model_type": "siglip2_navit", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_channels": 3, "num_patches": -1, "image_size": 512, "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "attention_dropout": 0.0, "hidden_stride": 2,
        "window_size": 112, "fullatt_block_indexes": None, "temporal_patch_size": 1, "preserve_original_pe": True,
        "use_rope": True,
    }  # fmt: skip
    config = {
        "architectures": ["Ovis2_5"], "model_type": "ovis2_5",
        "conversation_formatter_class": "Qwen3ConversationFormatter", "hidden_size": 64, "vocab_size": VOCABULARY,
        "visual_vocab_size": VISUAL_WORDS + 4, "llm_config": language.config.to_dict(), "vit_config": vision,
        "torch_dtype": "float32",
    }  # fmt: skip
    tokenizer = qwen_sized_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    write_checkpoint(
        folder, config, louder(state, LARGER["ovis2_5"]), tokenizer,
        preprocessor=preprocessor_of(
            "SiglipImageProcessor", 2, do_convert_rgb=True, size={"height": 512, "width": 512}
        ),
        generation={"eos_token_id": [151645, 151643], "pad_token_id": 151643},
    )  # fmt: skip


def write_llava_onevision(folder: Path, seed: int = 0) -> None:
    """LLaVA-OneVision of tiles of 60 pixels, up to 4 x 4 of them. Not fewer: vLLM counts the rows of a picture as for
    `anyres_max_9`, whatever the checkpoint says, and only more than nine tiles are then shrunk."""
    language = {
        "model_type": "qwen2", "vocab_size": 328, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "rope_theta": 10000.0,
    }  # fmt: skip
    write_llava_onevision_checkpoint(
        folder,
        seed=seed,
        most=4,
        tied=False,
        chat_template=CHAT_TEMPLATE,
        keys={"text_config": language, "vision_aspect_ratio": "anyres_max_9"},
    )
    file = folder / "model.safetensors"
    save_file(louder(load_file(file), LARGER["llava_onevision"]), file, metadata={"format": "pt"})


def louder(state: Mapping[str, torch.Tensor], larger: Mapping[str, float]) -> dict[str, torch.Tensor]:
    factors = {name: [by for end, by in larger.items() if name.endswith(f"{end}.weight")] for name in state}
    return {name: value.detach() * math.prod(factors[name]) for name, value in state.items()}
