"""Bee-8B: as R-4B, with a projector that is four times as wide in the middle."""

from __future__ import annotations

from siglane.verify.references.files import classes_in, read_json
from siglane.verify.references.r_4b import R4B
from siglane.verify.references.reference import ReferenceFamily


class Bee(R4B):
    widening = 4
    template = (  # vLLM's example of a prompt
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for part in m.content %}{% if part.type == 'image' %}{{ '<image>\n' }}{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}<|im_end|>{% endfor %}<|im_start|>assistant\n<think>{{ '\n' }}"
    )


FAMILY = ReferenceFamily(
    name="bee",
    speaks=True,
    matches=lambda folder: "BeeForConditionalGeneration" in classes_in(read_json(folder / "config.json")),
    load=Bee,
)
