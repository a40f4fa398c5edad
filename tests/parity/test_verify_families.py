"""Every family agrees with its reference at every stage, on awkward pictures; one fault of each is found where it is.

The references' own picture preparation is compared with transformers' processors where those exist.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import HUB_TEMPLATE, write_llava_onevision_checkpoint, write_relative
from llava_qwen_checkpoint import write_llava_qwen_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import LARGE, write_ovis2_5_checkpoint, write_ovis2_6_checkpoint
from parity_kit import picture
from PIL import Image
from safetensors.torch import load_file, save_file
from siglip2_checkpoint import write_siglip2_checkpoint
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from video_llama_3_checkpoint import LAYOUTS, write_video_llama_3_checkpoint

from siglane.families.registry import CHAT_FAMILIES, TOWER_FAMILIES
from siglane.verify import verify
from siglane.verify.references import llava_onevision, siglip2
from siglane.verify.references.pixels import Processing
from siglane.verify.references.registry import FAMILIES, family_of

ABSOLUTE = 2e-4
AWKWARD = [(1, 1), (53, 31), (400, 17), (17, 400)]
Write = Callable[[Path], Any]


def written(write: Callable[..., Any], **options: Any) -> Write:
    return lambda folder: write(folder, **options)


CHECKPOINTS: dict[str, Write] = {
    "siglip": written(write_siglip_checkpoint),
    "siglip with its text tower": written(write_siglip_checkpoint, full=True),
    "siglip2 naflex": written(write_siglip2_checkpoint),
    "siglip2 naflex with its text tower": written(write_siglip2_checkpoint, full=True, budget=49),
    "nvila lite": written(write_nvila_checkpoint),
    "nvila lite, hf": written(write_nvila_checkpoint, layout="hf", qwen3=True),
    "nvila s2": written(write_nvila_checkpoint, lite=False, tied=True, infix=False),
    "nvila s2, hf": written(write_nvila_checkpoint, lite=False, layout="hf", image_size=70),
    "vila": written(write_nvila_checkpoint, layout="vila", qwen3=True),
    "vila, resized": written(
        write_nvila_checkpoint, projector_type="mlp2x_gelu", flags={"image_aspect_ratio": "resize"}
    ),
    "vila, padded": written(write_nvila_checkpoint, flags={"image_aspect_ratio": "pad"}),
    "vila, a template of parts": written(
        write_nvila_checkpoint,
        layout="hf",
        chat_template="{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
        "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}",
    ),
    "ovis2.5": written(write_ovis2_5_checkpoint),
    "ovis2.5, tied": written(write_ovis2_5_checkpoint, tied=True, head_stored=False),
    "ovis2.5 without rotary positions": written(write_ovis2_5_checkpoint, rope=False, bounds=LARGE),
    "llava-onevision": written(write_llava_onevision_checkpoint),
    "llava-onevision, saved": written(write_llava_onevision_checkpoint, names="saved", nested=True, bias=False),
    "llava-onevision, in memory": written(
        write_llava_onevision_checkpoint, names="memory", tied=False, chat_template=HUB_TEMPLATE
    ),
    "llava-onevision, an earlier layer": written(write_llava_onevision_checkpoint, keys={"vision_feature_layer": -2}),
    "r-4b": written(write_relative, name="r_4b"),
    "bee, without a template": written(write_relative, name="bee", chat_template=None),
    "varco-vision": written(write_relative, name="varco of patches of 16"),
    "ovis2.6": written(write_ovis2_6_checkpoint),
    "ovis2.6 with experts": written(write_ovis2_6_checkpoint, moe=True),
    "llava original": written(write_llava_qwen_checkpoint),
    "llava original, its tower beside it": written(write_llava_qwen_checkpoint, tower="beside", tied=False),
    "nanovlm 0.1": written(write_nanovlm_checkpoint, era="0.1"),
    "nanovlm 0.2": written(write_nanovlm_checkpoint, era="0.2"),
    "nanovlm of tiles": written(write_nanovlm_checkpoint, era="grid"),
    "nanovlm": written(write_nanovlm_checkpoint, enlarge=True, own_tokenizer=False, names="untied", factor=4),
    "smolvlm": written(write_idefics3_checkpoint, kind="smolvlm"),
    "smolvlm2, saved": written(write_idefics3_checkpoint, nested=True, in_memory=True, template=None),
    "smolvlm2, not cut": written(write_idefics3_checkpoint, processor={"do_image_splitting": False}),
    "smolvlm without tokens for tiles": written(write_idefics3_checkpoint, kind="2.2b"),
    "docling": written(write_idefics3_checkpoint, kind="docling"),
    **{
        f"video llama 3, {layout}{', its template' * template}": written(
            write_video_llama_3_checkpoint, layout=layout, template=template, tied=template
        )
        for layout in LAYOUTS
        for template in (False, True)
    },
    "nanovlm without a template": written(
        write_nanovlm_checkpoint, flags={"lm_chat_template": None}, names="embedding"
    ),
}  # fmt: skip


@pytest.mark.few(
    "siglip with its text tower", "siglip2 naflex", "nvila lite", "nvila s2, hf", "vila, padded", "ovis2.5",
    "llava-onevision", "r-4b", "bee, without a template", "varco-vision", "ovis2.6 with experts", "llava original",
    "nanovlm", "nanovlm 0.1", "smolvlm", "smolvlm2, saved", "docling", "video llama 3, hf",
    "video llama 3, authors, its template",
)  # fmt: skip
@pytest.mark.parametrize("write", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_family_agrees_with_its_reference(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "model")
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(AWKWARD)]
    report = verify(tmp_path / "model", pictures, threshold=0.99999, steps=4)
    assert report.ok, [one for one in report.comparisons if not one.ok]
    assert report.first_inexact is None
    assert max(one.max_abs_error or 0.0 for one in report.comparisons) <= ABSOLUTE
    assert all(one.note == "" for one in report.comparisons if one.stage != "packing")
    stages = [stage for stage, _ in report.stages()]
    assert stages[:3] == ["preprocessing", "patch_embedding", "positions"]
    assert "packing" in stages
    assert (stages[-1] == "tokens") == (report.prompt is not None)


def test_every_family_has_a_reference() -> None:
    assert {family.name for family in FAMILIES} == {family.name for family in (*CHAT_FAMILIES, *TOWER_FAMILIES)}


def test_the_families_are_told_apart(tmp_path: Path) -> None:
    for number, (name, write) in enumerate(CHECKPOINTS.items()):
        write(tmp_path / str(number))
        found = family_of(tmp_path / str(number))
        assert found is not None, name
        assert [one.name for one in FAMILIES if one.matches(tmp_path / str(number))] == [found.name], name
    assert family_of(tmp_path) is None


def set_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        state[name] = change(state[name]).contiguous()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def set_key(file: str, *keys: str, value: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        section = found
        for key in keys[:-1]:
            section = section[key]
        section[keys[-1]] = value
        (folder / file).write_text(json.dumps(found))

    return damage


VIT = "visual_tokenizer.vit.vision_model"
FAULTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "naflex: channel-first patches": (
        "siglip2 naflex",
        set_tensor(
            "vision_model.embeddings.patch_embedding.weight",
            lambda w: w.unflatten(1, (16, 16, 3)).permute(0, 3, 1, 2).flatten(1),
        ),
        "patch_embedding",
    ),
    "naflex: a transposed position table": (
        "siglip2 naflex",
        set_tensor(
            "vision_model.embeddings.position_embedding.weight",
            lambda w: w.unflatten(0, (4, 4)).transpose(0, 1).flatten(0, 1),
        ),
        "positions",
    ),
    "naflex: another budget of patches": (
        "siglip2 naflex",
        set_key("preprocessor_config.json", "max_num_patches", value=36),
        "preprocessing",
    ),
    "ovis2.5: without rotary positions": (
        "ovis2.5", set_key("config.json", "vit_config", "use_rope", value=False), "block.0",
    ),
    "ovis2.5: merged in another order": (
        "ovis2.5", set_tensor("visual_tokenizer.head.0.weight", lambda w: w.roll(32, 1)), "projector",
    ),
    "ovis2.5: indicators exchanged": (
        "ovis2.5", set_tensor("vte.weight", lambda w: torch.cat((w[:-4], w[-4:].flip(0)))), "spliced",
    ),
    "llava-onevision: the newline": (
        "llava-onevision", set_tensor("image_newline", torch.neg), "projector",
    ),
    "llava-onevision: post_layernorm applied would show; the layer before": (
        "llava-onevision", set_key("config.json", "vision_feature_layer", value=-2), "features",
    ),
    "llava-onevision: transformers' default mean": (
        "llava-onevision",
        set_key("preprocessor_config.json", "image_mean", value=[0.48145466, 0.4578275, 0.40821073]),
        "preprocessing",
    ),
    "r-4b: the norm in front of the projector": (
        "r-4b", set_tensor("multi_modal_projector.pre_norm.bias", torch.neg), "projector",
    ),
    "llava original: a block more of the tower": (
        "llava original", set_key("google-siglip/config.json", "num_hidden_layers", value=3), "features",
    ),
    "nanovlm: k for q": (
        "nanovlm of tiles",
        set_tensor("vision_encoder.blocks.0.attn.qkv_proj.weight", lambda w: w.roll(32, 0)),
        "block.0",
    ),
    "nanovlm: channels of the shuffle": (
        "nanovlm of tiles", set_tensor("MP.proj.weight", lambda w: w.unflatten(1, (4, 32)).transpose(1, 2).flatten(1)),
        "projector",
    ),
    "smolvlm: fewer tiles": (
        "smolvlm", set_key("preprocessor_config.json", "size", "longest_edge", value=96), "preprocessing",
    ),
    "smolvlm: channels of the shuffle": (
        "smolvlm",
        set_tensor(
            "model.connector.modality_projection.proj.weight",
            lambda w: w.unflatten(1, (4, 32)).transpose(1, 2).flatten(1),
        ),
        "projector",
    ),
    "smolvlm: without the last norm": (
        "smolvlm", set_tensor("model.vision_model.post_layernorm.weight", torch.ones_like), "features",
    ),
    "video llama 3: another normalisation": (
        "video llama 3, authors", set_key("preprocessor_config.json", "image_mean", value=[0.48, 0.46, 0.41]),
        "preprocessing",
    ),
    "video llama 3: larger pictures": (
        "video llama 3, hf", set_key("preprocessor_config.json", "size", "longest_edge", value=10**6), "preprocessing",
    ),
    "video llama 3: rows and columns of patches": (
        "video llama 3, authors",
        set_tensor("model.vision_encoder.embeddings.patch_embedding.weight", lambda w: w.transpose(2, 3)),
        "patch_embedding",
    ),
    "nanovlm: rotary base": ("nanovlm of tiles", set_key("config.json", "lm_re_base", value=3), "lm.block.0"),
}  # fmt: skip


@pytest.mark.few(
    "naflex: channel-first patches", "ovis2.5: indicators exchanged", "llava-onevision: the newline",
    "r-4b: the norm in front of the projector", "llava original: a block more of the tower",
    "nanovlm: channels of the shuffle", "smolvlm: fewer tiles", "video llama 3: another normalisation",
)  # fmt: skip
@pytest.mark.parametrize(("name", "damage", "stage"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found_where_it_is(tmp_path: Path, name: str, damage: Callable[[Path], None], stage: str) -> None:
    CHECKPOINTS[name](tmp_path / "original")
    damage(shutil.copytree(tmp_path / "original", tmp_path / "copy"))
    report = verify(tmp_path / "copy", random=2, reference=tmp_path / "original", steps=0)
    assert report.first_diverging == stage


@pytest.mark.few("bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_above_the_bar(tmp_path: Path, dtype: str) -> None:
    write_nvila_checkpoint(tmp_path)
    report = verify(tmp_path, random=2, dtype=dtype)
    assert report.ok
    assert report.first_inexact is None
    assert max(one.max_abs_error or 0.0 for one in report.comparisons) > ABSOLUTE


@pytest.mark.few("size0", "size3", "size4", "size6")
@pytest.mark.parametrize("size", [(640, 480), (224, 224), (1920, 1080), (2000, 100), (1, 1), (4000, 17), (17, 4000)])
def test_naflex_pictures_are_prepared_as_transformers_does(size: tuple[int, int]) -> None:
    image = picture(*size)
    theirs = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=256)(images=[image], return_tensors="pt")
    width, height = siglip2.resized_to(*size, 16, 256)
    processing = Processing.of({}, 1, Image.Resampling.BILINEAR)
    ours = siglip2.channel_last(processing.normalised(image.resize((width, height), processing.resample)), 16)
    assert theirs["spatial_shapes"].tolist() == [[height // 16, width // 16]]
    assert torch.allclose(ours, theirs["pixel_values"][0][: len(ours)], atol=1e-6)


@pytest.mark.parametrize("size", [(64, 48), (56, 56), (192, 108), (200, 10), (1, 1), (400, 17), (17, 400), (33, 50)])
def test_anyres_pictures_are_prepared_as_transformers_does(tmp_path: Path, size: tuple[int, int]) -> None:
    original = write_llava_onevision_checkpoint(tmp_path, image_size=56)
    processor = original.processor.image_processor
    assert isinstance(processor, LlavaOnevisionImageProcessorPil)
    reference = llava_onevision.LlavaOnevision(tmp_path, torch.device("cpu"), torch.float32)
    alone, several = [picture(*size)], [picture(*size), picture(20, 90, seed=1)]
    for images, tiles in (
        (alone, reference.prepared(alone)),
        (several, reference.prepared(several)),
    ):
        theirs = torch.as_tensor(processor(images=[images], return_tensors="pt")["pixel_values"])
        assert torch.allclose(tiles, theirs.flatten(0, 1), atol=1e-6)
