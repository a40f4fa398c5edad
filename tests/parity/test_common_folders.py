"""Folders as trainers, converters and downloads leave them: read as they are meant, or refused by what lies there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_lm_checkpoint import CLASSES, Kind, write_causal_lm_checkpoint
from checkpoints import write_nvila_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from two_tower_checkpoint import write_two_tower_checkpoint

from siglane.errors import ConfigError, UserError, WeightError
from siglane.families.files import stated_sampling
from siglane.families.model import load_model
from siglane.families.processor import load_processor
from siglane.families.registry import vlm_family
from siglane.families.stated import PROCESSOR
from siglane.families.two_tower import load_two_tower
from siglane.llm import LLM
from siglane.server.launch import check_model_exists
from siglane.types import SamplingParams
from siglane.verify import verify
from siglane.weights.hub import Checkpoint, open_checkpoint

TEXT_ONLY: tuple[Kind, ...] = ("qwen2", "qwen3", "llama")


def change(file: Path, **keys: Any) -> None:
    """Keys of a JSON file added, or (None) taken out."""
    raw = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def load(folder: Path) -> Any:
    checkpoint = open_checkpoint(folder)
    return load_model(checkpoint, load_processor(checkpoint).config, device="cpu", dtype=torch.float32)


class TestWhichModelItIs:
    """transformers' `AutoModelForCausalLM` asks `model_type` alone."""

    @pytest.mark.few("None-qwen3", "architectures1-llama", "FSDP-qwen2")
    @pytest.mark.parametrize("kind", TEXT_ONLY)
    @pytest.mark.parametrize("architectures", [None, [], "FSDP"])
    def test_a_config_without_its_class(
        self, tmp_path: Path, kind: Kind, architectures: list[str] | str | None
    ) -> None:
        write_causal_lm_checkpoint(tmp_path, kind)
        expected = load_processor(open_checkpoint(tmp_path)).config.language
        stated = [f"FSDP{CLASSES[kind][1].__name__}"] if architectures == "FSDP" else architectures
        change(tmp_path / "config.json", architectures=stated)
        assert load(tmp_path).config.language == expected
        assert verify(tmp_path, steps=2).ok

    @pytest.mark.parametrize(
        "name", ["Qwen2Model", "Qwen2ForSequenceClassification", "FSDPQwen2ForTokenClassification"]
    )
    def test_a_class_of_another_use_is_none(self, tmp_path: Path, name: str) -> None:
        write_causal_lm_checkpoint(tmp_path)
        change(tmp_path / "config.json", architectures=[name])
        with pytest.raises(ConfigError, match=rf"has architectures \['{name}'\]"):
            load(tmp_path)

    def test_sharded_classes_of_other_families(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path / "nvila", layout="hf")
        write_ovis2_5_checkpoint(tmp_path / "ovis")
        for folder, name in (("nvila", "nvila"), ("ovis", "ovis2_5")):
            config = tmp_path / folder / "config.json"
            stated = json.loads(config.read_text())["architectures"]
            change(config, architectures=[f"FSDP{one}" for one in stated], model_type="another")
            assert vlm_family(Checkpoint(tmp_path / folder)).name == name
            assert verify(tmp_path / folder, random=1, steps=1).ok


class TestFoldersWithoutAModel:
    @pytest.mark.parametrize("place", ["checkpoint-500", "snapshots/0123abc"])
    def test_models_that_lie_deeper_are_named(self, tmp_path: Path, place: str) -> None:
        write_causal_lm_checkpoint(tmp_path / place)
        with pytest.raises(
            ConfigError, match=rf"has no config.json; models lie deeper in it: give .*/{place}; siglane"
        ):
            load(tmp_path)
        with pytest.raises(UserError, match=rf"give .*/{place}$"):
            check_model_exists(str(tmp_path), "model")

    @pytest.mark.parametrize(
        ("file", "layout"),
        [
            ("open_clip_config.json", "OpenCLIP's layout"),
            ("model-Q8_0.gguf", "llama.cpp's format"),
            ("siglip2_b16_256.npz", "big_vision's layout"),
            ("model.onnx", "ONNX"),
            ("params.json", "the layout of Meta's and Mistral's own code"),
            ("last.ckpt", "a trainer's own state"),
        ],
    )
    def test_another_codes_layout_is_named(self, tmp_path: Path, file: str, layout: str) -> None:
        (tmp_path / file).write_text("{}")
        with pytest.raises(ConfigError, match=f"has no config.json; {file} is {layout}, which siglane does not read"):
            load(tmp_path)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 17\n"


class TestFilesThatAreNotHere:
    """What they say is not to be guessed."""

    @pytest.mark.parametrize("name", ["preprocessor_config.json", "generation_config.json", "tokenizer_config.json"])
    def test_a_link_to_nothing(self, tmp_path: Path, name: str) -> None:
        """The hub's cache, copied without its blobs."""
        write_idefics3_checkpoint(tmp_path)
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to("../../blobs/0123")
        with pytest.raises(
            ConfigError, match=rf"{name} is a link to \.\./\.\./blobs/0123, which is not there; download"
        ):
            load(tmp_path)
        assert open_checkpoint(tmp_path).digest()

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
    def test_a_pointer(self, tmp_path: Path, name: str) -> None:
        """A clone without Git LFS."""
        write_causal_lm_checkpoint(tmp_path)
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(ConfigError, match=rf"{name} is a Git LFS pointer, not the file; run `git lfs pull`"):
            load(tmp_path)

    @pytest.mark.parametrize(("tokenizer", "name"), [("spiece", "spiece.model"), ("json", "tokenizer.json")])
    def test_a_pointer_of_two_towers(self, tmp_path: Path, tokenizer: Any, name: str) -> None:
        write_two_tower_checkpoint(tmp_path, tokenizer=tokenizer)
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(ConfigError, match=rf"{name} is a Git LFS pointer, not the file"):
            load_two_tower(Checkpoint(tmp_path), device="cpu")


ODD: tuple[Any, ...] = (None, "x", 1.5, -1, 10**30, True, [[1]], {"a": 1})


@pytest.mark.few("write_causal_lm_checkpoint-config.json", "write_idefics3_checkpoint-processor_config.json")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", PROCESSOR])
@pytest.mark.parametrize("write", [write_causal_lm_checkpoint, write_idefics3_checkpoint, write_ovis2_5_checkpoint])
def test_a_value_of_another_type_is_taken_or_refused(
    tmp_path: Path, write: Callable[[Path], object], name: str
) -> None:
    """Of every key: what is refused is refused in a sentence of one line."""
    write(tmp_path)
    file = tmp_path / name
    if not file.exists():
        pytest.skip("this family has no such file")
    stated = json.loads(file.read_text())
    for place in _places(stated):
        for odd in ODD:
            file.write_text(json.dumps(_with(stated, place, odd)))
            assert "\n" not in _refusal(tmp_path), place


def _refusal(folder: Path) -> str:
    """What a load is refused with, empty where it is not."""
    try:
        load(folder)
    except UserError as error:
        return str(error)
    return ""


def _places(stated: Any) -> list[tuple[Any, ...]]:
    inner = stated.items() if isinstance(stated, dict) else enumerate(stated) if isinstance(stated, list) else ()
    return [(key, *rest) for key, value in inner for rest in ((), *_places(value))]


def _with(stated: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    changed = dict(stated) if isinstance(stated, dict) else list(stated)
    changed[place[0]] = _with(changed[place[0]], place[1:], value)
    return changed


class TestWeights:
    def test_a_shard_that_is_missing_without_an_index(self, tmp_path: Path) -> None:
        write_causal_lm_checkpoint(tmp_path)
        shutil.move(tmp_path / "model.safetensors", tmp_path / "model-00002-of-00003.safetensors")
        message = r"holds model-00002-of-00003\.safetensors, but not model-00001-of-00003\.safetensors; download"
        with pytest.raises(WeightError, match=message):
            load(tmp_path)

    @pytest.mark.parametrize("leftover", ["base_layer", "lora_A.default", "modules_to_save.default"])
    @pytest.mark.parametrize(
        ("write", "name"),
        [
            (write_causal_lm_checkpoint, "model.layers.1.self_attn.q_proj"),
            (write_idefics3_checkpoint, "model.text_model.layers.1.self_attn.q_proj"),
            (write_idefics3_checkpoint, "model.connector.modality_projection.proj"),
        ],
    )
    def test_an_adapter_inside_the_model(
        self, tmp_path: Path, write: Callable[[Path], object], name: str, leftover: str
    ) -> None:
        write(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        state[f"{name}.{leftover}.weight"] = state[f"{name}.weight"].clone()
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(WeightError, match=rf"{leftover}\.weight' is an adapter's that was not merged"):
            load(tmp_path)

    @pytest.mark.parametrize(
        "leave",
        [
            lambda folder: [(folder / name).write_bytes(b"x") for name in ("training_args.bin", "optimizer.pt")],
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone"}}'),
            lambda folder: shutil.move(folder / "model.safetensors", folder / "model.fp16.safetensors"),
            lambda folder: shutil.move(folder / "model.safetensors", folder / "consolidated.safetensors"),
            lambda folder: shutil.copy(folder / "model.safetensors", folder / "model.bf16.safetensors"),
        ],
        ids=["a trainer's state", "the index of older shards", "a variant", "one file of another name", "both"],
    )
    @pytest.mark.parametrize("write", [write_causal_lm_checkpoint, write_idefics3_checkpoint])
    def test_what_lies_beside_does_no_harm(
        self, tmp_path: Path, write: Callable[[Path], object], leave: Callable[[Path], object]
    ) -> None:
        write(tmp_path)
        expected = load(tmp_path).state_dict()
        leave(tmp_path)
        found = load(tmp_path).state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_pictures_of_vila_when_their_file_lies_at_the_top(tmp_path: Path) -> None:
    """Beside the tower is where VILA reads it; that place wins."""
    write_nvila_checkpoint(tmp_path)
    beside, top = tmp_path / "vision_tower/preprocessor_config.json", tmp_path / "preprocessor_config.json"
    family, checkpoint = vlm_family(Checkpoint(tmp_path)), Checkpoint(tmp_path)
    expected = family.images(checkpoint)
    shutil.copy(beside, top)
    change(top, image_mean=[0.1, 0.2, 0.3], resample=0)
    assert family.images(checkpoint) == expected
    beside.unlink()
    found = family.images(checkpoint).preprocess
    assert found.mean == (0.1, 0.2, 0.3)
    assert found.rule != expected.preprocess.rule
    assert verify(tmp_path, random=1, steps=1).ok


def test_a_model_of_another_kind_is_not_called_a_tower_alone(tmp_path: Path) -> None:
    write_two_tower_checkpoint(tmp_path)
    change(tmp_path / "config.json", model_type="clip", architectures=["CLIPModel"])
    with pytest.raises(ConfigError, match=r"has architectures \['CLIPModel'\] and model_type 'clip'; siglane knows"):
        load_two_tower(Checkpoint(tmp_path), device="cpu")


@pytest.mark.parametrize("special", [False, True])
def test_tokens_that_the_embeddings_do_not_reach(tmp_path: Path, special: bool) -> None:
    """A tokenizer that was given tokens after the model was saved; without them everything works."""
    tokenizer = write_causal_lm_checkpoint(tmp_path).tokenizer
    size = len(tokenizer)
    write_causal_lm_checkpoint(tmp_path, vocab_size=size)
    tokenizer.add_tokens([AddedToken("<loc>", special=special)])
    tokenizer.save_pretrained(tmp_path)
    asked = "where? <loc>", SamplingParams(max_tokens=1)
    assert LLM(tmp_path, device="cpu", kv_tokens=512).generate(*asked)  # a user's words are never an added token
    template = tmp_path / "chat_template.jinja"
    template.write_text("<loc>" + template.read_text())
    message = rf"token {size} \('<loc>'\), and the model has embeddings for {size}"
    with pytest.raises(UserError, match=message) as caught:
        LLM(tmp_path, device="cpu", kv_tokens=512).generate(*asked)
    assert caught.value.code == "token_without_embedding"


class TestFactsThatAreNotApplied:
    """They are named: nothing is left out in silence."""

    def test_layers_behind_the_towers(self, tmp_path: Path) -> None:
        """sentence-transformers' `modules.json`, which its `SentenceTransformer` runs in order."""
        write_two_tower_checkpoint(tmp_path)
        types = ["Transformer", "Normalize"]
        for extra in ([], ["Dense"], ["Pooling"]):
            modules = [{"type": f"sentence_transformers.models.{name}"} for name in [*types, *extra]]
            (tmp_path / "modules.json").write_text(json.dumps(modules))
            if not extra:
                load_two_tower(Checkpoint(tmp_path), device="cpu")
                continue
            with pytest.raises(ConfigError, match=rf"modules\.json puts \S*{extra[0]} behind the towers"):
                load_two_tower(Checkpoint(tmp_path), device="cpu")
        (tmp_path / "modules.json").write_text("{}x")
        with pytest.raises(ConfigError, match="is not sentence-transformers' list of modules"):
            load_two_tower(Checkpoint(tmp_path), device="cpu")

    @pytest.mark.parametrize(
        ("stated", "named"),
        [
            (
                {"no_repeat_ngram_size": 2, "suppress_tokens": [5], "top_p": 0.9},
                "no_repeat_ngram_size, suppress_tokens",
            ),
            ({"min_new_tokens": 3}, "min_new_tokens"),
            ({"num_beams": 4, "typical_p": 0.5}, "num_beams, typical_p"),
            ({"forced_eos_token_id": 5, "guidance_scale": 2.0}, "forced_eos_token_id, guidance_scale"),
            (
                {"min_length": 3, "exponential_decay_length_penalty": [9, 1.1]},
                "exponential_decay_length_penalty, min_length",
            ),
            ({"min_length": 0, "guidance_scale": 1.0, "top_h": None}, None),
            ({"no_repeat_ngram_size": 0, "suppress_tokens": [], "num_beams": 1, "typical_p": 1.0}, None),
            ({"bad_words_ids": None, "top_k": 5, "pad_token_id": 1}, None),
        ],
    )
    def test_generation_facts(
        self, tmp_path: Path, stated: dict[str, Any], named: str | None, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
        stated_sampling(Checkpoint(tmp_path))
        warned = [one for one in caplog.messages if "would change transformers' answers" in one]
        assert len(warned) == (named is not None)
        assert all(f": {named} would" in one for one in warned)
