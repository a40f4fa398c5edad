"""`siglane quantize`: a model's folder with codes in the place of its weights; what else describes it is copied."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from siglane.errors import UserError
from siglane.families.codes import write_model
from siglane.families.family import VlmFamily
from siglane.families.model import load_model
from siglane.families.processor import load_processor
from siglane.families.registry import is_vision_only, vlm_family
from siglane.families.stated import MORE_TEMPLATES, TOKENIZER_FILES
from siglane.families.two_tower import has_both_towers, load_two_tower
from siglane.nn.cpu.int4 import GROUP_SIZE
from siglane.nn.quantise import Bits
from siglane.weights.files import INDEX, SINGLE
from siglane.weights.hub import ADAPTER_CONFIG, FILE_PATTERNS, TOKENIZER_PATTERNS, Checkpoint
from siglane.weights.quantised import CONFIG, SECTION, CodesFormat, stated_method

COPIED = (*(pattern for pattern in FILE_PATTERNS if "safetensors" not in pattern), "LICENSE*", "NOTICE*")
LEFT_OUT = (CONFIG, INDEX, ADAPTER_CONFIG)  # the first is written last


def write_folder(checkpoint: Checkpoint, output: Path, bits: Bits) -> int:
    """Writes the folder `output`, which has the name only once it is whole. Returns the bytes of its weights.

    Weights are read as float32, adapters merged, whatever dtype the folder is loaded in later. UserError for a model
    that is quantised already or that nothing answers or tags with, for a folder that exists or cannot be written, and
    for bits that have no kernel here; ConfigError or WeightError as the loaders.
    """
    family = _checked(checkpoint, output)
    with _beside(output) as part:
        _copy_files(checkpoint, family, part)
        write_model(_loaded(checkpoint, family, bits), part / SINGLE)
        stated = CodesFormat(bits, GROUP_SIZE, rotated=family is not None)
        config = {**checkpoint.json(CONFIG), SECTION: stated.section}
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return (part / SINGLE).stat().st_size


def _checked(checkpoint: Checkpoint, output: Path) -> VlmFamily | None:
    """The family of a model that answers, None for a SigLIP with both towers."""
    if (method := stated_method(checkpoint)) is not None:
        message = f"{checkpoint.root} is quantised already, by {method}; give the original model"
        raise UserError(message, code="unsupported_quantization", param="model")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists; give a folder that does not", code="cannot_write", param="output")
    if not is_vision_only(checkpoint):
        return vlm_family(checkpoint)
    if not has_both_towers(checkpoint):
        message = f"{checkpoint.root} has neither a language model nor a text tower; nothing loads its codes"
        raise UserError(message, code="unsupported_quantization", param="model")
    return None


def _loaded(checkpoint: Checkpoint, family: VlmFamily | None, bits: Bits) -> nn.Module:
    if family is None:
        return load_two_tower(checkpoint, device="cpu", dtype=torch.float32, quantization=bits).model
    config = load_processor(checkpoint).config
    return load_model(checkpoint, config, device="cpu", dtype=torch.float32, quantization=bits)


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` at the end, and goes when that does not come."""
    try:
        part = output.absolute().parent / f".{output.name}.{secrets.token_hex(4)}.part"
        part.mkdir()
    except OSError as error:
        raise _unwritable(output, error) from error
    try:
        yield part
        os.replace(part, output)
    except OSError as error:
        raise _unwritable(output, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unwritable(output: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {output}: {error.strerror}", code="cannot_write", param="output")


def _copy_files(checkpoint: Checkpoint, family: VlmFamily | None, target: Path) -> None:
    """Configurations, tokenizer, processor, chat templates and licence, in the folders in which they lie."""
    root = checkpoint.root
    folders = {root, root / MORE_TEMPLATES}
    if family is not None:
        sources = (*family.vision_sources(checkpoint), *family.language_sources(checkpoint))
        folders |= {source.folder.root for source in sources}
        _check_adapter(checkpoint, family)
    for folder in folders:
        for file in sorted({file for pattern in COPIED for file in folder.glob(pattern)}):
            place = file.relative_to(root)
            if file.is_file() and str(place) not in LEFT_OUT and file.name not in LEFT_OUT[1:]:
                (target / place).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target / place)
    if family is not None and (tokenizer := family.tokenizer_folder(checkpoint).root) not in folders:
        for file in (file for pattern in TOKENIZER_PATTERNS for file in tokenizer.glob(pattern)):
            shutil.copyfile(file, target / file.name)  # one that the configuration only names


def _check_adapter(checkpoint: Checkpoint, family: VlmFamily) -> None:
    """UserError for an adapter with another tokenizer than the model's, which would have to be joined with it."""
    adapter, own = checkpoint.adapter, family.tokenizer_folder(checkpoint)
    for name in TOKENIZER_FILES if adapter is not None else ():
        assert adapter is not None
        file = adapter / name
        if file.is_file() and not (own.has(name) and own.path(name).read_bytes() == file.read_bytes()):
            message = f"{file} is not the model's own; merge the adapter into the model's folder, and quantise that"
            raise UserError(message, code="bad_adapter", param="adapter")
