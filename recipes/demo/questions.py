"""What one may ask about a scene, each question with the one right answer.

| kind     | asks                                                   | answers                         |
|----------|--------------------------------------------------------|---------------------------------|
| describe | What is in the picture?                                | a red circle, a star and a sign |
| count    | How many shapes / stars / red shapes are there?        | 0 to 4                          |
| colour   | What colour is the star?                               | red                             |
| shape    | What shape is red?                                     | star                            |
| size     | Is the red star big or small?                          | big                             |
| left     | Which is further left, ...? Which shape is left of ...? | the red circle, none            |
| exists   | Is there a red star / a star / anything red / a sign?  | yes, no                         |
| sign     | What does the sign say?                                | STOP, 207, there is no sign     |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from recipes.demo.scenes import COLOURS, KINDS, Scene, Shape

NO_SIGN = "there is no sign"


@dataclass(frozen=True, slots=True)
class Question:
    kind: str
    text: str
    answer: str


def ask(kind: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    """A random question of this kind; None when the scene has none (no shape is the only star, for "colour")."""
    found = _ASKERS[kind](scene, rng)
    if found is None:
        return None
    text, answer = found
    return Question(kind, text, answer)


def ask_any(scene: Scene, rng: np.random.Generator, weights: Sequence[float]) -> Question:
    """A random question of a random kind; weights: one probability per kind of `QUESTION_KINDS`."""
    while True:
        question = ask(QUESTION_KINDS[rng.choice(len(QUESTION_KINDS), p=weights)], scene, rng)
        if question is not None:
            return question


def typed_carelessly(text: str, rng: np.random.Generator) -> str:
    """As people type: now and then without the question mark or the capital."""
    if rng.random() < 0.15:
        text = text.rstrip("?.")
    return text[0].lower() + text[1:] if rng.random() < 0.15 else text


Asked = tuple[str, str] | None


def _describe(scene: Scene, rng: np.random.Generator) -> Asked:
    things = [f"{_article(shape.colour)} {shape.colour} {shape.kind}" for shape in scene.shapes]
    if scene.sign is not None:
        things.append("a sign")
    answer = things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]
    asked = _one_of(
        rng, "What is in the picture?", "What is in the image?", "What do you see?", "Describe the picture.",
        "Describe the image.", "What can you see in the picture?",
    )  # fmt: skip
    return asked, answer


def _count(scene: Scene, rng: np.random.Generator) -> Asked:
    which = rng.integers(3)
    if which == 0:
        noun, count = "shapes", len(scene.shapes)
    elif which == 1:
        kind = _mostly(rng, [shape.kind for shape in scene.shapes], KINDS)
        noun, count = f"{kind}s", sum(shape.kind == kind for shape in scene.shapes)
    else:
        colour = _mostly(rng, [shape.colour for shape in scene.shapes], tuple(COLOURS))
        noun, count = f"{colour} shapes", sum(shape.colour == colour for shape in scene.shapes)
    asked = _one_of(
        rng, "How many {} are there?", "How many {} are in the picture?", "How many {} do you see?", "Count the {}."
    )
    return asked.format(noun), str(count)


def _colour(scene: Scene, rng: np.random.Generator) -> Asked:
    shape = _only(scene, rng, lambda shape: shape.kind)
    if shape is None:
        return None
    asked = _one_of(rng, "What colour is the {}?", "What color is the {}?", "Which colour does the {} have?")
    return asked.format(shape.kind), shape.colour


def _shape(scene: Scene, rng: np.random.Generator) -> Asked:
    shape = _only(scene, rng, lambda shape: shape.colour)
    if shape is None:
        return None
    asked = _one_of(rng, "What shape is {}?", "Which shape is {}?", "What shape is the {} one?")
    return asked.format(shape.colour), shape.kind


def _size(scene: Scene, rng: np.random.Generator) -> Asked:
    shape = _pick(scene, rng)
    asked = _one_of(rng, "Is the {} big or small?", "How big is the {}?", "What size is the {}?")
    return asked.format(_name(shape)), shape.size


def _left(scene: Scene, rng: np.random.Generator) -> Asked:
    """Of the third shape and later there is no single neighbour to the left, so only the first two are asked about."""
    if rng.random() < 0.5 or len(scene.shapes) == 1:
        rank = int(rng.integers(min(2, len(scene.shapes))))
        asked = _one_of(
            rng, "Which shape is left of the {}?", "What is to the left of the {}?", "What is left of the {}?"
        )
        return asked.format(_name(scene.shapes[rank])), f"the {_name(scene.shapes[0])}" if rank else "nothing"
    first, second = rng.choice(len(scene.shapes), 2, replace=False)
    asked = _one_of(
        rng, "Which is further left, the {} or the {}?", "Which is left of the other, the {} or the {}?",
        "What is more to the left, the {} or the {}?",
    )  # fmt: skip
    text = asked.format(_name(scene.shapes[first]), _name(scene.shapes[second]))
    return text, f"the {_name(scene.shapes[min(first, second)])}"


def _exists(scene: Scene, rng: np.random.Generator) -> Asked:
    """Half of the questions are about something that is there; half of the others about nearly such a thing."""
    shape, there = _pick(scene, rng), rng.random() < 0.5
    which = rng.integers(5)
    if which == 0:
        thing, found = "a sign", scene.sign is not None
    elif which == 1:
        kind = shape.kind if there else _one_of(rng, *KINDS)
        thing, found = f"a {kind}", any(other.kind == kind for other in scene.shapes)
    elif which == 2:
        colour = shape.colour if there else _one_of(rng, *COLOURS)
        thing, found = f"anything {colour}", any(other.colour == colour for other in scene.shapes)
    else:
        kind, colour = shape.kind, shape.colour
        if not there:
            kind, colour = (_one_of(rng, *KINDS), colour) if rng.random() < 0.5 else (kind, _one_of(rng, *COLOURS))
        thing = f"{_article(colour)} {colour} {kind}"
        found = any((other.kind, other.colour) == (kind, colour) for other in scene.shapes)
    asked = _one_of(rng, "Is there {}?", "Is there {} in the picture?", "Do you see {}?", "Can you see {}?")
    return asked.format(thing), "yes" if found else "no"


def _sign(scene: Scene, rng: np.random.Generator) -> Asked:
    asked = _one_of(
        rng, "What does the sign say?", "Read the sign.", "What is written on the sign?", "What is on the sign?"
    )
    return asked, NO_SIGN if scene.sign is None else scene.sign.text


_ASKERS: dict[str, Callable[[Scene, np.random.Generator], Asked]] = {
    "describe": _describe,
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "left": _left,
    "exists": _exists,
    "sign": _sign,
}
QUESTION_KINDS = tuple(_ASKERS)


def _one_of(rng: np.random.Generator, *options: str) -> str:
    return options[rng.integers(len(options))]


def _mostly(rng: np.random.Generator, present: list[str], options: tuple[str, ...]) -> str:
    """Something in the scene three times out of four, else anything."""
    return _one_of(rng, *present) if rng.random() < 0.75 else _one_of(rng, *options)


def _pick(scene: Scene, rng: np.random.Generator) -> Shape:
    return scene.shapes[rng.integers(len(scene.shapes))]


def _only(scene: Scene, rng: np.random.Generator, key: Callable[[Shape], str]) -> Shape | None:
    """A shape that no other shape shares `key` with."""
    counts = Counter(key(shape) for shape in scene.shapes)
    alone = [shape for shape in scene.shapes if counts[key(shape)] == 1]
    return alone[rng.integers(len(alone))] if alone else None


def _name(shape: Shape) -> str:
    return f"{shape.colour} {shape.kind}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
