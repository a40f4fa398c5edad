"""LoRA by the references' own code: an adapter's products added to the tensors whose names are theirs but for prefixes.

Source: peft 0.21 `tuners/lora/layer.py` (`get_delta_weight`). siglane refuses what is not written here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from siglane.errors import WeightError
from siglane.verify.references.files import Raw, Reader, Tensors, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# levels of a name that are there in one version and not in another
OPTIONAL = {"base_model", "model", "vision_model", "base_layer", "modules_to_save", "default", "token_adapter"}
PART = re.compile(r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.default)?(\.weight|\.bias)?")
# where only an embedding table is stored, the name that its head would have
TABLE = re.compile(r"(^|\.)model\.(?:language_model\.)?embed_tokens\.weight$")
DECODER = "decoder.token_embedding.weight"
TOKENS = "trainable_tokens_delta"
OTHER_TOWERS = re.compile("vis|text_model")


def tensors_of(folder: Path, adapter: Path | None, part: str = "") -> Tensors:
    """The tensors in `folder`, or its folder `part`, with `adapter` or the ones that lie beside them merged."""
    tensors = Tensors.of(folder / part)
    for one in dict.fromkeys((adapter or folder, folder, folder / part)):
        if (one / WEIGHTS).is_file():
            tensors = merged(tensors, one, f"{part}." if part else "")
    return tensors


def merged(tensors: Tensors, adapter: Path, prefix: str = "") -> Tensors:
    """`tensors` as the adapter changes them. prefix: what the whole model has in front of their names.

    What belongs to another part of the model is passed over; siglane, which sees all, refuses what belongs to none.
    """
    config, trained = read_json(adapter / CONFIG), Tensors.in_file(adapter / WEIGHTS).readers
    readers = dict(tensors.readers)
    heads = {head: name for name in tensors.readers if (head := _head_of(name)) is not None}
    apart = [key for key in trained if TOKENS not in key]  # rows of tokens stay the same in what is tied
    touched = {name for key in apart if (name := _target(key, {**heads, **readers}, prefix)) is not None}
    for head, table in heads.items():
        if head not in readers and touched & {head, table}:
            readers[head] = readers[table]  # what changes one of two that are tied parts them
    for key, read in trained.items():
        name = _target(key, readers, prefix)
        match = PART.fullmatch(key)
        if name is None or (match and match[2].endswith("_B") and match[3] != ".bias"):
            continue
        if match is None:
            alike = [head for head, table in heads.items() if table == name and TOKENS in key and head in readers]
            for one in [name, *(head for head in alike if torch.equal(readers[head](), readers[name]()))]:
                readers[one] = partial(_replaced, readers.get(one), read, key, config)
        else:
            other = trained.get(key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B"), read)
            readers[name] = partial(_added, readers[name], read, other, match[1], match[2], config)
    return Tensors(readers)


def _head_of(table: str) -> str | None:
    """`llm.model.embed_tokens.weight` -> `llm.lm_head.weight`; None for what is no embedding table."""
    if table == DECODER:
        return "decoder.head.weight"
    return TABLE.sub(r"\1lm_head.weight", table) if TABLE.search(table) else None


def _target(key: str, names: Mapping[str, Any], prefix: str) -> str | None:
    """The tensor that one of the adapter's changes."""
    match = PART.fullmatch(key)
    wanted = match[1] + (match[3] if match[3] == ".bias" else ".weight") if match else key
    wanted = re.sub(rf"\.{TOKENS}(\.default)?$", ".weight", wanted)
    found = [name for name in names if _core(prefix + name) == _core(wanted)]
    if not found:
        behind = "." + _core(wanted)
        found = [name for name in names if _core(prefix + name).endswith(behind) and not OTHER_TOWERS.search(name)]
    if len(found) > 1:
        raise WeightError(f"the reference finds {len(found)} tensors that the adapter's {key} may change: {found[:2]}")
    return found[0] if found else None


@lru_cache(1 << 14)  # every name of the model, for each of the adapter's
def _core(name: str) -> str:
    """Without optional levels, a level that is repeated once; the attention of a pooling head has its own leaf."""
    levels = [level for level in name.split(".") if level not in OPTIONAL]
    once = [level for at, level in enumerate(levels) if not at or level != levels[at - 1]]
    return ".".join(once).replace("in_proj_", "")


def _added(base: Reader, a: Reader, b: Reader, module: str, kind: str, config: Raw) -> torch.Tensor:
    scale = _scale(config, module.removeprefix("base_model.model."))
    weight = base().float()
    if kind == "lora_B":  # its bias
        return weight + a().float() * scale
    product = b().float().flatten(1) @ a().float().flatten(1)
    return weight + (product.T if "embedding" in kind else product).reshape(weight.shape) * scale


def _replaced(base: Reader | None, trained: Reader, key: str, config: Raw) -> torch.Tensor:
    if TOKENS not in key or base is None:
        return trained()
    stated = config["trainable_token_indices"]
    rows = stated if isinstance(stated, list) else next(ids for name, ids in stated.items() if f".{name}." in key)
    return base().float().index_copy(0, torch.tensor(rows), trained().float())


def _scale(config: Raw, module: str) -> float:
    rank, alpha = (
        next((value for key, value in (config.get(f"{name}_pattern") or {}).items() if _ends(key, module)), default)
        for name, default in (("rank", config.get("r", 8)), ("alpha", config.get("lora_alpha", 8)))
    )
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _ends(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None
