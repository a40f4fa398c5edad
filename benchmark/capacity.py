"""What one image costs, on paper: `python benchmark/capacity.py [--teraflops X] [--efficiency Y] [--size WxH]`.

Counts the multiply-adds of tower and projector for the released models in docs/examples (their configurations, no
weights) and divides a rate by them. efficiency: share of that rate the tower reaches; `benchmark/vision.py` measures
it on the machine it runs on. Prints a table; nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from siglane.config.images import ImageFacts
from siglane.config.projector import LinearLayer
from siglane.config.vision import VisionConfig
from siglane.families.registry import image_facts
from siglane.types import Grid, ImageLayout, Size
from siglane.weights.hub import Checkpoint

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
DENSE_H200 = 790.0  # TFLOP/s of bfloat16 matrix products that an H200 was seen to reach


def tower_flops(vision: VisionConfig, grids: Sequence[Grid]) -> float:
    """Of the patch embedding and every block that is run; each grid attends to itself."""
    width, inner = vision.hidden_size, vision.intermediate_size
    patches = sum(grid.area for grid in grids)
    embedding = 2 * patches * vision.num_channels * vision.patch_size**2 * width
    products = 2 * patches * (4 * width * width + 2 * width * inner)
    attention = sum(4 * grid.area**2 * width for grid in grids)
    return embedding + vision.depth * (products + attention)


def projector_flops(facts: ImageFacts, layout: ImageLayout) -> float:
    """Of the linear layers, and of the visual vocabulary's table where there is one."""
    projector = facts.projector
    rows = sum(grid.area for grid in layout.projected)
    weights = sum(layer.input_size * layer.output_size for layer in projector.layers if isinstance(layer, LinearLayer))
    if projector.vocabulary is not None:
        weights += projector.vocabulary.size * projector.output_size
    return 2 * rows * weights


def rows(sizes: Sequence[Size], teraflops: float, efficiency: float) -> list[list[str]]:
    table = [["model", "image", "tiles", "patches", "tokens", "TFLOP an image", "images/s"]]
    for folder in sorted(folder for folder in EXAMPLES.iterdir() if folder.is_dir()):
        facts = image_facts(Checkpoint(folder))
        for size in sizes:
            (layout,) = facts.layouts([size])
            cost = tower_flops(facts.vision, layout.grids) + projector_flops(facts, layout)
            table.append(
                [
                    folder.name,
                    f"{size.width}x{size.height}",
                    str(len(layout.tiles)),
                    str(layout.patches),
                    str(layout.image_tokens) if facts.projector.layers else "-",
                    f"{cost / 1e12:.2f}",
                    f"{teraflops * 1e12 * efficiency / cost:,.0f}",
                ]
            )
    return table


def size_of(text: str) -> Size:
    width, height = map(int, text.split("x"))
    return Size(width, height)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teraflops", type=float, default=DENSE_H200, help="dense products (default: %(default)s)")
    parser.add_argument("--efficiency", type=float, default=0.5, help="share the tower reaches (default: %(default)s)")
    parser.add_argument("--size", type=size_of, nargs="+", default=[Size(640, 480), Size(1920, 1080)])
    options = parser.parse_args()
    table = rows(options.size, options.teraflops, options.efficiency)
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for number, row in enumerate(table):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


if __name__ == "__main__":
    main()
