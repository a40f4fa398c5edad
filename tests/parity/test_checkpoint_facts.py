"""Which facts are read from which file, what is refused, and how a checkpoint is found."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from causal_lm_checkpoint import write_causal_lm_checkpoint
from checkpoints import Layout, build_tokenizer, write_nvila_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint

from siglane.config.images import ImageFacts
from siglane.errors import ConfigError, UserError
from siglane.families import nvila
from siglane.families.processor import load_processor, load_tokenizer
from siglane.families.registry import vlm_family
from siglane.tiling.rule import ImageContext, PatchGeometry
from siglane.types import ImagePlaceholder, Size
from siglane.weights.hub import Checkpoint, open_checkpoint


def facts(folder: Path, **options: Any) -> ImageFacts:
    write_nvila_checkpoint(folder, **options)
    return load_processor(open_checkpoint(folder)).facts


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        facts(folder, **options)


class TestNvilaFacts:
    @pytest.mark.parametrize("layout", ["folders", "hf", "vila"])
    def test_lite(self, tmp_path: Path, layout: Layout) -> None:
        images = facts(tmp_path, layout=layout)
        assert (images.preprocess.rule.tiling, images.projector.factor, images.vision.depth) == ("dynamic", 3, 2)
        assert (images.vision.post_norm, images.vision.use_head) == (False, False)
        assert images.projector.input_size == 32

    @pytest.mark.parametrize("layout", ["folders", "hf"])
    def test_s2(self, tmp_path: Path, layout: Layout) -> None:
        images = facts(tmp_path, layout=layout, lite=False)
        assert (images.preprocess.rule.tiling, images.preprocess.rule.s2_scales) == ("dynamic_s2", (56, 112, 168))
        assert (images.projector.factor, images.projector.input_size) == (2, 96)

    def test_scales_may_be_a_list(self, tmp_path: Path) -> None:
        images = facts(tmp_path, lite=False, flags={"s2_scales": [56, 112, 168]})
        assert images.preprocess.rule.s2_scales == (56, 112, 168)

    @pytest.mark.parametrize(("ratio", "tiling"), [("resize", "squash"), ("pad", "pad"), (None, "squash")])
    def test_one_tile_modes(self, tmp_path: Path, ratio: str | None, tiling: str) -> None:
        images = facts(tmp_path, flags={"image_aspect_ratio": ratio}, projector_type="mlp2x_gelu")
        assert (images.preprocess.rule.tiling, images.projector.merge) == (tiling, "none")

    def test_vila_resizes_with_pillows_default(self, tmp_path: Path) -> None:
        """With `resize` and the dynamic modes; otherwise the processor's filter counts."""
        for ratio, expected in (("dynamic", "bicubic"), ("resize", "bicubic"), ("pad", "bilinear"), (None, "bilinear")):
            write_nvila_checkpoint(tmp_path, flags={"image_aspect_ratio": ratio})
            file = tmp_path / "vision_tower/preprocessor_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "resample": 2}))
            assert load_processor(open_checkpoint(tmp_path)).facts.preprocess.rule.resample == expected

    def test_the_file_beside_the_projector_decides(self, tmp_path: Path) -> None:
        images = facts(tmp_path, flags={"mm_projector_cfg": {"mm_projector_type": "linear"}})
        assert images.projector.factor == 3

    def test_column_order_is_an_option(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path, flags={"image_aspect_ratio": "resize"}, projector_type="mlp_downsample")
        checkpoint = open_checkpoint(tmp_path)
        family, plain = nvila.Nvila(), load_processor(checkpoint).config
        assert not plain.images.projector.column_major
        config = replace(plain, images=family.images(checkpoint, column_major=True))
        assert config.images.projector.column_major
        assert load_processor(checkpoint, config).config is config

    def test_column_order_does_not_go_with_scales(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path, lite=False)
        checkpoint = open_checkpoint(tmp_path)
        with pytest.raises(ConfigError, match=r"column_major belongs to VILA1\.5"):
            nvila.Nvila().images(checkpoint, column_major=True)

    def test_eos_ids_of_the_files_and_the_end_of_turn(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path)
        (tmp_path / "llm/generation_config.json").write_text('{"eos_token_id": 320}')
        processor = load_processor(open_checkpoint(tmp_path))
        assert processor.eos_token_ids == (320, processor.tokenizer.convert_tokens_to_ids("<|im_end|>"))

    def test_an_end_that_only_the_language_models_configuration_states(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path / "folders")
        write_nvila_checkpoint(tmp_path / "hf", layout="hf")
        write_llava_onevision_checkpoint(tmp_path / "llava")
        write_ovis2_5_checkpoint(tmp_path / "ovis")
        write_causal_lm_checkpoint(tmp_path / "causal")
        places = {
            "folders/llm": None,
            "hf": "text_config",
            "llava": "text_config",
            "ovis": "llm_config",
            "causal": None,
        }
        for place, section in places.items():
            folder = tmp_path / place
            (folder / "generation_config.json").unlink(missing_ok=True)
            raw = json.loads((folder / "config.json").read_text())
            (raw if section is None else raw[section])["eos_token_id"] = [77, 78]
            (folder / "config.json").write_text(json.dumps(raw))
            processor = load_processor(open_checkpoint(tmp_path / place.partition("/")[0]))
            assert processor.eos_token_ids[:2] == (77, 78), place

    def test_transformers_5_nests_the_preprocessor(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path, layout="hf")
        plain = load_processor(open_checkpoint(tmp_path)).config
        raw = json.loads((tmp_path / "preprocessor_config.json").read_text())
        (tmp_path / "preprocessor_config.json").unlink()
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": raw}))
        assert load_processor(open_checkpoint(tmp_path)).config == plain

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres' is not known; siglane knows dynamic"),
            ({"mm_vision_select_feature": "patch"}, "drops the first patch"),
            ({"mm_vision_select_layer": -9}, "feature layer -9 does not exist"),
            ({"mm_hidden_size": 96}, "mm_hidden_size 96 is not the tower's 32"),
            ({"dynamic_s2": True}, "dynamic_s2 and image_aspect_ratio 'dynamic' contradict"),
            ({"s2": True}, "s2 .static scales. is not supported"),
            ({"max_tiles": 10**6}, "max_tiles 1000000 is not between 1 and 1024"),
            ({"min_tiles": 7, "max_tiles": 6}, "max_tiles 6 is not between 7"),
        ],
    )
    def test_flags_that_are_refused(self, tmp_path: Path, flags: dict[str, Any], message: str) -> None:
        refused(tmp_path, message, flags=flags)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"s2_scales": "56,100"}, "s2_scales must be multiples"),
            ({"s2_scales": "56,x"}, "s2_scales must be multiples"),
            ({"s2_scales": None}, "s2_scales must be multiples"),
            ({"s2_resize_output_to_scale_idx": 0}, "s2_resize_output_to_scale_idx 0 is not supported"),
            ({"max_tiles": 8}, "max_tiles 8 is not between 9"),
            ({"s2_scales": "70,140,210"}, "70x70 pixels hold 5x5 patches, the tower has positions for 4x4"),
        ],
    )
    def test_scales_that_are_refused(self, tmp_path: Path, flags: dict[str, Any], message: str) -> None:
        refused(tmp_path, message, lite=False, flags=flags)

    def test_other_language_models(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path)
        file = tmp_path / "llm/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "llama"}))
        with pytest.raises(ConfigError, match=r"llm/config.json: model_type 'llama' is not known; siglane knows qwen2"):
            load_processor(open_checkpoint(tmp_path))

    def test_other_towers(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path)
        file = tmp_path / "vision_tower/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "clip_vision_model"}))
        with pytest.raises(ConfigError, match=r"vision_tower/config.json: model_type 'clip_vision_model' is not known"):
            load_processor(open_checkpoint(tmp_path))

    def test_a_folder_that_was_not_copied(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path)
        (tmp_path / "mm_projector").rename(tmp_path / "elsewhere")
        with pytest.raises(ConfigError, match="has no folder 'mm_projector'; was the whole model copied"):
            load_processor(open_checkpoint(tmp_path))

    def test_a_broken_tokenizer(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path)
        (tmp_path / "llm/tokenizer.json").write_text("{}")
        with pytest.raises(ConfigError, match="llm: the tokenizer cannot be loaded"):
            load_processor(open_checkpoint(tmp_path))


class TestRealSizes:
    """formats.md 5.4: tiles and tokens of NVILA-Lite and NVILA-8B, whose tiles are 448 pixels and 32x32 patches."""

    vectors = (
        ((448, 448), (1, 1), 1, 121, (3, 3), 2304),
        ((640, 480), (4, 3), 13, 1573, (4, 3), 3072),
        ((1000, 1000), (3, 3), 10, 1210, (3, 3), 2304),
        ((1920, 1080), (4, 2), 9, 1089, (4, 3), 3072),
        ((3000, 300), (10, 1), 11, 1331, (10, 1), 2560),
    )

    @pytest.mark.parametrize(("size", "grid", "tiles", "rows", "s2_grid", "s2_rows"), vectors)
    def test_vectors(
        self,
        tmp_path: Path,
        size: tuple[int, int],
        grid: tuple[int, int],
        tiles: int,
        rows: int,
        s2_grid: tuple[int, int],
        s2_rows: int,
    ) -> None:
        lite, s2 = (facts(tmp_path / str(flag), lite=flag, image_size=448) for flag in (True, False))
        layout = lite.preprocess.rule.image(Size(*size), PatchGeometry(14, lite.projector), ImageContext())
        assert (layout.arrangement.w, layout.arrangement.h) == grid
        assert (len(layout.tiles), layout.image_tokens) == (tiles, rows)
        layout = s2.preprocess.rule.image(Size(*size), PatchGeometry(14, s2.projector), ImageContext())
        assert (layout.arrangement.w, layout.arrangement.h) == s2_grid
        assert (len(layout.tiles), layout.image_tokens) == (5 + s2_grid[0] * s2_grid[1], s2_rows)

    def test_several_images_are_one_tile_each(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path, image_size=448)
        processor = load_processor(open_checkpoint(tmp_path))
        for layout in processor.layouts([Size(1920, 1080), Size(640, 480)]):
            assert (len(layout.tiles), layout.image_tokens) == (1, 121)
            assert layout.pieces[0] == ImagePlaceholder(121)


class TestDetection:
    @pytest.mark.parametrize("layout", ["folders", "hf", "vila"])
    def test_layouts(self, tmp_path: Path, layout: Layout) -> None:
        write_nvila_checkpoint(tmp_path, layout=layout)
        assert nvila.layout_of(open_checkpoint(tmp_path)) == layout
        assert isinstance(vlm_family(open_checkpoint(tmp_path)), nvila.Nvila)

    def test_remote_code_folders(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path, flags={"model_type": "vila", "architectures": ["VILAForCausalLM"]})
        assert nvila.layout_of(open_checkpoint(tmp_path)) == "folders"

    def test_an_unknown_architecture_is_named_beside_the_known_ones(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"architectures": ["Foo"], "model_type": "bar"}')
        with pytest.raises(ConfigError, match=r"architectures \['Foo'\] and model_type 'bar'; siglane knows .*NVILA"):
            vlm_family(open_checkpoint(tmp_path))

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"has no config.json; give the folder of a model; siglane knows"):
            vlm_family(open_checkpoint(tmp_path))


class TestTokenizers:
    def test_vocabulary_and_merges_without_tokenizer_json(self, tmp_path: Path) -> None:
        tokenizer = build_tokenizer()
        tokenizer.backend_tokenizer.model.save(str(tmp_path))
        tokens = {str(number): {**_flags(token)} for number, token in tokenizer.added_tokens_decoder.items()}
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": tokens, "eos_token": "<|im_end|>"})
        )
        loaded = load_tokenizer(Checkpoint(tmp_path))
        text = "<|im_start|>user\nDescribe the <image>, it's\n\n12 cats<|im_end|>"
        assert loaded(text).input_ids == tokenizer(text).input_ids

    def test_a_processors_template_wins(self, tmp_path: Path) -> None:
        build_tokenizer().save_pretrained(str(tmp_path))
        (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
        assert load_tokenizer(Checkpoint(tmp_path)).chat_template == "{{ messages[0].content }}"


def _flags(token: Any) -> dict[str, Any]:
    return {"content": token.content, "special": token.special, "normalized": False, "lstrip": False, "rstrip": False}


class TestOpening:
    def test_a_folder(self, tmp_path: Path) -> None:
        assert open_checkpoint(tmp_path) == Checkpoint(tmp_path)
        assert open_checkpoint(str(tmp_path)) == Checkpoint(tmp_path)

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        self.fails(tmp_path / "config.json", "is a file; give the folder")

    @pytest.mark.parametrize("model", ["./nowhere", "/no/where", "a b", "owner/name/more", ""])
    def test_neither_folder_nor_id(self, model: str) -> None:
        self.fails(model, "folder")

    def test_a_repository_out_of_reach(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offline(tmp_path, monkeypatch)
        self.fails("owner/name", "not a folder, not in the local cache, and the hub cannot be reached")

    def test_a_repository_in_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offline(tmp_path, monkeypatch)
        commit = "0" * 40
        snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text('{"a": 1}')
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text(commit)
        assert open_checkpoint("owner/name").json("config.json") == {"a": 1}
        assert open_checkpoint("owner/name", commit) == Checkpoint(snapshot)

    def offline(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        download = partial(huggingface_hub.snapshot_download, cache_dir=cache, local_files_only=True)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    def fails(self, model: str | Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            open_checkpoint(model)
        assert caught.value.code == "model_not_found"
