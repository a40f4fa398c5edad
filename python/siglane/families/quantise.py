"""A chat model of fewer bits: each part is made small, on CPUs as soon as it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from siglane.families.stack import VisionStack
from siglane.lm.quantise import LanguageQuantiser
from siglane.lm.qwen import QwenModel
from siglane.nn.cpu.memory import return_freed
from siglane.nn.quantise import Bits, has_float_layers, quantise, unsupported
from siglane.weights.load import Stage, allocate


class Quantiser:
    """Of one model. `stages` of the load, by paths in it: none on CUDA, where everything is replaced at the end.

    UserError when there is no kernel for `kind` here, on CUDA none for a mixture of experts.
    """

    def __init__(
        self,
        kind: Bits,
        vision: VisionStack | None,
        language: QwenModel,
        device: torch.device,
        dtype: torch.dtype,
        vision_dtype: torch.dtype,
    ) -> None:
        if language.config.experts is not None and device.type != "cpu":
            message = f"a mixture of experts has no form of fewer bits on {device.type}"
            raise unsupported(kind, f"{message}; use the model in floats, or a CPU")
        self._vision, self._language, self._device, self._kind = vision, language, device, kind
        self.stages: dict[str, Stage] = {}
        if device.type != "cpu":
            return
        self._by_block = LanguageQuantiser(language.config, kind)
        self._incoming = self._by_block.begin(language)
        self._add("language.blocks", language.blocks, dtype, self._by_block.quantise_block)
        if vision is not None:
            blocks = vision.encoder.tower.blocks
            self._add("vision.encoder.tower.blocks", blocks, vision_dtype, self._replace)

    def _add(self, path: str, blocks: nn.ModuleList, dtype: torch.dtype, end: Callable[[nn.Module], None]) -> None:
        def replace(block: nn.Module) -> None:
            end(block)
            return_freed()

        stage = Stage(partial(allocate, device=self._device, dtype=dtype, later=self._incoming), replace)
        self.stages |= {f"{path}.{number}": stage for number in range(len(blocks))}

    def _replace(self, part: nn.Module) -> None:
        # a tower has many rows at a time, for which 4 bits cost time and, in the mean of its rows, most of the error
        kind = "8bit" if self.stages else self._kind
        if kind == "fp8" and part is self._language:  # a step that decodes takes as long as its weights are read
            kind = "8bit"
        quantise(part, kind, self._device)

    @property
    def later(self) -> list[nn.Module]:
        """The parts of `stages`, which get their memory there."""
        if not self.stages:
            return []
        return [
            self._language.blocks,
            *self._incoming,
            *([] if self._vision is None else [self._vision.encoder.tower.blocks]),
        ]

    def finish(self) -> None:
        """What is left once all is loaded: the output head and the projector."""
        if self.stages:
            self._by_block.finish(self._language)
        for part in (self._language, self._vision):
            if part is not None and has_float_layers(part):
                self._replace(part)
        return_freed()
