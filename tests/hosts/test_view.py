"""Views: the folders through which SGLang loads checkpoints. What is taken and what is left to it; that transformers'
classes read a view as siglane reads the checkpoint; that a view is made once, whole, or not at all."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from idefics3_checkpoint import KINDS, write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint, write_relative
from llava_qwen_checkpoint import write_llava_qwen_checkpoint
from nanovlm_checkpoint import ERAS, write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint, write_ovis2_6_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from siglip2_checkpoint import write_siglip2_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
from video_llama_3_checkpoint import write_video_llama_3_checkpoint
from waiting import PATIENCE

from siglane.errors import ConfigError, UserError, WeightError
from siglane.families.family import CHATML
from siglane.families.model import model_tensors
from siglane.families.processor import load_processor
from siglane.families.registry import vlm_family
from siglane.hosts import view as views_module
from siglane.hosts.config import ARCHITECTURE, SiglaneConfig
from siglane.hosts.settings import SglangHostConfig
from siglane.hosts.sglang.view import view_of
from siglane.hosts.view import IN_USE, TOKENIZER_KEYS, is_view, placeholder_id, write_view
from siglane.lm.qwen import qwen_plan
from siglane.nn.plan import Destination
from siglane.settings.options import read_environment
from siglane.weights.hub import Checkpoint

VIEWS, OVERRIDE = "SIGLANE_SGLANG_VIEWS", "SIGLANE_SGLANG_OVERRIDE"


@dataclass(frozen=True)
class Case:
    """A checkpoint's writer, and transformers' language model in what it returns."""

    write: Callable[[Path], Any]
    language: Callable[[Any], Any] = lambda reference: reference.language


def whole_model(reference: Any) -> Any:
    return reference.model


HF = partial(write_nvila_checkpoint, layout="hf")
CASES = {
    "nvila folders": Case(partial(write_nvila_checkpoint, sharded=True)),
    "nvila folders, tied qwen3": Case(partial(write_nvila_checkpoint, qwen3=True, tied=True, media_in_tokenizer=False)),
    "nvila vila": Case(partial(write_nvila_checkpoint, layout="vila", sharded=True)),
    "nvila hf": Case(HF),
    "nvila hf with scales": Case(partial(HF, lite=False, tied=True)),
    "llava_onevision": Case(write_llava_onevision_checkpoint, whole_model),
    "llava_onevision, untied": Case(partial(write_llava_onevision_checkpoint, tied=False), whole_model),
    "llava_onevision in memory": Case(
        partial(write_llava_onevision_checkpoint, names="memory", head_stored=False), whole_model
    ),
    "r_4b": Case(partial(write_relative, name="r_4b"), whole_model),
    "varco": Case(partial(write_relative, name="varco, tied"), whole_model),
    "llava_qwen, tower beside it": Case(partial(write_llava_qwen_checkpoint, tower="beside"), whole_model),
    "ovis2_5": Case(write_ovis2_5_checkpoint),
    "ovis2_5, tied": Case(partial(write_ovis2_5_checkpoint, tied=True, head_stored=False)),
    "ovis2_6": Case(write_ovis2_6_checkpoint),
    **{f"nanovlm {era}": Case(partial(write_nanovlm_checkpoint, era=era)) for era in ERAS},
    "nanovlm, both names": Case(partial(write_nanovlm_checkpoint, names="both", own_tokenizer=False)),
    **{f"idefics3 {kind}": Case(partial(write_idefics3_checkpoint, kind=kind), whole_model) for kind in KINDS},
    "video_llama_3": Case(write_video_llama_3_checkpoint, whole_model),
    "video_llama_3, the authors', tied": Case(
        partial(write_video_llama_3_checkpoint, layout="authors", tied=True, template=True), whole_model
    ),
    "nanovlm, untied": Case(partial(write_nanovlm_checkpoint, names="untied")),
}
TAKEN = [name for name in CASES if not name.startswith(("nvila hf", "llava_qwen"))]

# what makes one of transformers' language models compute what it computes
FACTS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_parameters",
    "tie_word_embeddings", "attention_dropout",
)  # fmt: skip
SOME_TEXTS = (
    "Hello", " Describe\n\nthe  picture. ", "é e\u0301 猫 😀", "<|im_start|>user\nWhat?<|im_end|>\n",
    "<image>\n<|image|> <think>\n</think>\n\n<row_1_col_1><tool_call>", "",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """As `hosts/sglang/register.py` does in SGLang's processes."""
    AutoConfig.register(SiglaneConfig.model_type, SiglaneConfig, exist_ok=True)


@pytest.fixture(autouse=True)
def views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "views"
    monkeypatch.setenv(VIEWS, str(folder))
    monkeypatch.delenv(OVERRIDE, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@dataclass(frozen=True)
class Viewed:
    checkpoint: Checkpoint
    folder: Path
    reference: Any
    language: Any

    @property
    def config(self) -> Any:
        return AutoConfig.from_pretrained(self.folder)


@pytest.fixture(scope="module")
def viewed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Viewed]:
    """A case's checkpoint and its view, made once."""
    found: dict[str, Viewed] = {}

    def get(name: str) -> Viewed:
        if name not in found:
            root = tmp_path_factory.mktemp("viewed")
            reference = CASES[name].write(root / "model")
            checkpoint = Checkpoint(root / "model")
            language = CASES[name].language(reference)
            found[name] = Viewed(checkpoint, write_view(checkpoint, root / "views"), reference, language)
        return found[name]

    return get


def written(views: Path) -> list[str]:
    return sorted(os.listdir(views)) if views.is_dir() else []


def change_json(file: Path, **keys: Any) -> None:
    """None takes a key out."""
    found = {**json.loads(file.read_text()), **keys}
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


class TestWhatIsTaken:
    @pytest.mark.parametrize("name", TAKEN)
    def test_families_that_sglang_cannot_load_by_itself(self, viewed: Any, views: Path, name: str) -> None:
        folder = view_of(str(viewed(name).checkpoint.root))
        assert folder is not None
        assert folder.parent == views
        assert written(views) == [folder.name]

    @pytest.mark.parametrize("name", ["nvila hf", "nvila hf with scales"])
    def test_nvila_in_sglangs_own_layout_when_asked(
        self, viewed: Any, views: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        root = str(viewed(name).checkpoint.root)
        assert view_of(root) is None
        monkeypatch.setenv(OVERRIDE, "llava_onevision")
        assert view_of(root) is None
        assert written(views) == []
        monkeypatch.setenv(OVERRIDE, "ovis2_5,nvila")
        assert view_of(root) is not None

    def test_llava_in_its_authors_layout_when_asked(self, viewed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        root = str(viewed("llava_qwen, tower beside it").checkpoint.root)
        assert view_of(root) is None
        monkeypatch.setenv(OVERRIDE, "llava_qwen")
        assert view_of(root) is not None

    @pytest.mark.parametrize("full", [False, True])
    def test_plain_towers_are_left(self, tmp_path: Path, views: Path, full: bool) -> None:
        write_siglip_checkpoint(tmp_path / "siglip", full=full)
        assert view_of(str(tmp_path / "siglip")) is None
        assert written(views) == []

    def test_a_naflex_tower_is_left(self, tmp_path: Path) -> None:
        write_siglip2_checkpoint(tmp_path / "siglip2")
        assert view_of(str(tmp_path / "siglip2")) is None

    @pytest.mark.parametrize(
        "config",
        [
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
            {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl", "vision_config": {}},
            {"architectures": None, "model_type": "gpt2"},
            {},
        ],
    )
    def test_unknown_families_are_left(self, tmp_path: Path, config: dict[str, Any]) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert view_of(str(tmp_path)) is None

    def test_a_view_is_left(self, viewed: Any) -> None:
        one = viewed("ovis2_5")
        assert view_of(str(one.folder)) is None
        assert is_view(str(one.folder))
        assert not is_view(str(one.checkpoint.root))
        assert not is_view("somebody/a-model")

    def test_what_is_no_model_is_left(self, tmp_path: Path) -> None:
        (tmp_path / "weights.gguf").touch()
        (tmp_path / "empty").mkdir()
        names = (tmp_path / "weights.gguf", tmp_path / "empty", tmp_path / "nowhere", "s3://bucket/model", "", "~/x")
        assert [view_of(str(name)) for name in (*names, "somebody/a-model-that-is-not-in-the-cache")] == [None] * 7

    def test_an_override_of_no_family_is_an_error(self, viewed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(OVERRIDE, "nvila,internvl")
        with pytest.raises(UserError, match="SIGLANE_SGLANG_OVERRIDE names 'internvl'") as caught:
            view_of(str(viewed("ovis2_5").checkpoint.root))
        assert caught.value.param == OVERRIDE
        assert "nvila, llava_onevision, ovis2_5, nanovlm, idefics3" in caught.value.message

    def test_a_bad_setting_is_an_error(self, viewed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SIGLANE_ENCODER_PARALLEL", "pipeline")
        with pytest.raises(UserError, match="is not one of auto, tp, dp, replicate"):
            view_of(str(viewed("ovis2_5").checkpoint.root))

    def test_the_settings_of_a_host(self, views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert read_environment(SglangHostConfig) == SglangHostConfig(sglang_views=str(views))
        monkeypatch.setenv(OVERRIDE, "nvila")
        monkeypatch.setenv("SIGLANE_ENCODER_PARALLEL", "dp")
        monkeypatch.setenv("SIGLANE_MAX_IMAGES", "3")
        found = read_environment(SglangHostConfig)
        assert (found.sglang_override, found.encoder_parallel, found.max_images) == (("nvila",), "dp", 3)
        monkeypatch.setenv("SIGLANE_MAX_IMAGES", "-1")
        with pytest.raises(UserError, match="max_images must be at least 0, got -1 \\(from SIGLANE_MAX_IMAGES\\)"):
            read_environment(SglangHostConfig)


@pytest.mark.parametrize("name", CASES)
class TestTransformersReadsAView:
    def test_the_configuration(self, viewed: Any, name: str) -> None:
        one = viewed(name)
        facts = load_processor(one.checkpoint).config
        config = one.config
        assert type(config) is SiglaneConfig
        assert config.architectures == [ARCHITECTURE]
        assert config.checkpoint == str(one.checkpoint.root.resolve())
        assert config.dtype == torch.float32
        assert config.eos_token_id == list(facts.eos_token_ids) == config.text_config.eos_token_id
        assert config.get_text_config() is config.text_config
        assert config.image_token_id == placeholder_id(facts) < facts.language.vocab_size
        again = SiglaneConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()
        assert json.loads((one.folder / "generation_config.json").read_text())["eos_token_id"] == config.eos_token_id

    def test_the_language_models_facts(self, viewed: Any, name: str) -> None:
        one = viewed(name)
        found, expected = one.config.text_config, one.language.config.get_text_config()
        assert type(found) is type(expected)
        assert {fact: getattr(found, fact) for fact in FACTS} == {fact: getattr(expected, fact) for fact in FACTS}
        assert head_dim(found) == head_dim(expected)
        assert found.dtype == torch.float32
        for other in ("attention_bias", "mlp_bias", "layer_types"):  # where this class has them
            if hasattr(expected, other):
                assert getattr(found, other) == getattr(expected, other)
        assert not getattr(found, "use_sliding_window", False)

    def test_its_tensors_fill_transformers_language_model(self, viewed: Any, name: str) -> None:
        """Configuration, names and links together: the class that the view names gives the reference's logits."""
        one = viewed(name)
        model = AutoModelForCausalLM.from_config(one.config.text_config, dtype=torch.float32).eval()
        facts = load_processor(one.checkpoint).config
        ours, theirs = vlm_family(one.checkpoint).language_plan(facts.language), qwen_plan(facts.language)
        names = {tensor.key: tensor.name for tensor in model_tensors(one.checkpoint)}
        stored = dict(tensors_of(one.folder))
        assert stored.keys() == names.keys()
        found = {key: ours.find(names[key]) for key in stored}
        state = {theirs.source(to): stored[key] for key, to in found.items() if isinstance(to, Destination)}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert unexpected == []
        assert missing == (["lm_head.weight"] if facts.language.tie_embeddings else [])
        model.tie_weights()
        ids = torch.tensor([[5, 1, 300, 7, 7, 2]])
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, one.language(input_ids=ids).logits, atol=1e-5, rtol=0)

    def test_the_tokenizer(self, viewed: Any, name: str) -> None:
        one = viewed(name)
        ours, theirs = load_processor(one.checkpoint), AutoTokenizer.from_pretrained(one.folder)
        rows = ours.config.language.vocab_size
        assert theirs.chat_template == ours.chat_template()
        added = ours.tokenizer.get_added_vocab()
        assert theirs.get_added_vocab() == {text: number for text, number in added.items() if number < rows}
        assert len(theirs) == min(rows, len(ours.tokenizer))
        assert theirs.eos_token == ours.tokenizer.eos_token
        assert theirs.encode("") == []  # else a host would put something in front of every prompt
        for text in (*SOME_TEXTS, *added):
            ids, expected = (one.encode(text, add_special_tokens=False) for one in (theirs, ours.tokenizer))
            assert max(ids, default=0) < rows
            assert ids == expected or max(expected) >= rows
            assert theirs.decode(ids) == ours.tokenizer.decode(expected)

    def test_the_links_are_the_checkpoints_files(self, viewed: Any, name: str) -> None:
        one = viewed(name)
        links = sorted(one.folder.glob("*.safetensors"))
        assert all(link.is_symlink() and link.resolve(strict=True).is_file() for link in links)
        stored = sorted(file.resolve() for file in one.checkpoint.root.rglob("*.safetensors"))
        assert sorted(link.resolve() for link in links) == stored
        assert one.folder.stat().st_mode & 0o777 == 0o755


def head_dim(config: Any) -> int:
    found = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert isinstance(found, int)
    return found


def tensors_of(view: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(view.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (a safetensors handle is not a dict)
                yield key, handle.get_tensor(key)


@pytest.mark.parametrize("named", ["Qwen2TokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("write", [write_ovis2_5_checkpoint, write_llava_onevision_checkpoint])
def test_a_tokenizer_by_the_classes_that_released_models_name(
    tmp_path: Path, views: Path, write: Callable[[Path], object], named: str
) -> None:
    write(tmp_path / "model")
    stated = tmp_path / "model/tokenizer_config.json"
    change_json(stated, tokenizer_class=named, add_bos_token=False, clean_up_tokenization_spaces=True)
    ours = load_processor(Checkpoint(tmp_path / "model")).tokenizer
    theirs = AutoTokenizer.from_pretrained(write_view(Checkpoint(tmp_path / "model"), views))
    for text in (*SOME_TEXTS, "Well , it 's . A  cat !"):
        ids = ours.encode(text, add_special_tokens=False)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == ours.decode(ids)


LEFT_BY_A_PROCESSOR = {
    "processor_class": "LlavaOnevisionProcessor", "image_processor_type": "LlavaOnevisionImageProcessor",
    "feature_extractor_type": "SiglipFeatureExtractor", "chat_template": "{{ 'wrong' }}",
    "auto_map": {"AutoProcessor": "other.Other", "AutoTokenizer": ["other.Other", None]}, "name_or_path": "elsewhere",
    "extra_special_tokens": {"some_token": "<|im_end|>"}, "quantization_config": {"quant_method": "awq"},
}  # fmt: skip


@pytest.mark.parametrize("tokenizer", ["Qwen2TokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("name", ["llava_onevision", "ovis2_5", "nvila folders", "nanovlm current"])
def test_nothing_of_a_checkpoints_files_steers_the_host(tmp_path: Path, views: Path, name: str, tokenizer: str) -> None:
    """What a saved tokenizer or processor brings along: names of classes, code, templates, quantisation."""
    CASES[name].write(tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    folder = vlm_family(checkpoint).tokenizer_folder(checkpoint).root
    expected = load_processor(checkpoint)
    (folder / "chat_template.jinja").write_text(expected.tokenizer.chat_template or CHATML)
    change_json(folder / "tokenizer_config.json", tokenizer_class=tokenizer, **LEFT_BY_A_PROCESSOR)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ 'wrong' }}")
    (folder / "processor_config.json").write_text('{"processor_class": "Qwen2VLProcessor", "auto_map": {}}')
    view = write_view(checkpoint, views)
    assert {file.name for file in view.iterdir() if file.suffix != ".safetensors"} == {
        "chat_template.jinja", "config.json", "generation_config.json", IN_USE, "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    kept = json.loads((view / "tokenizer_config.json").read_text())
    assert {*kept} <= {*TOKENIZER_KEYS}
    assert not {*kept} & {*LEFT_BY_A_PROCESSOR}
    read = AutoProcessor.from_pretrained(view)  # as SGLang does
    assert isinstance(read, PreTrainedTokenizerFast)
    for text in SOME_TEXTS:
        ids = expected.tokenizer.encode(text, add_special_tokens=False)
        if max(ids, default=0) < expected.config.language.vocab_size:
            assert read.encode(text, add_special_tokens=False) == ids


def test_a_view_states_the_dtype_of_the_weights(tmp_path: Path, views: Path) -> None:
    write_ovis2_5_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    config = AutoConfig.from_pretrained(write_view(Checkpoint(tmp_path / "model"), views))
    assert config.dtype == config.text_config.dtype == torch.bfloat16


class TestOnceForEachState:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        write_nanovlm_checkpoint(tmp_path / "model", own_tokenizer=False)
        return tmp_path / "model"

    def test_it_is_used_again(self, model: Path, views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = view_of(str(model))
        monkeypatch.setattr(views_module, "_fill", None)  # not called any more
        assert view_of(str(model)) == first
        assert view_of(f"{model}/") == first
        assert first is not None
        assert written(views) == [first.name]

    @pytest.mark.parametrize(
        "file",
        ["config.json", "model.safetensors", "tokenizer/tokenizer.json", "tokenizer/merges.txt", "chat_template.jinja"],
    )
    def test_it_is_made_anew_when_a_file_changes(self, model: Path, views: Path, file: str) -> None:
        first = view_of(str(model))
        touched = model / file
        touched.touch()
        os.utime(touched, ns=(touched.stat().st_atime_ns, touched.stat().st_mtime_ns + 1))
        second = view_of(str(model))
        assert second != first
        assert len(written(views)) == 2

    def test_also_when_a_tokenizer_elsewhere_changes(self, tmp_path: Path, model: Path, views: Path) -> None:
        """nanoVLM's `lm_tokenizer`."""
        elsewhere = tmp_path / "elsewhere"
        (model / "tokenizer").rename(elsewhere)
        change_json(model / "config.json", lm_tokenizer=str(elsewhere))
        first = view_of(str(model))
        os.utime(elsewhere / "tokenizer.json", ns=(1, 1))
        assert view_of(str(model)) != first

    def test_a_file_that_is_gone_does_not_matter(self, model: Path) -> None:
        (model / "notes.json").symlink_to(model / "nowhere.json")
        assert view_of(str(model)) is not None

    def test_another_copy_has_its_own(self, tmp_path: Path, model: Path, views: Path) -> None:
        write_nanovlm_checkpoint(tmp_path / "other" / "model", own_tokenizer=False)
        assert view_of(str(model)) != view_of(str(tmp_path / "other" / "model"))

    def another_state(self, model: Path) -> Checkpoint:
        os.utime(model / "config.json", ns=(1, (model / "config.json").stat().st_mtime_ns + 1))
        return Checkpoint(model)

    def test_views_of_other_states_are_removed(self, tmp_path: Path, model: Path, views: Path) -> None:
        write_nanovlm_checkpoint(tmp_path / "other" / "model", own_tokenizer=False)
        theirs = write_view(Checkpoint(tmp_path / "other" / "model"), views)
        first = write_view(Checkpoint(model), views)
        weights = (first / "part-00000.safetensors").resolve()
        (views / f"{first.name}.half-made").mkdir()
        second = write_view(self.another_state(model), views)
        assert written(views) == sorted([theirs.name, f"{first.name}.half-made", second.name])
        assert weights.is_file()

    @pytest.mark.slow
    def test_a_view_in_use_stays_until_its_process_ends(self, model: Path, views: Path) -> None:
        program = (
            "import sys; from siglane.hosts.sglang.view import view_of\n"
            f"print(view_of({str(model)!r}).name, flush=True); sys.stdin.read()"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", program], **pipes) as user:
            used = user.stdout.readline().strip()
            second = write_view(self.another_state(model), views)
            assert written(views) == sorted([used, second.name])
            user.stdin.close()
            assert user.wait(PATIENCE) == 0
        third = write_view(self.another_state(model), views)
        assert written(views) == [third.name]

    def test_a_view_that_may_be_in_use_stays(self, model: Path, views: Path) -> None:
        """By a siglane that did not say so yet."""
        first = write_view(Checkpoint(model), views)
        (first / IN_USE).unlink()
        second = write_view(self.another_state(model), views)
        assert written(views) == sorted([first.name, second.name])

    def test_one_that_was_removed_meanwhile_is_made_again(
        self, model: Path, views: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[Path] = []

        def removed_at_first(checkpoint: Checkpoint, folder: Path) -> Path:
            calls.append(write_view(checkpoint, folder))
            if len(calls) == 1:
                shutil.rmtree(calls[0])
            return calls[0]

        monkeypatch.setattr(views_module, "write_view", removed_at_first)
        assert view_of(str(model)) == calls[0]
        assert len(calls) == 2
        assert (calls[0] / "config.json").is_file()

    def test_two_at_once(self, model: Path, views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both are ready to put theirs in place at the same time."""
        barrier, fill = threading.Barrier(2, timeout=PATIENCE), views_module._fill
        found: list[Any] = []

        def fill_and_wait(*arguments: Any) -> None:
            fill(*arguments)
            barrier.wait()

        def make() -> None:
            try:
                found.append(view_of(str(model)))
            except Exception as error:
                found.append(error)

        monkeypatch.setattr(views_module, "_fill", fill_and_wait)
        threads = [threading.Thread(target=make) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found[0] == found[1]
        assert written(views) == [found[0].name]
        assert AutoTokenizer.from_pretrained(found[0]).encode("Hello")


def without(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.pop(name)


def one_row_less(name: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.update({name: state[name][:-1].clone()})


def twice(name: str, other: str) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.update({other: state[name].clone()})


class TestBrokenCheckpoints:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Path:
        write_ovis2_5_checkpoint(tmp_path / "model")
        return tmp_path / "model"

    def refused(self, model: Path, views: Path, kind: type[UserError]) -> str:
        with pytest.raises(kind) as caught:
            view_of(str(model))
        assert written(views) == []
        assert "\n" not in caught.value.message
        return caught.value.message

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            (without("llm.model.layers.1.self_attn.k_proj.weight"), "language.blocks.1.attention.qkv.weight (k)"),
            (without("visual_tokenizer.head.1.bias"), "vision.projector.norm.bias"),
            (one_row_less("llm.model.norm.weight"), "llm.model.norm.weight has shape [47]"),
            (one_row_less("vte.weight"), "vte.weight has shape [51, 48]"),
            (twice("vte.weight", "llm.model.extra.weight"), "llm.model.extra.weight is not known"),
        ],
    )
    def test_a_tensor(self, model: Path, views: Path, change: Any, complaint: str) -> None:
        change_tensors(model / "model.safetensors", change)
        assert complaint in self.refused(model, views, WeightError)

    def test_a_file_cut_short(self, model: Path, views: Path) -> None:
        file = model / "model.safetensors"
        os.truncate(file, file.stat().st_size // 2)
        assert str(file) in self.refused(model, views, WeightError)

    def test_no_weights(self, model: Path, views: Path) -> None:
        (model / "model.safetensors").unlink()
        assert "holds no *.safetensors file" in self.refused(model, views, WeightError)

    def test_an_unknown_value(self, model: Path, views: Path) -> None:
        change_json(model / "config.json", conversation_formatter_class="LlamaConversationFormatter")
        assert "conversation_formatter_class" in self.refused(model, views, ConfigError)

    def test_a_missing_section(self, model: Path, views: Path) -> None:
        change_json(model / "config.json", llm_config=None)
        assert "llm_config" in self.refused(model, views, ConfigError)

    def test_no_tokenizer(self, model: Path, views: Path) -> None:
        (model / "tokenizer.json").unlink()
        assert "the tokenizer cannot be loaded" in self.refused(model, views, ConfigError)

    def test_a_chat_template_that_does_not_work(self, model: Path, views: Path) -> None:
        (model / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
        assert "the chat template does not work" in self.refused(model, views, ConfigError)

    def test_a_missing_folder(self, tmp_path: Path, views: Path) -> None:
        write_nvila_checkpoint(tmp_path / "vila")
        (tmp_path / "vila/mm_projector/model.safetensors").unlink()
        assert "mm_projector" in self.refused(tmp_path / "vila", views, WeightError)


class TestNoPlace:
    @pytest.fixture
    def model(self, tmp_path: Path) -> str:
        write_nanovlm_checkpoint(tmp_path / "model", era="0.1")
        return str(tmp_path / "model")

    def refused(self, model: str) -> str:
        with pytest.raises(UserError) as caught:
            view_of(model)
        assert caught.value.param == VIEWS
        assert "set SIGLANE_SGLANG_VIEWS to a folder that can be written" in caught.value.message
        return caught.value.message

    def test_a_folder_that_cannot_be_made(self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv(VIEWS, str(tmp_path / "file" / "views"))
        assert str(tmp_path / "file" / "views") in self.refused(model)

    def test_a_home_that_cannot_be_written(self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "home").touch()
        monkeypatch.delenv(VIEWS)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert str(tmp_path / "home/.cache/siglane/sglang") in self.refused(model)

    def test_no_home(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """A container's user that no passwd file knows."""

        def unknown(user: int) -> None:
            raise KeyError(user)

        monkeypatch.delenv(VIEWS)
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", unknown)
        assert "home directory" in self.refused(model)

    def test_a_full_disk(self, model: str, views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(source: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(views_module.os, "symlink", full)
        assert os.strerror(errno.ENOSPC) in self.refused(model)
        assert written(views) == []

    def test_the_home_is_used_without_the_variable(
        self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv(VIEWS)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        folder = view_of(model)
        assert folder is not None
        assert folder.parent == tmp_path / "home/.cache/siglane/sglang"
        monkeypatch.setenv(VIEWS, "~/views")
        assert view_of(model) == tmp_path / "home/views" / folder.name
        monkeypatch.setenv(VIEWS, "views")
        monkeypatch.chdir(tmp_path)
        assert view_of(model) == tmp_path / "views" / folder.name
