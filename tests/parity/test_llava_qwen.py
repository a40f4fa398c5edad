"""LLaVA's original layout against transformers' LLaVA-OneVision under other names, and against the reference that is
put together as LLaVA-NeXT's own code does where the two differ."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llava_onevision_checkpoint import LlavaOnevision
from llava_qwen_checkpoint import write_llava_qwen_checkpoint
from parity_kit import Pair, ask, assert_parity, build, greedy, load, logits, patches_of, picture, spliced
from PIL import Image
from safetensors.torch import load_file, save_file
from test_llava_onevision import check_vision, their_inputs

from siglane.cli.main import main
from siglane.config.preprocess import LOCAL_DECODE
from siglane.errors import ConfigError, WeightError
from siglane.families.processor import load_processor
from siglane.families.registry import image_facts
from siglane.image.video import read_video_size
from siglane.tiling.rule import ImageBudget
from siglane.types import DecodedImage, DecodedVideo, ImagePart, Message, Newline, Size, VideoSize
from siglane.verify.references import llava_qwen
from siglane.weights.hub import Checkpoint, open_checkpoint

QUESTION = "What is in the image?"
WIDE, TALL, LARGE = (130, 70), (50, 171), (333, 291)
OTHERWISE_CUT = (376, 94)  # transformers rounds its length on the map before it cuts, LLaVA does not
QwenPair = Pair[LlavaOnevision, llava_qwen.LlavaQwen]


def built(folder: Path, **options: Any) -> QwenPair:
    return build(folder, write_llava_qwen_checkpoint, llava_qwen.LlavaQwen, **options)


@pytest.fixture(scope="module", params=["inside", "beside"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QwenPair:
    return built(tmp_path_factory.mktemp("llava"), tower=request.param, tied=request.param == "inside")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def change_config(folder: Path, **keys: Any) -> None:
    """None takes a key out."""
    raw = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


@pytest.mark.few("inside-*", "beside-[(130, 70)]")
@pytest.mark.parametrize("sizes", [[], [WIDE], [LARGE], [(1, 1)], [(17, 400)], [WIDE, TALL]], ids=str)
def test_the_whole_path(pair: QwenPair, sizes: list[tuple[int, int]]) -> None:
    """Rows, logits and greedy tokens are those of transformers' model; the prompt has a system turn."""
    images = [picture(*size, seed=seed) for seed, size in enumerate(sizes)]
    patches = patches_of(pair.processor, images)
    seen = pair.see(images)
    prompt = ask(pair.processor, patches, QUESTION)
    assert list(prompt.token_ids) == pair.their_ids(pair.reference.text(QUESTION, seen), seen)
    embeds = spliced(pair.model, prompt, patches)
    theirs: dict[str, Any] = {}
    if images:
        inputs = their_inputs(pair.written, images, tuple(map(ImagePart, range(len(images)))))
        check_vision(pair, patches, inputs)
        theirs = {key: inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
    ids = torch.tensor([prompt.token_ids])
    places = ids == pair.processor.config.image_token_id
    theirs["input_ids"] = ids.masked_fill(places, pair.written.model.config.image_token_id)
    assert_parity("logits", logits(pair.model, embeds), pair.written.model(**theirs).logits[0])
    chosen = pair.written.model.generate(
        **theirs, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert greedy(pair.model, embeds, 32) == chosen[0, ids.shape[1] :].tolist()


def rows(pair: QwenPair, images: Sequence[Image.Image]) -> torch.Tensor:
    return pair.model.vision(patches_of(pair.processor, images)).embeds


def check_rows(pair: QwenPair, images: Sequence[Image.Image]) -> torch.Tensor:
    """Those of the reference that follows LLaVA's own code."""
    theirs = torch.cat(pair.see(images).blocks)
    assert_parity("rows", rows(pair, images), theirs)
    return theirs


def test_a_length_on_the_map_is_cut_and_not_rounded(pair: QwenPair) -> None:
    image = [picture(*OTHERWISE_CUT)]
    ours = check_rows(pair, image)
    theirs = pair.written.rows(their_inputs(pair.written, image, (ImagePart(0),)))[0]
    assert ours.shape != theirs.shape


@pytest.mark.parametrize(
    "keys",
    [
        {"image_aspect_ratio": "anyres"},
        {"image_aspect_ratio": "anyres_max_1"},
        {"image_aspect_ratio": "pad"},
        {"image_grid_pinpoints": "(1x1),...,(2x3)"},
        {"image_grid_pinpoints": "[(60, 120), (120, 60)]"},
        {"image_grid_pinpoints": [[60, 180]]},
    ],
    ids=str,
)
def test_facts_that_change_the_rows_are_read(tmp_path: Path, keys: dict[str, Any]) -> None:
    one = built(tmp_path, keys=keys)
    for images in ([picture(*LARGE)], [picture(*TALL)], [picture(*WIDE), picture(*LARGE)]):
        check_rows(one, images)


@pytest.mark.few(
    "60-one_token-bilinear", "60-grid-average", "60-frame-max", "70-no_token-bilinear", "70-grid-max",
    "70-one_token-average",
)  # fmt: skip
@pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
@pytest.mark.parametrize("newlines", ["one_token", "grid", "frame", "no_token"])
@pytest.mark.parametrize("image_size", [60, 70])  # maps of 4 and 5 rows
def test_a_video(tmp_path: Path, mode: str, newlines: str, image_size: int) -> None:
    one = built(tmp_path, image_size=image_size, keys={"mm_spatial_pool_mode": mode, "mm_newline_position": newlines})
    frames = [picture(*WIDE, seed=seed) for seed in range(3)]
    clip = DecodedVideo.of([DecodedImage.from_rgb(np.array(frame)) for frame in frames])
    (layout,) = one.processor.layouts([clip.size])
    theirs = torch.cat(one.see([frames]).blocks)
    assert_parity("video", one.model.vision([one.processor.patches(clip, layout)]).embeds, theirs)
    assert layout.image_tokens == len(theirs)


def test_a_video_beside_a_picture(pair: QwenPair) -> None:
    """The picture is alone among the pictures."""
    frames, image = [picture(*WIDE, seed=seed) for seed in range(2)], picture(*LARGE)
    clip = DecodedVideo.of([DecodedImage.from_rgb(np.array(frame)) for frame in frames])
    decoded = DecodedImage.from_rgb(np.array(image))
    layouts = pair.processor.layouts([decoded.size, clip.size])
    patches = [pair.processor.patches(*medium) for medium in zip((decoded, clip), layouts, strict=True)]
    assert_parity("both", pair.model.vision(patches).embeds, torch.cat(pair.see([image, frames]).blocks))


@pytest.mark.parametrize("told", [True, False])
def test_the_times_of_frames_are_told_as_in_training(tmp_path: Path, told: bool) -> None:
    written = write_llava_qwen_checkpoint(tmp_path, keys={"add_time_instruction": told})
    processor, film = load_processor(open_checkpoint(tmp_path)), BytesIO()
    first, *others = (picture(40, 30, seed=seed) for seed in range(20))
    first.save(film, "GIF", save_all=True, append_images=others, duration=100)
    assert processor.facts.video is not None
    size = read_video_size(film.getvalue(), processor.facts.video, 4, LOCAL_DECODE)
    prompt = processor.prompt([Message("user", (ImagePart(0), QUESTION))], processor.layouts([size]))
    sentence = (
        "\nThe video lasts for 2.00 seconds, and 4 frames are uniformly sampled from it. These frames are located at "
        "0.00s,0.60s,1.20s,1.90s.Please answer the following questions related to this video."
    )
    behind = written.tokenizer.decode(prompt.token_ids[prompt.spans[-1].stop :])
    assert behind == f"{sentence * told}\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    unknown = processor.layouts([VideoSize(Size(40, 30), 4)])
    assert len(unknown[0].pieces) == 1  # frames that a caller gives one by one have no times


class TestTheTower:
    def test_the_last_stored_block_is_read(self, tmp_path: Path) -> None:
        """`mm_vision_select_layer` -2 means nothing for SigLIP."""
        write_llava_qwen_checkpoint(tmp_path)
        model, processor = load(tmp_path)
        before = model.vision(patches_of(processor, [picture(*WIDE)])).embeds
        file, tensors = tmp_path / "model.safetensors", load_file(tmp_path / "model.safetensors")
        name = "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc2.weight"
        save_file(tensors | {name: tensors[name] * 9}, file, metadata={"format": "pt"})
        changed, _ = load(tmp_path)
        assert (changed.vision(patches_of(processor, [picture(*WIDE)])).embeds - before).abs().max() > 0.1

    def test_a_stored_tower_is_never_replaced(self, tmp_path: Path) -> None:
        """By the public one, though nothing but its tensors says that it was trained."""
        write_llava_qwen_checkpoint(tmp_path)
        expected = rows_of(tmp_path)
        change_config(tmp_path, mm_tunable_parts="mm_mlp_adapter", unfreeze_mm_vision_tower=None)
        assert torch.equal(rows_of(tmp_path), expected)

    def test_a_tower_that_cannot_be_had(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        write_llava_qwen_checkpoint(tmp_path, tower="beside")
        named, pinpoints = "nobody/siglip-so400m-patch14-384", "(1x1),...,(2x2)"
        change_config(tmp_path, mm_vision_tower=named, mm_hidden_size=None, image_grid_pinpoints=pinpoints)
        assert image_facts(Checkpoint(tmp_path)).vision.depth == 26  # counting needs no weights
        with pytest.raises(ConfigError, match="needs the tower that its mm_vision_tower names, which cannot be had"):
            load(tmp_path)
        change_config(tmp_path, mm_vision_tower="nobody/other-siglip")
        with pytest.raises(ConfigError, match="write its path into mm_vision_tower"):
            image_facts(Checkpoint(tmp_path))

    def test_a_folder_of_codes_has_it_inside(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_llava_qwen_checkpoint(tmp_path / "model", tower="beside")
        words = ["quantize", str(tmp_path / "model"), "-o", str(tmp_path / "small"), "--quantization", "8bit"]
        assert main(words) == 0, capsys.readouterr().err
        assert [file.name for file in (tmp_path / "small").rglob("*.safetensors")] == ["model.safetensors"]
        shutil.rmtree(tmp_path / "model")
        model, processor = load(tmp_path / "small")
        assert model.vision(patches_of(processor, [picture(*WIDE)])).embeds.isfinite().all()

    def test_a_tower_that_is_said_to_be_inside(self, tmp_path: Path) -> None:
        write_llava_qwen_checkpoint(tmp_path, tower="beside")
        change_config(tmp_path, mm_tunable_parts="mm_vision_tower,mm_mlp_adapter")
        with pytest.raises(WeightError, match=r"missing: vision\.encoder\.tower"):
            load(tmp_path)

    @pytest.mark.parametrize("named", ["google/siglip-so400m-patch14-384", "google/siglip2-so400m-patch14-384"])
    def test_the_constants_of_a_released_tower(self, tmp_path: Path, named: str) -> None:
        write_llava_qwen_checkpoint(tmp_path)
        pinpoints = "(1x1),...,(6x6)"
        change_config(tmp_path, mm_vision_tower=named, mm_hidden_size=1152, image_grid_pinpoints=pinpoints)
        vision = image_facts(Checkpoint(tmp_path)).vision
        assert (vision.hidden_size, vision.num_attention_heads, vision.depth, vision.position_grid.w) == (
            1152,
            16,
            26,
            27,
        )


def rows_of(folder: Path) -> torch.Tensor:
    model, processor = load(folder)
    found: torch.Tensor = model.vision(patches_of(processor, [picture(*WIDE)])).embeds
    return found


def test_low_detail_and_what_a_padded_model_has_no_use_for(tmp_path: Path) -> None:
    write_llava_qwen_checkpoint(tmp_path)
    facts = image_facts(Checkpoint(tmp_path))
    (low,) = facts.layouts([Size(*LARGE)], [ImageBudget(detail="low")])
    assert (len(low.tiles), low.assembly) == (1, Newline(None))
    change_config(tmp_path, image_aspect_ratio="pad")
    padded = image_facts(Checkpoint(tmp_path))
    assert padded.layouts([Size(*LARGE)], [ImageBudget(detail="high")]) == padded.layouts([Size(*LARGE)])
    with pytest.raises(Exception, match="max_tiles does not apply to this model"):
        padded.layouts([Size(*LARGE)], [ImageBudget(max_tiles=2)])


def test_the_prompt_is_the_codes_and_not_the_tokenizers(tmp_path: Path) -> None:
    written = write_llava_qwen_checkpoint(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "{{ 'wrong' }}"}))
    processor = load_processor(open_checkpoint(tmp_path))
    turns = [Message("system", ("Short.",)), Message("user", ("Hi",)), Message("assistant", ("Yes",))]
    assert written.tokenizer.decode(processor.prompt([*turns, turns[1]], []).token_ids) == (
        "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_facts_of_the_whole_model(tmp_path: Path) -> None:
    write_llava_qwen_checkpoint(tmp_path, keys={"tokenizer_model_max_length": 2048})
    processor = load_processor(open_checkpoint(tmp_path))
    assert processor.context_length == 2048
    assert processor.config.image_token_id >= processor.config.language.vocab_size
    change_config(tmp_path, mm_spatial_pool_mode=None)
    assert load_processor(open_checkpoint(tmp_path)).facts.video is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mm_vision_tower": None}, "key 'mm_vision_tower' is missing"),
        ({"mm_projector_type": "linear"}, "mm_projector_type 'linear' is not known"),
        ({"mm_patch_merge_type": None}, "mm_patch_merge_type 'flat' is not known; siglane knows spatial_unpad"),
        ({"image_aspect_ratio": "highres"}, "'highres' is not known; siglane knows anyres_max_<N>, anyres and pad"),
        ({"image_aspect_ratio": None}, "key 'image_aspect_ratio' is missing"),
        ({"mm_newline_position": "two"}, "mm_newline_position 'two' is not known"),
        ({"mm_spatial_pool_mode": "median"}, "mm_spatial_pool_mode 'median' is not known"),
        ({"add_faster_video": True}, "add_faster_video true is not supported"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end true is not supported"),
        ({"mm_hidden_size": 33}, "mm_hidden_size 33 is not the tower's 32"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints must be pairs .* got None"),
        ({"image_grid_pinpoints": "(1x1),...,(9999x9999)"}, "image_grid_pinpoints must be pairs"),
        ({"image_grid_pinpoints": "[[60, 60], os.remove]"}, "image_grid_pinpoints must be pairs"),
        ({"image_grid_pinpoints": [[60.5, 60]]}, "image_grid_pinpoints must be pairs"),
        ({"image_grid_pinpoints": [[61, 60]]}, "60x61 is not a multiple of the tile's 60 pixels"),
        ({"image_grid_pinpoints": []}, "image_grid_pinpoints: give at least one"),
        ({"image_grid_pinpoints": "(3x3),(1x1)"}, "image_grid_pinpoints: give at least one"),
        ({"use_sliding_window": True}, "use_sliding_window true is not supported"),
    ],
)
def test_what_the_model_does_not_know_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write_llava_qwen_checkpoint(tmp_path, keys=keys)
    with pytest.raises(ConfigError, match=message):
        load_processor(open_checkpoint(tmp_path))


def test_ten_thousand_sizes_are_counted_as_the_code_counts_them(tmp_path: Path) -> None:
    """Half of them with the shapes of the released model."""
    write_llava_qwen_checkpoint(tmp_path)
    numbers = np.random.default_rng(0).integers(1, 5000, (10_000, 2)).tolist()
    released = {"mm_vision_tower": "siglip-so400m-patch14-384", "mm_hidden_size": 1152}
    for keys, sizes in (({}, numbers[::2]), ({**released, "image_grid_pinpoints": "(1x1),...,(6x6)"}, numbers[1::2])):
        change_config(tmp_path, **keys)
        raw, facts = json.loads((tmp_path / "config.json").read_text()), image_facts(Checkpoint(tmp_path))
        grid = facts.vision.position_grid.h
        for width, height in sizes:
            (layout,) = facts.layouts([Size(width, height)])
            side = layout.tiles[0].canvas.width
            kept = llava_qwen.map_of((width, height), raw, side, grid)[2]
            lines, columns = kept[2:] or kept
            assert layout.image_tokens == grid * grid + lines * (columns + 1), (width, height)
