"""Weights that are not what they were stop SGLang's start, and it says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from host_broken import BROKEN, break_behind_view
from host_cases import Picture, ask_siglane, write_checkpoint
from safetensors.torch import load_file, save_file
from sglang_cases import ask_sglang, compare, serve, served
from sglang_host import HostError, sglang_engine

from siglane.errors import WeightError
from siglane.families.model import model_tensors
from siglane.families.processor import load_processor
from siglane.families.registry import vlm_family
from siglane.families.stack import VisionStack
from siglane.hosts.weights import full_names, language_tensors
from siglane.weights.hub import Checkpoint
from siglane.weights.load import StrictLoad


@pytest.mark.parametrize("what", BROKEN)
def test_a_checkpoint_broken_behind_its_view_stops_the_start(what: str, tmp_path: Path) -> None:
    served = serve("vila", tmp_path)
    message = break_behind_view(served.folder, what)
    with pytest.raises(HostError) as stopped, sglang_engine(served.view, env=served.env):
        pass
    assert message in str(stopped.value)


def test_an_adapter_beside_the_weights_is_merged(tmp_path: Path) -> None:
    """Into tower and language model alike; without it the answers are others."""
    write_checkpoint("vila", tmp_path / "vila")
    cases = [(Picture(90, 60, 1), "\n", "Describe the picture."), ("What is in the image?",)]
    plain = ask_siglane(tmp_path / "vila", cases)
    write_adapter(tmp_path / "vila", ("llm.model.layers.{}.self_attn.q_proj", "vision_tower.encoder.layers.{}.mlp.fc1"))
    one = served(tmp_path / "vila", tmp_path / "views", {})
    expected = ask_siglane(one.folder, cases)
    assert [answer.output_token_ids for answer in expected] != [answer.output_token_ids for answer in plain]
    with sglang_engine(one.folder, env=one.env) as engine:
        compare(ask_sglang(engine, [one.request(case) for case in cases]), expected, ["picture", "text"])
        engine.load_weights(one.view)
        compare(ask_sglang(engine, [one.request(case) for case in cases]), expected, ["picture", "text"])


def write_adapter(folder: Path, modules: tuple[str, ...]) -> None:
    """A LoRA of two layers of each of `modules`, as PEFT writes it."""
    shapes = {tensor.name.replace("vision_model.", ""): tensor.shape for tensor in model_tensors(Checkpoint(folder))}
    generator, state = torch.Generator().manual_seed(0), {}
    for module in (name.format(layer) for name in modules for layer in range(2)):
        rows, columns = shapes[f"{module}.weight"]
        state[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, columns, generator=generator)
        state[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * 0.3
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "fc1"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_a_tensor_that_sglang_leaves_out_is_missed(tmp_path: Path) -> None:
    """SGLang's language models fill what they are given and ask for nothing."""
    write_checkpoint("vila", tmp_path / "vila")
    checkpoint = Checkpoint(tmp_path / "vila")
    family, config = vlm_family(checkpoint), load_processor(checkpoint).config
    names = full_names(checkpoint)
    tensors = {tensor.key: load_file(tensor.file)[tensor.key] for tensor in model_tensors(checkpoint)}
    left_out = "model.layers.1.self_attn.q_proj.weight"

    def read(weights: dict[str, torch.Tensor], *, whole: bool) -> dict[str, torch.Tensor]:
        load = StrictLoad(family.vision_plan(config.images), VisionStack(config.images))
        return dict(language_tensors(weights.items(), names, load, family, config, whole=whole))

    assert left_out in read(tensors, whole=True)
    del tensors[left_out]
    assert left_out not in read(tensors, whole=False)
    with pytest.raises(WeightError, match=rf"read {len(tensors)} of {len(tensors) + 1} tensors, not llm\.{left_out}"):
        read(tensors, whole=True)
