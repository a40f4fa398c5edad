"""transformers' causal language models with every stage read, and the tokenizer in front of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from siglane.errors import ConfigError
from siglane.verify.references.files import Raw, Tensors, chat_template, ready, unset
from siglane.verify.references.tapping import rows_of, tapping
from siglane.verify.stages import LOGIT_ROWS, TOKENS, Trace

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"  # a template's own last line feed is dropped
)
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PLACE = -1  # a token id that no table has: a row of a picture stands there


@dataclass(frozen=True, slots=True)
class Decoder:
    """model: one of transformers' that answers, frozen; layers: those of its language model."""

    model: Any
    layers: Sequence[nn.Module]

    @classmethod
    def load(cls, raw: Raw, tensors: Tensors, device: torch.device, dtype: torch.dtype) -> Decoder:
        """raw: the language model's JSON with its `model_type`; tensors: `model.`... and `lm_head.weight`, of which a
        tied model may lack either the table or the head; where they differ, each is used."""
        facts = {key: value for key, value in raw.items() if key not in ("model_type", "dtype", "torch_dtype")}
        if facts.get("tie_word_embeddings"):
            if TABLE in tensors and HEAD in tensors:
                facts["tie_word_embeddings"] = torch.equal(tensors[TABLE], tensors[HEAD])
            elif HEAD in tensors:
                tensors = Tensors({**tensors.readers, TABLE: tensors.reader(HEAD)})
        from_config: Any = AutoModelForCausalLM.from_config
        model = unset(lambda: from_config(AutoConfig.for_model(raw["model_type"], **facts)))
        ready(model, _stacked(model, tensors), device, dtype)
        return cls(model, model.model.layers)

    def spliced(self, token_ids: Sequence[int], rows: Sequence[torch.Tensor]) -> torch.Tensor:
        """`[T, hidden_size]`: the ids' embeddings, and `rows` one after another where PLACE stands."""
        table = self.model.get_input_embeddings()
        ids = torch.tensor(token_ids, device=table.weight.device)
        embeds: torch.Tensor = table(ids.clamp(0, table.num_embeddings - 1))
        return embeds.index_copy(0, (ids == PLACE).nonzero()[:, 0], torch.cat([embeds[:0], *rows]).to(embeds))

    def logits(self, embeds: torch.Tensor) -> torch.Tensor:
        """embeds `[T, hidden_size]` -> `[T, vocab_size]`."""
        found: torch.Tensor = self.model(inputs_embeds=embeds[None]).logits[0]
        return found

    def run(self, embeds: torch.Tensor, steps: int) -> Trace:
        """embeds `[T, hidden_size]` -> spliced, lm.block.N, logits and `steps` greedy tokens (without: none)."""
        return self.answer({"inputs_embeds": embeds[None]}, steps)

    def answer(self, inputs: Mapping[str, Any], steps: int) -> Trace:
        """What `model(**inputs)` passes through: what its first layer reads, every layer, logits, greedy tokens.

        An end token does not end the answer: both sides go on alike.
        """
        taken: Trace = {}

        def take(module: nn.Module, arguments: Any, named: Any) -> None:
            taken.setdefault("spliced", rows_of((arguments or [named["hidden_states"]])[0]).cpu())

        handle = self.layers[0].register_forward_pre_hook(take, with_kwargs=True)
        with tapping({f"lm.block.{number}": layer for number, layer in enumerate(self.layers)}) as taps:
            output = self.model(**inputs, use_cache=True, logits_to_keep=LOGIT_ROWS)
        handle.remove()
        taps |= {**taken, "logits": output.logits[0].cpu()}
        if steps:
            chosen = [int(output.logits[0, -1].argmax())]
            while len(chosen) < steps:
                ids = torch.tensor([chosen[-1:]], device=output.logits.device)
                output = self.model(input_ids=ids, past_key_values=output.past_key_values, use_cache=True)
                chosen.append(int(output.logits[0, -1].argmax()))
            taps[TOKENS] = torch.tensor(chosen)
        return taps


def _stacked(model: Any, tensors: Tensors) -> Tensors:
    """With the experts of a layer in one tensor, as transformers has them in memory; files hold one each."""
    found = dict(tensors.readers)
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".experts.")
        if layer and name not in found:
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            names = [[f"{layer}.experts.{n}.{one}.weight" for one in kinds] for n in range(len(parameter))]
            found[name] = partial(_stack, tensors, names)
    return Tensors(found)


def _stack(tensors: Tensors, names: Sequence[Sequence[str]]) -> torch.Tensor:
    return torch.stack([torch.cat([tensors[name] for name in expert]) for expert in names])


def filled(
    token_ids: Sequence[int], placeholder: int, blocks: Sequence[torch.Tensor], behind: Sequence[int] = ()
) -> list[int]:
    """`token_ids` with PLACE for each row of the next block, and `behind` after them, for each `placeholder`."""
    waiting = iter(blocks)
    ids: list[int] = []
    for token in token_ids:
        ids += [*[PLACE] * len(next(waiting)), *behind] if token == placeholder else [token]
    return ids


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
    folder: Path,
    tokenizer: Any,
    images: Sequence[str],
    prompt: str,
    default: str,
    *,
    by_processor: bool = False,
    placeholder: str | None = None,
) -> str:
    """One user message, pictures first, through the checkpoint's chat template, or `default` when it has none.

    images: what stands for each picture where the template takes a text; by_processor: as of `chat_template`. A
    template that takes parts writes its own placeholder, which becomes the picture's text where a model tiles pictures.
    """
    template = chat_template(folder, by_processor=by_processor) or default
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
