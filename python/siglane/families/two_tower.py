"""SigLIP and SigLIP2 with both towers: what tags images and embeds images and texts (formats.md sections 1 and 2)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from siglane.config.two_tower import TextTowerConfig, TwoTowerConfig
from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError, OtherWeights
from siglane.families.codes import CodesReader
from siglane.families.model import stored_dtype
from siglane.families.processor import ImageProcessor
from siglane.families.registry import is_vlm, tower_family, unknown
from siglane.families.stack import VisionEncoderModel
from siglane.families.stated import log_contradictions
from siglane.families.text_rule import read_tokens
from siglane.families.weights import tower_weights
from siglane.nn.cpu.memory import return_freed
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Rule, WeightPlan
from siglane.nn.quantise import Bits, has_float_layers, kernel, quantise
from siglane.text.tokens import TextTokens
from siglane.text.tower import TEXT_TOWER_PLAN, SiglipTextModel
from siglane.types import BackendChoice, ImagePatches
from siglane.vision.tower import SiglipVisionModel, tower_plan
from siglane.weights.checksum import check_files
from siglane.weights.hub import Checkpoint, Source
from siglane.weights.load import Stage, allocate, fill, rehearse
from siglane.weights.quantised import CodesFile, CodesFormat, agreed_format, codes_format

BOTH_TOWERS = ("siglip", "siglip2")
MODULES = "modules.json"  # of sentence-transformers; these of its modules leave the towers' vectors as they are
TOWER_MODULES = {"CLIPModel", "Transformer", "Normalize"}
TEXTS_PER_FORWARD = {"cpu": 32, "cuda": 512}


class Calibration(NamedTuple):
    """What turns cosines into logits; both f32 `[1]`."""

    scale: torch.Tensor
    bias: torch.Tensor

    def logits(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Unit embeddings `[I, D]`, `[T, D]` -> `[I, T]`; a sigmoid of one is how likely its pair belongs together."""
        return images @ texts.T * self.scale + self.bias


class TwoTowerModel(nn.Module):
    """Both towers and the two scalars that turn their cosines into logits."""

    def __init__(
        self, config: TwoTowerConfig, tp: TensorParallel | None = None, attention_backend: BackendChoice = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionEncoderModel(config.images.vision, config.images.preprocess, tp, attention_backend)
        self.text = SiglipTextModel(config.text, tp, attention_backend)
        self.logit_scale = nn.Parameter(torch.empty(1))  # a logarithm
        self.logit_bias = nn.Parameter(torch.empty(1))

    def embed_images(self, images: Sequence[ImagePatches]) -> torch.Tensor:
        """`[images, D]`, float32, unit length."""
        return F.normalize(self.vision.embeddings(images).float(), dim=-1)

    def embed_texts(self, ids: torch.Tensor) -> torch.Tensor:
        """ids `[texts, length]` -> `[texts, D]`, float32, unit length."""
        return F.normalize(self.text(ids.to(self.logit_scale.device)).float(), dim=-1)

    @property
    def calibration(self) -> Calibration:
        return Calibration(self.logit_scale.exp(), self.logit_bias)


class LoadedTwoTower(NamedTuple):
    """A model in eval mode without gradients, and what turns images and texts into its input.

    not_shared_because: why the image tower has layers of its own in place of those it was offered, None when it shares
    them or was offered none.
    """

    model: TwoTowerModel
    images: ImageProcessor
    texts: TextTokens
    not_shared_because: str | None = None


def has_both_towers(checkpoint: Checkpoint) -> bool:
    return checkpoint.optional("config.json").get("model_type") in BOTH_TOWERS


def read_two_tower(checkpoint: Checkpoint) -> tuple[TwoTowerConfig, TextTokens]:
    """The facts and the tokenizer. ConfigError for a checkpoint without a text tower, or with facts not known."""
    family = tower_family(checkpoint)
    if family is None and not is_vlm(checkpoint):
        raise unknown(checkpoint)
    if family is None or not has_both_towers(checkpoint):
        raise ConfigError(f"{checkpoint.root} has no text tower; tagging needs a SigLIP or SigLIP2 with both towers")
    _check_modules(checkpoint)
    text = TextTowerConfig.from_hf(checkpoint.reader().section("text_config").raw)
    texts = read_tokens(checkpoint, text)
    return TwoTowerConfig(images=family.images(checkpoint, head=True), text=text, texts=texts.rule), texts


def _check_modules(checkpoint: Checkpoint) -> None:
    """ConfigError for a model of sentence-transformers that has layers behind the towers."""
    if not checkpoint.has(MODULES):
        return
    try:
        types = [str(module["type"]) for module in json.loads(checkpoint.path(MODULES).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{checkpoint.path(MODULES)} is not sentence-transformers' list of modules") from error
    if behind := [name for name in types if name.rpartition(".")[2] not in TOWER_MODULES]:
        raise ConfigError(
            f"{checkpoint.path(MODULES)} puts {', '.join(behind)} behind the towers, which siglane does not run; "
            "remove the file to have the towers' own vectors"
        )


def load_two_tower(
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    tp: TensorParallel | None = None,
    attention_backend: BackendChoice = "auto",
    tower: SiglipVisionModel | None = None,
    quantization: Bits | None = None,
) -> LoadedTwoTower:
    """dtype: of both towers, None for the stored one; scale and bias are float32 whatever it is, in bfloat16 a logit
    would be wrong by tenths. ConfigError or WeightError before anything is allocated.

    tower: a chat model's, on the same device and in the same dtype. Where the checkpoint holds the same numbers its
    layers are used and only what it leaves out, such as the head, is loaded. quantization: as of `load_model`, without
    `tower`; UserError for bits that have no kernel here.
    """
    log_contradictions([checkpoint])
    config, texts = read_two_tower(checkpoint)
    if (stated := codes_format(checkpoint)) is not None:
        agreed_format(checkpoint, stated, quantization, torch.device(device), 1 if tp is None else tp.size)
        dtype = dtype or torch.float32
        model = _read_codes(checkpoint, stated, config, dtype, attention_backend)
        return _ready(torch.device(device), dtype, LoadedTwoTower(model, ImageProcessor(config.images), texts))
    dtype = dtype or stored_dtype(checkpoint)
    load = partial(_load_floats, checkpoint, config, torch.device(device), dtype, tp, attention_backend, quantization)
    if tower is not None and not _same_layers(tower.config, config.images.vision):
        tower, reason = None, "the towers' configurations differ"
    else:
        reason = None
    try:
        model = load(tower)
    except OtherWeights as error:
        model, reason = load(None), error.message
    return _ready(torch.device(device), dtype, LoadedTwoTower(model, ImageProcessor(config.images), texts, reason))


def _ready(device: torch.device, dtype: torch.dtype, loaded: LoadedTwoTower) -> LoadedTwoTower:
    """With the image tower's attention chosen: on CUDA that takes a trial, for which no picture should have to wait."""
    loaded.model.vision.tower.backend_for(device, dtype)
    return loaded


def _load_floats(
    checkpoint: Checkpoint,
    config: TwoTowerConfig,
    device: torch.device,
    dtype: torch.dtype,
    tp: TensorParallel | None,
    attention_backend: BackendChoice,
    quantization: Bits | None,
    tower: SiglipVisionModel | None,
) -> TwoTowerModel:
    """OtherWeights where `tower` has other weights than the checkpoint."""
    plan = two_tower_plan(config)
    tensors = tower_weights(checkpoint, [Source(checkpoint)], plan)
    with torch.device("meta"):
        model = TwoTowerModel(config, tp, attention_backend)
    rehearse(model, plan, tensors)
    if tower is not None:
        _stand_on(model.vision.tower, tower)
    held = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    blocks = {} if quantization is None else _stages(model, quantization, device, dtype)
    allocate(model, device, dtype, [model.get_submodule(path) for path in blocks])
    _allocate_scalars(model, device)
    fill(model, plan, tensors, held, blocks)
    if quantization is not None and has_float_layers(model):
        quantise(model, quantization, device)
    return model.eval().requires_grad_(False)


def _stages(model: TwoTowerModel, bits: Bits, device: torch.device, dtype: torch.dtype) -> dict[str, Stage]:
    """On CPUs no two blocks are whole in memory at a time. UserError when there is no kernel here."""
    kernel(bits, device)
    if device.type != "cpu":
        return {}

    def replace(block: nn.Module) -> None:
        quantise(block, bits, device)
        return_freed()

    towers = {"vision.tower.blocks": model.vision.tower.blocks, "text.blocks": model.text.blocks}
    stage = Stage(partial(allocate, device=device, dtype=dtype), replace)
    return {f"{path}.{number}": stage for path, blocks in towers.items() for number in range(len(blocks))}


def _allocate_scalars(model: TwoTowerModel, device: torch.device) -> None:
    model.logit_scale, model.logit_bias = (nn.Parameter(torch.empty(1, device=device)) for _ in range(2))


def _read_codes(
    checkpoint: Checkpoint,
    stated: CodesFormat,
    config: TwoTowerConfig,
    dtype: torch.dtype,
    attention_backend: BackendChoice = "auto",
) -> TwoTowerModel:
    """The model of a folder of codes."""
    file = CodesFile(checkpoint)
    with torch.device("meta"):
        model = TwoTowerModel(config, None, attention_backend)
    reader = CodesReader(file, model, stated)
    check_files(checkpoint, [file.path])
    _allocate_scalars(model, torch.device("cpu"))
    reader.encoders(model, stated.bits, dtype)
    return model.eval().requires_grad_(False)


def check_two_tower(checkpoint: Checkpoint) -> None:
    """Compares names and shapes of all tensors with the configuration. ConfigError or WeightError as `load_two_tower`,
    before which it allocates nothing."""
    config, _ = read_two_tower(checkpoint)
    if (stated := codes_format(checkpoint)) is not None:
        with torch.device("meta"):
            CodesReader(CodesFile(checkpoint), TwoTowerModel(config), stated)
        return
    plan = two_tower_plan(config)
    with torch.device("meta"):
        model = TwoTowerModel(config)
    rehearse(model, plan, tower_weights(checkpoint, [Source(checkpoint)], plan))


def _same_layers(one: VisionConfig, other: VisionConfig) -> bool:
    """Whether the towers differ at most in how many of their layers they run."""
    run = replace(
        one,
        num_hidden_layers=other.num_hidden_layers,
        depth=other.depth,
        post_norm=other.post_norm,
        use_head=other.use_head,
    )
    return one.depth <= other.depth and run == other


def _stand_on(own: SiglipVisionModel, tower: SiglipVisionModel) -> None:
    """Puts the layers of `tower` in place of `own`'s; what `tower` does not run stays."""
    own.patch_embedding, own.position_embedding = tower.patch_embedding, tower.position_embedding
    for number, block in enumerate(tower.blocks):
        own.blocks[number] = block
    if tower.post_norm is not None and tower.config.depth == own.config.depth:
        own.post_norm = tower.post_norm


def two_tower_plan(config: TwoTowerConfig) -> WeightPlan:
    """transformers' `SiglipModel` and `Siglip2Model` -> `TwoTowerModel`."""
    scalars = WeightPlan((Rule("logit_scale", "logit_scale"), Rule("logit_bias", "logit_bias")))
    text = TEXT_TOWER_PLAN.under("text_model.", "text.")
    return scalars + text + tower_plan(config.images.vision).under("", "vision.tower.")
