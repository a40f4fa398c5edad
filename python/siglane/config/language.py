"""The facts of a Qwen2, Qwen3, Qwen3-MoE or Llama language model: one architecture, its differences flags (formats.md
7.4, 8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from siglane.config.reader import ConfigReader, RawConfig
from siglane.errors import ConfigError
from siglane.types import RopeScaling

NormDtype = Literal["float32", "input"]

ROPE_SECTIONS = ("rope_scaling", "rope_parameters")  # of transformers 4 and 5
DEFAULT_ROPE_THETA = 10000.0
MOST_EXPERTS = 4096  # of a layer; each has names of its own, which are made before any file is read

# what transformers' classes take for absent keys
QWEN_SIZES = {
    "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 151936, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN3_MOE_SIZES = QWEN_SIZES | {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """count: experts of a layer; per_token: how many each token goes through; size: width of one; normalised: the
    weights of a token's experts add up to one; dense_layers: layers with an ordinary MLP, and so have those that are
    not every `step`th."""

    count: int
    per_token: int
    size: int
    normalised: bool
    step: int
    dense_layers: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.count > MOST_EXPERTS:
            raise ConfigError(f"num_experts {self.count} is more than {MOST_EXPERTS}; the configuration is no model's")
        if self.per_token > self.count:
            raise ConfigError(f"num_experts_per_tok {self.per_token} is more than the {self.count} experts")

    def at(self, layer: int) -> bool:
        """Whether layer number `layer` has experts."""
        return layer not in self.dense_layers and (layer + 1) % self.step == 0

    @classmethod
    def from_hf(cls, reader: ConfigReader) -> ExpertsConfig | None:
        """Of a `Qwen3MoeConfig`; None where it has no experts. transformers 5 writes `num_local_experts`."""
        if reader.value("num_local_experts", int, reader.value("num_experts", int, 128)) == 0:
            return None
        dense = reader.raw.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
            raise ConfigError(f"{reader.name}: mlp_only_layers must be a list of layers, got {dense!r}")
        return cls(
            count=reader.size("num_local_experts", reader.size("num_experts", 128)),
            per_token=reader.size("num_experts_per_tok", 8),
            size=reader.size("moe_intermediate_size", 768),
            normalised=reader.value("norm_topk_prob", bool, False),
            step=reader.size("decoder_sparse_step", 1),
            dense_layers=tuple(dense),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """qkv_bias, output_bias: biases of the attention projections; qk_norm: RMSNorm over each head of q and k before
    the rotation (Qwen3); norm_dtype: what RMSNorm computes in, float32 or the dtype of its input (nanoVLM);
    tie_embeddings: the output head is the embedding table; mlp_bias: biases of the MLP's layers; rope_scaling: how
    rotary frequencies were changed for a longer context, None where they were not; experts: of sparse layers, None
    where every MLP is dense."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    norm_dtype: NormDtype
    tie_embeddings: bool
    rope_scaling: RopeScaling | None
    experts: ExpertsConfig | None

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{self.num_attention_heads} query heads do not divide by {self.num_key_value_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} must be even for rotary positions")
        if self.rope_theta <= 0:
            raise ConfigError(f"rope_theta {self.rope_theta} must be positive")

    @classmethod
    def from_hf(cls, raw: RawConfig, name: str = "text_config") -> LanguageConfig:
        """A `Qwen2Config`, `Qwen3Config` or `Qwen3MoeConfig` as transformers writes it (old `rope_theta` or new
        `rope_parameters`)."""
        reader = ConfigReader(raw, name)
        kind = reader.choice("model_type", {kind: kind for kind in ("qwen2", "qwen3", "qwen3_moe")})
        qwen3, sparse = kind != "qwen2", kind == "qwen3_moe"
        sizes = QWEN3_MOE_SIZES if sparse else QWEN_SIZES
        heads = reader.size("num_attention_heads", sizes["num_attention_heads"])
        hidden_size = reader.size("hidden_size", sizes["hidden_size"])
        own_head_dim = kind == "qwen3"  # for the others the class divides
        if not own_head_dim and not reader.has("head_dim") and hidden_size % heads:
            raise ConfigError(f"{name}: hidden_size {hidden_size} does not divide by {heads} heads and has no head_dim")
        # an absent window is the class's 4096; only an explicit null attends to everything
        if reader.value("use_sliding_window", bool, False) and raw.get("sliding_window", 4096) is not None:
            raise ConfigError(
                f"{name}: use_sliding_window true is not supported; set it to false to attend to everything"
            )
        kinds = raw.get("layer_types") or []
        if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
            raise ConfigError(f"{name}: layer_types {kinds!r} are not supported; siglane attends to all")
        attention_bias = reader.value("attention_bias", bool, False) if qwen3 else False
        _check_silu(reader)
        return cls(
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size", sizes["intermediate_size"]),
            num_hidden_layers=reader.size("num_hidden_layers", sizes["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=reader.size(
                "num_key_value_heads", heads if "num_key_value_heads" in raw else sizes["num_key_value_heads"]
            ),
            head_dim=reader.size("head_dim", 128 if own_head_dim else hidden_size // heads),
            vocab_size=reader.size("vocab_size", sizes["vocab_size"]),
            max_position_embeddings=reader.size("max_position_embeddings", sizes["max_position_embeddings"]),
            rms_norm_eps=reader.value("rms_norm_eps", float, 1e-6),
            rope_theta=_rope_theta(reader),
            qkv_bias=attention_bias if qwen3 else True,
            output_bias=attention_bias,
            mlp_bias=False,
            qk_norm=qwen3,
            norm_dtype="float32",
            tie_embeddings=reader.value("tie_word_embeddings", bool, False),
            rope_scaling=_rope_scaling(reader),
            experts=ExpertsConfig.from_hf(reader) if sparse else None,
        )

    @classmethod
    def from_llama(cls, raw: RawConfig, name: str = "config.json") -> LanguageConfig:
        """A `LlamaConfig` as transformers writes it; absent keys take that class's defaults."""
        reader = ConfigReader(raw, name)
        heads, hidden_size = reader.size("num_attention_heads", 32), reader.size("hidden_size", 4096)
        if hidden_size % heads:
            raise ConfigError(f"{name}: hidden_size {hidden_size} does not divide by {heads} heads")
        _check_silu(reader)
        attention_bias = reader.value("attention_bias", bool, False)
        return cls(
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size", 11008),
            num_hidden_layers=reader.size("num_hidden_layers", 32),
            num_attention_heads=heads,
            num_key_value_heads=reader.size("num_key_value_heads", heads),
            head_dim=reader.size("head_dim", hidden_size // heads),
            vocab_size=reader.size("vocab_size", 32000),
            max_position_embeddings=reader.size("max_position_embeddings", 2048),
            rms_norm_eps=reader.value("rms_norm_eps", float, 1e-6),
            rope_theta=_rope_theta(reader),
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            mlp_bias=reader.value("mlp_bias", bool, False),
            qk_norm=False,
            norm_dtype="float32",
            tie_embeddings=reader.value("tie_word_embeddings", bool, False),
            rope_scaling=_rope_scaling(reader, llama3=True),
            experts=None,
        )


def _check_silu(reader: ConfigReader) -> None:
    if reader.value("hidden_act", str, "silu") != "silu":
        raise ConfigError(f"{reader.name}: hidden_act {reader.raw['hidden_act']!r} is not known; siglane knows silu")


def rope_places(raw: RawConfig) -> list[tuple[str, dict[str, Any]]]:
    """Where a configuration states rotary positions, by key, the winner first and whole: `rope_scaling` unless it is
    empty, else `rope_parameters`; `rope_theta` counts where the winner has none (transformers
    `convert_rope_params_to_dict`). Values that are no objects are left to the reader."""
    sections = [(key, dict(raw[key])) for key in ROPE_SECTIONS if isinstance(raw.get(key), Mapping) and raw[key]]
    alone = [] if raw.get("rope_theta") is None else [("rope_theta", {"rope_theta": raw["rope_theta"]})]
    if not sections:
        return alone
    (key, winner), *others = sections
    theta = alone[0][1] if alone else {"rope_theta": DEFAULT_ROPE_THETA}
    return [(key, theta | winner), *others, *alone]


def _rope(reader: ConfigReader) -> ConfigReader:
    """The rotary facts that count. ConfigError for what siglane does not know."""
    for key in ROPE_SECTIONS:
        if reader.has(key):
            reader.section(key)
    for key, found in rope_places(reader.raw):
        section = ConfigReader(found, reader.name if key == "rope_theta" else f"{reader.name}.{key}")
        if layers := [name for name, value in found.items() if isinstance(value, Mapping)]:
            raise ConfigError(f"{section.name}: positions by kind of layer ({', '.join(layers)}) are not supported")
        if section.value("partial_rotary_factor", float, 1.0) != 1:
            raise ConfigError(f"{section.name}: partial_rotary_factor is not supported; siglane turns whole heads")
        return section
    return ConfigReader({}, reader.name)


def _rope_theta(reader: ConfigReader) -> float:
    return _rope(reader).value("rope_theta", float, DEFAULT_ROPE_THETA)


def _rope_scaling(reader: ConfigReader, *, llama3: bool = False) -> RopeScaling | None:
    """llama3: the model's family knows Llama 3's; any other kind but "default" is refused."""
    section = _rope(reader)
    kind = section.value("rope_type", str, section.value("type", str, "default"))
    if kind == "llama3" and llama3:
        return RopeScaling(
            factor=section.value("factor", float),
            low_turns=section.value("low_freq_factor", float),
            high_turns=section.value("high_freq_factor", float),
            original_length=section.size(
                "original_max_position_embeddings", reader.size("max_position_embeddings", 2048)
            ),
        )
    if kind != "default":
        known = "'default' and 'llama3'" if llama3 else "'default'"
        raise ConfigError(f"{section.name}: rope_type {kind!r} is not supported; siglane knows {known}")
    return None
