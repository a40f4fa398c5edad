"""What a contrastive model has learned: zero-shot accuracy, and a linear probe on its frozen image embeddings.

`python -m siglane.training.evaluate MODEL --images FOLDER` measures both on a folder with one folder per class, whose
name is the label ("red_fox" is "red fox").
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F

from siglane.config.preprocess import LOCAL_DECODE, PICTURE_SUFFIXES
from siglane.errors import UserError
from siglane.families.two_tower import LoadedTwoTower, load_two_tower
from siglane.image.decode import decode
from siglane.media.source import naming, read_file
from siglane.nn.device import resolve_device
from siglane.settings.tagging import TEMPLATES
from siglane.types import DecodedImage
from siglane.weights.demo import open_model

BATCH = 128
RIDGE = 1e-3


@torch.no_grad()
def embed_pictures(two_tower: LoadedTwoTower, pictures: Iterable[DecodedImage]) -> torch.Tensor:
    """Unit embeddings f32 `[pictures, D]`; only BATCH pictures are held at a time."""
    processor = two_tower.images
    patches = (processor.patches(picture, *processor.layouts([picture.size])) for picture in pictures)
    found = [torch.zeros(0, two_tower.model.config.text.projection_size)]
    while batch := list(islice(patches, BATCH)):
        found.append(two_tower.model.embed_images(batch).float().cpu())
    return torch.cat(found)


@torch.no_grad()
def embed_classes(
    two_tower: LoadedTwoTower, classes: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> torch.Tensor:
    """One unit embedding per class, f32 `[classes, D]`: the mean over `templates`, each with {label} in it."""
    means = []
    for label in classes:
        ids = two_tower.texts.ids([template.format(label=label) for template in templates])
        means.append(two_tower.model.embed_texts(ids).float().cpu().mean(0))
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot_accuracy(images: torch.Tensor, classes: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of images `[I, D]` whose nearest class of `[C, D]` is their target, i64 `[I]`. The sigmoid's scale and bias
    do not change which one that is."""
    return float(((images @ classes.T).argmax(-1) == targets).float().mean())


def linear_probe(images: torch.Tensor, targets: torch.Tensor, classes: int, *, ridge: float = RIDGE) -> torch.Tensor:
    """Ridge regression of one-hot targets i64 `[I]` on embeddings `[I, D]` in closed form, in float64.

    Returns weights `[D + 1, classes]` for `probe_accuracy`, the last row a bias without penalty; ridge: the penalty as
    a share of the mean square of a feature.
    """
    x = images.double()
    mean = x.mean(0)
    centred = x - mean
    wanted = F.one_hot(targets, classes).double()
    gram = centred.T @ centred
    penalty = ridge * gram.diagonal().mean().clamp(min=1e-12)
    weights = torch.linalg.solve(
        gram + penalty * torch.eye(len(gram), dtype=gram.dtype), centred.T @ (wanted - wanted.mean(0))
    )
    return torch.cat((weights, (wanted.mean(0) - mean @ weights)[None]))


def probe_accuracy(weights: torch.Tensor, images: torch.Tensor, targets: torch.Tensor) -> float:
    scores = images.double() @ weights[:-1] + weights[-1]
    return float((scores.argmax(-1) == targets).float().mean())


def class_files(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """The labels of a folder of folders, and its pictures with their class' number. UserError without two classes."""
    folders = sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []
    if len(folders) < 2:
        raise UserError(f"{folder} needs a folder of pictures for each of two classes or more", code="bad_images")
    files = [(file, number) for number, one in enumerate(folders) for file in sorted(one.iterdir())]
    found = [(file, number) for file, number in files if file.suffix.lower() in PICTURE_SUFFIXES]
    return tuple(path.name.replace("_", " ") for path in folders), found


def _decoded(file: Path) -> DecodedImage:
    with naming(file):
        return decode(read_file(file), LOCAL_DECODE)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m siglane.training.evaluate", description="Measure a SigLIP.")
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a SigLIP with both towers")
    parser.add_argument("--images", type=Path, required=True, help="folder with one folder of pictures per class")
    parser.add_argument("--templates", nargs="+", default=TEMPLATES, help="texts with {label} in them")
    parser.add_argument("--ridge", type=float, default=RIDGE, help="the probe's penalty (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the half of the pictures that the probe is fitted to")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    options = parser.parse_args(arguments)
    labels, files = class_files(options.images)
    two_tower = load_two_tower(open_model(options.model), device=resolve_device(options.device), dtype=torch.float32)
    images = embed_pictures(two_tower, (_decoded(file) for file, _ in files))
    targets = torch.tensor([target for _, target in files])
    classes = embed_classes(two_tower, labels, options.templates)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(options.seed))
    fitted, held = order.chunk(2) if len(files) > 1 else (order, order)
    probe = linear_probe(images[fitted], targets[fitted], len(labels), ridge=options.ridge)
    found = {
        "images": len(files),
        "classes": len(labels),
        "zero_shot": zero_shot_accuracy(images, classes, targets),
        "linear_probe": probe_accuracy(probe, images[held], targets[held]),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
