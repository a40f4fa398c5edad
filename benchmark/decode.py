"""siglane's language half against llama.cpp on equal weights: reading a prompt, writing answers, memory, time to load.

    python benchmark/decode.py [--models SmolLM2-135M Qwen2.5-0.5B] [--growth] [--repeats 5] [--quick]

llama.cpp is the wheel `xllamacpp` (`pip install 'siglane[bench]'`), run as users do: its own server in the process of
its Python binding. Both sides are driven with token ids and choose greedily, in a process each; the benchmark asks them
in turn, round after round, every round beginning with another. Bars compare the two of one round; figures are medians.
`--growth` adds tokens per second over batches of 1 to 32 and prompts of 256 to 8,128 tokens, with a plot. Models are
written below `--cache` once. Writes benchmark/results/decode.json and decode.png, exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decode_contenders import Contender, Refused, Setup
from machine import description

SCHEMES = {"none": "F32", "8bit": "Q8_0", "4bit": "Q4_K_M"}  # siglane's, and llama.cpp's of as many bits
BATCHES, GROWING_BATCHES, GROWING_PROMPTS = (1, 8), (1, 2, 4, 8, 16, 32), (257, 1025, 4097, 8129)
PROMPT, READ = 129, 512  # of decoding: one more than siglane's pages hold, so that all but one token is known
QUESTION = "<|im_start|>user\nWrite a story about a river.<|im_end|>\n<|im_start|>assistant\n"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Model:
    """write: makes the Hugging Face folder."""

    name: str
    vocab: int
    write: Callable[[Path], None]


@dataclass(frozen=True)
class Plan:
    """How much is measured: rounds, steps of a decoding measurement, tokens read, answers at once."""

    rounds: int = 5
    tokens: int = 32
    read: int = READ
    batches: tuple[int, ...] = BATCHES
    growing_batches: tuple[int, ...] = GROWING_BATCHES
    growing_prompts: tuple[int, ...] = GROWING_PROMPTS


QUICK = Plan(1, 3, 40, growing_batches=(1, 2), growing_prompts=(33, 65))


@dataclass(frozen=True)
class Bar:
    """`ours` has to be `least` times as fast as `peer`, on the wall clock."""

    model: str
    what: str
    ours: str
    peer: str
    least: float

    def result(self, parts: dict[str, Any]) -> dict[str, Any] | None:
        """None where one of the two was not measured."""
        rows = parts.get(self.model, {}).get(self.what, {})
        if self.ours not in rows or self.peer not in rows:
            return None
        name = f"{self.model}, {self.what}: {self.ours} / {self.peer}"
        ratio, cpu_ratio = (pace(rows[self.ours][key], rows[self.peer][key]) for key in ("seconds", "cpu_seconds"))
        return {"bar": name, "ratio": ratio, "per_cpu_second": cpu_ratio, "least": self.least}


def pace(ours: list[float], theirs: list[float]) -> float:
    """How many times faster: the median over rounds, in which both ran side by side."""
    return statistics.median(their / our for our, their in zip(ours, theirs, strict=True))


BARS = (
    Bar("Qwen2.5-0.5B", "batch 1", "siglane 8 bit", "llama.cpp Q8_0", 0.75),
    Bar("Qwen2.5-0.5B", "batch 8", "siglane 8 bit", "llama.cpp Q8_0", 2.0),
    Bar("Qwen2.5-0.5B", "batch 1", "siglane 4 bit", "llama.cpp Q4_K_M", 1.1),
    Bar("Qwen2.5-0.5B", "prefill", "siglane 8 bit", "llama.cpp Q8_0", 2.0),
    Bar("SmolLM2-135M", "batch 1", "siglane 8 bit", "llama.cpp Q8_0", 0.6),
    Bar("SmolLM2-135M", "batch 8", "siglane 8 bit", "llama.cpp Q8_0", 1.3),
    Bar("SmolLM2-135M", "prefill", "siglane 8 bit", "llama.cpp Q8_0", 2.0),
)


def models(quick: bool) -> list[Model]:
    from decode_models import write_smollm2
    from random_decoder import Shape, write_random

    if quick:
        tiny = Shape(2, 64, 128, 4, 2, 512)
        return [Model("tiny", tiny.vocab, lambda folder: write_random(folder, tiny))]
    shape = Shape()
    return [
        Model("SmolLM2-135M", 49_152, write_smollm2),
        Model("Qwen2.5-0.5B", shape.vocab, lambda folder: write_random(folder, shape)),
    ]


def files(model: Model, cache: Path) -> dict[str, Path]:
    """By scheme, siglane's (one folder) and llama.cpp's; written where they are missing."""
    from decode_models import write_gguf

    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / model.name
    if not (folder / "model.safetensors").exists():
        model.write(folder)
    found = dict.fromkeys(SCHEMES, folder)
    library = importlib.util.find_spec("xllamacpp.xllamacpp")
    if library is None or library.origin is None:
        print("llama.cpp is left out: pip install 'siglane[bench]'", file=sys.stderr)
        return found
    for scheme in SCHEMES.values():
        found[scheme] = cache / f"{model.name}.{scheme}.gguf"
        if not found[scheme].exists():
            write_gguf(folder, scheme, found[scheme], Path(library.origin))
    return found


def setups(
    model: Model, stored: dict[str, Path], threads: int, wanted: list[str], slots: int, context: int
) -> Iterator[Setup]:
    for scheme, path in stored.items():
        if scheme in wanted:
            engine = "siglane" if scheme in SCHEMES else "llama.cpp"
            yield Setup(engine, str(path), scheme, threads, slots, context, model.vocab)


def start(setups: Iterable[Setup]) -> tuple[list[Contender], dict[str, Any]]:
    """One after another, so that none is timed while another loads; a contender that says no is left out."""
    contenders, loads = [], {}
    for setup in setups:
        contender = Contender(setup)
        try:
            loads[setup.name] = contender.answer()
            contenders.append(contender)
        except Refused as error:
            print(f"left out: {error}", file=sys.stderr)
    return contenders, loads


def in_turn(contenders: list[Contender], rounds: int, *command: Any, new: bool = False) -> dict[str, Any]:
    """Samples of each contender; new: every round has another prompt, the command's last argument. The first round
    warms up and is left out where there are several."""
    found: dict[str, Any] = {one.name: {"seconds": [], "cpu_seconds": []} for one in contenders}
    for number in range(rounds + (rounds > 1)):
        first = number % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            sample = contender.ask(*command, *([number] if new else []))
            if number or rounds == 1:
                for key, value in sample.items():
                    found[contender.name][key].append(value)
    return found


def compare(model: Model, stored: dict[str, Path], plan: Plan, threads: int, wanted: list[str]) -> dict[str, Any]:
    context = -(-max(plan.read, PROMPT + plan.tokens) // 256) * 256 + 256
    contenders, loads = start(setups(model, stored, threads, wanted, max(plan.batches), context))
    try:
        part: dict[str, Any] = {"load": loads, "answers": answers(contenders, stored["none"])}
        for batch in plan.batches:
            part[f"batch {batch}"] = in_turn(contenders, plan.rounds, "decode", batch, PROMPT, plan.tokens)
        part["prefill"] = in_turn(contenders, plan.rounds, "prefill", plan.read, new=True)
        return part
    finally:
        for contender in contenders:
            contender.close()


def answers(contenders: list[Contender], folder: Path, tokens: int = 24) -> dict[str, Any]:
    """What each says to one question, and how many of its first tokens are those of the first contender."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    said = {one.name: one.ask("answer", tokenizer.encode(QUESTION).ids, tokens) for one in contenders}
    expected = next(iter(said.values()))
    return {
        name: {"text": tokenizer.decode(ids), "equal_tokens": equal(ids, expected), "of": tokens}
        for name, ids in said.items()
    }


def equal(one: list[int], other: list[int]) -> int:
    """Tokens at the beginning that both share."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def growth(model: Model, stored: dict[str, Path], plan: Plan, threads: int, wanted: list[str]) -> dict[str, Any]:
    """Two curves: answers at once on short prompts, and one answer behind longer and longer ones."""
    most, longest = max(plan.growing_batches), max(plan.growing_prompts)
    curves: dict[str, Any] = {"batch": {}, "prompt": {}}
    for curve, slots, context in (("batch", most, 512), ("prompt", 1, longest + 63)):
        contenders, _ = start(setups(model, stored, threads, wanted, slots, context))
        points = plan.growing_batches if curve == "batch" else plan.growing_prompts
        for point in points:
            batch, prompt = (point, PROMPT) if curve == "batch" else (1, point)
            curves[curve][point] = in_turn(contenders, plan.rounds, "decode", batch, prompt, plan.tokens)
        for contender in contenders:
            contender.close()
    return curves


def step_growth(curves: dict[str, Any], name: str) -> float | None:
    """Time of a step of eight answers, that of one being 1."""
    batches = curves["batch"]
    if 8 not in batches or name not in batches[8]:
        return None
    eight, one = (batches[batch][name]["seconds"] for batch in (8, 1))
    return statistics.median(eight) / statistics.median(one)


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    grown = {name: part["growth"] for name, part in report["models"].items() if "growth" in part}
    if not grown:
        return
    figure, axes = plt.subplots(len(grown), 2, figsize=(11, 3.8 * len(grown)), squeeze=False, constrained_layout=True)
    for row, (model, curves) in zip(axes, grown.items(), strict=True):
        for axis, (curve, points) in zip(row, curves.items(), strict=True):
            for name in next(iter(points.values())):
                counts = [int(point) for point in points]
                rates = [
                    (count if curve == "batch" else 1) / statistics.median(points[point][name]["seconds"])
                    for count, point in zip(counts, points, strict=True)
                ]
                style = "-" if name.startswith("siglane") else "--"
                axis.plot(counts, rates, style, marker="o", label=name)
            what = "answers at once" if curve == "batch" else "tokens before the answer"
            axis.set(title=model, xlabel=what, ylabel="tokens/s", xscale="log", ylim=(0, None))
            axis.set_xticks(counts, [f"{count:,}" for count in counts])
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def print_tables(report: dict[str, Any], plan: Plan) -> None:
    counts = {f"batch {batch}": batch for batch in plan.batches} | {"prefill": plan.read}
    for model, part in report["models"].items():
        print(f"\n{model}: tokens/s, and tokens per CPU second")
        print(f"{'':20}" + "".join(f"{what:>17}" for what in counts) + f"{'load':>9}{'peak':>10}  same beginning")
        for name, load in part["load"].items():
            cells = ""
            for what, count in counts.items():
                wall, cpu = (statistics.median(part[what][name][key]) for key in ("seconds", "cpu_seconds"))
                cells += f"{count / wall:>9.1f}{count / cpu:>8.1f}"
            said = part["answers"][name]
            size = f"{load['peak_bytes'] / 1e6:.0f} MB"
            print(f"{name:20}{cells}{load['load_seconds']:7.1f} s{size:>10}  {said['equal_tokens']} of {said['of']}")


def judge(report: dict[str, Any]) -> list[dict[str, Any]]:
    found = [result for bar in BARS if (result := bar.result(report["models"])) is not None]
    for result in found:
        result["holds"] = result["ratio"] >= result["least"]
    for model, part in report["models"].items():
        ratio = step_growth(part["growth"], "siglane 8 bit") if "growth" in part else None
        if ratio is not None:
            name = f"{model}: a step of 8 answers / of 1, siglane 8 bit"
            found.append({"bar": name, "ratio": ratio, "most": 1.3, "holds": ratio <= 1.3})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="some of them; all by default")
    parser.add_argument(
        "--schemes", nargs="+", default=[*SCHEMES, *SCHEMES.values()], help="none 8bit 4bit F32 Q8_0 ..."
    )
    parser.add_argument("--repeats", type=int, default=Plan.rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tiny model: whether it runs, not how fast")
    parser.add_argument("--cache", type=Path, default=Path("runs") / "decode")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan(options.repeats)
    report: dict[str, Any] = {
        "command": "python benchmark/decode.py " + " ".join(sys.argv[1:]),
        "machine": description() | {"threads": options.threads},
        "models": {},
    }
    for model in models(options.quick):
        if options.models and model.name not in options.models:
            continue
        stored = files(model, options.cache)
        part = compare(model, stored, plan, options.threads, options.schemes)
        if options.growth:
            part["growth"] = growth(model, stored, plan, options.threads, options.schemes)
        report["models"][model.name] = part
    report["bars"] = judge(report)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "decode.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    plot(report, options.out / "decode.png")
    print_tables(report, plan)
    print()
    for bar in report["bars"]:
        limit = f"at least {bar['least']}" if "least" in bar else f"at most {bar['most']}"
        cpu = f", {bar['per_cpu_second']:.2f} per CPU second" if "per_cpu_second" in bar else ""
        print(f"{'PASS' if bar['holds'] else 'FAIL'}  {bar['bar']} = {bar['ratio']:.2f} ({limit}{cpu})")
    return 0 if options.quick or all(bar["holds"] for bar in report["bars"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
