"""/v1/decisions, /v1/systemone and /v1/score: each shape of questions, against `LLM.decide` and whole forwards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import MODEL, RunningServer, Told, assert_error, assert_unharmed, data_url, picture, rounded, run_batch

from siglane.families.model import load_model
from siglane.families.processor import Processor
from siglane.llm import LLM
from siglane.lm.attention import SegmentAttention
from siglane.types import Question
from siglane.weights.hub import open_checkpoint

DECISIONS, SYSTEMONE, SCORE = "/v1/decisions", "/v1/systemone", "/v1/score"
PICTURE = picture(90, 50, seed=5)
IMAGE = data_url(PICTURE)
ABOUT = "Order 5: two cups, one of them broken."
LABELS = ["a red square", "a red circle", "<|im_end|>"]


@pytest.fixture(scope="module")
def llm(nvila_folder: Path) -> LLM:
    return LLM(nvila_folder, device="cpu", kv_tokens=8192)


def asked(server: RunningServer, path: str, **body: Any) -> dict[str, Any]:
    answer = server.post_to(path, model=MODEL, **body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_as_sglang_asks(server: RunningServer, llm: LLM) -> None:
    found = asked(
        server,
        DECISIONS,
        input=ABOUT,
        images=[IMAGE, {"url": IMAGE, "detail": "low"}],
        questions=[
            {"id": "broken", "type": "yes_no", "question": "Is something broken?", "yes": {"cups": 1}},
            {
                "id": "what",
                "type": "choice",
                "question": "What is it?",
                "options": [{"name": "cup"}, {"name": "pot", "description": "large"}],
            },
            {"id": "how", "type": "score", "question": "How bad?", "levels": ["well", "bad", "worse"]},
            {"id": "seen", "type": "labels", "question": "What do you see?", "labels": LABELS},
        ],
    )
    questions = [
        Question.yes_no("Is something broken?", yes='{"cups":1}'),
        Question.choice("What is it?", {"cup": "", "pot": "large"}),
        Question.score("How bad?", ["well", "bad", "worse"]),
        Question("What do you see?", tuple(LABELS)),
    ]
    images = [PICTURE, {"image": PICTURE, "detail": "low"}]
    expected = llm.decide({"prompt": ABOUT, "images": images}, questions)
    assert (found["object"], found["model"], found["prompt_format_version"]) == ("decisions", MODEL, 1)
    assert [*found["answers"]] == ["broken", "what", "how", "seen"]
    for answer, decision in zip(found["answers"].values(), expected, strict=True):
        assert answer["probabilities"] == pytest.approx(decision.probabilities, abs=1e-5)
        assert answer["label_mass"] == pytest.approx(decision.mass, abs=1e-5)
        assert answer.get("choice", decision.choice) == decision.choice
    assert [answer["type"] for answer in found["answers"].values()] == ["yes_no", "choice", "score", "labels"]
    levels = found["answers"]["how"]["probabilities"]
    assert found["answers"]["how"]["score"] == pytest.approx(levels["1"] + 2 * levels["2"])
    usage = found["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == sum(one.prompt_tokens for one in expected)
    assert usage["completion_tokens"] == 0
    assert len(found["siglane"]["images"]) == 2
    assert (
        4 * sum(one["tokens"] for one in found["siglane"]["images"]) == usage["prompt_tokens_details"]["image_tokens"]
    )


def test_as_openai_asks(server: RunningServer, llm: LLM) -> None:
    questions = [
        {"type": "predicate", "instructions": "Something is broken.", "name": "broken"},
        {
            "type": "choice",
            "instructions": [{"type": "input_text", "text": "Whole?"}],
            "choices": [{"value": True}, {"value": "no"}],
        },
        {
            "type": "score",
            "instructions": "How bad?",
            "levels": [{"label": "well"}, {"label": "bad", "description": "torn"}],
        },
    ]
    parts = [{"type": "input_image", "image_url": IMAGE}, {"type": "input_text", "text": ABOUT}]
    said = [{"role": "developer", "content": "Be strict."}, {"type": "message", "role": "user", "content": parts}]
    found = asked(server, DECISIONS, input=said, questions=questions)
    broken, whole, bad = found["answers"]
    assert (broken["type"], broken["name"], whole["name"]) == ("predicate", "broken", None)
    assert 0 <= broken["probability"] <= 1
    assert [one["value"] for one in whole["probabilities"]] == [True, "no"]
    assert whole["choice"] in (True, "no")
    assert [(one["value"], one["label"]) for one in bad["probabilities"]] == [(0, "well"), (1, "bad")]
    assert bad["score"] == pytest.approx(bad["probabilities"][1]["probability"])
    assert found["usage"]["input_tokens"] == found["usage"]["total_tokens"]
    plain = asked(server, DECISIONS, input=ABOUT, images=[IMAGE], questions=questions)["answers"]
    (expected, *_) = llm.decide({"prompt": ABOUT, "images": [PICTURE]}, [Question.yes_no("Something is broken.")])
    assert plain[0]["probability"] == pytest.approx(expected.probabilities["yes"], abs=1e-5)
    flat = asked(server, DECISIONS, input=ABOUT, images=[IMAGE], questions=questions, temperature=1e6)["answers"]
    assert flat[0]["probability"] == pytest.approx(0.5, abs=1e-4)


def test_as_system_one_asks(server: RunningServer, llm: LLM) -> None:
    questions = {
        "rain": {"type": "noul", "instructions": "It rains.", "criteria": {"false": "Dry"}},
        "which": {"type": "choice", "criteria": {str(number): None for number in range(40)}},
        "one": {"type": "choice", "criteria": {"only": "this"}},
        "warm": {"type": "score", "instructions": {"ask": "warmth"}, "criteria": ["cold", ["mild", 1], "hot"]},
    }
    found = asked(server, SYSTEMONE, state={"weather": "sunny"}, images=[IMAGE], questions=questions)
    same = [
        Question.yes_no("It rains.", "", "Dry"),
        Question.choice("", {str(number): "" for number in range(40)}),
        Question.choice("", {"only": "this"}),
        Question.score('{"ask":"warmth"}', ["cold", '["mild",1]', "hot"]),
    ]
    expected = llm.decide({"prompt": '{"weather":"sunny"}', "images": [PICTURE]}, same)
    answers = found["answers"]
    assert [*answers] == [*questions]
    assert answers["rain"] == {
        "type": "noul",
        "noul": pytest.approx(expected[0].probabilities["yes"], abs=1e-5),
        "x_label_mass": pytest.approx(expected[0].mass, abs=1e-5),
    }
    shares = [*answers["which"]["probabilities"].values()]
    assert answers["which"]["probabilities"] == pytest.approx(expected[1].probabilities, abs=1e-5)
    assert answers["which"]["confidence"] == pytest.approx((40 * max(shares) - 1) / 39)
    assert (answers["one"]["choice"], answers["one"]["confidence"]) == ("only", 1.0)
    assert answers["warm"]["legend"] == {"0": "cold", "1": ["mild", 1], "2": "hot"}
    assert math.fsum(answers["warm"]["probabilities"].values()) == pytest.approx(1)
    assert found["usage"]["input_tokens"] == sum(one.prompt_tokens for one in expected)


def test_what_has_no_effect_is_told(server: RunningServer) -> None:
    rain = {"type": "noul", "instructions": "It rains.", "why": "so"}
    answer = server.post_to(SYSTEMONE, state="x", questions={"rain": rain}, user="me")
    assert answer.headers["x-siglane-ignored-fields"] == "user,questions.why"


def test_the_prompt_that_was_read(server: RunningServer, processor: Processor) -> None:
    question = {"id": "a", "type": "labels", "question": "What do you see?", "labels": LABELS}
    found = asked(server, DECISIONS, input="Look.", questions=[question], return_prompt_token_ids=True)["answers"]["a"]
    assert processor.tokenizer.decode(found["prompt_token_ids"]).count("Look.\n\nWhat do you see?") == 1
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [processor.tokenizer.decode(ids) for ids in found["label_token_ids"]] == LABELS
    assert end not in found["label_token_ids"][2]
    ids = found["prompt_token_ids"]
    scored = asked(server, SCORE, query=ids, items=[[]], labels=LABELS, apply_softmax=True)
    assert scored["scores"][0] == pytest.approx([*found["probabilities"].values()], abs=1e-6)


def test_scores_of_texts_and_ids(server: RunningServer, processor: Processor, nvila_folder: Path) -> None:
    model = load_model(open_checkpoint(nvila_folder), processor.config, device="cpu", dtype=torch.float32)
    query, items, labels = "Is this true? ", ["The sea is wet.", "Ice is <|im_end|> hot."], [40, 41, 42]

    @torch.inference_mode()
    def expected(text: str) -> list[float]:
        ids = processor.tokenizer(text).input_ids
        embeds, language = model.language.embed(torch.tensor(ids)), model.language
        hidden = language(embeds, torch.arange(len(ids)), SegmentAttention([len(ids)]))
        found: list[float] = language.logits(hidden[-1]).softmax(-1)[labels].tolist()
        return found

    body = {"query": query, "items": items, "label_token_ids": labels}
    found = asked(server, SCORE, **body, return_token_logprobs=True)
    assert found["object"] == "scoring"
    for row, logs, item in zip(found["scores"], found["token_logprobs"], items, strict=True):
        assert row == pytest.approx(expected(query + item), abs=1e-5)
        assert row == pytest.approx([math.exp(one) for one in logs])
    shares = asked(server, SCORE, **body, apply_softmax=True, item_first=True)["scores"]
    for row, item in zip(shares, items, strict=True):
        powers = expected(item + query)
        assert row == pytest.approx([power / sum(powers) for power in powers], abs=1e-5)
    ids = [processor.tokenizer(query + item).input_ids for item in items]
    same = asked(
        server, SCORE, query=ids[0][:2], items=[ids[0][2:], ids[1][2:]], label_token_ids=[labels[:2], labels[2:]]
    )
    assert same["scores"][0] == pytest.approx(found["scores"][0][:2], abs=1e-6)
    assert same["scores"][1] == pytest.approx(found["scores"][1][2:], abs=1e-6)
    assert asked(server, SCORE, query="", items="x", label_token_ids=[5])["usage"]["prompt_tokens"] == 1


YES = {"id": "a", "type": "yes_no", "question": "Is it?"}
PREDICATE = {"type": "predicate", "instructions": "It is."}


def options(*names: str) -> dict[str, Any]:
    return {
        "input": "x",
        "questions": [{"id": "a", "type": "choice", "question": "?", "options": [{"name": one} for one in names]}],
    }


def labels(*texts: str) -> dict[str, Any]:
    return {"input": "x", "questions": [{"id": "a", "type": "labels", "question": "?", "labels": [*texts]}]}


NESTED: Any = "x"
for _ in range(400):
    NESTED = [NESTED]

BAD: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "no input": (DECISIONS, {"questions": [YES]}, "missing_field", "input"),
    "an empty input": (DECISIONS, {"input": "", "questions": [YES]}, "invalid_value", "input"),
    "a number": (DECISIONS, {"input": 5, "questions": [YES]}, "invalid_value", "input"),
    "deep input": (DECISIONS, {"input": NESTED, "questions": [YES]}, "invalid_value", "input"),
    "deep state": (
        SYSTEMONE,
        {"state": NESTED, "questions": {"a": {"type": "noul", "instructions": "x"}}},
        "invalid_value",
        "state",
    ),
    "no questions": (DECISIONS, {"input": "x", "questions": []}, "invalid_value", "questions"),
    "too many questions": (DECISIONS, {"input": "x", "questions": [PREDICATE] * 65}, "invalid_value", "questions"),
    "questions of both kinds": (
        DECISIONS,
        {"input": "x", "questions": [YES, PREDICATE]},
        "invalid_value",
        "questions[1].type",
    ),
    "equal ids": (DECISIONS, {"input": "x", "questions": [YES, YES]}, "invalid_value", "questions"),
    "a type that is none": (
        DECISIONS,
        {"input": "x", "questions": [YES | {"type": "box"}]},
        "invalid_value",
        "questions[0].type",
    ),
    "no type": (DECISIONS, {"input": "x", "questions": [{"id": "a"}]}, "invalid_value", "questions[0].type"),
    "no object": (DECISIONS, {"input": "x", "questions": ["Why?"]}, "invalid_value", "questions[0]"),
    "one option": (DECISIONS, options("a"), "invalid_value", "questions[0].options"),
    "equal options": (DECISIONS, options("a", " A"), "invalid_value", "questions[0]"),
    "an option of two lines": (DECISIONS, options("a", "b\nc"), "invalid_value", "questions[0].options[1].name"),
    "equal labels": (DECISIONS, labels("a", "b", "a"), "invalid_value", "questions[0]"),
    "an empty label": (DECISIONS, labels("a", ""), "invalid_value", "questions[0].labels[1]"),
    "a long label": (DECISIONS, labels("a", "word " * 200), "invalid_value", "questions[0]"),
    "a label that is a book": (DECISIONS, labels("x" * 10_000_000), "invalid_value", "questions[0]"),
    "a question that is a book": (
        DECISIONS,
        {"input": "x", "questions": [YES | {"question": "x" * 10_000_000}]},
        "context_length_exceeded",
        "questions[0]",
    ),
    "too many pictures": (
        DECISIONS,
        {"input": "x", "images": [IMAGE] * 40, "questions": [YES]},
        "too_many_images",
        "input",
    ),
    "too many labels": (DECISIONS, labels(*map(str, range(256))), "invalid_value", "questions[0].labels"),
    "eleven levels": (
        DECISIONS,
        {"input": "x", "questions": [{"id": "a", "type": "score", "question": "?", "levels": ["x"] * 11}]},
        "invalid_value",
        "questions[0].levels",
    ),
    "too many ways": (
        DECISIONS,
        {
            "input": "x",
            "questions": [labels(*(f"{n} {n}" for n in range(255)))["questions"][0] | {"id": str(n)} for n in range(3)],
        },
        "invalid_value",
        "questions",
    ),
    "too long": (DECISIONS, {"input": "word " * 9_000, "questions": [YES]}, "context_length_exceeded", "questions[0]"),
    "far too long": (DECISIONS, {"input": "x" * 10_000_000, "questions": [YES]}, "context_length_exceeded", "input"),
    "a picture that is none": (
        DECISIONS,
        {"input": "x", "images": [IMAGE, "data:image/png;base64,AAAA"], "questions": [YES]},
        "image_decode_failed",
        "images[1]",
    ),
    "a picture in messages": (
        DECISIONS,
        {
            "input": [
                {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AAAA"}]}
            ],
            "questions": [PREDICATE],
        },
        "image_decode_failed",
        "input[0].content[0]",
    ),
    "a tool's call": (
        DECISIONS,
        {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}], "questions": [PREDICATE]},
        "invalid_prompt",
        "input[0]",
    ),
    "no temperature": (DECISIONS, {"input": "x", "questions": [YES], "temperature": 0}, "invalid_value", "temperature"),
    "another wording": (
        DECISIONS,
        {"input": "x", "questions": [YES], "prompt_format_version": 2},
        "invalid_value",
        "prompt_format_version",
    ),
    "assets": (
        SYSTEMONE,
        {
            "state": "x",
            "questions": {"a": {"type": "noul", "instructions": "x"}},
            "assets": {"img": {"data_base64": "AA"}},
        },
        "unsupported_field",
        "assets",
    ),
    "temperature of System One": (
        SYSTEMONE,
        {"state": "x", "questions": {"a": {"type": "noul", "instructions": "x"}}, "temperature": 2},
        "unsupported_field",
        "temperature",
    ),
    "a name that is no name": (
        SYSTEMONE,
        {"state": "x", "questions": {"a\n" + "b" * 10_000: {"type": "score"}}},
        "missing_field",
        "questions.a?" + "b" * 62 + ".criteria",
    ),
    "an option that is no line": (
        SYSTEMONE,
        {"state": "x", "questions": {"a": {"type": "choice", "criteria": {"b\nc": None}}}},
        "invalid_value",
        "questions[0]",
    ),
    "a noul about nothing": (
        SYSTEMONE,
        {"state": "x", "questions": {"a": {"type": "noul"}}},
        "missing_field",
        "questions[0]",
    ),
    "scores without labels": (SCORE, {"query": "a", "items": ["b"]}, "missing_field", "label_token_ids"),
    "scores of both kinds": (SCORE, {"query": "a", "items": [[5]], "label_token_ids": [5]}, "invalid_value", "items"),
    "a label twice": (
        SCORE,
        {"query": "a", "items": ["b"], "label_token_ids": [5, 5]},
        "invalid_value",
        "label_token_ids",
    ),
    "an unknown label": (
        SCORE,
        {"query": "a", "items": ["b"], "label_token_ids": [5, 10**6]},
        "invalid_value",
        "label_token_ids",
    ),
    "other lists of labels": (
        SCORE,
        {"query": "a", "items": ["b"], "label_token_ids": [[5], [6]]},
        "invalid_value",
        "label_token_ids",
    ),
    "an empty prompt": (SCORE, {"query": "", "items": ["b", ""], "label_token_ids": [5]}, "empty_prompt", "items[1]"),
    "embeddings in the middle": (
        SCORE,
        {"query": "a", "items": ["b"], "label_token_ids": [5], "query_embed_overrides": [[1.0]]},
        "unsupported_field",
        "query_embed_overrides",
    ),
    "another model": (
        SYSTEMONE,
        {"state": "x", "model": "other", "questions": {"a": {"type": "noul", "instructions": "x"}}},
        "model_not_found",
        "model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_decided_says_why(case: str, server: RunningServer) -> None:
    path, body, code, param = BAD[case]
    assert_error(server.post_to(path, **body), 404 if code == "model_not_found" else 400, code, param)


def test_neighbours_are_unharmed(server: RunningServer, alone: Told) -> None:
    many = [labels(*(f"{n} {n}" for n in range(80)))["questions"][0] | {"id": str(number)} for number in range(2)]

    def decide() -> None:
        asked(server, DECISIONS, input=ABOUT, images=[IMAGE], questions=many)
        server.post_to(DECISIONS, **labels("a", "a"))

    assert_unharmed(server, alone, decide)


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (DECISIONS, {"input": ABOUT, "images": [IMAGE], "questions": [YES]}),
        (SYSTEMONE, {"state": ABOUT, "questions": {"a": {"type": "noul", "instructions": "Is it?"}}}),
        (SCORE, {"query": "a", "items": ["b"], "label_token_ids": [5, 6]}),
    ],
)
def test_rows_of_a_batch(stored: RunningServer, url: str, body: dict[str, Any]) -> None:
    done = run_batch(stored.openai(), url, [body, {**body, "stream": True}])
    found, expected = done.answers["0"], asked(stored, url, **body)
    told = [answer["usage"].get("input_tokens", answer["usage"].get("prompt_tokens")) for answer in (found, expected)]
    assert told == [done.usage.input_tokens] * 2
    for answer in (found, expected):
        del answer["usage"]
    assert found == rounded(expected, rel=1e-5)  # the second reads what the first left in the cache
    assert "stream" in done.errors
