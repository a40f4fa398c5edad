"""Reasoning over HTTP: beside the answer, never in it, streamed and not, and nothing of it where a model has none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_checkpoint import ANSWER, THOUGHT, THOUGHT_TOKENS, write_scripted_checkpoint
from serving import (
    MODEL,
    NOTHING_GUESSED,
    RunningServer,
    assert_error,
    chat,
    image_part,
    picture,
    serving_folder,
    stream,
)

SENTENCE = "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
FORCED = f"ab\n\n{SENTENCE}"  # after a budget of four tokens: the tag, a space and two letters
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder: Path = tmp_path_factory.mktemp("thinker") / "tiny"
    write_scripted_checkpoint(folder)
    with serving_folder(folder) as server:
        yield server


def question(**fields: Any) -> dict[str, Any]:
    return chat("Hi?", **{"max_tokens": 200, **fields})


def message(server: RunningServer, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The one choice and the usage."""
    response = server.post(question(**fields))
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0], answer["usage"]


EXAMPLES: list[tuple[dict[str, Any], str, str]] = [
    ({}, ANSWER, THOUGHT),
    ({"chat_template_kwargs": {"enable_thinking": True}}, ANSWER, THOUGHT),
    (NO_THINKING, ANSWER, ""),
    ({"thinking_budget": 4}, ANSWER, FORCED),
    ({"thinking_token_budget": 4}, ANSWER, FORCED),
    ({"thinking_budget": 4, **NO_THINKING}, ANSWER, ""),
    ({"thinking_budget": 100}, ANSWER, THOUGHT),
    ({"max_tokens": 5}, "", "abc"),
    ({"max_tokens": 11}, "x", THOUGHT),
    ({"stop": ["c", "z"]}, "xy", THOUGHT),
    ({"stop": "\n"}, ANSWER, THOUGHT),
]


@pytest.mark.parametrize(("fields", "text", "reasoning"), EXAMPLES)
def test_an_openai_client_gets_both_apart_streamed_or_not(
    thinker: RunningServer, fields: dict[str, Any], text: str, reasoning: str
) -> None:
    extra = {key: value for key, value in fields.items() if key not in ("max_tokens", "stop")}
    body = question(**{key: value for key, value in fields.items() if key not in extra})
    with thinker.openai() as client:
        whole = client.chat.completions.create(**body, extra_body=extra)
        events = list(
            client.chat.completions.create(
                **body, extra_body=extra, stream=True, stream_options={"include_usage": True}
            )
        )
    said = whole.choices[0].message
    assert (said.content, said.reasoning_content) == (text, reasoning or None)  # type: ignore[attr-defined]
    deltas = [event.choices[0].delta for event in events if event.choices]
    parts = [(delta.content or "", getattr(delta, "reasoning_content", "")) for delta in deltas]
    assert tuple("".join(part) for part in zip(*parts, strict=True)) == (text, reasoning)
    assert deltas[0].role == "assistant"
    first_text = next((place for place, part in enumerate(parts) if part[0]), len(parts))
    assert not any(thought for _, thought in parts[first_text:])
    assert whole.usage is not None
    assert events[-1].usage is not None
    assert events[-1].usage.completion_tokens == whole.usage.completion_tokens
    details = (whole.usage.completion_tokens_details, events[-1].usage.completion_tokens_details)
    assert details[0] == details[1]
    assert details[0] is not None
    assert bool(details[0].reasoning_tokens) == bool(reasoning)


def test_usage_tells_reasoning_from_answer(thinker: RunningServer) -> None:
    _, usage = message(thinker)
    assert usage["completion_tokens_details"] == NOTHING_GUESSED | {"reasoning_tokens": THOUGHT_TOKENS}
    assert usage["completion_tokens"] == THOUGHT_TOKENS + 5
    choice, usage = message(thinker, thinking_budget=4, max_tokens=20)
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
    assert usage["completion_tokens"] == usage["completion_tokens_details"]["reasoning_tokens"] == 20


def test_several_choices_and_a_picture(thinker: RunningServer) -> None:
    body = chat(image_part(picture(24, 30)), "Hi?", max_tokens=200, n=2, thinking_budget=4, temperature=0.1, seed=3)
    answer = thinker.post(body).json()
    said = [(choice["message"]["content"], choice["message"]["reasoning_content"]) for choice in answer["choices"]]
    assert said == [(ANSWER, FORCED)] * 2
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] % 2 == 0
    told = stream(thinker, body)
    thoughts = ["", ""]
    for chunk in told.chunks:
        for choice in chunk["choices"]:
            thoughts[choice["index"]] += choice["delta"].get("reasoning_content", "")
    assert thoughts == [FORCED, FORCED]


def test_every_token_has_its_logprob_forced_ones_too(thinker: RunningServer) -> None:
    body = question(thinking_budget=4, logprobs=True, top_logprobs=1)
    answer = thinker.post(body).json()
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert len(tokens) == answer["usage"]["completion_tokens"]
    assert [token["bytes"] for token in tokens] == stream(thinker, body).tokens
    assert tokens[0]["token"] == "<think>"
    assert all(token["logprob"] > -0.1 for token in tokens[:4])
    assert all(token["logprob"] < -1 for token in tokens[4:8])


def test_a_chunk_that_only_reasons_has_no_content(thinker: RunningServer) -> None:
    deltas = [chunk["choices"][0]["delta"] for chunk in stream(thinker, question()).chunks if chunk["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta for delta in deltas if delta.get("reasoning_content")] == [
        {"reasoning_content": letter} for letter in THOUGHT
    ]


def test_the_reasoning_of_earlier_answers_is_taken_and_not_read(thinker: RunningServer) -> None:
    turns: list[dict[str, Any]] = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": ANSWER}]
    last = {"role": "user", "content": "Why?"}
    plain = thinker.post({"model": MODEL, "messages": [*turns, last], "max_tokens": 3}).json()
    with_reasoning = [turns[0], {**turns[1], "reasoning_content": THOUGHT}, last]
    response = thinker.post({"model": MODEL, "messages": with_reasoning, "max_tokens": 3})
    assert response.status_code == 200
    assert response.json()["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    assert not any("ignored" in name for name in response.headers)


@pytest.mark.parametrize("name", ["thinking_budget", "thinking_token_budget"])
@pytest.mark.parametrize("value", [0, -1, True, "4", 1.5])
def test_a_budget_is_a_positive_number_of_tokens(thinker: RunningServer, name: str, value: Any) -> None:
    assert_error(thinker.post(question(**{name: value})), 400, param=name)


def test_the_two_names_of_the_budget_exclude_each_other(thinker: RunningServer) -> None:
    both = question(thinking_budget=4, thinking_token_budget=4)
    assert_error(thinker.post(both), 400, "invalid_value", "thinking_token_budget")


def test_a_model_that_does_not_reason_says_so_and_answers_as_ever(server: RunningServer) -> None:
    for name in ("thinking_budget", "thinking_token_budget"):
        response = server.post(chat("Hi?", **{name: 4}))
        assert_error(response, 400, "invalid_value", "thinking_budget")
        assert "does not reason" in response.json()["error"]["message"]
    answer = server.post(chat("Hi?", **NO_THINKING)).json()
    assert answer["choices"][0]["message"].keys() == {"role", "content", "refusal"}
    assert answer["usage"]["completion_tokens_details"] == NOTHING_GUESSED | {"reasoning_tokens": 0}
    deltas = [choice["delta"] for chunk in stream(server, chat("Hi?")).chunks for choice in chunk["choices"]]
    assert all(delta.keys() <= {"role", "content"} for delta in deltas)


def test_a_continued_text_is_not_taken_apart(thinker: RunningServer) -> None:
    body = {"model": MODEL, "prompt": "\n", "max_tokens": 40, "temperature": 0}
    found = thinker.post_to("/v1/completions", **body).json()
    assert f"{THOUGHT}\t</think>\n\n{ANSWER}" in found["choices"][0]["text"]
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    held = thinker.post_to("/v1/completions", **{**body, "prompt": "\n"}, structured_outputs={"choice": ["yes", "no"]})
    assert held.json()["choices"][0]["text"] in ("yes", "no")


def test_decisions_are_about_the_answer(thinker: RunningServer) -> None:
    question = {"id": "a", "type": "labels", "question": "Hi?", "labels": ["xya", ANSWER, THOUGHT]}
    body = {"model": MODEL, "input": "Hello", "questions": [question]}
    answer = thinker.post_to("/v1/decisions", **body).json()["answers"]["a"]
    assert answer["choice"] == ANSWER
    assert answer["label_mass"] > 0.5
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    assert_error(thinker.post_to("/v1/decisions", **body, **thinking), 400, "invalid_value", "chat_template_kwargs")
