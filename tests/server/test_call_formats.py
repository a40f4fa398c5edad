"""The forms in which models call tools, each on a model that says what its script says in its template's own form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from calling import BOTH, IN_BERN, NOW, joined, of, question
from scripted_checkpoint import ANSWER, SEE, TEMPLATES, THINKER, THOUGHT, write_scripted_checkpoint
from serving import CHAT, RunningServer, assert_error, serving_folder, stream
from test_tools import HISTORY, REQUIRED, arguments_fit
from tokenizers import AddedToken

from siglane.families.prompt.call_format import BARE, LISTED, NEXT, CallFormat

CITY = '"Bern'
END = "<|im_end|>"


class Script(NamedTuple):
    """What a model of one form may say. weather, time: how a call begins; tail, more: how the first one ends, the
    latter with another behind it."""

    form: CallFormat
    weather: str
    tail: str
    more: str
    time: str

    @classmethod
    def of(cls, form: CallFormat) -> Script:
        time = form.head("time") + "{}}" + form.after
        weather = form.before + form.head("weather") + '{"city": '
        return cls(form, weather, '"}}' + form.after, '"}}' + NEXT + time, form.before + time)

    @property
    def steps(self) -> dict[str, tuple[str, ...]]:
        form = self.form
        begin, end = (form.opening,) if form.opening else (self.weather, self.time), form.closing or END
        steps = {"\n\n": ("x", SEE, *begin), SEE: begin, self.weather: (CITY,), CITY: (self.tail, self.more)}
        steps |= {self.tail: (end,), self.more: (end,), self.time: (end,)}
        return steps | ({form.opening: (self.weather, self.time), form.closing: (END,)} if form.opening else {})


class Caller(NamedTuple):
    server: RunningServer
    script: Script

    def question(self, *said: str, **fields: Any) -> dict[str, Any]:
        return question(self.server, *said, **fields)


@pytest.fixture(scope="module", params=[LISTED, BARE], ids=["listed", "bare"])
def caller(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    script, folder = Script.of(request.param), tmp_path_factory.mktemp("form") / "tiny"
    texts = {*script.steps, *(one for several in script.steps.values() for one in several)} - {"\n\n", "x", END}
    added = [AddedToken(text, special=False, normalized=False) for text in sorted(texts)]
    write_scripted_checkpoint(folder, {**THINKER, **script.steps}, chat_template=TEMPLATES[request.param], added=added)
    with serving_folder(folder) as server:
        yield Caller(server, script)


@pytest.mark.few("*-simple-True", "*-parallel-True", "listed-*-False")
@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("case", ["simple", "multiple", "parallel", "with a word before", "irrelevant"])
def test_calls_streamed_or_not(caller: Caller, case: str, thinks: bool) -> None:
    script = caller.script
    begin = script.form.opening or script.weather
    said, content, calls = {
        "simple": ((begin,), None, [IN_BERN]),
        "multiple": ((script.form.opening, script.time), None, [NOW]),
        "parallel": ((begin, script.more), None, [IN_BERN, NOW]),
        "with a word before": ((SEE,), SEE.strip(), [IN_BERN]),
        "irrelevant": ((), ANSWER, []),
    }[case]
    if not script.form.opening and case in ("parallel", "with a word before"):  # no call: it has to stand alone
        ends = script.more if case == "parallel" else script.tail
        content, calls = (SEE if case != "parallel" else "") + script.weather + CITY + ends, []
    body = caller.question(*filter(None, said), chat_template_kwargs={"enable_thinking": thinks})
    answer = caller.server.post(body).json()
    (choice,) = answer["choices"]
    message = choice["message"]
    assert (message["content"], of(message)) == (content, calls)
    assert message["reasoning_content"] == (THOUGHT if thinks else None)
    assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
    told = stream(caller.server, body)
    streamed, reason = joined(told)
    assert (streamed.get("content"), of(streamed), reason) == (content, calls, choice["finish_reason"])
    assert told.usage["completion_tokens"] == answer["usage"]["completion_tokens"]


@pytest.mark.few("listed-some", "bare-one")
@pytest.mark.parametrize("name", REQUIRED)
def test_a_call_that_has_to_come_matches_its_schema(caller: Caller, name: str) -> None:
    choice, names = REQUIRED[name]
    for seed in range(3):
        fields = {"temperature": 1.5, "seed": seed, "max_tokens": 600}
        body = caller.question(tool_choice=choice, parallel_tool_calls=False, **fields)
        (said,) = caller.server.post(body).json()["choices"]
        ((called, arguments),) = of(said["message"])
        assert called in names
        assert arguments_fit(called, arguments)
        assert (said["message"]["content"], said["finish_reason"]) == (None, "tool_calls")
    message, reason = joined(stream(caller.server, body))
    assert (message["content"], of(message), reason) == (None, [(called, arguments)], "tool_calls")


def test_a_history_is_written_in_the_models_form(caller: Caller) -> None:
    """A template that refuses two calls at once says so."""
    server, script = caller.server, caller.script
    first = HISTORY[1]["tool_calls"][0]
    single = [HISTORY[0], {**HISTORY[1], "tool_calls": [first]}, HISTORY[2]]
    processor = server.served.chat.processor  # type: ignore[union-attr]
    tokens = server.post_to("/tokenize", messages=single, tools=BOTH).json()["tokens"]
    call = script.form.opening + script.weather + CITY + script.tail + script.form.closing
    assert call + END in processor.tokenizer.decode(tokens)
    answer = server.post({**caller.question(), "messages": HISTORY})
    if script.form.opening:
        assert answer.status_code == 200, answer.text
    else:
        assert_error(answer, 400, "chat_template_failed")
    with server.http() as client:
        examples = client.get("/openapi.json").json()["paths"][CHAT]["post"]["requestBody"]["content"]
    assert "a_tool" in examples["application/json"]["examples"]
