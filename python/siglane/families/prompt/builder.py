"""Messages -> token ids: what the reference's template and tokenizer give, and a user's text is never more than text.

Two measures keep the roles apart. The reserved strings of messages are broken before the template runs
(`reserved.py`), so that those of the rendered prompt are all the template's own. The text between them is tokenised by
a copy of the tokenizer that has no added tokens (`writer.py`), so that no text can become a special id. Template text
beside a user's text is tokenised together with it, as in the reference.

An image takes part with its layout alone: pixels change nothing in a prompt.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from transformers import PreTrainedTokenizerFast

from siglane.config.video import VideoRule
from siglane.errors import UserError
from siglane.families.family import PromptRules
from siglane.families.prompt.messages import Parts, parts_of, without_trailing_space
from siglane.families.prompt.probe import roles_with_parts
from siglane.families.prompt.renderers import renderers
from siglane.families.prompt.reserved import ReservedStrings, new_mark
from siglane.families.prompt.template import checkpoint_template, self_contained, video_part, with_video
from siglane.families.prompt.tools import ToolFormat, check_tools, each_text, tool_format
from siglane.families.prompt.writer import PlainTokenizer, PromptWriter
from siglane.tiling.rule import no_video
from siglane.types import ImageLayout, ImagePart, Message, Prompt, Role, Tool

TEMPLATE_PARAMETERS = {*inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters, "messages"}


class PromptBuilder:
    """Makes the prompts of one checkpoint. ConfigError when its chat template cannot be used."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        rules: PromptRules,
        *,
        image_token: str,
        image_token_id: int,
        video: VideoRule | None = None,
    ) -> None:
        added = tokenizer.added_tokens_decoder
        self._tokenizer, self._rules = tokenizer, rules
        self._image_token, self._image_token_id, self._video = image_token, image_token_id, video
        # what stands for an image or video in a rendered prompt; a video's is only reserved where the model has one
        self._placeholders = (image_token,) if video is None else (image_token, video.token)
        self._special_ids = {token.content: number for number, token in added.items()}
        self._reserved = ReservedStrings(list(added.values()), *self._placeholders)
        self._plain = PlainTokenizer(tokenizer)
        template = rules.template or checkpoint_template(tokenizer.chat_template, rules.default_template)
        self._template = rules.prologue + with_video(template, rules.video_template)
        self._roles_with_parts = roles_with_parts(lambda turns: self._render(turns, {}, ()), image_token)

    def chat(
        self,
        messages: Sequence[Message],
        layouts: Sequence[ImageLayout],
        arguments: Mapping[str, Any],
        tools: Sequence[Tool] = (),
    ) -> Prompt:
        """The prompt of a conversation, up to where the assistant's answer begins.

        layouts: of images and videos, numbered together; arguments: extra variables of the chat template, each a
        string, number, boolean or None; tools: that the model is told of. UserError when the messages do not use each
        image exactly once, mix images and videos where the model reads one kind, or are refused by the template, and
        when it leaves tools, calls or results out.
        """
        conversation = [parts_of(message, self._rules) for message in messages]
        order = [part.image for parts in conversation for part in parts if isinstance(part, ImagePart)]
        if sorted(order) != list(range(len(layouts))):
            raise UserError(
                f"the messages refer to images {order} and the request holds {len(layouts)}; use each exactly once",
                code="image_count_mismatch",
                param="messages",
            )
        placeholders = [self._placeholder(layout) for layout in layouts]
        if self._video is not None and not self._video.with_images and len(set(placeholders)) > 1:
            message = "this model reads either images or videos in one request; send one kind"
            raise UserError(message, code="mixed_media", param="messages")
        mark, form = new_mark(), None
        if tools or any(message.tool_calls or message.role == "tool" for message in messages):
            check_tools(messages, tools, form := self.tools)
        turns = [
            self._turn(message, parts, placeholders, mark, form)
            for message, parts in zip(messages, conversation, strict=True)
        ]
        told = [each_text(tool.definition, partial(self._reserved.broken, mark=mark)) for tool in tools]
        fragments = self._reserved.split(self._render(turns, self._variables(arguments, mark), told), mark)
        endings = [parts[-1] for parts in conversation if parts and self._rules.strip_messages]
        ending = {part.image for part in endings if isinstance(part, ImagePart)}
        return self._written(fragments, self._images_at(fragments, placeholders, order), layouts, ending)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Of text behind other text, however it reads never a special token."""
        return tuple(self._plain.ids(text, first=False))

    def template(self) -> str:
        """The checkpoint's chat template for engines that render it themselves (`families/prompt/template.py`)."""
        video = None if self._video is None else self._video.token
        return self_contained(self._template, self._rules, self._roles_with_parts, self._image_token, video)

    def rendered(self, text: str, layouts: Sequence[ImageLayout]) -> Prompt:
        """The prompt of a conversation that `template()` has rendered; its placeholders stand for the images of
        `layouts` in order, images and videos counted apart.

        Special tokens written in `text` count, whoever wrote them: here nobody can tell the template's words from a
        user's. UserError when placeholders and images do not match one to one.
        """
        fragments = self._reserved.split(text, new_mark())
        placeholders = [self._placeholder(layout) for layout in layouts]
        images = self._images_at(fragments, placeholders, range(len(layouts)))
        ending = set()
        for place, image in images.items():
            behind, following = fragments[place + 1], "".join(fragments[place + 2 : place + 3])
            if self._rules.strip_messages and not behind and following not in self._placeholders:
                ending.add(image)
        return self._written(fragments, images, layouts, ending)

    def _written(
        self,
        fragments: Sequence[str],
        images: Mapping[int, int],
        layouts: Sequence[ImageLayout],
        ending: Collection[int],
    ) -> Prompt:
        """The ids of a rendered prompt. fragments: as `ReservedStrings.split` gives them; images: as `_images_at` does;
        ending: the images that end a message whose white space is stripped."""
        writer = PromptWriter(self._plain, self._special_ids, self._image_token_id)
        for place, fragment in enumerate(fragments):
            if place % 2 == 0:
                writer.text(fragment)
            elif place in images:
                pieces = layouts[images[place]].pieces
                writer.image(without_trailing_space(pieces) if images[place] in ending else pieces)
            else:
                writer.special(fragment)
        order = tuple(images.values())
        return Prompt(writer.finish(), tuple(writer.spans), tuple(layouts[image] for image in order), order)

    def _images_at(self, fragments: Sequence[str], placeholders: Sequence[str], order: Sequence[int]) -> dict[int, int]:
        """Number of the fragment -> number of its image, for every placeholder. UserError when they do not match one to
        one.

        placeholders: of each image; order: of the images in the messages. A template may put images before videos, but
        keeps the order within each kind.
        """
        waiting = {known: deque(n for n in order if placeholders[n] == known) for known in self._placeholders}
        for kind, placeholder in zip(("image", "video"), self._placeholders, strict=False):
            written = fragments[1::2].count(placeholder)  # not in the plain ones: there it is a user's text
            if written != len(waiting[placeholder]):
                raise UserError(
                    f"the chat template wrote {written} {kind} placeholders for {len(waiting[placeholder])} {kind}s",
                    code="chat_template_failed",
                    param="messages",
                )
        return {
            place: waiting[fragment].popleft()
            for place, fragment in enumerate(fragments)
            if place % 2 and fragment in waiting
        }

    def _placeholder(self, layout: ImageLayout) -> str:
        if not layout.frames:
            return self._image_token
        if self._video is None:
            raise no_video()
        return self._video.token

    @cached_property
    def tools(self) -> ToolFormat | None:
        """How the template writes tools' calls and results; None where it has no place for them."""
        content = self._content("user", ("?",), (), ""), self._content("assistant", (), (), "")
        turns = [{"role": role, "content": one} for role, one in zip(("user", "assistant"), content, strict=True)]
        return tool_format(lambda turns, tools: self._render(turns, {}, tools), *turns)

    def _turn(
        self, message: Message, parts: Parts, placeholders: Sequence[str], mark: str, tools: ToolFormat | None
    ) -> dict[str, Any]:
        """placeholders: of each image and video of the request; tools: where the messages hold any."""
        broken = partial(self._reserved.broken, mark=mark)
        turn: dict[str, Any] = {"role": message.role}
        turn["content"] = self._content(message.role, parts, placeholders, mark, tools)
        if tools is not None and message.tool_calls:
            turn["tool_calls"] = [tools.call(call, broken) for call in message.tool_calls]
        stated = {"tool_call_id": message.tool_call_id, "name": message.name}
        return turn | {key: broken(value) for key, value in stated.items() if value}

    def _content(
        self, role: Role, parts: Parts, placeholders: Sequence[str], mark: str, tools: ToolFormat | None = None
    ) -> str | list[dict[str, str]]:
        as_parts = role in self._roles_with_parts if tools is None or role != "tool" else tools.content_as_parts
        if not as_parts:
            return self._rules.joint.join(
                self._reserved.broken(part, mark) if isinstance(part, str) else placeholders[part.image]
                for part in parts
            )
        video = video_part(self._rules)
        return [
            {"type": "text", "text": self._reserved.broken(part, mark)}
            if isinstance(part, str)
            else ({"type": "image"} if placeholders[part.image] == self._image_token else video)
            for part in parts or ("",)  # templates look at the first part
        ]

    def _variables(self, arguments: Mapping[str, Any], mark: str) -> dict[str, Any]:
        for name, value in arguments.items():
            if name in TEMPLATE_PARAMETERS or not isinstance(value, str | int | float | bool | None):
                raise UserError(
                    f"chat_template_kwargs: {name!r} cannot be set; give the template's own variables as strings, "
                    "numbers or booleans",
                    code="invalid_chat_template_kwargs",
                    param="chat_template_kwargs",
                )
        return {
            name: self._reserved.broken(value, mark) if isinstance(value, str) else value
            for name, value in arguments.items()
        }

    def _render(
        self, turns: list[dict[str, Any]], variables: Mapping[str, Any], tools: Sequence[dict[str, Any]]
    ) -> str:
        """What transformers' `apply_chat_template` gives, in a process that can be ended. UserError as `Renderers`."""
        prompt = {"messages": turns, "tools": list(tools) or None, "documents": None, "add_generation_prompt": True}
        return renderers().render(self._template, {**self._tokenizer.special_tokens_map, **variables, **prompt})
