"""A byte-level BPE tokenizer in Qwen2's format, trained on the recipe's own questions.

Whole sentences of the small world become a few tokens; anything else still spells out in bytes. The words printed on
signs are left out of the training text, so that every sign is spelt letter by letter. (The language model still
learns the list: a word outside it is mostly read as one inside it.)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from recipes.demo.questions import NO_SIGN, QUESTION_KINDS, ask
from recipes.demo.scenes import random_scene

VOCAB_SIZE = 512
PAD, START, END, IMAGE = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"
SPECIAL = (PAD, START, END, "[BOS]", "[PAD]", "<vila/sentinel>", IMAGE, "<vila/video>")  # VILA's media tokens come last
SYSTEM = "You are a helpful assistant"

# Qwen/Qwen2-0.5B tokenizer.json, pre_tokenizer
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# NVILA's llm/tokenizer_config.json: ChatML with a system turn that has no full stop
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
    "{% endif %}{% for message in messages if message['content'] is not none %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(seed: int = 0, scenes: int = 4000, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """The same tokenizer for the same seed. Fewer than VOCAB_SIZE tokens, the special ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(seed, scenes), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _sentences(seed: int, scenes: int) -> Iterator[str]:
    rng = np.random.default_rng([seed, 0])
    for _ in range(scenes):
        scene = random_scene(rng)
        for kind in QUESTION_KINDS:
            question = ask(kind, scene, rng)
            if question is None:
                continue
            yield question.text
            yield question.text[0].lower() + question.text[1:]
            if kind != "sign":
                yield question.answer
        yield f"system\n{SYSTEM}\nuser\nassistant\n{NO_SIGN}"


def special_id(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(f"the tokenizer has no {token!r}")
    return number


def save_tokenizer(
    tokenizer: Tokenizer, folder: Path, special: Sequence[str] = SPECIAL, template: str | None = CHAT_TEMPLATE
) -> None:
    """`tokenizer.json` and `tokenizer_config.json` as `AutoTokenizer` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "errors": "replace",
        "split_special_tokens": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "additional_special_tokens": list(special[1:]),
    } | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
