"""The facts of a SigLIP tower. Each one changes the numbers, none has a silent default (docs/model_facts.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from siglane.config.reader import ConfigReader, RawConfig
from siglane.errors import ConfigError
from siglane.types import Activation, Grid

# names in `hidden_act` of transformers' configs -> what is computed (transformers/activations.py)
ACTIVATIONS: dict[str, Activation] = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu_erf",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}

# what the configuration classes of transformers and of Ovis take for an absent key
SIGLIP_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "patch_size": 16,
}
NAVIT_SIZES = SIGLIP_SIZES | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}

IDEFICS3_SIZES = SIGLIP_SIZES | {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}

NAVIT_ROPE_THETA = 10000.0  # a constant of Ovis' modeling_siglip2_navit.py

PatchLayout = Literal["channel_first", "channel_last"]
PositionResize = Literal["never", "bilinear_antialias", "bicubic", "bucketised"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """One tower.

    patch_layout: order of the elements of a flattened patch, (c, y, x) or (y, x, c);
    position_grid: the grid the learned position table covers, of no patches without a table (VideoLLaMA3);
    position_resize: how other grids are served;
    rope_theta: base of 2-D rotary positions in every block, None without them (Ovis2.5 has both kinds);
    depth: blocks that are run, at most num_hidden_layers (VILA skips the last); post_norm: whether the features pass
    `post_layernorm`; use_head: whether the MAP pooling head exists.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    patch_size: int
    position_grid: Grid
    hidden_act: Activation
    layer_norm_eps: float
    patch_layout: PatchLayout
    position_resize: PositionResize
    rope_theta: float | None
    depth: int
    post_norm: bool
    use_head: bool

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"vision hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads"
            )
        if self.rope_theta is not None and self.head_dim % 4:
            raise ConfigError(f"vision head_dim {self.head_dim} must be a multiple of 4 for 2-D rotary positions")
        if not 0 < self.depth <= self.num_hidden_layers:
            raise ConfigError(f"vision depth {self.depth} is outside 1..{self.num_hidden_layers}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def usual_grid(self) -> Grid:
        """Of pictures that the tower was trained on; without a table nobody knows, and it is as many others'."""
        return self.position_grid if self.position_grid.area else Grid(27, 27)

    @property
    def patch_dim(self) -> int:
        return self.num_channels * self.patch_size**2

    @classmethod
    def from_hf(
        cls,
        raw: RawConfig,
        *,
        feature_layer: int,
        post_norm: bool,
        head: bool = True,
        defaults: Mapping[str, int] = SIGLIP_SIZES,
        position_resize: PositionResize = "never",
        name: str = "vision_config",
    ) -> VisionConfig:
        """A `SiglipVisionConfig`, or one that is written like it, as transformers writes it; absent keys take
        `defaults`, those of its class.

        feature_layer: index into transformers' `hidden_states` (-1: all blocks, -2: without the last); head: keep the
        pooling head where there is one.
        """
        reader = ConfigReader(raw, name)
        sizes = {key: reader.size(key, default) for key, default in defaults.items()}
        side = reader.size("image_size", 224) // sizes["patch_size"]
        if side == 0:
            raise ConfigError(f"{name}: image_size is smaller than patch_size {sizes['patch_size']}")
        return cls(
            **sizes,
            position_grid=Grid(side, side),
            hidden_act=reader.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
            layer_norm_eps=reader.value("layer_norm_eps", float, 1e-6),
            patch_layout="channel_first",
            position_resize=position_resize,
            rope_theta=None,
            depth=resolve_layer(feature_layer, sizes["num_hidden_layers"], name),
            post_norm=post_norm,
            use_head=head and reader.value("vision_use_head", bool, True),
        )

    @classmethod
    def from_navit(cls, raw: RawConfig, name: str = "vit_config") -> VisionConfig:
        """A `Siglip2NavitConfig` of AIDC-AI/Ovis; absent keys take that class's defaults. Features are the last
        block's output, without `post_layernorm`, which the checkpoint stores and nothing uses."""
        reader = ConfigReader(raw, name)
        reader.only("model_type", "siglip2_navit")
        reader.only("temporal_patch_size", 1)
        if not reader.value("preserve_original_pe", bool, True):
            raise ConfigError(f"{name}: preserve_original_pe false (no learned positions) is not supported")
        if reader.value("fullatt_block_indexes", str, ""):  # null and "" mean that every block is full
            raise ConfigError(
                f"{name}: fullatt_block_indexes {raw['fullatt_block_indexes']!r} (windows for the other blocks) is not "
                "supported; siglane knows towers whose blocks all attend to the whole image"
            )
        sizes = {key: reader.size(key, default) for key, default in NAVIT_SIZES.items()}
        return cls(
            **sizes,
            position_grid=_navit_positions(reader, sizes["patch_size"]),
            hidden_act=reader.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
            layer_norm_eps=reader.value("layer_norm_eps", float, 1e-6),
            patch_layout="channel_first",
            position_resize="bicubic",
            rope_theta=NAVIT_ROPE_THETA if reader.value("use_rope", bool, True) else None,
            depth=sizes["num_hidden_layers"],
            post_norm=False,
            use_head=False,
        )


def _navit_positions(reader: ConfigReader, patch_size: int) -> Grid:
    """Stated as a number of patches, or (not positive) by the pixels of the pictures it was pretrained on."""
    patches = reader.value("num_patches", int, -1)
    side = math.isqrt(reader.size("num_patches")) if patches > 0 else reader.size("image_size", 512) // patch_size
    if side == 0 or (patches > 0 and side * side != patches):
        raise ConfigError(f"{reader.name}: num_patches {patches} and image_size give no square of positions")
    return Grid(side, side)


def resolve_layer(feature_layer: int, layers: int, name: str) -> int:
    """How many blocks to run for `hidden_states[feature_layer]` of a tower with `layers` blocks."""
    depth = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 0 < depth <= layers:
        raise ConfigError(f"{name}: feature layer {feature_layer} does not exist in a tower of {layers} blocks")
    return depth
