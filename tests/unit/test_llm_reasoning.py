"""Reasoning through `LLM` and `siglane generate`, with a checkpoint that thinks as its script says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_nvila_checkpoint
from PIL import Image
from scripted_checkpoint import ANSWER, THOUGHT, THOUGHT_TOKENS, write_scripted_checkpoint

from siglane.cli.main import main
from siglane.errors import UserError
from siglane.llm import LLM, Generation
from siglane.types import SamplingParams, Usage

SENTENCE = "Considering the limited time by the user, I have to give the solution based on the thinking directly now."
ANSWER_TOKENS = 5  # white space, three letters and the end
NO_THINKING = {"enable_thinking": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reasoning") / "tiny"
    write_scripted_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu", kv_tokens=4096)


@pytest.fixture(scope="module")
def forced(llm: LLM) -> int:
    """Tokens up to and including the forced `</think>`."""
    thinking = llm.processor.config.thinking
    assert thinking is not None
    return thinking.forced.index(thinking.end) + 1


def ask(llm: LLM, template: dict[str, Any] | None = None, **sampling: Any) -> Generation:
    (answer,) = llm.generate("Hi?", SamplingParams(**sampling), chat_template_kwargs=template)
    assert answer.usage.completion_tokens == len(answer.output_token_ids)
    return answer


def test_an_answer_comes_without_its_reasoning(llm: LLM) -> None:
    answer = ask(llm)
    assert (answer.text, answer.reasoning, answer.finish_reason) == (ANSWER, THOUGHT, "stop")
    assert (answer.usage.reasoning_tokens, answer.usage.completion_tokens) == (THOUGHT_TOKENS, THOUGHT_TOKENS + 5)


def test_thinking_can_be_turned_off(llm: LLM) -> None:
    for budget in (None, 1):  # which is then ignored
        answer = ask(llm, NO_THINKING, thinking_budget=budget)
        assert (answer.text, answer.reasoning, answer.usage.reasoning_tokens) == (ANSWER, "", 0)
        assert answer.usage.completion_tokens == 4
    (chat,) = llm.chat([{"role": "user", "content": "Hi?"}], chat_template_kwargs=NO_THINKING)
    assert chat.prompt_token_ids == answer.prompt_token_ids


@pytest.mark.few("4")
@pytest.mark.parametrize("budget", [1, 4, 8])
def test_a_spent_budget_makes_the_model_answer(llm: LLM, forced: int, budget: int) -> None:
    answer = ask(llm, thinking_budget=budget)
    thought = THOUGHT[: max(0, budget - 2)]  # the tag and a space come first
    assert (answer.text, answer.finish_reason) == (ANSWER, "stop")
    assert answer.reasoning.startswith(thought)
    assert answer.reasoning.endswith(SENTENCE)
    assert answer.reasoning.removesuffix(SENTENCE).strip() == thought
    assert answer.usage.reasoning_tokens == budget + forced
    wanted = ask(llm, {"enable_thinking": True}, thinking_budget=budget)
    assert (wanted.prompt_token_ids, wanted.output_token_ids) == (answer.prompt_token_ids, answer.output_token_ids)


@pytest.mark.parametrize("budget", [9, 10, 100])
def test_a_budget_that_is_enough_changes_nothing(llm: LLM, budget: int) -> None:
    assert ask(llm, thinking_budget=budget).output_token_ids == ask(llm).output_token_ids


def test_max_tokens_may_leave_no_answer(llm: LLM) -> None:
    short = ask(llm, max_tokens=5)
    assert (short.text, short.reasoning, short.finish_reason) == ("", "abc", "length")
    assert short.usage.reasoning_tokens == 5
    cut = ask(llm, thinking_budget=3, max_tokens=20)
    assert (cut.text, cut.finish_reason, len(cut.output_token_ids)) == ("", "length", 20)
    assert SENTENCE.startswith(cut.reasoning.removeprefix("a").strip())


def test_stop_strings_are_looked_for_in_the_answer_only(llm: LLM) -> None:
    answer = ask(llm, stop=("c", "\n", "z"))
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("xy", THOUGHT, "stop")


def test_a_stop_token_is_not_part_of_the_text(llm: LLM) -> None:
    stop = llm.processor.tokenizer.convert_tokens_to_ids("y")
    answer = ask(llm, stop_token_ids=(stop,))
    assert (answer.text, answer.output_token_ids[-1]) == ("x", stop)


def test_only_the_answer_is_told_as_it_appears(llm: LLM) -> None:
    told: list[tuple[int, str]] = []
    llm.generate(["Hi?", "Ho?"], SamplingParams(), on_text=lambda number, text: told.append((number, text)))
    assert [["".join(text for row, text in told if row == number)] for number in (0, 1)] == [[ANSWER]] * 2


def test_every_answer_has_its_own_reasoning_and_budget(llm: LLM) -> None:
    first = ask(llm, n=2, thinking_budget=4, temperature=0.1, seed=1)
    _, second = first.outputs
    assert first.text == second.text == ANSWER
    assert first.reasoning.endswith(SENTENCE)
    assert second.reasoning.endswith(SENTENCE)
    assert first.usage.reasoning_tokens == second.usage.reasoning_tokens > THOUGHT_TOKENS


def test_forced_tokens_have_logprobs(llm: LLM) -> None:
    answer = ask(llm, thinking_budget=4, logprobs=0)
    assert tuple(one.token_id for one in answer.logprobs) == answer.output_token_ids
    assert all(one.logprob > -0.1 for one in answer.logprobs[:4])
    assert all(one.logprob < -1 for one in answer.logprobs[4:8])


def test_a_picture_is_thought_about_too(llm: LLM) -> None:
    prompt = {"prompt": "What?", "images": [Image.new("RGB", (40, 30), "red")]}
    (answer,) = llm.generate(prompt, SamplingParams(thinking_budget=4))
    assert (answer.text, answer.usage.image_tokens > 0) == (ANSWER, True)


def test_the_reasoning_of_earlier_answers_is_not_read_again(llm: LLM) -> None:
    turns = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": ANSWER}]
    last = {"role": "user", "content": "Why?"}
    with_reasoning = [turns[0], {**turns[1], "reasoning_content": THOUGHT}, last]
    (plain,), (sent,) = llm.chat([*turns, last]), llm.chat(with_reasoning)
    assert sent.prompt_token_ids == plain.prompt_token_ids


@pytest.mark.parametrize("budget", [0, -3])
def test_a_budget_below_one_is_refused(llm: LLM, budget: int) -> None:
    with pytest.raises(UserError, match="thinking_budget must be at least 1"):
        ask(llm, thinking_budget=budget)


def test_a_model_that_does_not_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_nvila_checkpoint(tmp_path)
    llm = LLM(tmp_path, device="cpu", kv_tokens=4096)
    answers = llm.generate(["Hi?", "Hi?"], [SamplingParams(max_tokens=3, thinking_budget=b) for b in (2, None)])
    assert isinstance(answers[0].error, UserError)
    assert "does not reason" in str(answers[0].error)
    assert (answers[1].error, answers[1].reasoning, answers[1].usage.reasoning_tokens) == (None, "", 0)
    assert main(command(tmp_path, "--thinking")) == 2
    assert "does not reason" in capsys.readouterr().err


def command(folder: Path, *words: str) -> list[str]:
    return ["generate", str(folder), "--prompt", "Hi?", "--device", "cpu", "--kv-tokens", "4096", *words]


@pytest.mark.few("words0-abcde", "words3-reasoning3")
@pytest.mark.parametrize(
    ("words", "reasoning"),
    [
        ([], THOUGHT),
        (["--thinking"], THOUGHT),
        (["--no-thinking"], ""),
        (["--thinking", "--thinking-budget", "4"], f"ab\n\n{SENTENCE}"),
    ],
)
def test_generate_on_the_command_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], reasoning: str
) -> None:
    assert main(command(folder, "--json", *words)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["reasoning"]) == (ANSWER, reasoning)
    assert (found["usage"]["reasoning_tokens"] > 0) == bool(reasoning)
    assert main(command(folder, "--stream", *words)) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"


@pytest.mark.parametrize("reasoning", [-1, 4])
def test_usage_counts_no_more_reasoning_than_there_are_tokens(reasoning: int) -> None:
    with pytest.raises(ValueError, match="reasoning tokens in a completion of 3"):
        Usage(5, 3, 0, 0, reasoning)
