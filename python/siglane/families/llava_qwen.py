"""LLaVA-OneVision and LLaVA-Video as their authors publish them: one flat config.json, SigLIP's constants in the code.

Sources: LLaVA-VL/LLaVA-NeXT (llava/model/llava_arch.py, llava/mm_utils.py, multimodal_encoder/siglip_encoder.py);
formats.md section 6.2.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import PurePosixPath

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import ImageProcessorConfig, PreprocessConfig
from siglane.config.projector import llava_projector
from siglane.config.reader import ConfigReader
from siglane.config.video import VideoRule
from siglane.errors import ConfigError, UserError
from siglane.families.family import PromptRules, VlmFamily
from siglane.families.files import llava_tower
from siglane.families.llava_onevision import CHAT_TEMPLATE, FRAMES, MOST_FRAMES, VIDEO_TOKEN, max_maps
from siglane.nn.plan import Ignore, Rule, WeightPlan
from siglane.tiling.anyres import AnyResTiling, Pinpoint
from siglane.tiling.rule import MOST_TILES
from siglane.types import NewlinePlace, Pooling
from siglane.vision.tower import tower_plan
from siglane.weights.hub import Checkpoint, Source, open_checkpoint
from siglane.weights.load import headers
from siglane.weights.quantised import codes_format

TOWER = "mm_vision_tower"
INSIDE, BESIDE = "model.vision_tower.vision_tower.", "tower."  # what the names of the tower's tensors start with

# of the towers that the code's constants describe; heads cannot be told from tensors
CONSTANTS = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 384, "patch_size": 14,
}  # fmt: skip
RELEASED = ("siglip-so400m-patch14-384", "siglip2-so400m-patch14-384")

POOLINGS: dict[str, Pooling] = {"bilinear": "bilinear", "average": "average", "max": "max"}
NEWLINES: dict[str, NewlinePlace] = {"one_token": "end", "frame": "tile", "grid": "row", "no_token": "nowhere"}

PAIR = re.compile(r"[\[(]\s*(\d{1,6})\s*,\s*(\d{1,6})\s*[\])]")
RANGE = re.compile(r"\((\d{1,4})x(\d{1,4})\)")

# conv "qwen_1_5", whatever template the tokenizer has: the code never asks it
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TEMPLATE = "{% if messages[0]['role'] != 'system' %}{{ '" + SYSTEM + "' }}{% endif %}" + CHAT_TEMPLATE


class LlavaQwen(VlmFamily):
    name = "llava_qwen"
    known_as = ("LlavaQwenForCausalLM",)
    tower_prefix, projector_prefix = INSIDE, "model.mm_projector."

    def images(self, checkpoint: Checkpoint) -> ImageFacts:
        root = checkpoint.reader()
        _refuse_unknown(root)
        tower = _tower(checkpoint, root)
        # the code deletes the last block and reads what is left, without the last norm, whatever mm_vision_select_layer
        # and mm_vision_select_feature say
        vision = llava_tower(tower, -2)
        root.agree("mm_hidden_size", vision.hidden_size, "the tower's")
        rule, processor = _rule(root, tower.size("image_size", 224))
        return ImageFacts(
            vision=vision,
            projector=llava_projector(
                input_size=vision.hidden_size, output_size=root.size("hidden_size", 4096), names=("0", "2")
            ),
            preprocess=PreprocessConfig.of(rule, processor),
            newline=True,
            video=_video(root),
        )

    def language(self, checkpoint: Checkpoint) -> LanguageConfig:
        """The prompt, its images' rows included, is cut at `tokenizer_model_max_length`."""
        root = checkpoint.reader()
        language = LanguageConfig.from_hf({**root.raw, "model_type": "qwen2"}, root.name)
        longest = root.size("tokenizer_model_max_length", language.max_position_embeddings)
        return replace(language, max_position_embeddings=min(longest, language.max_position_embeddings))

    def prompt_rules(self, checkpoint: Checkpoint) -> PromptRules:
        return PromptRules(default_template=TEMPLATE, template=TEMPLATE, strip_messages=False)

    def vision_plan(self, images: ImageFacts) -> WeightPlan:
        beside = tower_plan(images.vision).under(BESIDE, "encoder.tower.")
        texts = "a SigLIP's text tower and scores, which a language model does not need"
        unused = (Ignore(f"{BESIDE}{name}", texts) for name in ("text_model.{rest}", "logit_scale", "logit_bias"))
        newline = Rule("model.image_newline", "newline")
        return super().vision_plan(images) + WeightPlan((newline, *unused)) + beside

    def vision_sources(self, checkpoint: Checkpoint) -> tuple[Source, ...]:
        """The checkpoint, and the tower's own folder where the checkpoint does not hold the tower."""
        root = checkpoint.reader()
        if _holds_tower(checkpoint, root):
            return (Source(checkpoint),)
        return Source(_tower_folder(checkpoint, root), BESIDE), Source(checkpoint)


def _holds_tower(checkpoint: Checkpoint, root: ConfigReader) -> bool:
    """As the code tells it, and where a file has the tensors anyway: they are fine-tuned, or codes."""
    if codes_format(checkpoint) is not None:
        return True
    if root.value("unfreeze_mm_vision_tower", bool, False) or TOWER in root.value("mm_tunable_parts", str, ""):
        return True
    files = sorted(checkpoint.root.glob("model*.safetensors"))
    return any(tensor.name.startswith(INSIDE) for file in files for tensor in headers(file))


def _tower_folder(checkpoint: Checkpoint, root: ConfigReader) -> Checkpoint:
    """What `mm_vision_tower` names: a folder, also one that starts from the checkpoint's, or a hub id."""
    named = root.value(TOWER, str)
    try:
        return Checkpoint(checkpoint.path(named)) if checkpoint.path(named).is_dir() else open_checkpoint(named)
    except UserError as error:
        raise ConfigError(
            f"{checkpoint.root} needs the tower that its {TOWER} names, which cannot be had: {error}; put a SigLIP's "
            f"folder somewhere and write its path into {TOWER} of config.json"
        ) from error


def _tower(checkpoint: Checkpoint, root: ConfigReader) -> ConfigReader:
    """The tower's configuration: the code's constants, unless its folder is here."""
    named = root.value(TOWER, str)
    if PurePosixPath(named).name in RELEASED and not checkpoint.path(named).is_dir():
        return ConfigReader(CONSTANTS, f"{TOWER} {named}")
    reader = _tower_folder(checkpoint, root).reader()
    return reader.section("vision_config") if reader.has("vision_config") else reader


def _refuse_unknown(root: ConfigReader) -> None:
    root.choice("mm_projector_type", {"mlp2x_gelu": None}, "linear")
    root.choice("mm_patch_merge_type", {"spatial_unpad": None}, "flat")
    for key in ("add_faster_video", "mm_use_im_start_end"):
        if root.value(key, bool, False):
            raise ConfigError(f"config.json: {key} true is not supported; siglane knows models without it")


def _rule(root: ConfigReader, side: int) -> tuple[AnyResTiling, ImageProcessorConfig]:
    """Several pictures are each padded to one tile, as the models were trained and the authors' example does by hand;
    the code alone would tile each of them. side: pixels of the pictures that the tower takes."""
    aspect, processor = root.value("image_aspect_ratio", str), ImageProcessorConfig.from_hf({"size": side})
    tiled, all_rows = aspect != "pad", aspect in ("pad", "anyres")
    rule = AnyResTiling(
        tile=processor.size,
        resample=processor.resample,
        frame_resample=processor.resample,
        fill=processor.fill,
        pinpoints=_pinpoints(root, side) if tiled else ((side, side),),
        max_maps=None if all_rows else max_maps(root, "image_aspect_ratio", ", anyres and pad"),
        always_padded=not tiled,
        digits=None,
        pooling=root.choice("mm_spatial_pool_mode", POOLINGS, "bilinear"),
        newlines=root.choice("mm_newline_position", NEWLINES, "one_token"),
        timed=root.value("add_time_instruction", bool, False),
    )
    return rule, processor


def _pinpoints(root: ConfigReader, side: int) -> tuple[Pinpoint, ...]:
    """(width, height) in the file: a list, its text, or "(1x1),...,(6x6)" in sides of a tile, where only the first and
    the last pair count."""
    found = root.raw.get("image_grid_pinpoints")
    text = found if isinstance(found, str) else repr(found)
    if ranges := RANGE.findall(text):
        (left, top), (right, bottom) = (map(int, pair) for pair in (ranges[0], ranges[-1]))
        if right * bottom <= MOST_TILES:
            return tuple((side * h, side * w) for w in range(left, right + 1) for h in range(top, bottom + 1))
    elif not PAIR.sub("", text).strip("[](), \n"):
        return tuple((int(height), int(width)) for width, height in PAIR.findall(text))
    raise ConfigError(
        f"{root.name}: image_grid_pinpoints must be pairs of width and height, or (1x1),...,(6x6) in tiles, got "
        f"{text[:80]}"
    )


def _video(root: ConfigReader) -> VideoRule | None:
    """None where no file says how frames are pooled: then the code fails too."""
    if not root.has("mm_spatial_pool_mode"):
        return None
    timed = root.value("add_time_instruction", bool, False)
    return VideoRule(VIDEO_TOKEN, frames=FRAMES, most_frames=MOST_FRAMES, spread="floored", timed=timed)
