"""What the answers of a batch have used, summed as OpenAI's batch object does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import orjson


def usage_of(answers: Path) -> Mapping[str, object] | None:
    """answers: an output file; None where it has no answer. Tokens that a cache gave are not told apart in it."""
    read = written = reasoned = total = 0
    if not answers.exists() or not answers.stat().st_size:
        return None
    with answers.open("rb") as file:
        for line in file:
            usage = orjson.loads(line)["response"]["body"]["usage"]
            read += usage.get("prompt_tokens", usage.get("input_tokens", 0))  # the latter of System One's
            total += usage["total_tokens"]
            written += usage.get("completion_tokens", 0)  # vectors have none
            reasoned += usage.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": reasoned},
        "total_tokens": total,
    }
