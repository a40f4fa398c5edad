"""transformers' causal language models with every stage read, and the tokenizer in front of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from siglane.errors import ConfigError
from siglane.verify.references.files import Raw, Tensors, read_json, ready
from siglane.verify.references.tapping import rows_of, tapping
from siglane.verify.stages import LOGIT_ROWS, TOKENS, Trace


class Decoder:
    """raw: the language model's JSON with its `model_type`; tensors: `model.`... and `lm_head.weight`."""

    def __init__(self, raw: Raw, tensors: Tensors, device: torch.device, dtype: torch.dtype) -> None:
        facts = {key: value for key, value in raw.items() if key not in ("model_type", "dtype", "torch_dtype")}
        self.config = AutoConfig.for_model(raw["model_type"], **facts)
        self.device, self.dtype = device, dtype
        from_config: Any = AutoModelForCausalLM.from_config
        self.model: Any = from_config(self.config)
        ready(self.model, tensors, device, dtype)

    def embed(self, token_ids: Sequence[int]) -> torch.Tensor:
        """`[T, hidden_size]`; ids outside the table, which only stand for image rows, read row 0."""
        table = self.model.get_input_embeddings()
        ids = [token if 0 <= token < table.num_embeddings else 0 for token in token_ids]
        rows: torch.Tensor = table(torch.tensor(ids, device=self.device)).detach()
        return rows

    def run(self, embeds: torch.Tensor, steps: int) -> Trace:
        """embeds `[T, hidden_size]` -> spliced, lm.block.N, logits and `steps` greedy tokens (without: none)."""
        return answer(self.model, self.model.model.layers, {"inputs_embeds": embeds[None]}, steps)


@torch.no_grad()
def answer(model: Any, layers: Sequence[nn.Module], inputs: Mapping[str, Any], steps: int) -> Trace:
    """What `model(**inputs)` passes through: what its first layer reads, every layer, logits, greedy tokens.

    An end token does not end the answer: both sides go on alike.
    """
    taken: Trace = {}

    def take(module: nn.Module, arguments: Any, named: Any) -> None:
        taken.setdefault("spliced", rows_of((arguments or [named["hidden_states"]])[0]).cpu())

    handle = layers[0].register_forward_pre_hook(take, with_kwargs=True)
    with tapping({f"lm.block.{number}": layer for number, layer in enumerate(layers)}) as taps:
        output = model(**inputs, use_cache=True, logits_to_keep=LOGIT_ROWS)
    handle.remove()
    taps |= {**taken, "logits": output.logits[0].cpu()}
    if steps:
        chosen = [int(output.logits[0, -1].argmax())]
        while len(chosen) < steps:
            ids = torch.tensor([chosen[-1:]], device=output.logits.device)
            output = model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
            chosen.append(int(output.logits[0, -1].argmax()))
        taps[TOKENS] = torch.tensor(chosen)
    return taps


def load_tokenizer(folder: Path, *added: str) -> Any:
    """The folder's tokenizer as transformers loads it, `added` as special tokens where it lacks them."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception:  # a model_type that transformers does not know, for one
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:
            raise ConfigError(f"{folder}: the reference cannot load the tokenizer: {error}") from error
    tokenizer.add_tokens([text for text in added if text not in tokenizer.get_vocab()], special_tokens=True)
    return tokenizer


def rendered(
    folder: Path, tokenizer: Any, images: Sequence[str], prompt: str, default: str, *, placeholder: str | None = None
) -> str:
    """One user message, pictures first, through the checkpoint's chat template, or `default` when it has none.

    images: what stands for each picture where the template takes a text. A template that takes parts writes its own
    placeholder, which becomes the picture's text where the model tiles pictures.
    """
    template = read_json(folder / "chat_template.json").get("chat_template") or tokenizer.chat_template or default
    content = "".join(images) + prompt
    text = _applied(tokenizer, template, content)
    if content in text:
        return text
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt}]
    text = _applied(tokenizer, template, parts)
    if placeholder is None:
        return text
    pieces = text.split(placeholder)
    return pieces[0] + "".join(image + piece for image, piece in zip(images, pieces[1:], strict=True))


def _applied(tokenizer: Any, template: str, content: Any) -> str:
    turns = [{"role": "user", "content": content}]
    try:
        text: str = tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template is a program: it may raise anything
        if isinstance(content, str):
            return ""
        raise ConfigError(f"the chat template refuses a message with pictures: {error}") from error
    return text
