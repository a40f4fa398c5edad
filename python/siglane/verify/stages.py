"""The stages between a picture and an answer, and how two implementations are compared at each.

A trace holds one tensor per stage, one row per patch, projector row or token; patches of all tiles of all pictures of
a request follow each other, in raster order inside a tile.

    preprocessing    normalised pixel patches             [patches, patch_dim]
    patch_embedding  their embeddings                     [patches, hidden_size]
    positions        with positions added                 [patches, hidden_size]
    block.N          output of the tower's block N        [patches, hidden_size]
    features         what the tower gives                 [patches, hidden_size]
    pooled           the MAP head's embeddings            [tiles, hidden_size]
    projector_input  where it is not the features (s2)    [patches, channels]
    projector        the language model's image rows      [rows, width]
    packing          a picture alone against packed with others, both by siglane
    spliced          text embeddings and image rows       [tokens, width]
    lm.block.N       output of the decoder's block N      [tokens, width]
    logits           at the prompt's last positions       [at most LOGIT_ROWS, vocabulary]
    tokens           the greedy answer's ids              [steps]

Of a SigLIP with both towers, in a case of its own:

    text.ids         what `TEXTS` are cut into            [texts, length]
    text.embedding   their tokens' embeddings             [texts * length, hidden_size]
    text.block.N     output of the text tower's block N   [texts * length, hidden_size]
    text.pooled      the texts' vectors                   [texts, projection_size]
    calibration.N    temperature and bias of the scores   [1, 1]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch

Trace = dict[str, torch.Tensor]

ORDER = (
    "preprocessing", "patch_embedding", "positions", "block", "features", "pooled", "projector_input", "projector",
    "packing", "spliced", "lm.block", "logits", "tokens", "text.ids", "text.embedding", "text.block", "text.pooled",
    "calibration",
)  # fmt: skip
PACKING, TOKENS, TEXT_IDS = "packing", "tokens", "text.ids"
# lower and upper case, punctuation, other scripts, more than a tower reads
TEXTS = ("a photo of a cat", "Two GREEN shapes, one red square!", "don't (stop)", "日本語 café № 12-34", "night " * 99)
LOGIT_ROWS = 8  # of a 152k vocabulary; the last block is compared at every position
# two float32 implementations stay within 1e-11; the exact GELU for tanh's is 7e-9 off, far above any useful threshold
EXACT = 1 - 1e-9
SAME_ROW = 4  # times the dtype's epsilon of the mean row norm: closer rows are equal, whatever their directions


class Bars(NamedTuple):
    """least: of every row's cosine; mean: of their mean; scale: how close to 1 the norm of the whole is."""

    least: float
    mean: float
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One stage of one case ("image.0": the first picture alone, "together": all in one request).

    scale: norm of siglane's tensor over the reference's, which a cosine cannot see; mean_threshold, min_threshold: what
    the mean of the rows' cosines and every one of them have to be above. The numbers are None where shapes
    differ, values are not finite or (tokens) there is nothing to measure; note says what a reader should know.
    """

    case: str
    stage: str
    shape: tuple[int, ...] | None
    reference_shape: tuple[int, ...] | None
    max_abs_error: float | None = None
    mean_cosine: float | None = None
    min_cosine: float | None = None
    scale: float | None = None
    mean_threshold: float | None = None
    min_threshold: float | None = None
    ok: bool
    note: str = ""


def place(stage: str) -> tuple[int, int]:
    """Where `stage` stands in a forward: a key to sort by."""
    kind, _, number = stage.rpartition(".")
    return (ORDER.index(kind), int(number)) if number.isdigit() else (ORDER.index(stage), 0)


def compare_traces(
    case: str, ours: Trace, reference: Trace, bars_of: Callable[[str], Bars], *, rounded: bool = False
) -> list[Comparison]:
    """Every stage of either trace, in the order of the forward. rounded: whether ours has fewer bits."""
    rounded = rounded or ("logits" in reference and reference["logits"].dtype.itemsize < 4)
    found = []
    for stage in sorted({*ours, *reference}, key=place):
        if stage not in ours or stage not in reference:
            found.append(_one_sided(case, stage, ours.get(stage), reference.get(stage)))
        elif stage == TOKENS:
            found.append(_compare_tokens(case, ours[stage], reference[stage], rounded=rounded))
        elif stage == TEXT_IDS:
            found.append(_compare_ids(case, ours[stage], reference[stage]))
        else:
            found.append(compare(case, stage, ours[stage], reference[stage], bars_of(stage)))
    return found


def compare(case: str, stage: str, ours: torch.Tensor, reference: torch.Tensor, bars: Bars) -> Comparison:
    """ok: shapes are equal, all values finite, cosines and scale above `bars`."""
    found = _compared(case, stage, ours, reference)
    if ours.shape != reference.shape:
        return found(ok=False, note=f"the reference has shape {list(reference.shape)}")
    a, b = ours.double(), reference.double()
    if not (a.isfinite().all() and b.isfinite().all()):
        side = "siglane" if b.isfinite().all() else "the reference"
        return found(ok=False, note=f"{side} gives values that are not finite")
    cosines = _cosines(a, b, SAME_ROW * torch.finfo(reference.dtype).eps)
    lowest, mean, scale = cosines.min().item(), cosines.mean().item(), _scale(a, b)
    alike = lowest > bars.least and mean > bars.mean
    well_scaled = bars.scale < scale and scale * bars.scale < 1
    return found(
        max_abs_error=(a - b).abs().max().item(),
        mean_cosine=mean,
        min_cosine=lowest,
        mean_threshold=bars.mean,
        min_threshold=bars.least,
        scale=scale if math.isfinite(scale) else None,
        ok=alike and well_scaled,
        note="" if well_scaled or not alike else f"siglane's values are {scale:.3g} times the reference's",
    )


def _compare_tokens(case: str, ours: torch.Tensor, reference: torch.Tensor, *, rounded: bool) -> Comparison:
    """Greedy ids are equal in float32; in half precision, and of fewer bits, two right answers part where two logits
    nearly tie."""
    same = torch.equal(ours, reference)
    note = "" if same else f"{ours.tolist()} instead of {reference.tolist()}"
    return _compared(case, TOKENS, ours, reference)(ok=same or rounded, note=note)


def _compare_ids(case: str, ours: torch.Tensor, reference: torch.Tensor) -> Comparison:
    """Of texts, which are equal in every precision."""
    other = [text for text, a, b in zip(TEXTS, ours.tolist(), reference.tolist(), strict=False) if a != b]
    same = torch.equal(ours, reference)
    note = "" if same else f"the ids of {other[0]!r} differ" if other else "another number of texts"
    return _compared(case, TEXT_IDS, ours, reference)(ok=same, note=note)


def _scale(a: torch.Tensor, b: torch.Tensor) -> float:
    ours, reference = a.norm().item(), b.norm().item()
    if reference == 0:
        return math.inf if ours else 1.0
    return ours / reference


def _cosines(a: torch.Tensor, b: torch.Tensor, nearest: float) -> torch.Tensor:
    """Of each row; rows that differ by less than rounding (two all but black patches) count as parallel."""
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    cosines = (a * b).sum(-1) / norms.clamp_min(torch.finfo(torch.float64).tiny)
    equal = (a - b).norm(dim=-1) <= nearest * b.norm(dim=-1).mean()
    return cosines.clamp(-1, 1).masked_fill(equal, 1.0)


def _one_sided(case: str, stage: str, ours: torch.Tensor | None, reference: torch.Tensor | None) -> Comparison:
    """A block that one side does not run shows in what follows it; any other stage must be there."""
    note = f"only {'the reference' if ours is None else 'siglane'} has it"
    return _compared(case, stage, ours, reference)(ok="block." in stage, note=note)


def _compared(
    case: str, stage: str, ours: torch.Tensor | None, reference: torch.Tensor | None
) -> partial[Comparison]:  # fmt: skip
    """A comparison that waits for its outcome."""
    shape, reference_shape = (None if side is None else tuple(side.shape) for side in (ours, reference))
    return partial(Comparison, case=case, stage=stage, shape=shape, reference_shape=reference_shape)


def packing(alone: Sequence[Trace], packed: Trace, bars: Bars) -> Comparison:
    """Traces of pictures alone against the one of all in a single call, both siglane's: the worst stage."""
    found = []
    for stage in alone[0]:
        rows = torch.cat([trace[stage] for trace in alone])
        found.append(compare("packed", stage, packed[stage], rows, bars))
    failed = [one for one in found if not one.ok]
    worst = failed[0] if failed else min(found, key=lambda one: one.min_cosine or 0.0)
    return replace(
        worst,
        stage=PACKING,
        max_abs_error=_most(max, [one.max_abs_error for one in found]),
        note=f"{'first' if failed else 'least alike'} at {worst.stage}{': ' if worst.note else ''}{worst.note}",
    )


@dataclass(frozen=True, slots=True)
class Picture:
    """data: the bytes of its file; width, height: of the upright picture."""

    name: str
    data: bytes
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What `siglane verify` found. comparisons: stage by stage in the order of the forward, case by case in each."""

    model: str
    reference: str
    family: str
    device: str
    dtype: str
    threshold: float
    quantization: str | None = None
    prompt: str | None
    pictures: tuple[Picture, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def ok(self) -> bool:
        return self.first_diverging is None

    @property
    def first_diverging(self) -> str | None:
        """The first stage that is not ok in some case."""
        return next((one.stage for one in self.comparisons if not one.ok), None)

    @property
    def first_inexact(self) -> str | None:
        """In float32, the first stage that passed but is further off than rounding explains."""
        if self.dtype != "float32" or self.quantization is not None:
            return None
        passed = (one for one in self.comparisons if one.ok and one.min_cosine is not None)
        return next((one.stage for one in passed if (one.min_cosine or 0.0) < EXACT), None)

    def stages(self) -> Iterator[tuple[str, tuple[Comparison, ...]]]:
        """Every stage with its cases."""
        for stage, cases in groupby(self.comparisons, key=lambda one: one.stage):
            yield stage, tuple(cases)

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints; `stages` sums each stage up over its cases."""
        return {
            "model": self.model,
            "family": self.family,
            "reference": self.reference,
            "device": self.device,
            "dtype": self.dtype,
            "threshold": self.threshold,
            "quantization": self.quantization,
            "ok": self.ok,
            "first_diverging_stage": self.first_diverging,
            "first_inexact_stage": self.first_inexact,
            "prompt": self.prompt,
            "images": [{"image": one.name, "width": one.width, "height": one.height} for one in self.pictures],
            "stages": [_summary_row(summary(cases)) for _, cases in self.stages()],
            "cases": [asdict(one) for one in self.comparisons],
        }


def summary(cases: Sequence[Comparison]) -> Comparison:
    """One stage over all its cases: rows added up, the worst of every number, the first failing case's note."""
    worst = next((one for one in cases if not one.ok), min(cases, key=_likeness))
    means = [(one.mean_cosine, one.shape[0]) for one in cases if one.mean_cosine is not None and one.shape]
    rows = sum(count for _, count in means)
    return replace(
        worst,
        shape=_added([one.shape for one in cases]),
        reference_shape=_added([one.reference_shape for one in cases]),
        max_abs_error=_most(max, [one.max_abs_error for one in cases]),
        mean_cosine=sum(mean * count for mean, count in means) / rows if rows else None,
        min_cosine=_most(min, [one.min_cosine for one in cases]),
    )


def _likeness(one: Comparison) -> float:
    return -1.0 if one.min_cosine is None else one.min_cosine


def _most(choose: Any, values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return choose(known) if known else None


def _added(shapes: Sequence[tuple[int, ...] | None]) -> tuple[int, ...] | None:
    known = [shape for shape in shapes if shape is not None]
    return (sum(shape[0] for shape in known), *known[0][1:]) if known else None


def _summary_row(one: Comparison) -> dict[str, Any]:
    return {name: value for name, value in asdict(one).items() if name != "case"}
