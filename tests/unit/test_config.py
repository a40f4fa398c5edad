"""Model facts are read strictly: the right type, the documented default, or one line that names key and value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2Config, Qwen3Config, SiglipVisionConfig

from siglane.config.language import LanguageConfig
from siglane.config.preprocess import LLAVA_ONEVISION, ImageProcessorConfig, PreprocessConfig
from siglane.config.reader import LARGEST_SIZE, ConfigReader, read_json
from siglane.config.vision import VisionConfig, resolve_layer
from siglane.errors import ConfigError
from siglane.tiling.squash import Squash
from siglane.tiling.vila import VilaTiling
from siglane.types import Grid, Size

QWEN2 = {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}


def refusal(build: Callable[[], object]) -> str:
    """The message with which `build` is refused: always one line."""
    with pytest.raises(ConfigError) as caught:
        build()
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def vision(**raw: Any) -> VisionConfig:
    return VisionConfig.from_hf(raw, feature_layer=-1, post_norm=True)


def preprocess(**raw: Any) -> PreprocessConfig:
    processor = ImageProcessorConfig.from_hf(raw)
    return PreprocessConfig.of(Squash(tile=processor.size, resample=processor.resample), processor)


tiled = partial(VilaTiling, tile=Size(448, 448), resample="bicubic", min_tiles=1, s2_scales=(), fill=(0, 0, 0))


class TestReader:
    @pytest.mark.parametrize(
        ("kind", "value", "complaint"),
        [
            (int, "3", "must be int, got '3'"),
            (int, 3.0, "must be int, got 3.0"),
            (int, True, "must be int, got True"),
            (int, [3], "must be int, got [3]"),
            (float, "0.5", "must be float, got '0.5'"),
            (float, True, "must be float, got True"),
            (float, math.nan, "must be finite, got nan"),
            (float, math.inf, "must be finite, got inf"),
            (float, 10**400, "must be finite, got inf"),
            (bool, 1, "must be bool, got 1"),
            (bool, "true", "must be bool, got 'true'"),
            (str, 3, "must be str, got 3"),
            (str, "two\nlines", None),
            (float, 3, None),
            (bool, False, None),
        ],
    )
    def test_a_value_has_its_type(self, kind: type[Any], value: object, complaint: str | None) -> None:
        reader = ConfigReader({"key": value}, "config.json")
        if complaint is None:
            found = reader.value("key", kind)
            assert found == value
            assert type(found) is kind
        else:
            assert refusal(lambda: reader.value("key", kind)) == f"config.json: key {complaint}"

    @pytest.mark.parametrize("raw", [{}, {"key": None}])
    def test_an_absent_key_takes_its_default_or_is_missing(self, raw: dict[str, object]) -> None:
        reader = ConfigReader(raw, "config.json")
        assert reader.value("key", int, 7) == 7
        assert reader.value("key", bool, False) is False
        assert reader.size("key", 7) == 7
        assert not reader.has("key")
        assert refusal(lambda: reader.value("key", int)) == "config.json: key 'key' is missing"
        assert refusal(lambda: reader.size("key")) == "config.json: key 'key' is missing"
        assert refusal(lambda: reader.section("key")) == "config.json: section 'key' is missing"

    @pytest.mark.parametrize("value", [0, -1, LARGEST_SIZE + 1, 10**400])
    def test_a_size_is_positive_and_not_absurd(self, value: int) -> None:
        message = refusal(lambda: ConfigReader({"hidden_size": value}, "config.json").size("hidden_size"))
        assert message == f"config.json: hidden_size must be between 1 and {LARGEST_SIZE}, got {value}"

    def test_a_choice_is_known(self) -> None:
        reader = ConfigReader({"act": "relu\n"}, "config.json")
        message = refusal(lambda: reader.choice("act", {"silu": 1, "gelu": 2}))
        assert message == r"config.json: act 'relu\n' is not known; siglane knows gelu, silu"
        assert ConfigReader({}, "config.json").choice("act", {"silu": 1}, "silu") == 1

    def test_a_section_is_an_object_and_adds_to_the_name(self) -> None:
        reader = ConfigReader({"text_config": {"a": "x"}, "vision_config": [1]}, "config.json")
        assert refusal(lambda: reader.section("text_config").size("a")).startswith("config.json.text_config: a must be")
        assert (
            refusal(lambda: reader.section("vision_config")) == "config.json.vision_config must be an object, got list"
        )

    def test_an_absent_section_reads_as_its_default(self) -> None:
        reader = ConfigReader({"size": {"a": 1}, "rope": None}, "config.json")
        assert reader.section("size", {"a": 2}).size("a") == 1
        for key in ("rope", "video"):
            assert reader.section(key, {"a": 2}).size("a") == 2
            assert refusal(lambda key=key: reader.section(key, {}).size("a")) == "config.json: key 'a' is missing"

    def test_only_what_is_known(self) -> None:
        reader = ConfigReader({"kind": "other", "patches": 2, "same": "one"}, "config.json")
        reader.only("same", "one")
        reader.only("absent", "one")
        assert (
            refusal(lambda: reader.only("kind", "one")) == "config.json: kind 'other' is not known; siglane knows one"
        )
        assert refusal(lambda: reader.only("patches", 1)) == "config.json: patches 2 is not known; siglane knows 1"
        assert refusal(lambda: reader.only("patches", "1")) == "config.json: patches must be str, got 2"

    def test_what_two_files_say_agrees(self) -> None:
        reader = ConfigReader({"patch_size": 14}, "config.json")
        reader.agree("patch_size", 14, "the tower's")
        reader.agree("width", 7, "the tower's")
        assert refusal(lambda: reader.agree("patch_size", 16, "the tower's", 14)) == (
            "config.json: patch_size 14 is not the tower's 16"
        )
        assert refusal(lambda: reader.agree("width", 16, "the tower's", 14)) == (
            "config.json: width 14 is not the tower's 16"
        )

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b"{", "is not valid JSON"),
            (b"\xff\xfe{}", "is not valid JSON"),
            (b"[" * 100_000, "is not valid JSON"),
            (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
            (b"[]", "must hold a JSON object, got list"),
            (b"null", "must hold a JSON object, got NoneType"),
        ],
    )
    def test_a_broken_file_is_refused(self, tmp_path: Path, content: bytes, complaint: str) -> None:
        path = tmp_path / "config.json"
        path.write_bytes(content)
        message = refusal(lambda: read_json(path))
        assert str(path) in message
        assert complaint in message

    def test_a_file_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        assert "cannot read" in refusal(lambda: read_json(tmp_path / "config.json"))
        assert "cannot read" in refusal(lambda: read_json(tmp_path))


class TestVision:
    def test_absent_keys_take_the_defaults_of_the_reference(self) -> None:
        reference, config = SiglipVisionConfig(), vision()
        same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels")
        for key in (*same, "patch_size", "layer_norm_eps"):
            assert getattr(config, key) == getattr(reference, key), key
        assert reference.hidden_act == "gelu_pytorch_tanh"
        assert config.hidden_act == "gelu_tanh"
        assert config.position_grid == Grid(14, 14)
        assert config.use_head  # absent: it has one

    def test_a_config_written_by_the_reference_is_read(self) -> None:
        raw = SiglipVisionConfig(hidden_size=1152, num_attention_heads=16, image_size=384, patch_size=14).to_dict()
        config = VisionConfig.from_hf({**raw, "vision_use_head": False}, feature_layer=-2, post_norm=False)
        assert config.position_grid == Grid(27, 27)  # 384 / 14 is cut off, not rounded
        assert (config.head_dim, config.patch_dim) == (72, 588)
        assert (config.depth, config.post_norm, config.use_head) == (11, False, False)

    @pytest.mark.parametrize(("layer", "depth"), [(-1, 12), (-2, 11), (-12, 1), (12, 12), (1, 1)])
    def test_a_feature_layer_is_an_index_into_hidden_states(self, layer: int, depth: int) -> None:
        assert resolve_layer(layer, 12, "vision_config") == depth

    @pytest.mark.parametrize("layer", [-14, -13, 0, 13])
    def test_a_feature_layer_that_is_not_there_is_refused(self, layer: int) -> None:
        assert f"feature layer {layer} " in refusal(lambda: resolve_layer(layer, 12, "vision_config"))

    @pytest.mark.parametrize(
        ("raw", "complaint"),
        [
            ({"hidden_act": "relu"}, "vision_config: hidden_act 'relu' is not known"),
            ({"hidden_size": 100, "num_attention_heads": 16}, "hidden_size 100 is not divisible by 16 heads"),
            ({"patch_size": 300}, "vision_config: image_size is smaller than patch_size 300"),
            ({"patch_size": [16, 16]}, "vision_config: patch_size must be int, got [16, 16]"),
            ({"num_hidden_layers": 0}, "vision_config: num_hidden_layers must be between"),
            ({"layer_norm_eps": math.nan}, "vision_config: layer_norm_eps must be finite, got nan"),
            ({"vision_use_head": "no"}, "vision_config: vision_use_head must be bool, got 'no'"),
        ],
    )
    def test_what_cannot_be_is_refused(self, raw: dict[str, Any], complaint: str) -> None:
        assert complaint in refusal(lambda: vision(**raw))

    def test_facts_cannot_be_changed_afterwards(self) -> None:
        with pytest.raises(FrozenInstanceError):
            vision().hidden_act = "silu"  # type: ignore[misc]


class TestLanguage:
    @pytest.mark.parametrize("reference", [Qwen2Config(), Qwen3Config()], ids=["qwen2", "qwen3"])
    def test_absent_keys_take_the_defaults_of_the_reference(self, reference: Qwen2Config | Qwen3Config) -> None:
        config = LanguageConfig.from_hf({"model_type": reference.model_type})
        same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for key in (*same, "vocab_size", "max_position_embeddings", "rms_norm_eps"):
            assert getattr(config, key) == getattr(reference, key), key
        assert config.tie_embeddings == reference.tie_word_embeddings
        assert config.rope_theta == 10000.0
        assert config.head_dim == 128

    def test_the_two_generations_differ_in_biases_and_norms(self) -> None:
        qwen2 = LanguageConfig.from_hf(QWEN2)
        qwen3 = LanguageConfig.from_hf({**QWEN2, "model_type": "qwen3"})
        assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, False, 16)
        assert (qwen3.qkv_bias, qwen3.output_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 128)
        biased = LanguageConfig.from_hf({**QWEN2, "model_type": "qwen3", "attention_bias": True, "head_dim": 32})
        assert (biased.qkv_bias, biased.output_bias, biased.head_dim) == (True, True, 32)

    def test_null_key_value_heads_are_as_many_as_query_heads(self) -> None:
        assert LanguageConfig.from_hf({**QWEN2, "num_key_value_heads": None}).num_key_value_heads == 4

    @pytest.mark.parametrize(
        ("raw", "theta"),
        [
            ({}, 10000.0),
            ({"rope_theta": 1000000}, 1e6),
            ({"rope_theta": 1e6, "rope_scaling": None}, 1e6),
            ({"rope_theta": 1e6, "rope_scaling": {"type": "default"}}, 1e6),
            ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
            ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e6}, 5e5),
            ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"rope_theta": 2e5}}, 2e5),
            ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {}}, 5e5),
            ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6}, 1e6),
        ],
    )
    def test_the_rotary_base_is_read_where_each_generation_writes_it(self, raw: dict[str, Any], theta: float) -> None:
        assert LanguageConfig.from_hf({**QWEN2, **raw}).rope_theta == theta

    @pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
    @pytest.mark.parametrize("window", [{}, {"sliding_window": 64}])
    def test_a_sliding_window_is_refused(self, model_type: str, window: dict[str, Any]) -> None:
        raw = {**QWEN2, "model_type": model_type, "use_sliding_window": True, **window}
        assert "use_sliding_window true is not supported" in refusal(lambda: LanguageConfig.from_hf(raw))

    def test_a_window_that_is_not_used_is_none(self) -> None:
        LanguageConfig.from_hf({**QWEN2, "use_sliding_window": False, "sliding_window": 64})
        LanguageConfig.from_hf({**QWEN2, "use_sliding_window": True, "sliding_window": None})

    @pytest.mark.parametrize(
        ("raw", "complaint"),
        [
            ({"model_type": "llama"}, "text_config: model_type 'llama' is not known; siglane knows qwen2, qwen3"),
            ({"model_type": None}, "text_config: key 'model_type' is missing"),
            ({"hidden_act": "gelu"}, "text_config: hidden_act 'gelu' is not known"),
            ({"hidden_size": 66}, "text_config: hidden_size 66 does not divide by 4 heads"),
            ({"num_key_value_heads": 3}, "4 query heads do not divide by 3 key/value heads"),
            ({"head_dim": 15}, "head_dim 15 must be even"),
            ({"rope_theta": 0}, "rope_theta 0.0 must be positive"),
            ({"rope_theta": 10**400}, "text_config: rope_theta must be finite"),
            ({"rope_scaling": {"type": "linear", "factor": 2}}, "text_config.rope_scaling: rope_type 'linear' is not"),
            ({"rope_parameters": {"rope_type": "yarn"}}, "text_config.rope_parameters: rope_type 'yarn' is not"),
            (
                {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
                "positions by kind of layer (full_attention)",
            ),
            ({"rope_parameters": [5e5]}, "text_config.rope_parameters must be an object"),
            ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported"),
            ({"vocab_size": True}, "text_config: vocab_size must be int, got True"),
            ({"tie_word_embeddings": 1}, "text_config: tie_word_embeddings must be bool, got 1"),
        ],
    )
    def test_what_cannot_be_is_refused(self, raw: dict[str, Any], complaint: str) -> None:
        assert complaint in refusal(lambda: LanguageConfig.from_hf({**QWEN2, **raw}))


class TestPreprocess:
    def test_absent_keys_take_the_defaults_of_the_reference(self) -> None:
        config = preprocess()
        assert config.rule == Squash(tile=Size(224, 224), resample="bicubic")
        assert config.rescale == 1 / 255
        assert config.mean == config.std == (0.5, 0.5, 0.5)

    def test_a_written_config_is_read(self) -> None:
        config = preprocess(
            size={"height": 384, "width": 448}, resample=2, image_mean=[0, 0.25, 1], image_std=[1, 0.5, 2]
        )
        assert config.rule == Squash(tile=Size(width=448, height=384), resample="bilinear")
        assert config.mean == (0.0, 0.25, 1.0)
        assert config.std == (1.0, 0.5, 2.0)
        assert ImageProcessorConfig.from_hf({"size": 384}).size == Size(384, 384)
        assert ImageProcessorConfig.from_hf({"size": None}).size == Size(224, 224)
        assert ImageProcessorConfig.from_hf({"size": [384, 448]}).size == Size(width=448, height=384)
        assert ImageProcessorConfig.from_hf({"size": {"shortest_edge": 384}}, LLAVA_ONEVISION).size == Size(384, 384)

    def test_a_crop_that_cuts_nothing(self) -> None:
        raw = {"size": {"height": 384, "width": 384}, "do_center_crop": True, "crop_size": 384}
        assert ImageProcessorConfig.from_hf(raw).size == Size(384, 384)

    @pytest.mark.parametrize("name", ["SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil"])
    def test_variants_of_a_class_have_its_defaults(self, name: str) -> None:
        assert ImageProcessorConfig.from_hf({"image_processor_type": name}) == ImageProcessorConfig.from_hf({})

    def test_another_class_may_state_everything(self) -> None:
        raw = {
            "image_processor_type": "CLIPImageProcessor", "size": {"height": 32, "width": 32}, "resample": 2,
            "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "do_center_crop": False,
        }  # fmt: skip
        found = ImageProcessorConfig.from_hf(raw)
        assert (found.size, found.resample, found.mean) == (Size(32, 32), "bilinear", (0.1, 0.1, 0.1))

    @pytest.mark.parametrize(
        ("raw", "complaint"),
        [
            ({"size": 0}, "size must be between 1 and"),
            ({"size": -3}, "size must be between 1 and"),
            ({"size": True}, "size must be int, got True"),
            ({"size": "384"}, "size must be int, got '384'"),
            ({"size": {"shortest_edge": 384}}, "preprocessor_config.json.size: shortest_edge keeps a picture's aspect"),
            ({"size": {"height": 384}}, "preprocessor_config.json.size: key 'width' is missing"),
            ({"size": [384]}, "size must be int, got [384]"),
            ({"do_center_crop": True, "crop_size": 200}, "do_center_crop true is not supported"),
            ({"image_processor_type": "CLIPImageProcessor"}, "does not state resample, image_mean, image_std, do_cent"),
            ({"size": {"width": 10**9, "height": 1}}, "width must be between 1 and"),
            ({"resample": 6}, "resample 6 is not one of Pillow's filters"),
            ({"resample": -1}, "resample -1 is not one of Pillow's filters"),
            ({"image_mean": 0.5}, "image_mean must be three numbers, got 0.5"),
            ({"image_mean": [0.5, 0.5]}, "image_mean must be three numbers, got [0.5, 0.5]"),
            ({"image_mean": [0.5, math.nan, 0.5]}, "image_mean must be finite, got nan"),
            ({"image_mean": [0.5, True, 0.5]}, "image_mean must be float, got True"),
            ({"image_std": [0.5, 0, 0.5]}, "image_std (0.5, 0.0, 0.5)"),
            ({"rescale_factor": 0}, "rescale_factor 0.0 must be positive"),
            ({"do_resize": False}, "do_resize false is not supported"),
            ({"do_rescale": False}, "do_rescale false is not supported"),
            ({"do_normalize": False}, "do_normalize false is not supported"),
        ],
    )
    def test_what_cannot_be_is_refused(self, raw: dict[str, Any], complaint: str) -> None:
        assert complaint in refusal(lambda: preprocess(**raw))

    @pytest.mark.parametrize(("least", "most"), [(0, 12), (13, 12), (1, 0)])
    def test_dynamic_tiling_needs_a_grid(self, least: int, most: int) -> None:
        message = refusal(lambda: tiled(tiling="dynamic", min_tiles=least, max_tiles=most))
        assert message == f"min_tiles {least} and max_tiles {most} leave no grid of tiles"

    @pytest.mark.parametrize("scales", [(), (448, 448), (896, 448), (448, 1000), (0, 448), (-448, 896)])
    def test_s2_scales_ascend_in_multiples(self, scales: tuple[int, ...]) -> None:
        build = partial(tiled, tiling="dynamic_s2", max_tiles=12, s2_scales=scales)
        assert refusal(build) == f"s2_scales {scales} must be ascending multiples of the first"

    def test_the_largest_square_of_s2_fits_the_tiles(self) -> None:
        build = partial(tiled, tiling="dynamic_s2", max_tiles=8, s2_scales=(448, 1344))
        assert "max_tiles 8 is too small" in refusal(build)
