"""Answers that have to match a JSON schema, a regular expression or a grammar: which tokens may come next.

The automaton is llguidance's (github.com/guidance-ai/llguidance). It compiles what a client sends without backtracking
and by an allowance of steps (`LIMITS`), so that the same text is refused on every machine. What nests too deep would
overrun its stack and end the process, so every text is compiled in one of its own first (`trial.py`).
"""

from __future__ import annotations

import atexit
import json
import os
import signal
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from siglane.config.vlm import Thinking
from siglane.engine.answers.thinking import ThinkingStart
from siglane.engine.constraints.json_schema import ignored_keyword, never_ends
from siglane.engine.constraints.tokens import grammar_tokens
from siglane.engine.constraints.tool_grammar import Calls, Schema, Tags, lark, read_calls
from siglane.errors import EngineError, UserError
from siglane.families.prompt.programs import Programs
from siglane.types import Constraint
from siglane.types.constraint import ConstraintKind

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MOST_CHARACTERS = 1 << 18
MOST_TRANSLATED = 1 << 14  # in Python, some microseconds a character
TRIAL_SECONDS = 5.0
MOST_TRIALS = 2  # at a time
MOST_GRAMMARS = 32  # compiled ones that are kept
LIMITS = {
    "initial_lexer_fuel": 1_000_000,  # some 20 ms
    "step_lexer_fuel": 200_000,  # some 15 ms a token
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # of 1 to 2 kB
    "max_grammar_size": 500_000,
}
CODES: dict[ConstraintKind, str] = {
    "json_schema": "invalid_json_schema",
    "regex": "invalid_regex",
    "lark": "invalid_grammar",
    "tools": "invalid_json_schema",
}
WORDS: dict[ConstraintKind, str] = {
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "lark": "grammar",
    "tools": "schema of the tools",
}
# a model that may write any white space between two tokens of JSON may write it for ever: as much as a layout needs
JSON_OPTIONS = {
    "lenient": False,  # a keyword that is not honoured is refused by its name
    "coerce_one_of": False,
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": r"[ \t]|\r?\n[ \t]{0,48}",
}
DEAD_END = "NoExtension"  # how llguidance says that nothing may follow
MATCHED_BY_NONE = "is matched by no answer"
Bits = npt.NDArray[np.bool_]
Words = npt.NDArray[np.int64]  # of a vocabulary, a bit for each token, the first of 64 in the lowest


def check_constraint(constraint: Constraint) -> None:
    """UserError for what cannot be matched by any answer, or not be honoured; `Grammars` takes nothing else. Some
    milliseconds, at most `TRIAL_SECONDS`, in a process that may end."""
    kind, text = constraint.kind, constraint.text
    if len(text) > MOST_CHARACTERS:
        raise _refused(kind, f"has {len(text)} characters; at most {MOST_CHARACTERS} are read")
    if "\0" in text or "\\u0000" in text:
        raise _refused(kind, "holds a NUL; no answer does")
    if kind == "json_schema":
        _check_schema(_schema_of(text))
    if kind != "tools":
        _try(constraint)
        return
    _check_tools(calls := read_calls(text), _check_schema)
    try:
        _try(constraint)
    except UserError as error:
        if error.code != "grammar_timeout":  # whose parts might take as long
            _check_tools(calls, lambda schema: _try(Constraint.json_schema(schema)))
        raise


def _try(constraint: Constraint) -> None:
    """Compiles it elsewhere."""
    kind, grammar = constraint.kind, _grammar(constraint, {})
    found = _trials(os.getpid()).ask(json.dumps([TRIAL_SECONDS, grammar, LIMITS]).encode())
    if found == -signal.SIGALRM:
        raise UserError(f"the {WORDS[kind]} takes more than {TRIAL_SECONDS:g} s to compile", code="grammar_timeout")
    if isinstance(found, int):
        raise _refused(kind, "nests too deep to be compiled")
    if error := json.loads(found)["error"]:
        why = _first_line(error)
        raise _refused(kind, MATCHED_BY_NONE if why.startswith(DEAD_END) else f"cannot be used: {why}")


class Grammars:
    """What a model's answers may be asked to match. Compiles by need and keeps the last ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._eos_token_ids = tokenizer, vocab_size, list(eos_token_ids)
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()

    def start(self, constraint: Constraint, thinking: Thinking | None, start: ThinkingStart) -> Constrained:
        """An answer's way through one that `check_constraint` lets pass, from the beginning. start: of a model that
        reasons."""
        matcher = self._compiled.pop(constraint, None) or self._compile(constraint)
        self._compiled[constraint] = matcher
        if len(self._compiled) > MOST_GRAMMARS:
            self._compiled.popitem(last=False)
        return Constrained(matcher.deep_copy(), self._vocab_size, thinking, start)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        matcher: LLMatcher = _llguidance().LLMatcher(
            self._tokens, _grammar(constraint, self._token_ids), log_level=0, limits=_limits()
        )
        if matcher.is_error():
            raise _refused(constraint.kind, f"cannot be used: {_first_line(matcher.get_error())}")
        return matcher

    def warm_up(self) -> None:
        """Reads the vocabulary, a second for 150,000 tokens that the first answer would wait for, and all beside it."""
        with suppress(UserError):  # said to who asks for a grammar
            _ = self._tokens

    @cached_property
    def _token_ids(self) -> dict[str, int]:
        """By the texts of tokens that are no pieces of words."""
        return {token.content: number for number, token in self._tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _tokens(self) -> LLTokenizer:
        _llguidance()
        return grammar_tokens(self._tokenizer, self._vocab_size, self._eos_token_ids)


class Constrained:
    """One answer's place in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, thinking: Thinking | None, start: ThinkingStart) -> None:
        self._matcher, self._vocab_size, self._thinking = matcher, vocab_size, thinking
        self._part: Literal["free", "thinking", "answer"] = "answer"
        if thinking is not None and start != "closed":
            self._part = "thinking" if start == "opened" else "free"

    def append(self, token_id: int) -> None:
        """A token that was chosen. An end of the answer leaves the place as it is."""
        written, self._part = self._step(self._part, token_id)
        if written:
            self._matcher.try_consume_tokens([token_id])

    def allowed(self, guesses: Sequence[int] = ()) -> Bits | None:
        """`mask`, bool `[vocab_size]`."""
        mask = self.mask(guesses)
        return None if mask is None else unpacked(mask, self._vocab_size)

    def mask(self, guesses: Sequence[int] = ()) -> Words | None:
        """Which tokens may follow the answer, were `guesses` its last ones, `[mask_words(vocab_size)]`. None where all
        may: in its thinking, and behind guesses that may not follow themselves, which nobody will choose.

        EngineError when the grammar needs more than its allowance.
        """
        part, consumed = self._part, 0
        try:
            for guess in guesses:
                written, part = self._step(part, guess)
                if written:
                    if not self._matcher.try_consume_tokens([guess]):
                        return None
                    consumed += 1
            if part == "thinking":
                return None
            mask = self._mask()
        finally:
            if consumed:
                self._matcher.rollback(consumed)
        if part == "free" and self._thinking is not None:
            word, bit = divmod(self._thinking.start, 8)
            mask.view(np.uint8)[word] |= 1 << bit
        return mask

    def _mask(self) -> Words:
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            message = f"the answer's grammar is too complex ({_first_line(self._matcher.get_error())})"
            raise EngineError(message, code="grammar_too_complex", status=400)
        mask = np.zeros(mask_words(self._vocab_size), "<i8")
        own = packed[: mask.nbytes]  # media's ids may lie behind the model's
        mask.view(np.uint8)[: len(own)] = own
        return mask

    def _step(self, part: str, token_id: int) -> tuple[bool, Literal["thinking", "answer"]]:
        """Whether a token belongs to the answer's text, and the part that the next one is in."""
        thinking = self._thinking
        if thinking is not None and part == "thinking":
            return False, "answer" if token_id == thinking.end else "thinking"
        if thinking is not None and part == "free" and token_id == thinking.start:
            return False, "thinking"
        return True, "answer"


def mask_words(vocab_size: int) -> int:
    return -(-vocab_size // 64)


def unpacked(mask: Words, vocab_size: int) -> Bits:
    return np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)


def _check_tools(calls: Calls, check: Callable[[Schema], None]) -> None:
    """`check` of every schema; the function whose schema is refused is named."""
    for name, schema in calls.functions:
        try:
            check(schema)
        except UserError as error:
            message = f"the function {name!r}: {error.message}"
            raise UserError(message, code=error.code, param="tools") from error
    if calls.answer is not None:
        check(calls.answer)


def _check_schema(schema: dict[str, Any]) -> None:
    if ignored := ignored_keyword(schema):
        raise _refused("json_schema", f"has the keyword {ignored!r}, which is not supported")
    if never_ends(schema):
        raise _refused("json_schema", MATCHED_BY_NONE)


def _schema_of(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused("json_schema", f"is no JSON ({error})") from None
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise _refused("json_schema", "must be an object")
    return schema


def _grammar(constraint: Constraint, token_ids: Mapping[str, int]) -> str:
    """What llguidance compiles. token_ids: of the tokens that may be the tags of calls; other tags are texts."""
    matcher = _llguidance().LLMatcher
    if constraint.kind == "tools":
        calls = read_calls(constraint.text)
        return str(matcher.grammar_from_lark(lark(calls, Tags.of(calls.form, token_ids), JSON_OPTIONS)))
    if constraint.kind == "regex":
        return str(matcher.grammar_from_regex(constraint.text))
    if constraint.kind == "lark":
        return str(matcher.grammar_from_lark(_lark(constraint.text)))
    try:
        return str(matcher.grammar_from_json_schema(_schema_of(constraint.text), overrides=JSON_OPTIONS))
    except (ValueError, RecursionError) as error:
        raise _refused("json_schema", f"cannot be used: {_first_line(str(error))}") from None


def _lark(text: str) -> str:
    """A grammar as it is, or one of llama.cpp's notation (GBNF, SGLang's EBNF: `root ::= ...`) translated."""
    if "::=" not in text:
        return text
    if len(text) > MOST_TRANSLATED:
        raise _refused("lark", f"has {len(text)} characters; with ::= at most {MOST_TRANSLATED} are read")
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(text)
    except Exception as error:
        raise _refused("lark", f"cannot be used: {_first_line(str(error))}") from None


def _refused(kind: ConstraintKind, why: str) -> UserError:
    return UserError(f"the {WORDS[kind]} {why}", code=CODES[kind])


def _first_line(message: str) -> str:
    """What a client may read of llguidance's message: the reason, without its state."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith("error:")]
    reason = (reasons or lines or ["nothing more can follow"])[0]
    return reason.partition("; following special tokens")[0][:200]  # which are not the model's


@cache
def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        message = "answers that match a grammar need llguidance; pip install 'siglane[grammar]'"
        raise UserError(message, code="missing_extra") from error
    return llguidance


@cache
def _limits() -> LLParserLimits:
    return _llguidance().LLParserLimits(**LIMITS)


@cache
def _trials(pid: int) -> Programs:
    """pid: a fork must not talk through its parent's pipes."""
    from siglane.engine.constraints import trial as grammar_trial

    found = Programs(grammar_trial.__file__, MOST_TRIALS)
    atexit.register(found.close)
    return found
