"""Strict loading: every tensor and parameter accounted for, broken files named, nothing allocated too soon."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Written, write_nvila_checkpoint
from safetensors.torch import load_file, save_file

from siglane.errors import ConfigError, SiglaneError, WeightError
from siglane.families.model import VisionLanguageModel, load_model, load_vision
from siglane.families.nvila import Nvila
from siglane.families.processor import load_processor
from siglane.families.stack import VisionStack
from siglane.nn.cpu.product import linear
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Destination, Elsewhere, Ignore, Rule, WeightPlan
from siglane.vision.tower import tower_plan
from siglane.weights.hub import open_checkpoint
from siglane.weights.load import StrictLoad, stored_tensors

State = dict[str, torch.Tensor]


def load(folder: Path, **options: Any) -> VisionLanguageModel:
    checkpoint = open_checkpoint(folder)
    config = load_processor(checkpoint).config
    return load_model(checkpoint, config, device="cpu", dtype=torch.float32, **options)


def change(folder: Path, part: str, edit: Callable[[State], object]) -> None:
    file = folder / part / "model.safetensors"
    state = load_file(file)
    edit(state)
    save_file(state, file)


def change_config(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.fixture
def written(tmp_path: Path) -> Written:
    return write_nvila_checkpoint(tmp_path / "model", tied=True)


def test_sharded_and_whole_files_give_the_same_model(tmp_path: Path) -> None:
    models = []
    for name, sharded in (("whole", False), ("sharded", True)):
        write_nvila_checkpoint(tmp_path / name, sharded=sharded)
        models.append(load(tmp_path / name))
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_stored_types_are_cast(tmp_path: Path) -> None:
    write_nvila_checkpoint(tmp_path, dtype=torch.bfloat16)
    model = load(tmp_path)
    stored = load_file(tmp_path / "llm/model.safetensors")["model.norm.weight"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(model.language.norm.weight, stored.float())


def test_a_tied_head_is_not_kept_twice(written: Written) -> None:
    model = load(written.folder)
    assert model.language.lm_head is None
    hidden = torch.randn(3, 48)
    assert torch.equal(model.language.logits(hidden), linear(hidden, model.language.embed_tokens.weight))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_keeps_its_share(written: Written, rank: int) -> None:
    whole = load(written.folder)
    share = load(written.folder, tp=TensorParallel(rank, 2, lambda x: x, lambda x: x))
    name = "vision.encoder.tower.blocks.0.attention.qkv.weight"
    rows = whole.get_parameter(name)[rank * 16 : (rank + 1) * 16]
    assert torch.equal(share.get_parameter(name)[:16], rows)
    name = "language.blocks.1.mlp.gate_up.weight"
    gate, up = whole.get_parameter(name).split(56)
    assert torch.equal(share.get_parameter(name), torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]]))


class TestEveryTensorCounts:
    def fails(self, folder: Path, message: str) -> None:
        with pytest.raises(WeightError, match=message):
            load(folder)

    def test_one_too_many(self, written: Written) -> None:
        change(written.folder, "llm", lambda state: state.update({"model.extra.weight": torch.ones(2)}))
        self.fails(written.folder, r"llm/model.safetensors: tensor llm.model.extra.weight is not known to this model")

    def test_a_layer_too_many(self, written: Written) -> None:
        change_config(written.folder / "llm/config.json", num_hidden_layers=1)
        self.fails(written.folder, r"tensor llm.model.layers.1.\S+ has no parameter to fill \(language.blocks.1")

    def test_a_projector_bias_too_many(self, written: Written) -> None:
        change(written.folder, "mm_projector", lambda state: state.update({"layers.9.bias": torch.ones(2)}))
        self.fails(written.folder, "tensor mm_projector.layers.9.bias is not known")

    def test_some_missing(self, written: Written) -> None:
        change(written.folder, "llm", lambda state: [state.pop(k) for k in list(state) if "layers.1.self_attn" in k])
        self.fails(
            written.folder,
            r"missing: language.blocks.1.attention.qkv.weight \(q\), language.blocks.1.attention.qkv.weight \(k\).* "
            "and 2 more$",
        )

    def test_a_whole_half_missing(self, written: Written) -> None:
        change(written.folder, "vision_tower", lambda state: [state.pop(k) for k in list(state) if "q_proj.bias" in k])
        self.fails(
            written.folder,
            r"missing: vision.encoder.tower.blocks.0.attention.qkv.bias \(q\), vision.encoder.tower.blocks.1",
        )

    def test_another_shape(self, written: Written) -> None:
        change(written.folder, "llm", lambda state: state.update({"model.norm.weight": torch.ones(47)}))
        self.fails(
            written.folder,
            r"llm/model.safetensors: tensor llm.model.norm.weight has shape \[47\], the model needs \[48\]",
        )

    def test_another_shape_of_a_fused_part(self, written: Written) -> None:
        key = "model.layers.0.self_attn.k_proj.weight"
        change(written.folder, "llm", lambda state: state.update({key: torch.ones(48, 48)}))
        self.fails(written.folder, rf"tensor llm.{key} has shape \[48, 48\], the model needs \[24, 48\]")

    def test_the_same_twice(self, written: Written) -> None:
        key = "encoder.layers.0.mlp.fc1.bias"
        change(written.folder, "vision_tower", lambda state: state.update({key: torch.ones(40)}))
        self.fails(
            written.folder, "comes twice: vision_tower.(vision_model.)?encoder.layers.0.mlp.fc1.bias already filled"
        )

    def test_a_head_that_is_not_tied_must_be_there(self, written: Written) -> None:
        change_config(written.folder / "llm/config.json", tie_word_embeddings=False)
        change(written.folder, "llm", lambda state: state.pop("lm_head.weight"))
        self.fails(written.folder, "missing: language.lm_head.weight$")

    def test_quantised_weights(self, written: Written) -> None:
        key = "model.layers.0.mlp.up_proj.weight"
        change(written.folder, "llm", lambda state: state.update({key: state[key].to(torch.float8_e4m3fn)}))
        self.fails(written.folder, f"tensor {key} is stored as F8_E4M3; .*quantised checkpoints are not supported")

    def test_unused_ones_are_ignored_with_a_reason(self, written: Written) -> None:
        change(
            written.folder, "vision_tower",
            lambda state: state.update({"vision_model.embeddings.position_ids": torch.arange(16.0)[None]}),
        )  # fmt: skip
        checkpoint = open_checkpoint(written.folder)
        config = load_processor(checkpoint).config
        plan = Nvila().vision_plan(config.images)
        stack = load_vision(checkpoint, device="cpu", dtype=torch.float32)[0]
        with StrictLoad(plan, stack) as strict:
            for tensor in stored_tensors(Nvila().vision_sources(checkpoint)):
                strict.take(tensor.name, torch.zeros(tensor.shape))
        reasons = dict(strict.ignored)
        assert reasons["vision_tower.vision_model.embeddings.position_ids"] == "a constant buffer of older versions"
        assert reasons["vision_tower.vision_model.post_layernorm.weight"].endswith("before the last norm")
        assert reasons["vision_tower.vision_model.head.probe"] == "the pooling head is not used"
        assert reasons["vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias"].endswith("before this block")


class TestBrokenFiles:
    """Each names the file and says what to do."""

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda data: data[: len(data) // 2], "is not a usable safetensors file: .*holds [0-9]+ bytes; download"),
            (lambda data: b"", "it is empty; download it again"),
            (lambda data: b"\0" * 64, "is not a usable safetensors file"),
            (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "Git LFS pointer.*git lfs pull"),
            (lambda data: b"\xff" * 8 + data[8:], "is not a usable safetensors file: .*header"),
        ],
    )  # fmt: skip
    def test_damage(self, written: Written, damage: Callable[[bytes], bytes], message: str) -> None:
        file = written.folder / "llm/model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(WeightError, match=message) as caught:
            load(written.folder)
        assert str(file) in str(caught.value)

    def test_pickles_are_refused(self, written: Written) -> None:
        file = written.folder / "mm_projector/model.safetensors"
        file.rename(file.with_name("pytorch_model.bin"))
        with pytest.raises(WeightError, match=r"only pickled weights .pytorch_model\.bin.*convert them"):
            load(written.folder)

    def test_no_weights_at_all(self, written: Written) -> None:
        (written.folder / "mm_projector/model.safetensors").unlink()
        with pytest.raises(WeightError, match=r"mm_projector holds no .*safetensors file"):
            load(written.folder)

    def test_a_shard_that_is_not_there(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path, sharded=True)
        (tmp_path / "llm/model-00002-of-00002.safetensors").unlink()
        with pytest.raises(WeightError, match=r"lists model-00002-of-00002\.safetensors, which is not in the folder"):
            load(tmp_path)

    def test_an_index_that_points_outside(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path, sharded=True)
        change_config(tmp_path / "llm/model.safetensors.index.json", weight_map={"a": "../secret.safetensors"})
        with pytest.raises(WeightError, match="which is not in the folder"):
            load(tmp_path)

    def test_an_index_and_a_shard_that_disagree(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path, sharded=True)
        index = tmp_path / "llm/model.safetensors.index.json"
        weight_map = json.loads(index.read_text())["weight_map"]
        weight_map["model.another.weight"] = "model-00001-of-00002.safetensors"
        change_config(index, weight_map=weight_map)
        with pytest.raises(
            WeightError, match=r"disagree: tensor model.another.weight is in the index, not in the file"
        ):
            load(tmp_path)

    def test_shards_without_an_index_are_read(self, tmp_path: Path) -> None:
        write_nvila_checkpoint(tmp_path, sharded=True)
        (tmp_path / "llm/model.safetensors.index.json").unlink()
        load(tmp_path)


class TestSizesAreCheckedBeforeMemoryIsTaken:
    """Each of these would need terabytes, or minutes, if it were built."""

    @pytest.mark.parametrize(
        ("file", "keys", "error"),
        [
            ("llm/config.json", {"hidden_size": 10**7, "head_dim": 12}, WeightError),
            ("llm/config.json", {"hidden_size": 10**12, "head_dim": 12}, ConfigError),
            ("llm/config.json", {"vocab_size": 10**7}, WeightError),
            ("llm/config.json", {"intermediate_size": 10**7}, WeightError),
            ("llm/config.json", {"num_hidden_layers": 10**7}, ConfigError),
            ("llm/config.json", {"num_hidden_layers": -3}, ConfigError),
            ("llm/config.json", {"head_dim": 1 << 23, "num_attention_heads": 1 << 23}, SiglaneError),
            ("llm/config.json", {"rms_norm_eps": float("nan")}, ConfigError),
            ("vision_tower/config.json", {"num_hidden_layers": 10**7}, ConfigError),
            ("vision_tower/config.json", {"intermediate_size": 10**7}, WeightError),
            ("vision_tower/config.json", {"hidden_size": 10**7}, SiglaneError),
        ],
    )
    def test_refused(self, written: Written, file: str, keys: dict[str, Any], error: type[SiglaneError]) -> None:
        change_config(written.folder / file, **keys)
        change_config(written.folder / "config.json", mm_hidden_size=None)
        start = time.process_time()
        with pytest.raises(error):
            load(written.folder)
        assert time.process_time() - start < 2


class TestPlan:
    plan = WeightPlan(
        (
            Ignore("old.{rest}", "not used"),
            Rule("[m.]layers.{i}.q.{leaf}", "blocks.{i}.qkv.{leaf}", "q"),
            Elsewhere("llm."),
        )
    )

    @pytest.mark.parametrize("name", ["layers.12.q.weight", "m.layers.12.q.weight"])
    def test_rules(self, name: str) -> None:
        assert self.plan.find(name) == Destination("blocks.12.qkv.weight", "q")

    @pytest.mark.parametrize("name", ["layers.x.q.weight", "layers.1.q.scale", "xlayers.1.q.bias", "layers.1.q.bias.x"])
    def test_a_rule_matches_whole_names(self, name: str) -> None:
        assert self.plan.find(name) is None

    def test_prefixes(self) -> None:
        moved = self.plan.under("tower.", "vision.")
        assert moved.find("tower.m.layers.0.q.bias") == Destination("vision.blocks.0.qkv.bias", "q")
        assert moved.find("tower.llm.a") == Elsewhere("tower.llm.")
        assert isinstance(moved.find("tower.old.thing"), Ignore)
        assert moved.find("layers.0.q.bias") is None

    def test_a_tower_read_early_ignores_what_it_does_not_run(self, written: Written) -> None:
        config = load_processor(open_checkpoint(written.folder)).facts.vision
        plan = tower_plan(config)
        assert isinstance(plan.find("vision_model.encoder.layers.2.mlp.fc1.bias"), Ignore)
        assert isinstance(plan.find("encoder.layers.3.mlp.fc1.bias"), Destination)  # the tower has no such block


def test_a_host_gets_what_is_not_ours(tmp_path: Path) -> None:
    """One pass over an iterator, as SGLang's `load_weights` makes it."""
    write_nvila_checkpoint(tmp_path, layout="hf")
    checkpoint = open_checkpoint(tmp_path)
    config = load_processor(checkpoint).config
    family = Nvila()
    stack = VisionStack(config.images)
    plan = family.vision_plan(config.images) + WeightPlan((Elsewhere(family.language_prefix),))
    with StrictLoad(plan, stack) as strict:
        passed_on = dict(strict.route(load_file(tmp_path / "model.safetensors").items()))
    assert all(name.startswith(("model.", "lm_head.")) for name in passed_on)
    assert "model.embed_tokens.weight" in passed_on
    ours, _ = load_vision(checkpoint, device="cpu", dtype=torch.float32)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in stack.state_dict().items())
    with pytest.raises(WeightError, match="missing"), StrictLoad(plan, stack) as strict:
        list(strict.route([]))
    with pytest.raises(KeyError), StrictLoad(plan, stack):  # an error in the block is not hidden by what is missing
        raise KeyError("host")
