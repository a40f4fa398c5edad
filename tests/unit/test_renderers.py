"""Chat templates run in a process that can be ended: what transformers renders, and what never ends ends alone."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from checkpoints import build_tokenizer
from waiting import PATIENCE, eventually

from siglane.errors import UserError
from siglane.families.prompt import renderers
from siglane.families.prompt.renderers import Renderers

# a chat template that loops only for some words, so that no trial at load shows it
LOOPS = (
    "{% for m in messages %}{{ m.content }}{% if 'spin' in m.content %}"
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{% endfor %}"
)
GROWS = "{% set n = namespace(s='x') %}{% for a in range(64) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
ONE_STEP = "{{ 'x' * 99999999999 }}"  # inside C, where no Python line is reached


@pytest.fixture(scope="module")
def some() -> Iterator[Renderers]:
    found = Renderers(most=2)
    yield found
    found.close()


def messages(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text} for text in texts]}


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}{% if add_generation_prompt %}!{% endif %}{{ eos_token }}{{ tools }}{{ documents }}",
        "  {% for m in messages %}\n  {{ m.role }}\n  {% if loop.first %}{% continue %}{% endif %}{{ m }}{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'é<': \"'\"} | tojson(ensure_ascii=True) }}",
        "{{ {'b': 1, 'a': [true, none]} | tojson(sort_keys=true, separators=(',', ':')) }}",
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ messages[0].content }}{% endgeneration %}{{ x }}",
        "{{ strftime_now('%Y') | length }}{{ missing }}{{ missing is defined }}{{ mood }}",
        "{% macro f(a) %}<{{ a }}>{% endmacro %}{% for m in messages[::-1] %}{{ f(m.content) }}{% break %}{% endfor %}",
    ],
)
def test_the_text_is_the_one_of_transformers(some: Renderers, template: str) -> None:
    tokenizer = build_tokenizer()
    turns = [{"role": "user", "content": "Größe <b> 😀 \n"}, {"role": "user", "content": "two"}]
    theirs = tokenizer.apply_chat_template(
        turns, chat_template=template, tokenize=False, add_generation_prompt=True, mood="x"
    )
    stated = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": True, "mood": "x"}
    assert some.render(template, {**tokenizer.special_tokens_map, **stated}) == theirs


def test_what_a_template_raises_is_told(some: Renderers) -> None:
    for template, words in (
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10000000) }}", "Range too big"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            some.render(template, messages("x"))
        assert (caught.value.code, caught.value.param) == ("chat_template_failed", "messages")
    assert some.render("{{ messages[0].content }}", messages("still there")) == "still there"


@pytest.mark.parametrize(
    ("template", "code"), [(LOOPS, "template_timeout"), (GROWS, "template_memory"), (ONE_STEP, "")]
)
def test_what_has_no_end_is_ended(
    some: Renderers, template: str, code: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(renderers, "RENDER_SECONDS", 0.3 if code == "template_timeout" else PATIENCE)
    with pytest.raises(UserError) as caught:
        some.render(template, messages("spin"))
    assert caught.value.code == (code or "template_memory")
    assert caught.value.status == 400
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    monkeypatch.undo()
    assert some.render(LOOPS, messages("good")) == "good"


def test_a_neighbour_is_answered_meanwhile(some: Renderers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's alarm, which ends what has no end, is the test's own."""
    monkeypatch.setattr(renderers, "RENDER_SECONDS", 2 * PATIENCE)
    some.render("x", {})
    busy, errors = some._idle[-1], list[str]()

    def spin() -> None:
        with pytest.raises(UserError) as caught:
            some.render(LOOPS, messages("spin"))
        errors.append(caught.value.code)

    thread = threading.Thread(target=spin)
    thread.start()
    eventually(lambda: busy not in some._idle)
    assert [some.render(LOOPS, messages(f"good {number}")) for number in range(5)] == [f"good {n}" for n in range(5)]
    assert errors == []
    os.kill(busy.pid, signal.SIGALRM)
    thread.join(PATIENCE)
    assert errors == ["template_timeout"]


def test_many_threads_share_few_processes(some: Renderers) -> None:
    found: dict[int, str] = {}

    def ask(number: int) -> None:
        found[number] = some.render("{{ messages[0].content }}", messages(f"text {number}" * 5000))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: f"text {number}" * 5000 for number in range(16)}
    assert len(some._idle) == 2


def test_a_process_that_somebody_ended_is_replaced(some: Renderers) -> None:
    some.render("x", {})
    ended = some._idle[-1]
    os.kill(ended.pid, signal.SIGKILL)
    ended.wait(PATIENCE)
    assert some.render("{{ messages[0].content }}", messages("again")) == "again"


def test_no_process_outlives_the_one_that_asks() -> None:
    one = Renderers(most=1)
    one.render("x", {})
    (process,) = one._idle
    assert process.stdin is not None
    process.stdin.close()  # what the kernel does when its parent is killed
    assert process.wait(PATIENCE) == 0
    one.close()


def test_a_fork_has_its_own() -> None:
    assert renderers.renderers() is renderers.renderers()
    assert renderers._of_process(-1) is not renderers.renderers()
