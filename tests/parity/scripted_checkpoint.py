"""A real Ovis2.5 checkpoint whose language model says what a script tells it: each token decides the next one.

The blocks add nothing to the residual stream, so the last norm reads the embedding of the last token alone, and the
head maps it to its successor. Everything else (tower, engine, tokenizer, files) is as in any checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from checkpoints import Written
from ovis2_5_checkpoint import write_ovis2_5_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

from siglane.families.prompt.call_format import BARE, HERMES, LISTED

# "\n" ends a prompt that leaves thinking open, "\n\n" one that has closed it, and the text forced on a model
THINKER = MappingProxyType(
    {
        "\n": "<think>", "<think>": " ", " ": "a", "a": "b", "b": "c", "c": "d", "d": "e", "e": "\t",
        "\t": "</think>", "</think>": "\n\n", "\n\n": "x", "x": "y", "y": "z", "z": "<|im_end|>",
    }
)  # fmt: skip
THOUGHT, ANSWER = "abcde", "xyz"
THOUGHT_TOKENS = 9  # the tags and the white space too
SURE = 8.0  # by how much, roughly, a successor's logit exceeds the others
SECOND = 6.0  # the same of those that are not the first, which a bias of `CHOSEN` makes likelier than that one
CHOSEN = 25.0


def write_scripted_checkpoint(
    folder: Path, script: Mapping[str, str | Sequence[str]] = THINKER, seed: int = 0, **facts: Any
) -> Written:
    """script: tokens by their text, each with its successor, or several of which a bias may choose another than the
    first; facts: of the checkpoint."""
    written = write_ovis2_5_checkpoint(folder, seed=seed, **facts)
    state = load_file(folder / "model.safetensors")
    for key, value in state.items():
        if key.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight")) and key.startswith("llm."):
            value.zero_()
    state["llm.model.norm.weight"].fill_(1)
    head, table = state["llm.lm_head.weight"].zero_(), state["llm.model.embed_tokens.weight"]
    assert len(script) <= table.shape[1]
    for direction, text in zip(torch.eye(table.shape[1]), script, strict=False):
        table[written.encode(text)] = direction  # at right angles, so that none looks like another
    for text, successors in script.items():
        for place, successor in enumerate([successors] if isinstance(successors, str) else successors):
            (token_id,), (next_id,) = written.encode(text), written.encode(successor)
            sure = SURE if place == 0 else SECOND
            head[next_id] += sure * table[token_id]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return written


def _template(calls: str) -> str:
    """One that knows tools. calls: what writes an answer's."""
    return (
        "{%- if tools %}{{- '<|im_start|>system\n' }}{%- if messages[0].role == 'system' %}"
        "{{- messages[0].content + '\n\n' }}{%- endif %}{{- 'Functions:<tools>' }}"
        "{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}"
        "{{- '\n</tools>\nCall them so: <tool_call></tool_call><|im_end|>\n' }}{%- endif %}"
        "{%- for message in messages %}"
        "{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\n' + message.content }}"
        "{%- for call in message.tool_calls or [] %}" + calls + "{%- endfor %}{{- '<|im_end|>\n' }}"
        "{%- elif message.role == 'tool' %}"
        "{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}"
        "{%- elif message.role != 'system' or not tools or not loop.first %}"
        "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}"
    )


# as Qwen's, SmolLM2's and Llama's write them
TEMPLATES = MappingProxyType(
    {
        HERMES: _template(
            "{%- if message.content or not loop.first %}{{- '\n' }}{%- endif %}"
            '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
            "{{- (call.function.arguments | tojson) + '}\n</tool_call>' }}"
        ),
        LISTED: _template(
            "{{- ('<tool_call>[' if loop.first else ', ') + '{\"name\": \"' + call.function.name }}"
            "{{- '\", \"arguments\": ' + (call.function.arguments | tojson) + '}' }}"
            "{%- if loop.last %}{{- ']</tool_call>' }}{%- endif %}"
        ),
        BARE: _template(
            "{%- if not loop.first %}{{- raise_exception('one call at once') }}{%- endif %}"
            '{{- \'{"name": "\' + call.function.name + \'", "parameters": \' }}'
            "{{- (call.function.arguments | tojson) + '}' }}"
        ),
    }
)
SEE, HEAD, CITY, TAIL = "Let me see.\n", '\n{"name": "weather", "arguments": {"city": ', '"Bern', '"}}\n'
TIME, BROKEN, UNKNOWN = '\n{"name": "time", "arguments": {}}\n', '\n{"name": "weather", \n', '\n{"name": "rain", \n'
AND = "</tool_call>\n<tool_call>"
# what it says is chosen by a bias for one of the tokens that may come next
CALLER = MappingProxyType(
    {
        **THINKER, "\n\n": ("x", "<tool_call>", SEE), SEE: "<tool_call>",
        "<tool_call>": (HEAD, TIME, BROKEN, UNKNOWN), HEAD: CITY, CITY: TAIL, TAIL: ("</tool_call>", AND), AND: TIME,
        TIME: "</tool_call>", BROKEN: "</tool_call>", UNKNOWN: "</tool_call>", "</tool_call>": "<|im_end|>",
    }
)  # fmt: skip


def write_calling_checkpoint(folder: Path, *, special: bool = False) -> Written:
    """special: whether the tags of a call are special tokens, which no text shows."""
    pieces = (SEE, HEAD, CITY, TAIL, TIME, BROKEN, UNKNOWN, AND)
    added = [AddedToken(text, special=special, normalized=False) for text in ("<tool_call>", "</tool_call>")]
    added += [AddedToken(text, special=False, normalized=False) for text in pieces]
    return write_scripted_checkpoint(folder, CALLER, chat_template=TEMPLATES[HERMES], added=added)
