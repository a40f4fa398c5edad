"""A checkpoint's files as the references read them: JSON as it stands, tensors by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.initialization import no_init_weights

from siglane.errors import ConfigError, WeightError

Raw = dict[str, Any]
Reader = Callable[[], torch.Tensor]

WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\.")
# what stands first in the names of the models that have references
PARTS = {
    "model", "lm_head", "llm", "language_model", "decoder", "vision_tower", "vision_model", "text_model",
    "vision_encoder", "visual_tokenizer", "vte", "multi_modal_projector", "mm_projector", "MP", "embeddings",
    "connector",
}  # fmt: skip


def read_json(path: Path) -> Raw:
    """The object in `path`; {} when there is no such file. ConfigError when it is not JSON."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object")
    return found


def classes_in(config: Raw) -> list[str]:
    """The names in `architectures`; sharding by FSDP puts its own in front of them."""
    return [re.sub("^FSDP", "", name) for name in config.get("architectures") or []]


def processor_json(folder: Path) -> Raw:
    """processor_config.json's picture part, which transformers 5 prefers, else preprocessor_config.json; {} without."""
    nested = read_json(folder / "processor_config.json").get("image_processor")
    return nested if isinstance(nested, dict) else read_json(folder / "preprocessor_config.json")


def chat_template(folder: Path, *, by_processor: bool) -> str | None:
    """The checkpoint's, in the order in which transformers' processors or tokenizers look for it."""
    jinja, tokenizer = folder / "chat_template.jinja", read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(tokenizer, list):
        tokenizer = {one["name"]: one["template"] for one in tokenizer}
    of_tokenizer = [
        jinja.read_text(encoding="utf-8") if jinja.is_file() else None,
        tokenizer.get("default") if isinstance(tokenizer, dict) else tokenizer,
    ]
    of_processor = [
        read_json(folder / name).get("chat_template") for name in ("processor_config.json", "chat_template.json")
    ]
    found = [*of_processor, *of_tokenizer] if by_processor else [*of_tokenizer, *of_processor]
    return next((one.get("default") if isinstance(one, dict) else one for one in found if one), None)


def media_token(folder: Path, name: str, default: str) -> str:
    """The text of `image_token` or `video_token`: the tokenizer's, else the processor's."""
    tokenizer = read_json(folder / "tokenizer_config.json")
    extra = tokenizer.get("extra_special_tokens")
    places = [extra if isinstance(extra, dict) else {}, tokenizer, read_json(folder / "processor_config.json")]
    return str(next((place[name] for place in places if isinstance(place.get(name), str)), default))


@dataclass(frozen=True, slots=True)
class Tensors:
    """Tensors by name, each read when it is asked for. Reading one holds no other in memory."""

    readers: Mapping[str, Callable[[], torch.Tensor]]

    @classmethod
    def of(cls, folder: Path) -> Tensors:
        """All safetensors files of `folder`, an adapter's left out. WeightError when there are none, or one cannot be
        opened."""
        readers: dict[str, Callable[[], torch.Tensor]] = {}
        for file in sorted(set(folder.glob("*.safetensors")) - set(folder.glob("adapter_model.safetensors"))):
            readers |= cls.in_file(file).readers
        if not readers:
            raise WeightError(f"{folder} holds no *.safetensors file for the reference to load")
        return cls(_unwrapped(readers))

    @classmethod
    def in_file(cls, file: Path) -> Tensors:
        """Those of one file. WeightError when it cannot be opened."""
        with _opened(file) as handle:
            return cls({name: partial(_read, file, name) for name in handle.keys()})  # noqa: SIM118 (no dict)

    def under(self, *prefixes: str) -> Tensors:
        """Those under the first of `prefixes` that any name begins with, called without it. WeightError when none."""
        for prefix in prefixes:
            found = {name.removeprefix(prefix): read for name, read in self.readers.items() if name.startswith(prefix)}
            if found:
                return Tensors(found)
        raise WeightError(f"the reference finds no tensor called {' or '.join(prefixes)}...")

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """The same under other names: new name -> name here. WeightError when one is missing."""
        return Tensors({new: self.reader(name) for new, name in names.items()})

    def reader(self, name: str) -> Callable[[], torch.Tensor]:
        """WeightError when there is no such tensor."""
        if name not in self.readers:
            raise WeightError(f"the reference finds no tensor {name}")
        return self.readers[name]

    def __contains__(self, name: str) -> bool:
        return name in self.readers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.reader(name)()


def _unwrapped(readers: Mapping[str, Reader]) -> dict[str, Reader]:
    """Without what torch.compile, FSDP and DataParallel put into names, and without the name of the attribute in which
    a trainer keeps its model."""
    plain = {WRAPPERS.sub("", name): read for name, read in readers.items()}
    first = next(iter(plain)).partition(".")[0]
    if all(name.startswith(first + ".") for name in plain):
        inside = {name.partition(".")[2].partition(".")[0] for name in plain}
        if inside & PARTS and first not in PARTS - {"model"}:
            return {name.partition(".")[2]: read for name, read in plain.items()}
    return plain


def _read(file: Path, name: str) -> torch.Tensor:
    with _opened(file) as handle:
        tensor: torch.Tensor = handle.get_tensor(name)
        return tensor


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{file} is not a usable safetensors file: {error}") from error


def unset(build: Callable[[], Any]) -> Any:
    """The model of transformers that `build` makes, without its random numbers, which take as long as reading the
    weights that `ready` puts in their places."""
    with no_init_weights():
        model = build()
    model.tie_weights()
    return model


def ready(module: nn.Module, tensors: Tensors, device: torch.device, dtype: torch.dtype) -> None:
    """`module` in `dtype` on `device`, for evaluation, every parameter filled from the tensor of its name.

    Buffers keep their dtype, as transformers loads them. WeightError when a tensor is missing or of another shape;
    tensors that are left over belong to other modules.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(dtype)
            tensor = tensors[name]
            if tensor.shape != parameter.shape:
                raise WeightError(
                    f"tensor {name} has shape {list(tensor.shape)}, the reference needs {list(parameter.shape)}"
                )
            parameter.copy_(tensor)
    module.to(device).eval().requires_grad_(False)
