"""What vLLM and siglane are both asked: prompts with pictures drawn from seeds, and how two answers are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from vllm_checkpoints import write_llava_onevision, write_ovis2_5

from siglane.llm import LLM
from siglane.types import SamplingParams

TOKENS = 32
GOLDEN = Path(__file__).parents[2] / "parity/golden"
LOGPROB_TOLERANCE = 5e-4
FEWEST_WORDS = 12  # different tokens of one answer; a model that has lost its way repeats one


@dataclass(frozen=True, slots=True)
class Picture:
    """width, height: pixels; seed: of what it shows."""

    width: int
    height: int
    seed: int = 0

    def draw(self) -> Image.Image:
        """Smooth colours with a coarse pattern and noise: every patch has something of its own."""
        random = np.random.default_rng(self.seed)
        y, x = np.mgrid[0 : self.height, 0 : self.width]
        across, down, lean = random.uniform(0.01, 0.2, 3)
        waves = np.stack([np.sin(across * x), np.cos(down * y), np.sin(lean * (x + 2 * y))], axis=-1)
        noise = random.uniform(-25, 25, (self.height, self.width, 3))
        return Image.fromarray((127 + 100 * waves + noise).clip(0, 255).astype(np.uint8))


@dataclass(frozen=True, slots=True)
class Video:
    """All frames are shown."""

    frames: tuple[Picture, ...]


Part = str | Picture | Video
Case = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """write: a checkpoint of a seed, into a folder; cases: by name, each one user message."""

    write: Callable[[Path, int], None]
    seed: int
    cases: Mapping[str, Case]


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy answer. logprobs: natural logarithms, one for each token."""

    prompt_tokens: int
    token_ids: list[int]
    logprobs: list[float]


QUESTION = "Describe the picture."
OVIS = {
    "text": ("You are a helpful assistant. What is in the image?",),
    "picture": (Picture(448, 448, 1), "\n", QUESTION),
    "another picture": (Picture(448, 448, 2), "\n", QUESTION),
    "wide": (Picture(640, 320, 3), "\n", QUESTION),
    "enlarged": (Picture(301, 223, 4), "\n", QUESTION),
    "tall and shrunk to blocks": (Picture(333, 1001, 5), "\n", QUESTION),
    "two with nothing between": (Picture(448, 448, 6), Picture(448, 480, 7), QUESTION),
    "three of mixed sizes": (
        Picture(640, 320, 8), " or ", Picture(448, 448, 9), "\n", QUESTION, Picture(320, 640, 10), "?",
    ),
    "video": (Video((Picture(448, 448, 11), Picture(448, 448, 12), Picture(448, 448, 13))), "\n", QUESTION),
    "another video": (Video((Picture(480, 448, 13), Picture(480, 448, 12))), "\n", QUESTION),
}  # fmt: skip
LLAVA = {
    "text": ("You are a helpful assistant. What is in the image?",),
    "picture": (Picture(60, 60, 1), "\n", QUESTION),
    "another picture": (Picture(60, 60, 2), "\n", QUESTION),
    "wide": (Picture(120, 60, 3), "\n", QUESTION),
    "tall and padded": (Picture(70, 171, 4), "\n", QUESTION),
    "large, its map shrunk": (Picture(333, 291, 5), "\n", QUESTION),
    "video": (Video((Picture(60, 60, 6), Picture(60, 60, 7), Picture(60, 60, 8))), "\n", QUESTION),
    "another video": (Video((Picture(60, 60, 8), Picture(60, 60, 7))), "\n", QUESTION),
    "picture and video": (Picture(120, 60, 11), Video((Picture(60, 60, 12), Picture(60, 60, 13))), QUESTION),
}

FAMILIES = {
    "ovis2_5": Family(write_ovis2_5, 3, OVIS),
    "llava_onevision": Family(write_llava_onevision, 5, LLAVA),
}


def rendered(case: Case) -> str:
    """The prompt as vLLM takes it, written without siglane: a placeholder stands for each picture and video."""
    placeholders = {Picture: "<image>", Video: "<video>"}
    content = "".join(part if isinstance(part, str) else placeholders[type(part)] for part in case)
    return f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


def ask_siglane(folder: Path, cases: Mapping[str, Case]) -> dict[str, Answer]:
    """All cases at once through `LLM.chat`, the public way in."""
    llm = LLM(folder, device="cpu", kv_tokens=16384)
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True, logprobs=0)
    conversations = [[{"role": "user", "content": [_content(part) for part in case]}] for case in cases.values()]
    answers = llm.chat(conversations, sampling, errors="raise")
    return {
        name: Answer(
            answer.usage.prompt_tokens,
            list(answer.output_token_ids),
            [chosen.logprob for chosen in answer.logprobs],
        )
        for name, answer in zip(cases, answers, strict=True)
    }


def _content(part: Part) -> dict[str, Any]:
    match part:
        case Picture():
            return {"type": "image", "image": part.draw()}
        case Video(frames):
            return {"type": "video", "video": [frame.draw() for frame in frames], "num_frames": len(frames)}
        case text:
            return {"type": "text", "text": text}


def compare(ours: Answer, theirs: Answer) -> float:
    """The largest difference of two log-probabilities. AssertionError when the answers differ."""
    assert ours.prompt_tokens == theirs.prompt_tokens
    assert len(ours.token_ids) == TOKENS
    assert ours.token_ids == theirs.token_ids
    worst = max(abs(one - other) for one, other in zip(ours.logprobs, theirs.logprobs, strict=True))
    assert worst <= LOGPROB_TOLERANCE
    return worst


def check_that_pictures_matter(answers: Mapping[str, Answer]) -> None:
    """No two cases have the same answer, and none is one word over and over."""
    said = [tuple(answer.token_ids) for answer in answers.values()]
    assert len(set(said)) == len(said)
    assert min(len(set(tokens)) for tokens in said) >= FEWEST_WORDS


def read_golden(family: str) -> dict[str, Answer]:
    stored = json.loads((GOLDEN / f"vllm_{family}.json").read_text())
    assert stored["seed"] == FAMILIES[family].seed
    return {name: Answer(**answer) for name, answer in stored["answers"].items()}


def write_golden(family: str, vllm: str, answers: Mapping[str, Answer]) -> None:
    """vllm: its version."""
    rounded = {
        name: asdict(answer) | {"logprobs": [round(value, 5) for value in answer.logprobs]}
        for name, answer in answers.items()
    }
    stored = {"vllm": vllm, "seed": FAMILIES[family].seed, "answers": rounded}
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"vllm_{family}.json").write_text(json.dumps(stored) + "\n")
