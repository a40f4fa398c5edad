"""What must hold for every text and every way it is cut up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from serving import told_by
from transformers import PreTrainedTokenizerFast

from siglane.engine.answers.answer import Answer
from siglane.engine.answers.detokenize import TextStream
from siglane.engine.answers.reasoning import AnswerStream
from siglane.engine.process.supervisor import EngineProcess
from siglane.errors import UserError
from siglane.families.processor import Processor
from siglane.server.choices import ChoiceDelta, Choices
from siglane.server.completions.protocol import CompletionRequest
from siglane.server.errors import error_body, from_validation
from siglane.server.logprobs import TokenTexts, byte_alphabet
from siglane.server.protocol import ChatCompletionRequest, ignored_fields
from siglane.server.refused import REFUSED
from siglane.server.stream import DONE, KEEP_ALIVE, event
from siglane.types import Finished, Prompt, Request, SamplingParams, TokenDelta, TokenLogprob

FAST = settings(max_examples=60, deadline=None, database=None)
TEXT = st.text(alphabet=st.sampled_from("abc ñ€𝄞🙂\n"), max_size=30)


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """One token per byte, so that characters are cut wherever they can be."""
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    return [cast(int, tokenizer.convert_tokens_to_ids(letters[byte])) for byte in text.encode()]


def cut_at_first(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """What a client should see, found the slow way: the first stop string that is complete ends the text."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@FAST
@given(text=TEXT, stops=st.lists(st.text("abc ñ🙂", min_size=1, max_size=3), max_size=3), data=st.data())
def test_text_is_cut_at_the_stop_string_however_it_comes(
    processor: Processor, text: str, stops: list[str], data: st.DataObject
) -> None:
    ids = tokens_of(processor.tokenizer, text)
    expected, stop = cut_at_first(text, stops)
    stream, found, rest = TextStream(processor.tokenizer, stops), "", ids
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found, rest = found + stream.push(rest[:size]), rest[size:]
        assert expected.startswith(found), "something was sent that must be taken back"
    assert found + stream.push([], finished=True) == expected
    assert stream.stopped == stop


class Engine:
    """The engine's side of an answer, played by a test: deltas come as it says."""

    def __init__(self) -> None:
        self.on_delta: dict[str, Callable[[TokenDelta], None]] = {}
        self.aborted: list[str] = []

    def submit(self, requests: Sequence[Request], on_delta: Callable[[TokenDelta], None]) -> None:
        self.on_delta.update((request.request_id, on_delta) for request in requests)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


class Inline(Executor):
    """A command has happened when it was given, so that every run of a test repeats exactly."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*args, **kwargs))
        return done


async def read(choices: Choices, found: list[ChoiceDelta], timeout: float | None = None) -> None:
    """All deltas, or those that are there when a `timeout` says not to wait for more."""
    while not choices.finished:
        delta = await choices.next(timeout)
        if delta is None:
            return
        found.append(delta)


def request(number: int, stops: Sequence[str]) -> Request:
    return Request(f"r{number}", Prompt((1, 2, 3)), SamplingParams(stop=tuple(stops)), 100)


@FAST
@given(
    texts=st.lists(TEXT, min_size=1, max_size=3),
    stops=st.lists(st.text("abc ñ", min_size=1, max_size=2), max_size=2),
    seed=st.randoms(use_true_random=False),
)
def test_an_answer_does_not_depend_on_when_its_tokens_are_read(
    processor: Processor, texts: list[str], stops: list[str], seed: Any
) -> None:
    """Text, token count, logprobs and ending of every choice are the same for any interleaving, however many tokens
    wait to be read, and wherever an abort meets an answer that a stop string has ended."""
    ids = [tokens_of(processor.tokenizer, text) for text in texts]

    async def play(group: Callable[[int], int]) -> tuple[list[tuple[Any, ...]], int, list[str]]:
        engine = Engine()
        requests = [request(number, stops) for number in range(len(texts))]
        found: list[ChoiceDelta] = []
        answers = [Answer(one.request_id, one.prompt, AnswerStream(processor.tokenizer, stops)) for one in requests]
        choices = Choices(answers, cast(EngineProcess, engine), Inline())
        engine.submit(requests, choices.on_delta)
        left = {number: list(one) for number, one in enumerate(ids)}
        while left:
            number = seed.choice(sorted(left))
            name = f"r{number}"
            for _ in range(group(len(left[number])) or 1):
                if name in engine.aborted and seed.random() < 0.5:
                    left.pop(number)
                    engine.on_delta[name](TokenDelta(name, finished=Finished("abort")))
                    break
                token = left[number].pop(0) if left[number] else None
                finished = None if left[number] else Finished("length")
                logprob = None if token is None else TokenLogprob(token, -1.0)
                engine.on_delta[name](TokenDelta(name, token, logprob, finished))
            if not left.get(number):
                left.pop(number, None)
            await asyncio.sleep(0)
            await read(choices, found, timeout=0)
        await read(choices, found)
        choices.close()
        told = []
        for number, answer in enumerate(answers):
            mine = [delta for delta in found if delta.index == number]
            assert [delta.finish_reason for delta in mine[:-1]] == [None] * (len(mine) - 1)
            text = "".join(delta.text for delta in mine)
            tokens = tuple(delta.logprob.token_id for delta in mine if delta.logprob)
            assert (answer.text, tuple(answer.token_ids)) == (text, tokens)
            told.append((text, tokens, mine[-1].finish_reason, answer.matched_stop))
        return told, choices.usage.completion_tokens, sorted(engine.aborted)

    whole = asyncio.run(play(lambda length: max(1, length)))
    single = asyncio.run(play(lambda length: 1))
    mixed = asyncio.run(play(lambda length: seed.randint(1, max(1, length))))
    assert whole[:2] == single[:2] == mixed[:2]
    for (text, tokens, reason, matched), original in zip(whole[0], texts, strict=True):
        assert (text, matched) == cut_at_first(original, stops)
        assert reason == ("length" if matched is None else "stop")
        assert len(tokens) <= len(original.encode())
    assert sum(len(tokens) for _, tokens, _, _ in whole[0]) == whole[1]


@FAST
@given(st.lists(st.text(), max_size=5), st.booleans())
def test_events_survive_any_text(texts: list[str], comments: bool) -> None:
    """Line breaks of every kind stay inside their event, as clients split lines."""
    sent = b"".join(
        event({"choices": [{"delta": {"content": text}, "logprobs": None, "finish_reason": None}]})
        + (KEEP_ALIVE if comments else b"")
        for text in texts
    )
    lines = (sent + DONE).decode().split("\n")
    told = told_by(iter(lines))
    assert told.text == "".join(texts)
    assert told.done


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from([*ChatCompletionRequest.model_fields, *REFUSED])
GOOD: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@settings(FAST, max_examples=150)
@given(st.dictionaries(FIELDS, JSON, max_size=3), JSON)
def test_any_body_is_read_or_refused_by_name(fields: dict[str, Any], content: Any) -> None:
    for body in ({**GOOD, **fields}, {"messages": [{"role": "user", "content": content}]}, content):
        try:
            parsed = ChatCompletionRequest.model_validate(body)
        except ValidationError as error:
            found = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
            reason = from_validation(found)
            assert reason.status == 400
            assert len(reason.message) < 500
            assert "\n" not in reason.message
            json.dumps(error_body(reason))
        else:
            header = ",".join(ignored_fields(parsed))
            assert header.isascii()
            assert header.isprintable()


@pytest.mark.parametrize(("kind", "good"), [(ChatCompletionRequest, GOOD), (CompletionRequest, {"prompt": "a"})])
def test_every_refused_field_is_refused_by_name(kind: type[BaseModel], good: dict[str, Any]) -> None:
    """But for what this kind of request has."""
    refused = {name: neutral for name, neutral in REFUSED.items() if name not in kind.model_fields}
    assert len(refused) > 30
    for name, neutral in refused.items():
        with pytest.raises(ValidationError) as caught:
            kind.model_validate({**good, name: ["something else"]})
        error = caught.value.errors()[0]["ctx"]["error"]
        assert isinstance(error, UserError)
        assert (error.code, error.param) == ("unsupported_field", name)
        for value in (None, False, [], {}, "", *neutral):
            kind.model_validate({**good, name: value})


def test_token_texts_are_bytes(processor: Processor) -> None:
    tokenizer = processor.tokenizer
    texts = TokenTexts(tokenizer)
    for text in ("The image shows a cat.\n\n", "ñ€🙂 \t"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(texts.bytes_of(token) for token in ids).decode() == text
    (end,) = processor.eos_token_ids
    assert texts.bytes_of(end) == b"<|im_end|>"
    assert texts.bytes_of(10**6) == b""
    report = texts.report([TokenLogprob(0, float("-inf"), ((1, -0.5),))])
    assert report["content"][0]["logprob"] == -9999.0
