"""What the openai client hears from vLLM's server, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from host_cases import Case, conversation
from host_process import RunningServer
from openai import OpenAI

SECONDS = 240.0  # for one answer, with everybody else on the same two cores
EXTRA = {"ignore_eos": True, "return_token_ids": True}


@dataclass(frozen=True, slots=True)
class Heard:
    """One greedy answer. prompt: tokens; cached: those of the prompt that were computed before."""

    token_ids: list[int]
    prompt: int
    cached: int


@dataclass(frozen=True, slots=True)
class TokenClient:
    """server: started with `enable_prompt_tokens_details`; model: its name."""

    server: RunningServer
    model: str

    def ask(self, case: Case, tokens: int) -> Heard:
        found = self._create(case, tokens)
        (choice,) = found.choices
        return _heard(choice.model_extra["token_ids"], found.usage)

    def stream(self, case: Case, tokens: int) -> Heard:
        """The same in pieces, more than one."""
        pieces, usage = [], None
        for chunk in self._create(case, tokens, stream=True, stream_options={"include_usage": True}):
            pieces += [ids for choice in chunk.choices if (ids := choice.model_extra.get("token_ids"))]
            usage = chunk.usage or usage
        assert len(pieces) > 1
        return _heard([token for ids in pieces for token in ids], usage)

    def stream_at_once(self, cases: Sequence[Case], tokens: int) -> list[Heard]:
        with ThreadPoolExecutor(len(cases)) as pool:
            return list(pool.map(lambda case: self.stream(case, tokens), cases))

    def _create(self, case: Case, tokens: int, **more: Any) -> Any:
        client = OpenAI(base_url=f"{self.server.base_url}/v1", api_key="none", max_retries=0, timeout=SECONDS)
        messages: Any = conversation(case)
        return client.chat.completions.create(
            model=self.model, messages=messages, max_tokens=tokens, temperature=0, extra_body=EXTRA, **more
        )


def _heard(token_ids: list[int], usage: Any) -> Heard:
    return Heard(token_ids, usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens)
