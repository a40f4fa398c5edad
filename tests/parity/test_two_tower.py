"""Both towers of SigLIP and SigLIP2 against transformers: token ids, embeddings, logits, zero-shot scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity_kit import assert_parity, picture
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerFast, SiglipTokenizer, pipeline
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from two_tower_checkpoint import Kind, TwoTowerReference, write_two_tower_checkpoint

from siglane import Tagger
from siglane.config.two_tower import TextRule, TextTowerConfig
from siglane.errors import ConfigError
from siglane.families.two_tower import check_two_tower, load_two_tower, read_two_tower
from siglane.text.tokens import TextTokens
from siglane.weights.hub import open_checkpoint

TEMPLATE = "This is a photo of {label}."
LABELS = ["a cat", "a dog", "two Green shapes", "a red square", "snow_boots", "the café at night!", "🎉 party", "12 34"]
TEXTS = [
    "a cat", "A CAT, and a Dog!", "snow_boots", "don't (stop)", "", "!!!", "hi 😀 you 🎉", "▁under a ▁ b",
    "  spaced   out ", "ΟΔΟΣ Straße İstanbul", "word " * 500, "12-34 café", "１２ ﷺ ㎏", "a\tb\nc\u3000d", "\u200bzero",
    "x" * 200, "日本語のラベル",
]  # fmt: skip
SIZES = [(60, 90), (56, 56), (200, 31), (1, 1), (17, 4000), (4000, 17), (384, 384), (31, 33)]
VARIANTS: dict[str, tuple[Kind, dict[str, Any]]] = {
    "SigLIP, spiece.model": ("siglip", {}),
    "SigLIP, tokenizer.json": ("siglip", {"tokenizer": "json"}),
    "SigLIP, 27x27 patches and 6 pixels never read": ("siglip", {"image_size": 384, "seed": 1}),
    "SigLIP2, 24x24 patches": ("siglip2", {"image_size": 384, "patch_size": 16}),
    "SigLIP2": ("siglip2", {"seed": 3}),
    "NaFlex, 16 patches": ("naflex", {"max_num_patches": 16}),
    "NaFlex, 64 patches": ("naflex", {}),
    "NaFlex, 256 patches": ("naflex", {"max_num_patches": 256}),
}


def pictures() -> list[Image.Image]:
    return [picture(*size, seed=number) for number, size in enumerate(SIZES)]


def image_processor(folder: Path) -> Any:
    """The reference's on Pillow; another one resizes otherwise."""
    raw = json.loads((folder / "preprocessor_config.json").read_text())
    kind = raw.pop("image_processor_type")
    return {"SiglipImageProcessor": SiglipImageProcessorPil, "Siglip2ImageProcessor": Siglip2ImageProcessorPil}[kind](
        **raw
    )


def tokenizer(folder: Path) -> Any:
    """The reference's. A tokenizer.json is taken as it is: transformers 5.19's GemmaTokenizer drops its Lowercase."""
    if (folder / "spiece.model").exists():
        return SiglipTokenizer.from_pretrained(str(folder))
    found = PreTrainedTokenizerFast.from_pretrained(str(folder))
    found.model_input_names = ["input_ids"]
    if (folder / "tokenizer_config.json").read_text().find("SiglipTokenizer") >= 0:
        found.pad_token = "</s>"
    return found


def reference_ids(folder: Path, texts: list[str], length: int = 64) -> torch.Tensor:
    found: torch.Tensor = tokenizer(folder)(
        texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids
    return found


@pytest.fixture(params=list(VARIANTS))
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, TwoTowerReference]:
    kind, options = VARIANTS[request.param]
    return tmp_path, write_two_tower_checkpoint(tmp_path, kind, **options)


@pytest.mark.few("SigLIP, spiece.model", "SigLIP, tokenizer.json", "SigLIP2, 24x24 patches", "NaFlex, 64 patches")
@torch.no_grad()
def test_embeddings_logits_and_scores(written: tuple[Path, TwoTowerReference]) -> None:
    folder, model = written
    texts = [TEMPLATE.replace("{label}", label) for label in LABELS]
    pixels = image_processor(folder)(images=pictures(), return_tensors="pt")
    expected = model(input_ids=reference_ids(folder, texts), **pixels)
    tagger = Tagger(folder, cache=folder / "cache")
    images, labels = tagger.embed_images(pictures()), tagger.embed_texts(texts)
    assert_parity("image embeddings", images, expected.image_embeds)
    assert_parity("text embeddings", labels, expected.text_embeds)
    loaded = load_two_tower(open_checkpoint(folder), device="cpu", dtype=torch.float32)
    logits = loaded.model.calibration.logits(images, labels)
    assert (logits - expected.logits_per_image).abs().max() <= 2e-4
    scores = tagger.scores(pictures(), LABELS)
    assert (scores - expected.logits_per_image.sigmoid()).abs().max() <= 1e-5
    assert scores.std() > 0.01, "the case is too easy: all scores are alike"
    assert (scores.sum(1) - 1).abs().max() > 0.1, "a softmax would pass"


@pytest.mark.parametrize("name", ["SigLIP, spiece.model", "SigLIP2, 24x24 patches", "NaFlex, 64 patches"])
def test_the_pipelines_scores(tmp_path: Path, name: str) -> None:
    kind, options = VARIANTS[name]
    model = write_two_tower_checkpoint(tmp_path, kind, **options)
    classify = pipeline(
        "zero-shot-image-classification", model=model, tokenizer=tokenizer(tmp_path),
        image_processor=image_processor(tmp_path), device="cpu",
    )  # fmt: skip
    images = pictures()
    answers = classify(images, candidate_labels=LABELS)
    tagged = Tagger(tmp_path, cache=tmp_path / "cache").tag(images, LABELS, threshold=0)
    for answer, ours in zip(answers, tagged, strict=True):
        expected = {row["label"]: row["score"] for row in answer}
        assert {tag.label for tag in ours.tags} == expected.keys()
        assert max(abs(tag.confidence - expected[tag.label]) for tag in ours.tags) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_every_tap_of_the_text_tower(tmp_path: Path, kind: Kind) -> None:
    model = write_two_tower_checkpoint(tmp_path, kind, layers=3)
    loaded = load_two_tower(open_checkpoint(tmp_path), device="cpu", dtype=torch.float32)
    taps: list[torch.Tensor] = []
    for block in loaded.model.text.blocks:
        block.register_forward_hook(lambda module, given, found: taps.append(found.unflatten(0, (-1, 64))))
    ids = reference_ids(tmp_path, TEXTS)
    ours = loaded.model.text(ids)
    expected = model.text_model(input_ids=ids, output_hidden_states=True)
    for tap, state in zip(taps, expected.hidden_states[1:], strict=True):
        assert_parity("block", tap, state)
    assert_parity("text embeddings", ours, expected.pooler_output)


@pytest.mark.parametrize("name", ["SigLIP, spiece.model", "SigLIP2", "NaFlex, 64 patches"])
@pytest.mark.parametrize("length", [64, 16])
def test_token_ids(tmp_path: Path, name: str, length: int) -> None:
    kind, options = VARIANTS[name]
    write_two_tower_checkpoint(tmp_path, kind, **options, length=length)
    _, tokens = read_two_tower(open_checkpoint(tmp_path))
    ids = tokens.ids(TEXTS)
    assert ids.shape == (len(TEXTS), length)
    expected = reference_ids(tmp_path, TEXTS, length)
    for text, ours, theirs in zip(TEXTS, ids.tolist(), expected.tolist(), strict=True):
        assert ours == theirs, text


def test_both_forms_of_siglips_tokenizer_give_the_same_ids(tmp_path: Path) -> None:
    for form in ("spiece", "json"):
        write_two_tower_checkpoint(tmp_path / form, tokenizer=form)
    first, second = (read_two_tower(open_checkpoint(tmp_path / form))[1].ids(TEXTS) for form in ("spiece", "json"))
    assert torch.equal(first, second)
    assert (tmp_path / "spiece/spiece.model").exists()
    assert not (tmp_path / "json/spiece.model").exists()


def test_what_siglip_deletes_and_siglip2_keeps(tmp_path: Path) -> None:
    write_two_tower_checkpoint(tmp_path / "first", "siglip")
    write_two_tower_checkpoint(tmp_path / "second", "siglip2")
    first, second = (read_two_tower(open_checkpoint(tmp_path / name))[1] for name in ("first", "second"))
    assert first.prepared("Snow_Boots: the “BIG” ones!") == "snowboots the “big” ones"
    assert second.prepared("Snow_Boots: the “BIG” ones!") == "snow_boots: the “big” ones!"
    for tokens, same in ((first, True), (second, False)):
        assert torch.equal(tokens.ids(["a cat"]), tokens.ids(["A cAt!"])) is same
        assert torch.equal(tokens.ids(["a cat!"]), tokens.ids(["A CAT!"]))
    assert first.ids([""]).tolist() == [[1] * 64]
    assert second.ids([""]).tolist() == [[1] + [0] * 63]
    assert (second.ids(["ΟΔΟΣ"]) == second.ids(["οδοσ"])).all(), "tokenizers knows no final sigma"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_padding_changes_the_embedding_and_the_trained_length_is_used(tmp_path: Path, kind: Kind) -> None:
    """formats.md trap 23, on weights of 64 positions and on a copy that was trained with 16 (so400m-patch14-224)."""
    model = write_two_tower_checkpoint(tmp_path / "64", kind)
    short = write_two_tower_checkpoint(tmp_path / "16", kind, length=16)
    texts = ["a cat", "This is a photo of two green shapes."]
    by_length = {
        length: F.normalize(model.text_model(input_ids=reference_ids(tmp_path / "64", texts, length)).pooler_output)
        for length in (16, 64)
    }
    ours = Tagger(tmp_path / "64", cache=tmp_path / "cache").embed_texts(texts)
    assert_parity("text embeddings", ours, by_length[64])
    assert (ours - by_length[16]).abs().max() > 0.01
    tagger = Tagger(tmp_path / "16", cache=tmp_path / "cache")
    assert tagger.text_rule.length == 16
    expected = short.text_model(input_ids=reference_ids(tmp_path / "16", texts, 16)).pooler_output
    assert_parity("text embeddings", tagger.embed_texts(texts), F.normalize(expected))


def test_no_table_is_filled_before_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On no device, torch does it by a decomposition whose imports take 1.6 seconds of every start."""
    write_two_tower_checkpoint(tmp_path)
    monkeypatch.setattr(nn.Embedding, "reset_parameters", lambda _: pytest.fail("a table was filled"))
    check_two_tower(open_checkpoint(tmp_path))


def test_a_masked_text_has_another_embedding(tmp_path: Path) -> None:
    """SigLIP was trained on padding that is attended to; a mask, which later tokenizers offer, breaks it."""
    model = write_two_tower_checkpoint(tmp_path)
    ids = reference_ids(tmp_path, ["a cat"])
    mask = (torch.arange(64) < 4).long()[None]
    with torch.no_grad():
        masked = F.normalize(model.text_model(input_ids=ids, attention_mask=mask).pooler_output)
    assert (Tagger(tmp_path, cache=tmp_path / "cache").embed_texts(["a cat"]) - masked).abs().max() > 0.01


@pytest.mark.parametrize("name", ["SigLIP, spiece.model", "NaFlex, 64 patches"])
def test_alone_packed_and_in_another_order(tmp_path: Path, name: str) -> None:
    kind, options = VARIANTS[name]
    write_two_tower_checkpoint(tmp_path, kind, **options)
    images = pictures()
    together, alone, backwards = (
        Tagger(tmp_path, batch_size=size, cache=tmp_path / "cache").embed_images(given)
        for size, given in ((len(images), images), (1, images), (3, images[::-1]))
    )
    assert (together - alone).abs().max() <= 1e-5
    assert (together - backwards.flip(0)).abs().max() <= 1e-5


@torch.no_grad()
def test_templates_are_averaged_and_normalised_again(tmp_path: Path) -> None:
    model = write_two_tower_checkpoint(tmp_path, "siglip2")
    templates = ("This is a photo of {label}.", "{label}", "a picture of {label} at night")
    units = [
        F.normalize(
            model.text_model(input_ids=reference_ids(tmp_path, [t.replace("{label}", x) for x in LABELS])).pooler_output
        )
        for t in templates
    ]
    matrix = F.normalize(torch.stack(units).mean(0))
    tagger = Tagger(tmp_path, templates=templates, cache=tmp_path / "cache")
    images = tagger.embed_images(pictures())
    expected = (images @ matrix.T * model.logit_scale.exp() + model.logit_bias).sigmoid()
    assert (tagger.scores(pictures(), LABELS) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("budget", [4, 64, 300])
def test_a_budget_of_naflex_for_all_and_for_one(tmp_path: Path, budget: int) -> None:
    model = write_two_tower_checkpoint(tmp_path, "naflex")
    processor = Siglip2ImageProcessorPil(patch_size=16, max_num_patches=budget)
    with torch.no_grad():
        expected = F.normalize(model.vision_model(**processor(images=pictures(), return_tensors="pt")).pooler_output)
    common = Tagger(tmp_path, max_num_patches=budget, cache=tmp_path / "cache")
    assert_parity("image embeddings", common.embed_images(pictures()), expected)
    own = Tagger(tmp_path, cache=tmp_path / "cache")
    mixed = [
        {"image": image, "max_num_patches": budget} if number % 2 else image for number, image in enumerate(pictures())
    ]
    found = own.embed_images(mixed)
    assert_parity("image embeddings", found[1::2], expected[1::2])
    assert_parity("image embeddings", found[::2], own.embed_images(pictures())[::2])


def test_half_precision_keeps_scale_and_bias(tmp_path: Path) -> None:
    model = write_two_tower_checkpoint(tmp_path)
    loaded = load_two_tower(open_checkpoint(tmp_path), device="cpu", dtype=torch.bfloat16)
    assert loaded.model.vision.dtype == torch.bfloat16
    assert (loaded.model.logit_scale, loaded.model.logit_bias) == (model.logit_scale, model.logit_bias)
    exact = Tagger(tmp_path, cache=tmp_path / "cache").scores(pictures()[:3], LABELS)
    half = Tagger(tmp_path, dtype="bfloat16", cache=tmp_path / "cache").scores(pictures()[:3], LABELS)
    assert half.dtype == torch.float32
    assert 0 < (exact - half).abs().max() < 0.05


class TestRefusals:
    def test_a_tower_alone(self, tmp_path: Path) -> None:
        from checkpoints import write_siglip_checkpoint

        write_siglip_checkpoint(tmp_path)
        with pytest.raises(ConfigError, match="has no text tower"):
            read_two_tower(open_checkpoint(tmp_path))

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        write_two_tower_checkpoint(tmp_path)
        (tmp_path / "spiece.model").unlink()
        with pytest.raises(ConfigError, match=r"neither tokenizer.json nor spiece.model"):
            read_two_tower(open_checkpoint(tmp_path))

    @pytest.mark.parametrize(("kind", "file"), [("siglip", "spiece.model"), ("siglip2", "tokenizer.json")])
    def test_a_damaged_tokenizer(self, tmp_path: Path, kind: Kind, file: str) -> None:
        write_two_tower_checkpoint(tmp_path, kind)
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:50])
        with pytest.raises(ConfigError, match=file):
            read_two_tower(open_checkpoint(tmp_path))

    def test_a_tokenizer_of_another_model(self, tmp_path: Path) -> None:
        write_two_tower_checkpoint(tmp_path, "siglip2")
        raw = json.loads((tmp_path / "config.json").read_text())
        raw["text_config"]["vocab_size"] = 10
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ConfigError, match="the tokenizer has 420 ids, the text tower 10"):
            read_two_tower(open_checkpoint(tmp_path))

    def test_a_tower_without_a_head(self, tmp_path: Path) -> None:
        write_two_tower_checkpoint(tmp_path)
        raw = json.loads((tmp_path / "config.json").read_text())
        raw["vision_config"]["vision_use_head"] = False
        (tmp_path / "config.json").write_text(json.dumps(raw))
        with pytest.raises(ConfigError, match="vision_use_head false"):
            read_two_tower(open_checkpoint(tmp_path))


def test_a_cut_text_keeps_its_end() -> None:
    rule = TextRule(length=4, lowercase="text", delete_punctuation=True, end_id=1, pad_id=9)
    tokens = TextTokens(rule, lambda text: [ord(letter) for letter in text])
    assert tokens.ids(["a", "abcd", "abc"]).tolist() == [[97, 1, 9, 9], [97, 98, 99, 1], [97, 98, 99, 1]]
    assert (tokens.kept("abcd"), tokens.count("abcd"), tokens.kept("ab")) == (3, 4, 2)


def test_absent_keys_take_the_class_defaults() -> None:
    from transformers import SiglipTextConfig

    default = SiglipTextConfig()
    ours = TextTowerConfig.from_hf({})
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
                 "projection_size", "layer_norm_eps"):  # fmt: skip
        assert getattr(ours, name) == getattr(default, name), name
    assert ours.length == default.max_position_embeddings
