"""`LLM` and `VisionEncoder` with videos and budgets: one row, one report, and an image too large for a step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from clips import animation, frame, video
from parity_kit import noise
from PIL import Image

from siglane.errors import UserError
from siglane.llm import LLM, Generation, VisionEncoder
from siglane.tiling.rule import ImageBudget
from siglane.types import SamplingParams

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)
WIDE = (200, 90)


picture = partial(noise, size=WIDE)


def frames(count: int) -> list[Image.Image]:
    return [Image.fromarray(frame(number)) for number in range(count)]


@pytest.fixture(scope="module", params=["lite", "s2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media") / str(request.param)
    write_nvila_checkpoint(folder, lite=request.param == "lite")
    return folder


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, device="cpu", kv_tokens=16384)


def ask(llm: LLM, **row: Any) -> Generation:
    (answer,) = llm.generate({"prompt": "What happens?", **row}, SHORT)
    return answer


class TestVideos:
    def test_one_is_what_its_frames_are_as_images(self, llm: LLM) -> None:
        """VILA's own code writes one `<image>` for each frame (formats.md 5.5)."""
        as_video, as_images = ask(llm, videos=[frames(3)]), ask(llm, images=frames(3))
        assert as_video.prompt_token_ids == as_images.prompt_token_ids
        assert as_video.output_token_ids == as_images.output_token_ids
        assert as_video.usage.image_tokens == as_images.usage.image_tokens > 0

    def test_the_report_counts_its_frames(self, llm: LLM) -> None:
        (report,) = ask(llm, videos=[{"video": video(25), "num_frames": 5}]).images
        assert (report["width"], report["height"], report["frames"], report["tiles"]) == (64, 48, 5, 5)
        assert ask(llm, videos=[video(25)]).images[0]["frames"] == 8
        assert ask(llm, videos=[video(3)]).images[0]["frames"] == 3

    def test_all_sources_are_the_same_video(self, llm: LLM, tmp_path: Path) -> None:
        path = tmp_path / "clip.gif"
        path.write_bytes(animation(4))
        opened = Image.open(path)
        as_list = []
        for number in range(4):
            opened.seek(number)
            as_list.append(opened.convert("RGB"))
        content = [
            {"type": "video_url", "video_url": {"url": path.as_uri()}},
            {"type": "text", "text": "What happens?"},
        ]
        part = [{"type": "video", "video": as_list, "num_frames": 4}, {"type": "text", "text": "What happens?"}]
        answers = [ask(llm, videos=[source]) for source in (path, str(path), path.read_bytes(), as_list)]
        answers += llm.chat([[{"role": "user", "content": content}], [{"role": "user", "content": part}]], SHORT)
        assert len({(answer.prompt_token_ids, answer.output_token_ids) for answer in answers}) == 1

    def test_one_beside_an_image_leaves_the_image_tiled_as_if_alone(self, llm: LLM) -> None:
        both = ask(llm, images=[picture(1)], videos=[frames(2)])
        alone = ask(llm, images=[picture(1)])
        assert both.images[0] == alone.images[0]
        assert both.images[0]["tiles"] > 1
        assert both.images[1]["frames"] == 2
        assert both.usage.image_tokens == sum(report["tokens"] for report in both.images)

    @pytest.mark.parametrize(
        ("bad", "code", "where"),
        [
            ({"videos": "clip.mp4"}, "invalid_prompt", "videos"),
            ({"videos": [3]}, "invalid_prompt", "videos[0]"),
            ({"videos": [b"no video"]}, "video_format_not_allowed", "videos[0]"),
            ({"videos": [[]]}, "invalid_prompt", "videos[0]"),
            ({"videos": ["/nowhere.mp4"]}, "image_not_found", "videos[0]"),
            ({"videos": [{"video": b"", "fps": 2}]}, "invalid_prompt", "videos[0]"),
            ({"videos": [{"video": b"", "num_frames": "8"}]}, "invalid_prompt", "videos[0]"),
            ({"videos": [{"video": b"", "num_frames": 1000}]}, "invalid_num_frames", "videos[0]"),
            ({"images": [picture(1)], "videos": [[picture(1), 3]]}, "invalid_prompt", "videos[0]"),
        ],
    )
    def test_a_bad_one_is_named(self, llm: LLM, bad: dict[str, Any], code: str, where: str) -> None:
        with pytest.raises(UserError) as caught:
            ask(llm, **bad)
        assert (caught.value.code, caught.value.param) == (code, where)

    def test_an_encoder_reads_them_too(self, folder: Path, tmp_path: Path) -> None:
        encoder = VisionEncoder(folder, device="cpu")
        (together,) = encoder.encode([{"video": frames(3)}])
        apart = encoder.encode([{"image": one, "detail": "low"} for one in frames(3)])
        torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-5)
        write_siglip_checkpoint(tmp_path / "tower")
        with pytest.raises(UserError, match="images, not videos") as caught:
            VisionEncoder(tmp_path / "tower", device="cpu").encode([{"video": frames(3)}])
        assert caught.value.code == "video_unsupported"


class TestBudgets:
    def test_each_image_has_its_own_and_the_report_says_so(self, llm: LLM) -> None:
        plain, low = (ask(llm, images=[one]).images[0] for one in (picture(1), {"image": picture(1), "detail": "low"}))
        assert (plain["detail"], plain["limits"]) == ({"requested": "auto", "applied": "auto"}, {})
        assert low["detail"] == {"requested": "low", "applied": "low"}
        assert low["tiles"] == 1 < plain["tiles"]
        assert low["tokens"] < plain["tokens"]

    def test_one_of_its_own_overrides_the_models(self, folder: Path) -> None:
        llm = LLM(folder, device="cpu", kv_tokens=16384, budget=ImageBudget(detail="low"))
        url = {"url": "data:image/png;base64,", "detail": "high"}
        assert ask(llm, images=[picture(1)]).images[0]["tiles"] == 1
        (high,) = ask(llm, images=[{"image": picture(1), "detail": "high", "max_tiles": 9}]).images
        assert high["tiles"] > 1
        assert high["limits"] == {"max_tiles": 9}
        with pytest.raises(UserError) as caught:
            llm.chat([{"role": "user", "content": [{"type": "image_url", "image_url": url}]}], SHORT)
        assert caught.value.param == "messages[0].content[0]"

    @pytest.mark.parametrize(
        ("image", "message"),
        [
            ({"max_pixels": 1000}, "max_pixels does not apply"),
            ({"max_tiles": 0}, "max_tiles must be at least 1"),
            ({"max_tiles": True}, "max_tiles must be a number"),
            ({"detail": "huge"}, "detail must be one of"),
            ({"grid_pinpoints": [[1, 2, 3]]}, "grid_pinpoints must be pairs"),
            ({"max_tile": 3}, "key 'max_tile' is not known"),
        ],
    )
    def test_one_that_cannot_be_honoured_is_refused(self, llm: LLM, image: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            ask(llm, images=[{"image": picture(1), **image}])
        assert caught.value.param == "images[0]"

    def test_one_of_the_whole_model_is_refused_before_weights_are_read(self, folder: Path) -> None:
        with pytest.raises(UserError, match="max_pixels does not apply"):
            LLM(folder, device="cpu", budget=ImageBudget(max_pixels=1000))
        with pytest.raises(UserError, match="max_num_patches does not apply"):
            VisionEncoder(folder, device="cpu", budget=ImageBudget(max_num_patches=1000))


@pytest.mark.few("lite-options0", "s2-options1", "s2-options2")
@pytest.mark.parametrize("options", [{"max_batch_patches": 1}, {"enable_packing": False}, {"max_batch_patches": 40}])
def test_the_patch_budget_and_packing_change_no_token(folder: Path, llm: LLM, options: dict[str, Any]) -> None:
    """A picture of many tiles is larger than all of these budgets, and still runs, alone."""
    rows = [{"prompt": "What?", "images": [picture(n)]} for n in range(3)]
    rows.append({"prompt": "What?", "images": [picture(7, size=(60, 60)), picture(8, size=(60, 60))]})
    other = LLM(folder, device="cpu", kv_tokens=16384, **options)
    expected, found = llm.generate(rows, SHORT), other.generate(rows, SHORT)
    assert [answer.error for answer in found] == [None] * 4
    assert [answer.output_token_ids for answer in found] == [answer.output_token_ids for answer in expected]


def test_an_encoders_features_do_not_depend_on_packing(folder: Path) -> None:
    pictures = [picture(n, size=size) for n, size in enumerate([(60, 60), WIDE, (30, 100)])]
    packed, alone = (VisionEncoder(folder, device="cpu", enable_packing=on).encode(pictures) for on in (True, False))
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
