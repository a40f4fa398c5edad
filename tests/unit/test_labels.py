"""Labels as a tree of tokens: each inner place is read once, and the sums are those of the paths."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siglane.engine.sampling.labels import Ids, LabelRead, label_logprobs, label_reads
from siglane.families.prompt.questions import asked_behind
from siglane.types import Decision, ImagePart, Message, Prompt, Question, Readout

PROMPT = Prompt((7, 8, 9))


def logprob(place: Ids, token_id: int) -> float:
    return -(1 + hash((place, token_id)) % 1000) / 100


def told(one: LabelRead) -> list[Readout]:
    ids, end = one.prompt.token_ids, len(PROMPT.token_ids)
    return [
        Readout(read.position, tuple(logprob(ids[end : read.position + 1], token_id) for token_id in read.token_ids))
        for read in one.reads
    ]


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple), min_size=1, max_size=12, unique=True))
def test_sums_over_each_labels_own_path(labels: list[Ids]) -> None:
    reads = label_reads(PROMPT, labels)
    found = label_logprobs(labels, [(one, told(one)) for one in reads])
    expected = [math.fsum(logprob(ids[:place], ids[place]) for place in range(len(ids))) for ids in labels]
    assert found == pytest.approx(expected)
    places = [one.prompt.token_ids[: read.position + 1] for one in reads for read in one.reads]
    assert len({*places}) == len(places), "a place is read twice"
    assert {*places} == {PROMPT.token_ids + ids[:length] for ids in labels for length in range(len(ids))}
    assert all(one.reads for one in reads)


def test_labels_of_one_token_are_one_request() -> None:
    (one,) = label_reads(PROMPT, [(5,), (6,), (4,)])
    assert (one.prompt.token_ids, one.tail) == (PROMPT.token_ids, ())
    assert [(read.position, read.token_ids) for read in one.reads] == [(2, (5, 6, 4))]
    several = label_reads(PROMPT, [(5, 1, 2), (5, 1, 3), (6, 1), (5,)])
    assert [one.tail for one in several] == [(5, 1), (6,)]


def test_probabilities() -> None:
    decision = Decision(("a", "b"), (math.log(0.3), math.log(0.1)))
    assert decision.probabilities == pytest.approx({"a": 0.75, "b": 0.25})
    assert (decision.choice, decision.mass) == ("a", pytest.approx(0.4))
    assert decision.shares(2.0) == pytest.approx([3**0.5 / (1 + 3**0.5), 1 / (1 + 3**0.5)])
    assert decision.shares(1e-300) == [1.0, 0.0]
    assert Decision(("a", "b"), (-1e6, -1e6 - 1)).shares() == pytest.approx([1 / (1 + math.exp(-1)), 0.2689], abs=1e-4)


def test_wording() -> None:
    assert (
        Question.yes_no("It rains.", no="Dry").text
        == "Is the following true? It rains.\nno: Dry\nAnswer with yes or no only."
    )
    choice = Question.choice("Which?", {"red": "", "blue": "as the sea"})
    assert choice.text == "Question: Which?\nA: red\nB: blue - as the sea\nAnswer with the letter of one option only."
    assert (choice.labels, choice.meanings) == (("A", "B"), ("red", "blue"))
    many = Question.choice("", {str(number): "" for number in range(30)})
    assert many.labels[:2] + many.labels[-1:] == ("AA", "AB", "BD")
    score = Question.score("How?", ["bad", "good"])
    assert (score.labels, score.text.splitlines()[1]) == (("0", "1"), "0: bad")
    with pytest.raises(ValueError, match="2 labels have 1 names"):
        Question("a", ("b", "c"), ("d",))


def test_a_question_stands_behind_what_it_is_about() -> None:
    question = Question("Why?", ("a",))
    seen = (Message("system", ("Be brief.",)), Message("user", (ImagePart(0), "Look.")))
    assert asked_behind(seen, question) == (seen[0], Message("user", (ImagePart(0), "Look.\n\nWhy?")))
    assert asked_behind((Message("user", (ImagePart(0),)),), question) == (Message("user", (ImagePart(0), "Why?")),)
    earlier = (Message("user", ("Hi",)), Message("assistant", ("Hello",)))
    assert asked_behind(earlier, question) == (*earlier, Message("user", ("Why?",)))
