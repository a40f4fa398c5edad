"""A question whose answer is one of given labels, and how likely each of them is.

The wording of typed questions is that of SGLang's prompt format 1 (`/v1/decisions` of 0.5.23), so that the same model
gives the same probabilities behind either server.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Question:
    """text: what is asked, as the model reads it behind what it is about; labels: the answers, as the model would write
    them; names: what each label stands for, by default itself."""

    text: str
    labels: tuple[str, ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.names) not in (0, len(self.labels)):
            raise ValueError(f"{len(self.labels)} labels have {len(self.names)} names")

    @property
    def meanings(self) -> tuple[str, ...]:
        return self.names or self.labels

    @classmethod
    def yes_no(cls, text: str, yes: str = "", no: str = "") -> Question:
        """yes, no: what each of them means, where it is not plain."""
        lines = [f"Is the following true? {text}".rstrip()]
        lines += [f"{label}: {meaning}" for label, meaning in (("yes", yes), ("no", no)) if meaning]
        return cls("\n".join([*lines, "Answer with yes or no only."]), ("yes", "no"))

    @classmethod
    def choice(cls, text: str, options: Mapping[str, str]) -> Question:
        """options: their names, each with a description, which may be empty. They are answered by letters, more than
        26 by two each."""
        letters = 1 if len(options) <= len(ascii_uppercase) else 2
        labels = tuple(itertools.islice(map("".join, itertools.product(ascii_uppercase, repeat=letters)), len(options)))
        lines = [f"Question: {text}"] if text else []
        for label, (name, description) in zip(labels, options.items(), strict=False):
            lines.append(f"{label}: {name} - {description}" if description else f"{label}: {name}")
        return cls("\n".join([*lines, "Answer with the letter of one option only."]), labels, tuple(options))

    @classmethod
    def score(cls, text: str, levels: Sequence[str]) -> Question:
        """levels: from the lowest on, answered by their number from 0."""
        labels = tuple(str(level) for level in range(len(levels)))
        lines = [f"Question: {text}"] if text else []
        lines += [f"{label}: {level}" for label, level in zip(labels, levels, strict=True)]
        return cls("\n".join([*lines, "Answer with the number of one level only."]), labels)


@dataclass(frozen=True, slots=True)
class Decision:
    """The answer to a question, without a token generated.

    names: of the labels; logprobs: natural logs of the probability that the answer begins with each label's tokens;
    prompt_tokens: of the question's prompt; cached_tokens: those that were not computed for it.
    """

    names: tuple[str, ...]
    logprobs: tuple[float, ...]
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def probabilities(self) -> dict[str, float]:
        """Of each name, were its label the answer's only choice: they add up to 1."""
        return dict(zip(self.names, self.shares(), strict=True))

    @property
    def choice(self) -> str:
        """The likeliest name, of equal ones the first."""
        return self.names[self.logprobs.index(max(self.logprobs))]

    @property
    def mass(self) -> float:
        """The sum of the labels' probabilities among all that the model might write: how far it keeps to them. A label
        that begins another one holds that one's too."""
        return math.fsum(self.powers)

    @property
    def powers(self) -> list[float]:
        """The probability of each label among all that the model might write."""
        return [math.exp(logprob) for logprob in self.logprobs]

    def shares(self, temperature: float = 1.0) -> list[float]:
        """The softmax of `logprobs` over `temperature`."""
        most = max(self.logprobs)
        powers = [math.exp((logprob - most) / temperature) for logprob in self.logprobs]
        total = math.fsum(powers)
        return [power / total for power in powers]
