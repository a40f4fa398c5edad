"""Sampling parameters before the engine: their bounds, their seeds, and what a checkpoint states of them."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_nvila_checkpoint

from siglane.engine.sampling.parameters import check_for_model, check_sampling, in_plain_shapes, sampling_defaults
from siglane.errors import ConfigError, UserError
from siglane.families.files import stated_sampling
from siglane.families.processor import load_processor
from siglane.llm import LLM
from siglane.server.protocol import ChatCompletionRequest
from siglane.types import SAMPLING_BOUNDS, SamplingParams
from siglane.weights.hub import Checkpoint, open_checkpoint

STATED = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "min_p": None}


def outside(name: str) -> list[float]:
    low, high = SAMPLING_BOUNDS[name]
    step = 1 if isinstance(getattr(SamplingParams(), name), int | None) else 1e-6
    return [low - step, *([high + step] if math.isfinite(high) else [])]


@pytest.mark.parametrize("name", SAMPLING_BOUNDS)
def test_a_value_out_of_bounds_is_refused_by_its_name(name: str) -> None:
    for value in SAMPLING_BOUNDS[name]:
        if math.isfinite(value):
            check_sampling(SamplingParams(**{name: value}))  # type: ignore[arg-type]
    for value in outside(name):
        with pytest.raises(UserError, match=rf"^{name} must be ") as caught:
            check_sampling(SamplingParams(**{name: value}))  # type: ignore[arg-type]
        assert (caught.value.code, caught.value.param) == ("invalid_value", name)


@pytest.mark.parametrize("name", sorted(SAMPLING_BOUNDS.keys() - {"logprobs", "n"}))
def test_http_has_the_same_bounds(name: str) -> None:
    """`logprobs` is a switch there, and `n` is bounded further."""
    messages: list[Any] = [{"role": "user", "content": "x"}]
    for value in SAMPLING_BOUNDS[name]:
        if math.isfinite(value):
            body = ChatCompletionRequest.model_validate({"messages": messages, name: value})
            assert body.sampling[name] == value
    for value in outside(name):
        with pytest.raises(ValueError, match=name):
            ChatCompletionRequest.model_validate({"messages": messages, name: value})


def test_what_a_model_cannot_do_is_refused() -> None:
    check_for_model(SamplingParams(logit_bias=((9, 1.0),)), 10, None)
    for params in ({"logit_bias": ((10, 1.0),)}, {"logit_bias": ((1, math.inf),)}, {"thinking_budget": 3}, {"n": 0}):
        with pytest.raises(UserError) as caught:
            check_for_model(SamplingParams(**params), 10, None)  # type: ignore[arg-type]
        assert caught.value.param == next(iter(params))


@pytest.mark.parametrize(
    ("params", "plain"),
    [
        ({"stop": "END"}, {"stop": ("END",)}),  # not E, N and D
        ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"stop": None, "stop_token_ids": None}, {}),
        ({"stop_token_ids": [3, 4]}, {"stop_token_ids": (3, 4)}),
        ({"logit_bias": {3: 1.5, 4: -2}}, {"logit_bias": ((3, 1.5), (4, -2))}),
        ({"logit_bias": {"3": 1.5}}, {"logit_bias": ((3, 1.5),)}),  # as JSON has it
    ],
)
def test_shapes_of_other_apis_mean_what_they_mean_there(params: dict[str, Any], plain: dict[str, Any]) -> None:
    found = in_plain_shapes(SamplingParams(**params))
    assert found == SamplingParams(**plain)
    check_for_model(found, 10, None)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logprobs": True}, "logprobs must be a whole number, got True"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, got 2.5"),
        ({"temperature": "warm"}, "temperature must be a number, got 'warm'"),
        ({"stop": (1,)}, r"stop must be a text or a list of texts, got \(1,\)"),
        ({"stop": 5}, "stop must be a text or a list of texts, got 5"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list of token ids, got 3"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids must be a list of token ids"),
        ({"stop_token_ids": (10,)}, "stop_token_ids holds 10; the model's token ids are below 10"),
        ({"logit_bias": {"cat": 1}}, "logit_bias must give biases by token id"),
        ({"logit_bias": {1: "x"}}, "logit_bias must give biases by token id"),
        ({"logit_bias": (5,)}, "logit_bias must give biases by token id"),
        ({"logit_bias": 5}, "logit_bias must give biases by token id"),
    ],
)
def test_other_types_are_named(params: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_for_model(in_plain_shapes(SamplingParams(**params)), 10, None)
    assert caught.value.param == next(iter(params))


def test_each_choice_has_a_seed_of_its_own() -> None:
    params = SamplingParams(temperature=1.0, n=3, seed=5)
    assert [params.choice(index) for index in range(3)] == [
        SamplingParams(temperature=1.0, seed=seed) for seed in (5, 6, 7)
    ]
    assert SamplingParams(n=2).choice(1) == SamplingParams()


def state(folder: Path, values: object) -> Checkpoint:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return Checkpoint(folder)


def test_the_values_of_generation_config_are_read(tmp_path: Path) -> None:
    assert stated_sampling(Checkpoint(tmp_path)) == {}
    assert stated_sampling(state(tmp_path, {"do_sample": False, "eos_token_id": 3})) == {}
    expected = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
    assert stated_sampling(state(tmp_path, STATED)) == expected
    assert stated_sampling(state(tmp_path, {"temperature": 1, "top_k": -1, "max_new_tokens": 9})) == {
        "temperature": 1.0,
        "top_k": -1,
        "max_tokens": 9,
    }


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"temperature": "hot"}, "temperature must be float"),
        ({"temperature": -1}, "temperature must be between 0 and 2"),
        ({"top_p": 1.5}, "top_p must be between 0 and 1"),
        ({"top_k": 2.5}, "top_k must be int"),
        ({"top_k": True}, "top_k must be int"),
        ({"max_new_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_a_value_that_cannot_be_used_is_an_error_of_the_file(
    values: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        stated_sampling(state(tmp_path, values))
    assert str(tmp_path / "generation_config.json") in caught.value.message
    assert complaint in caught.value.message


def test_a_prompt_without_parameters_gets_what_the_checkpoint_states(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_nvila_checkpoint(tmp_path)  # with the language model in a folder of its own
    processor = load_processor(open_checkpoint(tmp_path))
    assert sampling_defaults(processor.config, SamplingParams(temperature=1.0)) == SamplingParams(temperature=1.0)
    assert not caplog.records
    file = tmp_path / "llm/generation_config.json"
    values = {"temperature": 2.0, "top_k": 1, "max_new_tokens": 7}
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with caplog.at_level(logging.INFO, logger="siglane"):
        llm = LLM(tmp_path, device="cpu", kv_tokens=1024)
    assert "sampling defaults from generation_config.json: temperature 2, top_k 1, max_tokens 7" in caplog.text
    assert llm.sampling_defaults == SamplingParams(temperature=2.0, top_k=1, max_tokens=7)
    (answer,) = llm.generate("What?")
    (greedy,) = llm.generate("What?", SamplingParams(max_tokens=7))
    assert answer.output_token_ids == greedy.output_token_ids  # the likeliest of one
    assert len(answer.output_token_ids) <= 7
