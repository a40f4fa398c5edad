"""The facts of a contrastive SigLIP: a vision tower with its head, a text tower, and what joins them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from siglane.config.images import ImageFacts
from siglane.config.reader import ConfigReader, RawConfig
from siglane.config.vision import ACTIVATIONS
from siglane.errors import ConfigError
from siglane.types import Activation


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTowerConfig:
    """One text tower. length: positions it was trained with, every text is padded to it (formats.md 1.3);
    projection_size: width of its embeddings, the image embeddings' too."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    length: int
    projection_size: int
    hidden_act: Activation
    layer_norm_eps: float

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"text hidden_size {self.hidden_size} does not divide by {self.num_attention_heads} heads"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, raw: RawConfig, name: str = "text_config") -> TextTowerConfig:
        """A `SiglipTextConfig` or `Siglip2TextConfig`; absent keys take that class's defaults."""
        reader = ConfigReader(raw, name)
        hidden_size = reader.size("hidden_size", 768)
        return cls(
            hidden_size=hidden_size,
            intermediate_size=reader.size("intermediate_size", 3072),
            num_hidden_layers=reader.size("num_hidden_layers", 12),
            num_attention_heads=reader.size("num_attention_heads", 12),
            vocab_size=reader.size("vocab_size", 32000),
            length=reader.size("max_position_embeddings", 64),
            projection_size=reader.size("projection_size", hidden_size),
            hidden_act=reader.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
            layer_norm_eps=reader.value("layer_norm_eps", float, 1e-6),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRule:
    """How a text becomes `length` ids. A text padded or cased otherwise has another embedding.

    lowercase: first of all, the text as a whole as Python does, or character by character as `tokenizers` does (only
    the whole text knows that a Greek sigma ends a word), or not at all (`do_lower_case` false); delete_punctuation:
    then every character of Python's `string.punctuation` goes and white space collapses (SigLIP; SigLIP2 keeps texts as
    they are); end_id: stands behind the text; pad_id: fills it up on the right. A longer text is cut, its end_id kept.
    """

    length: int
    lowercase: Literal["text", "characters", "never"]
    delete_punctuation: bool
    end_id: int
    pad_id: int

    def __str__(self) -> str:
        punctuation = "deleted" if self.delete_punctuation else "kept"
        case = "case kept" if self.lowercase == "never" else "lower case"
        return f"{case}, punctuation {punctuation}, {self.length} positions padded with id {self.pad_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoTowerConfig:
    """images: the vision tower's facts, its head among them; text: the text tower's; texts: how texts are prepared."""

    images: ImageFacts
    text: TextTowerConfig
    texts: TextRule

    def __post_init__(self) -> None:
        width = self.images.vision.hidden_size
        if self.text.projection_size != width:
            raise ConfigError(
                f"text_config: projection_size {self.text.projection_size} is not the vision tower's {width}"
            )
        if not self.images.vision.use_head:
            raise ConfigError("vision_config: vision_use_head false leaves a model without image embeddings")
