"""nanoVLM of every release against its reference: transformers' tower and Llama around an image path of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Written
from nanovlm_checkpoint import CHATML, ERAS, Era, write_nanovlm_checkpoint
from parity_kit import Pair, assert_parity, build, generated, greedy, logits, patches_of, picture, spliced
from parity_kit import ask as asked
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from siglane import LLM, SamplingParams
from siglane.cli.main import main
from siglane.errors import ConfigError, UserError, WeightError
from siglane.families.model import load_model, load_vision
from siglane.families.processor import load_processor
from siglane.families.registry import image_facts, vlm_family
from siglane.lm.llama import InputRMSNorm, LlamaModel
from siglane.nn.parallel import TensorParallel
from siglane.tiling.nanovlm import WholeTiles
from siglane.tiling.rule import ImageBudget
from siglane.tiling.squash import Squash
from siglane.types import ImagePart, ImagePatches, ImageSpan, Message, Prompt, Size, VideoSize
from siglane.verify.references.nanovlm import NanoVlm
from siglane.weights.hub import open_checkpoint

WIDE, TALL, SQUARE, SMALL = (130, 70), (40, 95), (60, 60), (20, 13)
AWKWARD = [(1, 1), (17, 4000), (4000, 17), (33, 32), (61, 1), (95, 97)]
QUESTION = "What is in the image?"


NanoPair = Pair[Written, NanoVlm]


def built(folder: Path, **options: Any) -> NanoPair:
    return build(folder, write_nanovlm_checkpoint, NanoVlm, **options)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[Era, NanoPair]:
    return {era: built(tmp_path_factory.mktemp(f"nano{era}"), era=era) for era in ERAS}


@pytest.fixture(params=ERAS)
def pair(request: pytest.FixtureRequest, pairs: dict[Era, NanoPair]) -> NanoPair:
    return pairs[request.param]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def ask(pair: NanoPair, patches: list[ImagePatches], question: str = QUESTION) -> Prompt:
    return asked(pair.processor, patches, question)


def check_whole_path(pair: NanoPair, images: list[Image.Image], steps: int = 32) -> None:
    """Pixels, every block of tower and language model, projected rows, ids, logits and greedy tokens."""
    reference, model = pair.reference, pair.model
    seen = pair.see(images)
    patches = patches_of(pair.processor, images)
    taps: dict[str, torch.Tensor] = {"preprocessing": model.vision.encoder.pack(patches).pixels}
    model.vision(patches, taps)
    taps["projector"] = taps.pop("projected")
    for stage, expected in seen.taps.items():
        assert_parity(stage, taps[stage], expected)

    text = reference.text(QUESTION, seen)
    prompt = ask(pair, patches)
    assert list(prompt.token_ids) == pair.their_ids(text, seen)
    assert prompt.image_tokens == len(seen.taps["projector"])
    ours, theirs = spliced(model, prompt, patches), reference.embeds(text, seen)
    assert_parity("spliced", ours, theirs)
    assert_parity("logits", logits(model, ours, taps), reference.language.logits(theirs))
    answer = reference.language.run(theirs, 0)
    for block in ("lm.block.0", "lm.block.1"):
        assert_parity(block, taps[block], answer[block])
    if steps:
        chosen = generated(reference.language.model, theirs, steps)
        print(f"{len(set(chosen))} different tokens of {steps}")
        assert greedy(model, ours, steps) == chosen


@pytest.mark.parametrize("sizes", [[WIDE], [SMALL], [TALL, SMALL, WIDE]], ids=str)
def test_the_whole_path(pair: NanoPair, sizes: list[tuple[int, int]]) -> None:
    check_whole_path(pair, [picture(*size, seed=seed) for seed, size in enumerate(sizes)])


@pytest.mark.few("current-*", "0.1-(1, 1)", "0.2-(17, 4000)", "grid-(33, 32)")
@pytest.mark.parametrize("size", AWKWARD, ids=str)
def test_awkward_pictures(pair: NanoPair, size: tuple[int, int]) -> None:
    check_whole_path(pair, [picture(*size)], steps=0)


@pytest.mark.few("{'factor'*", "{'names': 'untied*", "{'own_tokenizer*")
@pytest.mark.parametrize("options", [
    {"enlarge": True},
    {"factor": 4, "tiles": 2},
    {"names": "untied"},
    {"names": "both"},
    {"names": "embedding"},
    {"own_tokenizer": False},
], ids=str)  # fmt: skip
def test_variants_of_the_newest_release(tmp_path: Path, options: dict[str, Any]) -> None:
    check_whole_path(built(tmp_path, era="current", **options), [picture(*TALL), picture(*SQUARE, seed=1)], steps=8)


def test_the_configuration_of_49_rows(tmp_path: Path) -> None:
    """224 pixels, patches of 16, factor 2, tokens for tiles and none for the whole: one tile, announced by r1c1."""
    flags = {"lm_chat_template": CHATML, "max_img_size": 224}
    pair = built(tmp_path, era="grid", image_size=224, patch_size=16, tiles=1, flags=flags)
    check_whole_path(pair, [picture(100, 60)], steps=8)
    for size in (Size(224, 224), Size(100, 100), Size(1, 1), Size(3000, 20), Size(640, 480)):
        (layout,) = pair.processor.layouts([size])
        assert (layout.image_tokens, len(layout.tiles), layout.grids) == (49, 1, ((14, 14),))
    prompt = ask(pair, patches_of(pair.processor, [picture(640, 480)]))
    vocabulary = pair.written.tokenizer.get_vocab()
    (span,) = prompt.spans
    assert prompt.token_ids[span.start - 1] == vocabulary["<row_1_col_1>"]
    assert span.stop - span.start == 49


def test_release_0_1_prepends_its_rows(pairs: dict[Era, NanoPair]) -> None:
    pair = pairs["0.1"]
    patches = patches_of(pair.processor, [picture(*WIDE), picture(*TALL)])
    message = Message("user", ("Look here.", ImagePart(0), "And?", ImagePart(1)))
    prompt = pair.processor.prompt([message], [one.layout for one in patches])
    assert prompt.spans == (ImageSpan(0, 4, 0), ImageSpan(4, 8, 1))
    assert list(prompt.token_ids[8:]) == pair.written.encode("Question: Look here.And? Answer:")
    assert pair.processor.config.image_token_id >= pair.processor.config.language.vocab_size


def test_release_0_2_with_a_template_uses_it(tmp_path: Path) -> None:
    """Where config.json states `lm_chat_template`, that is the checkpoint's word."""
    pair = built(tmp_path, era="0.2", flags={"lm_chat_template": CHATML})
    prompt = ask(pair, patches_of(pair.processor, [picture(*WIDE)]))
    text = f"<|im_start|>user\n{'<|image|>' * 4}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert list(prompt.token_ids) == pair.written.encode(text)


@pytest.mark.parametrize("era", ["grid", "current"])
def test_images_stand_in_front_and_are_numbered(pairs: dict[Era, NanoPair], era: Era) -> None:
    pair = pairs[era]
    images = [picture(*SMALL), picture(*WIDE)]
    patches = patches_of(pair.processor, images)
    message = Message("user", ("Compare ", ImagePart(0), "and", ImagePart(1), "!"))
    prompt = pair.processor.prompt([message], [one.layout for one in patches])
    text = pair.reference.text("Compare and!", pair.see(images))
    assert "<image: 0>" in text
    assert "<image: 1>" in text
    assert list(prompt.token_ids) == pair.written.encode(text)


def test_conversations(pairs: dict[Era, NanoPair]) -> None:
    history = [Message("user", ("Hello",)), Message("assistant", ("Hi",)), Message("user", ("And now?",))]
    for era, expected in {
        "0.1": "Question: Hello Answer: Hi\nQuestion: And now? Answer:",
        "0.2": "Question: Hello Answer: Hi\nQuestion: And now? Answer:",
        "grid": "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
        "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n",
    }.items():
        pair = pairs[era]  # type: ignore[index]
        assert list(pair.processor.prompt(history, []).token_ids) == pair.written.encode(expected)


def test_text_never_becomes_a_token(pair: NanoPair) -> None:
    prompt = ask(pair, patches_of(pair.processor, [picture(*SMALL)]), "Is <row_1_col_1> or <|image|> there?<|im_end|>")
    added = set(pair.written.tokenizer.added_tokens_decoder)
    expected = ask(pair, patches_of(pair.processor, [picture(*SMALL)]))
    image_id = pair.processor.config.image_token_id
    known = [token for token in expected.token_ids if token in added | {image_id}]
    assert [token for token in prompt.token_ids if token in added | {image_id}] == known


def test_packing_does_not_change_an_image(pair: NanoPair) -> None:
    patches = patches_of(pair.processor, [picture(*WIDE), picture(*TALL, seed=1), picture(*SMALL, seed=2)])
    alone = [pair.model.vision([image]).embeds for image in patches]
    together = pair.model.vision(patches).split()
    turned = pair.model.vision(patches[::-1]).split()[::-1]
    for single, first, second in zip(alone, together, turned, strict=True):
        assert (single - first).abs().max() < 1e-5
        assert (single - second).abs().max() < 1e-5


def test_pixels_are_only_brought_to_0_and_1(pairs: dict[Era, NanoPair]) -> None:
    black_and_white = np.zeros((32, 32, 3), np.uint8)
    black_and_white[16:] = 255
    patches = patches_of(pairs["current"].processor, [Image.fromarray(black_and_white)])
    assert pairs["current"].model.vision.encoder.pack(patches).pixels.unique().tolist() == [0.0, 1.0]


def test_post_norm_counts(pairs: dict[Era, NanoPair]) -> None:
    vision = pairs["current"].model.vision
    taps: dict[str, torch.Tensor] = {}
    vision(patches_of(pairs["current"].processor, [picture(*SMALL)]), taps)
    assert not torch.equal(taps["features"], taps["block.1"])


class NaiveNorm(nn.Module):
    """nanoVLM's RMSNorm from formats.md 7.4: nothing leaves the dtype of x."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return x * (1e-5 + mean_square).rsqrt() * self.weight


def test_half_precision_norms_stay_in_half_precision(tmp_path: Path) -> None:
    """bfloat16: the decoder with native norms gives the very numbers, with float32 norms it does not."""
    write_nanovlm_checkpoint(tmp_path, seed=3)
    checkpoint = open_checkpoint(tmp_path)
    config = load_processor(checkpoint).config
    model = load_model(checkpoint, config, device="cpu", dtype=torch.bfloat16)
    assert isinstance(model.language, LlamaModel)
    embeds = torch.randn(37, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = logits(model, embeds)
    theirs = NanoVlm(tmp_path, torch.device("cpu"), torch.bfloat16).language.model
    in_float32 = theirs(inputs_embeds=embeds[None]).logits[0]
    for layer in theirs.model.layers:
        layer.input_layernorm = NaiveNorm(layer.input_layernorm.weight)
        layer.post_attention_layernorm = NaiveNorm(layer.post_attention_layernorm.weight)
    theirs.model.norm = NaiveNorm(theirs.model.norm.weight)
    native = theirs(inputs_embeds=embeds[None]).logits[0]
    error, other = ((ours.float() - x.float()).square().mean().sqrt().item() for x in (native, in_float32))
    print(f"bfloat16 logits: rms {error:.1e} from native norms, {other:.1e} from float32 norms")
    assert error <= 0.2 * other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_alone(dtype: torch.dtype) -> None:
    """Near-constant rows of little variance show the eps."""
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(9, 48, generator=generator) * 10.0 ** torch.arange(-4, 5)[:, None]).clamp(-200, 200).to(dtype)
    norm = InputRMSNorm(48, 1e-5).to(dtype)
    norm.weight.copy_(torch.randn(48, generator=generator))
    expected = NaiveNorm(norm.weight)(x)
    if dtype == torch.float32:
        assert (norm(x) - expected).abs().max() < 1e-6
    else:
        assert torch.equal(norm(x), expected)


class TestFacts:
    def test_what_every_release_has_in_common(self, pair: NanoPair) -> None:
        config = pair.processor.config
        assert vlm_family(open_checkpoint(pair.written.folder)).name == config.family == "nanovlm"
        vision, language = config.images.vision, config.language
        assert (vision.layer_norm_eps, vision.post_norm, vision.use_head, vision.depth) == (1e-6, True, False, 2)
        assert (language.rms_norm_eps, language.rope_theta, language.norm_dtype) == (1e-5, 100000.0, "input")
        assert not any((language.qkv_bias, language.output_bias, language.qk_norm))
        assert language.tie_embeddings
        assert pair.processor.context_length == 8192
        assert pair.processor.eos_token_ids == (pair.written.tokenizer.get_vocab()["<|im_end|>"],)
        assert image_facts(open_checkpoint(pair.written.folder)).preprocess == config.images.preprocess

    def test_the_rule_of_each_release(self, pairs: dict[Era, NanoPair]) -> None:
        rules = {era: pair.processor.facts.preprocess.rule for era, pair in pairs.items()}
        assert rules["0.1"] == rules["0.2"] == Squash(tile=Size(32, 32), resample="bilinear")
        tokens = tuple(tuple(f"<row_{r}_col_{c}>" for c in range(1, 5)) for r in range(1, 5))
        grid = WholeTiles(side=32, longest=3, enlarge=False, global_token="", tile_tokens=tokens)
        assert rules["grid"] == grid
        assert rules["current"] == WholeTiles(
            side=32, longest=3, enlarge=False, global_token="<|global_image|>", tile_tokens=tokens
        )

    def test_keys_that_are_constants_may_be_absent(self, tmp_path: Path) -> None:
        absent = ("vit_ln_eps", "vit_cls_flag", "lm_rms_eps", "lm_re_base", "lm_max_position_embeddings",
                  "lm_attn_scaling", "lm_tie_weights", "lm_use_tokens", "resize_to_max_side_len",
                  "mp_image_token_length", "lm_vocab_size")  # fmt: skip
        configs = []
        for name, flags in (("whole", {}), ("sparse", dict.fromkeys(absent))):
            write_nanovlm_checkpoint(tmp_path / name, flags=flags)
            configs.append(load_processor(open_checkpoint(tmp_path / name)).config)
        assert configs[0] == configs[1]

    def test_an_absent_max_img_size_is_one_tile(self, tmp_path: Path) -> None:
        pair = built(tmp_path, era="grid", flags={"max_img_size": None})
        (layout,) = pair.processor.layouts([Size(640, 480)])
        assert layout.image_tokens == 4

    def test_tiles_without_tokens_of_their_own(self, tmp_path: Path) -> None:
        """A version between two releases: the image token only, and tiles one after another."""
        pair = built(tmp_path, era="0.2", flags={"max_img_size": 96})
        prompt = ask(pair, patches_of(pair.processor, [picture(96, 64)]))
        (span,) = prompt.spans
        assert span.stop - span.start == 6 * 4

    @pytest.mark.parametrize(("flags", "message"), [
        ({"vit_cls_flag": True}, "vit_cls_flag"),
        ({"lm_use_tokens": True}, "lm_use_tokens"),
        ({"lm_attn_scaling": 2.0}, "lm_attn_scaling"),
        ({"mp_pixel_shuffle_factor": 3}, "mp_pixel_shuffle_factor 3 does not divide 4x4"),
        ({"mp_image_token_length": 49}, "mp_image_token_length 49 is not the 4 rows"),
        ({"max_img_size": 100}, "max_img_size 100 is not a multiple"),
        ({"max_img_size": 32 * 5}, "vlm_extra_tokens has 4x4 of them"),
        ({"max_img_size": 32 * 50}, "50x50 tiles"),
        ({"lm_vocab_size": 330}, "is token 3.. of the tokenizer, lm_vocab_size is 330"),
        ({"lm_n_heads": 7}, "does not divide by 7 heads"),
        ({"lm_inter_dim": None}, "key 'lm_inter_dim' is missing"),
        ({"vit_patch_size": 64}, "vit_img_size 32 is smaller than vit_patch_size 64"),
        ({"vlm_extra_tokens": {"r1c1": "<row_1_col_1>"}}, "must name an image_token"),
        ({"vlm_extra_tokens": {"image_token": 3}}, "image_token must be str"),
        ({"lm_vocab_size": "many"}, "lm_vocab_size must be int"),
    ])  # fmt: skip
    def test_what_is_refused(self, tmp_path: Path, flags: dict[str, Any], message: str) -> None:
        write_nanovlm_checkpoint(tmp_path, flags=flags)
        with pytest.raises(ConfigError, match=message):
            load_processor(open_checkpoint(tmp_path))

    def test_another_familys_config_is_not_nanovlm(self, tmp_path: Path) -> None:
        write_nanovlm_checkpoint(tmp_path, flags={"model_type": "mamba"})
        with pytest.raises(ConfigError, match="nanoVLM"):
            vlm_family(open_checkpoint(tmp_path))

    def test_a_tokenizer_that_cannot_be_had(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        write_nanovlm_checkpoint(tmp_path, own_tokenizer=False, flags={"lm_tokenizer": "nobody/has-this-tokenizer"})
        with pytest.raises(ConfigError, match=r"lm_tokenizer names cannot be had.*nobody/has-this-tokenizer"):
            load_processor(open_checkpoint(tmp_path))
        assert image_facts(open_checkpoint(tmp_path)).layouts([Size(64, 64)])

    @pytest.mark.parametrize(("era", "expected"), [
        ("0.1", "HuggingFaceTB/cosmo2-tokenizer"), ("current", "HuggingFaceTB/SmolLM2-360M-Instruct"),
    ])  # fmt: skip
    def test_only_the_tokenizer_is_downloaded(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, era: Era, expected: str
    ) -> None:
        """What `lm_tokenizer` names is a language model's repository, with its weights."""
        reference = write_nanovlm_checkpoint(tmp_path, era=era, own_tokenizer=False, flags={"lm_tokenizer": None})
        asked: list[tuple[str, list[str]]] = []

        def download(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
            asked.append((repository, allow_patterns))
            return str(tmp_path / "tokenizer")

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        processor = load_processor(open_checkpoint(tmp_path))
        assert processor.tokenizer.get_vocab() == reference.tokenizer.get_vocab()
        ((repository, patterns),) = asked
        assert repository == expected
        wanted = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"}
        files = {*wanted, "model.safetensors", "config.json", "generation_config.json", "README.md"}
        assert {name for name in files if any(fnmatch(name, pattern) for pattern in patterns)} == wanted

    def test_ids_of_extra_tokens_follow_the_dictionary(self, pairs: dict[Era, NanoPair]) -> None:
        ours, theirs = pairs["current"].processor.tokenizer, pairs["current"].written.tokenizer
        assert ours.get_vocab() == theirs.get_vocab()
        base = pairs["current"].reference.raw["lm_base_vocab_size"]
        first = [ours.convert_ids_to_tokens(base + number) for number in range(4)]
        assert first == ["<|image|>", "<|global_image|>", "<row_1_col_1>", "<row_1_col_2>"]

    def test_tokens_the_tokenizer_already_has_are_not_added_twice(self, tmp_path: Path) -> None:
        reference = write_nanovlm_checkpoint(tmp_path)
        reference.tokenizer.save_pretrained(str(tmp_path))
        processor = load_processor(open_checkpoint(tmp_path))
        assert processor.tokenizer.get_vocab() == reference.tokenizer.get_vocab()


class TestWeights:
    def test_two_names_that_disagree(self, tmp_path: Path) -> None:
        write_nanovlm_checkpoint(tmp_path, names="both")
        state = load_file(tmp_path / "model.safetensors")
        state["decoder.token_embedding.weight"][3, 4] += 1
        self.save(tmp_path, state)
        with pytest.raises(WeightError, match=r"differs from decoder\.head\.weight, to which it is tied"):
            self.load(tmp_path)

    def test_a_missing_and_an_unknown_tensor(self, tmp_path: Path) -> None:
        write_nanovlm_checkpoint(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        head = state.pop("decoder.head.weight")
        self.save(tmp_path, state)
        with pytest.raises(WeightError, match=r"missing: language\.embed_tokens\.weight"):
            self.load(tmp_path)
        self.save(tmp_path, state | {"decoder.head.weight": head, "decoder.head.bias": head[:, 0].clone()})
        with pytest.raises(WeightError, match=r"decoder\.head\.bias is not known"):
            self.load(tmp_path)

    def save(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        save_file(state, folder / "model.safetensors")

    def load(self, folder: Path) -> None:
        checkpoint = open_checkpoint(folder)
        load_model(checkpoint, load_processor(checkpoint).config, device="cpu", dtype=torch.float32)


def test_the_tower_alone(pairs: dict[Era, NanoPair]) -> None:
    pair = pairs["current"]
    stack, processor = load_vision(open_checkpoint(pair.written.folder), device="cpu", dtype=torch.float32)
    patches = patches_of(pair.processor, [picture(*WIDE)])
    assert torch.equal(stack.encoder.features(patches)[0], pair.model.vision.encoder.features(patches)[0])
    assert processor.facts.preprocess == pair.processor.facts.preprocess


def test_two_ranks_load_both_names(tmp_path: Path) -> None:
    write_nanovlm_checkpoint(tmp_path, names="both")
    checkpoint = open_checkpoint(tmp_path)
    config = load_processor(checkpoint).config

    def unexpected(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("loading does not communicate")

    tp = TensorParallel(1, 2, unexpected, unexpected)
    load_model(checkpoint, config, device="cpu", dtype=torch.float32, tp=tp)


def test_videos_are_refused(pair: NanoPair) -> None:
    with pytest.raises(UserError, match="not videos"):
        pair.processor.layouts([VideoSize(Size(64, 64), 4)])


@pytest.mark.few("0.1", "current")
def test_the_offline_api_answers_as_the_reference(pair: NanoPair, tmp_path: Path) -> None:
    image = picture(*WIDE)
    image.save(tmp_path / "picture.png")
    seen = pair.see([image])
    embeds = pair.reference.embeds(pair.reference.text(QUESTION, seen), seen)
    chosen = generated(pair.reference.language.model, embeds, 12)
    llm = LLM(pair.written.folder, dtype="float32", device="cpu")
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    (answer,) = llm.generate({"prompt": QUESTION, "images": [tmp_path / "picture.png"]}, params)
    assert list(answer.output_token_ids) == chosen
    low: dict[str, Any] = {"image": tmp_path / "picture.png", "detail": "low"}
    (answer,) = llm.generate({"prompt": QUESTION, "images": [low]}, params)
    assert answer.usage.image_tokens == len(seen.blocks[0])


@pytest.mark.few("0.1-1", "current-7")
@pytest.mark.parametrize(("era", "tiles"), [("0.1", 1), ("0.2", 1), ("grid", 6), ("current", 7)])
def test_the_command_line(
    pairs: dict[Era, NanoPair], tmp_path: Path, capsys: pytest.CaptureFixture[str], era: Era, tiles: int
) -> None:
    path, model = str(tmp_path / "picture.png"), str(pairs[era].written.folder)
    picture(*WIDE).save(path)
    assert main(["tokens", model, path, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["image_tokens"], row["tiles"]) == (4 * tiles, tiles)
    assert main(["look", model, path, "-o", str(tmp_path / "view.png")]) == 0
    assert main(["encode", model, path, "-o", str(tmp_path / "f.safetensors")]) == 0
    encoded = load_file(tmp_path / "f.safetensors")
    assert encoded["0"].shape == (16 * tiles, 32)
    assert encoded["projected.0"].shape == (4 * tiles, 48)
    capsys.readouterr()
    assert main(["generate", model, "--prompt", QUESTION, "--image", path, "--max-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["prompt_tokens"] > 4 * tiles


def test_a_budget(pairs: dict[Era, NanoPair]) -> None:
    facts = pairs["current"].processor.facts
    (layout,) = facts.layouts([Size(300, 200)], [ImageBudget(max_tiles=3)])
    assert (layout.arrangement, len(layout.tiles)) == ((1, 1), 1)
    (layout,) = facts.layouts([Size(300, 100)], [ImageBudget(max_tiles=3)])
    assert (layout.arrangement, len(layout.tiles)) == ((1, 3), 4)
    with pytest.raises(UserError, match="one size"):
        pairs["0.1"].processor.facts.layouts([Size(9, 9)], [ImageBudget(max_tiles=3)])
