"""`verify`: the reference first, then siglane, then what differs. One of them is in memory at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from transformers.utils import logging as transformers_logging

from siglane.errors import ConfigError, SiglaneError, UserError
from siglane.families.registry import tower_family, vlm_family
from siglane.nn.device import DTYPES, resolve_device
from siglane.settings.engine import Quantization
from siglane.tiling.rule import no_images
from siglane.types import DecodedImage
from siglane.verify.bars import Thresholds
from siglane.verify.golden import Golden, load_golden, save_golden
from siglane.verify.pictures import ImageSource, decode_picture, draw_pictures, read_pictures
from siglane.verify.references.pixels import open_picture
from siglane.verify.references.reference import ReferenceFamily
from siglane.verify.references.registry import family_of
from siglane.verify.references.text_tower import load_text_tower
from siglane.verify.runner import SiglaneRunner
from siglane.verify.stages import PACKING, TEXTS, Comparison, Picture, Report, compare_traces, packing, place
from siglane.weights.demo import open_model
from siglane.weights.hub import Checkpoint
from siglane.weights.quantised import refuse_codes

T = TypeVar("T")

PROMPT = "What is in the picture?"
TRANSFORMERS = "transformers"
TOGETHER, TEXT, TEXT_TOWER = "together", "text", "texts"
STEPS = 8
THRESHOLD = 0.99
MOST_PICTURES, MOST_STEPS = 64, 256


def verify(
    model: str | Path,
    images: Sequence[ImageSource] | None = None,
    *,
    random: int | None = None,
    threshold: float | None = None,
    reference: str | Path = TRANSFORMERS,
    prompt: str | None = None,
    steps: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    quantization: Quantization = "none",
    revision: str | None = None,
    adapter: str | Path | None = None,
    verify_weights: bool | None = None,
    save: Path | None = None,
) -> Report:
    """Runs `model` and its reference on the same pictures, each alone and all in one request, and compares them.

    images: paths, URLs, bytes or Pillow images; without them `random` drawn ones (3), none for a language model alone.
    threshold: of every row's cosine (0.99); with fewer bits each kind of stage has its own (`bars.py`) unless it is
    given. reference: "transformers" (its modules with `model`'s own tensors), the folder of another checkpoint of the
    family for the same modules, or a file of golden values, which brings its own pictures and questions. prompt, steps:
    what a language model is asked and how many greedy tokens are compared (8). quantization: of siglane's side alone.
    adapter, verify_weights: as of `LLM`; save: a file for the reference's values. UserError for what cannot be used.
    """
    checkpoint = open_model(model, revision, adapter=adapter, verify_weights=verify_weights)
    precision, place_of, sees = _precision(threshold, dtype), resolve_device(device), _sees(checkpoint)
    if Path(reference).suffix == ".safetensors":
        given = (images, random, prompt, steps, save)
        expected = _stored(checkpoint, Path(reference), free=all(one is None for one in given))
    else:
        pictures = _pictures(images, random, sees=sees)
        expected = _computed(checkpoint, str(reference), pictures, *_question(prompt, steps), place_of, precision)
        if save is not None:
            save_golden(expected, save)
    thresholds = _thresholds(threshold, quantization, expected)
    texts = TEXT_TOWER in expected.traces
    ours = SiglaneRunner(checkpoint, place_of, precision, with_texts=texts, quantization=thresholds.bits)
    return _report(str(model), dtype, ours, expected, thresholds)


def _report(model: str, dtype: str, ours: SiglaneRunner, expected: Golden, thresholds: Thresholds) -> Report:
    return Report(
        model=model,
        reference=expected.reference,
        family=expected.family,
        device=str(ours.device),
        dtype=dtype,
        threshold=thresholds.exact,
        quantization=thresholds.bits,
        prompt=expected.prompt,
        pictures=expected.pictures,
        comparisons=_compared(ours, expected, thresholds),
    )


def _thresholds(threshold: float | None, quantization: Quantization, expected: Golden) -> Thresholds:
    """One that is given holds for every stage."""
    bits = None if quantization == "none" else quantization
    exact = THRESHOLD if threshold is None else threshold
    return Thresholds(exact, bits, speaks=expected.prompt is not None, everywhere=threshold is not None)


def _sees(checkpoint: Checkpoint) -> bool:
    """Whether the model reads pictures. A configuration that siglane refuses is refused here, before the reference has
    run, and so is a folder of codes."""
    refuse_codes(checkpoint)
    return (tower_family(checkpoint) or vlm_family(checkpoint)).images(checkpoint) is not None


def _precision(threshold: float | None, dtype: str) -> torch.dtype:
    """The dtype called `dtype`. UserError when it, or the threshold, cannot be."""
    if threshold is not None and not 0 <= threshold < 1:
        raise UserError(f"threshold must be at least 0 and below 1, got {threshold}", code="bad_option")
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known; use {', '.join(DTYPES)}", code="bad_option")
    return DTYPES[dtype]


def _pictures(images: Sequence[ImageSource] | None, random: int | None, *, sees: bool) -> tuple[Picture, ...]:
    if not sees:
        if images is not None or random is not None:
            raise no_images()
        return ()
    if images is not None:
        if random is not None:
            raise UserError("--images and --random exclude each other", code="bad_option")
        if not 1 <= len(images) <= MOST_PICTURES:
            raise UserError(f"between 1 and {MOST_PICTURES} images are compared, got {len(images)}", code="bad_option")
        return read_pictures(images)
    count = 3 if random is None else random
    if not 1 <= count <= MOST_PICTURES:
        raise UserError(f"random must be between 1 and {MOST_PICTURES}, got {count}", code="bad_option")
    return draw_pictures(count)


def _requests(pictures: Sequence[T]) -> dict[str, list[T]]:
    """The cases: each picture alone, all of them together, or a text alone where there are none."""
    if not pictures:
        return {TEXT: []}
    alone = {f"image.{number}": [picture] for number, picture in enumerate(pictures)}
    return alone | ({TOGETHER: list(pictures)} if len(pictures) > 1 else {})


def _question(prompt: str | None, steps: int | None) -> tuple[str, int]:
    """White space around it belongs to no family's prompt."""
    asked = (PROMPT if prompt is None else prompt).strip()
    if not asked:
        raise UserError("the prompt is empty; ask something", code="bad_option")
    steps = STEPS if steps is None else steps
    if not 0 <= steps <= MOST_STEPS:
        raise UserError(f"steps must be between 0 and {MOST_STEPS}, got {steps}", code="bad_option")
    return asked, steps


def _stored(checkpoint: Checkpoint, file: Path, *, free: bool) -> Golden:
    """The golden values in `file`; free: whether nothing was asked for that they already answer."""
    if not free:
        raise UserError(
            f"{file} brings its own pictures, prompt and values; leave out --images, --random, --prompt, --steps and "
            "--save-golden",
            code="bad_option",
        )
    golden, own = load_golden(file), (tower_family(checkpoint) or vlm_family(checkpoint)).name
    if golden.family != own:
        raise UserError(
            f"{file} holds golden values of {golden.family}, the model is of {own}",
            code="bad_reference",
            param="reference",
        )
    return replace(golden, reference=f"{file} ({golden.reference})")


def _computed(
    checkpoint: Checkpoint,
    reference: str,
    pictures: Sequence[Picture],
    prompt: str,
    steps: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Golden:
    """What the reference gives for each picture alone, and for all in one request when there are several."""
    other = checkpoint if reference == TRANSFORMERS else open_model(reference)
    refuse_codes(other)
    family = _family(checkpoint, other.root)
    opened = [open_picture(picture.data, picture.name) for picture in pictures]
    loaded = _loaded(family.load, other, device, dtype)
    # the reference's convolution in float32, whatever torch's default is
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        traces = {case: loaded.run(shown, prompt, steps) for case, shown in _requests(opened).items()}
        if (texts := _loaded(load_text_tower, other, device, dtype)) is not None:
            traces[TEXT_TOWER] = texts.read(TEXTS)
    return Golden(
        family=family.name,
        reference=reference,
        prompt=prompt if family.speaks else None,
        pictures=tuple(pictures),
        traces=traces,
    )


def _loaded(
    load: Callable[[Path, torch.device, torch.dtype, Path | None], T],
    other: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
) -> T:
    try:
        with _quiet_transformers():
            return load(other.root, device, dtype, other.adapter)
    except SiglaneError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # it reads the JSON without looking
        raise ConfigError(f"{other.root}: the reference does not understand its configuration: {error!r}") from error


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Its warnings about tiny vocabularies and unknown model types are not about the comparison."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _compared(ours: SiglaneRunner, expected: Golden, thresholds: Thresholds) -> tuple[Comparison, ...]:
    """In the order of the forward."""
    decoded = [decode_picture(picture.name, picture.data) for picture in expected.pictures]
    requests = _requests(decoded)
    against = partial(compare_traces, bars_of=thresholds.of, rounded=thresholds.bits is not None)
    found: list[Comparison] = []
    for case, reference in expected.traces.items():
        if case == TEXT_TOWER:
            found += against(case, ours.read(TEXTS), reference)
            continue
        if case not in requests:
            raise UserError(f"the golden values hold case {case!r}, which siglane does not know", code="bad_reference")
        trace = ours.run(ours.patches(requests[case]), expected.prompt or "", expected.steps)
        if "projector_input" not in reference:  # then it is the features, which the reference names once
            trace.pop("projector_input", None)
        found += against(case, trace, reference)
    if decoded:
        found.append(_packing(ours, decoded, thresholds))
    return tuple(sorted(found, key=lambda one: place(one.stage)))


def _packing(ours: SiglaneRunner, images: Sequence[DecodedImage], thresholds: Thresholds) -> Comparison:
    """Requests of one picture each, alone and in one packed call; a single picture is packed with itself."""
    patches = [ours.patches([image])[0] for image in images]
    patches = patches if len(patches) > 1 else patches * 2
    return packing([ours.see([one]) for one in patches], ours.see(patches), thresholds.of(PACKING))


def _family(checkpoint: Checkpoint, folder: Path) -> ReferenceFamily:
    """The reference of both, which must be the same."""
    own, other = family_of(checkpoint.root), family_of(folder)
    if own is None:
        raise UserError(
            f"{checkpoint.root}: there is no reference for this family; give golden values (--reference FILE)",
            code="no_reference",
            param="reference",
        )
    if other is None or other.name != own.name:
        found = "no checkpoint that siglane has a reference for" if other is None else f"a checkpoint of {other.name}"
        raise UserError(
            f"the reference {folder} is {found}, the model is of {own.name}; give one of the same family",
            code="bad_reference",
            param="reference",
        )
    return own
