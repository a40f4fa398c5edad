"""SGLang itself works here: a text model answers as in transformers, offline, sharded and through the server."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import build_tokenizer, randomise
from openai import OpenAI
from sglang_host import HostError, sglang_engine, sglang_server
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

NEW_TOKENS = 32
GREEDY = {"temperature": 0.0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
PROMPTS = ("Describe the picture.", "What is in the image?\n\n", "The image shows a cat and a dog.")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant"
)


@dataclass(frozen=True)
class TextModel:
    folder: Path
    model: Any  # transformers' Qwen2, which carries no usable types
    tokenizer: PreTrainedTokenizerFast

    def ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt).input_ids
        return ids

    def greedy(self, prompt: str) -> list[int]:
        """The continuation of transformers."""
        ids = torch.tensor([self.ids(prompt)])
        output = self.model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
        tokens: list[int] = output[0, ids.shape[1] :].tolist()
        return tokens


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder = tmp_path_factory.mktemp("sglang") / "qwen2"
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    randomise(model, seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return TextModel(folder, model, tokenizer)


def test_the_offline_engine_answers_as_transformers(text_model: TextModel) -> None:
    requests: list[dict[str, Any]] = [{"prompt": prompt} for prompt in PROMPTS]
    requests.append({"input_ids": text_model.ids(PROMPTS[0]), "return_logprob": True})
    requests.append({"input_ids": [1] * 5000})
    with sglang_engine(text_model.folder) as engine:
        print(f"\noffline engine: ready after {engine.start_seconds:.0f} s")
        *answers, with_logprobs, too_long = engine.generate(requests, GREEDY)
        again = engine.generate(requests[:1], GREEDY)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer["output_ids"] == text_model.greedy(prompt)
        assert answer["meta_info"]["prompt_tokens"] == len(text_model.ids(prompt))
    assert [token for _, token, _ in with_logprobs["meta_info"]["output_token_logprobs"]] == answers[0]["output_ids"]
    assert "4096" in too_long["error"]
    assert again[0]["output_ids"] == answers[0]["output_ids"]


def test_two_ranks_answer_as_transformers(text_model: TextModel) -> None:
    with sglang_engine(text_model.folder, tp_size=2) as engine:
        print(f"\noffline engine, two ranks: ready after {engine.start_seconds:.0f} s")
        answers = engine.generate([{"prompt": prompt} for prompt in PROMPTS], GREEDY)
    assert [answer["output_ids"] for answer in answers] == [text_model.greedy(prompt) for prompt in PROMPTS]


def test_the_server_answers_as_transformers(text_model: TextModel) -> None:
    chat: list[Any] = [{"role": "user", "content": PROMPTS[0]}]
    rendered = f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>\n<|im_start|>assistant"
    with sglang_server(text_model.folder, served_model_name="tiny") as server:
        print(f"\nserver: healthy after {server.start_seconds:.0f} s")
        client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        sampling: dict[str, Any] = {"model": "tiny", "temperature": 0.0, "max_tokens": NEW_TOKENS}
        extra = {"ignore_eos": True, "skip_special_tokens": False}
        completion = client.completions.create(prompt=PROMPTS[1], extra_body=extra, **sampling)
        reply = client.chat.completions.create(messages=chat, extra_body=extra, **sampling)
    assert completion.choices[0].text == text_model.tokenizer.decode(text_model.greedy(PROMPTS[1]))
    assert reply.choices[0].message.content == text_model.tokenizer.decode(text_model.greedy(rendered))


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows_this"}')
    with pytest.raises(HostError, match="nobody_knows_this"), sglang_engine(tmp_path):
        pass
