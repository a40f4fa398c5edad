"""The facts of a projector: how patch features become rows of the language model's width, and the known variants."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from siglane.errors import ConfigError
from siglane.tiling.merge import Merge
from siglane.types import Activation

NORM_EPS = 1e-5  # torch's LayerNorm default, which VILA's projectors use


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectorConfig:
    """One projector: merge neighbouring patches, then a stack of linear layers.

    vocabulary: when given, the layers end in logits over a visual vocabulary and the row is the expected entry of its
    table (Ovis, `projector/visual_vocabulary.py`).
    merge: "none" keeps every patch; "blocks" concatenates `factor` x `factor` patches in channel order
    (row, column, channel), zero-padding odd grids at the bottom and right; "pixel_shuffle" is the same but refuses
    odd grids (nanoVLM, Idefics3).
    column_major: output rows run down the columns (VILA checkpoints from before December 2024, formats.md 5.3).
    layers: see `projector/mlp.py`; widths in the order of the forward pass.
    """

    merge: Merge
    factor: int
    column_major: bool
    layers: tuple[Layer, ...]
    input_size: int
    output_size: int
    vocabulary: VocabularyConfig | None = None


@dataclass(frozen=True, slots=True)
class VocabularyConfig:
    """name: tensor of the table `[size + indicators, output_size]` in the checkpoint; its last rows are indicators."""

    name: str
    size: int
    indicators: int


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """`name` is the tensor prefix in the checkpoint (`layers.2`)."""

    name: str
    input_size: int
    output_size: int
    bias: bool


@dataclass(frozen=True, slots=True)
class NormLayer:
    name: str
    size: int
    eps: float


@dataclass(frozen=True, slots=True)
class ActivationLayer:
    activation: Activation


Layer = LinearLayer | NormLayer | ActivationLayer


# VILA's mm_projector_type -> (merge, factor, widths after each linear layer as multiples of c; negative: divided by;
# 0: the output width).
# formats.md 5.3; NVlabs/VILA llava/model/multimodal_projector/base_projector.py.
_VILA: dict[str, tuple[Merge, int, tuple[int, ...]]] = {
    "mlp_downsample": ("blocks", 2, (0, 0)),
    "mlp_downsample_2x2_fix": ("blocks", 2, (0, 0)),
    "mlp_downsample_3x3_fix": ("blocks", 3, (3, 0, 0)),
    "mlp_downsample_3x3_s2": ("blocks", 3, (3, 1, -3, 0, 0)),
    "mlp_downsample_3x3_s2_new": ("blocks", 3, (4, 2, 1, -3, 0, 0)),
}


def vila_projector(kind: str, *, input_size: int, output_size: int, column_major: bool = False) -> ProjectorConfig:
    """The projector VILA calls `kind`, with `input_size` channels per patch. ConfigError when it is not known."""
    merge: Merge = "none"
    factor = 1
    layers: tuple[Layer, ...] = ()
    if kind == "linear":
        layers = (LinearLayer("layers", input_size, output_size, bias=True),)
    elif depth := re.fullmatch(r"mlp([1-9]|1[0-6])x_gelu", kind):
        layers = _mlp([input_size] + [output_size] * int(depth[1]))
    elif kind in _VILA:
        merge, factor, multiples = _VILA[kind]
        layers = _downsample_layers(factor * factor * input_size, input_size, output_size, multiples)
    elif kind != "identity":
        known = ", ".join(["identity", "linear", "mlp<N>x_gelu", *_VILA])
        raise ConfigError(f"mm_projector_type {kind!r} is not known; siglane knows {known}")
    return ProjectorConfig(
        merge=merge,
        factor=factor,
        column_major=column_major,
        layers=layers,
        input_size=input_size,
        output_size=output_size,
    )


def _downsample_layers(merged: int, channels: int, output_size: int, multiples: tuple[int, ...]) -> tuple[Layer, ...]:
    """nn.Sequential numbering: 0 merges, then LayerNorm, Linear, GELU groups; the last two linears share no norm."""
    layers: list[Layer] = [NormLayer("layers.1", merged, NORM_EPS)]
    index, width = 2, merged
    for position, multiple in enumerate(multiples):
        following = channels * multiple if multiple > 0 else channels // -multiple if multiple < 0 else output_size
        layers.append(LinearLayer(f"layers.{index}", width, following, bias=True))
        last = position == len(multiples) - 1
        if not last:
            layers.append(ActivationLayer("gelu_erf"))
            index += 2
            if multiple != 0:
                layers.append(NormLayer(f"layers.{index}", following, NORM_EPS))
                index += 1
        width = following
    return tuple(layers)


def llava_projector(
    *,
    input_size: int,
    output_size: int,
    activation: Activation = "gelu_erf",
    bias: bool = True,
    names: tuple[str, str] = ("linear_1", "linear_2"),
    middle_size: int | None = None,
    pre_norm: float | None = None,
) -> ProjectorConfig:
    """LLaVA's two linear layers around an activation (transformers `LlavaOnevisionMultiModalProjector`).

    names: of the two in the checkpoint; middle_size: width between them, None: the output's; pre_norm: eps of a norm
    in front of them (`pre_norm` of R-4B and Bee), None without one."""
    first, second = names
    middle = output_size if middle_size is None else middle_size
    layers = (
        *(() if pre_norm is None else (NormLayer("pre_norm", input_size, pre_norm),)),
        LinearLayer(first, input_size, middle, bias=bias),
        ActivationLayer(activation),
        LinearLayer(second, middle, output_size, bias=bias),
    )
    return ProjectorConfig(
        merge="none", factor=1, column_major=False, layers=layers, input_size=input_size, output_size=output_size
    )


def pixel_shuffle_projector(factor: int, *, input_size: int, output_size: int, name: str = "proj") -> ProjectorConfig:
    """nanoVLM's and Idefics3's: pixel shuffle by `factor`, then one linear layer without bias."""
    layers = (LinearLayer(name, input_size * factor * factor, output_size, bias=False),)
    return ProjectorConfig(
        merge="pixel_shuffle", factor=factor, column_major=False, layers=layers,
        input_size=input_size, output_size=output_size,
    )  # fmt: skip


def vocabulary_projector(
    factor: int, rows: int, indicators: int, *, head: str, table: str, input_size: int, output_size: int
) -> ProjectorConfig:
    """Ovis': merged blocks, `{head}.0` and `{head}.1` (a linear layer and a norm) give logits over a visual vocabulary,
    whose table has `rows` rows, the last of them `indicators`. ConfigError when no row is left for words."""
    words = rows - indicators
    if words < 1:
        raise ConfigError(f"a visual vocabulary of {rows} rows has none left beside its {indicators} indicators")
    merged = input_size * factor * factor
    return ProjectorConfig(
        merge="blocks", factor=factor, column_major=False,
        layers=(LinearLayer(f"{head}.0", merged, words, bias=False), NormLayer(f"{head}.1", words, NORM_EPS)),
        input_size=input_size, output_size=output_size, vocabulary=VocabularyConfig(table, words, indicators),
    )  # fmt: skip


def _mlp(widths: Sequence[int]) -> tuple[Layer, ...]:
    layers: list[Layer] = []
    for number, (before, after) in enumerate(pairwise(widths)):
        if number:
            layers.append(ActivationLayer("gelu_erf"))
        layers.append(LinearLayer(f"layers.{2 * number}", before, after, bias=True))
    return tuple(layers)
