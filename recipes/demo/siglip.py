"""Trains the demo SigLIP from scratch: `python -m recipes.demo.siglip --out runs/siglip`.

The same code as `siglane train`, on scenes that are painted as they are needed: one to four coloured shapes and perhaps
a sign, with a caption that names all of them, some, or one. Then the run is measured on scenes of another seed. Last, a
fresh text tower is tuned on the locked image tower (SigLiT).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from recipes.demo.scenes import COLOURS, KINDS, Scene, Shape, draw, random_scene
from siglane.families.two_tower import LoadedTwoTower, load_two_tower
from siglane.nn.device import resolve_device
from siglane.settings.training import TrainConfig
from siglane.training.curve import CURVE, draw_curve
from siglane.training.evaluate import embed_classes, embed_pictures, linear_probe, probe_accuracy, zero_shot_accuracy
from siglane.training.files import write_json
from siglane.training.report import Skipped
from siglane.training.run import LOG, MODEL, open_run, train
from siglane.types import DecodedImage
from siglane.weights.hub import Checkpoint

LABELS = tuple(f"{colour} {kind}" for colour in COLOURS for kind in KINDS)
TEMPLATES = ("{}", "This is a photo of {}.", "A photo of {}.", "A picture of {}.", "An image of {}.", "There is {}.")
WITHOUT_ARTICLES = 0.25  # of the captions: tags are typed so
CLOSE_UP_SHARE = 0.25  # of the pictures, once the beginning is over
SINGLE_SHARE = 0.3  # of the other scenes have one shape
SINGLE_SIGN_SHARE = 0.2
SIZED_SHARE = 0.25  # of the shapes are named with their size
LENGTH, VOCAB_SIZE = 32, 512

CONFIG: dict[str, Any] = {
    "architectures": ["SiglipModel"],
    "model_type": "siglip",
    "dtype": "float32",
    "text_config": {
        "model_type": "siglip_text_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": LENGTH,
        "projection_size": 128,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_channels": 3,
        "image_size": 96,
        "patch_size": 12,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "attention_dropout": 0.0,
    },
}

RECIPE = TrainConfig(
    steps=2800, batch_size=128, learning_rate=2e-3, warmup=50, weight_decay=0.05, initial_bias=-math.log(128), seed=1
)  # fmt: skip
BEGINNING = 1200 * RECIPE.batch_size  # pairs
FIRST_SHARE, FIRST_DISTANCE = 0.3, 0.1  # of the beginning: as near, and captions of colour and kind alone
LOCKED_RECIPE = replace(RECIPE, steps=300, lock_image=True, fresh_text=True, seed=2)
HELD_OUT = 1000  # seed of the scenes for measuring


@dataclass(frozen=True, slots=True)
class PaintedPair:
    """Scene number `number` of a seed and what is said about it.

    distance: from which its shape is seen when the picture must be a close-up, 0 to 1; None when chance decides what
    the picture is. plain: the caption is the label.
    """

    seed: int
    number: int
    distance: float | None = None
    plain: bool = False

    @property
    def name(self) -> str:
        return f"scene {self.number} of seed {self.seed}"

    @property
    def caption(self) -> str:
        if self.plain:
            return "{0.colour} {0.kind}".format(self.scene().shapes[0])
        sized = 0.0 if self.near else SIZED_SHARE  # a close-up does not show how big its shape is
        return caption(self.scene(), self._rng(1), sized)

    @property
    def near(self) -> bool:
        return self.distance is not None or self._rng(2).random() < CLOSE_UP_SHARE

    def scene(self) -> Scene:
        rng = self._rng(0)
        if self.near:
            return random_scene(rng, shapes_wanted=1, sign_share=0.0)
        if rng.random() < SINGLE_SHARE:
            return random_scene(rng, shapes_wanted=1, sign_share=SINGLE_SIGN_SHARE)
        return random_scene(rng)

    def picture(self) -> DecodedImage:
        if not self.near:
            return decoded(draw(self.scene()))
        return decoded(close_up(self.scene(), 1.0 if self.distance is None else self.distance, self._rng(3)))

    def _rng(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.number, purpose])


@dataclass(frozen=True, slots=True)
class PaintedPairs:
    """`Pairs` of a seed without end.

    The first `beginning` pairs are close-ups of one shape, at first as near as can be and said in two words, then
    farther and farther: from where every shape fills its picture and every caption is its label two fresh towers find
    together what a shape is; from small shapes and long captions they learn the colours and stay there.
    """

    seed: int
    beginning: int = 0
    size: None = None

    def __getitem__(self, index: int, /) -> PaintedPair:
        if index >= self.beginning:
            return PaintedPair(self.seed, index)
        done = index / self.beginning
        if done < FIRST_SHARE:
            return PaintedPair(self.seed, index, FIRST_DISTANCE * done / FIRST_SHARE, plain=True)
        farther = (done - FIRST_SHARE) / (1 - FIRST_SHARE)
        return PaintedPair(self.seed, index, FIRST_DISTANCE + (1 - FIRST_DISTANCE) * farther)


def decoded(picture: Image.Image) -> DecodedImage:
    return DecodedImage.from_rgb(np.array(picture))


def close_up(scene: Scene, distance: float, rng: np.random.Generator) -> Image.Image:
    """A square cut at random out of the picture around its first shape; distance: 1 allows the whole picture, 0 only
    the shape."""
    shape, width, height = scene.shapes[0], *scene.canvas
    reach = 1.15 * shape.radius
    side = 2 * reach + rng.uniform(0, distance) * (min(width, height) - 2 * reach)
    lefts = (max(0.0, shape.x + reach - side), min(shape.x - reach, width - side))
    tops = (max(0.0, shape.y + reach - side), min(shape.y - reach, height - side))
    left, top = (low + rng.random() * (high - low) for low, high in (lefts, tops))
    return draw(scene).crop((round(left), round(top), round(left + side), round(top + side)))


def caption(scene: Scene, rng: np.random.Generator, sized: float = SIZED_SHARE) -> str:
    """Names all things of the scene (half of the captions), one of them, or any number; sized: share of the shapes that
    are named with their size."""
    things = [_named(shape, rng.random() < sized) for shape in scene.shapes] + (
        ["sign"] if scene.sign is not None else []
    )
    chance = rng.random()
    count = len(things) if chance < 0.5 else 1 if chance < 0.8 else int(rng.integers(1, len(things) + 1))
    chosen = [things[number] for number in rng.permutation(len(things))[:count]]
    if rng.random() >= WITHOUT_ARTICLES:
        chosen = [f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in chosen]
    listed = chosen[0] if count == 1 else ", ".join(chosen[:-1]) + " and " + chosen[-1]
    text = TEMPLATES[rng.integers(len(TEMPLATES))].format(listed)
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text


def _named(shape: Shape, sized: bool) -> str:
    return f"{shape.size} {shape.colour} {shape.kind}" if sized else f"{shape.colour} {shape.kind}"


def accuracies(two_tower: LoadedTwoTower, *, seed: int, pictures: int = 1024) -> dict[str, float]:
    """Zero-shot over the 32 labels on scenes of `seed`.

    single: pictures of one shape and no sign whose label comes first; several: two to four shapes, share of right ones
    among as many first labels as there are shapes; probe: single, by a ridge probe fitted to scenes of another seed.
    """
    classes = embed_classes(two_tower, LABELS)
    images, targets = _singles(two_tower, seed, pictures)
    found = {"single": zero_shot_accuracy(images, classes, targets)}
    scenes = [random_scene(np.random.default_rng([seed, 1, n]), shapes_wanted=2 + n % 3) for n in range(pictures // 2)]
    scores = embed_pictures(two_tower, (decoded(draw(scene)) for scene in scenes)) @ classes.T
    right = [
        len(_labels(scene) & set(row.topk(len(scene.shapes)).indices.tolist())) / len(scene.shapes)
        for scene, row in zip(scenes, scores, strict=True)
    ]
    found["several"] = sum(right) / len(right)
    probe = linear_probe(*_singles(two_tower, seed + 1, pictures), len(LABELS))
    return found | {"probe": probe_accuracy(probe, images, targets)}


def _singles(two_tower: LoadedTwoTower, seed: int, pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and labels of scenes of one shape and no sign."""
    rngs = (np.random.default_rng([seed, 0, number]) for number in range(pictures))
    scenes = [random_scene(rng, shapes_wanted=1, sign_share=0.0) for rng in rngs]
    targets = torch.tensor([min(_labels(scene)) for scene in scenes])
    return embed_pictures(two_tower, (decoded(draw(scene)) for scene in scenes)), targets


def _labels(scene: Scene) -> set[int]:
    return {LABELS.index(f"{shape.colour} {shape.kind}") for shape in scene.shapes}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m recipes.demo.siglip", description="Train the demo SigLIP.")
    parser.add_argument("--out", type=Path, required=True, help="folder for both runs and results.json")
    parser.add_argument("--resume", action="store_true", help="continue the runs in OUT")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this long; --resume continues")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    config = options.out / "config.json"
    write_json(config, CONFIG)
    results: dict[str, Any] = {}
    source: Checkpoint | Path = config
    for name, recipe, beginning in (("both", RECIPE, BEGINNING), ("text", LOCKED_RECIPE, 0)):
        out = options.out / name
        pairs = PaintedPairs(recipe.seed, beginning)
        trainer = open_run(source, pairs, out, recipe, device, resume=options.resume)
        train(trainer, pairs, out, skipped=Skipped(), store=torch.float16, minutes=options.minutes)
        if not trainer.done:
            print(f"step {trainer.step} of {trainer.steps} of {name}; --resume continues")
            return 0
        draw_curve(out / LOG, out / CURVE)
        source = Checkpoint(out / MODEL)
        results[name] = accuracies(load_two_tower(source, device=device, dtype=torch.float32), seed=HELD_OUT)
        print(name, json.dumps(results[name]))
    write_json(options.out / "results.json", results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
