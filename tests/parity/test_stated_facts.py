"""Every place that may state a fact, alone and in contradiction: siglane reads what transformers reads.

A cell where it does not stands in a test called `...differs...` with its reason; formats.md 9 lists them. Files of
JSON and small tokenizers only: no weights.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoints import build_tokenizer, write_json
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.video_processing_utils import BaseVideoProcessor
from two_tower_checkpoint import write_two_tower_checkpoint

from siglane.config.images import ImageFacts
from siglane.config.language import LanguageConfig
from siglane.config.preprocess import RESAMPLES
from siglane.config.two_tower import TextRule
from siglane.errors import ConfigError
from siglane.families.bee import Bee
from siglane.families.idefics3 import Idefics3
from siglane.families.llava_onevision import LlavaOnevision
from siglane.families.nvila import Nvila
from siglane.families.processor import load_tokenizer
from siglane.families.r_4b import R4B
from siglane.families.registry import CHAT_FAMILIES, image_facts
from siglane.families.stated import contradictions, end_ids, image_processor
from siglane.families.two_tower import read_two_tower
from siglane.families.video_llama_3 import VideoLlama3
from siglane.families.videollama3_qwen2 import VideoLlama3Qwen2
from siglane.verify.references.files import chat_template, processor_json
from siglane.weights.hub import Checkpoint

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
SIDE = 56
SIZES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER = {"model_type": "siglip_vision_model", **SIZES, "image_size": SIDE, "patch_size": 14}
HEADS = {**SIZES, "num_key_value_heads": 2}
QWEN2 = {"model_type": "qwen2", **HEADS, "vocab_size": 64}
# three files that say different things
FIRST, SECOND, THIRD = (
    {
        "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / scale, "resample": resample,
        "image_mean": [mean] * 3, "image_std": [2 * mean] * 3, "size": {"height": SIDE, "width": SIDE},
    }
    for scale, resample, mean in ((255, 2, 0.1), (127, 0, 0.2), (511, 5, 0.3))
)  # fmt: skip


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def siglip(folder: Path) -> Path:
    return write(folder, {"config.json": {"model_type": "siglip", "vision_config": TOWER, "text_config": {}}})


def naflex(folder: Path) -> Path:
    vision = {**SIZES, "patch_size": 16, "num_patches": 16}
    return write(folder, {"config.json": {"model_type": "siglip2", "vision_config": vision, "text_config": {}}})


def llava_onevision(folder: Path) -> Path:
    return write(
        folder, {"config.json": {"model_type": "llava_onevision", "vision_config": TOWER, "text_config": QWEN2}}
    )


def vila_folders(folder: Path) -> Path:
    flags = {"llm_cfg": "llm", "image_aspect_ratio": "pad"}
    parts = {"llm": QWEN2, "vision_tower": TOWER, "mm_projector": {"mm_projector_type": "linear"}}
    write(folder, {"config.json": flags, **{f"{part}/config.json": raw for part, raw in parts.items()}})
    return folder / "vision_tower"


def nvila_hf(folder: Path) -> Path:
    names = {"architectures": ["NVILALiteForConditionalGeneration"], "model_type": "nvila"}
    return write(folder, {"config.json": {**names, "vision_config": TOWER, "text_config": QWEN2}})


def ovis(folder: Path) -> Path:
    sections = {"vit_config": {**TOWER, "model_type": "siglip2_navit"}, "llm_config": {**QWEN2, "model_type": "qwen3"}}
    names = {"architectures": ["Ovis2_5"], "model_type": "ovis2_5", "visual_vocab_size": 64}
    return write(folder, {"config.json": {**names, **sections}})


# each writes a folder and returns the one with the processor's files
FAMILIES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "SigLIP": (siglip, "SiglipImageProcessor"),
    "NaFlex": (naflex, "Siglip2ImageProcessor"),
    "LLaVA-OneVision": (llava_onevision, "LlavaOnevisionImageProcessor"),
    "VILA": (vila_folders, "SiglipImageProcessor"),
    "NVILA": (nvila_hf, "SiglipImageProcessor"),
    "Ovis2.5": (ovis, "SiglipImageProcessor"),
}
# what the two files hold; {} in place of a section takes the class's defaults
PLACES: dict[str, dict[str, Any]] = {
    "plain": {"preprocessor_config.json": SECOND},
    "nested": {"processor_config.json": {"image_processor": FIRST}},
    "both": {"processor_config.json": {"image_processor": FIRST}, "preprocessor_config.json": SECOND},
    "a processor's other facts": {
        "processor_config.json": {"image_seq_length": 3, "processor_class": "P"}, "preprocessor_config.json": SECOND,
    },
    "null": {"processor_config.json": {"image_processor": None}, "preprocessor_config.json": SECOND},
    "of videos alone": {
        "processor_config.json": {"video_processor": FIRST}, "preprocessor_config.json": SECOND,
    },
    "nested beside videos": {
        "processor_config.json": {"image_processor": FIRST, "video_processor": FIRST},
        "video_preprocessor_config.json": SECOND, "preprocessor_config.json": THIRD,
    },
}  # fmt: skip


def named(files: Mapping[str, Any], kind: str, **more: Any) -> dict[str, Any]:
    """The same with the class in each description, as `save_pretrained` writes it."""

    def whole(raw: Any) -> Any:
        return raw if raw is None else {"image_processor_type": kind, **more, **raw}

    return {
        name: {key: whole(value) if key.endswith("_processor") else value for key, value in raw.items()}
        if name == "processor_config.json"
        else whole(raw)
        for name, raw in files.items()
    }


def seen(facts: ImageFacts) -> dict[str, Any]:
    found = facts.preprocess
    return {"mean": found.mean, "std": found.std, "rescale": found.rescale, "resample": found.rule.resample}


def stated_by(processor: Any) -> dict[str, Any]:
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    resample = RESAMPLES[int(processor.resample)]
    return {"mean": mean, "std": std, "rescale": processor.rescale_factor, "resample": resample}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("suffix", ["", "Fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_image_processor(tmp_path: Path, family: str, suffix: str, places: str) -> None:
    if family == "LLaVA-OneVision" and places == "of videos alone":
        pytest.skip("refused: a file for frames alone that normalises them otherwise than pictures")
    build, kind = FAMILIES[family]
    pinpoints = {"image_grid_pinpoints": [[SIDE, SIDE]]} if family == "LLaVA-OneVision" else {}
    folder = write(build(tmp_path), named(PLACES[places], kind + suffix, **pinpoints))
    if pinpoints:
        write(tmp_path, {"config.json": {**json.loads((tmp_path / "config.json").read_text()), **pinpoints}})
    ours, theirs = image_facts(Checkpoint(tmp_path)), AutoImageProcessor.from_pretrained(str(folder), backend="pil")
    expected = stated_by(theirs)
    if family == "NVILA":  # it resizes before its processor does, with Pillow's default (formats.md 5.4)
        expected["resample"] = "bicubic"
    assert seen(ours) == expected
    assert processor_json(folder)["resample"] == int(theirs.resample)


@pytest.mark.parametrize("family", ["SigLIP", "NaFlex"])
@pytest.mark.parametrize(
    "files", [{"processor_config.json": {"image_processor": {}}}, {"preprocessor_config.json": {}}]
)
def test_a_class_without_keys(tmp_path: Path, family: str, files: dict[str, Any]) -> None:
    raw = {"model_type": "siglip", "vision_config": {**TOWER, "image_size": 224}, "text_config": {}}
    folder = write(tmp_path, {"config.json": raw}) if family == "SigLIP" else naflex(tmp_path)
    write(folder, files)
    expected = stated_by(AutoImageProcessor.from_pretrained(str(folder), backend="pil"))
    assert seen(image_facts(Checkpoint(folder))) == expected


@pytest.mark.parametrize("places", ["plain", "nested", "both"])
def test_the_budget_of_naflex(tmp_path: Path, places: str) -> None:
    folder = naflex(tmp_path)
    files = named(PLACES[places], "Siglip2ImageProcessor", patch_size=16)
    for number, raw in enumerate((files.get("processor_config.json", {}), files)):
        for name in {"image_processor", "preprocessor_config.json"} & {*raw}:
            raw[name]["max_num_patches"] = (36, 729)[number]
    write(folder, files)
    theirs = AutoImageProcessor.from_pretrained(str(folder), backend="pil")
    rule: Any = image_facts(Checkpoint(folder)).preprocess.rule
    assert rule.max_num_patches == theirs.max_num_patches == (729 if places == "plain" else 36)


def test_what_transformers_5_saves(tmp_path: Path) -> None:
    """Its own `Processor.save_pretrained`: nothing but processor_config.json describes pictures."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
    from transformers.models.siglip2.processing_siglip2 import Siglip2Processor

    class Saved(Siglip2Processor):
        """transformers' own; its base class cannot name the class of an image processor without torchvision."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type | None:
            return None

    folder = naflex(tmp_path)
    images = Siglip2ImageProcessorPil(resample=2, max_num_patches=36, image_mean=[0.1, 0.2, 0.3])
    Saved(images, build_tokenizer()).save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    found = image_facts(Checkpoint(folder)).preprocess
    rule: Any = found.rule
    assert (rule.resample, rule.max_num_patches, found.mean) == ("bilinear", 36, (0.1, 0.2, 0.3))


def test_sizes(tmp_path: Path) -> None:
    folder = siglip(tmp_path)
    for size in ({"height": SIDE, "width": SIDE}, [SIDE, SIDE]):
        write(folder, {"preprocessor_config.json": {"size": size}})
        theirs = SiglipImageProcessorPil.from_pretrained(str(folder)).size
        rule: Any = image_facts(Checkpoint(folder)).preprocess.rule
        assert rule.tile == (theirs.width, theirs.height) == (SIDE, SIDE)


def test_sizes_of_one_side_differ(tmp_path: Path) -> None:
    """transformers 5 keeps the picture's aspect, and the tower then takes square pictures alone; siglane squashes, as
    transformers does for the sizes of the hub's files. Where the file names the shortest edge it is refused."""
    folder = write(siglip(tmp_path), {"preprocessor_config.json": {"size": SIDE}})
    assert SiglipImageProcessorPil.from_pretrained(str(folder)).size.shortest_edge == SIDE
    rule: Any = image_facts(Checkpoint(folder)).preprocess.rule
    assert rule.tile == (SIDE, SIDE)
    write(folder, {"preprocessor_config.json": {"size": {"shortest_edge": SIDE}}})
    with pytest.raises(ConfigError, match="shortest_edge keeps a picture's aspect"):
        image_facts(Checkpoint(folder))


@pytest.mark.parametrize("key", ["do_resize", "do_rescale", "do_normalize"])
def test_steps_left_out_differ(tmp_path: Path, key: str) -> None:
    """transformers leaves the step out; siglane refuses, naming the file that says so."""
    folder = write(siglip(tmp_path), {"processor_config.json": {"image_processor": {**FIRST, key: False}}})
    assert getattr(SiglipImageProcessorPil.from_pretrained(str(folder)), key) is False
    with pytest.raises(ConfigError, match=rf"processor_config\.json\.image_processor: {key} false is not supported"):
        image_facts(Checkpoint(folder))


def test_another_class_in_the_file(tmp_path: Path) -> None:
    """transformers takes that class and its defaults: CLIP's mean, a shortest edge and a crop."""
    folder = write(siglip(tmp_path), {"preprocessor_config.json": {"image_processor_type": "CLIPImageProcessor"}})
    assert AutoImageProcessor.from_pretrained(str(folder), backend="pil").do_center_crop
    with pytest.raises(
        ConfigError, match="image_processor_type 'CLIPImageProcessor' has defaults that siglane does not"
    ):
        image_facts(Checkpoint(folder))


# the nested section, the file of videos, the file of pictures
VIDEO_PLACES = ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")


@pytest.mark.parametrize("held", [held for n in (1, 2, 3) for held in itertools.combinations(range(3), n)], ids=str)
def test_the_video_processor(tmp_path: Path, held: tuple[int, ...]) -> None:
    """LLaVA-OneVision is the only family whose frames have a file. Pictures: nested wherever videos are."""
    folder, same = llava_onevision(tmp_path), {"image_grid_pinpoints": [[SIDE, SIDE]], "num_frames": 4}
    write(folder, {"config.json": {**json.loads((folder / "config.json").read_text()), **same}})
    nested: dict[str, Any] = {"image_processor": {**FIRST, **same}}
    for number in held:
        frames = {**FIRST, **same, "resample": number, "num_frames": 5 + number}
        if number == 0:
            nested["video_processor"] = frames
        else:
            write(folder, {VIDEO_PLACES[number]: frames})
    write(folder, {"processor_config.json": nested})
    raw, _ = BaseVideoProcessor.get_video_processor_dict(str(folder))
    facts = image_facts(Checkpoint(folder))
    rule: Any = facts.preprocess.rule
    assert rule.frame_resample == RESAMPLES[raw["resample"]]
    assert facts.video is not None
    assert facts.video.frames == raw["num_frames"]


def test_videos_without_a_file_differ(tmp_path: Path) -> None:
    """transformers has no video processor then; siglane treats frames as pictures."""
    folder, same = llava_onevision(tmp_path), {"image_grid_pinpoints": [[SIDE, SIDE]]}
    write(folder, {"config.json": {**json.loads((folder / "config.json").read_text()), **same}})
    write(folder, {"processor_config.json": {"image_processor": {**FIRST, **same}}})
    with pytest.raises(OSError, match="video processor"):
        BaseVideoProcessor.get_video_processor_dict(str(folder))
    rule: Any = image_facts(Checkpoint(folder)).preprocess.rule
    assert rule.frame_resample == rule.resample


def test_a_video_processor_with_other_pixels_differs(tmp_path: Path) -> None:
    """transformers normalises frames by themselves; siglane's tower normalises everything alike, and refuses."""
    folder, same = llava_onevision(tmp_path), {"image_grid_pinpoints": [[SIDE, SIDE]]}
    write(folder, {"config.json": {**json.loads((folder / "config.json").read_text()), **same}})
    write(folder, named(PLACES["of videos alone"], "LlavaOnevisionImageProcessor", **same))
    with pytest.raises(ConfigError, match=r"processor_config\.json\.video_processor: size and normalisation of frames"):
        image_facts(Checkpoint(folder))


def test_a_leftover_file_with_other_pixels_costs_videos_alone(tmp_path: Path, caplog: Any) -> None:
    """transformers reads it for videos: there siglane refuses them, and pictures are those of the nested section."""
    folder, same = llava_onevision(tmp_path), {"image_grid_pinpoints": [[SIDE, SIDE]]}
    write(folder, {"config.json": {**json.loads((folder / "config.json").read_text()), **same}})
    nested = {"image_processor": {**FIRST, **same}}
    write(folder, {"processor_config.json": nested, "preprocessor_config.json": {**SECOND, **same}})
    facts = image_facts(Checkpoint(folder))
    assert facts.preprocess.mean == (0.1, 0.1, 0.1)
    assert facts.video is None
    assert "preprocessor_config.json gives videos another size or normalisation" in caplog.text


TEMPLATES = {
    "processor_config.json": {"chat_template": "P"},
    "chat_template.json": {"chat_template": "J"},
    "chat_template.jinja": "F",
    "tokenizer_config.json": {"chat_template": "T"},
}
SUBSETS = [held for n in range(5) for held in itertools.combinations(TEMPLATES, n)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def spoken(tokenizer_folder: Path, tmp_path: Path) -> Callable[[Mapping[str, Any]], Path]:
    """Makes a folder with a tokenizer, and files added to it; keys go into a file that is there already."""
    count = itertools.count()

    def make(files: Mapping[str, Any]) -> Path:
        folder = tmp_path / f"spoken{next(count)}"
        shutil.copytree(tokenizer_folder, folder)
        for name, content in files.items():
            path = folder / name
            old = json.loads(path.read_text()) if path.exists() and name.endswith(".json") else {}
            write(folder, {name: {**old, **content} if isinstance(content, Mapping) else content})
        return folder

    return make


def default_of(found: Any) -> Any:
    return found.get("default") if isinstance(found, dict) else found


def test_chat_templates_of_a_tokenizer(spoken: Any) -> None:
    for held in SUBSETS:
        folder = spoken({"config.json": {"model_type": "llama"}} | {name: TEMPLATES[name] for name in held})
        expected = AutoTokenizer.from_pretrained(str(folder)).chat_template
        ours = load_tokenizer(Checkpoint(folder)).chat_template
        if expected is None and held:  # in files of a processor, where there is none: better than no template
            expected = {"processor_config.json": "P", "chat_template.json": "J"}[held[0]]
        assert ours == expected, held
        assert chat_template(folder, by_processor=False) == expected, held


def test_chat_templates_of_a_processor(spoken: Any) -> None:
    for held in SUBSETS:
        folder = spoken({name: TEMPLATES[name] for name in held})
        raw, _ = ProcessorMixin.get_processor_dict(str(folder))
        expected = raw.get("chat_template")
        if expected is None and "tokenizer_config.json" in held:  # transformers' processor leaves it to its tokenizer
            expected = "T"
        assert load_tokenizer(Checkpoint(folder), processor=True).chat_template == expected, held
        assert chat_template(folder, by_processor=True) == expected, held


def test_several_chat_templates_by_name(spoken: Any) -> None:
    listed = [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "D"}]
    more = {"additional_chat_templates/rag.jinja": "R"}
    cases: list[dict[str, Any]] = [
        {"tokenizer_config.json": {"chat_template": listed}},
        {"chat_template.jinja": "F", **more},
        {"chat_template.jinja": "F", "tokenizer_config.json": {"chat_template": listed}, **more},
    ]
    for files in cases:
        folder = spoken({"config.json": {"model_type": "llama"}, **files})
        expected = default_of(AutoTokenizer.from_pretrained(str(folder)).chat_template)
        assert load_tokenizer(Checkpoint(folder)).chat_template == expected
        assert chat_template(folder, by_processor=False) == expected
    for files in cases[1:]:
        folder = spoken(files)
        expected = default_of(ProcessorMixin.get_processor_dict(str(folder))[0]["chat_template"])
        assert load_tokenizer(Checkpoint(folder), processor=True).chat_template == expected
        assert chat_template(folder, by_processor=True) == expected


def test_named_templates_without_a_default_differ(spoken: Any) -> None:
    """transformers then refuses every conversation; siglane takes the default of the next place that has one."""
    files = {"additional_chat_templates/rag.jinja": "R", "tokenizer_config.json": {"chat_template": "T"}}
    folder = spoken({"config.json": {"model_type": "llama"}, **files})
    with pytest.raises(ValueError, match="multiple chat templates"):
        AutoTokenizer.from_pretrained(str(folder)).get_chat_template()
    assert load_tokenizer(Checkpoint(folder)).chat_template == "T"


def test_the_old_file_beside_a_folder_of_templates_differs(spoken: Any) -> None:
    """transformers' processors refuse both together; siglane takes the old file, which they read first."""
    folder = spoken({"chat_template.json": {"chat_template": "J"}, "additional_chat_templates/rag.jinja": "R"})
    with pytest.raises(ValueError, match="conflicting files"):
        ProcessorMixin.get_processor_dict(str(folder))
    assert load_tokenizer(Checkpoint(folder), processor=True).chat_template == "J"


def test_templates_that_are_none_are_refused(spoken: Any) -> None:
    for name, content in {
        "chat_template.json": {"chat_template": 3},
        "processor_config.json": {"chat_template": [1]},
    }.items():
        with pytest.raises(ConfigError, match=rf"{name}.* must be a chat template"):
            load_tokenizer(Checkpoint(spoken({name: content})))


VIDEO_LLAMAS = (VideoLlama3.name, VideoLlama3Qwen2.name)


def test_which_families_have_a_processor(tmp_path: Path) -> None:
    """LLaVA-OneVision's class in transformers and its relatives', Idefics3's, VideoLLaMA3's, and the hf layout's; the
    others come with a tokenizer."""
    nvila_hf(tmp_path)
    with_one = {family.name for family in CHAT_FAMILIES if family.has_processor(Checkpoint(tmp_path))}
    assert with_one == {LlavaOnevision.name, Nvila.name, R4B.name, Bee.name, Idefics3.name, *VIDEO_LLAMAS}
    vila_folders(tmp_path / "folders")
    assert not Nvila().has_processor(Checkpoint(tmp_path / "folders"))


GENERATION = {"no file": None, "silent": {}, "one": {"eos_token_id": 1}, "list": {"eos_token_id": [1, 2]}}
ENDS: tuple[Any, ...] = (None, 3, [4, 5])
SECTIONS = ("text_config", "decoder", "generator")


@pytest.mark.parametrize("generation", GENERATION)
@pytest.mark.parametrize("section", SECTIONS)
def test_the_end_of_an_answer(tmp_path: Path, generation: str, section: str) -> None:
    if GENERATION[generation] is not None:
        write(tmp_path, {"generation_config.json": GENERATION[generation]})
    for top, inner in itertools.product(ENDS, (None, 6, [7, 8])):
        raw: dict[str, Any] = {"model_type": "llava_onevision", section: {}}
        raw |= {} if top is None else {"eos_token_id": top}
        raw[section] |= {} if inner is None else {"eos_token_id": inner}
        write(tmp_path, {"config.json": raw})
        if generation in ("one", "list"):
            theirs = GenerationConfig.from_pretrained(str(tmp_path))
        else:  # a silent file leaves transformers without an end; siglane asks config.json then, as vLLM and SGLang do
            theirs = GenerationConfig.from_pretrained(str(tmp_path), "config.json", _from_model_config=True)
        expected = theirs.eos_token_id
        ours = end_ids(Checkpoint(tmp_path))
        assert (list(ours[0].value) if ours else None) == (
            expected if isinstance(expected, list | None) else [expected]
        )


def test_a_silent_generation_config_differs(tmp_path: Path) -> None:
    write(tmp_path, {"generation_config.json": {}, "config.json": {"eos_token_id": 3}})
    assert GenerationConfig.from_pretrained(str(tmp_path)).eos_token_id is None
    assert end_ids(Checkpoint(tmp_path))[0].value == (3,)


def test_the_end_in_ovis_section_differs(tmp_path: Path) -> None:
    """transformers does not know `llm_config`; Ovis' own code hands it to Qwen3."""
    write(tmp_path, {"config.json": {"llm_config": {"eos_token_id": 3}}})
    assert end_ids(Checkpoint(tmp_path))[0].value == (3,)


@pytest.mark.parametrize("found", [True, -1, "2", [1, None], {}])
def test_ends_that_are_none_are_refused(tmp_path: Path, found: Any) -> None:
    write(tmp_path, {"config.json": {"text_config": {"eos_token_id": found}}})
    with pytest.raises(ConfigError, match=r"config\.json\.text_config: eos_token_id must be a token id"):
        end_ids(Checkpoint(tmp_path))


ROPE = [
    dict(zip(("rope_theta", "rope_parameters", "rope_scaling"), values, strict=True))
    for values in itertools.product(
        (None, 5.0),
        (None, {}, {"rope_type": "default"}, {"rope_theta": 6.0, "rope_type": "default"}),
        (None, {}, {"type": "default"}, {"rope_theta": 7.0, "rope_type": "default"}),
    )
]


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_rotary_positions(kind: str) -> None:
    read: Any = LanguageConfig.from_llama if kind == "llama" else LanguageConfig.from_hf
    for raw in ROPE:
        stated = {name: value for name, value in raw.items() if value is not None}
        expected = AutoConfig.for_model(kind, **json.loads(json.dumps(stated))).rope_parameters
        ours = read({"model_type": kind, **HEADS, **stated})
        assert (ours.rope_theta, expected["rope_type"]) == (expected["rope_theta"], "default"), stated
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "llama":  # where the original length is not stated it is the model's
        expected = AutoConfig.for_model(kind, rope_scaling=dict(llama3), max_position_embeddings=99).rope_parameters
        ours = read({"model_type": kind, **HEADS, "rope_scaling": llama3, "max_position_embeddings": 99})
        assert ours.rope_scaling.original_length == expected["original_max_position_embeddings"] == 99


@pytest.mark.parametrize("top", [None, False, True])
@pytest.mark.parametrize("inner", [None, False, True])
def test_tied_heads_and_image_tokens(tmp_path: Path, top: bool | None, inner: bool | None) -> None:
    folder = llava_onevision(tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    raw |= {} if top is None else {"tie_word_embeddings": top}
    raw["text_config"] |= {} if inner is None else {"tie_word_embeddings": inner}
    family, tokenizer = LlavaOnevision(), build_tokenizer()
    for ids in ({}, {"image_token_index": 8}, {"image_token_id": 7}, {"image_token_index": 8, "image_token_id": 7}):
        write(folder, {"config.json": raw | ids})
        theirs, checkpoint = AutoConfig.from_pretrained(str(folder)), Checkpoint(folder)
        language = family.language(checkpoint)
        assert language.tie_embeddings == theirs.tie_word_embeddings
        assert family.image_token_id(checkpoint, tokenizer, language) == theirs.image_token_id


def test_the_text_of_the_image_token(tmp_path: Path) -> None:
    """transformers `LlavaOnevisionProcessor`: the tokenizer's, then the processor's, then `<image>`."""
    family, checkpoint = LlavaOnevision(), Checkpoint(llava_onevision(tmp_path))
    assert family.image_token(checkpoint) == "<image>"
    write(tmp_path, {"processor_config.json": {"image_token": "<pic>"}})
    assert family.image_token(checkpoint) == "<pic>"
    write(tmp_path, {"tokenizer_config.json": {"extra_special_tokens": {"image_token": "<im>"}}})
    assert family.image_token(checkpoint) == "<im>"


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "llava_onevision"])
def test_the_class_of_a_tokenizer(spoken: Any, model_type: str) -> None:
    """Qwen's own, which builds splitting and normalisation anew, or the file as it is."""
    names = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast")
    for of_tokenizer, of_config in itertools.product(names, names):
        config = {"model_type": model_type} | ({} if of_config is None else {"tokenizer_class": of_config})
        folder = spoken({"config.json": config})
        file = folder / "tokenizer_config.json"
        stated = {key: value for key, value in json.loads(file.read_text()).items() if key != "tokenizer_class"}
        write_json(file, stated | ({} if of_tokenizer is None else {"tokenizer_class": of_tokenizer}))
        theirs = type(AutoTokenizer.from_pretrained(str(folder))).__name__ == "Qwen2Tokenizer"
        ours = type(load_tokenizer(Checkpoint(folder))).__name__ == "Qwen2Tokenizer"
        assert ours == theirs, (of_tokenizer, of_config)


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_towers")
    write_two_tower_checkpoint(folder / "first", "siglip", tokenizer="json")
    write_two_tower_checkpoint(folder / "spiece", "siglip")
    write_two_tower_checkpoint(folder / "second", "siglip2")
    return folder


def rule_of(source: Path, folder: Path, files: Mapping[str, Any], padding: str | None = None) -> TextRule:
    """The rule of a copy of `source` with these files in place of its tokenizer's descriptions."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("tokenizer_config.json", "*.safetensors"))
    write(folder, files)
    if padding is not None:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        number = tokenizer.token_to_id(padding)
        assert number is not None
        tokenizer.enable_padding(pad_id=number, pad_token=padding)
        tokenizer.save(str(folder / "tokenizer.json"))
    return read_two_tower(Checkpoint(folder))[0].texts


AS_DICT = {"content": "</s>", "lstrip": True, "rstrip": True, "normalized": False, "single_word": False}
STORED: dict[str, dict[str, Any]] = {
    "T5": {"tokenizer_config.json": {"tokenizer_class": "T5TokenizerFast", "pad_token": "</s>", "eos_token": "</s>"}},
    "any": {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>"}},
    "transformers 5": {"tokenizer_config.json": {"tokenizer_class": "TokenizersBackend", "pad_token": "</s>"}},
    "no class": {"tokenizer_config.json": {"pad_token": "</s>"}},
    "nothing": {},
    "a dict": {"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer", "pad_token": AS_DICT}},
    "the older file": {"special_tokens_map.json": {"pad_token": AS_DICT, "eos_token": "</s>"}},
    "Gemma's class": {"tokenizer_config.json": {"tokenizer_class": "GemmaTokenizerFast", "pad_token": "</s>"}},
}


@pytest.mark.parametrize("stored", STORED)
def test_siglip_is_known_by_its_vocabulary(two_towers: Path, tmp_path: Path, stored: str) -> None:
    """Whatever class stored it: `</s>` pads, case and punctuation go, as it was trained."""
    texts = ["A cat, and a DOG!", "snow_boots", "", "word " * 70]
    expected = read_two_tower(Checkpoint(two_towers / "spiece"))[1]
    assert rule_of(two_towers / "first", tmp_path / "copy", STORED[stored]) == expected.rule
    assert (expected.rule.pad_id, expected.rule.delete_punctuation, expected.rule.lowercase) == (1, True, "text")
    ours = read_two_tower(Checkpoint(tmp_path / "copy"))[1]
    assert ours.ids(texts).tolist() == expected.ids(texts).tolist()


@pytest.mark.parametrize("name", ["SiglipTokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast", None])
def test_siglip2_is_known_by_its_vocabulary(two_towers: Path, tmp_path: Path, name: str | None) -> None:
    files = {} if name is None else {"tokenizer_config.json": {"tokenizer_class": name}}
    found = rule_of(two_towers / "second", tmp_path / "copy", files)
    assert found == read_two_tower(Checkpoint(two_towers / "second"))[0].texts
    assert (found.pad_id, found.end_id, found.delete_punctuation) == (0, 1, False)


def test_struck_text_in_gemmas_vocabulary_is_no_end(two_towers: Path, tmp_path: Path) -> None:
    """Gemma has a token `</s>`, of HTML."""
    folder = tmp_path / "copy"
    shutil.copytree(two_towers / "second", folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary["</s>"] = vocabulary.pop(last)
    raw["model"]["merges"] = [pair for pair in raw["model"]["merges"] if "".join(pair) != last]
    write(folder, {"tokenizer.json": raw, "tokenizer_config.json": {"eos_token": "<eos>"}})
    assert not read_two_tower(Checkpoint(folder))[0].texts.delete_punctuation


PADS: dict[str, tuple[dict[str, Any], str | None]] = {
    "tokenizer_config.json": ({"tokenizer_config.json": {"pad_token": "<unk>"}}, None),
    "the older file over it": (
        {"tokenizer_config.json": {"pad_token": "</s>"}, "special_tokens_map.json": {"pad_token": "<unk>"}}, None,
    ),
    "unless added tokens are described": (
        {
            "tokenizer_config.json": {"pad_token": "<pad>", "added_tokens_decoder": {}},
            "special_tokens_map.json": {"pad_token": "<unk>"},
        }, None,
    ),
    "tokenizer.json": ({}, "<unk>"),
    "all of them": ({"tokenizer_config.json": {"pad_token": "</s>"}}, "<unk>"),
}  # fmt: skip


@pytest.mark.parametrize("places", PADS)
def test_the_pad_token(two_towers: Path, tmp_path: Path, places: str) -> None:
    files, padding = PADS[places]
    found = rule_of(two_towers / "first", tmp_path / "copy", files, padding)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "copy"))
    assert found.pad_id == theirs.pad_token_id


def test_pads_that_nobody_states_differ(two_towers: Path, tmp_path: Path) -> None:
    """transformers' T5 class pads with `<pad>`, with which no SigLIP was trained."""
    found = rule_of(
        two_towers / "first", tmp_path / "copy", {"tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}}
    )
    assert found.pad_id == 1


def test_what_else_is_stated_of_texts(two_towers: Path, tmp_path: Path) -> None:
    stated = {"do_lower_case": False, "model_max_length": 16, "pad_token": "</s>"}
    found = rule_of(two_towers / "first", tmp_path / "copy", {"tokenizer_config.json": stated})
    assert (found.lowercase, found.length) == ("never", 16)
    assert read_two_tower(Checkpoint(tmp_path / "copy"))[1].prepared("A Cat!") == "A Cat"
    longer = rule_of(two_towers / "first", tmp_path / "longer", {"tokenizer_config.json": {"model_max_length": 10**30}})
    assert longer.length == 64


def test_a_tokenizer_of_no_known_kind(two_towers: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(two_towers / "second", folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["vocab_size"] = 1000
    build_tokenizer().save_pretrained(folder)
    write(folder, {"config.json": raw, "tokenizer_config.json": {}})
    with pytest.raises(ConfigError, match="nothing tells how texts end; state eos_token and pad_token"):
        read_two_tower(Checkpoint(folder))
    write(folder, {"tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}})
    found, vocabulary = read_two_tower(Checkpoint(folder))[0].texts, build_tokenizer().get_vocab()
    assert (found.end_id, found.pad_id) == (vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"])


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    (PLACES["both"], "preprocessor_config.json is not used and says image_mean [0.2, 0.2, 0.2] for [0.1, 0.1"),
    ({"generation_config.json": {"eos_token_id": 1}, CONFIG: {"eos_token_id": 2}}, "eos_token_id is read from gen"),
    ({CONFIG: {"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}}, "says rope_theta 1.0 for 2.0"),
    (
        {CONFIG: {"text_config": {"rope_scaling": {"type": "x"}, "rope_parameters": {"rope_theta": 2.0}}}},
        "config.json.text_config.rope_parameters is not used and says rope_theta 2.0 for 10000.0",
    ),
    (
        {CONFIG: {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}},
        "tie_word_embeddings is read from config.json.text_config.tie_word_embeddings",
    ),
    ({CONFIG: {"image_token_id": 1, "image_token_index": 2}}, "image_token_index is not used and says 2 for 1"),
    ({TOKENIZER_CONFIG: {"tokenizer_class": "A"}, CONFIG: {"tokenizer_class": "B"}}, "says 'B' for 'A'"),
    (
        {TOKENIZER_CONFIG: {"pad_token": "a"}, "special_tokens_map.json": {"pad_token": {"content": "b"}}},
        "pad_token is read from special_tokens_map.json.pad_token",
    ),
    (
        {CONFIG: {"vision_aspect_ratio": "a"}, "processor_config.json": {"vision_aspect_ratio": "b"}},
        "processor_config.json.vision_aspect_ratio is not used and says 'b' for 'a'",
    ),
    (
        {"chat_template.jinja": "a", TOKENIZER_CONFIG: {"chat_template": "b"}},
        "tokenizer_config.json.chat_template is not used and says default 'b' for 'a'",
    ),
]


class TestLog:
    """Who loses is named."""

    @pytest.mark.parametrize(("files", "sentence"), CONTRADICTIONS)
    def test_contradictions(self, tmp_path: Path, files: dict[str, Any], sentence: str) -> None:
        (found,) = contradictions(Checkpoint(write(tmp_path, files)))
        assert sentence in found
        assert "as transformers does" in found

    @pytest.mark.parametrize(
        "files",
        [
            {},
            {**PLACES["nested"], "preprocessor_config.json": {**FIRST, "processor_class": "x"}},
            {"generation_config.json": {"eos_token_id": [1, 2]}, "config.json": {"eos_token_id": 2}},
            {"generation_config.json": {"eos_token_id": 49279}, "config.json": {"text_config": {"eos_token_id": 2}}},
            {"config.json": {"rope_theta": 2.0, "rope_scaling": {"type": "default"}}},
            {"preprocessor_config.json": FIRST, "video_preprocessor_config.json": SECOND},
        ],
    )
    def test_what_does_not_contradict(self, tmp_path: Path, files: dict[str, Any]) -> None:
        assert contradictions(Checkpoint(write(tmp_path, files))) == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"processor_config.json": "{"}, r"processor_config\.json is not valid JSON"),
        ({"processor_config.json": "[]"}, r"processor_config\.json must hold a JSON object"),
        (
            {"processor_config.json": {"image_processor": "x"}},
            r"processor_config\.json\.image_processor must be an object",
        ),
        ({"preprocessor_config.json": "\ufeff{}"}, r"preprocessor_config\.json is not valid JSON"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, files: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        image_processor(Checkpoint(write(tmp_path, files)))
