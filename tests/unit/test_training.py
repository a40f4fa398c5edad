"""The demo recipe: its world, its questions, its tokenizer, and a few steps of training on a tiny model."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.demo import model, native, pictures
from recipes.demo import train as demo
from recipes.demo.data import IGNORE, BatchShape, beginning, branch_attention, ending, make_batch
from recipes.demo.questions import NO_SIGN, QUESTION_KINDS, ask
from recipes.demo.scenes import CHARACTERS, COLOURS, KINDS, LABELS, WORDS, draw, patch_labels, random_scene
from recipes.demo.tokenizer import CHAT_TEMPLATE, END, IMAGE, VOCAB_SIZE, save_tokenizer, train_tokenizer
from recipes.demo.train import Recipe, Trainer
from siglane.types import Grid
from siglane.weights.demo import demo_folder


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(scenes=400)


def scenes(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


def test_renderer_is_deterministic():
    once, again = scenes(5), scenes(5)
    assert once == again
    assert [draw(scene).tobytes() for scene in once] == [draw(scene).tobytes() for scene in again]
    assert scenes(5, seed=1) != once


def test_scenes_leave_no_doubt():
    found = scenes(300)
    assert {len(scene.shapes) for scene in found} == {1, 2, 3, 4}
    assert len(WORDS) >= 100
    for scene in found:
        assert len({(shape.kind, shape.colour) for shape in scene.shapes}) == len(scene.shapes)
        xs = [shape.x for shape in scene.shapes]
        assert all(right - left >= 0.08 * scene.canvas.width for left, right in pairwise(xs))
        assert draw(scene).size == scene.canvas


def test_every_shape_and_character_has_a_patch():
    for scene in scenes(300):
        labels = patch_labels(scene, Grid(12, 12))
        assert labels.shape == (144, len(LABELS))
        assert (labels.max(0) < list(LABELS.values())).all()
        assert set(labels[:, 3]) - {0} == set(range(1, len(scene.shapes) + 1))
        text = "" if scene.sign is None else scene.sign.text
        by_index = {int(index): CHARACTERS[character - 1] for character, index in labels[:, 4:] if index}
        assert "".join(by_index[index] for index in sorted(by_index)) == text


def test_answers_follow_from_the_scene():
    rng = np.random.default_rng(7)
    for scene in scenes(200):
        for kind in QUESTION_KINDS:
            question = ask(kind, scene, rng)
            if question is None:
                continue
            words = question.text.rstrip("?.").split()
            named = [shape for shape in scene.shapes if f"{shape.colour} {shape.kind}" in question.text]
            if kind == "count":
                things = [word for word in words if word in COLOURS or word.removesuffix("s") in KINDS]
                expected = sum(all(t in (s.colour, s.kind + "s") for t in things) for s in scene.shapes)
                assert question.answer == str(expected)
            elif kind == "colour":
                assert [s.colour for s in scene.shapes if s.kind in words] == [question.answer]
            elif kind == "shape":
                assert [s.kind for s in scene.shapes if s.colour in words] == [question.answer]
            elif kind == "size":
                assert [s.size for s in named] == [question.answer]
            elif kind == "left" and len(named) == 2:
                assert question.answer == f"the {named[0].colour} {named[0].kind}"
            elif kind == "sign":
                assert question.answer == (scene.sign.text if scene.sign else NO_SIGN)
            elif kind == "describe":
                assert question.answer.count(" a") >= len(scene.shapes) - 1
                assert ("a sign" in question.answer) == (scene.sign is not None)
            elif kind == "exists":
                assert question.answer in ("yes", "no")


def test_both_yes_and_no_are_common():
    rng = np.random.default_rng(3)
    answers = Counter(ask("exists", scene, rng).answer for scene in scenes(1000))
    assert 0.4 < answers["yes"] / answers.total() < 0.7  # a thing asked for at random may well be there


def test_tokenizer_round_trip(tokenizer, tmp_path: Path):
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) <= VOCAB_SIZE
    assert loaded.chat_template == CHAT_TEMPLATE
    for text in ("What does the sign say?", "STOP", "é 日本 \n\n🙂", beginning(16) + ending("What is in the picture?")):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert loaded(text).input_ids == ids
    assert len(tokenizer.encode("STOP").ids) == 4  # signs are spelt
    turns = [{"role": "user", "content": IMAGE * 16 + "\n\nWhat do you see?"}]
    rendered = loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert rendered == beginning(16) + ending("What do you see?")


SMALL = BatchShape(images=4, questions=3, tile=model.TILE, patch=model.PATCH, rows=model.ROWS)


def test_branches_are_single_turn_conversations(tokenizer):
    batch = make_batch(tokenizer, SMALL, seed=0, number=0)
    language = model.DemoModel(tokenizer).language
    torch.manual_seed(0)
    embeds = language.embed(batch.ids.flatten())
    together = language(embeds, batch.positions.flatten(), branch_attention(batch.branches)).view(*batch.ids.shape, -1)
    for branch in (1, 2, 3):
        alone = (batch.branches[0] == 0) | (batch.branches[0] == branch)
        ids = batch.ids[0, alone]
        assert batch.positions[0, alone].tolist() == list(range(len(ids)))
        whole = torch.zeros(1, len(ids), dtype=torch.long)
        hidden = language(language.embed(ids), torch.arange(len(ids)), branch_attention(whole))
        assert torch.allclose(together[0, alone], hidden, atol=1e-5)
    answers = batch.targets[batch.targets != IGNORE]
    assert (answers == tokenizer.token_to_id(END)).sum() == SMALL.images * SMALL.questions


@pytest.fixture(scope="module")
def kinds(tokenizer):
    """The two kinds of demo model with small batches and tokenizers."""
    two_images = dataclasses.replace(SMALL, images=2)
    small_ovis = dataclasses.replace(native.NativePromptFormat(), questions=3, page_batches=0)
    own = train_tokenizer(scenes=400, special=native.SPECIAL)
    return {
        "nvila": dataclasses.replace(demo.NVILA, prompt_format=two_images, tokenizer=lambda: tokenizer),
        "ovis2_5": dataclasses.replace(demo.OVIS, prompt_format=small_ovis, tokenizer=lambda: own),
    }


def small_recipe(kind, **changes) -> Recipe:
    return dataclasses.replace(Recipe(steps=6, seeing_steps=2, warmup=1, kind=kind), **changes)


@pytest.mark.parametrize("name", ["nvila", pytest.param("ovis2_5", marks=pytest.mark.slow)])
def test_three_steps_reduce_the_loss(kinds, name):
    kind = kinds[name]
    trainer = Trainer(small_recipe(kind, steps=100, seeing_steps=0), torch.device("cpu"))
    batch = make_batch(trainer.tokenizer, kind.prompt_format, seed=0, number=0)
    losses = [trainer.train_on(batch) for _ in range(4)]
    assert losses[-1]["answer"] < losses[0]["answer"]
    assert losses[-1]["naming"] < losses[0]["naming"]


def test_resuming_gives_the_same_weights(tokenizer, kinds, tmp_path: Path):
    kind = kinds["nvila"]
    steps = [make_batch(tokenizer, kind.prompt_format, seed=0, number=number) for number in range(3)]
    whole = Trainer(small_recipe(kind), torch.device("cpu"))
    for number, batch in enumerate(steps):
        if number == 2:
            whole.save(tmp_path / "checkpoint.pt")
        whole.train_on(batch)
    resumed = Trainer(small_recipe(kind, seed=9), torch.device("cpu"))
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.step == 2
    for batch in steps[resumed.step :]:
        resumed.train_on(batch)
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_export_loads_in_transformers(tokenizer, monkeypatch, tmp_path: Path):
    from transformers import AutoModelForCausalLM, SiglipVisionModel

    from recipes.demo.export import export

    demo_model = model.DemoModel(tokenizer)
    export(demo_model, tokenizer, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 12e6
    rounded = copy.deepcopy(demo_model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.half().float()
    picture = torch.randint(0, 256, (1, model.TILE, model.TILE, 3), dtype=torch.uint8)
    tower = SiglipVisionModel.from_pretrained(tmp_path / "vision_tower")
    pixels = (picture.float() / 127.5 - 1).permute(0, 3, 1, 2)
    expected = tower(pixels, output_hidden_states=True).hidden_states[-2][0]
    assert torch.allclose(rounded.see(picture)[0], expected, atol=1e-4)
    language = AutoModelForCausalLM.from_pretrained(tmp_path / "llm")
    ids = torch.arange(20)
    hidden = rounded.language(rounded.language.embed(ids), ids, branch_attention(torch.zeros(1, 20, dtype=torch.long)))
    assert torch.allclose(rounded.language.logits(hidden), language(ids[None]).logits[0], atol=1e-4)


def test_the_shipped_pictures_are_the_recipes(tmp_path: Path):
    pictures.main(["--out", str(tmp_path)])
    shipped = demo_folder()
    name = "pictures/questions.json"
    assert (tmp_path / name).read_text() == (shipped / name).read_text()
    for name in pictures.PICTURES:
        with Image.open(shipped / "pictures" / f"{name}.png") as painted:
            assert painted.size == pictures.picture(name).canvas


def test_pages_are_looked_at_and_not_asked_about(kinds):
    prompt_format = dataclasses.replace(kinds["ovis2_5"].prompt_format, page_batches=2)
    own = kinds["ovis2_5"].tokenizer()
    page, scenes_ = (make_batch(own, prompt_format, seed=0, number=number) for number in range(2))
    assert page.kinds.shape[1] == 0
    assert (page.targets == IGNORE).all()
    assert scenes_.kinds.shape[1] == 3
    characters = (page.labels[..., 4] > 0).float().mean()
    assert characters > 4 * (scenes_.labels[..., 4] > 0).float().mean()
    assert characters > 0.15


@pytest.mark.slow  # the one that ships is read by test_demo_native.py
def test_the_native_model_loads_as_it_was_exported(kinds, tmp_path: Path):
    """siglane's own loader gives the rows that training saw, in half precision's accuracy."""
    from siglane import LLM, VisionEncoder

    kind = kinds["ovis2_5"]
    own = kind.tokenizer()
    torch.manual_seed(0)
    trained = kind.model(own)
    kind.export(trained, own, tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 12e6
    picture = draw(random_scene(np.random.default_rng(3), "STOP", native.CANVASES[0]))
    with torch.no_grad():
        pixels = torch.from_numpy(np.array(picture))[None]
        _, rows = trained.see(pixels)
    assert (VisionEncoder(tmp_path).project([picture])[0] - rows).abs().max() < 0.02
    answer = LLM(tmp_path, kv_tokens=1024).generate({"prompt": "What does the sign say?", "images": [picture]})
    assert answer[0].usage.image_tokens == 144
