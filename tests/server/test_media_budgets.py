"""Budgets and videos over HTTP: what a client may ask for, what the operator allows, what is reported."""

from __future__ import annotations

import io
from typing import Any

import pytest
from clips import animation, video
from PIL import Image
from serving import RunningServer, chat, image_part, picture, running, video_part
from waiting import eventually

from siglane.engine.process.supervisor import EngineProcess
from siglane.errors import UserError
from siglane.families.processor import Processor
from siglane.tiling.rule import ImageBudget

WIDE = picture(200, 90)
CLIP = video(12)


def seen(server: RunningServer, *content: Any, **fields: Any) -> list[dict[str, Any]]:
    response = server.post(chat(*content, **fields))
    assert response.status_code == 200, response.text
    reports: list[dict[str, Any]] = response.json()["siglane"]["images"]
    return reports


def refusal(server: RunningServer, *content: Any) -> tuple[str, str | None]:
    response = server.post(chat(*content))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    return error["code"], error["param"]


class TestBudgets:
    def test_the_openai_client_sets_them_and_is_told_what_was_applied(self, server: RunningServer) -> None:
        parts = [
            {"type": "text", "text": "What?"},
            image_part(WIDE, detail="low"),
        ]
        answer = server.openai().chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": parts}],
            max_tokens=4,  # type: ignore[list-item, misc]
        )
        assert answer.model_extra is not None
        (report,) = answer.model_extra["siglane"]["images"]
        assert report["detail"] == {"requested": "low", "applied": "low"}
        assert (report["width"], report["height"], report["tiles"], report["limits"]) == (200, 90, 1, {})

    def test_they_are_each_images_own(self, server: RunningServer) -> None:
        (plain,) = seen(server, image_part(WIDE), "x")
        (few,) = seen(server, image_part(WIDE, max_tiles=2), "x")
        assert few["limits"] == {"max_tiles": 2}
        assert few["tokens"] < plain["tokens"]
        assert len(few["grids"]) == few["tiles"] < plain["tiles"]

    @pytest.mark.parametrize(
        ("fields", "code", "where"),
        [
            ({"max_pixels": 1000}, "unsupported_budget", ""),
            ({"grid_pinpoints": [[56, 56]]}, "unsupported_budget", ""),
            ({"max_tiles": 5000}, "invalid_budget", ""),
            ({"max_tiles": 0}, "invalid_value", ".image_url.max_tiles"),
            ({"max_tiles": "4"}, "invalid_value", ".image_url.max_tiles"),
            ({"max_tiles": True}, "invalid_value", ".image_url.max_tiles"),
            ({"max_pixels": 1 << 40}, "invalid_value", ".image_url.max_pixels"),
            ({"grid_pinpoints": [[1, 2, 3]]}, "invalid_value", ".image_url.grid_pinpoints[0]"),
            ({"grid_pinpoints": [[56, 56]] * 300}, "invalid_value", ".image_url.grid_pinpoints"),
        ],
    )
    def test_one_that_cannot_be_honoured_is_refused_before_anything_is_fetched(
        self, server: RunningServer, fields: dict[str, Any], code: str, where: str
    ) -> None:
        part = image_part(b"", **fields)
        part["image_url"]["url"] = "http://127.0.0.1:9/never-fetched.png"
        assert refusal(server, "x", part) == (code, "messages[0].content[1]" + where)


class TestAnOperatorsBudget:
    def test_clients_can_only_lower_it(self, processor: Processor, engine: EngineProcess) -> None:
        with running(processor, engine, budget=ImageBudget(max_tiles=4, detail="low")) as server:
            unset, high, more, less = seen(server, image_part(WIDE), "x"), *(
                seen(server, image_part(WIDE, detail="original", **fields), "x")
                for fields in ({}, {"max_tiles": 12}, {"max_tiles": 1})
            )  # fmt: skip
            assert unset[0]["detail"] == {"requested": "auto", "applied": "low"}
            assert unset[0]["tiles"] == 1
            assert high[0]["detail"] == {"requested": "original", "applied": "high"}
            assert high[0]["limits"] == more[0]["limits"] == {"max_tiles": 4}
            assert 1 < high[0]["tiles"] == more[0]["tiles"] <= 5
            assert (less[0]["limits"], less[0]["tiles"]) == ({"max_tiles": 1}, 1)

    def test_one_that_the_model_does_not_know_stops_the_server(
        self, processor: Processor, engine: EngineProcess
    ) -> None:
        with pytest.raises(UserError, match="max_num_patches does not apply"):
            running(processor, engine, budget=ImageBudget(max_num_patches=100)).__enter__()

    def test_no_wish_goes_beyond_the_patches_of_one_image(self, processor: Processor, engine: EngineProcess) -> None:
        patches = sum(h * w for h, w in self.wide(processor, engine)["grids"])
        with running(processor, engine, max_image_patches=patches - 1) as server:
            assert refusal(server, image_part(WIDE), "x") == ("image_too_large", "messages[0].content[0]")
            assert seen(server, image_part(WIDE, detail="low"), "x")[0]["tiles"] == 1

    def wide(self, processor: Processor, engine: EngineProcess) -> dict[str, Any]:
        with running(processor, engine) as server:
            return seen(server, image_part(WIDE), "x")[0]


class TestVideos:
    def test_one_is_read_and_reported(self, server: RunningServer) -> None:
        for data, frames in ((CLIP, 8), (animation(3), 3)):
            (report,) = seen(server, video_part(data), "What happens?")
            assert (report["width"], report["height"], report["frames"], report["tiles"]) == (64, 48, frames, frames)
        (few,) = seen(server, video_part(CLIP, num_frames=2, detail="low"), "What happens?")
        assert (few["frames"], few["detail"]) == (2, {"requested": "low", "applied": "low"})

    def test_one_stands_beside_images(self, server: RunningServer) -> None:
        image, clip = seen(server, image_part(WIDE), "and", video_part(CLIP, num_frames=2))
        assert "frames" not in image
        assert clip["frames"] == 2
        assert image["tiles"] > 1

    def test_the_same_frames_as_images_give_the_same_answer(self, server: RunningServer) -> None:
        """In lossless form: what the video's decoder does is not the question here."""
        data, frames = animation(3, "WEBP"), []
        opened = Image.open(io.BytesIO(data))
        for number in range(3):
            opened.seek(number)
            buffer = io.BytesIO()
            opened.convert("RGB").save(buffer, "PNG")
            frames.append(image_part(buffer.getvalue()))
        as_video = server.post(chat(video_part(data), "What?", ignore_eos=True)).json()
        as_images = server.post(chat(*frames, "What?", ignore_eos=True)).json()
        assert as_video["choices"][0]["message"] == as_images["choices"][0]["message"]
        assert as_video["usage"]["prompt_tokens"] == as_images["usage"]["prompt_tokens"]

    @pytest.mark.parametrize(
        ("part", "code", "where"),
        [
            (video_part(b""), "video_format_not_allowed", ""),
            (video_part(b"#EXTM3U\nfile:///etc/passwd"), "video_format_not_allowed", ""),
            (video_part(CLIP[:900]), "video_decode_failed", ""),
            (video_part(CLIP, num_frames=10_000), "invalid_num_frames", ""),
            (video_part(CLIP, num_frames=0), "invalid_value", ".video_url.num_frames"),
            (video_part(CLIP, max_pixels=100), "unsupported_budget", ""),
            ({"type": "video_url", "video_url": {"url": "http://127.0.0.1:9/a.mp4"}}, "image_url_forbidden", ""),
            ({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}}, "local_media_forbidden", ""),
            ({"type": "video_url", "video_url": {"url": "clip.mp4"}}, "unsupported_url_scheme", ""),
            ({"type": "video_url"}, "missing_field", ".video_url"),
        ],
    )
    def test_a_bad_one_is_refused_by_name(
        self, server: RunningServer, part: dict[str, Any], code: str, where: str
    ) -> None:
        assert refusal(server, "x", part) == (code, "messages[0].content[1]" + where)
        assert seen(server, video_part(CLIP, num_frames=2), "x")[0]["frames"] == 2

    def test_what_an_operator_allows(self, processor: Processor, engine: EngineProcess) -> None:
        with running(processor, engine, max_video_frames=4, max_video_pixels=4 * 64 * 48) as server:
            assert seen(server, video_part(CLIP), "x")[0]["frames"] == 4
            assert refusal(server, video_part(CLIP, num_frames=5)) == ("invalid_num_frames", "messages[0].content[0]")
            assert refusal(server, video_part(CLIP), video_part(CLIP)) == ("too_many_videos", "messages")
            bigger = video(3, size=(128, 96))
            assert refusal(server, video_part(bigger)) == ("image_too_large", "messages[0].content[0]")
        with running(processor, engine, max_videos=0) as server:
            assert refusal(server, video_part(CLIP)) == ("too_many_videos", "messages")
        with running(processor, engine, max_video_bytes=500) as server:
            response = server.post(chat(video_part(CLIP)))
            assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")

    def test_one_that_does_not_fit_is_refused_before_it_is_decoded(
        self, server: RunningServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def never(*_: object) -> None:
            raise AssertionError("decoded")

        monkeypatch.setattr("siglane.families.pipeline.decode_video", never)
        long = "picture " * 3900
        assert refusal(server, video_part(CLIP), long)[0] == "context_length_exceeded"

    def test_memory_for_its_frames_is_given_back(self, server: RunningServer) -> None:
        seen(server, video_part(CLIP), "x")
        refusal(server, video_part(CLIP[:900]), "x")
        eventually(lambda: server.served.inflight_bytes.used == 0)  # a moment after the client has its answer
