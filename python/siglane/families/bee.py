"""Bee-8B: LLaVA-OneVision with Qwen3, a norm in front of the projector and a wide middle in it; it always thinks first.

Sources: vLLM 0.32 models/bee.py and its example of a prompt; formats.md section 6.
"""

from __future__ import annotations

from siglane.families.family import PromptRules
from siglane.families.files import THINK_END
from siglane.families.r_4b import R4B
from siglane.weights.hub import Checkpoint

# no line feed behind the last turn, and the answer begins inside the reasoning
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message['role'] ~ '\n' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% if not loop.last %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


class Bee(R4B):
    name = "bee"
    known_as = ("BeeForConditionalGeneration",)
    widening = 4

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        return PromptRules(default_template=CHAT_TEMPLATE, strip_messages=False, thinking_end=THINK_END)
