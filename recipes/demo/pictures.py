"""Paints the pictures that ship beside the demo model: `python -m recipes.demo.pictures --out python/siglane/demo`.

Writes pictures/*.png and pictures/questions.json, the questions and right answers per picture. `siglane demo` asks the
first.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recipes.demo.questions import QUESTION_KINDS, ask
from recipes.demo.scenes import Scene, draw, random_scene

# name -> (seed, what the sign says); chosen for their looks
PICTURES = {"hello": (734, "HELLO"), "cafe": (3749, "CAFE")}
SMOOTH = 4


def picture(name: str) -> Scene:
    seed, printed = PICTURES[name]
    return random_scene(np.random.default_rng([seed, 0]), printed)


def questions(name: str) -> list[dict[str, str]]:
    """One question of every kind that the scene has."""
    scene, rng = picture(name), np.random.default_rng([PICTURES[name][0], 1])
    found = [ask(kind, scene, rng) for kind in QUESTION_KINDS]
    return [{"question": question.text, "answer": question.answer} for question in found if question is not None]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m recipes.demo.pictures", description="Paint the demo's pictures.")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures/")
    folder = parser.parse_args(arguments).out
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    asked = {}
    for name in PICTURES:
        draw(picture(name), SMOOTH).save(folder / "pictures" / f"{name}.png", optimize=True)
        asked[f"{name}.png"] = questions(name)
    (folder / "pictures" / "questions.json").write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
