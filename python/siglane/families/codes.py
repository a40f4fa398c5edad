"""A model of fewer bits as the tensors of a folder of codes, and back (formats.md section 10).

Names are the paths of siglane's own modules, because layers are stored as they are multiplied: q, k and v in one, a
decoder in its turned basis, the gains of norms in the weights behind them. What oneDNN and torch make of codes differs
from processor to processor and is made anew as they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from siglane.errors import ConfigError
from siglane.lm.quantise import ABSORBED, FOUR_BITS, restore
from siglane.lm.qwen import QwenModel
from siglane.lm.tables import QuantisedHead, QuantisedTable, TiedTable
from siglane.nn.cpu.int4 import BLOCK, Int4Codes, Int4Linear
from siglane.nn.cpu.int8 import Int8Codes, Int8Weight
from siglane.nn.cpu.memory import return_freed
from siglane.nn.embedding import VocabTable
from siglane.nn.quantise import LAYERS, Bits, QuantisedColumn, QuantisedQKV, QuantisedRow, Weight, quantise
from siglane.weights.load import allocate
from siglane.weights.quantised import CodesFile, CodesFormat, TensorSpec, narrowest, write_codes

CPU = torch.device("cpu")
LANGUAGE = "language"  # where a chat model has its decoder
BASIS, GAIN = "basis", "gain"
OWN_HEAD = f"{LANGUAGE}.lm_head.codes"  # there where a table is not its own head


def write_model(model: nn.Module, path: Path) -> None:
    """`model`, quantised on a CPU and not yet optimised, as one file. OSError where it cannot be written."""
    floats = {name: narrowest(value) for name, value in _floats(model)}
    specs = {name: TensorSpec(value.dtype, tuple(value.shape)) for name, value in floats.items()}
    for name, layer in _coded(model):
        specs |= {f"{name}.{leaf}": spec for leaf, spec in _layer_specs(layer).items()}
    codes = ((f"{name}.{leaf}", value) for name, layer in _coded(model) for leaf, value in _leaves(layer))
    write_codes(path, specs, (pair for pairs in (floats.items(), codes) for pair in pairs))


def _coded(model: nn.Module) -> Iterator[tuple[str, Int8Weight | Int4Linear | QuantisedTable]]:
    """Every layer and table that holds codes, under the path of the float one."""
    for path, module in model.named_modules():
        if isinstance(module, QuantisedColumn | QuantisedRow | QuantisedQKV | QuantisedHead):
            assert isinstance(module.linear, Int8Weight | Int4Linear)
            yield path, module.linear
        elif isinstance(module, QuantisedTable):
            yield path, module.head if isinstance(module, TiedTable) else module


def _floats(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    for path, layer in _coded(model):
        if not isinstance(layer, QuantisedTable) and layer.bias is not None:
            yield f"{path}.bias", layer.bias
    for path, module in model.named_modules():
        if isinstance(module, QwenModel):
            assert module.basis is not None
            yield f"{path}.{BASIS}", module.basis
        if isinstance(module, TiedTable):
            yield f"{path.rpartition('.')[0]}.{GAIN}", module.gain


def _layer_specs(layer: Int8Weight | Int4Linear | QuantisedTable) -> dict[str, TensorSpec]:
    if isinstance(layer, Int4Linear):
        return _four_bits(layer.outputs, layer.inputs, layer.group_size)
    if isinstance(layer, QuantisedTable):
        return _eight_bits(layer.vocab_size, layer.hidden_size)
    return _eight_bits(layer.outputs, layer.inputs)


def _leaves(layer: Int8Weight | Int4Linear | QuantisedTable) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(layer, Int4Linear):
        four = layer.stored
        yield from {"codes": four.pairs, "scale": four.scale, "zero": four.zero}.items()
        return
    if isinstance(layer, QuantisedTable):
        assert isinstance(layer.codes, torch.Tensor)
        eight = Int8Codes(layer.codes, layer.scale)
    else:
        eight = layer.stored
    yield from eight._asdict().items()


def _eight_bits(outputs: int, inputs: int) -> dict[str, TensorSpec]:
    return {"codes": TensorSpec(torch.int8, (outputs, inputs)), "scale": TensorSpec(torch.float32, (outputs,))}


def _four_bits(outputs: int, inputs: int, group_size: int) -> dict[str, TensorSpec]:
    rows, groups = -(-outputs // BLOCK) * BLOCK, -(-inputs // group_size)
    return {
        "codes": TensorSpec(torch.uint8, (rows, groups * group_size // 2)),
        "scale": TensorSpec(torch.bfloat16, (rows, groups)),
        "zero": TensorSpec(torch.uint8, (rows, groups)),
    }


def layout(model: nn.Module, stated: CodesFormat) -> dict[str, TensorSpec]:
    """The tensors of the file that holds `model`, which is built on the meta device and has float layers. ConfigError
    where what is stated is not of such a model."""
    specs: dict[str, TensorSpec] = {}
    left_out: list[str] = []
    if stated.rotated != (speaks := any(isinstance(module, QwenModel) for module in model.modules())):
        raise ConfigError(f"quantization_config: rotated must be {speaks} for this model; write the folder again")
    for path, module in model.named_modules():
        if isinstance(module, QwenModel):
            square = TensorSpec(None, (module.config.hidden_size,) * 2)
            specs |= {f"{path}.{name}": square for name in (BASIS, *([GAIN] if module.lm_head is None else []))}
        in_language = path.startswith(f"{LANGUAGE}.")
        if isinstance(module, LAYERS):
            outputs, inputs = module.weight.shape
            four = stated.bits == "4bit" and (path.endswith(FOUR_BITS) or not speaks)
            made = _four_bits(outputs, inputs, stated.group_size) if four else _eight_bits(outputs, inputs)
            made |= {} if module.bias is None else {"bias": TensorSpec(None, (outputs,))}
        elif isinstance(module, VocabTable) and in_language:
            made = _eight_bits(module.vocab_size, module.hidden_size)
        else:
            left_out += [f"{path}."] * (in_language and path.endswith(ABSORBED))
            continue
        specs |= {f"{path}.{leaf}": spec for leaf, spec in made.items()}
        left_out.append(f"{path}.")
    floats = ((name, value) for name, value in model.named_parameters() if not name.startswith(tuple(left_out)))
    return specs | {name: TensorSpec(None, tuple(value.shape)) for name, value in floats}


class CodesReader:
    """Makes `model`, built on the meta device, what the file holds. WeightError, before anything is allocated, where
    its names, dtypes or shapes are not those of `layout`."""

    def __init__(self, file: CodesFile, model: nn.Module, stated: CodesFormat) -> None:
        file.check(layout(model, stated))
        self._file = file
        self._paths = {id(module): path for path, module in model.named_modules()}

    def given(self, layer: nn.Module) -> tuple[Weight, torch.Tensor | None]:
        """The codes of a float layer or table of the model, views of the file; scales and bias are copies."""
        path = self._paths[id(layer)]
        codes, scale = self._file.read(f"{path}.codes"), self._file.read(f"{path}.scale").clone()
        bias = self.values(f"{path}.bias", torch.float32) if f"{path}.bias" in self._file.tensors else None
        if f"{path}.zero" not in self._file.tensors:
            return Int8Codes(codes, scale), bias
        outputs, inputs = layer.get_parameter("weight").shape
        return Int4Codes(codes, scale, self._file.read(f"{path}.zero"), outputs, inputs), bias

    def values(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Floats, a copy."""
        return self._file.read(name).to(dtype, copy=True)

    def language(self, model: QwenModel, bits: Bits, dtype: torch.dtype) -> None:
        """The decoder at LANGUAGE."""
        values: Callable[[str], torch.Tensor] = lambda name: self.values(f"{LANGUAGE}.{name}", dtype)  # noqa: E731
        restore(model, bits, self.given, values)
        allocate(model, CPU, dtype)
        self._fill(model)
        return_freed()

    def encoders(self, model: nn.Module, bits: Bits, dtype: torch.dtype) -> None:
        """Towers and what stands behind them. Norms come first: layers look at their dtype."""
        allocate(model, CPU, dtype, [module for module in model.modules() if isinstance(module, LAYERS)])
        self._fill(model)
        quantise(model, bits, CPU, self.given)
        return_freed()

    def _fill(self, model: nn.Module) -> None:
        """Every parameter that has memory."""
        with torch.no_grad():
            for module in model.modules():
                for leaf, parameter in module.named_parameters(recurse=False):
                    if not parameter.is_meta:
                        name = f"{self._paths[id(module)]}.{leaf}".removeprefix(".")
                        parameter.copy_(self._file.read(name))
