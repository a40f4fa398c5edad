"""Whatever a file holds is used, compared or named: heads that are tied and are not, buffers, names with wrappers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_lm_checkpoint import write_causal_lm_checkpoint
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint
from parity_kit import assert_parity, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from two_tower_checkpoint import write_two_tower_checkpoint
from video_llama_3_checkpoint import write_video_llama_3_checkpoint

from siglane.errors import OtherWeights, WeightError
from siglane.families.model import VisionLanguageModel, check_model, load_model, load_vision, stored_dtype
from siglane.families.processor import load_processor
from siglane.families.registry import is_vision_only, vlm_family
from siglane.families.stack import VisionStack
from siglane.families.two_tower import load_two_tower
from siglane.lm.build import build_language_model
from siglane.nn.embedding import VocabParallelEmbedding
from siglane.nn.parallel import TensorParallel
from siglane.nn.plan import Rule, WeightPlan
from siglane.verify import verify
from siglane.weights.export import checkpoint_tensors
from siglane.weights.hub import Checkpoint

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
State = dict[str, torch.Tensor]
IDS = torch.arange(5, 35)


def model_of(folder: Path, **options: Any) -> VisionLanguageModel:
    checkpoint = Checkpoint(folder)
    return load_model(checkpoint, load_processor(checkpoint).config, device="cpu", dtype=torch.float32, **options)


def state_of(folder: Path) -> State:
    checkpoint = Checkpoint(folder)
    if is_vision_only(checkpoint):
        return load_two_tower(checkpoint, device="cpu", dtype=torch.float32).model.state_dict()
    return model_of(folder).state_dict()


def change(file: Path, edit: Callable[[State], State]) -> None:
    save_file({name: one.contiguous().clone() for name, one in edit(load_file(file)).items()}, file)


def renamed(file: Path, rename: Callable[[str], str]) -> None:
    change(file, lambda state: {rename(name): tensor for name, tensor in state.items()})


# how a tied checkpoint is written, the file of its head, the head's and the table's names
TIED: dict[str, tuple[Callable[[Path], Any], str, str, str]] = {
    "Qwen2": (
        partial(write_causal_lm_checkpoint, tied=True), "model.safetensors", "lm_head.weight",
        "model.embed_tokens.weight",
    ),
    "Llama": (
        partial(write_causal_lm_checkpoint, kind="llama", tied=True), "model.safetensors", "lm_head.weight",
        "model.embed_tokens.weight",
    ),
    "NVILA, folders": (
        partial(write_nvila_checkpoint, tied=True), "llm/model.safetensors", "lm_head.weight",
        "model.embed_tokens.weight",
    ),
    "NVILA, hf": (
        partial(write_nvila_checkpoint, tied=True, layout="hf", qwen3=True), "model.safetensors",
        "llm.lm_head.weight", "llm.model.embed_tokens.weight",
    ),
    "LLaVA-OneVision": (
        write_llava_onevision_checkpoint, "model.safetensors", "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
    ),
    "LLaVA-OneVision, names in memory": (
        partial(write_llava_onevision_checkpoint, names="memory"), "model.safetensors", "lm_head.weight",
        "model.language_model.embed_tokens.weight",
    ),
    "Ovis2.5": (
        partial(write_ovis2_5_checkpoint, tied=True), "model.safetensors", "llm.lm_head.weight",
        "llm.model.embed_tokens.weight",
    ),
}  # fmt: skip


class TestAHead:
    @pytest.mark.few("Llama", "NVILA, folders", "LLaVA-OneVision, names in memory", "Ovis2.5")
    @pytest.mark.parametrize("family", TIED)
    def test_that_differs_is_used(self, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write, file, head, table = TIED[family]
        write(tmp_path)
        change(tmp_path / file, lambda state: state | {head: state[table] + 0.1 * torch.randn(state[table].shape)})
        stored = load_file(tmp_path / file)
        model = model_of(tmp_path)
        assert model.language.lm_head is not None
        assert torch.equal(model.language.lm_head.weight, stored[head])
        assert torch.equal(model.language.embed_tokens.weight, stored[table])
        assert not model.config.language.tie_embeddings
        assert [one for one in caplog.messages if "tie_word_embeddings is stated" in one and head in one]
        share = model_of(tmp_path, tp=TensorParallel(1, 2, lambda x: x, lambda x: x)).language.lm_head
        assert share is not None
        assert torch.equal(share.weight, stored[head].chunk(2)[1] if len(stored[head]) % 2 == 0 else stored[head])
        report = verify(tmp_path, random=None if family in ("Qwen2", "Llama") else 1, steps=2)
        assert report.ok
        assert report.first_inexact is None

    @pytest.mark.few("Qwen2", "NVILA, hf", "LLaVA-OneVision")
    @pytest.mark.parametrize("family", TIED)
    def test_that_is_equal_is_tied(self, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write, file, head, table = TIED[family]
        write(tmp_path)
        change(tmp_path / file, lambda state: state | {head: state[table].half().float(), table: state[table].half()})
        model = model_of(tmp_path)  # whatever the storage types
        assert model.language.lm_head is None
        assert model.config.language.tie_embeddings
        assert not [one for one in caplog.messages if "has other values" in one]

    @pytest.mark.few("Llama", "NVILA, folders", "LLaVA-OneVision, names in memory", "Ovis2.5")
    @pytest.mark.parametrize("family", TIED)
    def test_alone_is_the_table_too(self, family: str, tmp_path: Path) -> None:
        """As transformers, which ties the one that is missing to the one that is there."""
        write, file, head, table = TIED[family]
        write(tmp_path)
        expected = state_of(tmp_path)
        change(
            tmp_path / file,
            lambda state: (
                {name: one for name, one in state.items() if name not in (head, table)} | {head: state[table]}
            ),
        )
        found = state_of(tmp_path)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert verify(tmp_path, random=None if family in ("Qwen2", "Llama") else 1, steps=1).ok

    @torch.no_grad()
    def test_is_what_transformers_uses(self, tmp_path: Path) -> None:
        write_causal_lm_checkpoint(tmp_path, tied=True)
        change(
            tmp_path / "model.safetensors",
            lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"].flip(0)},
        )
        reference = AutoModelForCausalLM.from_pretrained(tmp_path)
        model = model_of(tmp_path)
        found = logits(model, model.language.embed(IDS))
        assert_parity("logits", found, reference(input_ids=IDS[None]).logits[0])

    def test_verify_would_see_the_tied_answer(self, tmp_path: Path) -> None:
        """The reference reads the head by its own code: against the tied original it differs."""
        write_causal_lm_checkpoint(tmp_path / "tied", tied=True)
        write_causal_lm_checkpoint(tmp_path / "apart", tied=True)
        change(
            tmp_path / "apart/model.safetensors",
            lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"].flip(0)},
        )
        report = verify(tmp_path / "tied", reference=tmp_path / "apart", steps=2)
        assert report.first_diverging == "logits"

    def test_of_one_parameter_is_refused(self, tmp_path: Path) -> None:
        """nanoVLM's code has one table under two names; no file can mean both."""
        write_nanovlm_checkpoint(tmp_path, names="both")
        name = "decoder.head.weight"
        change(tmp_path / "model.safetensors", lambda state: state | {name: state[name].flip(0)})
        with pytest.raises(OtherWeights, match="to which it is tied"):
            model_of(tmp_path)

    def test_a_host_is_told(self, tmp_path: Path) -> None:
        write, file, head, table = TIED["NVILA, hf"]
        write(tmp_path)
        change(tmp_path / file, lambda state: state | {head: state[table].flip(0)})
        checkpoint = Checkpoint(tmp_path)
        weights = check_model(checkpoint, load_processor(checkpoint).config)
        assert not weights.config.language.tie_embeddings


class TestBuffers:
    POSITIONS = "vision_model.embeddings.position_ids"

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32, torch.float16])
    def test_a_constant_of_any_type_is_left_out(
        self, tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
    ) -> None:
        layer = write_siglip_checkpoint(tmp_path).tower.encoder.layers[0]
        change(tmp_path / "model.safetensors", lambda state: state | {self.POSITIONS: torch.arange(16).to(dtype)[None]})
        tower, _ = load_vision(Checkpoint(tmp_path), device="cpu", dtype=torch.float32)
        assert torch.equal(tower.get_parameter("tower.blocks.0.mlp.fc1.weight"), layer.mlp.fc1.weight)
        assert stored_dtype(Checkpoint(tmp_path)) == torch.float32
        assert not caplog.messages
        assert verify(tmp_path, random=1).ok

    @pytest.mark.parametrize(
        ("family", "file", "name"),
        [
            ("NVILA, folders", "vision_tower/model.safetensors", "vision_model.embeddings.position_ids"),
            ("NVILA, hf", "model.safetensors", "vision_tower.vision_model.embeddings.position_ids"),
            ("LLaVA-OneVision", "model.safetensors", "vision_tower.vision_model.embeddings.position_ids"),
            ("Ovis2.5", "model.safetensors", "visual_tokenizer.vit.vision_model.embeddings.position_ids"),
        ],
    )
    def test_in_every_family(self, tmp_path: Path, family: str, file: str, name: str) -> None:
        TIED[family][0](tmp_path)
        expected = state_of(tmp_path)
        change(tmp_path / file, lambda state: state | {name: torch.arange(16)[None]})
        found = state_of(tmp_path)
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_of_both_towers(self, tmp_path: Path) -> None:
        write_two_tower_checkpoint(tmp_path)
        expected = state_of(tmp_path)
        names = [f"{tower}_model.embeddings.position_ids" for tower in ("text", "vision")]
        change(tmp_path / "model.safetensors", lambda state: state | {name: torch.arange(16)[None] for name in names})
        found = state_of(tmp_path)
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_rotary_frequencies_are_compared(
        self, tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
    ) -> None:
        written = write_causal_lm_checkpoint(tmp_path)
        name = "model.layers.1.self_attn.rotary_emb.inv_freq"
        right = written.model.model.rotary_emb.inv_freq
        change(tmp_path / "model.safetensors", lambda state: state | {name: right.to(dtype)})
        model_of(tmp_path)
        assert not caplog.messages
        change(tmp_path / "model.safetensors", lambda state: state | {name: (right * 1.1).to(dtype)})
        model_of(tmp_path)
        assert [one for one in caplog.messages if name in one and "holds other values" in one]

    def test_other_positions_are_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_siglip_checkpoint(tmp_path)
        change(tmp_path / "model.safetensors", lambda state: state | {self.POSITIONS: torch.arange(16).flip(0)})
        load_vision(Checkpoint(tmp_path), device="cpu", dtype=torch.float32)
        assert [one for one in caplog.messages if self.POSITIONS in one]

    @pytest.mark.parametrize(
        ("name", "tensor", "message"),
        [
            ("vision_model.embeddings.position_embedding.weight", torch.zeros(16, 32, dtype=torch.float8_e4m3fn),
             "is stored as F8_E4M3; siglane reads .*quantised"),
            ("vision_model.encoder.layers.0.mlp.fc1.weight", torch.zeros(40, 32, dtype=torch.uint8),
             "is stored as U8; siglane reads .*quantised"),
            ("vision_model.encoder.layers.0.mlp.fc1.qweight", torch.zeros(40, 4, dtype=torch.int32),
             "is stored as I32; and not known to this model; .*quantised"),
            ("vision_model.bn.num_batches_tracked", torch.tensor(3), "is stored as I64; and not known"),
            ("vision_model.attn.bias", torch.ones(4, 4).bool(), "is stored as BOOL; and not known"),
        ],
    )  # fmt: skip
    def test_what_would_be_used_or_is_unknown_is_refused(
        self, tmp_path: Path, name: str, tensor: torch.Tensor, message: str
    ) -> None:
        write_siglip_checkpoint(tmp_path)
        change(tmp_path / "model.safetensors", lambda state: state | {name: tensor})
        with pytest.raises(WeightError, match=message):
            load_vision(Checkpoint(tmp_path), device="cpu", dtype=torch.float32)

    def test_a_host_that_hands_over_quantised_values(self, tmp_path: Path) -> None:
        from siglane.weights.load import StrictLoad

        module, plan = nn.Linear(2, 2), WeightPlan((Rule("a.{leaf}", "{leaf}"),))
        with pytest.raises(WeightError, match=r"a\.weight is stored as torch\.uint8.*quantised"):
            StrictLoad(plan, module).take("a.weight", torch.zeros(2, 2, dtype=torch.uint8))


def test_a_released_model_has_so_many_tensors() -> None:
    """SmolVLM-256M's file, as it was counted: 471, of which the tower's are 197."""
    checkpoint = Checkpoint(EXAMPLES / "SmolVLM-256M-Instruct")
    family = vlm_family(checkpoint)
    images, language = family.images(checkpoint), family.language(checkpoint)
    assert images is not None
    with torch.device("meta"):
        vision, decoder = VisionStack(images), build_language_model(language)
    seen = checkpoint_tensors(vision, family.vision_plan(images))
    read = checkpoint_tensors(decoder, family.language_plan(language))
    assert sum(name.startswith("model.vision_model.") for name in seen) == 197
    assert len(seen) + len(read) == 471


WRITERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{name: (write, file) for name, (write, file, _, _) in TIED.items()},
    "nanoVLM": (write_nanovlm_checkpoint, "model.safetensors"),
    "SmolVLM2": (write_idefics3_checkpoint, "model.safetensors"),
    "VideoLLaMA3": (write_video_llama_3_checkpoint, "model.safetensors"),
    "VideoLLaMA3, tied": (
        partial(write_video_llama_3_checkpoint, layout="authors", tied=True),
        "model.safetensors",
    ),
    "SigLIP, both towers": (write_two_tower_checkpoint, "model.safetensors"),
    "NaFlex, both towers": (partial(write_two_tower_checkpoint, kind="naflex"), "model.safetensors"),
}
PREFIXES = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "module._orig_mod.": lambda name: f"module._orig_mod.{name}",
    "model._orig_mod.": lambda name: f"model._orig_mod.{name}",
    "_orig_mod. in the middle": lambda name: name.replace("layers.", "layers._orig_mod.").replace(
        "blocks.", "blocks._orig_mod."
    ),
    "each layer compiled": lambda name: re.sub(r"((?:layers|blocks)\.\d+)\.", r"\1._orig_mod.", name),
    "FSDP and checkpointing": lambda name: (
        "_fsdp_wrapped_module."
        + name.replace("self_attn.", "_fsdp_wrapped_module._checkpoint_wrapped_module.self_attn.")
    ),
    "a trainer's attribute": lambda name: f"student.{name}",
    "a model merged but not unloaded": lambda name: f"base_model.model.{name}",
}


class TestNames:
    @pytest.mark.few("Qwen2-*", "SmolVLM2-_orig_mod.", "SmolVLM2-a trainer's attribute")
    @pytest.mark.parametrize("prefix", PREFIXES)
    @pytest.mark.parametrize("family", ["Qwen2", "SmolVLM2"])  # the others below, with two of the prefixes at once
    def test_without_a_wrapper(
        self, family: str, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write, file = WRITERS[family]
        write(tmp_path)
        expected = state_of(tmp_path)
        caplog.clear()
        renamed(tmp_path / file, PREFIXES[prefix])
        found = state_of(tmp_path)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert len([one for one in caplog.messages if "without a wrapper's name" in one]) == 1

    @pytest.mark.few(
        "Qwen2", "NVILA, folders", "LLaVA-OneVision, names in memory", "Ovis2.5", "nanoVLM", "VideoLLaMA3, tied",
        "NaFlex, both towers",
    )  # fmt: skip
    @pytest.mark.parametrize("family", WRITERS)
    def test_in_every_family(self, family: str, tmp_path: Path) -> None:
        write, file = WRITERS[family]
        write(tmp_path)
        expected = state_of(tmp_path)
        renamed(tmp_path / file, PREFIXES["module._orig_mod."])
        found = state_of(tmp_path)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert verify(tmp_path, random=None if family in ("Qwen2", "Llama") else 1, steps=1).ok

    def test_a_language_model_compiled_inside(self, tmp_path: Path) -> None:
        """`model.model = torch.compile(model.model)`: here `model.` is the model's own name."""
        write_causal_lm_checkpoint(tmp_path, tied=True)
        expected = state_of(tmp_path)
        renamed(tmp_path / "model.safetensors", lambda name: name.replace("model.", "model._orig_mod.", 1))
        found = state_of(tmp_path)
        assert all(torch.equal(found[key], expected[key]) for key in expected)

    def test_a_tower_alone(self, tmp_path: Path) -> None:
        written = write_siglip_checkpoint(tmp_path, full=True)
        renamed(tmp_path / "model.safetensors", lambda name: f"module.{name}")
        tower, _ = load_vision(Checkpoint(tmp_path), device="cpu", dtype=torch.float32)
        assert torch.equal(
            tower.get_parameter("tower.blocks.0.mlp.fc1.weight"), written.tower.encoder.layers[0].mlp.fc1.weight
        )

    def test_one_that_leaves_nothing_known(self, tmp_path: Path) -> None:
        write_causal_lm_checkpoint(tmp_path)
        renamed(tmp_path / "model.safetensors", lambda name: f"_orig_mod.{name.replace('.', '_')}")
        with pytest.raises(WeightError, match=r"'_orig_mod' is what a training's wrapper .*save the state_dict"):
            model_of(tmp_path)

    def test_two_that_become_one(self, tmp_path: Path) -> None:
        write_causal_lm_checkpoint(tmp_path)
        name = "model.norm.weight"
        change(tmp_path / "model.safetensors", lambda state: state | {f"module.{name}": state[name] + 1})
        with pytest.raises(WeightError, match=rf"'module\.{name}' and '{name}' are one tensor .*keep one of them"):
            model_of(tmp_path)

    def test_an_unknown_tensor_is_named_without_it(self, tmp_path: Path) -> None:
        write_causal_lm_checkpoint(tmp_path)
        change(tmp_path / "model.safetensors", lambda state: state | {"model.surprise": torch.ones(2)})
        renamed(tmp_path / "model.safetensors", lambda name: f"module.{name}")
        with pytest.raises(WeightError, match=r"tensor model\.surprise is not known to this model"):
            model_of(tmp_path)


def test_a_shard_is_not_exported(tmp_path: Path) -> None:
    """One rank's part is no checkpoint."""
    write_causal_lm_checkpoint(tmp_path)
    plan = vlm_family(Checkpoint(tmp_path)).plan(load_processor(Checkpoint(tmp_path)).config)
    assert "lm_head.weight" in checkpoint_tensors(model_of(tmp_path), plan)
    share = model_of(tmp_path, tp=TensorParallel(0, 2, lambda x: x, lambda x: x))
    with pytest.raises(ValueError, match=r"language\.embed_tokens\.weight is a shard: rank 0 of 2"):
        checkpoint_tensors(share, plan)


def test_what_does_not_divide_is_whole_and_exported() -> None:
    table = VocabParallelEmbedding(5, 4, TensorParallel(1, 2, lambda x: x, lambda x: x))
    nn.init.normal_(table.weight)
    plan = WeightPlan((Rule("table.weight", "weight"),))
    assert torch.equal(checkpoint_tensors(table, plan)["table.weight"], table.weight)


def test_the_log_is_quiet_about_an_ordinary_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_causal_lm_checkpoint(tmp_path)
    with caplog.at_level(logging.INFO, "siglane"):
        model_of(tmp_path)
    assert not caplog.messages
