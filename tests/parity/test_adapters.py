"""LoRA adapters merged at load: what PEFT answers with them, siglane answers, in every family and on every way in."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_kit import module_tree, named, train, write_merged
from causal_lm_checkpoint import write_causal_lm_checkpoint
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint
from parity_kit import assert_parity, logits, patches_of, picture, spliced
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from two_tower_checkpoint import write_two_tower_checkpoint
from video_llama_3_checkpoint import write_video_llama_3_checkpoint

from siglane import LLM, Tagger
from siglane.errors import ConfigError, SiglaneError, UserError, WeightError
from siglane.families.model import VisionLanguageModel, load_model, load_vision
from siglane.families.processor import load_processor
from siglane.families.registry import is_vision_only
from siglane.families.two_tower import load_two_tower
from siglane.llm import VisionEncoder
from siglane.nn.parallel import TensorParallel
from siglane.types import ImagePart, Message, SamplingParams
from siglane.verify import verify
from siglane.weights.adapter import LoraConfig as Read
from siglane.weights.demo import open_model
from siglane.weights.hub import Checkpoint, open_checkpoint

State = dict[str, torch.Tensor]
IDS = torch.arange(5, 35)
FOLDERS = {f"{part}/model.safetensors": f"{part}." for part in ("llm", "vision_tower", "mm_projector")}

# how each family's checkpoint is written, and what its files' names have in front
FAMILIES: dict[str, tuple[Callable[[Path], Any], Mapping[str, str]]] = {
    "NVILA, folders": (write_nvila_checkpoint, FOLDERS),
    "NVILA, hf": (partial(write_nvila_checkpoint, layout="hf", lite=False, qwen3=True), {}),
    "LLaVA-OneVision, hub's names": (partial(write_llava_onevision_checkpoint, names="hub", tied=False), {}),
    "LLaVA-OneVision, names in memory": (partial(write_llava_onevision_checkpoint, names="memory", tied=False), {}),
    "nanoVLM, fused qkv": (partial(write_nanovlm_checkpoint, names="untied"), {}),
    "SmolVLM2": (write_idefics3_checkpoint, {}),
    "Ovis2.5": (write_ovis2_5_checkpoint, {}),
    "VideoLLaMA3": (write_video_llama_3_checkpoint, {}),
    "VideoLLaMA3, the authors'": (partial(write_video_llama_3_checkpoint, layout="authors"), {}),
    "Qwen2 alone": (write_causal_lm_checkpoint, {}),
    "Llama alone": (partial(write_causal_lm_checkpoint, kind="llama"), {}),
    "SigLIP, both towers": (write_two_tower_checkpoint, {}),
    "SigLIP2 NaFlex, both towers": (partial(write_two_tower_checkpoint, kind="naflex"), {}),
}


def model_of(checkpoint: Checkpoint, **options: Any) -> VisionLanguageModel:
    return load_model(checkpoint, load_processor(checkpoint).config, device="cpu", dtype=torch.float32, **options)


def state_of(checkpoint: Checkpoint, tp: TensorParallel | None = None) -> State:
    if is_vision_only(checkpoint):
        return load_two_tower(checkpoint, device="cpu", dtype=torch.float32, tp=tp).model.state_dict()
    return model_of(checkpoint, tp=tp).state_dict()


def answer(checkpoint: Checkpoint) -> torch.Tensor:
    model = model_of(checkpoint)
    return logits(model, model.language.embed(IDS))


def edit_config(folder: Path, **keys: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def edit_tensors(folder: Path, change: Callable[[State], State]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: one.contiguous() for name, one in change(load_file(file)).items()}, file)


@pytest.mark.few(
    "NVILA, folders", "LLaVA-OneVision, names in memory", "nanoVLM, fused qkv", "Ovis2.5",
    "VideoLLaMA3, the authors'", "Qwen2 alone", "SigLIP, both towers",
)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_family_is_what_peft_merges(family: str, tmp_path: Path) -> None:
    """All linear layers, convolutions and tables; whole, and on the second of two ranks; verify's own code agrees."""
    write, prefixes = FAMILIES[family]
    base, adapter, whole = (tmp_path / name for name in ("base", "adapter", "whole"))
    write(base)
    tree = module_tree(named(base, prefixes))
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding)
    targets = [name for name, module in tree.named_modules() if isinstance(module, kinds)]
    train(tree, adapter, target_modules=targets)
    shutil.copytree(base, whole)
    write_merged(base, adapter, whole, prefixes)
    expected, plain = state_of(open_model(whole)), state_of(open_model(base))
    found = state_of(open_model(base, adapter=adapter))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    changed = [name for name in expected if not torch.equal(expected[name], plain[name])]
    assert len(changed) > 13
    share = TensorParallel(1, 2, lambda x: x, lambda x: x)
    expected, found = (state_of(one, share) for one in (open_model(whole), open_model(base, adapter=adapter)))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert verify(base, adapter=adapter, random=None if "alone" in family else 1, steps=2).ok


CASES: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
    "rank-stabilised, all linear layers": {"target_modules": "all-linear", "use_rslora": True},
    "a regex, ranks and alphas by pattern": {
        "target_modules": r".*layers\.[02]\..*(q_proj|down_proj)", "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 32},
    },
    "patterns and rank-stabilised": {
        "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}, "use_rslora": True,
    },
    "one layer": {"target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "some excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1\..*"},
    "biases": {"target_modules": ["q_proj", "k_proj"], "bias": "all"},
    "the adapted layers' biases": {"target_modules": ["q_proj", "k_proj"], "bias": "lora_only"},
    "a bias of B": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "fan_in_fan_out, of no linear layer": {"target_modules": ["q_proj", "down_proj"], "fan_in_fan_out": True},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "the embedding table": {"target_modules": ["q_proj", "embed_tokens"]},
    "the table as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "some tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5, 17]},
    "table and head kept alike": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
}  # fmt: skip
OF_THE_ENDS = [
    "whole modules", "the head", "the embedding table", "the table as a whole", "some tokens",
    "table and head kept alike",
]  # fmt: skip


@pytest.mark.few("*-False", "the head-True", "table and head kept alike-True")
@pytest.mark.parametrize(
    ("case", "tied"), [*((case, False) for case in CASES), *((case, True) for case in OF_THE_ENDS)]
)
@torch.no_grad()
def test_what_peft_can_say(case: str, tied: bool, tmp_path: Path) -> None:
    """Against PEFT's forward, where nothing is merged: what changes one of head and table leaves the other alone."""
    written = write_causal_lm_checkpoint(tmp_path / "base", tied=tied)
    plain = written.model(input_ids=IDS[None]).logits[0]
    adapted = train(written.model, tmp_path / "adapter", **CASES[case])
    expected = adapted(input_ids=IDS[None]).logits[0]
    assert (expected - plain).abs().max() > 0.1
    assert_parity(case, answer(open_model(tmp_path / "base", adapter=tmp_path / "adapter")), expected)
    if tied:
        assert verify(tmp_path / "base", adapter=tmp_path / "adapter", steps=2).ok


@torch.no_grad()
def test_a_vision_language_model_of_transformers(tmp_path: Path) -> None:
    """The hub's names on disk, those in memory in the adapter; tower, projector and language model."""
    written = write_llava_onevision_checkpoint(tmp_path / "base", names="hub")
    train(written.model, tmp_path / "adapter", target_modules="all-linear", modules_to_save=["multi_modal_projector"])
    checkpoint = open_model(tmp_path / "base", adapter=tmp_path / "adapter")
    processor, model = load_processor(checkpoint), model_of(checkpoint)
    shown = picture(90, 50)
    patches = patches_of(processor, [shown])
    prompt = processor.prompt([Message("user", (ImagePart(0), "what?"))], [one.layout for one in patches])
    inputs = written.inputs("<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\n", [shown])
    assert_parity("logits", logits(model, spliced(model, prompt, patches)), written.model(**inputs).logits[0])


@torch.no_grad()
def test_both_towers_of_siglip(tmp_path: Path) -> None:
    model = write_two_tower_checkpoint(tmp_path / "base", kind="siglip2")
    adapted = train(model, tmp_path / "adapter", target_modules=["q_proj", "fc1", "out_proj", "token_embedding"])
    tagger = Tagger(tmp_path / "base", adapter=tmp_path / "adapter", cache=tmp_path / "cache")
    merged = adapted.merge_and_unload()
    texts = ["a cat", "two green shapes"]
    ids = tagger._tokens.ids(texts)
    expected = nn.functional.normalize(merged.get_text_features(input_ids=ids).pooler_output, dim=-1)
    assert_parity("texts", tagger.embed_texts(texts), expected)
    plain = Tagger(tmp_path / "base", cache=tmp_path / "cache")
    assert not torch.allclose(plain.scores([picture(40, 40)], texts), tagger.scores([picture(40, 40)], texts))


class TestWhereItLies:
    @pytest.fixture
    def trained(self, tmp_path: Path) -> Path:
        """A folder with base/ and adapter/."""
        written = write_causal_lm_checkpoint(tmp_path / "base", tied=True)
        train(written.model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
        edit_config(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
        return tmp_path

    def expected(self, trained: Path) -> torch.Tensor:
        found = answer(open_model(trained / "base", adapter=trained / "adapter"))
        assert not torch.allclose(found, answer(open_model(trained / "base")))
        return found

    def test_beside_its_base(self, trained: Path, caplog: pytest.LogCaptureFixture) -> None:
        expected = self.expected(trained)
        for file in (trained / "adapter").iterdir():
            shutil.copy(file, trained / "base")
        caplog.clear()
        assert torch.equal(answer(open_checkpoint(trained / "base")), expected)
        assert [one for one in caplog.messages if "an adapter is merged" in one]
        assert torch.equal(answer(open_model(trained / "base", adapter=trained / "base")), expected)  # once
        assert verify(trained / "base", steps=2).ok

    def test_beside_shards_without_an_index(self, trained: Path) -> None:
        """Its file is no part of the weights."""
        expected = self.expected(trained)
        (trained / "base/model.safetensors").rename(trained / "base/model-00001-of-00001.safetensors")
        for file in (trained / "adapter").iterdir():
            shutil.copy(file, trained / "base")
        assert torch.equal(answer(open_model(trained / "base")), expected)

    @pytest.mark.parametrize("with_config", [False, True])
    def test_alone(self, trained: Path, with_config: bool) -> None:
        expected = self.expected(trained)
        if with_config:  # some trainers save the base's, too
            shutil.copy(trained / "base/config.json", trained / "adapter")
        (trained / "adapter/training_args.bin").write_bytes(b"a trainer's")
        assert torch.equal(answer(open_model(trained / "adapter")), expected)
        assert torch.equal(answer(open_checkpoint(str(trained / "adapter"))), expected)

    def test_alone_with_a_base_beside_it(self, trained: Path) -> None:
        edit_config(trained / "adapter", base_model_name_or_path="../base")
        assert torch.equal(answer(open_model(trained / "adapter")), self.expected(trained))

    @pytest.mark.parametrize("base", ["/nowhere/at/all", None])
    def test_alone_without_its_base(self, trained: Path, base: str | None) -> None:
        edit_config(trained / "adapter", base_model_name_or_path=base)
        with pytest.raises(UserError, match=r"is an adapter .*give the base.* as --adapter") as caught:
            open_model(trained / "adapter")
        assert caught.value.code == "model_not_found"

    def test_its_tokenizer_comes_along(self, trained: Path) -> None:
        processor = load_processor(open_model(trained / "base"))
        processor.tokenizer.chat_template = "{{ messages[0].content }}!"
        processor.tokenizer.save_pretrained(str(trained / "adapter"))
        found = load_processor(open_model(trained / "adapter"))
        assert found.tokenizer.chat_template == "{{ messages[0].content }}!"

    def test_of_a_part_in_its_folder(self, tmp_path: Path) -> None:
        """VILA keeps a whole language model in llm/; an adapter there was trained on that alone."""
        written = write_nvila_checkpoint(tmp_path / "base")
        adapted = train(written.language, tmp_path / "base/llm", target_modules=["q_proj"])
        found = model_of(open_model(tmp_path / "base")).get_parameter("language.blocks.1.attention.qkv.weight")
        expected = adapted.merge_and_unload().get_parameter("model.layers.1.self_attn.q_proj.weight")
        torch.testing.assert_close(found[: len(expected)], expected)
        assert verify(tmp_path / "base", random=1, steps=1).ok

    def test_of_the_language_model_alone_elsewhere(self, tmp_path: Path) -> None:
        """Names of a Qwen2 by itself, `model.layers.0...`; in the file `language_model.` stands in front of them."""
        write_llava_onevision_checkpoint(tmp_path / "base", tied=False)
        language = write_causal_lm_checkpoint(tmp_path / "other", num_hidden_layers=2)
        train(language.model, tmp_path / "adapter", target_modules=["v_proj"])
        plain, found = (
            model_of(open_model(tmp_path / "base", adapter=one)).get_parameter("language.blocks.0.attention.qkv.weight")
            for one in (None, tmp_path / "adapter")
        )
        assert not torch.equal(plain[72:], found[72:])
        assert torch.equal(plain[:72], found[:72])

    def test_what_is_not_loaded_is_left_out(self, tmp_path: Path) -> None:
        """A plain tower of a SigLIP whose adapter is of both towers."""
        model = write_two_tower_checkpoint(tmp_path / "base")
        train(model, tmp_path / "adapter", target_modules=["fc1", "fc2"])
        checkpoint = open_model(tmp_path / "base", adapter=tmp_path / "adapter")
        tower, _ = load_vision(checkpoint, device="cpu", dtype=torch.float32)
        whole = load_two_tower(checkpoint, device="cpu", dtype=torch.float32).model
        name = "tower.blocks.1.mlp.fc1.weight"
        assert torch.equal(tower.get_parameter(name), whole.vision.get_parameter(name))

    def test_every_way_in(self, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from siglane.cli.main import main

        base, adapter = str(trained / "base"), str(trained / "adapter")
        few = ["--max-tokens", "4", "--kv-tokens", "256"]
        llm = LLM(base, adapter=adapter, device="cpu", kv_tokens=256)
        expected = list(llm.generate("what?", SamplingParams(max_tokens=4))[0].output_token_ids)
        for words in ([adapter], [base, "--adapter", adapter]):
            assert main(["generate", *words, "-p", "what?", *few, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["output_token_ids"] == expected
        assert main(["verify", base, "--adapter", adapter, "--steps", "1"]) == 0

    def test_pictures_and_labels(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from siglane.cli.main import main

        model, shown = write_two_tower_checkpoint(tmp_path / "base"), tmp_path / "a.png"
        picture(40, 40).save(shown)
        train(model, tmp_path / "adapter", target_modules=["fc1"])
        base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
        encoder = VisionEncoder(base, adapter=adapter, device="cpu")
        assert not torch.allclose(encoder.encode([shown])[0], VisionEncoder(base, device="cpu").encode([shown])[0])
        assert main(["encode", base, str(shown), "--adapter", adapter, "-o", str(tmp_path / "features")]) == 0
        assert torch.equal(load_file(tmp_path / "features")["0"], encoder.encode([shown])[0])
        vectors = []
        for words in ([], ["--adapter", adapter]):
            capsys.readouterr()
            assert main(["embed", base, str(shown), "--text", "a cat", "--json", *words]) == 0
            vectors.append([row["embedding"] for row in json.loads(capsys.readouterr().out)])
        tagger = Tagger(base, adapter=adapter, cache=tmp_path / "cache")
        assert vectors[1] == [*tagger.embed_images([shown]).tolist(), *tagger.embed_texts(["a cat"]).tolist()]
        assert vectors[0][0] != vectors[1][0]
        assert vectors[0][1] != vectors[1][1]

    def test_matrices_of_labels_belong_to_an_adapter(self, tmp_path: Path) -> None:
        model = write_two_tower_checkpoint(tmp_path / "base")
        train(model, tmp_path / "adapter", target_modules=["fc1"])
        options: list[dict[str, Any]] = [{}, {"adapter": tmp_path / "adapter"}, {}]
        scores = [
            Tagger(tmp_path / "base", cache=tmp_path / "cache", **one).scores([picture(40, 40)], ["a cat"])
            for one in options
        ]
        assert torch.equal(scores[0], scores[2])
        edit_config(tmp_path / "adapter", lora_alpha=16)
        again = Tagger(tmp_path / "base", adapter=tmp_path / "adapter", cache=tmp_path / "cache")
        fresh = Tagger(tmp_path / "base", adapter=tmp_path / "adapter", cache=tmp_path / "another")
        assert torch.equal(again.scores([picture(40, 40)], ["a cat"]), fresh.scores([picture(40, 40)], ["a cat"]))


class TestRefused:
    """By name, before anything is loaded."""

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        written = write_causal_lm_checkpoint(folder / "base")
        train(written.model, folder / "adapter", target_modules=["q_proj", "down_proj"])
        return folder

    @pytest.fixture
    def adapter(self, trained: Path, tmp_path: Path) -> Path:
        return shutil.copytree(trained / "adapter", tmp_path / "adapter")

    def refused(self, trained: Path, adapter: Path) -> SiglaneError:
        with pytest.raises((ConfigError, WeightError)) as caught:
            model_of(open_model(trained / "base", adapter=adapter))
        return caught.value

    @pytest.mark.parametrize(
        ("keys", "named"),
        [
            ({"use_dora": True}, "use_dora True cannot be merged"),
            ({"peft_type": "IA3"}, "peft_type 'IA3'"),
            ({"peft_type": "PROMPT_TUNING"}, "peft_type 'PROMPT_TUNING'"),
            ({"peft_type": "PREFIX_TUNING"}, "peft_type 'PREFIX_TUNING'"),
            ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' changed the base weights"),
            ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights 'pissa_niter_16'"),
            ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
            ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
            ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
            ({"target_parameters": ["experts.gate"]}, "target_parameters"),
            ({"use_qalora": True}, "use_qalora"),
            ({"an_option_of_next_year": 0.5}, "an_option_of_next_year"),
            ({"r": 8}, "have not the rank 8"),
            ({"rank_pattern": {"down_proj": 2}}, "have not the rank 2"),
            ({"target_modules": ["q_proj"]}, "mlp.down_proj.lora_A.weight is of a module that target_modules"),
            ({"layers_to_transform": [0]}, "is of a module that target_modules"),
            ({"r": "four"}, "r must be int"),
            ({"target_modules": "(q_proj"}, "is not as PEFT writes it: missing ), unterminated subpattern"),
            ({"target_modules": 3}, "is not as PEFT writes it"),
            ({"rank_pattern": ["q_proj"]}, "is not as PEFT writes it"),
            ({"rank_pattern": {"q_proj": None}}, "is not as PEFT writes it"),
            ({"rank_pattern": {"q_proj": "x"}}, "'x' must be a positive int"),
            ({"rank_pattern": {"q_proj": 0}}, "0 must be a positive int"),
            ({"alpha_pattern": {"q_proj": math.nan}}, "nan must be a positive float"),
            ({"alpha_pattern": {"q_proj": 10**400}}, "is not as PEFT writes it"),
            ({"layers_to_transform": ["x"]}, "['x'] must be whole numbers"),
        ],
    )
    def test_a_configuration(self, trained: Path, adapter: Path, keys: dict[str, Any], named: str) -> None:
        edit_config(adapter, **keys)
        assert named in str(self.refused(trained, adapter))

    @pytest.mark.parametrize("key", ["an_option_of_next_year", "use_bdlora"])
    def test_what_a_newer_peft_says_but_does_not_use_is_no_reason(self, trained: Path, adapter: Path, key: str) -> None:
        expected = answer(open_model(trained / "base", adapter=adapter))
        edit_config(adapter, **{key: None})
        assert torch.equal(answer(open_model(trained / "base", adapter=adapter)), expected)

    FIRST = "base_model.model.model.layers.0.self_attn.q_proj"

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda first, state: state | {f"{first}.lora_magnitude_vector": torch.ones(48)}, "lora_magnitude_vector"),
            (lambda first, state: {k: v for k, v in state.items() if k != f"{first}.lora_B.weight"}, "no counterpart"),
            (lambda first, state: {k.replace("layers.2", "layers.7"): v for k, v in state.items()}, "layers.7"),
            (lambda first, state: state | {f"{first}.lora_A.weight": torch.ones(4, 47)}, "[48, 47]"),
            (lambda first, state: state | {"base_model.model.score.weight": torch.ones(2, 48)}, "score.weight"),
            (lambda first, state: state | {"base_model.model.lm_head.bias": torch.ones(400)}, "lm_head.bias"),
            (lambda first, state: state | {f"{first}.lora_A.weight": torch.ones(4, 48, dtype=torch.int8)}, "I8"),
            (lambda first, state: state | {f"{first}.lora_B.bias": torch.ones(47)}, "[47]"),
        ],
    )
    def test_a_tensor(self, trained: Path, adapter: Path, change: Callable[[str, State], State], named: str) -> None:
        edit_tensors(adapter, partial(change, self.FIRST))
        assert named in str(self.refused(trained, adapter))

    def test_halves_and_pickles(self, trained: Path, adapter: Path) -> None:
        weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
        (adapter / "non_lora_trainables.bin").write_bytes(b"")
        assert "non_lora_trainables.bin holds trained weights" in str(self.refused(trained, adapter))
        (adapter / "non_lora_trainables.bin").unlink()
        weights.rename(adapter / "adapter_model.bin")
        assert "weights_only=True), 'adapter_model.safetensors')" in str(self.refused(trained, adapter))
        (adapter / "adapter_model.bin").unlink()
        assert "adapter_config.json without adapter_model.safetensors" in str(self.refused(trained, adapter))
        config.unlink()
        with pytest.raises(UserError, match=r"holds no adapter_config\.json") as caught:
            open_model(trained / "base", adapter=adapter)
        assert caught.value.code == "bad_adapter"

    @pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
    def test_half_an_adapter_beside_a_base(self, trained: Path, tmp_path: Path, file: str) -> None:
        """The base alone would answer, without a word."""
        base = shutil.copytree(trained / "base", tmp_path / "base")
        shutil.copy(trained / "adapter" / file, base)
        with pytest.raises(WeightError, match=rf"holds {file} without adapter_\w+\.\w+; .*remove {file}"):
            model_of(open_model(base))

    def test_what_is_open_already(self, trained: Path, adapter: Path) -> None:
        """An option that would be ignored."""
        with pytest.raises(TypeError, match="is open already; give adapter to open_model"):
            LLM(open_model(trained / "base"), adapter=adapter, device="cpu")

    def test_two_adapters(self, trained: Path, tmp_path: Path, adapter: Path) -> None:
        base = shutil.copytree(trained / "base", tmp_path / "base")
        for file in adapter.iterdir():
            shutil.copy(file, base)
        with pytest.raises(WeightError, match="holds an adapter of its own"):
            model_of(open_model(base, adapter=adapter))

    def test_of_another_model(self, trained: Path, tmp_path: Path) -> None:
        """The layers of a text tower have other names."""
        model = write_two_tower_checkpoint(tmp_path / "other")
        train(model, tmp_path / "adapter", target_modules=["fc1"])
        assert "which this model does not have; is it another model's?" in str(
            self.refused(trained, tmp_path / "adapter")
        )

    def test_names_that_several_parts_have(self, tmp_path: Path) -> None:
        """Both halves of LLaVA have `layers.N.self_attn.q_proj` somewhere; nobody knows which is meant."""
        write_llava_onevision_checkpoint(tmp_path / "base", tied=False)
        tree = module_tree({"layers.0.self_attn.q_proj.weight": torch.zeros(32, 32)})
        train(tree, tmp_path / "adapter", target_modules=["q_proj"])
        with pytest.raises(WeightError, match=r"may be .*q_proj\.weight or .*q_proj\.weight; save it"):
            model_of(open_model(tmp_path / "base", adapter=tmp_path / "adapter"))


@pytest.mark.parametrize("case", [*CASES])
def test_modules_are_chosen_as_peft_chooses(case: str, tmp_path: Path) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    written = write_causal_lm_checkpoint(tmp_path / "base")
    names = [name for name, module in written.model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    train(written.model, tmp_path / "adapter", **CASES[case])
    config = LoraConfig.from_pretrained(str(tmp_path / "adapter"))
    ours = Read.read(tmp_path / "adapter/adapter_config.json")
    saved = config.modules_to_save or ()
    for name in names:
        if not any(name.endswith(one) for one in saved):  # those have no adapter
            assert ours.adapts(name) == bool(check_target_module_exists(config, name)), name


def test_a_plain_tower_with_its_adapter_beside_it(tmp_path: Path) -> None:
    written = write_siglip_checkpoint(tmp_path, infix=False)
    train(written.tower, tmp_path, target_modules=["q_proj", "fc2", "patch_embedding"])
    tower, _ = load_vision(open_model(tmp_path), device="cpu", dtype=torch.float32)
    merged = written.tower.get_submodule("encoder.layers.0.mlp.fc2")
    delta = 2 * merged.lora_B["default"].weight @ merged.lora_A["default"].weight
    torch.testing.assert_close(tower.get_parameter("tower.blocks.0.mlp.fc2.weight"), merged.base_layer.weight + delta)
    report = verify(tmp_path, random=1)
    assert report.ok
