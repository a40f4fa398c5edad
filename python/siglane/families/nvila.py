"""NVILA and VILA: where each of their three layouts keeps its facts, and the few that no file states.

Sources: NVlabs/VILA (llava/model, llava/remote_code), SGLang 0.5.23 models/nvila.py and nvila_lite.py; formats.md
section 5. Layout "folders": the original llm/, vision_tower/, mm_projector/. Layout "hf": one folder, tensors under
those three names as prefixes; "vila": the same with the original's flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import ImageProcessorConfig, PreprocessConfig
from siglane.config.projector import vila_projector
from siglane.config.reader import ConfigReader, RawConfig
from siglane.config.video import VideoRule
from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError
from siglane.families.family import CHATML, END_OF_TURN, PromptRules, VlmFamily
from siglane.families.files import llava_tower
from siglane.families.stated import PREPROCESSOR, image_processor, stated_classes
from siglane.nn.plan import WeightPlan
from siglane.tiling.rule import MOST_TILES
from siglane.tiling.vila import Tiling, VilaTiling
from siglane.types import Grid, Size
from siglane.vision.tower import tower_plan
from siglane.weights.hub import Checkpoint, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Layout = Literal["folders", "hf", "vila"]
VIDEO_TOKEN = "<vila/video>"
VIDEO_ENCODER = "BasicVideoEncoder"
MOST_FRAMES = 256  # VILA's long-video training
LANGUAGE, TOWER, PROJECTOR = "llm", "vision_tower", "mm_projector"

# image_aspect_ratio -> tiling; without a value the processor's own resize squashes the picture
ASPECT_RATIOS: dict[str, Tiling] = {"resize": "squash", "pad": "pad", "dynamic": "dynamic", "dynamic_s2": "dynamic_s2"}

# VILA's Qwen2 template. Its default system turn has no full stop.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
    "{% endif %}"
) + CHATML


@dataclass(frozen=True, slots=True)
class Facts:
    """What the layouts state in different places. scales: image sides of dynamic_s2, ascending."""

    projector: str
    tiling: Tiling
    pillow_resize: bool
    scales: tuple[int, ...]
    min_tiles: int
    max_tiles: int
    feature_layer: int


# SGLang reads none of these from an "hf" checkpoint (models/nvila.py, models/nvila_lite.py); sides in tiles
HF_FACTS = {
    "NVILAForConditionalGeneration": Facts("mlp_downsample", "dynamic_s2", True, (1, 2, 3), 1, 12, -2),
    "NVILALiteForConditionalGeneration": Facts("mlp_downsample_3x3_fix", "dynamic", True, (), 1, 12, -2),
}


def layout_of(checkpoint: Checkpoint) -> Layout | None:
    """Which of VILA's layouts this is, None when it is another family's."""
    if not checkpoint.has("config.json"):
        return None
    root = checkpoint.json("config.json")
    architectures = stated_classes(root)
    if any(name in HF_FACTS for name in architectures):
        return "hf"
    if all(checkpoint.has(name) for name in (LANGUAGE, TOWER, PROJECTOR)) or "llm_cfg" in root:
        return "folders"
    if "VILAForConditionalGeneration" in architectures or root.get("model_type") == "vila":
        return "vila"
    return None


class Nvila(VlmFamily):
    name = "nvila"
    known_as = (*HF_FACTS, "VILAForConditionalGeneration", f"VILA folders ({LANGUAGE}/, {TOWER}/, {PROJECTOR}/)")
    tower_prefix, projector_prefix, language_prefix = f"{TOWER}.", f"{PROJECTOR}.", f"{LANGUAGE}."

    def matches(self, root: RawConfig, checkpoint: Checkpoint) -> bool:
        return layout_of(checkpoint) is not None

    def images(self, checkpoint: Checkpoint, *, column_major: bool = False) -> ImageFacts:
        """column_major: the projector's rows run down the columns, as VILA trained it before December 2024 (VILA1.5);
        no file tells, so it is never guessed."""
        root, tower = checkpoint.reader(), _part(checkpoint, TOWER, "vision_config")
        facts = _hf_facts(root, tower) if layout_of(checkpoint) == "hf" else _flags(checkpoint, root)
        vision = llava_tower(tower, facts.feature_layer)
        if column_major and facts.scales:
            raise ConfigError(
                "column_major belongs to VILA1.5, whose pictures are one tile; this checkpoint stitches tiles"
            )
        channels = vision.hidden_size * max(1, len(facts.scales))
        root.agree("mm_hidden_size", channels, "the tower's")
        width = self.language(checkpoint).hidden_size
        return ImageFacts(
            vision=vision,
            projector=vila_projector(
                facts.projector, input_size=channels, output_size=width, column_major=column_major
            ),
            preprocess=_preprocess(checkpoint, facts, vision),
            newline=False,
            video=_video(root),
        )

    def language(self, checkpoint: Checkpoint) -> LanguageConfig:
        reader = _part(checkpoint, LANGUAGE, "text_config")
        return LanguageConfig.from_hf(reader.raw, reader.name)

    def image_token_id(
        self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerFast, language: LanguageConfig
    ) -> int:
        """May lie outside the embedding table (NVILA-8B): it marks places and is never looked up."""
        added = tokenizer.get_added_vocab().get(self.image_token(checkpoint), len(tokenizer))
        return checkpoint.reader().value("image_token_id", int, added)

    def ends(self, tokenizer: PreTrainedTokenizerFast) -> Sequence[str | None]:
        """VILA `infer_stop_tokens`."""
        return (END_OF_TURN, tokenizer.eos_token)

    def language_folder(self, checkpoint: Checkpoint) -> Checkpoint:
        return _folder(checkpoint, LANGUAGE)

    def has_processor(self, checkpoint: Checkpoint) -> bool:
        """The layouts of one folder come with a processor, whose chat template transformers reads as any other's."""
        return layout_of(checkpoint) != "folders"

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        """VILA strips each message once its images are written out; the "hf" processors leave messages alone."""
        return PromptRules(default_template=CHAT_TEMPLATE, strip_messages=layout_of(checkpoint) != "hf")

    def vision_plan(self, images: ImageFacts) -> WeightPlan:
        """In VILA's memory, and so in its adapters, the tower's names have its own twice in front."""
        return super().vision_plan(images) + tower_plan(images.vision).under(f"{TOWER}.{TOWER}.", "encoder.tower.")

    def vision_sources(self, checkpoint: Checkpoint) -> tuple[Source, ...]:
        return _sources(checkpoint, TOWER, PROJECTOR)

    def language_sources(self, checkpoint: Checkpoint) -> tuple[Source, ...]:
        return _sources(checkpoint, LANGUAGE)


def _part(checkpoint: Checkpoint, folder: str, section: str) -> ConfigReader:
    """A part's own config.json; the copies in `llm_cfg` and its like may be paths of the machine it was trained on."""
    if layout_of(checkpoint) == "folders":
        return ConfigReader(checkpoint.sub(folder).json("config.json"), f"{folder}/config.json")
    return checkpoint.reader().section(section)


def _folder(checkpoint: Checkpoint, part: str) -> Checkpoint:
    return checkpoint.sub(part) if layout_of(checkpoint) == "folders" else checkpoint


def _sources(checkpoint: Checkpoint, *parts: str) -> tuple[Source, ...]:
    """The folders of some parts, with the prefixes that make their names those of the other layouts."""
    if layout_of(checkpoint) != "folders":
        return (Source(checkpoint),)
    return tuple(Source(checkpoint.sub(part), f"{part}.") for part in parts)


def _hf_facts(root: ConfigReader, tower: ConfigReader) -> Facts:
    facts = next(HF_FACTS[name] for name in stated_classes(root.raw) if name in HF_FACTS)
    side = tower.size("image_size", 224)
    return replace(facts, scales=tuple(side * scale for scale in facts.scales))


def _flags(checkpoint: Checkpoint, root: ConfigReader) -> Facts:
    default = "" if layout_of(checkpoint) == "folders" else "dynamic"  # "vila" was only ever NVILA-Lite
    aspect = root.value("image_aspect_ratio", str, default)
    tiling = root.choice("image_aspect_ratio", ASPECT_RATIOS) if aspect else "squash"
    if root.value("dynamic_s2", bool, tiling == "dynamic_s2") != (tiling == "dynamic_s2"):
        raise ConfigError(f"config.json: dynamic_s2 and image_aspect_ratio {aspect!r} contradict each other")
    if root.value("s2", bool, False) and tiling != "dynamic_s2":
        raise ConfigError("config.json: s2 (static scales) is not supported; siglane knows dynamic_s2")
    if root.value("mm_vision_select_feature", str, "cls_patch") != "cls_patch":
        raise ConfigError(
            f"config.json: mm_vision_select_feature {root.raw['mm_vision_select_feature']!r} drops the first patch, "
            "which SigLIP needs; siglane knows 'cls_patch'"
        )
    scales = _scales(root) if tiling == "dynamic_s2" else ()
    min_tiles, max_tiles = root.size("min_tiles", 1), root.size("max_tiles", 12)
    fewest = (scales[-1] // scales[0]) ** 2 if scales else min_tiles
    if not fewest <= max_tiles <= MOST_TILES:
        raise ConfigError(f"config.json: max_tiles {max_tiles} is not between {fewest} and {MOST_TILES}")
    return Facts(
        projector=_projector_kind(checkpoint, root),
        tiling=tiling,
        pillow_resize=aspect in ("resize", "dynamic", "dynamic_s2"),
        scales=scales,
        min_tiles=min_tiles,
        max_tiles=max_tiles,
        feature_layer=root.value("mm_vision_select_layer", int, -2),
    )


def _projector_kind(checkpoint: Checkpoint, root: ConfigReader) -> str:
    nested = layout_of(checkpoint) == "folders" or root.has("mm_projector_cfg")
    reader = _part(checkpoint, PROJECTOR, "mm_projector_cfg") if nested else root
    return reader.value("mm_projector_type", str)


def _scales(root: ConfigReader) -> tuple[int, ...]:
    found = root.raw.get("s2_scales")
    pieces: list[Any] = found.split(",") if isinstance(found, str) else found if isinstance(found, list) else []
    scales = sorted(int(piece) for piece in pieces if str(piece).strip().isdigit())
    if not scales or len(scales) != len(pieces) or any(scale == 0 or scale % scales[0] for scale in scales):
        raise ConfigError(f"config.json: s2_scales must be multiples of the first, e.g. '448,896,1344', got {found!r}")
    last = root.value("s2_resize_output_to_scale_idx", int, -1)
    if last not in (-1, len(scales) - 1):
        raise ConfigError(f"config.json: s2_resize_output_to_scale_idx {last} is not supported; siglane knows the last")
    return tuple(scales)


def _preprocess(checkpoint: Checkpoint, facts: Facts, vision: VisionConfig) -> PreprocessConfig:
    side = vision.position_grid.h * vision.patch_size
    file = (
        image_processor(_folder(checkpoint, TOWER))
        or image_processor(checkpoint)  # of folders that were put together again; VILA itself has it beside the tower
        or ConfigReader({"size": {"height": side, "width": side}}, PREPROCESSOR)
    )
    processor = ImageProcessorConfig.from_hf(file.raw, name=file.name)
    tile = Size(facts.scales[0], facts.scales[0]) if facts.scales else processor.size
    grid = Grid(tile.height // vision.patch_size, tile.width // vision.patch_size)
    if grid != vision.position_grid:
        expected = vision.position_grid
        raise ConfigError(
            f"{file.name}: {tile.width}x{tile.height} pixels hold {grid.h}x{grid.w} patches, "
            f"the tower has positions for {expected.h}x{expected.w}"
        )
    rule = VilaTiling(
        tile=tile,
        # VILA resizes before its processor does, with Pillow's default
        resample="bicubic" if facts.pillow_resize else processor.resample,
        tiling=facts.tiling,
        min_tiles=facts.min_tiles,
        max_tiles=facts.max_tiles,
        s2_scales=facts.scales,
        fill=processor.fill,
    )
    return PreprocessConfig.of(rule, processor)


def _video(root: ConfigReader) -> VideoRule | None:
    """None for an encoder that pools over time (TSP), which siglane does not have: such a model reads images only."""
    encoder = root.section("video_encoder", {"_target_": VIDEO_ENCODER}).value("_target_", str)
    if encoder.rpartition(".")[2] != VIDEO_ENCODER:
        return None
    if root.value("fps", float, 0.0) > 0:
        raise ConfigError(f"config.json: fps {root.raw['fps']} is not supported; siglane knows num_video_frames")
    frames = root.size("num_video_frames", 8)
    return VideoRule(VIDEO_TOKEN, frames, most_frames=max(frames, MOST_FRAMES), spread="rounded", with_images=True)
