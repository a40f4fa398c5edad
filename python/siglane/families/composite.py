"""Models whose config.json has a section for each half, beside a processor's files, as transformers writes them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from siglane.config.language import LanguageConfig
from siglane.config.preprocess import ImageProcessorConfig, ProcessorClass
from siglane.config.reader import ConfigReader, RawConfig
from siglane.errors import ConfigError
from siglane.families.family import VlmFamily
from siglane.families.stated import PROCESSOR, media_token, required_image_processor, video_processor
from siglane.weights.hub import Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class CompositeFamily(VlmFamily):
    """text_defaults, image_token_default, image_text, video_text: what the classes of its configuration and of its
    processor take for absent keys; without a default of the image token's id config.json has to state it."""

    text_defaults: ClassVar[RawConfig] = {}
    image_token_default: ClassVar[int | None] = None
    image_text: ClassVar[str] = "<image>"
    video_text: ClassVar[str] = "<video>"

    def language(self, checkpoint: Checkpoint) -> LanguageConfig:
        """A head is tied where config.json says so, or its section, which counts for nothing if `tied_at_root`."""
        root = checkpoint.reader()
        section = root.section("text_config")
        language = self.text(ConfigReader({**self.text_defaults, **section.raw}, section.name))
        inside = language.tie_embeddings and not self.tied_at_root
        return replace(language, tie_embeddings=root.value("tie_word_embeddings", bool, False) or inside)

    def text(self, section: ConfigReader) -> LanguageConfig:
        """What `text_config` says alone."""
        return LanguageConfig.from_hf(section.raw, section.name)

    def image_token(self, checkpoint: Checkpoint) -> str:
        return media_token(checkpoint, "image_token", self.image_text)

    def video_token(self, checkpoint: Checkpoint) -> str:
        return media_token(checkpoint, "video_token", self.video_text)

    def image_token_id(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, language: LanguageConfig
    ) -> int:
        """Older files call it `image_token_index`."""
        root = checkpoint.reader()
        older = root.value("image_token_index", int, self.image_token_default)
        return root.value("image_token_id", int, older)

    def has_processor(self, checkpoint: Checkpoint) -> bool:
        return True


class MediaFiles(NamedTuple):
    """What files say is done to pictures and to frames of videos; pixels: what both say of them; processor: what the
    processor of both says of itself."""

    pictures: ConfigReader
    frames: ConfigReader
    pixels: ImageProcessorConfig
    processor: ConfigReader


def media_files(checkpoint: Checkpoint, defaults: ProcessorClass) -> MediaFiles:
    """defaults: of the class that reads both. ConfigError where they differ in how pixels are prepared."""
    pictures = required_image_processor(checkpoint)
    frames = video_processor(checkpoint) or pictures
    pixels, of_frames = (ImageProcessorConfig.from_hf(one.raw, defaults, name=one.name) for one in (pictures, frames))
    if of_frames != pixels:
        raise ConfigError(f"{frames.name}: normalisation of frames differs from that of pictures")
    return MediaFiles(pictures, frames, pixels, ConfigReader(checkpoint.optional(PROCESSOR), PROCESSOR))
