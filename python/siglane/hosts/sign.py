"""The picture that an engine's self-test reads: what the shipped model must answer."""

from __future__ import annotations

import base64
import time
from typing import Any

from siglane.weights.demo import FOLDERS, demo_folder

PICTURE, EXPECTED = "cafe.png", "CAFE"
QUESTION = "What does the sign say?"
PROMPT = f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
TOKENS = 8


def model(name: str) -> str:
    """The folder of a shipped model."""
    return str(demo_folder() / FOLDERS[name])


def picture_url() -> str:
    picture = base64.b64encode((demo_folder() / "pictures" / PICTURE).read_bytes()).decode()
    return f"data:image/png;base64,{picture}"


def messages() -> list[Any]:
    picture = {"type": "image_url", "image_url": {"url": picture_url()}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": f"\n{QUESTION}"}]}]


def report(begin: float, started: float, answer: str) -> str:
    """What a self-test prints. begin, started: of the engine, by `time.perf_counter`. SystemExit for a wrong answer."""
    seconds = time.perf_counter() - started
    if answer != EXPECTED:
        raise SystemExit(f"the shipped model read {answer!r} from {PICTURE}, it should read {EXPECTED!r}")
    return f"an engine starts in {started - begin:.0f} s and reads {answer} from {PICTURE} in {seconds:.1f} s"
