"""LLaVA-OneVision against transformers' own model, image processor, processor and templates."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llava_onevision_checkpoint import HUB_TEMPLATE, LlavaOnevision, write_llava_onevision_checkpoint
from parity_kit import Pair, ask, assert_parity, build, greedy, logits, patches_of, picture, spliced
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaOnevisionConfig

from siglane.cli.main import main
from siglane.errors import ConfigError
from siglane.families.model import load_model, load_vision
from siglane.families.processor import Processor, load_processor
from siglane.families.stack import VisionStack
from siglane.nn.parallel import TensorParallel
from siglane.tiling.rule import ImageBudget
from siglane.types import (
    DecodedImage,
    DecodedVideo,
    ImageLayout,
    ImagePart,
    ImagePatches,
    Message,
    Newline,
)
from siglane.verify.references import llava_onevision, pixels
from siglane.weights.hub import open_checkpoint

WIDE, TALL, SQUARE, LARGE = (130, 70), (50, 171), (60, 60), (333, 291)
AWKWARD = [(1, 1), (17, 4000), (4000, 17), (1, 61), (61, 1), (179, 181)]
QUESTION = "What is in the image?"
LlavaPair = Pair[LlavaOnevision, llava_onevision.LlavaOnevision]


def built(folder: Path, **options: Any) -> LlavaPair:
    return build(folder, write_llava_onevision_checkpoint, llava_onevision.LlavaOnevision, **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> LlavaPair:
    return built(tmp_path_factory.mktemp("onevision"))


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def asked(images: int, text: str = QUESTION) -> tuple[str | ImagePart, ...]:
    return (*map(ImagePart, range(images)), text)


def conversation(parts: tuple[str | ImagePart, ...]) -> list[dict[str, Any]]:
    """transformers' form of one user message."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    return [{"role": "user", "content": content}]


def their_inputs(reference: LlavaOnevision, images: list[Image.Image], parts: tuple[str | ImagePart, ...]) -> Any:
    text = reference.processor.apply_chat_template(conversation(parts), add_generation_prompt=True)
    return reference.inputs(text, images)


def check_whole_path(pair: LlavaPair, images: list[Image.Image]) -> None:
    """Pixels, every block of the tower, packed rows, ids, logits and 32 greedy tokens of one request."""
    theirs = their_inputs(pair.written, images, asked(len(images)))
    patches = patches_of(pair.processor, images)
    if images:
        check_vision(pair, patches, theirs)
    prompt = ask(pair.processor, patches, QUESTION)
    assert list(prompt.token_ids) == theirs.input_ids[0].tolist()
    embeds = spliced(pair.model, prompt, patches)
    assert_parity("logits", logits(pair.model, embeds), pair.written.model(**theirs).logits[0])
    chosen = pair.written.model.generate(
        **theirs, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert greedy(pair.model, embeds, 32) == chosen[0, len(prompt.token_ids) :].tolist()


def check_vision(pair: LlavaPair, patches: list[ImagePatches], theirs: Any) -> None:
    counts = [len(one.layout.tiles) for one in patches]
    tiles = torch.cat([image[:count] for image, count in zip(theirs.pixel_values, counts, strict=True)])
    assert_parity(
        "pixels", pair.model.vision.encoder.pack(patches).pixels, pixels.patches_of(tiles, pair.written.patch)
    )
    taps: dict[str, torch.Tensor] = {}
    tokens = pair.model.vision(patches, taps)
    states = pair.written.model.model.vision_tower(tiles, output_hidden_states=True).hidden_states
    for number, state in enumerate(states[1:]):
        assert_parity(f"block.{number}", taps[f"block.{number}"], state.flatten(0, 1))
    assert_parity("features", taps["features"], states[-1].flatten(0, 1))
    rows = pair.written.model.model.multi_modal_projector(states[-1]).flatten(0, 1)
    grids = [grid for one in patches for grid in one.layout.grids]
    assert_parity("projector", pair.model.vision.projector(taps["projector_input"], grids), rows)
    for ours, expected in zip(tokens.split(), pair.written.rows(theirs), strict=True):
        assert_parity("packed", ours, expected)


CASES: list[dict[str, Any]] = [
    {"names": "hub", "image_size": 60, "tied": True},
    {"names": "hub", "image_size": 70, "tied": True, "head_stored": False, "nested": True, "bias": False},
    {"names": "hub", "image_size": 56, "tied": False, "chat_template": HUB_TEMPLATE},
    {"names": "saved", "image_size": 60, "tied": True, "nested": True},
    {"names": "saved", "image_size": 60, "tied": False},
    {"names": "memory", "image_size": 60, "tied": True},
    {"names": "memory", "image_size": 60, "tied": False},
]


@pytest.mark.few("hub-70", "hub-56", "saved-60_0", "memory-60_1")
@pytest.mark.parametrize("options", CASES, ids=lambda options: f"{options['names']}-{options['image_size']}")
def test_every_layout_of_a_checkpoint(tmp_path: Path, options: dict[str, Any]) -> None:
    check_whole_path(built(tmp_path, **options), [picture(*WIDE)])


@pytest.mark.parametrize("sizes", [[TALL], [SQUARE], [LARGE], [WIDE, TALL], [TALL, SQUARE, WIDE]], ids=str)
def test_one_image_and_several(pair: LlavaPair, sizes: list[tuple[int, int]]) -> None:
    check_whole_path(pair, [picture(*size, seed=seed) for seed, size in enumerate(sizes)])


@pytest.mark.few("56-(1, 1)", "56-(4000, 17)", "70-(17, 4000)", "70-(61, 1)")
@pytest.mark.parametrize("size", AWKWARD, ids=str)
@pytest.mark.parametrize("image_size", [56, 70])  # maps of an even and of an odd number of rows
def test_awkward_images(tmp_path: Path, image_size: int, size: tuple[int, int]) -> None:
    odd = built(tmp_path, image_size=image_size)
    for images in ([picture(*size)], [picture(*size), picture(*WIDE)]):
        theirs = their_inputs(odd.written, images, asked(len(images)))
        check_vision(odd, patches_of(odd.processor, images), theirs)


@pytest.mark.parametrize(
    "keys",
    [
        {"vision_feature_layer": -2},
        {"vision_feature_layer": 1},
        {"projector_hidden_act": "gelu_pytorch_tanh"},
        {"vision_aspect_ratio": "anyres_max_1"},
        {"vision_aspect_ratio": "anyres_max_9"},
    ],
    ids=str,
)
def test_facts_that_change_the_rows_are_read(tmp_path: Path, keys: dict[str, Any]) -> None:
    one = built(tmp_path, keys=keys)
    image = picture(*LARGE)
    theirs = one.written.rows(their_inputs(one.written, [image], asked(1)))
    (ours,) = one.model.vision(patches_of(one.processor, [image])).split()
    assert_parity("packed", ours, theirs[0])


@pytest.mark.parametrize("resample", [2, 3, 1])
def test_the_filter_is_the_files(tmp_path: Path, resample: int) -> None:
    one = built(tmp_path, processor={"resample": resample})
    for images in ([picture(*LARGE)], [picture(*WIDE), picture(*LARGE)]):
        theirs = their_inputs(one.written, images, asked(len(images)))
        check_vision(one, patches_of(one.processor, images), theirs)


def test_keys_that_the_processors_file_lacks_are_its_class_defaults(tmp_path: Path) -> None:
    """CLIP's mean and std, bicubic, tiles of 384 and the pinpoints up to 6 x 6 of them."""
    absent = ("image_mean", "image_std", "resample", "rescale_factor", "size", "image_grid_pinpoints")
    one = built(
        tmp_path, image_size=384, processor=dict.fromkeys(absent), keys={"image_grid_pinpoints": None}
    )  # fmt: skip
    image = picture(100, 90)
    theirs = their_inputs(one.written, [image], asked(1))
    check_vision(one, patches_of(one.processor, [image]), theirs)
    assert theirs.input_ids.tolist()[0].count(one.processor.config.image_token_id) == 729 + 25 * 28


def test_packing_does_not_change_an_image(pair: LlavaPair) -> None:
    """Alone, beside others and in another order, tiled and not, in one tower call."""
    alone = patches_of(pair.processor, [picture(*LARGE)])
    others = patches_of(pair.processor, [picture(*TALL, seed=1), picture(*SQUARE, seed=2)])
    vision = pair.model.vision
    by_itself = [vision([image]).embeds for image in (*alone, *others)]
    together = vision([*alone, *others]).split()
    turned = vision([*others[::-1], *alone]).split()
    for single, first, second in zip(by_itself, together, turned[::-1], strict=True):
        assert (single - first).abs().max() < 1e-5
        assert (single - second).abs().max() < 1e-5


class TestClips:
    """Frames are resized as pictures are; transformers' video processor, which needs torchvision, filters 8-bit tensors
    and differs from Pillow by at most two grey levels."""

    FRAMES = 3

    def clip(self) -> tuple[DecodedVideo, list[Image.Image]]:
        frames = [picture(*WIDE, seed=seed) for seed in range(self.FRAMES)]
        return DecodedVideo.of([DecodedImage.from_rgb(np.array(frame)) for frame in frames]), frames

    def pixels(self, pair: LlavaPair, frames: list[Image.Image]) -> torch.Tensor:
        """What the video processor makes, `[1, frames, 3, side, side]`: resize, rescale, normalise."""
        processing = pair.reference.processing
        return torch.stack([processing.normalised(processing.resized(frame)) for frame in frames])[None]

    @pytest.mark.parametrize("image_size", [56, 70])
    def test_rows(self, tmp_path: Path, image_size: int) -> None:
        one = built(tmp_path, image_size=image_size)
        clip, frames = self.clip()
        (layout,) = one.processor.layouts([clip.size])
        video = one.processor.patches(clip, layout)
        theirs = one.written.model.get_video_features(self.pixels(one, frames)).pooler_output[0]
        (ours,) = one.model.vision([video]).split()
        assert_parity("video", ours, theirs)
        counted = one.written.processor._get_num_multimodal_tokens(video_sizes=[(self.FRAMES, *WIDE[::-1])])
        assert [layout.image_tokens] == [len(theirs)] == counted.num_video_tokens

    def test_a_clip_beside_an_image(self, pair: LlavaPair) -> None:
        """The image is alone among the images and is tiled; packing changes neither."""
        clip, frames = self.clip()
        image = DecodedImage.from_rgb(np.array(picture(*LARGE)))
        video_layout, layout = pair.processor.layouts([clip.size, image.size])
        assert len(layout.tiles) > 1
        parts = [pair.processor.patches(clip, video_layout), pair.processor.patches(image, layout)]
        first, second = pair.model.vision(parts).split()
        assert (first - pair.model.vision(parts[:1]).embeds).abs().max() < 1e-5
        theirs = pair.written.model.get_video_features(self.pixels(pair, frames)).pooler_output[0]
        assert_parity("video", first, theirs)
        inputs = their_inputs(pair.written, [picture(*LARGE)], asked(1))
        assert_parity("image", second, pair.written.rows(inputs)[0])

    def test_a_video_and_an_image_are_answered_together(self, pair: LlavaPair) -> None:
        """The template writes images before videos. transformers has an id of its own for a video's places."""
        clip, frames = self.clip()
        image, config = DecodedImage.from_rgb(np.array(picture(*LARGE))), pair.written.model.config
        layouts = pair.processor.layouts([clip.size, image.size])
        patches = [pair.processor.patches(*medium) for medium in zip((clip, image), layouts, strict=True)]
        prompt = pair.processor.prompt([Message("user", (ImagePart(0), ImagePart(1), QUESTION))], layouts)
        assert prompt.order == (1, 0)
        assert prompt.layouts == (patches[1].layout, patches[0].layout)

        kinds = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": QUESTION}]
        text = pair.written.processor.apply_chat_template(
            [{"role": "user", "content": kinds}], add_generation_prompt=True
        )
        # its processor refuses a video's places without a video, and takes none without torchvision
        before, after = text.split("<video>")
        theirs = pair.written.inputs(before, [picture(*LARGE)])
        places = torch.full((1, layouts[0].rows), config.video_token_id)
        ids = torch.cat((theirs.input_ids, places, pair.written.tokenizer(after, return_tensors="pt").input_ids), 1)
        theirs.update(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert list(prompt.token_ids) == ids.where(ids != config.video_token_id, config.image_token_id)[0].tolist()
        expected = pair.written.model(**theirs, pixel_values_videos=self.pixels(pair, frames)).logits[0]
        assert_parity("logits", logits(pair.model, spliced(pair.model, prompt, patches)), expected)

    def test_what_a_file_says_of_frames(self, tmp_path: Path) -> None:
        write_llava_onevision_checkpoint(tmp_path)
        own = json.loads((tmp_path / "preprocessor_config.json").read_text())
        video = tmp_path / "video_preprocessor_config.json"
        video.write_text(json.dumps(own | {"resample": 2}))
        clip, _ = self.clip()
        (layout,) = load_processor(open_checkpoint(tmp_path)).layouts([clip.size])
        assert {tile.steps[0].resample for tile in layout.tiles} == {"bilinear"}  # type: ignore[union-attr]
        video.write_text(json.dumps(own | {"image_mean": [0.1, 0.1, 0.1]}))
        with pytest.raises(ConfigError, match=r"video_preprocessor_config\.json: size and normalisation of frames"):
            load_processor(open_checkpoint(tmp_path))


class TestBudgets:
    def rows(self, pair: LlavaPair, budget: ImageBudget, image: Image.Image) -> tuple[torch.Tensor, ImageLayout]:
        (patches,) = patches_of(pair.processor, [image], budget)
        return pair.model.vision([patches]).embeds, patches.layout

    def test_low_is_the_base_tile_and_a_newline(self, pair: LlavaPair) -> None:
        """transformers ends an image of one tile with one newline; the tile is the one that anyres puts first."""
        image = picture(*LARGE)
        ours, layout = self.rows(pair, ImageBudget(detail="low"), image)
        assert layout.assembly == Newline(None)
        inputs = their_inputs(pair.written, [image], asked(1))
        base = pair.written.model.get_image_features(
            inputs.pixel_values[:, :1].repeat(2, 1, 1, 1, 1), inputs.image_sizes.repeat(2, 1), batch_num_images=[2]
        ).pooler_output[0]
        assert_parity("low", ours, base)

    def test_other_pinpoints_are_transformers_own_with_them(self, pair: LlavaPair) -> None:
        chosen = ((120, 60), (60, 120))
        ours, layout = self.rows(pair, ImageBudget(grid_pinpoints=chosen), picture(*LARGE))
        assert layout.arrangement == (1, 2)
        assert_parity("pinpoints", ours, self.with_pinpoints(pair, [list(pair) for pair in chosen], picture(*LARGE)))

    def test_max_tiles_leaves_pinpoints_out(self, pair: LlavaPair) -> None:
        ours, layout = self.rows(pair, ImageBudget(max_tiles=2), picture(*LARGE))
        assert len(layout.tiles) <= 3
        fewer = [[60, 60], [60, 120], [120, 60]]
        assert_parity("max_tiles", ours, self.with_pinpoints(pair, fewer, picture(*LARGE)))

    def with_pinpoints(self, pair: LlavaPair, pinpoints: list[list[int]], image: Image.Image) -> torch.Tensor:
        config, images = pair.written.model.config, pair.written.processor.image_processor
        before = config.image_grid_pinpoints, images.image_grid_pinpoints
        config.image_grid_pinpoints = images.image_grid_pinpoints = pinpoints
        try:
            return pair.written.rows(their_inputs(pair.written, [image], asked(1)))[0]
        finally:
            config.image_grid_pinpoints, images.image_grid_pinpoints = before


class TestPrompts:
    """Ids against transformers' template, processor and tokenizer."""

    @pytest.mark.parametrize(
        "parts",
        [
            (ImagePart(0), "Describe it."),
            (ImagePart(0), "\nDescribe it."),
            (ImagePart(0), "\n\nDescribe it.\n"),
            ("Look: ", ImagePart(0), " what is it?"),
            (ImagePart(0), ImagePart(1), "Compare."),
            ("One", ImagePart(0), "two", ImagePart(1), "three"),
            (ImagePart(0),),
            (" \n",),
            ("",),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("template", [None, HUB_TEMPLATE], ids=["default", "hub"])
    def test_one_message(self, tmp_path: Path, template: str | None, parts: tuple[str | ImagePart, ...]) -> None:
        written = write_llava_onevision_checkpoint(tmp_path, chat_template=template)
        processor = load_processor(open_checkpoint(tmp_path))
        count = sum(isinstance(part, ImagePart) for part in parts)
        images = [picture(*size, seed=size[0]) for size in (WIDE, TALL)[:count]]
        prompt = processor.prompt([Message("user", parts)], [one.layout for one in patches_of(processor, images)])
        assert list(prompt.token_ids) == their_inputs(written, images, parts).input_ids[0].tolist()

    @pytest.mark.parametrize("place", ["tokenizer", "chat_template.json", "chat_template.jinja"])
    def test_where_a_template_may_lie(self, tmp_path: Path, place: str) -> None:
        own = (
            "{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}"
            "{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endfor %}"
        )
        written = write_llava_onevision_checkpoint(tmp_path)
        if place == "tokenizer":
            file = tmp_path / "tokenizer_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": own}))
        elif place == "chat_template.json":
            (tmp_path / place).write_text(json.dumps({"chat_template": own}))
        else:
            (tmp_path / place).write_text(own)
        processor = load_processor(open_checkpoint(tmp_path))
        prompt = processor.prompt([Message("user", ("Hello",))], [])
        assert list(prompt.token_ids) == written.tokenizer("[user]Hello").input_ids

    def test_a_conversation_has_no_system_turn_of_its_own(self, pair: LlavaPair) -> None:
        turns = [("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi there"), ("user", "And now?")]
        theirs = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        text = pair.written.processor.apply_chat_template(theirs, add_generation_prompt=True)
        messages = [Message(role, (text,)) for role, text in turns]  # type: ignore[arg-type]
        assert list(pair.processor.prompt(messages, []).token_ids) == pair.written.tokenizer(text).input_ids
        alone = pair.processor.prompt([Message("user", ("Hello",))], [])
        assert pair.written.tokenizer.decode(alone.token_ids).startswith("<|im_start|>user\nHello<|im_end|>\n")

    def test_two_images_stand_side_by_side(self, pair: LlavaPair) -> None:
        patches = patches_of(pair.processor, [picture(*WIDE), picture(*TALL, seed=5)])
        prompt = pair.processor.prompt(
            [Message("user", (ImagePart(1), ImagePart(0), "Compare."))], [one.layout for one in patches]
        )
        assert prompt.order == (1, 0)
        assert prompt.layouts == (patches[1].layout, patches[0].layout)
        (first, second) = prompt.spans
        assert pair.written.tokenizer.decode(prompt.token_ids[first.stop : second.start]) == "\n"

    def test_a_users_text_is_never_a_placeholder(self, pair: LlavaPair) -> None:
        prompt = pair.processor.prompt([Message("user", ("<image> and <video>",))], [])
        assert pair.processor.config.image_token_id not in prompt.token_ids


def test_facts_of_the_whole_model(pair: LlavaPair) -> None:
    tokenizer, config = pair.written.tokenizer, pair.processor.config
    assert config.image_token_id == tokenizer.get_vocab()["<image>"] == pair.written.model.config.image_token_id
    assert pair.processor.eos_token_ids == (tokenizer.eos_token_id,)
    assert pair.processor.context_length == 4096
    assert config.images.video is not None
    assert config.images.video.token == "<video>"


@pytest.mark.parametrize(("root", "text", "tied"), [(True, False, True), (False, True, True), (False, False, False)])
def test_either_section_ties_the_head(tmp_path: Path, root: bool, text: bool, tied: bool) -> None:
    """`LlavaOnevisionConfig` takes the text's word where its own is no."""
    write_llava_onevision_checkpoint(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["tie_word_embeddings"], raw["text_config"]["tie_word_embeddings"] = root, text
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert LlavaOnevisionConfig.from_pretrained(tmp_path).tie_word_embeddings == tied
    assert load_processor(open_checkpoint(tmp_path)).config.language.tie_embeddings == tied


def test_the_newer_key_of_the_image_token_is_read(tmp_path: Path) -> None:
    write_llava_onevision_checkpoint(tmp_path, keys={"image_token_index": None, "image_token_id": 323})
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop("image_token_index", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert load_processor(open_checkpoint(tmp_path)).config.image_token_id == 323


def test_the_stack_alone_is_the_models_stack(pair: LlavaPair) -> None:
    stack, processor = load_vision(open_checkpoint(pair.written.folder), device="cpu", dtype=torch.float32)
    assert isinstance(stack, VisionStack)
    assert isinstance(processor, Processor)
    patches = patches_of(processor, [picture(*WIDE)])
    assert torch.equal(stack(patches).embeds, pair.model.vision(patches).embeds)


@pytest.mark.parametrize("names", ["saved", "memory"])
def test_the_stack_loads_alone_under_every_name(tmp_path: Path, names: Any) -> None:
    written = write_llava_onevision_checkpoint(tmp_path, names=names)
    stack, _ = load_vision(open_checkpoint(tmp_path), device="cpu", dtype=torch.float32)
    assert isinstance(stack, VisionStack)
    assert stack.newline is not None
    assert torch.equal(stack.newline, written.model.model.image_newline)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"vision_feature_select_strategy": "default"}, "strategy 'default' drops the first patch"),
        ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer must be int, got \[-2, -1\]"),
        ({"vision_feature_layer": -4}, "feature layer -4 does not exist in a tower of 3 blocks"),
        ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio 'anyres' is not known"),
        ({"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio 'anyres_max_0' is not known"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act 'relu' is not known"),
        ({"image_grid_pinpoints": [[60, 60]]}, "of config.json and preprocessor_config.json differ"),
        ({"image_grid_pinpoints": [[60]]}, r"image_grid_pinpoints must be a list of \[height, width\]"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints of config.json and"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "model_type 'clip_vision_model' is not known"),
        ({"text_config": None}, "section 'text_config' is missing"),
    ],
)
def test_what_the_model_does_not_know_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write_llava_onevision_checkpoint(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | keys
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=message):
        load_processor(open_checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": {"height": 56, "width": 56}}, "56x56 pixels do not fit the tower, which takes 60x60"),
        ({"do_center_crop": True}, "do_center_crop true is not supported"),
        ({"do_normalize": False}, "do_normalize false is not supported"),
        ({"image_grid_pinpoints": [[90, 60]]}, "image_grid_pinpoints of config.json and"),
    ],
)
def test_a_processor_that_draws_other_tiles_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write_llava_onevision_checkpoint(tmp_path, processor=keys)
    with pytest.raises(ConfigError, match=message):
        load_processor(open_checkpoint(tmp_path))


def test_without_a_processors_file_nothing_is_guessed(tmp_path: Path) -> None:
    write_llava_onevision_checkpoint(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no preprocessor_config\.json, which says how pictures are normalised"):
        load_processor(open_checkpoint(tmp_path))


def test_two_ranks_give_the_answers_of_one(pair: LlavaPair) -> None:
    """Two threads that meet at a barrier stand for the ranks."""
    patches = patches_of(pair.processor, [picture(*LARGE)])
    prompt = pair.processor.prompt([Message("user", asked(1))], [one.layout for one in patches])
    expected = pair.model.vision(patches).embeds, logits(pair.model, spliced(pair.model, prompt, patches))
    meeting, told, answers = threading.Barrier(2), [torch.empty(0)] * 2, [expected] * 2

    def be_a_rank(rank: int) -> None:
        def everybodys(tensor: torch.Tensor) -> list[torch.Tensor]:
            told[rank] = tensor
            meeting.wait(60)
            both = list(told)
            meeting.wait(60)
            return both

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            return torch.stack(everybodys(tensor)).sum(0)

        def all_gather(tensor: torch.Tensor) -> torch.Tensor:
            return torch.cat(everybodys(tensor), -1)

        try:
            with torch.no_grad():
                checkpoint = open_checkpoint(pair.written.folder)
                tp = TensorParallel(rank, 2, all_reduce, all_gather)
                model = load_model(checkpoint, pair.processor.config, device="cpu", dtype=torch.float32, tp=tp)
                assert model.vision.projector.get_parameter("layers.0.weight").shape[0] == 24
                answers[rank] = model.vision(patches).embeds, logits(model, spliced(model, prompt, patches))
        except BaseException:
            meeting.abort()
            raise

    ranks = [threading.Thread(target=be_a_rank, args=(rank,)) for rank in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(60)
    for answer in answers:
        assert answer is not expected
        for ours, alone in zip(answer, expected, strict=True):
            torch.testing.assert_close(ours, alone, atol=1e-5, rtol=0)


class TestCommandLine:
    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        path = tmp_path / "large.png"
        picture(*LARGE).save(path)
        return str(path)

    def asked(self, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
        capsys.readouterr()  # what the parity measures printed
        assert main(list(words)) == 0
        return json.loads(capsys.readouterr().out)

    def test_tokens_encode_look_and_generate_agree(
        self, pair: LlavaPair, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, output = str(pair.written.folder), str(tmp_path / "out.safetensors")
        theirs = their_inputs(pair.written, [picture(*LARGE)], asked(1))
        rows = theirs.input_ids[0].tolist().count(pair.processor.config.image_token_id)
        (counted,) = self.asked(capsys, "tokens", folder, file, "--json")
        assert counted["image_tokens"] == rows
        self.asked(capsys, "encode", folder, file, "-o", output, "--json", "--device", "cpu", "--dtype", "float32")
        found = load_file(output)
        assert_parity("projected", found["projected.0"], pair.written.rows(theirs)[0])
        assert len(found["0"]) == counted["tiles"] * 16
        drawing = str(tmp_path / "view.png")
        assert self.asked(capsys, "look", folder, file, "-o", drawing, "--json")["image_tokens"] == rows
        assert Image.open(drawing).size[0] > 1000
        words = ("--max-tokens", "8", "--ignore-eos", "--device", "cpu", "--dtype", "float32", "--json")
        answer = self.asked(capsys, "generate", folder, "-i", file, "-p", QUESTION, *words)
        assert answer["usage"]["image_tokens"] == rows
        chosen = pair.written.model.generate(
            **theirs, max_new_tokens=8, min_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer["output_token_ids"] == chosen[0, -8:].tolist()
