"""The chat template of a checkpoint, and one that needs no help: what `messages.py` does in Python, written in Jinja.

Other engines render templates themselves. The one that `self_contained` makes takes messages as the OpenAI API has them
(a text, a list of text and media parts, or no content at all), applies the family's `PromptRules`, and hands the
checkpoint's own template what it expects. What it cannot do is keep a user's text apart from special tokens: that needs
the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import get_args

from siglane.errors import ConfigError
from siglane.families.family import PromptRules
from siglane.types import Role

ROLES = frozenset(get_args(Role)) - {"tool"}

_MEDIA_FIRST = (
    "{%- set siglane.parts = (siglane.parts | rejectattr('type', 'equalto', 'text') | list)"
    " + (siglane.parts | selectattr('type', 'equalto', 'text') | list) -%}"
)


def checkpoint_template(found: str | dict[str, str] | None, default: str) -> str:
    """The template to use. found: the tokenizer's, by name when it has several; default: where it has none. ConfigError
    when none of several is the default one, or there is none at all."""
    if isinstance(found, dict):
        if "default" not in found:
            raise ConfigError(f"the tokenizer has the chat templates {', '.join(sorted(found))} and none is 'default'")
        return found["default"]
    if not found and not default:
        raise ConfigError(
            "the tokenizer has no chat template, and nothing else says how this model is spoken to; put its template "
            "into the folder as chat_template.jinja"
        )
    return found or default


def video_part(rules: PromptRules) -> dict[str, str]:
    """What a template gets where a message has a video."""
    return {"type": "text", "text": rules.video_text} if rules.video_text else {"type": "video"}


def with_video(template: str, video_template: str) -> str:
    """`template`, but `video_template` for conversations with a video where there is one."""
    if not video_template:
        return template
    return (
        "{%- set siglane_media = namespace(video=false) -%}"
        "{%- for message in messages if message['content'] is not string -%}"
        "{%- if message['content'] | selectattr('type', 'equalto', 'video') | list -%}"
        "{%- set siglane_media.video = true -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        # Jinja drops one line feed behind a block and one at the end of a template
        "{%- if siglane_media.video %}\n" + video_template.removesuffix("\n") + "{% else %}\n"
        + template.removesuffix("\n") + "{% endif %}"
    )  # fmt: skip


def self_contained(
    template: str, rules: PromptRules, roles_with_parts: Collection[Role], image_token: str, video_token: str | None
) -> str:
    """`template` behind Jinja code that applies `rules` to the messages.

    roles_with_parts: those whose content `template` takes as a list; any other's becomes a text in which `image_token`
    and `video_token` stand for the media. A role that siglane does not know (`tool`) is a list where all of ours are.
    """
    return (
        "{%- set siglane = namespace(messages=[], parts=[], kept=[], content='') -%}"
        "{%- for message in messages -%}"
        + _parts(_quoted(video_part(rules)))
        + _thoughts(rules.thinking_end)
        + (_MEDIA_FIRST if rules.images_first else "")
        + (_stripped("lstrip()") + _stripped("rstrip()", " | reverse | list") if rules.strip_messages else "")
        + "{%- set siglane.content = siglane.parts or [{'type': 'text', 'text': ''}] -%}"
        + ("" if set(roles_with_parts) >= ROLES else _joined(roles_with_parts, rules.joint, image_token, video_token))
        + "{%- set siglane.messages = siglane.messages + [dict(message, content=siglane.content)] -%}"
        "{%- endfor -%}"
        # Jinja drops one line feed behind a block, and `template` still begins a line, as it does alone
        "{%- set messages = siglane.messages %}\n" + template
    )


def _parts(video: str) -> str:
    """Any content -> a list of parts. What a loop sets is forgotten behind it, only attributes of a namespace stay; the
    name `siglane` cannot clash with a template's own. video: of the list, where the content has one."""
    return (
        "{%- set siglane.parts = [] -%}"
        "{%- if message['content'] is string -%}"
        "{%- set siglane.parts = [{'type': 'text', 'text': message['content']}] -%}"
        "{%- elif message['content'] -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part['type'] in ['image', 'image_url'] -%}"
        "{%- set siglane.parts = siglane.parts + [{'type': 'image'}] -%}"
        "{%- elif part['type'] in ['video', 'video_url'] -%}"
        f"{{%- set siglane.parts = siglane.parts + [{video}] -%}}"
        "{%- elif part['type'] == 'text' -%}"
        "{%- set siglane.parts = siglane.parts + [{'type': 'text', 'text': part['text'] or ''}] -%}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- endif -%}"
    )


def _thoughts(end: str) -> str:
    """An assistant's turn without its reasoning (`messages.answer_alone`)."""
    if not end:
        return ""
    return (
        "{%- if message['role'] == 'assistant' -%}"
        "{%- set siglane.kept = [] -%}"
        "{%- for part in siglane.parts -%}"
        f"{{%- if part['type'] == 'text' and {_quoted(end)} in part['text'] -%}}"
        f"{{%- set siglane.kept = [{{'type': 'text', 'text': part['text'].split({_quoted(end)})[-1]}}] -%}}"
        "{%- else -%}{%- set siglane.kept = siglane.kept + [part] -%}{%- endif -%}"
        "{%- endfor -%}"
        "{%- set siglane.parts = siglane.kept -%}" + _stripped("lstrip('\\n')") + "{%- endif -%}"
    )


def _stripped(method: str, order: str = "") -> str:
    """Texts at one end of a message lose what `method` takes off, and are dropped when nothing is left."""
    return (
        "{%- set siglane.kept = [] -%}"
        f"{{%- for part in siglane.parts{order} -%}}"
        "{%- if siglane.kept or part['type'] != 'text' -%}{%- set siglane.kept = siglane.kept + [part] -%}"
        f"{{%- elif part['text'].{method} -%}}"
        f"{{%- set siglane.kept = [{{'type': 'text', 'text': part['text'].{method}}}] -%}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        f"{{%- set siglane.parts = siglane.kept{order} -%}}"
    )


def _joined(roles_with_parts: Collection[Role], joint: str, image_token: str, video_token: str | None) -> str:
    """One text of the parts, for the other roles."""
    words = {"image": image_token, "video": image_token if video_token is None else video_token}
    return (
        f"{{%- if message['role'] not in {_quoted(sorted(roles_with_parts))} -%}}"
        "{%- set siglane.kept = [] -%}"
        "{%- for part in siglane.parts -%}"
        f"{{%- set siglane.kept = siglane.kept + [{_quoted(words)}.get(part['type'], part['text'])] -%}}"
        "{%- endfor -%}"
        f"{{%- set siglane.content = siglane.kept | join({_quoted(joint)}) -%}}"
        "{%- endif -%}"
    )


def _quoted(value: object) -> str:
    """A text, list or dict as Jinja writes it, which is JSON."""
    return json.dumps(value, ensure_ascii=False)
