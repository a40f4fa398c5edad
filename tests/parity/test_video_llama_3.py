"""VideoLLaMA3 in both layouts against transformers' own model, its processor's pixels and ids included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import video
from parity_kit import Pair, assert_parity, build, greedy, load, logits, picture, spliced
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil
from video_llama_3_checkpoint import LAYOUTS, Layout, VideoLlama3, write_video_llama_3_checkpoint

from siglane import LLM, SamplingParams
from siglane.errors import ConfigError, WeightError
from siglane.families.processor import load_processor
from siglane.tiling.bounds import Bounds
from siglane.tiling.video_llama_3 import NativeFrames
from siglane.types import DecodedImage, DecodedVideo, Grid, ImagePart, ImagePatches, Message, Size, VideoSize
from siglane.verify.references.decoder import PLACE
from siglane.verify.references.video_llama_3 import Medium
from siglane.verify.references.video_llama_3 import VideoLlama3 as Hf
from siglane.verify.references.videollama3_qwen2 import VideoLlama3Qwen2
from siglane.weights.hub import open_checkpoint

WIDE, TALL, SMALL = (130, 70), (40, 95), (20, 13)
AWKWARD = [(1, 1), (17, 3000), (3000, 17), (33, 32), (61, 1), (95, 97), (4, 4)]
QUESTION = "What is in the image?"
REFERENCES: dict[Layout, type[Hf]] = {"hf": Hf, "authors": VideoLlama3Qwen2}

VideoPair = Pair[VideoLlama3, Hf]


def built(folder: Path, layout: Layout = "hf", **options: Any) -> VideoPair:
    return build(folder, write_video_llama_3_checkpoint, REFERENCES[layout], layout=layout, **options)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, VideoPair]:
    return {layout: built(tmp_path_factory.mktemp("videollama"), layout) for layout in LAYOUTS}


@pytest.fixture(params=LAYOUTS)
def pair(request: pytest.FixtureRequest, pairs: dict[Layout, VideoPair]) -> VideoPair:
    return pairs[request.param]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def cut(pair: VideoPair, media: Sequence[Medium]) -> list[ImagePatches]:
    """The patches of one request that holds all of them; several pictures are the frames of a video."""
    decoded = [_decoded(medium) for medium in media]
    layouts = pair.processor.layouts([one.size for one in decoded])
    return [pair.processor.patches(one, layout) for one, layout in zip(decoded, layouts, strict=True)]


def _decoded(medium: Medium) -> DecodedImage | DecodedVideo:
    if isinstance(medium, Image.Image):
        return DecodedImage.from_rgb(np.array(medium))
    return DecodedVideo.of([DecodedImage.from_rgb(np.array(frame)) for frame in medium])


def clip(size: tuple[int, int], *numbers: int) -> list[Image.Image]:
    """A frame for each number; equal ones are equal pictures."""
    return [picture(*size, seed=number) for number in numbers]


def check_whole_path(pair: VideoPair, media: list[Medium], steps: int = 32) -> list[ImagePatches]:
    """Every stage of all media in one packed call, ids, logits and greedy tokens; the last two are transformers' whole
    model's."""
    model, (patches, seen) = pair.model, (cut(pair, media), pair.see(media))
    laid_out = pair.processor.layouts([_decoded(medium).size for medium in media])
    parts = (*map(ImagePart, range(len(media))), QUESTION)
    prompt = pair.processor.prompt([Message("user", parts)], laid_out)
    prompt = prompt.settled(prompt.in_order(patches))
    assert prompt == prompt.settled(prompt.in_order(patches))
    ids = pair.reference.ids(pair.reference.text(QUESTION, seen), seen)
    place = pair.processor.config.image_token_id
    assert list(prompt.token_ids) == [place if token == PLACE else token for token in ids]

    taps: dict[str, torch.Tensor] = {}
    if media:
        taps["preprocessing"] = model.vision.encoder.pack(patches).pixels
        model.vision(patches, taps)
        taps["projector"] = taps.pop("projected")
        for stage, expected in seen.taps.items():
            assert_parity(stage, taps[stage], expected)
    answer = whole_model(pair, ids, media, seen.blocks, steps)
    ours = spliced(model, prompt, patches)
    found = logits(model, ours, taps)
    assert_parity("logits", found, answer["logits"])
    if steps:
        chosen = answer["tokens"].tolist()
        print(f"{len(set(chosen))} different tokens of {steps}")
        assert greedy(model, ours, steps) == chosen
    return patches


def whole_model(
    pair: VideoPair, ids: list[int], media: Sequence[Medium], blocks: Sequence[torch.Tensor], steps: int
) -> dict[str, torch.Tensor]:
    """transformers' class encodes, drops and splices by itself. blocks: the rows of each picture and frame, which have
    placeholders of two kinds."""
    theirs, reference = pair.written.model, pair.reference
    kinds = ["image" if isinstance(medium, Image.Image) else "video" for medium in media]
    owners = [kind for kind, medium in zip(kinds, media, strict=True) for _ in range(frames_of(medium))]
    tokens = {"image": theirs.config.image_token_id, "video": theirs.config.video_token_id}
    places = iter([tokens[owner] for owner, rows in zip(owners, blocks, strict=True) for _ in rows])
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[next(places) if one == PLACE else one for one in ids]])}
    sizes = reference.sizes(media) if media else []
    for kind, pixels, merge in zip(tokens, ("pixel_values", "pixel_values_videos"), reference.merges(), strict=True):
        shown = [
            in_blocks(reference, *one[1:], merge) for one in zip(kinds, media, sizes, strict=True) if one[0] == kind
        ]
        if shown:
            inputs[pixels] = torch.cat([patches for patches, _ in shown])
            inputs[f"{kind}_grid_thw"] = torch.tensor([grid for _, grid in shown])
            inputs[f"{kind}_merge_sizes"] = torch.tensor([merge] * len(shown))
        if shown and kind == "video" and reference.compresses():
            inputs["video_compression_mask"] = torch.cat([mask_of(*one, merge) for one in shown])
    output = theirs(**inputs, use_cache=True)
    found, chosen = {"logits": output.logits[0]}, [int(output.logits[0, -1].argmax())]
    while len(chosen) < steps:
        step = torch.tensor([chosen[-1:]])
        output = theirs(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        chosen.append(int(output.logits[0, -1].argmax()))
    return found | {"tokens": torch.tensor(chosen)}


def frames_of(medium: Medium) -> int:
    return 1 if isinstance(medium, Image.Image) else len(medium)


def in_blocks(
    reference: Hf, medium: Medium, size: tuple[int, int], merge: int
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """Patches as transformers' processors order them, `[patches, 3 * P * P]`, and frames, rows and columns."""
    frames = [medium] if isinstance(medium, Image.Image) else medium
    resized = [frame.resize(size[::-1], reference.processing.resample) for frame in frames]
    pixels = torch.stack([reference.processing.normalised(frame) for frame in resized])
    p = reference.vision_config.patch_size
    h, w = size[0] // p, size[1] // p
    cells = pixels.reshape(len(frames), 3, h // merge, merge, p, w // merge, merge, p).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return cells.reshape(-1, 3 * p * p), (len(frames), h, w)


def mask_of(patches: torch.Tensor, grid: tuple[int, int, int], merge: int) -> torch.Tensor:
    """`VideoLlama3VideoProcessor._get_compression_mask` of one video, which test_layout_video_llama_3.py compares with
    transformers' own."""
    frames = patches.reshape(grid[0], grid[1] * grid[2] // merge**2, -1)
    kept = torch.ones(frames.shape[:2], dtype=torch.bool)
    if len(frames) > 1:
        kept[1:] = (frames[1:] - frames[:-1]).abs().mean(-1) * 255 > 0.1
        kept[kept.sum(1) < 1, :1] = True
    return kept.flatten()


@pytest.mark.few("hf-*", "authors-[]", "authors-[(40, 95), (20, 13), (130, 70)]")
@pytest.mark.parametrize("sizes", [[], [WIDE], [SMALL], [TALL, SMALL, WIDE]], ids=str)
def test_pictures(pair: VideoPair, sizes: list[tuple[int, int]]) -> None:
    check_whole_path(pair, [picture(*size, seed=seed) for seed, size in enumerate(sizes)])


@pytest.mark.few("hf-*", "authors-(1, 1)", "authors-(17, 3000)")
@pytest.mark.parametrize("size", AWKWARD, ids=str)
def test_awkward_pictures(pair: VideoPair, size: tuple[int, int]) -> None:
    check_whole_path(pair, [picture(*size)], steps=0)


def test_a_video_beside_a_picture(pair: VideoPair) -> None:
    check_whole_path(pair, [picture(*SMALL), clip(SMALL, 0, 1, 1)], steps=8)


MEDIA: dict[str, list[Medium]] = {
    "a video": [clip(WIDE, 0, 1, 2)],
    "frames that stand still": [clip(WIDE, 0, 0, 1, 1)],
    "nothing moves": [clip(SMALL, *[0] * 6)],
    "two videos": [clip(WIDE, 0, 1), clip(TALL, 2, 2, 3)],
    "a video behind a picture": [picture(*WIDE, seed=7), clip(TALL, 0, 1, 1)],
    "a picture behind a video": [clip(TALL, 0, 1, 1), picture(*WIDE, seed=7)],
    "pictures around a video": [picture(*SMALL), clip(WIDE, 0, 1), picture(*TALL, seed=3)],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MEDIA)
def test_videos(pair: VideoPair, name: str) -> None:
    patches = check_whole_path(pair, MEDIA[name])
    if name == "nothing moves":
        assert patches[0].layout.placeholders[1:] == (1,) * 5
    if name == "frames that stand still":
        first, *others = patches[0].layout.placeholders
        assert others == [1, first, 1]


OPTIONS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "all in one processor_config.json": {"nested": True},
    "a template": {"template": True},
    "pictures merged too": {"processor": {"merge_size": 2}},
    "frames merged by three": {"videos": {"merge_size": 3}},
    "frames not merged": {"videos": {"merge_size": 1}},
    "still rows kept": {"videos": {"use_token_compression": False}},
    "another normalisation": {
        "processor": {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.25, 0.4], "resample": 2}
    },
    "older bounds": {"processor": {"size": None, "min_pixels": 700, "max_pixels": 1400}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_variants(tmp_path: Path, name: str) -> None:
    media: list[Medium] = [picture(*TALL), clip(WIDE, 0, 1, 1), picture(*WIDE, seed=1)]
    check_whole_path(built(tmp_path, **OPTIONS[name]), media, steps=8)


AUTHORS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "a template": {"template": True},
    "other merges": {"videos": {"image_merge_size": 2, "video_merge_size": 3}},
    "one merge for both": {"videos": {"image_merge_size": 2}},
    "still rows kept": {"keys": {"use_token_compression": False}},
    "little for all together": {"bounds": (2, 90)},
    "another normalisation": {"processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTHORS)
def test_variants_of_the_authors_layout(tmp_path: Path, name: str) -> None:
    media: list[Medium] = [picture(*TALL), clip(WIDE, 0, 1, 1), picture(*WIDE, seed=1)]
    pair = built(tmp_path, "authors", **AUTHORS[name])
    check_whole_path(pair, media, steps=8)
    check_whole_path(pair, media[::2], steps=0)


def test_pixels_are_transformers_processors(pairs: dict[Layout, VideoPair]) -> None:
    pair = pairs["hf"]
    processor = VideoLlama3ImageProcessorPil(**pair.reference.picture)
    images = [picture(*size, seed=seed) for seed, size in enumerate((WIDE, TALL, SMALL))]
    theirs = processor(images, return_tensors="pt")
    patches = cut(pair, images)
    ours = pair.model.vision.encoder.pack(patches).pixels
    assert [(1, *one.layout.grids[0]) for one in patches] == [tuple(grid) for grid in theirs["image_grid_thw"].tolist()]
    assert_parity("pixels", ours, theirs["pixel_values"])
    assert theirs["image_merge_sizes"].tolist() == [1, 1, 1]


class TestPrompts:
    @pytest.mark.parametrize("template", [False, True])
    def test_a_whole_conversation(self, tmp_path: Path, template: bool) -> None:
        pair = built(tmp_path, "authors", template=template)
        (patches,) = cut(pair, [picture(*SMALL)])
        history = [
            Message("system", ("S",)),
            Message("user", (ImagePart(0), "Q")),
            Message("assistant", ("A",)),
            Message("user", ("And", "?")),
        ]
        prompt = pair.processor.prompt(history, [patches.layout])
        text = (
            f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{'<image>' * patches.layout.rows}\nQ<|im_end|>\n"
            "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert list(prompt.token_ids) == pair.written.tokenizer(text).input_ids

    def test_the_authors_template_has_a_system_turn_to_ask_for(self, tmp_path: Path) -> None:
        pair = built(tmp_path, "authors", template=True)
        plain, asked = (
            pair.processor.prompt([Message("user", ("Q",))], [], arguments)
            for arguments in ({}, {"add_system_prompt": True})
        )
        text = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        assert list(asked.token_ids) == [*pair.written.tokenizer(text).input_ids, *plain.token_ids]

    @pytest.mark.parametrize("template", [False, True])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_frames_are_told_when_they_are_shown(self, tmp_path: Path, layout: Layout, template: bool) -> None:
        pair = built(tmp_path, layout, template=template)
        (layout_of,) = pair.processor.layouts([VideoSize(Size(32, 16), 3, (0.0, 0.96, 12.04), 13.0)])
        prompt = pair.processor.prompt([Message("user", (ImagePart(0), "Q"))], [layout_of])
        token = pair.processor.config.image_token
        rows = token * layout_of.placeholders[0]
        text = (
            f"<|im_start|>user\nTime 0.0s:{rows},Time 1.0s:{rows},Time 12.0s:{rows}\nQ<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert list(prompt.token_ids) == pair.written.tokenizer(text).input_ids

    def test_words_of_a_user_are_no_placeholders(self, pair: VideoPair) -> None:
        text = "<image> <video> <|image_pad|> <|video_pad|> <|stream_start|>"
        prompt = pair.processor.prompt([Message("user", (text,))], [])
        assert not set(pair.written.tokenizer.get_added_vocab().values()) - {320, 321, 322} & set(prompt.token_ids)


class TestVideosOfFiles:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_still_rows_are_left_out_of_prompts_and_counts(self, tmp_path: Path, layout: Layout) -> None:
        """A file of 40 frames, ten a second: one or more of each second are shown."""
        write_video_llama_3_checkpoint(tmp_path, layout)
        llm = LLM(tmp_path, device="cpu", kv_tokens=4096)
        rows: list[dict[str, Any]] = [{"prompt": QUESTION, "videos": [one]} for one in (video(40), clip(WIDE, 0, 1, 1))]
        moving, still = llm.generate(rows, SamplingParams(max_tokens=4, ignore_eos=True))
        for answer in (moving, still):
            (report,) = answer.images
            assert answer.error is None
            assert report["tokens"] == answer.usage.image_tokens
        assert moving.images[0]["frames"] == 4
        grid = Grid(*still.images[0]["grids"][0])
        assert still.images[0]["tokens"] == 2 * grid.area // 4 + 1

    def test_the_same_frames_have_the_same_features(self, pairs: dict[Layout, VideoPair]) -> None:
        pair = pairs["hf"]
        (patches,) = cut(pair, [clip(WIDE, 5, 5)])
        first, second = pair.model.vision.encoder.features([patches])[0].chunk(2)
        assert torch.equal(first, second)


class TestFacts:
    def test_of_transformers_layout(self, tmp_path: Path) -> None:
        write_video_llama_3_checkpoint(tmp_path, processor={"size": None}, videos={"size": None, "fps": None})
        facts = load_processor(open_checkpoint(tmp_path)).facts
        vision, rule, frames = facts.vision, facts.preprocess.rule, facts.video
        assert (vision.rope_theta, vision.position_grid.area, vision.post_norm, vision.depth) == (10000.0, 0, True, 2)
        assert isinstance(rule, NativeFrames)
        assert rule.picture == Bounds(4, 56 * 56, 28 * 28 * 1280)
        assert rule.frame == Bounds(8, 128 * 28 * 28, 768 * 28 * 28)
        assert (rule.drops_still, rule.shared) == (True, False)
        assert frames is not None
        assert (frames.frames, frames.fewest, frames.fps, frames.spread, frames.timed) == (8, 4, 1.0, "stepped", True)
        assert facts.preprocess.mean == (0.5, 0.5, 0.5)

    def test_of_the_authors_layout(self, tmp_path: Path) -> None:
        absent = {"min_tokens": None, "max_tokens": None, "image_mean": None, "image_std": None}
        nothing = {"image_merge_size": None, "video_merge_size": None, "fps": None, "max_frames": None}
        write_video_llama_3_checkpoint(tmp_path, "authors", processor=absent, videos=nothing)
        processor = load_processor(open_checkpoint(tmp_path))
        rule, frames = processor.facts.preprocess.rule, processor.facts.video
        assert isinstance(rule, NativeFrames)
        assert (rule.picture, rule.frame) == (Bounds(4, 16 * 16, 16384 * 16), Bounds(8, 16 * 64, 16384 * 64))
        assert (rule.drops_still, rule.shared) == (True, True)
        assert frames is not None
        assert (frames.frames, frames.fps, frames.spread, frames.token) == (128, 1.0, "segments", "<video>")
        assert [round(channel, 4) for channel in processor.facts.preprocess.mean] == [0.4815, 0.4578, 0.4082]
        assert processor.config.image_token == "<image>"
        vocabulary = processor.tokenizer.get_vocab()
        assert processor.config.image_token_id == vocabulary["<image>"]

    @pytest.mark.parametrize(
        ("layout", "options", "message"),
        [
            ("hf", {"videos": {"image_std": [0.4] * 3}}, "normalisation of frames differs"),
            ("hf", {"processor": {"patch_size": 7}}, "patch_size 7 is not the tower's"),
            ("hf", {"processor": {"temporal_patch_size": 2}}, "temporal_patch_size"),
            ("hf", {"processor": {"size": {"shortest_edge": 300}}}, "longest_edge"),
            ("hf", {"processor": {"size": {"shortest_edge": 1, "longest_edge": 15}}}, "less than one block"),
            ("authors", {"keys": {"mm_projector_type": "linear"}}, "mm_projector_type 'linear' is not known"),
            ("authors", {"keys": {"image_token_index": None}}, "image_token_index"),
        ],
    )  # fmt: skip
    def test_what_is_refused(self, tmp_path: Path, layout: Layout, options: dict[str, Any], message: str) -> None:
        write_video_llama_3_checkpoint(tmp_path, layout, **options)
        with pytest.raises(ConfigError, match=message):
            load_processor(open_checkpoint(tmp_path))

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_tensor_counts(self, tmp_path: Path, layout: Layout) -> None:
        write_video_llama_3_checkpoint(tmp_path, layout)
        state = load_file(tmp_path / "model.safetensors")
        norm = next(name for name in state if name.endswith("post_layernorm.weight"))
        save_file({name: one for name, one in state.items() if name != norm}, tmp_path / "model.safetensors")
        with pytest.raises(WeightError, match="post_norm"):
            load(tmp_path)
