"""The checkpoint that `serving.py` measures: SigLIP-base at 384 pixels, VILA's 2x2 projector, a Qwen2 of hidden 512.

Random weights; the layout, names and code path are those of a real VILA folder. Both sides load the same files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

sys.path.append(str(Path(__file__).parents[1]))  # recipes/ is no part of the installed package

from recipes.demo.tokenizer import QWEN2_PATTERN

VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 384,
    "patch_size": 16,
    "vision_use_head": False,
}
LANGUAGE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,  # larger than usual, so that random weights do not repeat one token
}
PATCHES, ROWS = 576, 144
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")


def write_checkpoint(folder: Path, seed: int = 0) -> None:
    """Writes the three folders `llm/ vision_tower/ mm_projector/` under `folder`."""
    torch.manual_seed(seed)
    tower = SiglipVisionModel(SiglipVisionConfig(**VISION))
    tower.save_pretrained(folder / "vision_tower")
    processor = {"size": {"height": 384, "width": 384}, "resample": 3, "image_processor_type": "SiglipImageProcessor"}
    (folder / "vision_tower" / "preprocessor_config.json").write_text(json.dumps(processor))
    language = Qwen2ForCausalLM(Qwen2Config(**LANGUAGE))
    language.save_pretrained(folder / "llm")
    tokenizer().save_pretrained(folder / "llm")
    merged, width = 4 * VISION["hidden_size"], LANGUAGE["hidden_size"]
    (folder / "mm_projector").mkdir(exist_ok=True)
    save_file(
        {
            "layers.1.weight": torch.ones(merged),
            "layers.1.bias": torch.zeros(merged),
            "layers.2.weight": torch.randn(width, merged) * merged**-0.5,
            "layers.2.bias": torch.zeros(width),
            "layers.4.weight": torch.randn(width, width) * width**-0.5,
            "layers.4.bias": torch.zeros(width),
        },
        folder / "mm_projector" / "model.safetensors",
    )
    projector = {"model_type": "v2l_projector", "mm_projector_type": "mlp_downsample"}
    (folder / "mm_projector" / "config.json").write_text(json.dumps(projector))
    root = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaModel"],
        "image_aspect_ratio": "resize",
        "mm_hidden_size": VISION["hidden_size"],
        "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "cls_patch",
        "llm_cfg": {},
        "vision_tower_cfg": {},
        "mm_projector_cfg": projector,
    }
    (folder / "config.json").write_text(json.dumps(root))


def tokenizer(vocab_size: int = LANGUAGE["vocab_size"]) -> PreTrainedTokenizerFast:
    """Bytes and special tokens with Qwen2's splitting; every id has a text, so any output can be decoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet]
    longer = ((word, letter) for word in words for letter in alphabet)  # reads what it makes: pairs, then triples
    merges = []
    while len(words) < vocab_size - len(SPECIAL_TOKENS):
        merges.append(next(longer))
        words.append("".join(merges[-1]))
    vocabulary = {word: number for number, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    splitter = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([splitter, byte_level])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
    )


def request_flops(*, encoded: bool, prompt: int, cached: int, generated: int) -> float:
    """Multiply-adds (counted as two) that one request cannot do without.

    encoded: its image has to go through tower and projector; cached: prompt tokens that were computed before.
    """
    d, inner = VISION["hidden_size"], VISION["intermediate_size"]
    blocks = VISION["num_hidden_layers"] * (PATCHES * (4 * d * d + 2 * d * inner) + 2 * PATCHES**2 * d)
    width = LANGUAGE["hidden_size"]
    projector = ROWS * (4 * d * width + width * width)
    vision = PATCHES * d * d + blocks + projector
    key_value = width * LANGUAGE["num_key_value_heads"] // LANGUAGE["num_attention_heads"]
    layer = 2 * width * width + 2 * width * key_value + 3 * width * LANGUAGE["intermediate_size"]
    total = prompt + generated
    attention = 2 * width * (total**2 - cached**2) / 2
    language = LANGUAGE["num_hidden_layers"] * ((total - cached) * layer + attention)
    return 2 * (encoded * vision + language + generated * width * LANGUAGE["vocab_size"])
