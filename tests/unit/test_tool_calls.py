"""Calls of tools: found in a text however it comes, held to their schemas, offered as the templates offer them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from checkpoints import build_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted_checkpoint import AND, ANSWER, CHOSEN, SEE, TEMPLATES, THOUGHT, write_calling_checkpoint
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from siglane import LLM, Constraint, SamplingParams, UserError
from siglane.engine.answers.detokenize import TextStream
from siglane.engine.answers.tool_calls import CallStream, joined_calls
from siglane.engine.constraints.constraint import Grammars, check_constraint
from siglane.engine.constraints.tool_grammar import tool_constraint
from siglane.families.family import CHATML, PromptRules
from siglane.families.prompt.builder import PromptBuilder
from siglane.families.prompt.call_format import BARE, FORMATS, HERMES, LISTED, NEXT, CallFormat
from siglane.media.messages import read_messages
from siglane.media.tools import read_tools
from siglane.types import ToolUse

CITY = {"type": "object", "properties": {"city": {"enum": ["Bern", "Zürich"]}}, "required": ["city"]}
CITY["additionalProperties"] = False
TREE = {
    "type": "object",
    "properties": {"children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}, "leaf": {"type": "boolean"}},
    "required": ["leaf"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {"weather": CITY, "tree.plant": TREE, "time": None}


def tools(strict: bool = False) -> list[dict[str, Any]]:
    functions = [{"name": name, "parameters": schema, "strict": strict} for name, schema in SCHEMAS.items()]
    return [{"type": "function", "function": {**function, "description": "does it"}} for function in functions]


def use(choice: str | None = None, *, strict: bool = False, parallel: bool = True) -> ToolUse:
    found = read_tools(tools(strict), choice, parallel)
    assert found is not None
    return found


Found = tuple[str, list[tuple[str, str]]]


def found_in(
    text: str, cuts: Sequence[int] = (), form: CallFormat = HERMES, *, exact: bool = False, parallel: bool = True
) -> Found:
    stream = CallStream(use(parallel=parallel), form, exact=exact)
    ends = [*sorted({min(cut, len(text)) for cut in cuts}), len(text)]
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    told = [stream.push(piece) for piece in pieces] + [stream.push("", finished=True)]
    calls = joined_calls(delta for _, deltas in told for delta in deltas)
    assert len({call.call_id for call in calls}) == len(calls)
    return "".join(said for said, _ in told), [(call.name, call.arguments) for call in calls]


BEGIN, END = HERMES.tags
HEAD, BERN = f"{HERMES.before}{HERMES.head('weather')}", '{"city": "Bern"}'
WEATHER = f"{BEGIN}{HEAD}{BERN}}}\n{END}"
COMPACT = f'{BEGIN}{{"arguments":{{"n":1.50,"s":"{END}}}\\""}},"name":"time"}}{END}'
TEXTS: dict[str, tuple[str, Found]] = {
    "nothing": ("", ("", [])),
    "text": (" no call <tool \n", (" no call <tool \n", [])),
    "a call": (WEATHER, ("", [("weather", BERN)])),
    "as JSON may be": (COMPACT, ("", [("time", f'{{"n":1.50,"s":"{END}}}\\""}}')])),
    "two": (f"{WEATHER}\n{COMPACT}", ("", [("weather", BERN), ("time", f'{{"n":1.50,"s":"{END}}}\\""}}')])),
    "between texts": (f"First.\n{WEATHER}\nThen. \n", ("First.\nThen.", [("weather", BERN)])),
    "behind white space": (f"\n\n{WEATHER}\n", ("", [("weather", BERN)])),
    "without arguments": (f'{BEGIN}{{"name": "time"}}{END}', ("", [("time", "{}")])),
    "without its end": (f'{BEGIN}\n{{"name": "time"}}\n', ("", [("time", "{}")])),
    "with half of its end": (f'{BEGIN}\n{{"name": "time"}}\n</tool_c', ("", [("time", "{}")])),
    "without its end before another": (
        f'{BEGIN}{{"name": "time"}}{WEATHER}',
        ("", [("time", "{}"), ("weather", BERN)]),
    ),
    "behind what is none": (f"{BEGIN}{{{WEATHER}", (f"{BEGIN}{{", [("weather", BERN)])),
}
NO_CALLS = [
    f'{BEGIN}{{"name": "rain", "arguments": {{}}}}{END}',
    f'{BEGIN}{{"name": 3, "arguments": {{}}}}{END}',
    f'{BEGIN}{{"name": "time", "arguments": "{{}}"}}{END}',
    f'{BEGIN}{{"name": "time", "arguments": [1]}}{END}',
    f'{BEGIN}{{"name": "time", "arguments": {{"a": NaN}}}}{END}',
    f'{BEGIN}{{"name": "time", "arguments": {{"a": 1,}}}}{END}',
    f'{BEGIN}{{"name": "time", "arguments": {{}}}} and {END}',
    f'{BEGIN}{{"name": "time", "arguments": {{"a": {"[" * 5000}{"]" * 5000}}}}}{END}',
    f'{BEGIN}{{"name": "time", "arguments": {{"a": {"9" * 5000}}}}}{END}',
    f"{BEGIN}[]{END}",
    f"{BEGIN}{{}}{END}",
    f'{BEGIN}{{"name": "time", "arguments": {{"a": "',
    f"{BEGIN} time {END}",
    BEGIN,
    f"{BEGIN}{{" * 50,
    f'{BEGIN}{{"' * 50,
]


@pytest.mark.parametrize("name", TEXTS)
def test_calls_are_told_from_text(name: str) -> None:
    text, expected = TEXTS[name]
    assert found_in(text) == expected
    assert found_in(text, range(len(text))) == expected


@pytest.mark.parametrize("text", NO_CALLS, ids=range(len(NO_CALLS)))
def test_what_only_looks_like_a_call_stays_text(text: str) -> None:
    assert found_in(text) == (text, [])
    assert found_in(text, range(len(text))) == (text, [])
    assert found_in(text + WEATHER, range(0, len(text), 3)) == (text, [("weather", BERN)])


PIECES = [BEGIN, END, WEATHER, COMPACT, HEAD, '{"name": "time", "arguments": ', BERN, "}\n", "<tool"]
PIECES += [
    f"[{LISTED.head('weather')}",
    f"{NEXT}{LISTED.head('time')}",
    "}]",
    BARE.head("time"),
    "[",
    "]",
    "{",
    "}",
    '"',
    "\\",
    " ",
    "\n",
    "a",
]


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.lists(st.integers(0, 300), max_size=20),
    st.sampled_from(FORMATS),
    st.booleans(),
    st.booleans(),
)
@example(f"{WEATHER}\\{WEATHER}", [5, 30], HERMES, False, True)
def test_an_answer_is_the_same_however_it_comes(
    text: str, cuts: list[int], form: CallFormat, exact: bool, parallel: bool
) -> None:
    whole = found_in(text, form=form, exact=exact, parallel=parallel)
    assert found_in(text, cuts, form, exact=exact, parallel=parallel) == whole
    assert exact or all(isinstance(json.loads(arguments), dict) for _, arguments in whole[1])
    assert parallel or len(whole[1]) <= 1


def test_what_a_grammar_writes_is_given_out_as_it_comes() -> None:
    stream = CallStream(use(), HERMES, exact=True)
    deltas = [delta for letter in WEATHER for delta in stream.push(letter)[1]]
    assert (deltas[0].name, deltas[0].arguments, bool(deltas[0].call_id)) == ("weather", "", True)
    assert [delta.arguments for delta in deltas[1:]] == list(BERN)
    assert not any(delta.name or delta.call_id for delta in deltas[1:])


def test_many_beginnings_cost_no_more_than_their_letters() -> None:
    """A client may have a model write them."""
    stream = CallStream(use(), HERMES, exact=False)
    for _ in range(20_000):
        stream.push(f'{BEGIN}{{"')
    assert stream.push("", finished=True) == (f'{BEGIN}{{"', ())


@pytest.mark.parametrize("special", [True, False])
def test_tags_that_are_special_tokens_are_shown(special: bool) -> None:
    tokenizer = tagged(special)
    ids = tokenizer(f"a{WEATHER}b").input_ids
    stream = TextStream(tokenizer, shown=(BEGIN, END))
    assert "".join(stream.push([one]) for one in ids) + stream.push((), finished=True) == f"a{WEATHER}b"
    stopped = TextStream(tokenizer, (f"{END}b",), shown=(BEGIN, END))
    assert stopped.push(ids) == f"a{WEATHER}".removesuffix(END)
    assert stopped.stopped == f"{END}b"
    hidden = TextStream(tokenizer).push(ids, finished=True)
    assert (BEGIN in hidden) == (not special)


LIST = f"{BEGIN}[{LISTED.head('weather')}{BERN}}}, {LISTED.head('time')}{{}}}}]{END}"
LLAMA = f"{BARE.head('weather')}{BERN}}}"
OTHER_FORMS: dict[str, tuple[CallFormat, str, Found]] = {
    "a list": (LISTED, LIST, ("", [("weather", BERN), ("time", "{}")])),
    "a list of one": (LISTED, f'See: {BEGIN}[{{"name": "time"}}]{END}\n', ("See:", [("time", "{}")])),
    "no list": (LISTED, WEATHER, ("", [("weather", BERN)])),
    "a list where each has its tags": (HERMES, LIST, ("", [("weather", BERN), ("time", "{}")])),
    "two lists": (LISTED, f"{LIST}\n{LIST}", ("", [("weather", BERN), ("time", "{}")] * 2)),
    "a list without its end": (LISTED, LIST.removesuffix(END), ("", [("weather", BERN), ("time", "{}")])),
    "a cut list": (LISTED, LIST.removesuffix(f"]{END}"), (LIST.removesuffix(f"]{END}"), [])),
    "an empty list": (LISTED, f"{BEGIN}[]{END}", (f"{BEGIN}[]{END}", [])),
    "a list of others": (LISTED, f'{BEGIN}[1, "{{}}"]{END}', (f'{BEGIN}[1, "{{}}"]{END}', [])),
    "a stranger in a list": (LISTED, LIST.replace("time", "rain"), (LIST.replace("time", "rain"), [])),
    "a bare one": (BARE, f"\n{LLAMA}\n", ("", [("weather", BERN)])),
    "a bare one in its own words": (BARE, '{"parameters":{},"name":"time"}', ("", [("time", "{}")])),
    "no second one": (BARE, LLAMA + LLAMA, (LLAMA + LLAMA, [])),
    "behind a text": (BARE, f"See: {LLAMA}", (f"See: {LLAMA}", [])),
    "before a text": (BARE, f"{LLAMA} It is.", (f"{LLAMA} It is.", [])),
    "another object": (BARE, '{"city": "Bern"} \n', ('{"city": "Bern"} \n', [])),
    "another key": (BARE, f"{HERMES.head('weather')}{BERN}}}", ("", [("weather", BERN)])),
    "both keys": (BARE, '{"name": "time", "parameters": {}, "arguments": {"a": 1}}', ("", [("time", '{"a": 1}')])),
    "half of one": (BARE, LLAMA[:-1], (LLAMA[:-1], [])),
    "a bare text": (BARE, " It is.\n", (" It is.\n", [])),
    "nothing": (BARE, " \n", (" \n", [])),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_other_forms_are_told_from_text(name: str) -> None:
    form, text, expected = OTHER_FORMS[name]
    assert found_in(text, form=form) == expected
    assert found_in(text, range(len(text)), form) == expected


def tagged(special: bool | None) -> PreTrainedTokenizerFast:
    """None: the tags are no tokens."""
    tokenizer = build_tokenizer(())
    if special is not None:
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in (BEGIN, END)])
    return tokenizer


def written(constraint: Constraint, tokenizer: PreTrainedTokenizerFast, seed: int, begins: Sequence[str] = ()) -> str:
    """What a model says that likes every token as much as another, and ends more and more. begins: what it said."""
    (end,) = (tokenizer.convert_tokens_to_ids(text) for text in ("<|im_end|>",))
    constrained = Grammars(tokenizer, len(tokenizer), [end]).start(constraint, None, "closed")
    rng, said = np.random.default_rng(seed), [one for text in begins for one in tokenizer(text).input_ids]
    for token_id in said:
        bits = constrained.allowed()
        assert bits is not None
        assert bits[token_id]
        constrained.append(token_id)
    ends = np.zeros(len(tokenizer))
    ends[[end, *(tokenizer.convert_tokens_to_ids(text) for text in '"}]')]] = 0.05
    for place in range(2000):
        bits = constrained.allowed()
        assert bits is not None
        token_id = int(np.where(bits, rng.gumbel(size=len(bits)) + place * ends, -np.inf).argmax())
        if token_id == end:
            return str(tokenizer.decode(said))
        said.append(token_id)
        constrained.append(token_id)
    raise AssertionError(f"no end: {tokenizer.decode(said)[:200]}")


def check_calls(text: str, form: CallFormat, *, most: int | None = None) -> str:
    """What stands beside calls that match their schemas."""
    said, calls = found_in(text, range(len(text)), form, exact=True)
    # they are what is taken for calls where nothing is held to a grammar too
    assert found_in(text, form=form) == (said, calls)
    for name, arguments in calls:
        schema = SCHEMAS[name] or {"type": "object", "maxProperties": 0}
        assert jsonschema_rs.validator_for(schema).is_valid(json.loads(arguments)), text
    assert most is None or len(calls) <= most
    return said


@pytest.mark.few("True-*", "False-form0", "None-form1")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("special", [True, False, None])
def test_calls_are_held_to_their_schemas(form: CallFormat, special: bool | None) -> None:
    tokenizer = tagged(special)
    several, one = (tool_constraint(use("required", parallel=parallel), form) for parallel in (True, False))
    exact, alone = (tool_constraint(use(strict=True, parallel=parallel), form) for parallel in (True, False))
    answer = tool_constraint(use(strict=True), form, Constraint.json_schema({"enum": ["yes", "no"]}))
    for constraint in (several, one, exact, alone, answer):
        assert constraint is not None
        check_constraint(constraint)
        for seed in range(3):
            begins = ("Look: ", form.opening) if constraint in (exact, alone) else ()
            text = written(constraint, tokenizer, seed, begins)
            said = check_calls(text, form, most=1 if constraint in (one, alone) else None)
            assert not form.opening or form.opening not in said
            if constraint in (several, one):
                assert said == ""
            elif constraint is answer:
                assert said in ("", '"yes"', '"no"')
            else:
                assert said.startswith("Look:")
    assert exact is not None
    called = written(exact, tokenizer, 0, form.opening or "{")  # the tag letter by letter
    assert check_calls(called, form) != called


def test_a_free_answer_is_held_to_nothing() -> None:
    assert tool_constraint(use(), HERMES) is None
    with pytest.raises(UserError, match="JSON and nothing else"):
        tool_constraint(use(), HERMES, Constraint("regex", "a"))
    assert tool_constraint(use("required"), HERMES, Constraint("regex", "a")) is not None  # it says nothing else anyway


QUESTION = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How <tool_call> warm?"}]
TOLD = "{%- for t in tools or [] %}{{ t | tojson }}{%- endfor %}{%- for m in messages %}{{ m.role ~ m.content }}"
TOLD += "{%- for c in m.tool_calls or [] %}CALL{%- endfor %}{%- endfor %}"
REFUSED = {
    "no tools": CHATML,
    "calls left out": TOLD.replace("CALL", ""),
    "as Python writes them": TOLD.replace("CALL", "{{ c.function }}"),
    "in XML": TOLD.replace(
        "CALL",
        "<tool_call><function={{ c.function.name }}>{%- for key, value in c.function.arguments.items() %}"
        "<parameter={{ key }}>{{ value }}</parameter>{%- endfor %}</function></tool_call>",
    ),
    "JSON behind a text": TOLD.replace(
        "CALL", 'I call {"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    ),
}


def builder(template: str) -> PromptBuilder:
    tokenizer = tagged(False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|repo_name|>", "<|object_ref_start|>"]})
    tokenizer.chat_template = template
    rules = PromptRules(default_template="", strip_messages=False)
    return PromptBuilder(tokenizer, rules, image_token="<image>", image_token_id=9999)


def test_tools_are_told_as_transformers_tells_of_them() -> None:
    """Those of a template that takes them apart too: the names of their parts are no user's words."""
    apart = TEMPLATES[HERMES].replace(
        "tool | tojson",
        "tool.function.name ~ tool.function.parameters.type ~ (tool.function.parameters.properties | tojson)",
    )
    for template in (TEMPLATES[HERMES], apart):
        prompts = builder(template)
        offered = [tool for tool in tools() if tool["function"]["parameters"]]
        read = read_tools(offered)
        assert read is not None
        ids = prompts.chat(read_messages(QUESTION).messages, (), {}, read.tools).token_ids
        shown = [{**one, "function": {**one["function"]}} for one in offered]
        for one in shown:
            del one["function"]["strict"]
            one["function"]["description"] = one["function"].pop("description")
        order = ("name", "description", "parameters")
        shown = [{**one, "function": {key: one["function"][key] for key in order}} for one in shown]
        expected = tagged(False).apply_chat_template(
            QUESTION, tools=shown, chat_template=template, tokenize=False, add_generation_prompt=True
        )
        assert prompts._tokenizer.decode(ids) == expected
        assert list(ids).count(prompts._tokenizer.convert_tokens_to_ids(BEGIN)) == 1  # the template's own


@pytest.mark.parametrize("form", FORMATS)
def test_the_form_is_the_one_that_the_template_writes(form: CallFormat) -> None:
    for template in (TEMPLATES[form], TEMPLATES[form].replace('": ', '":')):
        found = builder(template).tools
        assert found is not None
        assert found.answers == form


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_offers_none_or_writes_calls_otherwise_refuses_tools(name: str) -> None:
    with pytest.raises(UserError, match="template") as refused:
        builder(REFUSED[name]).chat(read_messages(QUESTION).messages, (), {}, use().tools)
    assert (refused.value.code, refused.value.param) == ("unsupported_field", "tools")


@pytest.mark.parametrize(
    ("given", "choice", "param"),
    [
        ("weather", None, "tools"),
        (["weather"], None, "tools[0]"),
        ([{"type": "function", "function": {"name": "f", "parameters": {"x": {1}}}}], None,
         "tools[0].function.parameters"),
        ([{"type": "function", "function": {"name": "f", "mood": 1}}], None, "tools[0].function"),
        (tools(), "any", "tool_choice"),
        (tools(), {"type": "function"}, "tool_choice"),
        (tools(), {"type": "function", "function": {"name": "rain"}}, "tool_choice"),
        ([], "required", "tool_choice"),
    ],
)  # fmt: skip
def test_what_a_python_caller_gets_wrong_is_named(given: Any, choice: Any, param: str) -> None:
    with pytest.raises(UserError) as refused:
        read_tools(given, choice)
    assert refused.value.param == param


def test_llm_chat_calls(tmp_path: Path) -> None:
    """With tags that are special tokens."""
    write_calling_checkpoint(tmp_path / "tiny", special=True)
    llm = LLM(tmp_path / "tiny", device="cpu", kv_tokens=4096)
    names = llm.processor.tokenizer.convert_tokens_to_ids
    bias = [tuple((names(token), CHOSEN) for token in said) for said in ((SEE, AND), ())]
    rows = [SamplingParams(max_tokens=100, logit_bias=one, n=2) for one in bias]
    called, plain = llm.chat([QUESTION, QUESTION], rows, tools=tools())
    for answer in called.outputs:
        assert [(call.name, call.arguments) for call in answer.tool_calls] == [("weather", BERN), ("time", "{}")]
        assert (answer.text, answer.reasoning, answer.finish_reason) == (SEE.strip(), THOUGHT, "tool_calls")
    assert (plain.text, plain.tool_calls, plain.finish_reason) == (ANSWER, (), "stop")
    choice = {"type": "function", "function": {"name": "weather"}}
    (forced,) = llm.chat(
        QUESTION, SamplingParams(max_tokens=200), tools=tools(), tool_choice=choice, parallel_tool_calls=False
    )
    (call,) = forced.tool_calls
    assert jsonschema_rs.validator_for(CITY).is_valid(json.loads(call.arguments))
