"""Two ranks of vLLM's over gloo, one core each: tower and projector are cut over them, or the images divided."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoints import large_heads
from host_cases import FAMILIES, QUESTION, Case, Picture, VideoSize, ask_siglane, write_checkpoint
from vllm_client import TokenClient
from vllm_host import Imported, vllm_server

from siglane.llm import Generation

TOKENS = 32
CASES: Sequence[Case] = (
    ("What is in the image?",),
    (Picture(200, 130, 3), QUESTION),
    (Picture(60, 60, 4), Picture(60, 60, 5), QUESTION),
    (VideoSize(64, 48, 3, 20), "\n", QUESTION),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    with large_heads():
        write_checkpoint("vila", root / "vila", FAMILIES["vila"].large_seed)
    return root / "vila"


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Generation]:
    return ask_siglane(folder, CASES, TOKENS)


@pytest.mark.parametrize(("mode", "share"), [("weights", "encoder tp, "), ("data", "encoder dp, ")])
def test_two_ranks(
    folder: Path, expected: list[Generation], tmp_path: Path, imported: Imported, mode: str, share: str
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    bind = "|".join(str(cores[rank % len(cores)]) for rank in range(2))
    env = {"SIGLANE_VLLM_VIEWS": str(tmp_path / "views"), "VLLM_CPU_OMP_THREADS_BIND": bind}
    options = {"tensor_parallel_size": 2, "mm_encoder_tp_mode": mode, "enable_prompt_tokens_details": True}
    with vllm_server(folder, env=env, imported=imported, **options) as server:
        answers = TokenClient(server, str(folder)).stream_at_once(CASES, TOKENS)
        words = server.log.read_text()
    assert [one.token_ids for one in answers] == [list(one.output_token_ids) for one in expected]
    assert all(f"{share}rank {rank} of 2 holds" in words for rank in range(2))
