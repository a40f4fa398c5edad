"""VideoLLaMA3: transformers' own tower, projector and Qwen2, in its layout and the authors'; pictures and frames are
prepared on Pillow as both processors do (formats.md 12)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import VideoLlama3Config
from transformers.models.video_llama_3.modeling_video_llama_3 import VideoLlama3Projector, VideoLlama3VisionModel

from siglane.errors import ConfigError
from siglane.verify.references.adapter import tensors_of
from siglane.verify.references.decoder import PLACE, Decoder, load_tokenizer
from siglane.verify.references.files import (
    Raw,
    Tensors,
    chat_template,
    classes_in,
    media_token,
    processor_json,
    read_json,
    ready,
    unset,
)
from siglane.verify.references.pixels import Processing
from siglane.verify.references.reference import ReferenceFamily, Seen, VisionLanguageReference
from siglane.verify.references.tapping import tapping
from siglane.verify.references.tower import stages_of
from siglane.verify.stages import Trace

Medium = Image.Image | Sequence[Image.Image]  # a picture, or the frames of a video, one shown each second

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}{{ image_token }}\n{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


class VideoLlama3(VisionLanguageReference):
    """bounds: least and most pixels of a picture, and of a frame and all frames of a video together."""

    image, mean, std = "<|image_pad|>", (0.5,) * 3, (0.5,) * 3

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, adapter: Path | None = None) -> None:
        self.folder, self.raw, self.picture = folder, read_json(folder / "config.json"), processor_json(folder)
        self.device, self.dtype, self.text_config = device, dtype, self.of_language()
        known = {"vision_config": self.raw[self.vision_key()], "text_config": self.text_config}
        config: Any = VideoLlama3Config.from_dict(known)
        self.vision_config = config.vision_config
        self.tower: Any = unset(lambda: VideoLlama3VisionModel(config.vision_config))
        self.projector: Any = VideoLlama3Projector(config)
        names = tensors_of(folder, adapter).readers
        tensors = Tensors({name.removeprefix("model."): read for name, read in names.items()})
        ready(self.tower, tensors.under("vision_model.", "vision_encoder."), device, dtype)
        ready(self.projector, tensors.under("projector.", "mm_projector."), device, dtype)
        inner = {name.removeprefix("language_model."): read for name, read in tensors.readers.items()}
        named = {name if name == "lm_head.weight" else f"model.{name}": read for name, read in inner.items()}
        self.language = Decoder.load(self.text_config, Tensors(named), device, dtype)
        resample = Image.Resampling.BICUBIC
        self.processing = Processing.of({**self.picture, "size": 1}, 1, resample, mean=self.mean, std=self.std)
        self.tokenizer = load_tokenizer(folder)
        self.image = self.placeholder()

    def vision_key(self) -> str:
        return "vision_config"

    def of_language(self) -> Raw:
        text = dict(self.raw["text_config"])
        tied = bool(text.get("tie_word_embeddings") or self.raw.get("tie_word_embeddings"))
        return text | {"tie_word_embeddings": tied}

    def placeholder(self) -> str:
        return media_token(self.folder, "image_token", self.image)

    def merges(self) -> tuple[int, int]:
        """Patches along a merged row, of pictures and of frames."""
        return self.picture.get("merge_size", 1), self.frames_json().get("merge_size", 2)

    def frames_json(self) -> Raw:
        nested = read_json(self.folder / "processor_config.json").get("video_processor")
        return nested or read_json(self.folder / "video_preprocessor_config.json") or self.picture

    def compresses(self) -> bool:
        return bool(self.frames_json().get("use_token_compression", True))

    def sizes(self, media: Sequence[Medium]) -> list[tuple[int, int]]:
        """Height and width that each is resized to."""
        found = []
        for medium in media:
            video = not isinstance(medium, Image.Image)
            raw, defaults = (self.frames_json(), (128, 768)) if video else (self.picture, (4, 1280))
            size = raw.get("size") or {}
            least = raw.get("min_pixels", size.get("shortest_edge", defaults[0] * 784))
            most = raw.get("max_pixels", size.get("longest_edge", defaults[1] * 784))
            factor = self.vision_config.patch_size * self.merges()[video]
            found.append(smart_resize(*_first(medium).size[::-1], factor, least, most // len(_frames(medium))))
        return found

    def see(self, pictures: Sequence[Medium]) -> Seen:
        """Each by itself, its stages in raster order."""
        seen = [self._seen(*pair) for pair in zip(pictures, self.sizes(pictures), strict=True)]
        taps = {stage: torch.cat([trace[stage] for trace, _ in seen]) for stage in seen[0][0]}
        return Seen(taps, [rows for _, rows in seen])

    def _seen(self, medium: Medium, size: tuple[int, int]) -> tuple[Trace, list[torch.Tensor]]:
        """The stages, and the rows of each frame that are kept."""
        video = not isinstance(medium, Image.Image)
        merge, patch = self.merges()[video], self.vision_config.patch_size
        frames = [frame.resize(size[::-1], self.processing.resample) for frame in _frames(medium)]
        pixels = torch.stack([self.processing.normalised(frame) for frame in frames])
        count, (h, w) = len(frames), (side // patch for side in size)
        cells = pixels.reshape(count, 3, h // merge, merge, patch, w // merge, merge, patch)
        patches = cells.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(count * h * w, -1)
        places = torch.arange(count * h * w).reshape(count, h // merge, w // merge, merge, merge)
        raster = places.transpose(2, 3).flatten()
        grid = torch.tensor([[count, h, w]], device=self.device)
        stages = {**stages_of(self.tower), "features": self.tower.post_layernorm}
        with tapping(stages, lambda output: output.flatten(1)) as taps:
            output = self.tower(patches.to(self.device, self.dtype), grid, torch.tensor([merge], device=self.device))
        rows = self.projector(output.last_hidden_state)
        kept = _moved(patches.reshape(count, len(rows) // count, -1), self.compresses() and count > 1)
        trace = {"preprocessing": patches.to(self.dtype), **{name: rows.cpu() for name, rows in taps.items()}}
        kept_rows = [frame[mask] for frame, mask in zip(rows.unflatten(0, (count, -1)), kept, strict=True)]
        return {**{name: found[raster] for name, found in trace.items()}, "projector": torch.cat(kept_rows).cpu()}, (
            kept_rows
        )

    def text(self, prompt: str, seen: Seen) -> str:
        """A video's frames are behind their times. Media first, then the words."""
        template = chat_template(self.folder, by_processor=True) or TEMPLATE
        parts = [{"type": "image"} for _ in seen.images] + [{"type": "text", "text": prompt}]
        try:
            text: str = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": parts}], chat_template=template, tokenize=False,
                add_generation_prompt=True, image_token=self.image,
            )  # fmt: skip
        except Exception as error:  # a template is a program: it may raise anything
            raise ConfigError(f"the chat template refuses a message with pictures: {error}") from error
        return text

    def ids(self, text: str, seen: Seen) -> list[int]:
        """The text with every row's placeholder in it, tokenised at once."""
        pieces = text.split(self.image)
        whole = pieces[0]
        for rows, piece in zip(seen.images, pieces[1:], strict=True):
            whole += self._written([len(frame) for frame in rows]) + piece
        ids: list[int] = self.tokenizer(whole, add_special_tokens=False).input_ids
        place = self.tokenizer.convert_tokens_to_ids(self.image)
        return [PLACE if token == place else token for token in ids]

    def _written(self, counts: Sequence[int]) -> str:
        """Of a video of one frame nobody can tell that it is no picture, and `siglane verify` shows none."""
        if len(counts) == 1:
            return self.image * counts[0]
        return ",".join(f"Time {float(second):.1f}s:{self.image * rows}" for second, rows in enumerate(counts))


def smart_resize(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """transformers' `smart_resize`, without its refusal of long strips."""
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > most:
        beta = math.sqrt((height * width) / most)
        return tuple(max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))  # type: ignore[return-value]
    if high * wide < least:
        beta = math.sqrt(least / (height * width))
        return tuple(math.ceil(side * beta / factor) * factor for side in (height, width))  # type: ignore[return-value]
    return high, wide


def _moved(patches: torch.Tensor, compresses: bool) -> torch.Tensor:
    """`[frames, rows, values]` -> booleans `[frames, rows]`: which differ from the frame before."""
    kept = torch.ones(patches.shape[:2], dtype=torch.bool)
    if compresses:
        kept[1:] = (patches[1:] - patches[:-1]).abs().mean(-1) * 255 > 0.1
        kept[kept.sum(1) == 0, 0] = True
    return kept


def _frames(medium: Medium) -> Sequence[Image.Image]:
    return [medium] if isinstance(medium, Image.Image) else medium


def _first(medium: Medium) -> Image.Image:
    return _frames(medium)[0]


def _matches(folder: Path) -> bool:
    raw = read_json(folder / "config.json")
    return raw.get("model_type") == "video_llama_3" or "VideoLlama3ForConditionalGeneration" in classes_in(raw)


FAMILY = ReferenceFamily(name="video_llama_3", speaks=True, matches=_matches, load=VideoLlama3)
