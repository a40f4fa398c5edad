"""Videos and budgets through `LLM`, for every family that has them: tiny checkpoints of each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_nvila_checkpoint
from idefics3_checkpoint import write_idefics3_checkpoint
from llava_onevision_checkpoint import write_llava_onevision_checkpoint
from llava_qwen_checkpoint import write_llava_qwen_checkpoint
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint
from parity_kit import noise
from video_llama_3_checkpoint import write_video_llama_3_checkpoint

from siglane.errors import UserError
from siglane.llm import LLM, Generation
from siglane.types import SamplingParams

SHORT = SamplingParams(max_tokens=5, ignore_eos=True)
SIZE = (150, 70)
WRITERS: dict[str, Callable[[Path], object]] = {
    "nvila": write_nvila_checkpoint,
    "llava_onevision": write_llava_onevision_checkpoint,
    "llava_qwen": write_llava_qwen_checkpoint,
    "ovis2_5": write_ovis2_5_checkpoint,
    "nanovlm": write_nanovlm_checkpoint,
    "smolvlm2": write_idefics3_checkpoint,
    "video_llama_3": write_video_llama_3_checkpoint,
    "videollama3_qwen2": partial(write_video_llama_3_checkpoint, layout="authors"),
}
VIDEO = ("nvila", "llava_onevision", "llava_qwen", "ovis2_5", "smolvlm2", "video_llama_3", "videollama3_qwen2")
# a limit that makes SIZE cheaper
LIMITS: dict[str, dict[str, Any]] = {
    "nvila": {"max_tiles": 1},
    "llava_onevision": {"grid_pinpoints": [[60, 60]]},
    "llava_qwen": {"grid_pinpoints": [[60, 60]]},
    "ovis2_5": {"max_pixels": 60 * 60, "min_pixels": 40 * 40},
    "nanovlm": {"max_tiles": 2},
    "smolvlm2": {"max_tiles": 2},
    "video_llama_3": {"max_pixels": 1000},
    "videollama3_qwen2": {"max_pixels": 1000},
}


picture = partial(noise, size=SIZE)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LLM]:
    found = {}
    for name, write in WRITERS.items():
        folder = tmp_path_factory.mktemp("families") / name
        write(folder)
        found[name] = LLM(folder, device="cpu", kv_tokens=16384)
    return found


def ask(llm: LLM, **row: Any) -> Generation:
    (answer,) = llm.generate({"prompt": "What is it?", **row}, SHORT)
    return answer


@pytest.mark.parametrize("name", VIDEO)
def test_a_video_is_read_and_counted(models: dict[str, LLM], name: str) -> None:
    llm = models[name]
    three = ask(llm, videos=[[picture(n) for n in range(3)]])
    (report,) = three.images
    assert (report["frames"], report["tiles"], report["width"], report["height"]) == (3, 3, *SIZE)
    assert three.usage.image_tokens == report["tokens"] > ask(llm, videos=[[picture(0)]]).usage.image_tokens
    again = ask(llm, videos=[{"video": [picture(n) for n in range(3)], "num_frames": 3}])
    assert again.output_token_ids == three.output_token_ids
    # frames of another size are brought to the first one's
    mixed = ask(llm, videos=[[picture(0), picture(1, size=(60, 90)), picture(2)]])
    assert mixed.images == three.images


@pytest.mark.parametrize("name", WRITERS)
def test_videos_beside_images_where_the_family_has_them(models: dict[str, LLM], name: str) -> None:
    row = {"images": [picture(1)], "videos": [[picture(2), picture(3)]]}
    if name in ("nvila", "llava_onevision", "llava_qwen", "video_llama_3", "videollama3_qwen2"):
        both = ask(models[name], **row)
        if name != "videollama3_qwen2":  # whose pictures and frames share what they may cost
            assert both.images[0] == ask(models[name], images=[picture(1)]).images[0]
        assert both.images[1]["frames"] == 2
        return
    with pytest.raises(UserError) as caught:
        ask(models[name], **row)
    assert caught.value.code == ("mixed_media" if name in VIDEO else "video_unsupported")


@pytest.mark.parametrize("name", WRITERS)
def test_budgets_change_what_they_say_and_are_reported(models: dict[str, LLM], name: str) -> None:
    llm, limits = models[name], LIMITS[name]
    plain = ask(llm, images=[picture(1)]).images[0]
    less = ask(llm, images=[{"image": picture(1), **limits}]).images[0]
    low = ask(llm, images=[{"image": picture(1), "detail": "low"}]).images[0]
    assert plain["limits"] == {}
    assert set(less["limits"]) == set(limits)
    assert less["tokens"] < plain["tokens"]
    assert low["tokens"] <= plain["tokens"]
    assert low["detail"] == {"requested": "low", "applied": "low"}
    with pytest.raises(UserError, match="max_num_patches does not apply"):
        ask(llm, images=[{"image": picture(1), "max_num_patches": 10}])


@pytest.mark.few("nvila", "llava_onevision", "nanovlm", "video_llama_3")
@pytest.mark.parametrize("name", WRITERS)
def test_an_image_beyond_the_patch_budget_runs_alone_and_packing_changes_no_token(
    models: dict[str, LLM], name: str, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path)
    rows: list[dict[str, Any]] = [
        {"prompt": "What?", "images": [picture(n), picture(n + 5, size=(40, 40))]} for n in range(2)
    ]
    rows += [{"prompt": "What?", "videos": [[picture(n), picture(n + 1)]]} for n in range(2)] if name in VIDEO else []
    expected = [answer.output_token_ids for answer in models[name].generate(rows, SHORT)]
    for options in ({"max_batch_patches": 1}, {"enable_packing": False}):
        answers = LLM(tmp_path, device="cpu", kv_tokens=16384, **options).generate(rows, SHORT)  # type: ignore[arg-type]
        assert [answer.error for answer in answers] == [None] * len(rows)
        assert [answer.output_token_ids for answer in answers] == expected
