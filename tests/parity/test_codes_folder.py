"""Folders that `siglane quantize` writes: the same numbers, bit for bit, as fewer bits at load of the original."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapter_kit import train
from causal_lm_checkpoint import EXPERTS, write_causal_lm_checkpoint
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint, write_relative
from llava_qwen_checkpoint import write_llava_qwen_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint, write_ovis2_6_checkpoint
from parity_kit import logits, patches_of, picture, spliced
from safetensors.torch import load_file, save_file
from test_visual_vocabulary import Ranks
from two_tower_checkpoint import write_two_tower_checkpoint
from video_llama_3_checkpoint import write_video_llama_3_checkpoint

from siglane import LLM, Tagger
from siglane.errors import ConfigError, SiglaneError, UserError, WeightError
from siglane.families import codes_folder
from siglane.families.codes_folder import write_folder
from siglane.families.model import check_model, load_model, load_vision
from siglane.families.processor import load_processor
from siglane.families.registry import is_vision_only
from siglane.nn.parallel import TensorParallel
from siglane.nn.quantise import Bits
from siglane.types import DecodedImage, ImagePart, Message, SamplingParams
from siglane.verify import verify
from siglane.verify.runner import SiglaneRunner
from siglane.verify.stages import TEXTS, Trace
from siglane.weights.demo import open_model
from siglane.weights.hub import Checkpoint, open_checkpoint

CPU = torch.device("cpu")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
Write = Callable[[Path], Any]
CHAT: dict[str, Write] = {
    "NVILA, folders": write_nvila_checkpoint,
    "NVILA, hf, Qwen3": partial(write_nvila_checkpoint, layout="hf", lite=False, qwen3=True, sharded=True),
    "LLaVA-OneVision, tied": partial(write_llava_onevision_checkpoint, tied=True),
    "Bee": partial(write_relative, name="bee"),
    "LLaVA, its tower beside it": partial(write_llava_qwen_checkpoint, tower="beside"),
    "nanoVLM": partial(write_nanovlm_checkpoint, names="untied", own_tokenizer=False),
    "nanoVLM, stored as bfloat16": partial(write_nanovlm_checkpoint, dtype=torch.bfloat16),
    "SmolVLM2": write_idefics3_checkpoint,
    "docling's, tied": partial(write_idefics3_checkpoint, kind="docling"),
    "Ovis2.5": write_ovis2_5_checkpoint,
    "VideoLLaMA3": write_video_llama_3_checkpoint,
    "VideoLLaMA3, the authors', tied": partial(write_video_llama_3_checkpoint, layout="authors", tied=True),
    "Qwen2 alone": write_causal_lm_checkpoint,
    "Llama alone, tied": partial(write_causal_lm_checkpoint, kind="llama", tied=True),
    "Qwen3-MoE alone": partial(write_causal_lm_checkpoint, kind="qwen3_moe", **EXPERTS),
    "Ovis2.6 with experts": partial(write_ovis2_6_checkpoint, moe=True),
}
TWO_TOWERS: dict[str, Write] = {
    "SigLIP": write_two_tower_checkpoint,
    "SigLIP2 NaFlex": partial(write_two_tower_checkpoint, kind="naflex"),
}
# a family's names are those of its 8-bit folder; 4 bits are tried with a tower of each kind and a language model alone
IN_FOUR, SELDOM = ("NVILA, folders", "Ovis2.5", "Qwen2 alone", "SigLIP2 NaFlex"), pytest.mark.slow
EITHER_BITS = pytest.mark.parametrize("bits", ["8bit", "4bit"])


def trace(checkpoint: Checkpoint, bits: Bits | None, dtype: torch.dtype = torch.float32) -> Trace:
    """Every stage of one request."""
    plain = is_vision_only(checkpoint)
    ours = SiglaneRunner(checkpoint, CPU, dtype, with_texts=plain, quantization=bits)
    images = [] if ours.encoder is None else [DecodedImage.from_rgb(np.array(picture(70, 90)))]
    found = ours.run(ours.patches(images) if images else [], "What is it?", 4)
    return found | ours.read(TEXTS)


def quantised(source: Path | Checkpoint, folder: Path, bits: Bits = "8bit") -> Checkpoint:
    write_folder(source if isinstance(source, Checkpoint) else open_checkpoint(source), folder, bits)
    return open_checkpoint(folder)


def assert_equal(found: Trace, expected: Trace) -> None:
    assert found.keys() == expected.keys()
    assert len(found) > 5
    for stage, values in expected.items():
        assert torch.equal(found[stage], values), stage


@pytest.mark.few(
    "NVILA, folders, *", "LLaVA-OneVision, tied, 8bit", "Bee, 8bit", "LLaVA, its tower beside it, 8bit",
    "nanoVLM, 8bit", "SmolVLM2, 8bit", "Ovis2.5, *bit", "VideoLLaMA3, the authors', tied, 8bit", "Qwen2 alone, 4bit",
    "Llama alone, tied, 8bit", "Ovis2.6 with experts, 8bit", "SigLIP, 8bit", "SigLIP2 NaFlex, 4bit",
)  # fmt: skip
@pytest.mark.parametrize(
    ("write", "bits"),
    [
        pytest.param(write, bits, id=f"{name}, {bits}", marks=SELDOM if bits == "4bit" and name not in IN_FOUR else ())
        for name, write in (CHAT | TWO_TOWERS).items()
        for bits in ("8bit", "4bit")
    ],
)
def test_a_folder_is_the_original_with_fewer_bits(write: Write, bits: Bits, tmp_path: Path) -> None:
    write(tmp_path / "model")
    expected = trace(open_checkpoint(tmp_path / "model"), bits)
    folder = quantised(tmp_path / "model", tmp_path / "small", bits)
    shutil.rmtree(tmp_path / "model")  # nothing of it is read any more
    assert_equal(trace(folder, None), expected)
    assert_equal(trace(folder, bits), expected)
    section = json.loads(folder.path(CONFIG).read_text())["quantization_config"]
    grouped = {"group_size": 32} if bits == "4bit" else {}
    stated = {"quant_method": "siglane", "format_version": 1, "bits": int(bits[0]), **grouped}
    assert section == stated | {"rotated": not is_vision_only(folder)}


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_reads_its_file_no_more(tied: bool, tmp_path: Path) -> None:
    write_llava_onevision_checkpoint(tmp_path / "model", tied=tied)
    folder = quantised(tmp_path / "model", tmp_path / "small")
    ours = SiglaneRunner(folder, CPU, torch.float32)
    patches = ours.patches([DecodedImage.from_rgb(np.array(picture(70, 90)))])
    expected = ours.run(patches, "What is it?", 4)
    with folder.path(WEIGHTS).open("r+b") as stream:
        stream.write(bytes(folder.path(WEIGHTS).stat().st_size))
    assert_equal(ours.run(patches, "What is it?", 4), expected)


def test_floats_take_another_dtype(tmp_path: Path) -> None:
    """Codes are those of float32; what is computed beside them follows the dtype asked for."""
    write_nvila_checkpoint(tmp_path / "model")
    folder = quantised(tmp_path / "model", tmp_path / "small")
    exact, half = trace(folder, None), trace(folder, None, torch.bfloat16)
    assert half["logits"].dtype == torch.bfloat16
    for stage in ("projector", "logits"):
        assert F.cosine_similarity(half[stage].float(), exact[stage]).mean() > 0.99


def test_an_adapter_is_merged_before(tmp_path: Path) -> None:
    write_causal_lm_checkpoint(tmp_path / "model")
    write_causal_lm_checkpoint(tmp_path / "copy")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    train(model, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    with_adapter = open_model(tmp_path / "model", adapter=tmp_path / "adapter")
    folder = quantised(with_adapter, tmp_path / "small")
    assert_equal(trace(folder, None), trace(with_adapter, "8bit"))
    assert not torch.equal(trace(folder, None)["logits"], trace(open_checkpoint(tmp_path / "model"), "8bit")["logits"])
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the model's own; merge the adapter"):
        write_folder(with_adapter, tmp_path / "other", "8bit")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, nvila_folder: Path) -> Path:
    """An NVILA of 8 bits; nobody writes to it."""
    return quantised(nvila_folder, tmp_path_factory.mktemp("codes") / "small").root


def test_answers_and_files(small: Path, nvila_folder: Path) -> None:
    params = SamplingParams(max_tokens=8, logprobs=2, ignore_eos=True)
    request = {"prompt": "What is it?", "images": [picture(50, 70)]}
    options = {"device": "cpu", "kv_tokens": 2048}
    (found,), (expected,) = (
        llm.generate(request, params)
        for llm in (LLM(small, **options), LLM(nvila_folder, quantization="8bit", **options))
    )
    assert found.text == expected.text
    assert found.logprobs == expected.logprobs
    names = {str(path.relative_to(nvila_folder)) for path in nvila_folder.rglob("*.json")}
    assert names == {str(path.relative_to(small)) for path in small.rglob("*.json")}
    for name in names - {CONFIG}:
        assert (small / name).read_bytes() == (nvila_folder / name).read_bytes()
    assert [path.name for path in small.rglob("*.safetensors")] == [WEIGHTS]
    tensors = load_file(small / WEIGHTS)
    assert tensors["vision.encoder.tower.patch_embedding.weight"].dtype == torch.float32
    assert tensors["language.norm.weight"].dtype == torch.bfloat16  # all ones: the narrowest that holds them exactly
    assert tensors["language.blocks.0.mlp.down_proj.codes"].dtype == torch.int8


@EITHER_BITS
def test_tags(bits: Bits, tmp_path: Path) -> None:
    write_two_tower_checkpoint(tmp_path / "model")
    quantised(tmp_path / "model", tmp_path / "small", bits)
    labels, images = ["a cat", "a dog", "a bird"], [picture(60, 60), picture(33, 80, seed=1)]
    options = {"device": "cpu", "cache": tmp_path / "cache"}
    found = Tagger(tmp_path / "small", **options)
    expected = Tagger(tmp_path / "model", quantization=bits, **options)
    assert torch.equal(found.scores(images, labels), expected.scores(images, labels))


def test_what_has_no_use_for_codes(small: Path, tmp_path: Path) -> None:
    """Each a single sentence that names the folder and what to do."""
    folder, single = open_checkpoint(small), TensorParallel.single()
    config = load_processor(folder).config
    adapted = Checkpoint(small, adapter=tmp_path)
    load = partial(load_model, config=config, dtype=torch.float32)
    attempts: dict[str, Callable[[], Any]] = {
        "is quantised already, by siglane": lambda: write_folder(folder, tmp_path / "again", "4bit"),
        "for 4bit give the original model": lambda: load(folder, device="cpu", quantization="4bit"),
        "no adapter can be merged; give the original": lambda: load(adapted, device="cpu"),
        "which CPUs read, not cuda": lambda: load(folder, device="cuda"),
        "not cut over 2 ranks": lambda: load(
            folder, device="cpu", tp=TensorParallel(0, 2, single.all_reduce, single.all_gather)
        ),
        "LLM read; give the original model": lambda: check_model(folder, config),  # as hosts do
        "LLM read; give the original": lambda: load_vision(folder, device="cpu", dtype=torch.float32),
        "LLM read; give": lambda: verify(small),
    }
    for words, attempt in attempts.items():
        with pytest.raises(UserError) as error:
            attempt()
        assert words in error.value.message
        assert str(small) in error.value.message
        assert "; " in error.value.message
        assert "\n" not in error.value.message
    assert not (tmp_path / "again").exists()


def copied(small: Path, folder: Path, **changes: Any) -> Checkpoint:
    """changes: of `quantization_config`."""
    shutil.copytree(small, folder)
    config = json.loads((folder / CONFIG).read_text())
    config["quantization_config"] |= changes
    (folder / CONFIG).write_text(json.dumps(config))
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "format version 2, this siglane reads 1"),
        ({"bits": 3}, "bits 3 is not known"),
        ({"bits": 4, "group_size": 48}, "group_size 48 is not known"),
        ({"rotated": False}, "rotated must be True for this model"),
        ({"format_version": "1"}, "format_version must be int"),
    ],
)
def test_what_is_stated_is_checked(small: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = copied(small, tmp_path / "model", **changes)
    with pytest.raises(ConfigError, match=words):
        trace(folder, None)


def test_tensors_are_checked(small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path / "model")
    tensors = load_file(small / WEIGHTS)
    table, norm = "language.embed_tokens.codes", "language.norm.weight"
    for changed, words in (
        ({name: tensor for name, tensor in tensors.items() if name != norm}, f"{norm} is missing"),
        (tensors | {"language.extra": tensors[norm].clone()}, "language.extra is not known to this model"),
        (tensors | {table: tensors[table][1:].contiguous()}, f"{table} is torch.int8"),
        (tensors | {table: tensors[table].float()}, f"{table} is torch.float32"),
        (tensors | {norm: tensors[norm].to(torch.int8)}, f"{norm} is torch.int8, .* the model needs floats"),
    ):
        save_file(changed, folder.path(WEIGHTS))
        with pytest.raises(WeightError, match=words):
            trace(folder, None)
    folder.path(WEIGHTS).write_bytes((small / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(WeightError, match="not a usable safetensors file"):
        trace(folder, None)
    folder.path(WEIGHTS).unlink()
    with pytest.raises(WeightError):
        trace(folder, None)


def test_checksums_are_compared(small: Path, tmp_path: Path) -> None:
    folder = copied(small, tmp_path / "model")
    folder.path("SHA256SUMS").write_text(f"{'0' * 64}  {WEIGHTS}\n")
    with pytest.raises(WeightError, match="is damaged"):
        trace(folder, None)
    with pytest.raises(WeightError, match="has no checksum"):
        trace(Checkpoint(small, verify=True), None)


def test_nothing_half_written_is_left(nvila_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpoint, output = open_checkpoint(nvila_folder), tmp_path / "small"
    with monkeypatch.context() as patch:
        patch.setattr(codes_folder, "write_model", full)
        with pytest.raises(UserError, match=f"cannot write {output}: No space left on device"):
            write_folder(checkpoint, output, "8bit")
    assert not list(tmp_path.iterdir())
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists; give a folder that does not"):
        write_folder(checkpoint, output, "8bit")
    (output / "notes.txt").unlink()
    write_folder(checkpoint, output, "8bit")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


KILLED = """
import os, signal, sys
from pathlib import Path
from siglane.families import codes
from siglane.families.codes_folder import write_folder
from siglane.weights.hub import open_checkpoint

def half(tensors):
    for number, pair in enumerate(tensors):
        if number == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        yield pair

whole = codes.write_codes
codes.write_codes = lambda path, specs, tensors: whole(path, specs, half(tensors))
write_folder(open_checkpoint(sys.argv[1]), Path(sys.argv[2]), "8bit")
"""


@pytest.mark.slow  # a process is started and killed
def test_killed_half_way(nvila_folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", KILLED, str(nvila_folder), str(tmp_path / "small")]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(".small.")
    assert (part / WEIGHTS).stat().st_size > 0
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        LLM(part, device="cpu")
    write_folder(open_checkpoint(nvila_folder), tmp_path / "small", "8bit")  # what is left is in nobody's way


@pytest.mark.few("8bit-LLaVA-OneVision, tied", "8bit-Ovis2.5", "4bit-Ovis2.6 with experts")
@pytest.mark.parametrize("family", ["LLaVA-OneVision, tied", "Ovis2.5", "Ovis2.6 with experts"])
@EITHER_BITS
def test_fewer_bits_over_ranks(family: str, bits: Bits, tmp_path: Path) -> None:
    """Of the original: each rank rounds its own share, so that every rank says the same and it is near to one's."""
    CHAT[family](tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    processor = load_processor(checkpoint)
    patches = patches_of(processor, [picture(70, 90)])
    prompt = processor.prompt([Message("user", (ImagePart(0), "What is it?"))], [patches[0].layout])

    @torch.no_grad()
    def answer(tp: TensorParallel) -> torch.Tensor:
        model = load_model(checkpoint, processor.config, device="cpu", dtype=torch.float32, quantization=bits, tp=tp)
        return logits(model, spliced(model, prompt, patches))

    alone = answer(TensorParallel.single())
    first, second = Ranks(2).run(answer)
    assert torch.equal(first, second)
    assert F.cosine_similarity(first, alone).mean() > {"8bit": 0.999, "4bit": 0.99}[bits]


def test_what_is_not_quantised(tmp_path: Path) -> None:
    write_siglip_checkpoint(tmp_path / "tower")
    write_causal_lm_checkpoint(tmp_path / "model")
    with pytest.raises(UserError, match="neither a language model nor a text tower"):
        write_folder(open_checkpoint(tmp_path / "tower"), tmp_path / "small", "8bit")
    config = json.loads((tmp_path / "model" / CONFIG).read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "model" / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match="is quantised already, by gptq; give the original model"):
        write_folder(open_checkpoint(tmp_path / "model"), tmp_path / "small", "8bit")
    with pytest.raises(SiglaneError, match="there is no folder"):
        open_model(tmp_path / "nothing")
