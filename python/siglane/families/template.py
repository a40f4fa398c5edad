"""A chat template that needs no help: what `families/chat.py` does to messages in Python, written in Jinja.

Other engines render templates themselves. The one made here takes messages as the OpenAI API has them (a text, or a
list of text and image parts), applies the family's `PromptRules`, and hands the checkpoint's own template what it
expects. What it cannot do is keep a user's text apart from special tokens: that needs the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Collection

from siglane.families.family import PromptRules
from siglane.types import Role

ROLES: tuple[Role, ...] = ("system", "user", "assistant")

# parts -> a list of texts; the names cannot clash with a template's own
_PICTURES = (
    "{%- if part['type'] in ['image', 'image_url'] -%}{%- set siglane.parts = siglane.parts + [IMAGE] -%}"
    "{%- elif part['type'] in ['video', 'video_url'] -%}{%- set siglane.parts = siglane.parts + [VIDEO] -%}"
)
_TEXTS = "if part['type'] == 'text' -%}{%- set siglane.parts = siglane.parts + [part['text']] -%}"
_EACH, _DONE = "{%- for part in message['content'] -%}", "{%- endif -%}{%- endfor -%}"


def self_contained(
    template: str, rules: PromptRules, roles_with_parts: Collection[Role], image_token: str, video_token: str | None
) -> str:
    """`template` behind Jinja code that applies `rules`; `template` itself when there is nothing to apply.

    roles_with_parts: those whose content `template` takes as a list; the others get one text in which `image_token` and
    `video_token` stand for the media.
    """
    flat = [role for role in ROLES if role not in roles_with_parts]
    if not flat:
        return template
    words = {"IMAGE": image_token, "VIDEO": image_token if video_token is None else video_token}
    parts = _EACH + _PICTURES + "{%- endif -%}{%- endfor -%}" + _EACH + "{%- " + _TEXTS + _DONE
    if not rules.images_first:
        parts = _EACH + _PICTURES + "{%- el" + _TEXTS + _DONE
    for name, word in words.items():
        parts = parts.replace(f"[{name}]", f"[{json.dumps(word, ensure_ascii=False)}]")
    return (
        "{%- set siglane = namespace(messages=[], parts=[], text='') -%}"
        "{%- for message in messages -%}"
        f"{{%- if message['role'] in {json.dumps(flat)} -%}}"
        "{%- set siglane.parts = [] -%}"
        "{%- if message['content'] is string -%}{%- set siglane.parts = [message['content']] -%}"
        f"{{%- elif message['content'] -%}}{parts}{{%- endif -%}}"
        f"{{%- set siglane.text = siglane.parts | join({json.dumps(rules.joint)}) -%}}"
        + _thoughts(rules.thinking_end)
        + ("{%- set siglane.text = siglane.text | trim -%}" if rules.strip_messages else "")
        + "{%- set siglane.messages = siglane.messages + [dict(message, content=siglane.text)] -%}"
        "{%- else -%}{%- set siglane.messages = siglane.messages + [message] -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- set messages = siglane.messages %}{{ '' }}" + template
    )


def _thoughts(end: str) -> str:
    """An assistant's turn without its reasoning (`chat.answer_alone`)."""
    if not end:
        return ""
    return (
        "{%- if message['role'] == 'assistant' -%}"
        f"{{%- set siglane.text = siglane.text.split({json.dumps(end)})[-1].lstrip('\\n') -%}}"
        "{%- endif -%}"
    )
