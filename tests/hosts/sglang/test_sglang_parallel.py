"""Two ranks inside SGLang answer as one, however tower and projector are divided."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from host_cases import (
    QWEN,
    Case,
    Picture,
    VideoSize,
    ask_siglane,
    check_that_answers_discriminate,
    enlarge,
    write_checkpoint,
)
from llava_onevision_checkpoint import write_llava_onevision_checkpoint
from sglang_cases import ask_sglang, compare, served
from sglang_host import sglang_engine

TOKENS = 32
QUESTION = "Describe the picture."
CASES: dict[str, Case] = {
    "text": ("You are a helpful assistant. What is in the image?",),
    "picture": (Picture(90, 60, 1), QUESTION),
    "large": (Picture(200, 130, 2), QUESTION),
    "two": (Picture(60, 60, 3), Picture(17, 300, 4), QUESTION),
    "four": (Picture(1, 1, 5), "\n", Picture(64, 48, 6), " or ", Picture(48, 64, 7), QUESTION, Picture(90, 90, 8)),
}
VIDEO: Case = (VideoSize(64, 48, 3, 20), QUESTION)
HELD = re.compile(r"encoder (\w+), rank (\d) of 2 holds (\d+) of (\d+) parameters")


def write_indivisible(folder: Path) -> None:
    """A tower of three heads."""
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 3, "image_size": 60, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    write_llava_onevision_checkpoint(folder, tied=False, seed=0, keys={"vision_config": vision})
    enlarge(folder, QWEN)


@dataclass(frozen=True)
class Mode:
    """write: the checkpoint; wish: SIGLANE_ENCODER_PARALLEL; found: what it comes to; share: the most of the stack that
    a rank may hold."""

    write: Callable[[Path], None]
    wish: str
    found: str
    share: float
    video: bool = True


MODES = {
    "tp": Mode(lambda folder: write_checkpoint("ovis2_5", folder), "tp", "tp", 0.6),
    "auto": Mode(write_indivisible, "auto", "dp", 1),
    "replicate": Mode(lambda folder: write_checkpoint("nanovlm", folder), "replicate", "replicate", 1, video=False),
}


@pytest.mark.parametrize("name", MODES)
def test_two_ranks_answer_as_one(name: str, tmp_path: Path) -> None:
    mode = MODES[name]
    cases = {**CASES, **({"video": VIDEO} if mode.video else {})}
    mode.write(tmp_path / "model")
    one = served(tmp_path / "model", tmp_path / "views", {"SIGLANE_ENCODER_PARALLEL": mode.wish})
    expected = ask_siglane(one.folder, list(cases.values()), TOKENS)
    check_that_answers_discriminate(expected)
    requests = [one.request(case) for case in cases.values()]
    with sglang_engine(one.folder, env=one.env, tp_size=2, log_level="info") as engine:
        print(f"\n{name}: ready after {engine.start_seconds:.0f} s")
        # with one picture a rank has none
        compare(ask_sglang(engine, requests[1:2], TOKENS), expected[1:2], ["picture"])
        compare(ask_sglang(engine, requests, TOKENS), expected, list(cases))
        said = HELD.findall(engine.log.read_text())
    assert sorted(rank for _, rank, _, _ in said) == ["0", "1"]
    assert {found for found, _, _, _ in said} == {mode.found}
    assert all(int(held) <= mode.share * int(whole) for _, _, held, whole in said)
