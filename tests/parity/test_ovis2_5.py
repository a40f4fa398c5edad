"""Ovis2.5 against its reference: every tap, prompts, spliced rows, logits and greedy tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoints import Written
from ovis2_5_checkpoint import LARGE, write_ovis2_5_checkpoint
from parity_kit import Pair, ask, assert_parity, build, generated, greedy, logits, patches_of, picture, spliced
from PIL import Image
from ranks import start_ranks
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionModel

from siglane.cli.main import main
from siglane.config.vision import VisionConfig
from siglane.errors import ConfigError, UserError, WeightError
from siglane.families.model import load_model
from siglane.families.processor import Processor, load_processor
from siglane.families.prompt.messages import answer_alone
from siglane.families.registry import image_facts, vlm_family
from siglane.llm import LLM, VisionEncoder
from siglane.nn.parallel import TensorParallel
from siglane.tiling.navit import NativeResolution
from siglane.types import (
    DecodedImage,
    DecodedVideo,
    Grid,
    ImagePart,
    ImagePatches,
    Message,
    Prompt,
    SamplingParams,
    Size,
    VideoSize,
)
from siglane.verify.references.ovis2_5 import Ovis2_5
from siglane.verify.references.reference import Seen
from siglane.weights.hub import open_checkpoint

SIZES = ((50, 30), (31, 77), (64, 64), (1, 1))
AWKWARD = ((1, 1), (17, 4000), (4000, 17), (301, 223))
START, END = "<|im_start|>", "<|im_end|>\n"
STEPS = 32
GREEDY = SamplingParams(max_tokens=STEPS, ignore_eos=True)

# the hub's behaviour in other words: parts, no literal placeholders, answers without their reasoning
HUB_TEMPLATE = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}{{ (m.content if m.content is string else m.content | map(attribute='text') | join)"
    ".split('</think>')[-1].lstrip('\n') }}"
    "{%- elif m.content is string %}{{ m.content | replace('<image>', '') | replace('<video>', '') }}"
    "{%- else %}{%- for part in m.content %}"
    "{{ '<' + part.type + '>' if part.type != 'text' else "
    "part.text | replace('<image>', '') | replace('<video>', '') }}"
    "{{ '' if loop.last else '\n' }}{%- endfor %}{%- endif %}"
    "{{ '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


OvisPair = Pair[Written, Ovis2_5]


def built(folder: Path, **options: Any) -> OvisPair:
    return build(folder, write_ovis2_5_checkpoint, Ovis2_5, **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> OvisPair:
    return built(tmp_path_factory.mktemp("ovis"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> OvisPair:
    return built(tmp_path_factory.mktemp("tied"), tied=True, seed=20)


def clip_of(processor: Processor, frames: Sequence[Image.Image]) -> ImagePatches:
    clip = DecodedVideo.of([DecodedImage.from_rgb(np.array(frame)) for frame in frames])
    (layout,) = processor.layouts([clip.size])
    return processor.patches(clip, layout)


@torch.no_grad()
def compare_taps(pair: OvisPair, patches: Sequence[ImagePatches], seen: Seen) -> list[str]:
    """All images in one call. The stages that were compared."""
    taps: dict[str, torch.Tensor] = {"preprocessing": pair.model.vision.encoder.pack(patches).pixels}
    rows = pair.model.vision(patches, taps)
    assert torch.equal(taps["projector_input"], taps["features"])
    taps["projector"] = taps.pop("projected")
    for stage, expected in seen.taps.items():
        assert_parity(stage, taps[stage], expected)
    for ours, theirs in zip(rows.split(), seen.blocks, strict=True):
        assert_parity("rows", ours, theirs)
    return list(seen.taps)


CASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied, the head stored too": {"tied": True},
    "tied, no head stored": {"tied": True, "head_stored": False},
    "no rotation": {"rope": False},
    "positions of another size": {"position_side": 9},
    "read as model_type ovis": {"architecture": False},
}


@pytest.mark.few("tied, no head stored", "no rotation", "positions of another size")
@pytest.mark.parametrize("case", CASES)
def test_every_tap(tmp_path: Path, case: str) -> None:
    pair = built(tmp_path, seed=len(case), **CASES[case])
    images = [picture(*size, seed=number) for number, size in enumerate(SIZES)]
    stages = compare_taps(pair, patches_of(pair.processor, images), pair.see(images))
    blocks = ["block.0", "block.1", "block.2"]
    assert stages == ["preprocessing", "patch_embedding", "positions", *blocks, "features", "projector"]


def test_every_tap_of_awkward_pictures(tmp_path: Path) -> None:
    pair = built(tmp_path, bounds=LARGE)
    for number, size in enumerate(AWKWARD):
        image = picture(*size, seed=number)
        compare_taps(pair, patches_of(pair.processor, [image]), pair.see([image]))


@torch.no_grad()
def test_transformers_own_tower_where_it_has_no_rotation(tmp_path: Path) -> None:
    """At the grid of the position table, raster order, before post_layernorm."""
    pair = built(tmp_path, rope=False)
    image = picture(24, 24)
    tower = pair.written.tower
    assert isinstance(tower, SiglipVisionModel)
    pixels = torch.stack(pair.reference.prepared([image]))
    expected = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][0]
    (features,) = pair.model.vision.encoder.features(patches_of(pair.processor, [image]))
    assert_parity("features", features, expected)


@torch.no_grad()
@pytest.mark.parametrize("which", ["pair", "tied"])
def test_packing_does_not_change_an_image(which: str, request: pytest.FixtureRequest) -> None:
    """Equal counts with different grids among them: 32 x 48 and 48 x 32 pixels."""
    pair: OvisPair = request.getfixturevalue(which)
    images = [picture(*size, seed=number) for number, size in enumerate((*SIZES, (32, 48), (48, 32)))]
    patches = patches_of(pair.processor, images)
    vision = pair.model.vision
    alone = [vision([image]).embeds for image in patches]
    together, turned = vision(patches).split(), vision(patches[::-1]).split()[::-1]
    for single, first, second in zip(alone, together, turned, strict=True):
        assert (single - first).abs().max() < 1e-5
        assert (single - second).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("case", ["untied", "tied, no head stored"])
def test_frames_of_a_video(tmp_path: Path, case: str) -> None:
    """Of different sizes: each is resized to what suits the first."""
    pair = built(tmp_path, **CASES[case])
    frames = [picture(50, 30), picture(40, 70, seed=1), picture(50, 30, seed=2)]
    patches = clip_of(pair.processor, frames)
    seen = pair.see([frames])
    assert patches.layout.frames == 3
    assert patches.layout.grids == tuple(seen.grids) * 3
    compare_taps(pair, [patches], seen)


@torch.no_grad()
def test_frames_never_see_each_other(pair: OvisPair) -> None:
    first, second = picture(50, 30), picture(50, 30, seed=1)
    (alone,) = pair.model.vision.encoder.features(patches_of(pair.processor, [first]))
    (same,) = pair.model.vision.encoder.features([clip_of(pair.processor, [first, first])])
    (other,) = pair.model.vision.encoder.features([clip_of(pair.processor, [first, second])])
    assert torch.equal(*same.chunk(2))
    assert (other[: len(alone)] - alone).abs().max() < 1e-5
    assert (other[len(alone) :] - alone).abs().max() > 0.1


def test_a_clip_is_one_span_between_the_videos_indicators(pair: OvisPair) -> None:
    patches = clip_of(pair.processor, [picture(50, 30)] * 2)
    rows = pair.model.vision([patches])
    assert rows.lengths == (patches.layout.rows,)
    assert torch.equal(rows.embeds[0], pair.reference.table[-2])
    assert torch.equal(rows.embeds[-1], pair.reference.table[-1])


# one user message: images first
def chatml(content: str) -> str:
    return f"{START}user\n{content}{END}{START}assistant\n"


class TestPrompts:
    """Ids against the reference's: text is split at the placeholders, each piece is tokenised alone."""

    @pytest.fixture(scope="class", params=["default", "hub"])
    def either(self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OvisPair:
        template = HUB_TEMPLATE if request.param == "hub" else None
        return built(tmp_path_factory.mktemp("prompts"), chat_template=template)

    def check(
        self, pair: OvisPair, messages: list[Message], images: list[Image.Image], text: str, **options: Any
    ) -> None:
        layouts = [one.layout for one in patches_of(pair.processor, images)]
        prompt = pair.processor.prompt(messages, layouts, options)
        assert list(prompt.token_ids) == pair.their_ids(text, pair.see(images))

    def test_no_default_system_turn(self, either: OvisPair) -> None:
        self.check(either, [Message("user", ("What is it?",))], [], chatml("What is it?"))

    def test_own_system_turn(self, either: OvisPair) -> None:
        messages = [Message("system", ("Be brief.",)), Message("user", ("Hello",))]
        self.check(either, messages, [], f"{START}system\nBe brief.{END}" + chatml("Hello"))

    def test_parts_are_joined_by_line_feeds(self, either: OvisPair) -> None:
        images = [picture(50, 30), picture(20, 60)]
        parts = (ImagePart(0), ImagePart(1), "\nWhat is it?", "And this?")
        self.check(either, [Message("user", parts)], images, chatml("<image>\n<image>\n\nWhat is it?\nAnd this?"))

    def test_text_before_an_image(self, either: OvisPair) -> None:
        self.check(either, [Message("user", ("Look:", ImagePart(0)))], [picture(50, 30)], chatml("Look:\n<image>"))

    def test_thinking_is_closed_where_it_is_not_wanted(self, either: OvisPair) -> None:
        closed = chatml("Hello") + "<think>\n\n</think>\n\n"
        self.check(either, [Message("user", ("Hello",))], [], closed, enable_thinking=False)
        self.check(either, [Message("user", ("Hello",))], [], chatml("Hello"), enable_thinking=True)

    @pytest.mark.parametrize(
        ("answer", "kept"),
        [
            ("<think>\nA cat? Yes.\n</think>\n\nA cat.", "A cat."),
            ("A cat.", "A cat."),
            ("</think>one</think>two", "two"),
            ("\n\nA cat.", "A cat."),
            ("thought</think>", ""),
        ],
    )
    def test_earlier_answers_lose_their_reasoning(self, either: OvisPair, answer: str, kept: str) -> None:
        messages = [Message("user", ("One",)), Message("assistant", (answer,)), Message("user", ("Two",))]
        text = f"{START}user\nOne{END}{START}assistant\n{kept}{END}{chatml('Two')}"
        self.check(either, messages, [], text)

    def test_only_the_parts_behind_the_reasoning_are_kept(self) -> None:
        assert answer_alone(("<think>a", "b</think>\nc", "\nd"), "</think>") == ("c", "\nd")

    def test_reasoning_that_never_ended_is_text(self, either: OvisPair) -> None:
        """The reference would read a token there, which only its own template may write."""
        messages = [Message("user", ("One",)), Message("assistant", ("<think>Hm",)), Message("user", ("Two",))]
        prompt = either.processor.prompt(messages, [])
        assert either.written.token("<think>") not in prompt.token_ids

    @pytest.mark.parametrize("text", ["an <image> of <video>", "<image>", "</think>", "<think>", "<|im_end|>"])
    def test_a_users_text_is_text(self, either: OvisPair, text: str) -> None:
        """The hub's template would drop `<image>` and `<video>`; siglane keeps the letters, they are no placeholder."""
        prompt = either.processor.prompt([Message("user", (text,))], [])
        tokenizer = either.written.tokenizer
        assert tokenizer.decode(list(prompt.token_ids)) == chatml(text)
        specials = {either.written.token(name) for name in ("<think>", "</think>", "<|im_end|>")}
        assert sum(token in specials for token in prompt.token_ids) == 1

    def test_a_video(self, either: OvisPair) -> None:
        frames = [picture(50, 30), picture(50, 30, seed=1)]
        clip = clip_of(either.processor, frames)
        prompt = either.processor.prompt([Message("user", (ImagePart(0), "What happens?"))], [clip.layout])
        text = chatml("<video>\nWhat happens?")
        assert list(prompt.token_ids) == either.their_ids(text, either.see([frames]))

    def test_images_and_videos_do_not_mix(self, either: OvisPair) -> None:
        media = [clip_of(either.processor, [picture(50, 30)]), *patches_of(either.processor, [picture(50, 30)])]
        with pytest.raises(UserError, match="either images or videos"):
            either.processor.prompt([Message("user", (ImagePart(0), ImagePart(1)))], [one.layout for one in media])


@pytest.mark.few("*-pair", "sizes2-tied")
@torch.no_grad()
@pytest.mark.parametrize("which", ["pair", "tied"])
@pytest.mark.parametrize("sizes", [(), (SIZES[0],), (SIZES[1],), SIZES])
def test_spliced_rows_logits_and_greedy_tokens(
    which: str, sizes: Sequence[tuple[int, int]], request: pytest.FixtureRequest
) -> None:
    pair: OvisPair = request.getfixturevalue(which)
    images = [picture(*size, seed=number) for number, size in enumerate(sizes)]
    seen, text = pair.see(images), chatml("<image>\n" * len(images) + "What is it?")
    theirs = pair.reference.embeds(text, seen)
    patches = patches_of(pair.processor, images)
    prompt = ask(pair.processor, patches, "What is it?")
    ours = spliced(pair.model, prompt, patches)
    assert_parity("spliced", ours, theirs)
    assert_parity("logits", logits(pair.model, ours), pair.reference.language.logits(theirs))

    llm = LLM(pair.written.folder, device="cpu", kv_tokens=4096)
    answer = llm.generate({"prompt": "What is it?", "images": images}, GREEDY)[0]
    assert list(prompt.token_ids) == pair.their_ids(text, seen)
    assert answer.prompt_token_ids == prompt.token_ids
    assert list(answer.output_token_ids) == generated(pair.reference.language.model, theirs, STEPS)
    assert answer.usage.image_tokens == sum(map(len, seen.blocks)) - 2 * len(images)  # without the indicators


@torch.no_grad()
def test_a_conversation_through_the_engine(pair: OvisPair) -> None:
    images = [picture(50, 30), picture(20, 60, seed=1)]
    seen = pair.see(images)
    text = (
        f"{START}user\n<image>\nWhat is it?{END}{START}assistant\nA cat.{END}"
        f"{START}user\nAnd\n<image>\nthis?{END}{START}assistant\n<think>\n\n</think>\n\n"
    )
    messages = [
        {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nA cat."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And"},
                {"type": "image", "image": images[1]},
                {"type": "text", "text": "this?"},
            ],
        },
    ]
    llm = LLM(pair.written.folder, device="cpu", kv_tokens=4096)
    (answer,) = llm.chat(messages, GREEDY, chat_template_kwargs={"enable_thinking": False})
    assert list(answer.prompt_token_ids) == pair.their_ids(text, seen)
    theirs = pair.reference.embeds(text, seen)
    assert list(answer.output_token_ids) == generated(pair.reference.language.model, theirs, STEPS)


@torch.no_grad()
def be_a_rank(rank: int, size: int, folder: str, patches: list[ImagePatches], prompt: Prompt) -> None:
    """Loads its share of the checkpoint, then tells the images' rows and what follows the prompt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting{size}", rank=rank, world_size=size)
    checkpoint = open_checkpoint(Path(folder))
    config = load_processor(checkpoint).config
    model = load_model(checkpoint, config, device="cpu", dtype=torch.float32, tp=TensorParallel.from_group())
    words = model.vision.get_parameter("projector.table").shape[0]
    told = {
        "rows": model.vision(patches).embeds,
        "greedy": torch.tensor(greedy(model, spliced(model, prompt, patches), STEPS)),
        "words": words,
    }
    torch.save(told, f"{folder}/told{size}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_rank_gives_the_references_rows_and_tokens(tmp_path: Path, size: int) -> None:
    """48 words divide by every size; 2 heads of the tower divide by 2 only."""
    pair = built(tmp_path)
    images = [picture(*one, seed=number) for number, one in enumerate(SIZES[:2])]
    patches = patches_of(pair.processor, images)
    prompt = ask(pair.processor, patches, "What is it?")
    start_ranks(be_a_rank, (size, str(tmp_path), patches, prompt), size)

    seen = pair.see(images)
    theirs = pair.reference.embeds(chatml("<image>\n<image>\nWhat is it?"), seen)
    expected = generated(pair.reference.language.model, theirs, STEPS)
    for rank in range(size):
        told = torch.load(tmp_path / f"told{size}.{rank}", weights_only=True)
        assert_parity("rows", told["rows"], torch.cat(seen.blocks))
        assert told["greedy"].tolist() == expected
        assert told["words"] == 48 // size + 4


class TestFacts:
    """What is read, from where, and what is refused."""

    def test_all(self, pair: OvisPair) -> None:
        config, reference = pair.processor.config, pair.written
        assert config.family == vlm_family(open_checkpoint(reference.folder)).name == "ovis2_5"
        assert config.eos_token_ids == (reference.token("<|im_end|>"), reference.token("<|endoftext|>"))
        assert config.image_token_id >= max(config.language.vocab_size, len(reference.tokenizer))
        video = config.images.video
        assert video is not None
        assert (video.token, video.frames, video.with_images) == ("<video>", 8, False)
        assert config.thinking is not None
        assert (config.thinking.start, config.thinking.end) == tuple(map(reference.token, ("<think>", "</think>")))
        assert reference.tokenizer.decode(list(config.thinking.forced)) == (
            "\n\nConsidering the limited time by the user, I have to give the solution "
            "based on the thinking directly now.\n</think>\n\n"
        )
        assert config.thinking.forced.count(config.thinking.end) == 1
        assert (config.images.vision.rope_theta, config.images.vision.position_resize) == (10000.0, "bicubic")

    def test_a_tokenizer_without_reasoning_tokens_does_not_reason(self, tmp_path: Path) -> None:
        write_ovis2_5_checkpoint(tmp_path, thinking=False)
        processor = load_processor(open_checkpoint(tmp_path))
        assert processor.config.thinking is None
        messages = [Message("user", ("One",)), Message("assistant", ("hm</think>\n\nTwo",)), Message("user", ("3",))]
        text = processor.tokenizer.decode(list(processor.prompt(messages, [], {"enable_thinking": False}).token_ids))
        assert "assistant\nTwo<|im_end|>" in text
        assert text.endswith("<think>\n\n</think>\n\n")

    def test_bounds_that_no_file_states(self, tmp_path: Path) -> None:
        write_ovis2_5_checkpoint(tmp_path, bounds_stated=False)
        rule = load_processor(open_checkpoint(tmp_path)).facts.preprocess.rule
        assert rule == NativeResolution(factor=8, min_pixels=448**2, max_pixels=1792**2, resample="bilinear")

    def test_layouts_need_no_tokenizer(self, pair: OvisPair) -> None:
        layouts = image_facts(open_checkpoint(pair.written.folder)).layouts([Size(50, 30), VideoSize(Size(50, 30), 2)])
        assert [layout.rows for layout in layouts] == [6 * 4 + 2, 2 * 6 * 4 + 2]

    @pytest.mark.parametrize(
        ("flags", "vit_flags", "words"),
        [
            (
                {"conversation_formatter_class": "Gemma2ConversationFormatter"},
                {},
                "'Gemma2ConversationFormatter' is not",
            ),
            ({"visual_vocab_size": None}, {}, "'visual_vocab_size' is missing"),
            ({"visual_vocab_size": 4}, {}, "none left beside its 4 indicators"),
            ({"hidden_size": 47}, {}, "hidden_size 47 is not llm_config's 48"),
            ({"llm_config": None}, {}, "section 'llm_config' is missing"),
            ({"vit_config": None}, {}, "section 'vit_config' is missing"),
            ({}, {"model_type": "aimv2"}, "'aimv2' is not known"),
            ({}, {"temporal_patch_size": 2}, "temporal_patch_size 2 is not known; siglane knows 1"),
            ({}, {"preserve_original_pe": False}, "preserve_original_pe false"),
            ({}, {"fullatt_block_indexes": "1|2"}, r"fullatt_block_indexes '1\|2' .* is not supported"),
            ({}, {"fullatt_block_indexes": [1]}, "fullatt_block_indexes must be str"),
            ({}, {"num_patches": 35}, "no square of positions"),
            ({}, {"hidden_act": "relu"}, "'relu' is not known"),
        ],
    )
    def test_what_is_not_known_is_refused(
        self, tmp_path: Path, flags: dict[str, Any], vit_flags: dict[str, Any], words: str
    ) -> None:
        write_ovis2_5_checkpoint(tmp_path, flags=flags, vit_flags=vit_flags)
        with pytest.raises(ConfigError, match=words):
            load_processor(open_checkpoint(tmp_path))

    def test_absent_keys_of_the_tower_take_its_class_defaults(self) -> None:
        config = VisionConfig.from_navit({})
        sizes = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads
        assert sizes == (1024, 4096, 24, 16)
        assert (config.patch_size, config.position_grid) == (16, Grid(32, 32))
        assert (config.depth, config.post_norm, config.use_head) == (24, False, False)

    @pytest.mark.parametrize("stated", [None, ""])
    def test_no_full_blocks_stated_means_all_are(self, stated: str | None) -> None:
        assert VisionConfig.from_navit({"fullatt_block_indexes": stated}) == VisionConfig.from_navit({})

    def test_an_untied_head_must_be_stored(self, tmp_path: Path) -> None:
        write_ovis2_5_checkpoint(tmp_path, head_stored=False)
        processor = load_processor(open_checkpoint(tmp_path))
        with pytest.raises(WeightError, match="lm_head"):
            load_model(open_checkpoint(tmp_path), processor.config, device="cpu", dtype=torch.float32)

    def test_a_linear_patch_embedding(self, tmp_path: Path) -> None:
        """num_patches > 0: the same weights as a matrix, patches channel first."""
        write_ovis2_5_checkpoint(tmp_path)
        image = picture(50, 30)
        before = VisionEncoder(tmp_path, device="cpu").encode([image])[0]
        file = tmp_path / "model.safetensors"
        state = load_file(file)
        name = "visual_tokenizer.vit.vision_model.embeddings.patch_embedding.weight"
        state[name] = state[name].flatten(1)
        save_file(state, file)
        root = json.loads((tmp_path / "config.json").read_text())
        root["vit_config"] |= {"num_patches": 36, "image_size": 512}
        (tmp_path / "config.json").write_text(json.dumps(root))
        again = VisionEncoder(tmp_path, device="cpu").encode([image])[0]
        assert torch.equal(again, before)


class TestCommandLine:
    @pytest.fixture(scope="class")
    def file(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        path = tmp_path_factory.mktemp("picture") / "a.png"
        picture(50, 30).save(path)
        return str(path)

    def test_tokens(self, pair: OvisPair, file: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["tokens", str(pair.written.folder), file, "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert found["image_tokens"] == 24
        assert found["grids"] == [[8, 12]]

    def test_generate(self, pair: OvisPair, file: str, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["--prompt", "What is it?", "--image", file, "--max-tokens", "8", "--ignore-eos", "--json"]
        assert main(["generate", str(pair.written.folder), *words, "--device", "cpu", "--kv-tokens", "1024"]) == 0
        found = json.loads(capsys.readouterr().out)
        embeds = pair.reference.embeds(chatml("<image>\nWhat is it?"), pair.see([picture(50, 30)]))
        assert found["output_token_ids"] == generated(pair.reference.language.model, embeds, 8)

    def test_encode_gives_atoms_without_indicators_in_raster_order(
        self, pair: OvisPair, file: str, tmp_path: Path
    ) -> None:
        out = str(tmp_path / "out.safetensors")
        assert main(["encode", str(pair.written.folder), file, "-o", out, "--device", "cpu"]) == 0
        found = load_file(out)
        taps = pair.see([picture(50, 30)]).taps
        assert_parity("features", found["0"], taps["features"])
        assert_parity("projector", found["projected.0"], taps["projector"])

    def test_look(self, pair: OvisPair, file: str, tmp_path: Path) -> None:
        out = tmp_path / "view.png"
        assert main(["look", str(pair.written.folder), file, "-o", str(out)]) == 0
        assert Image.open(out).size[0] > 50
