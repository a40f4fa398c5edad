"""/v1/completions: texts continued as they stand, and the probabilities of prompts, against the model's own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from openai.types.completion_create_params import CompletionCreateParamsBase, CompletionCreateParamsNonStreaming
from serving import MODEL, RunningServer, Told, assert_error, assert_unharmed, read_events, run_batch

from siglane.families.model import VisionLanguageModel, load_model
from siglane.families.processor import Processor
from siglane.lm.attention import SegmentAttention
from siglane.server.completions.protocol import CompletionRequest
from siglane.weights.hub import open_checkpoint

COMPLETIONS = "/v1/completions"
TEXT = "The picture shows 中文 😀 and <|im_end|> more"


@pytest.fixture(scope="module")
def model(nvila_folder: Path, processor: Processor) -> VisionLanguageModel:
    return load_model(open_checkpoint(nvila_folder), processor.config, device="cpu", dtype=torch.float32)


@torch.inference_mode()
def logprobs(model: VisionLanguageModel, ids: list[int]) -> torch.Tensor:
    """`[length, vocab_size]` of the tokens behind each place."""
    language = model.language
    hidden = language(language.embed(torch.tensor(ids)), torch.arange(len(ids)), SegmentAttention([len(ids)]))
    return language.logits(hidden).log_softmax(-1)


def asked(server: RunningServer, **body: Any) -> dict[str, Any]:
    answer = server.post_to(COMPLETIONS, **{"model": MODEL, "temperature": 0, "max_tokens": 6, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def streamed(server: RunningServer, **body: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "temperature": 0, "max_tokens": 6, "stream": True, **body}
    with server.http() as client, client.stream("POST", COMPLETIONS, json=body) as response:
        assert response.status_code == 200, response.read()
        *events, done = read_events(response.iter_lines())
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def test_a_prompt_in_any_shape(server: RunningServer, processor: Processor) -> None:
    """Its special tokens count, as `/tokenize` counts them, and no chat template is put around it."""
    other = "Another text"
    ids = [processor.tokenizer(text).input_ids for text in (TEXT, other)]
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in ids[0]
    alone, also = asked(server, prompt=TEXT, ignore_eos=True), asked(server, prompt=other, ignore_eos=True)
    assert alone["usage"]["prompt_tokens"] == len(ids[0])
    assert alone["choices"][0]["text"] != also["choices"][0]["text"]
    for prompt in ([TEXT, other], ids):
        several = asked(server, prompt=prompt, ignore_eos=True, n=2)
        texts = [choice["text"] for choice in several["choices"]]
        assert texts == [alone["choices"][0]["text"]] * 2 + [also["choices"][0]["text"]] * 2
        assert [choice["index"] for choice in several["choices"]] == [0, 1, 2, 3]
        assert several["usage"]["prompt_tokens"] == len(ids[0]) + len(ids[1])
        assert several["usage"]["completion_tokens"] == 4 * 6
    assert asked(server, prompt=ids[0], ignore_eos=True)["choices"] == alone["choices"]


def test_an_answer_is_16_tokens_long_where_nobody_says(server: RunningServer) -> None:
    found = asked(server, prompt="a", max_tokens=None, ignore_eos=True)
    assert found["usage"]["completion_tokens"] == 16
    assert (found["object"], found["choices"][0]["finish_reason"]) == ("text_completion", "length")
    assert found["id"].startswith("cmpl-")


@pytest.mark.parametrize("generated", [0, 5])
def test_probabilities_of_a_prompt_and_its_answer(
    server: RunningServer, processor: Processor, model: VisionLanguageModel, generated: int
) -> None:
    found = asked(server, prompt=TEXT, max_tokens=generated, echo=True, logprobs=3, ignore_eos=True)
    (choice,) = found["choices"]
    columns, text = choice["logprobs"], choice["text"]
    ids = processor.tokenizer(TEXT).input_ids
    answer = asked(server, prompt=TEXT, max_tokens=max(generated, 1), ignore_eos=True)["choices"][0]["text"]
    assert text == TEXT + (answer if generated else "")
    assert found["usage"]["completion_tokens"] == generated
    assert {len(column) for column in columns.values()} == {len(ids) + generated}
    assert columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
    rows = logprobs(model, ids)
    expected = [float(rows[place, token_id]) for place, token_id in enumerate(ids[1:])]
    assert columns["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    for place, top in enumerate(columns["top_logprobs"][1 : len(ids)]):
        assert max(top.values()) == pytest.approx(float(rows[place].max()), abs=1e-4)
        assert top[columns["tokens"][place + 1]] >= columns["token_logprobs"][place + 1] - 1e-6
    for token, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        assert "\ufffd" in token or token.startswith("<|") or text[offset : offset + len(token)] == token
    assert columns["text_offset"][: len(ids)][-1] + len(columns["tokens"][len(ids) - 1]) == len(TEXT)


def test_a_stream_says_the_same(server: RunningServer) -> None:
    body: dict[str, Any] = {"prompt": [TEXT, "b"], "n": 2, "echo": True, "logprobs": 2, "ignore_eos": True}
    whole = asked(server, **body)
    *chunks, last = streamed(server, **body, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 24
    for index, expected in enumerate(whole["choices"]):
        parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(part["text"] for part in parts) == expected["text"]
        told = {name: [one for part in parts for one in part["logprobs"][name]] for name in expected["logprobs"]}
        first, *values = told.pop("token_logprobs")
        assert [first, *values] == [None, *(pytest.approx(one) for one in expected["logprobs"]["token_logprobs"][1:])]
        assert told["tokens"] == expected["logprobs"]["tokens"]
        assert told["text_offset"] == expected["logprobs"]["text_offset"]
        assert [top and [*top] for top in told["top_logprobs"]] == [
            top and [*top] for top in expected["logprobs"]["top_logprobs"]
        ]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]


def test_a_stream_of_an_echo_alone(server: RunningServer) -> None:
    (chunk,) = streamed(server, prompt="just this", max_tokens=0, echo=True)
    assert (chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) == ("just this", "length")
    assert chunk["choices"][0]["logprobs"] is None
    assert chunk["siglane"]["images"] == []


def test_with_openais_client(server: RunningServer) -> None:
    client = server.openai()
    found = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=4, logprobs=0, temperature=0, n=2)
    assert len(found.choices) == 4
    columns = found.choices[0].logprobs
    assert columns is not None
    assert columns.tokens is not None
    assert columns.top_logprobs == [
        {token: value} for token, value in zip(columns.tokens, columns.token_logprobs or (), strict=True)
    ]
    events = list(client.completions.create(model=MODEL, prompt="a", max_tokens=4, temperature=0, stream=True))
    assert "".join(event.choices[0].text for event in events) == found.choices[0].text
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="a", suffix="b")
    assert (refused.value.code, refused.value.param) == ("unsupported_field", "suffix")


def test_sampling_is_a_chats(server: RunningServer, processor: Processor) -> None:
    drawn = [asked(server, prompt="a", temperature=1, seed=7, n=3, max_tokens=12) for _ in range(2)]
    assert drawn[0]["choices"] == drawn[1]["choices"]
    assert len({choice["text"] for choice in drawn[0]["choices"]}) > 1
    free = asked(server, prompt="a", max_tokens=12, ignore_eos=True)["choices"][0]["text"]
    stop = free[3:5]
    ended = asked(server, prompt="a", max_tokens=12, ignore_eos=True, stop=[stop])["choices"][0]
    assert (ended["text"], ended["finish_reason"], ended["matched_stop"]) == (free[: free.index(stop)], "stop", stop)
    for field in ({"structured_outputs": {"choice": ["left", "right"]}}, {"regex": "(left|right)"}):
        assert asked(server, prompt="a", max_tokens=20, **field)["choices"][0]["text"] in ("left", "right")
    word = processor.tokenizer("x").input_ids[0]
    biased = asked(server, prompt="a", max_tokens=3, logit_bias={str(word): 100})
    assert biased["choices"][0]["text"] == "xxx"


BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "no prompt": ({}, "missing_field", "prompt"),
    "null": ({"prompt": None}, "invalid_value", "prompt"),
    "a number": ({"prompt": 5}, "invalid_value", "prompt"),
    "an object": ({"prompt": {"text": "a"}}, "invalid_value", "prompt"),
    "nothing": ({"prompt": ""}, "invalid_value", "prompt"),
    "no prompts": ({"prompt": []}, "invalid_value", "prompt"),
    "no ids": ({"prompt": [[]]}, "invalid_value", "prompt[0]"),
    "texts and ids": ({"prompt": ["a", 5]}, "invalid_value", "prompt[1]"),
    "a true id": ({"prompt": [5, True]}, "invalid_value", "prompt[1]"),
    "a negative id": ({"prompt": [5, -1]}, "invalid_value", "prompt[1]"),
    "an unknown id": ({"prompt": [5, 10**6]}, "invalid_value", "prompt"),
    "an unknown id of several": ({"prompt": [[5], [10**6]]}, "invalid_value", "prompt[1]"),
    "too many prompts": ({"prompt": ["a"] * 65}, "invalid_value", "prompt"),
    "too many choices": ({"prompt": ["a"] * 9, "n": 8}, "invalid_value", "prompt"),
    "an image's placeholder": ({"prompt": "What is <image>?"}, "unsupported_content_type", "prompt"),
    "too long": ({"prompt": "word " * 80_000}, "context_length_exceeded", "prompt"),
    "far too long": ({"prompt": "x" * 10_000_000}, "context_length_exceeded", "prompt"),
    "no room": ({"prompt": "a", "max_tokens": 10**6}, "context_length_exceeded", "max_tokens"),
    "no tokens": ({"prompt": "a", "max_tokens": 0}, "invalid_value", "max_tokens"),
    "best_of": ({"prompt": "a", "best_of": 2}, "unsupported_field", "best_of"),
    "suffix": ({"prompt": "a", "suffix": "b"}, "unsupported_field", "suffix"),
    "logprobs as a chat's": ({"prompt": "a", "logprobs": True}, "invalid_value", "logprobs"),
    "too many logprobs": ({"prompt": "a", "logprobs": 21}, "invalid_value", "logprobs"),
    "too much to tell": (
        {"prompt": ["word " * 200] * 8, "echo": True, "logprobs": 20, "n": 8, "max_tokens": 1},
        "invalid_value",
        "logprobs",
    ),
    "stream_options alone": ({"prompt": "a", "stream_options": {}}, "invalid_value", "stream_options"),
    "a schema that no text matches": (
        {"prompt": "a", "structured_outputs": {"regex": "("}},
        "invalid_regex",
        "structured_outputs.regex",
    ),
    "another model": ({"prompt": "a", "model": "other"}, "model_not_found", "model"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_answered_says_why(case: str, server: RunningServer) -> None:
    body, code, param = BAD[case]
    assert_error(server.post_to(COMPLETIONS, **body), 404 if code == "model_not_found" else 400, code, param)


def test_neighbours_are_unharmed(server: RunningServer, alone: Told) -> None:
    def echo() -> None:
        asked(server, prompt=[TEXT * 20] * 8, echo=True, logprobs=5, max_tokens=0)
        server.post_to(COMPLETIONS, prompt=[5, 10**6])

    assert_unharmed(server, alone, echo)


def test_rows_of_a_batch(stored: RunningServer) -> None:
    first = {"prompt": "a", "max_tokens": 5, "temperature": 0}
    done = run_batch(stored.openai(), COMPLETIONS, [first, {"prompt": "a"}, {"prompt": "a", "suffix": "b"}])
    assert done.answers.keys() == {"0", "1"}
    assert done.answers["0"]["choices"][0]["text"] == asked(stored, prompt="a", max_tokens=5)["choices"][0]["text"]
    assert "suffix" in done.errors


def test_every_field_of_openais_is_honoured_or_refused() -> None:
    """`user` is told back as every field that has no effect."""
    theirs = {*CompletionCreateParamsNonStreaming.__annotations__, *CompletionCreateParamsBase.__annotations__}
    assert theirs - {*CompletionRequest.model_fields} == {"best_of", "suffix", "user"}
