"""More patches read smaller print: `python benchmark/pixel_budget.py [MODEL]`.

The native-resolution demo model reads signs of two print sizes under a row of pixel budgets (`max_pixels` of each
image). Every word of the list is printed once per size; pictures and questions go through `siglane.LLM` as a user's
would. Prints a table, writes benchmark/results/pixel_budget.json and pixel_budget.png and exits with 1 when the largest
budget does not read clearly more of either print than the smallest.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from machine import description

from siglane import LLM, SamplingParams
from siglane.types import Size

sys.path.append(str(Path(__file__).parents[1]))  # recipes/ is no part of the installed package

from recipes.demo.native import PRINT_SCALES
from recipes.demo.scenes import WORDS, draw, random_scene

BUDGETS = tuple(side * side for side in (96, 128, 160, 192, 256, 320, 384))
CANVAS = Size(384, 384)
CLEARLY = 0.3
RESULTS = Path(__file__).parent / "results"


def measure(model: LLM, scale: float, words: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    """One row per budget: patches of a picture, and the share of words read exactly."""
    rng = np.random.default_rng([seed, round(100 * scale)])
    pictures = [draw(random_scene(rng, word, CANVAS, scale)) for word in words]
    rows = []
    for budget in BUDGETS:
        prompts = [
            {"prompt": "What does the sign say?", "images": [{"image": picture, "max_pixels": budget}]}
            for picture in pictures
        ]
        answers = model.generate(prompts, SamplingParams(max_tokens=16), errors="raise")
        right = sum(answer.text == word for answer, word in zip(answers, words, strict=True))
        tokens = answers[0].usage.image_tokens
        rows.append(
            {"max_pixels": budget, "patches": 4 * tokens, "tokens": tokens, "share": round(right / len(words), 3)}
        )
    return rows


def plot(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    for (name, rows), colour in zip(curves.items(), ("#2a6fb0", "#d1662c"), strict=True):
        axis.plot([row["patches"] for row in rows], [row["share"] for row in rows], "o-", color=colour, label=name)
    axis.set(
        xscale="log", ylim=(-0.03, 1.03), xlabel="patches of the picture (pixel budget / 256)", ylabel="words read"
    )
    axis.set_xticks([row["patches"] for row in next(iter(curves.values()))])
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(title="height of a letter, in a picture of 384 pixels", frameon=False)
    axis.set_title("More patches read smaller print")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Words read by the native-resolution demo model against its pixel budget."
    )
    parser.add_argument("model", nargs="?", default="demo-native", help="folder (default: the shipped model)")
    parser.add_argument("--words", type=int, default=len(WORDS), help="how many of the list (default: all)")
    parser.add_argument("--seed", type=int, default=1000, help="training uses 1 and 2")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    model, words = LLM(options.model), WORDS[: options.words]
    curves: dict[str, list[dict[str, Any]]] = {}
    for scale in PRINT_SCALES:
        letters = f"{0.72 * 1.02 * 0.113 * CANVAS.height * scale:.0f} pixels"
        curves[letters] = measure(model, scale, words, options.seed)
        for row in curves[letters]:
            print(f"{letters:10} {row['max_pixels']:7} pixels {row['patches']:4} patches  {row['share']:6.1%}")
    gains = {name: rows[-1]["share"] - rows[0]["share"] for name, rows in curves.items()}
    result = {
        "command": f"benchmark/pixel_budget.py {options.model} --words {options.words} --seed {options.seed}",
        "machine": description(),
        "curves": curves,
        "passed": min(gains.values()) >= CLEARLY,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "pixel_budget.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(curves, options.out / "pixel_budget.png")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
