"""Writes the tables of docs/model_facts.md from the families themselves: `python docs/make_model_facts.py [--check]`.

Each folder of docs/examples/ holds the JSON files of a released model, no weights. The tables show what siglane's own
code reads from them, so that the page cannot say something else than the code does. --check only compares.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

from siglane.config.images import ImageFacts
from siglane.config.projector import ActivationLayer, NormLayer
from siglane.families.registry import image_facts
from siglane.types import ImageLayout, Size
from siglane.weights.hub import Checkpoint

HERE = Path(__file__).parent
PAGE = HERE / "model_facts.md"
SIZES = (Size(448, 448), Size(640, 480), Size(1920, 1080), Size(3000, 300), Size(1, 1), Size(17, 4000))


def examples() -> dict[str, ImageFacts]:
    return {
        folder.name: image_facts(Checkpoint(folder))
        for folder in sorted((HERE / "examples").iterdir())
        if folder.is_dir()
    }


def towers(known: dict[str, ImageFacts]) -> Iterable[list[str]]:
    yield ["model", "width, MLP, heads", "blocks run", "patch", "patch layout", "positions", "rotary", "post norm"]
    for name, facts in known.items():
        vision = facts.vision
        grid = vision.position_grid
        yield [
            name,
            f"{vision.hidden_size}, {vision.intermediate_size}, {vision.num_attention_heads}",
            f"{vision.depth} of {vision.num_hidden_layers}",
            str(vision.patch_size),
            vision.patch_layout,
            f"{grid.h}x{grid.w}, {vision.position_resize}" if grid.area else "none",
            "no" if vision.rope_theta is None else f"2-D, base {vision.rope_theta:g}",
            "yes" if vision.post_norm else "no",
        ]


def projectors(known: dict[str, ImageFacts]) -> Iterable[list[str]]:
    yield ["model", "merge", "layers", "output"]
    for name, facts in known.items():
        config = facts.projector
        if not config.layers:
            continue
        steps = [
            layer.activation if isinstance(layer, ActivationLayer)
            else f"norm {layer.eps:g}" if isinstance(layer, NormLayer)
            else f"{layer.input_size} to {layer.output_size}{'' if layer.bias else ' (no bias)'}"
            for layer in config.layers
        ]  # fmt: skip
        if config.vocabulary is not None:
            steps += ["softmax", f"mixture of {config.vocabulary.size} rows"]
        merge = config.merge if config.merge == "none" else f"{config.merge}, {config.factor}"
        yield [name, merge, ", ".join(steps), str(config.output_size)]


def pictures(known: dict[str, ImageFacts]) -> Iterable[list[str]]:
    yield ["model", "rule", "its numbers", "mean", "std"]
    for name, facts in known.items():
        rule = facts.preprocess.rule
        numbers = [f"{field.name} {_short(getattr(rule, field.name))}" for field in fields(rule)]  # type: ignore[arg-type]
        mean, std = (_short(values) for values in (facts.preprocess.mean, facts.preprocess.std))
        yield [name, type(rule).__name__, "; ".join(numbers), mean, std]


def counts(known: dict[str, ImageFacts]) -> Iterable[list[str]]:
    yield ["model", *(f"{size.width}x{size.height}" for size in SIZES)]
    for name, facts in known.items():
        yield [name, *(_count(facts.layouts([size])[0]) for size in SIZES)]


def _count(layout: ImageLayout) -> str:
    grid = layout.grids[0]
    shape = f"{grid.h}x{grid.w}" if len(layout.tiles) == 1 else f"{len(layout.tiles)} tiles"
    return f"{shape}: {layout.image_tokens}"


def _short(value: object) -> str:
    if isinstance(value, tuple):
        shown = [_short(part) for part in value]
        if len(shown) > 6:
            return f"{', '.join(shown[:2])} ... {shown[-1]} ({len(shown)})"
        return shown[0] if len(set(shown)) == 1 and len(shown) == 3 else f"({', '.join(shown)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


TABLES: dict[str, Callable[[dict[str, ImageFacts]], Iterable[list[str]]]] = {
    "towers": towers,
    "projectors": projectors,
    "pictures": pictures,
    "counts": counts,
}


def rewritten(page: str) -> str:
    """`page` with every table between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    known = examples()

    def table(found: re.Match[str]) -> str:
        head, *rows = TABLES[found[1]](known)
        lines = [head, ["---"] * len(head), *rows]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"<!-- table: {found[1]} -->\n{text}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", table, page, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of docs/model_facts.md.")
    parser.add_argument("--check", action="store_true", help="exit with 1 when the page is not up to date")
    check = parser.parse_args().check
    page = PAGE.read_text(encoding="utf-8")
    fresh = rewritten(page)
    if check and fresh != page:
        print(f"{PAGE} is out of date; run python docs/make_model_facts.py", file=sys.stderr)
        return 1
    if not check:
        PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
