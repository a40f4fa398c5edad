"""What a block of the 8-bit tower costs, part by part.

    python benchmark/tower_parts.py [--threads 2] [--layers 4] [--repeats 15]

SigLIP-so400m's width, a picture of 24x24 patches, random weights. Each part is called by itself, in all blocks in a
row, so that weights come from where they come from in a forward; parts take turns. Milliseconds of the clock for one
block: the least and the median. "all" is the whole block, of which the next three are the parts; the last is what
the products of the same codes take, with nothing around them: oneDNN's, or compiled loops' where those are not exact.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import cast

import torch
from machine import description
from quantise import FIXED, Shape, same_tower

from siglane.nn.attention import Segments
from siglane.nn.cpu.codes import row_codes
from siglane.nn.cpu.int8_block import CodedBlock, attention_dtype, own
from siglane.nn.cpu.optimise import optimise
from siglane.nn.quantise import quantise

Part = Callable[[], object]
SEGMENTS = Segments.of((FIXED.area,), torch.device("cpu"))


def parts_of(block: CodedBlock, shape: Shape) -> dict[str, Part]:
    """Of one picture's rows."""
    qkv, *rest = layers = [
        own(block.get_submodule(name)) for name in ("attention.qkv", "attention.out_proj", "mlp.fc1", "mlp.fc2")
    ]
    x, dtype = torch.randn(FIXED.area, shape.hidden), attention_dtype()
    attended = torch.randn(FIXED.area, shape.hidden).to(dtype)
    q, k, v = torch.randn(FIXED.area, 3, shape.heads, shape.hidden // shape.heads).to(dtype).unbind(1)
    given = [(layer, row_codes(torch.randn(FIXED.area, layer.inputs))) for layer in layers]
    passes = block.passes(dtype, *layers)
    return {
        "all": lambda: block.together(x, SEGMENTS, "onednn"),
        "norm to q, k, v": lambda: passes.heads(x, block.norm1, qkv),
        "attention": lambda: block.attention.attend((q, k, v), SEGMENTS, "onednn", None),
        "projection, norm, MLP": lambda: passes.rest(attended, x, block.norm2, *rest),
        "products alone": lambda: [layer.sums_of(codes) for layer, codes in given],
    }


@torch.inference_mode()
def measured(blocks: list[CodedBlock], shape: Shape, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each part in each round, of one block and picture."""
    every = [parts_of(block, shape) for block in blocks]
    names = list(every[0])
    found: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats + 1):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            for some in every:
                some[name]()
            if repeat:  # the first round warms up and compiles
                found[name].append((time.perf_counter() - begin) * 1e3 / len(blocks))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = Shape(options.layers)
    tower = same_tower(shape, FIXED, "channel_first", "never")
    quantise(tower, "8bit", "cpu")
    optimise(tower)
    blocks = [cast(CodedBlock, block) for block in tower.get_submodule("blocks").children()]
    found = measured(blocks, shape, options.repeats)
    rows = {name: {"least": round(min(ms), 2), "median": round(statistics.median(ms), 2)} for name, ms in found.items()}
    print(json.dumps({"machine": description(), "milliseconds": rows}, indent=2))


if __name__ == "__main__":
    main()
