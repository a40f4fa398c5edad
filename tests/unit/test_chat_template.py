"""The chat template for engines that render it themselves: with `rendered_prompt` behind it, the same prompt that
siglane makes of the messages, for every family and every kind of template."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
from checkpoints import build_tokenizer, write_nvila_checkpoint
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from idefics3_checkpoint import KINDS, write_idefics3_checkpoint
from llava_onevision_checkpoint import HUB_TEMPLATE, write_llava_onevision_checkpoint
from nanovlm_checkpoint import ERAS, write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint
from video_llama_3_checkpoint import LAYOUTS, write_video_llama_3_checkpoint

from siglane.errors import UserError
from siglane.families.family import PromptRules
from siglane.families.processor import Processor, load_processor
from siglane.families.prompt.template import self_contained
from siglane.types import ImageLayout, ImagePart, Medium, Message, Role, Size, VideoSize
from siglane.weights.hub import open_checkpoint

Kind = Literal["image", "video"]
Content = str | list[str | Kind]

IMAGE, VIDEO = "@image", "@video"


def parts_template(image: str, video: str) -> str:
    """Takes every role's content as a list and keeps its order."""
    return (
        "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{%- for part in message['content'] -%}"
        f"{{%- if part['type'] == 'image' -%}}{{{{ '{image}' }}}}"
        f"{{%- elif part['type'] == 'video' -%}}{{{{ '{video}' }}}}"
        "{%- else -%}{{ part['text'] }}{%- endif -%}"
        "{%- endfor -%}{{ '<|im_end|>\n' }}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )


# only the user's turns are lists: what a template author tried with pictures
USERS_PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ '\n' }}"
    "{% if message['role'] == 'user' and message['content'] is not string %}{% for part in message['content'] %}"
    "{{ {'image': '<image>', 'video': '<vila/video>'}[part['type']] or part['text'] }}"
    "{% endfor %}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

VILA_PARTS = parts_template("<image>", "<vila/video>")
WRITERS: dict[str, Callable[[Path], object]] = {
    **{f"nvila {layout}": partial(write_nvila_checkpoint, layout=layout) for layout in ("folders", "hf", "vila")},
    "nvila with scales": partial(write_nvila_checkpoint, layout="hf", lite=False),
    "nvila without media tokens": partial(write_nvila_checkpoint, media_in_tokenizer=False),
    "nvila folders, parts": partial(write_nvila_checkpoint, chat_template=VILA_PARTS),
    "nvila folders, a user's parts": partial(write_nvila_checkpoint, chat_template=USERS_PARTS),
    "nvila hf, parts": partial(write_nvila_checkpoint, layout="hf", chat_template=VILA_PARTS),
    "llava_onevision": write_llava_onevision_checkpoint,
    "llava_onevision of the hub": partial(write_llava_onevision_checkpoint, chat_template=HUB_TEMPLATE),
    "ovis2_5": write_ovis2_5_checkpoint,
    "ovis2_5 that does not think": partial(write_ovis2_5_checkpoint, thinking=False),
    "ovis2_5, parts": partial(write_ovis2_5_checkpoint, chat_template=parts_template("<image>", "<video>")),
    **{f"nanovlm {era}": partial(write_nanovlm_checkpoint, era=era) for era in ERAS},
    **{f"idefics3 {kind}": partial(write_idefics3_checkpoint, kind=kind) for kind in KINDS},
    "video_llama_3": write_video_llama_3_checkpoint,
    **{
        f"{layout}, its template": partial(write_video_llama_3_checkpoint, layout=layout, template=True)
        for layout in LAYOUTS
    },
    "nanovlm, parts": partial(
        write_nanovlm_checkpoint, flags={"lm_chat_template": parts_template("<|image|>", "<|video|>")}
    ),
}
THINKS = ("ovis2_5", "ovis2_5, parts", "ovis2_5 that does not think")

WORDS = (
    "Hello", "What is it?", "the", "'s", "1", "é", "猫", "😀", "<", "|", "[1]", "\\n", "'", '"', "{{", "{%", "type",
    " ", "  ", "\t", "\n", "\n\n", " \n", "\u00a0", "\u2003",
)  # fmt: skip
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=6).map("".join)
contents = texts | st.lists(texts | st.just(IMAGE) | st.just(VIDEO), max_size=5)
answers = texts | st.lists(texts, max_size=3)
sizes = st.sampled_from([Size(90, 50), Size(20, 30), Size(140, 130)])


@dataclass(frozen=True)
class Conversation:
    """turns: role and content; media: sizes for the pictures and clips, more than there can be."""

    turns: tuple[tuple[Role, Any], ...]
    media: tuple[Size, ...] = (Size(90, 50),) * 40


@st.composite
def conversations(draw: st.DrawFn, thoughts: bool) -> Conversation:
    turns: list[tuple[Role, Any]] = [("system", draw(answers))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        answer = draw(answers)
        if thoughts and draw(st.booleans()):
            answer = with_thought(draw(texts), answer)
        turns += [("user", draw(contents)), ("assistant", answer)]
    turns.append(("user", draw(contents)))
    return Conversation(tuple(turns), tuple(draw(st.lists(sizes, min_size=30, max_size=30))))


def with_thought(thought: str, answer: Any) -> Any:
    """Reasoning in front of the answer, or in parts of its own."""
    if isinstance(answer, str):
        return f"<think>{thought}</think>{answer}"
    return [f"<think>{thought}", "</think>", *answer]


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Processor]:
    found = {}
    for number, (name, write) in enumerate(WRITERS.items()):
        folder = tmp_path_factory.mktemp(f"checkpoint{number}")
        write(folder)
        found[name] = load_processor(open_checkpoint(folder))
    return found


def both(
    processor: Processor, conversation: Conversation, *, pictures_first: bool
) -> tuple[list[Message], list[dict[str, Any]], tuple[ImageLayout, ...]]:
    """The conversation for siglane and for an engine. pictures_first: whether a request names its media by kind, or as
    they come."""
    video = processor.facts.video
    kept = [
        (role, content if isinstance(content, str) else [p for p in content if p != VIDEO or video is not None])
        for role, content in conversation.turns
    ]
    if video is not None and not video.with_images and any(IMAGE in content for _, content in kept):
        kept = [(role, c if isinstance(c, str) else [p for p in c if p != VIDEO]) for role, c in kept]
    found = [part for _, content in kept if not isinstance(content, str) for part in content if part in (IMAGE, VIDEO)]
    order = sorted(range(len(found)), key=lambda n: found[n] == VIDEO) if pictures_first else list(range(len(found)))
    media: list[Medium] = [
        conversation.media[n] if found[n] == IMAGE else VideoSize(conversation.media[n], 2) for n in order
    ]
    numbers = iter([order.index(n) for n in range(len(found))])
    messages, turns = [], []
    for role, content in kept:
        if isinstance(content, str):
            messages.append(Message(role, (content,)))
            turns.append({"role": role, "content": content})
            continue
        parts = tuple(ImagePart(next(numbers)) if part in (IMAGE, VIDEO) else part for part in content)
        messages.append(Message(role, parts))
        turns.append({"role": role, "content": [as_part(part) for part in content]})
    return messages, turns, processor.layouts(media)


def as_part(part: str) -> dict[str, str]:
    return {IMAGE: {"type": "image"}, VIDEO: {"type": "video"}}.get(part, {"type": "text", "text": part})


def render(processor: Processor, turns: list[dict[str, Any]]) -> str:
    rendered = processor.tokenizer.apply_chat_template(
        turns, chat_template=processor.chat_template(), tokenize=False, add_generation_prompt=True
    )
    assert isinstance(rendered, str)
    return rendered


def check(processor: Processor, conversation: Conversation, pictures_first: bool) -> None:
    messages, turns, layouts = both(processor, conversation, pictures_first=pictures_first)
    expected = processor.prompt(messages, layouts)
    text = render(processor, turns)
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    if unicodedata.is_normalized("NFC", text):
        assert processor.tokenizer.decode(ids) == text
    if not layouts:
        assert tuple(ids) == expected.token_ids
    found = processor.rendered_prompt(text, layouts)
    assert found.token_ids == expected.token_ids
    assert found.spans == expected.spans
    assert found.order == expected.order
    assert found.layouts == expected.layouts == found.in_order(layouts)


@pytest.mark.few(
    "nvila folders", "nvila with scales", "nvila hf, parts", "llava_onevision of the hub", "ovis2_5",
    "ovis2_5, parts", "nanovlm 0.1", "nanovlm current", "idefics3 smolvlm2", "idefics3 docling", "video_llama_3",
    "authors, its template",
)  # fmt: skip
@pytest.mark.parametrize("name", WRITERS)
def test_an_engines_prompt_is_siglanes(processors: dict[str, Processor], name: str) -> None:
    processor = processors[name]

    @given(conversation=conversations(thoughts=name in THINKS), pictures_first=st.booleans())
    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @example(Conversation((("user", "Hello"),)), True)
    @example(Conversation((("user", [IMAGE]),)), True)
    @example(Conversation((("user", ["What?", IMAGE]), ("assistant", "A cat."), ("user", [" ", IMAGE, "\n"]))), True)
    @example(Conversation((("user", [IMAGE, IMAGE]), ("assistant", ""), ("user", ["a", IMAGE, IMAGE]))), True)
    @example(Conversation((("user", [VIDEO, "a", IMAGE, "b", VIDEO, IMAGE]),)), False)
    @example(Conversation((("user", [VIDEO, "a", IMAGE, "b", VIDEO, IMAGE]),)), True)
    @example(Conversation((("user", []), ("assistant", ["", "\n", "x"]), ("user", ["", "", IMAGE, ""]))), True)
    @example(Conversation((("system", [" Be brief. ", "\n"]), ("user", ["\n", " a ", IMAGE, " b ", "\n"]))), True)
    def same(conversation: Conversation, pictures_first: bool) -> None:
        check(processor, conversation, pictures_first)

    same()


@pytest.mark.parametrize("name", THINKS)
@pytest.mark.parametrize(
    "answer",
    [
        "<think>\nHm.\n</think>\n\nA cat.",
        ["<think>\nHm.\n</think>\n\n", "A cat."],
        ["<think>\nHm.", "</think>", "\n", "\n\nA cat.", "\n"],
        ["\n", "A cat."],
        ["", "A", "cat."],
        ["<think>a</think>b", "<think>c</think>"],
    ],
)
def test_what_a_model_thought_is_left_out(processors: dict[str, Processor], name: str, answer: Any) -> None:
    turns: tuple[tuple[Role, Any], ...] = (("user", [IMAGE, "What?"]), ("assistant", answer), ("user", "And now?"))
    check(processors[name], Conversation(turns), True)


@pytest.mark.parametrize("name", WRITERS)
def test_a_prompt_that_an_engine_decoded_from_its_ids(processors: dict[str, Processor], name: str) -> None:
    """SGLang keeps a rendered prompt as ids: what the tokenizer normalised on the way there is the same prompt."""
    processor = processors[name]
    turns: tuple[tuple[Role, Any], ...] = (("user", [IMAGE, "Cafe\u0301 \u212b\n\n", IMAGE, "\n"]),)
    messages, given, layouts = both(processor, Conversation(turns), pictures_first=True)
    text = render(processor, given)
    decoded = processor.tokenizer.decode(processor.tokenizer.encode(text, add_special_tokens=False))
    assert decoded != text
    assert processor.rendered_prompt(decoded, layouts).token_ids == processor.prompt(messages, layouts).token_ids


@pytest.mark.parametrize("name", WRITERS)
class TestErrors:
    IMAGES = (Size(20, 30), Size(90, 50))

    def text(self, processor: Processor, *parts: str) -> str:
        return render(processor, [{"role": "user", "content": [as_part(part) for part in parts]}])

    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few_or_too_many_images(self, processors: dict[str, Processor], name: str, count: int) -> None:
        processor = processors[name]
        layouts = processor.layouts(self.IMAGES[:count])
        with pytest.raises(UserError, match=f"wrote 2 image placeholders for {count} images") as caught:
            processor.rendered_prompt(self.text(processor, IMAGE, "What?", IMAGE), layouts)
        assert caught.value.param == "messages"
        with pytest.raises(UserError, match=f"wrote 0 image placeholders for {count + 1} images"):
            processor.rendered_prompt(self.text(processor, "What?"), processor.layouts(self.IMAGES[: count + 1]))

    def test_a_placeholder_in_a_users_text(self, processors: dict[str, Processor], name: str) -> None:
        processor = processors[name]
        written = f"What is {processor.config.image_token}?"
        with pytest.raises(UserError, match="wrote 1 image placeholders for 0 images"):
            processor.rendered_prompt(self.text(processor, written), [])
        with pytest.raises(UserError, match="wrote 2 image placeholders for 1 images"):
            processor.rendered_prompt(self.text(processor, IMAGE, written), processor.layouts(self.IMAGES[:1]))

    def test_too_few_or_too_many_videos(self, processors: dict[str, Processor], name: str) -> None:
        processor = processors[name]
        if processor.facts.video is None:
            with pytest.raises(UserError, match="images, not videos"):
                processor.layouts([VideoSize(Size(20, 30), 2)])
            return
        with pytest.raises(UserError, match="wrote 1 video placeholders for 0 videos"):
            processor.rendered_prompt(self.text(processor, VIDEO), [])
        with pytest.raises(UserError, match="wrote 0 video placeholders for 1 videos"):
            processor.rendered_prompt(self.text(processor, "What?"), processor.layouts([VideoSize(Size(20, 30), 2)]))


@pytest.mark.parametrize("name", WRITERS)
class TestMessagesOfTheApi:
    def test_no_content_is_no_text(self, processors: dict[str, Processor], name: str) -> None:
        processor = processors[name]
        question, more = {"role": "user", "content": "What?"}, {"role": "user", "content": "More?"}
        empty = render(processor, [question, {"role": "assistant", "content": ""}, more])
        for answer in ({"content": None}, {}, {"content": []}, {"content": [{"type": "text", "text": None}]}):
            assert render(processor, [question, {"role": "assistant", **answer}, more]) == empty
        for role in ("system", "user"):
            rendered = render(processor, [{"role": role, "content": None}, more])
            assert rendered == render(processor, [{"role": role, "content": ""}, more])
            assert "None" not in rendered

    def test_extra_keys_change_nothing(self, processors: dict[str, Processor], name: str) -> None:
        processor = processors[name]
        parts = [{"type": "image_url", "image_url": {"url": "x", "detail": "low"}}, {"type": "text", "text": "What?"}]
        extra = {"name": "someone", "tool_calls": [{"id": "1"}], "reasoning_content": None, "refusal": None}
        found = render(processor, [{"role": "user", "content": parts, **extra}])
        assert found == render(processor, [{"role": "user", "content": [{"type": "image"}, parts[1]]}])

    def test_another_role_is_read_like_the_others(self, processors: dict[str, Processor], name: str) -> None:
        content = [{"type": "text", "text": "It is"}, {"type": "text", "text": "42."}]
        processor = processors[name]
        rendered = render(processor, [{"role": "user", "content": "?"}, {"role": "tool", "content": content}])
        assert "'type'" not in rendered
        assert "It is" in rendered
        assert "42." in rendered


PLAIN_RULES = PromptRules(default_template="", strip_messages=False)


@pytest.mark.parametrize(
    "template",
    [
        "\n{{ messages[0]['content'] }}",
        "  {% if messages %}{{ messages[0]['content'] }}{% endif %}",
        " {%- if messages %}  {{ messages[0]['content'] }}{% endif %}",
        "{% if messages %}\n  {{ messages[0]['content'] }}\n{% endif %}\n",
        " \n  {# nothing #}\n{{ messages[-1]['content'] }}\n\n",
        "{% macro last() %}{{ messages[-1]['content'] }}{% endmacro %}{{ last() }}{{ messages | length }}",
        "{% set rest = messages[1:] %}{% for part in rest %}{{ part['content'] }}{% endfor %}",
        "{{ siglane_is_not_touched is defined }} {{ parts is defined }} {{ text is defined }}",
    ],
)
def test_a_checkpoints_template_writes_what_it_writes_alone(template: str) -> None:
    tokenizer = build_tokenizer()
    turns = [{"role": "user", "content": " a \n"}, {"role": "assistant", "content": "b"}]
    wrapped = self_contained(template, PLAIN_RULES, (), "<image>", None)
    alone, found = (
        tokenizer.apply_chat_template(turns, chat_template=text, tokenize=False) for text in (template, wrapped)
    )
    assert found == alone
    assert turns == [{"role": "user", "content": " a \n"}, {"role": "assistant", "content": "b"}]


def test_words_with_quotes_and_backslashes_stay_as_they_are() -> None:
    """`image_token` and `thinking_end` are a checkpoint's own words."""
    odd = "\"'\\n\\u0041{{é猫}}"
    rules = PromptRules(default_template="", strip_messages=False, joint="\\'\n", thinking_end=odd)
    template = self_contained("{{ messages[0]['content'] }}", rules, (), odd, None)
    turns = [{"role": "assistant", "content": [as_part(f"no {odd}\nyes"), as_part(IMAGE)]}]
    found = build_tokenizer().apply_chat_template(turns, chat_template=template, tokenize=False)
    assert found == f"yes\\'\n{odd}"
