"""Tagging a folder: siglane against transformers' zero-shot pipeline, and against the loops its classes allow.

python benchmark/tagging.py [--layers 3] [--pictures 16] [--labels 20] [--repeats 5] [--quick]

SigLIP-so400m's shape (width 1152, MLP 4304, 16 heads; `--layers` of its 27 blocks in each tower), random weights,
float32, CPU. Everybody starts from the same JPEG files and ends with a score for each picture and label; siglane's
label matrix is known, as it is in every run but the first. Three parts: fixed resolution (384 pixels, patches of 16),
a NaFlex folder of mixed shapes, and NaFlex with a budget of its own, 64 to 1,024 patches, for each picture. Contenders:

    siglane            one packed forward for each batch
    pipeline           transformers' zero-shot-image-classification, one picture at a time, every label read again for
                       each; with mixed budgets its image processor is told each picture's
    padded batches     the pipeline's steps written out: labels read once, pictures in batches padded to the largest
    one by one         the same without padding, for NaFlex

All contenders of a part run in turn, round after round in one process; the figures are medians. Prints the tables and
whether each bar holds, writes benchmark/results/tagging.json, exits with 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import description
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
    pipeline,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from vision import interleaved, ratio

from siglane import Tagger

SIZES = ((640, 480), (480, 640), (1024, 768), (300, 900), (224, 224), (1280, 400), (512, 512), (800, 1000))
BUDGETS = (64, 256, 100, 1024, 144, 64, 400, 196)
PATCH, SIDE, LENGTH, VOCABULARY = 16, 384, 64, 512
BATCH = 8
TEMPLATE = "This is a photo of {}."
BARS = {"fixed": ("pipeline", 1.3), "naflex": ("pipeline", 1.3), "budgets": ("padded batches", 2.5)}
RESULT = Path(__file__).parent / "results" / "tagging.json"
Scores = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """A checkpoint in a folder, transformers' classes with the same weights, pictures and labels."""

    folder: Path
    model: Any
    tokenizer: PreTrainedTokenizerFast
    processor: Any
    pictures: tuple[str, ...]
    labels: tuple[str, ...]

    def ids(self) -> torch.Tensor:
        texts = [TEMPLATE.format(label) for label in self.labels]
        found: torch.Tensor = self.tokenizer(
            texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        return found


def write_checkpoint(folder: Path, naflex: bool, layers: int, quick: bool) -> tuple[Any, PreTrainedTokenizerFast]:
    folder.mkdir()
    hidden, intermediate, heads = (64, 96, 2) if quick else (1152, 4304, 16)
    sizes = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }  # fmt: skip
    text = sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH, "bos_token_id": 2, "eos_token_id": 1}
    model: nn.Module
    if naflex:
        model = Siglip2Model(Siglip2Config(vision_config={**sizes, "patch_size": PATCH}, text_config=text))
        preprocessor = {"patch_size": PATCH, "max_num_patches": 256}
    else:
        vision = {**sizes, "patch_size": PATCH, "image_size": SIDE}
        model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text))
        preprocessor = {"size": {"height": SIDE, "width": SIDE}, "resample": 2}
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and name.endswith("weight")), std=0.03)
    nn.init.constant_(model.logit_scale, 3.0)  # type: ignore[arg-type]
    nn.init.constant_(model.logit_bias, 0.0)  # type: ignore[arg-type]
    model.eval().requires_grad_(False).save_pretrained(folder)  # type: ignore[operator]
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    backend.train_from_iterator([TEMPLATE.format("one two three four things of red and blue")], trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return model, PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", model_input_names=["input_ids"]
    )


def write_pictures(folder: Path, count: int) -> tuple[str, ...]:
    """Photo-like: smooth colours, some noise."""
    folder.mkdir()
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        y, x = np.mgrid[0:height, 0:width]
        noise = np.random.default_rng(number).integers(0, 30, (height, width, 3))
        colours = np.stack([x * 220 // width, y * 220 // height, (x + y + 31 * number) % 220], axis=-1)
        Image.fromarray((colours + noise).astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=90)
    return tuple(map(str, sorted(folder.iterdir())))


def siglane_run(case: Case, budgets: Sequence[int] | None = None) -> Scores:
    tagger = Tagger(case.folder, device="cpu", batch_size=BATCH, cache=case.folder / "labels")
    pictures: list[Any] = list(case.pictures)
    if budgets is not None:
        pictures = [{"image": path, "max_num_patches": most} for path, most in zip(case.pictures, budgets, strict=True)]
    place = {label: number for number, label in enumerate(case.labels)}

    def run() -> torch.Tensor:
        scores = torch.empty(len(pictures), len(place))
        for row, tagged in zip(scores, tagger.stream(pictures, case.labels, top_k=len(place)), strict=True):
            for label, confidence in tagged.tags:
                row[place[label]] = confidence
        return scores

    return run


def pipeline_run(case: Case, budgets: Sequence[int] | None = None) -> Scores:
    classify = pipeline(
        "zero-shot-image-classification", model=case.model, tokenizer=case.tokenizer, image_processor=case.processor,
        device="cpu",
    )  # fmt: skip

    def ordered(answer: list[dict[str, Any]]) -> list[float]:
        scores = {row["label"]: row["score"] for row in answer}
        return [scores[label] for label in case.labels]

    def run() -> torch.Tensor:
        if budgets is None:
            return torch.tensor([ordered(row) for row in classify(list(case.pictures), candidate_labels=case.labels)])
        rows = []
        for path, most in zip(case.pictures, budgets, strict=True):
            classify.image_processor.max_num_patches = most
            rows.append(ordered(classify(path, candidate_labels=case.labels)))
        return torch.tensor(rows)

    return run


def loop_run(case: Case, batch: int, budgets: Sequence[int] | None = None) -> Scores:
    """The steps of the pipeline, the labels read once before the clock starts."""
    model = case.model
    texts = model(input_ids=case.ids(), **prepared(case, case.pictures[:1])).text_embeds

    def run() -> torch.Tensor:
        rows = []
        for start in range(0, len(case.pictures), batch):
            chosen = slice(start, start + batch)
            inputs = prepared(case, case.pictures[chosen], None if budgets is None else budgets[chosen])
            images = model.vision_model(**inputs).pooler_output
            unit = images / images.norm(dim=-1, keepdim=True)
            rows.append((unit @ texts.T * model.logit_scale.exp() + model.logit_bias).sigmoid())
        return torch.cat(rows)

    return run


def prepared(case: Case, paths: Sequence[str], budgets: Sequence[int] | None = None) -> dict[str, torch.Tensor]:
    """What the vision model reads. Pictures of several budgets are padded to the largest."""
    images = [Image.open(path).convert("RGB") for path in paths]
    if budgets is None:
        return dict(case.processor(images=images, return_tensors="pt"))
    parts = [
        case.processor(images=[image], max_num_patches=most, return_tensors="pt")
        for image, most in zip(images, budgets, strict=True)
    ]
    longest = max(budgets)

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, tensor.new_zeros(1, longest - tensor.shape[1], *tensor.shape[2:])], dim=1)

    return {
        "pixel_values": torch.cat([padded(part["pixel_values"]) for part in parts]),
        "pixel_attention_mask": torch.cat([padded(part["pixel_attention_mask"]) for part in parts]),
        "spatial_shapes": torch.cat([part["spatial_shapes"] for part in parts]),
    }


@torch.inference_mode()
def measured(part: str, runs: dict[str, Scores], pictures: int, repeats: int) -> dict[str, Any]:
    """Pictures per second of every contender, ratios to siglane, and the largest difference of a score."""
    expected = runs["siglane"]()
    difference = max((run() - expected).abs().max().item() for run in runs.values())
    seconds, rates = interleaved(dict(runs), repeats)
    others = [name for name in runs if name != "siglane"]
    return {
        "pictures_per_second": {name: round(pictures / statistics.median(found), 3) for name, found in seconds.items()},
        "times": {name: round(ratio(seconds, name, "siglane"), 2) for name in others},
        "bar": dict(zip(("against", "times"), BARS[part], strict=True)),
        "scores": [round(expected.min().item(), 4), round(expected.max().item(), 4)],
        "largest_difference_of_a_score": difference,
        "torch_gflops": round(statistics.median(rates) / 1e9, 1),
        "seconds": {name: [round(one, 4) for one in found] for name, found in seconds.items()},
    }


def parts(work: Path, options: argparse.Namespace) -> dict[str, Any]:
    labels = tuple(f"{word} {thing}" for thing in ("things", "shapes", "cats", "dogs", "birds") for word in
                   ("one", "two", "three", "four", "red", "blue", "old", "new"))[: options.labels]  # fmt: skip
    pictures = write_pictures(work / "pictures", options.pictures)
    budgets = [BUDGETS[number % len(BUDGETS)] for number in range(len(pictures))]
    model, tokenizer = write_checkpoint(work / "fixed", False, options.layers, options.quick)
    processor: Any = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=2)
    case = Case(work / "fixed", model, tokenizer, processor, pictures, labels)
    found = {
        "fixed": measured(
            "fixed",
            {"siglane": siglane_run(case), "pipeline": pipeline_run(case), "padded batches": loop_run(case, BATCH)},
            len(pictures),
            options.repeats,
        )
    }
    model, tokenizer = write_checkpoint(work / "naflex", True, options.layers, options.quick)
    processor = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=256)
    case = Case(work / "naflex", model, tokenizer, processor, pictures, labels)
    for name, own in (("naflex", None), ("budgets", budgets)):
        runs = {
            "siglane": siglane_run(case, own),
            "pipeline": pipeline_run(case, own),
            "padded batches": loop_run(case, BATCH, own),
            "one by one": loop_run(case, 1, own),
        }
        found[name] = measured(name, runs, len(pictures), options.repeats)
        processor.max_num_patches = 256
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="blocks of each tower (so400m has 27)")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--labels", type=int, default=20, help="at most 40")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny towers: whether it runs, not how fast")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.quick:
        options.layers, options.pictures, options.repeats = 1, 8, 1
    with tempfile.TemporaryDirectory() as work, torch.inference_mode():
        found = parts(Path(work), options)
    given = {name: getattr(options, name) for name in ("layers", "pictures", "labels", "repeats")}
    result: dict[str, Any] = {
        "command": " ".join(["benchmark/tagging.py", *(f"--{name} {value}" for name, value in given.items())])
        + " --quick" * options.quick,
        "machine": description(),
        **found,
        "bars": {
            f"{name}: at least {least} times {rival}": found[name]["times"][rival] >= least
            for name, (rival, least) in BARS.items()
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    return 0 if options.quick or all(result["bars"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
