"""Checkpoints without eyes against transformers: prompt, logits, greedy tokens; images are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_lm_checkpoint import EXPERTS, LLAMA3, Kind, Written, write_causal_lm_checkpoint
from checkpoints import CORPUS, write_nvila_checkpoint
from parity_kit import assert_parity
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from siglane.cli.main import main
from siglane.errors import ConfigError, UserError
from siglane.families.model import VisionLanguageModel, load_model
from siglane.families.processor import load_processor
from siglane.families.registry import is_vlm, vlm_family
from siglane.llm import LLM
from siglane.lm.attention import SegmentAttention
from siglane.nn.rope import rotary_frequencies
from siglane.types import Message, RopeScaling, SamplingParams
from siglane.verify import verify
from siglane.verify.report import html
from siglane.weights.hub import open_checkpoint

QUESTION = "What is a tower? <image>"
VARIANTS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 tied, biased": ("qwen3", {"head_dim": 16, "tied": True, "attention_bias": True}),
    "qwen3 moe": ("qwen3_moe", EXPERTS),
    "qwen3 moe, every third layer": (
        "qwen3_moe",
        EXPERTS | {"norm_topk_prob": False, "mlp_only_layers": [0], "decoder_sparse_step": 3, "tied": True},
    ),
    "llama": ("llama", {}),
    "llama tied, biased": ("llama", {"tied": True, "attention_bias": True, "mlp_bias": True}),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
}  # fmt: skip
EVERY_VARIANT = pytest.mark.parametrize("name", VARIANTS)


def write(folder: Path, name: str = "qwen2") -> Written:
    kind, facts = VARIANTS[name]
    return write_causal_lm_checkpoint(folder, kind, **facts)


def load(folder: Path) -> VisionLanguageModel:
    checkpoint = open_checkpoint(folder)
    return load_model(checkpoint, load_processor(checkpoint).config, device="cpu", dtype=torch.float32)


def change_config(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@EVERY_VARIANT
@torch.no_grad()
def test_logits_are_the_references(tmp_path: Path, name: str) -> None:
    written = write(tmp_path, name)
    language = load(tmp_path).language
    ids = torch.randint(0, 330, (200,), generator=torch.Generator().manual_seed(0))  # beyond Llama 3's original length
    hidden = language(language.embed(ids), torch.arange(200), SegmentAttention([200]))
    assert_parity("logits", language.logits(hidden), written.model(ids[None]).logits[0])


@pytest.mark.few("qwen2 tied", "qwen3", "qwen3 moe", "llama", "llama 3")
@EVERY_VARIANT
def test_prompt_and_32_greedy_tokens_are_the_references(tmp_path: Path, name: str) -> None:
    written = write(tmp_path, name)
    prompt = written.prompt_ids(QUESTION)
    theirs = written.model.generate(
        torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    llm = LLM(tmp_path, device="cpu", dtype="float32", kv_tokens=4096)
    (answer,) = llm.generate(QUESTION, SamplingParams(max_tokens=32, ignore_eos=True))
    assert list(answer.prompt_token_ids) == prompt
    assert list(answer.output_token_ids) == theirs[0, -32:].tolist()
    assert answer.usage.image_tokens == 0


def test_llama_3s_longer_context_changes_slow_frequencies() -> None:
    """As transformers computes them: pair 12 turns too fast to be changed, 20 is divided by the factor, 16 between."""
    scaling = RopeScaling(factor=32.0, low_turns=1.0, high_turns=4.0, original_length=8192)
    plain, stretched = (rotary_frequencies(32, 5e5, changed) for changed in (None, scaling))
    assert stretched[[12, 16, 20]].tolist() == pytest.approx([7.29267e-3, 4.29557e-4, 8.57026e-6], rel=1e-5)
    assert stretched[12] == plain[12]
    assert float(stretched[20]) == pytest.approx(float(plain[20]) / 32)


def test_a_conversation_is_the_templates(tmp_path: Path) -> None:
    written = write(tmp_path)
    turns = [("system", "Short."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "Why?")]
    theirs = [{"role": role, "content": text} for role, text in turns]
    expected = written.tokenizer.apply_chat_template(theirs, add_generation_prompt=True).input_ids
    found = load_processor(open_checkpoint(tmp_path)).prompt([Message(role, (text,)) for role, text in turns], [])
    assert list(found.token_ids) == expected


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_space_in_front_stands_where_the_tokenizer_puts_it(tmp_path: Path, scheme: str) -> None:
    """Llama 2's tokenizer begins a prompt with a space, and no later piece of it."""
    write(tmp_path, "llama")
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(CORPUS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    turns = [("user", "What is a tower?"), ("assistant", "It is tall."), ("user", "Why?")]
    messages = [Message(role, (text,)) for role, text in turns]
    for beginning in ("{{ bos_token }}", ""):
        turn = "{{ m['role'] + ' ' + m['content'] + ' ' + eos_token }}"
        tokenizer.chat_template = f"{beginning}{{% for m in messages %}}{turn}{{% endfor %}}"
        tokenizer.save_pretrained(tmp_path)
        theirs = tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in turns]).input_ids
        assert list(load_processor(open_checkpoint(tmp_path)).prompt(messages, []).token_ids) == theirs


def test_what_ends_an_answer(tmp_path: Path) -> None:
    """generation_config.json's ids, config.json's where it has none, and the tokenizer's."""
    written = write(tmp_path)
    end = written.tokenizer.eos_token_id
    assert load_processor(open_checkpoint(tmp_path)).eos_token_ids == (end,)
    change_config(tmp_path, eos_token_id=[7, end])
    assert load_processor(open_checkpoint(tmp_path)).eos_token_ids == (7, end)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load_processor(open_checkpoint(tmp_path)).eos_token_ids == (9, end)


def test_qwen3_marks_its_reasoning(tmp_path: Path) -> None:
    written = write(tmp_path, "qwen3")
    assert load_processor(open_checkpoint(tmp_path)).config.thinking is None
    written.tokenizer.add_tokens(["<think>", "</think>"])
    written.tokenizer.save_pretrained(tmp_path)
    processor = load_processor(open_checkpoint(tmp_path))
    thinking = processor.config.thinking
    assert thinking is not None
    assert processor.tokenizer.convert_ids_to_tokens([thinking.start, thinking.end]) == ["<think>", "</think>"]
    earlier = Message("assistant", ("<think>because</think>\n\nYes",))
    plain = Message("assistant", ("Yes",))
    ask = Message("user", ("Why?",))
    ids = [processor.prompt([ask, answer, ask], []).token_ids for answer in (earlier, plain)]
    assert ids[0] == ids[1]


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "keys", "message"),
        [
            (
                "qwen3 moe",
                {"use_sliding_window": True, "sliding_window": 64},
                "use_sliding_window true is not supported",
            ),
            ("qwen3 moe", {"num_experts_per_tok": 6}, "num_experts_per_tok 6 is more than the 5 experts"),
            ("qwen3 moe", {"mlp_only_layers": [1.5]}, "mlp_only_layers must be a list of layers"),
            ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window true is not supported"),
            ("qwen3", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "layer_types"),
            ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
            ("qwen2", {"rope_parameters": LLAMA3}, "rope_type 'llama3' is not supported; siglane knows 'default'"),
            ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}, "'linear'"),
            ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "key 'low_freq_factor' is missing"),
            ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not known"),
            ("llama", {"num_hidden_layers": 10**7}, "the weights hold only"),
        ],
    )
    def test_facts(self, tmp_path: Path, name: str, keys: dict[str, Any], message: str) -> None:
        write(tmp_path, name)
        change_config(tmp_path, **keys)
        with pytest.raises(ConfigError, match=message):
            load(tmp_path)

    def test_a_tokenizer_without_a_template(self, tmp_path: Path) -> None:
        write_causal_lm_checkpoint(tmp_path, template=None)
        with pytest.raises(ConfigError, match=r"no chat template.*chat_template\.jinja"):
            load_processor(open_checkpoint(tmp_path))

    @pytest.mark.parametrize("kind", ["images", "videos"])
    def test_images_of_a_python_caller(self, tmp_path: Path, kind: str) -> None:
        write(tmp_path)
        image = Image.new("RGB", (8, 8))
        media: dict[str, Any] = {kind: [image if kind == "images" else [image]]}
        llm = LLM(tmp_path, device="cpu", kv_tokens=4096)
        with pytest.raises(UserError, match="reads text only") as caught:
            llm.generate({"prompt": "What?", **media}, SamplingParams(max_tokens=4))
        assert caught.value.code == "images_unsupported"
        assert llm.generate("What?", SamplingParams(max_tokens=4))

    @pytest.mark.parametrize("command", ["look", "tokens", "encode"])
    def test_commands_that_are_about_images(
        self, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write(tmp_path)
        image = tmp_path / "a.png"
        Image.new("RGB", (8, 8)).save(image)
        output = [] if command == "tokens" else ["-o", str(tmp_path / "out")]
        assert main([command, str(tmp_path), str(image), *output]) == 2
        assert "reads text only" in capsys.readouterr().err


@pytest.mark.few("qwen2", "qwen3 tied, biased", "qwen3 moe", "llama 3")
@EVERY_VARIANT
def test_verify_agrees_and_names_the_first_wrong_stage(tmp_path: Path, name: str) -> None:
    model, golden = tmp_path / "model", tmp_path / "golden.safetensors"
    write(model, name)
    report = verify(model, save=golden)
    assert report.ok
    assert report.family == "causal_lm"
    assert [stage for stage, _ in report.stages()] == [
        "spliced", "lm.block.0", "lm.block.1", "lm.block.2", "logits", "tokens"
    ]  # fmt: skip
    assert html(report)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].neg_()
    save_file(tensors, model / "model.safetensors")
    assert verify(model, reference=golden).first_diverging == "lm.block.1"


def test_verify_has_no_pictures_to_show(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match="reads text only"):
        verify(tmp_path, random=2)


def test_generate_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = write(tmp_path, "llama 3")
    options = ("--max-tokens", "6", "--ignore-eos", "--device", "cpu", "--dtype", "float32", "--json")
    assert main(["generate", str(tmp_path), "-p", "Why?", *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt_token_ids"] == written.prompt_ids("Why?")
    assert answer["images"] == []


def test_sglang_serves_them_itself(tmp_path: Path) -> None:
    write(tmp_path / "text")
    write_nvila_checkpoint(tmp_path / "vila")
    assert not is_vlm(open_checkpoint(tmp_path / "text"))
    assert is_vlm(open_checkpoint(tmp_path / "vila"))
    assert vlm_family(open_checkpoint(tmp_path / "text")).name == "causal_lm"
