"""Videos whose still rows are left out: what the server tells of prompt and tokens is what the engine read."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from parity_kit import picture
from PIL import Image
from serving import RunningServer, chat, encode, image_part, serving_folder, video_part
from video_llama_3_checkpoint import LAYOUTS, write_video_llama_3_checkpoint

from siglane import LLM, SamplingParams

FRAMES = 4


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("still")
    write_video_llama_3_checkpoint(found, request.param, videos={"fps": 10, "max_frames": 16})
    return found


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with serving_folder(folder) as one:
        yield one


def film() -> bytes:
    """Ten frames a second without loss, of which the right half moves."""
    frames, file = [picture(64, 48) for _ in range(FRAMES)], io.BytesIO()
    for number, frame in enumerate(frames):
        frame.paste(picture(32, 48, seed=number), (32, 0))
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    assert getattr(Image.open(file), "n_frames", 0) == FRAMES
    return file.getvalue()


def test_what_was_read_is_told(server: RunningServer, folder: Path) -> None:
    """Twice: the second time patches come out of their cache."""
    image, data = encode(picture(40, 40, seed=5)), film()
    parts: list[Any] = [
        {"type": "image", "image": image}, {"type": "text", "text": "and"}, {"type": "video", "video": data},
        {"type": "text", "text": "What?"},
    ]  # fmt: skip
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    (ours,) = LLM(folder, device="cpu", kv_tokens=8192).chat([{"role": "user", "content": parts}], sampling)
    clip = ours.images[1]
    rows = clip["grids"][0][0] * clip["grids"][0][1] // 4
    assert rows + FRAMES - 1 < clip["tokens"] < FRAMES * rows
    for _ in range(2):
        body = chat(image_part(image), "and", video_part(data), "What?", ignore_eos=True, max_tokens=6)
        response = server.post(body)
        assert response.status_code == 200, response.text
        theirs = response.json()
        assert [one["tokens"] for one in theirs["siglane"]["images"]] == [one["tokens"] for one in ours.images]
        assert theirs["usage"]["prompt_tokens"] == ours.usage.prompt_tokens == len(ours.prompt_token_ids)
        assert theirs["usage"]["prompt_tokens_details"]["image_tokens"] == ours.usage.image_tokens
        assert theirs["choices"][0]["message"]["content"] == ours.text
