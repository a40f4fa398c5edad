"""NVILA in every layout against transformers' tower and Qwen with VILA's image path written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Layout, Written, write_nvila_checkpoint
from parity_kit import Pair, ask, assert_parity, build, generated, greedy, logits, patches_of, picture, spliced
from PIL import Image

from siglane.errors import UserError
from siglane.families.model import load_model, load_vision, stored_dtype
from siglane.families.processor import Processor, load_processor
from siglane.families.stack import VisionStack
from siglane.types import ImagePart, ImagePatches, Message, Prompt
from siglane.verify.references.nvila import Nvila
from siglane.weights.hub import open_checkpoint

WIDE, TALL, SQUARE = (130, 70), (50, 170), (60, 60)


NvilaPair = Pair[Written, Nvila]


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> NvilaPair:
    return build(tmp_path_factory.mktemp("lite"), write_nvila_checkpoint, Nvila)


@pytest.fixture(scope="module")
def s2(tmp_path_factory: pytest.TempPathFactory) -> NvilaPair:
    options = {"lite": False, "layout": "hf", "image_size": 70, "qwen3": True, "tied": True}
    return build(tmp_path_factory.mktemp("s2"), write_nvila_checkpoint, Nvila, **options)


@pytest.fixture(params=["lite", "s2"])
def pair(request: pytest.FixtureRequest) -> NvilaPair:
    found: NvilaPair = request.getfixturevalue(request.param)
    return found


def asked(processor: Processor, patches: list[ImagePatches], *parts: str | ImagePart, **arguments: Any) -> Prompt:
    return processor.prompt([Message("user", parts)], [one.layout for one in patches], arguments)


def chat(value: str) -> str:
    system = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
    return f"{system}<|im_start|>user\n{value}<|im_end|>\n<|im_start|>assistant\n"


CASES: list[tuple[Layout, bool, bool, bool, bool, int]] = [  # layout, lite, qwen3, tied, infix, image size
    ("folders", True, False, False, True, 56),
    ("folders", True, True, True, False, 70),
    ("folders", False, False, True, True, 70),
    ("hf", True, True, False, True, 56),
    ("hf", False, False, False, False, 56),
    ("vila", True, False, True, True, 56),
]


@pytest.mark.few("folders-True-True-True-False-70", "hf-False-False-False-False-56", "vila-True-False-True-True-56")
@torch.no_grad()
@pytest.mark.parametrize(("layout", "lite", "qwen3", "tied", "infix", "image_size"), CASES)
def test_features_rows_logits_and_tokens(
    tmp_path: Path, layout: Layout, lite: bool, qwen3: bool, tied: bool, infix: bool, image_size: int
) -> None:
    options: dict[str, Any] = {"layout": layout, "qwen3": qwen3, "tied": tied, "infix": infix, "image_size": image_size}
    pair = build(tmp_path, write_nvila_checkpoint, Nvila, lite=lite, **options)
    for sizes in ([WIDE], [TALL], [WIDE, SQUARE, TALL]):
        images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
        seen = pair.see(images)
        patches = patches_of(pair.processor, images)
        features = torch.cat([one.projector_input for one in pair.model.vision.encode(patches)])
        assert_parity("features", features, seen.taps.get("projector_input", seen.taps["features"]))
        for ours, blocks in zip(pair.model.vision(patches).split(), seen.images, strict=True):
            assert_parity("rows", ours, torch.cat(blocks))

        value = "".join("<image>\n" * len(blocks) if lite and len(images) == 1 else "<image>" for blocks in seen.images)
        prompt = ask(pair.processor, patches, "What is in the image?")
        text = chat(value + "What is in the image?")
        assert text == pair.reference.text("What is in the image?", seen)
        assert list(prompt.token_ids) == pair.their_ids(text, seen)

        ours, theirs = spliced(pair.model, prompt, patches), pair.reference.embeds(text, seen)
        assert_parity("logits", logits(pair.model, ours), pair.reference.language.logits(theirs))
        assert greedy(pair.model, ours, 32) == generated(pair.reference.language.model, theirs, 32)


def test_the_stack_alone_is_the_models_stack(pair: NvilaPair) -> None:
    stack, processor = load_vision(open_checkpoint(pair.written.folder), device="cpu", dtype=torch.float32)
    assert isinstance(stack, VisionStack)
    assert isinstance(processor, Processor)
    patches = patches_of(processor, [picture(*WIDE)])
    assert torch.equal(stack(patches).embeds, pair.model.vision(patches).embeds)
    assert not any(parameter.requires_grad for parameter in stack.parameters())
    assert not stack.training


def test_packing_does_not_change_an_image(pair: NvilaPair) -> None:
    """Alone, beside others and in another order, tiled and not, in one tower call."""
    alone = patches_of(pair.processor, [picture(*WIDE)])
    others = patches_of(pair.processor, [picture(*TALL, seed=1), picture(*SQUARE, seed=2)])
    vision = pair.model.vision
    by_itself = [vision([image]).embeds for image in (*alone, *others)]
    together = vision([*alone, *others]).split()
    turned = vision([*others[::-1], *alone]).split()
    for single, first, second in zip(by_itself, together, turned[::-1], strict=True):
        assert (single - first).abs().max() < 1e-5
        assert (single - second).abs().max() < 1e-5


def test_no_images_is_no_rows(pair: NvilaPair) -> None:
    tokens = pair.model.vision([])
    assert tokens.embeds.shape == (0, 48)
    assert tokens.lengths == ()
    assert pair.model.vision.encode([]) == ()


def test_taps_name_every_stage(s2: NvilaPair) -> None:
    taps: dict[str, torch.Tensor] = {}
    rows = s2.model.vision(patches_of(s2.processor, [picture(*WIDE)]), taps).embeds
    tower = ["patch_embedding", "positions", "block.0", "block.1", "features"]
    assert list(taps) == [*tower, "projector_input", "projected"]
    assert torch.equal(taps["projected"], rows)


def test_float_patches_are_normalised_as_bytes_are(lite: NvilaPair) -> None:
    (patches,) = patches_of(lite.processor, [picture(*WIDE)])
    as_float = ImagePatches(patches.pixels.float(), patches.layout, patches.digest)
    assert torch.equal(lite.model.vision([patches]).embeds, lite.model.vision([as_float]).embeds)


def test_half_precision_keeps_exact_pixels(lite: NvilaPair) -> None:
    checkpoint = open_checkpoint(lite.written.folder)
    assert stored_dtype(checkpoint) == torch.float32
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.bfloat16, "vision_dtype": torch.float16}
    model = load_model(checkpoint, lite.processor.config, **options)
    assert model.language.norm.weight.dtype == torch.bfloat16
    assert model.vision.encoder.dtype == torch.float16
    assert model.vision.encoder.pixel_scale.dtype == torch.float32
    patches = patches_of(lite.processor, [picture(*SQUARE)])
    exact = lite.model.vision.encoder.pack(patches).pixels
    assert torch.equal(model.vision.encoder.pack(patches).pixels, exact.half())


def test_rows_that_do_not_match_the_layout_are_an_error(lite: NvilaPair, s2: NvilaPair) -> None:
    patches = patches_of(lite.processor, [picture(*WIDE)])
    with pytest.raises((RuntimeError, ValueError)):
        s2.model.vision(patches)


class TestPrompts:
    """Ids against the reference's own: one text, special tokens found in it, placeholders filled."""

    def check(self, pair: NvilaPair, images: list[Image.Image], parts: list[str | ImagePart], value: str) -> None:
        prompt = asked(pair.processor, patches_of(pair.processor, images), *parts)
        assert list(prompt.token_ids) == pair.their_ids(chat(value), pair.see(images))

    def test_tiles_are_separated_by_a_line_feed_row_and_a_line_feed_text(self, lite: NvilaPair) -> None:
        image = picture(*WIDE)
        self.check(lite, [image], [ImagePart(0), "Describe it."], "<image>\n" * 3 + "Describe it.")

    def test_text_after_tiles_joins_their_line_feed(self, lite: NvilaPair) -> None:
        """The reference tokenises "\\n" and "\\nDescribe" together; "\\n\\n" is one token."""
        image = picture(*WIDE)
        self.check(lite, [image], [ImagePart(0), "\nDescribe it."], "<image>\n" * 3 + "\nDescribe it.")

    def test_text_after_the_line_feed_row_does_not_join_it(self, s2: NvilaPair) -> None:
        self.check(s2, [picture(*WIDE)], [ImagePart(0), "\n\nDescribe it."], "<image>\n\nDescribe it.")

    def test_text_before_the_image(self, pair: NvilaPair) -> None:
        """Where the image ends the message, its last line feed is stripped with the message (VILA layouts only)."""
        lite = not pair.reference.flags.scales
        value = "Look: " + ("<image>\n" * 3).strip() if lite else "Look: <image>"
        self.check(
            pair,
            [picture(*WIDE)],
            ["Look: ", ImagePart(0), " \n"],
            value + ("" if lite else " \n"),
        )

    def test_message_is_stripped_at_its_ends_only(self, lite: NvilaPair) -> None:
        images = [picture(*WIDE), picture(*TALL)]
        parts: list[str | ImagePart] = ["  ", "\nFirst ", ImagePart(0), " and ", ImagePart(1), " end \n"]
        self.check(lite, images, parts, "First <image> and <image> end")

    def test_adjacent_images(self, pair: NvilaPair) -> None:
        images = [picture(*WIDE), picture(*TALL), picture(*SQUARE)]
        value = "<image><image>Compare.<image>"
        self.check(pair, images, [ImagePart(0), ImagePart(1), "Compare.", ImagePart(2)], value)

    def test_images_out_of_order_are_sorted_by_appearance(self, pair: NvilaPair) -> None:
        images = [picture(*WIDE), picture(*TALL, seed=5)]
        patches = patches_of(pair.processor, images)
        prompt = asked(pair.processor, patches, ImagePart(1), ImagePart(0))
        assert prompt.order == (1, 0)
        assert prompt.layouts == (patches[1].layout, patches[0].layout)
        assert [span.image for span in prompt.spans] == [0, 1]

    def test_own_system_turn_and_history(self, pair: NvilaPair) -> None:
        messages = [
            Message("system", ("Be brief.",)),
            Message("user", ("Hello",)),
            Message("assistant", ("Hi there",)),
            Message("user", ("And now?",)),
        ]
        text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
        text += "Hi there<|im_end|>\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
        assert list(pair.processor.prompt(messages, []).token_ids) == pair.written.encode(text)

    def test_placeholders_and_rows_are_equal_in_number(self, pair: NvilaPair) -> None:
        patches = patches_of(pair.processor, [picture(*WIDE), picture(*TALL)])
        prompt = asked(pair.processor, patches, ImagePart(0), "and", ImagePart(1))
        assert prompt.image_tokens == sum(pair.model.vision(patches).lengths)
        assert prompt.token_ids.count(pair.processor.config.image_token_id) == prompt.image_tokens

    @pytest.mark.parametrize("parts", [(), (ImagePart(0), ImagePart(0)), (ImagePart(1),), (ImagePart(0), ImagePart(1))])
    def test_each_image_is_used_exactly_once(self, lite: NvilaPair, parts: tuple[ImagePart, ...]) -> None:
        patches = patches_of(lite.processor, [picture(*SQUARE)])
        with pytest.raises(UserError, match="use each exactly once") as caught:
            asked(lite.processor, patches, "Hello", *parts)
        assert caught.value.code == "image_count_mismatch"


def test_the_checkpoints_own_template_wins(tmp_path: Path) -> None:
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[{{ mood }}]"
    written = write_nvila_checkpoint(tmp_path, chat_template=template)
    processor = load_processor(open_checkpoint(tmp_path))
    expected = written.encode("[user]Hello[calm]")
    assert list(asked(processor, [], "Hello", mood="calm").token_ids) == expected


def test_a_template_that_takes_parts_gets_parts(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}[see <image>]{% else %}{{ p['text'] }};{% endif %}{% endfor %}{% endfor %}"
    )
    pair = build(tmp_path, write_nvila_checkpoint, Nvila, layout="hf", chat_template=template)
    images = [picture(*SQUARE), picture(*WIDE)]
    prompt = asked(pair.processor, patches_of(pair.processor, images), "One", ImagePart(0), ImagePart(1), "two")
    assert list(prompt.token_ids) == pair.their_ids("One;[see <image>][see <image>]two;", pair.see(images))


def test_only_the_roles_that_take_parts_get_them(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'system' %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}{% endif %}"
        "{% endfor %}"
    )
    written = write_nvila_checkpoint(tmp_path, chat_template=template)
    processor = load_processor(open_checkpoint(tmp_path))
    messages = [Message("system", ("Be", " brief.")), Message("user", ("Hello",)), Message("assistant", ("Hi",))]
    expected = written.encode("system:Be brief.user:Helloassistant:Hi")
    assert list(processor.prompt(messages, []).token_ids) == expected


def test_an_image_token_the_tokenizer_lacks_lies_behind_it(tmp_path: Path) -> None:
    written = write_nvila_checkpoint(tmp_path, media_in_tokenizer=False)
    processor = load_processor(open_checkpoint(tmp_path))
    assert written.tokenizer is not None
    assert processor.config.image_token_id == len(written.tokenizer)
    patches = patches_of(processor, [picture(*SQUARE)])
    prompt = asked(processor, patches, ImagePart(0), "What is <image>?")
    assert prompt.token_ids.count(processor.config.image_token_id) == patches[0].layout.image_tokens


def test_facts_the_processor_states(pair: NvilaPair) -> None:
    tokenizer = pair.written.tokenizer
    assert tokenizer is not None
    assert pair.processor.context_length == 4096
    assert pair.processor.eos_token_ids == (tokenizer.eos_token_id,)
    assert pair.processor.config.image_token_id >= pair.processor.config.language.vocab_size
