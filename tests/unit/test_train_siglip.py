"""`siglane train`: pairs, steps, resuming, what it writes, and how what it wrote is measured."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import start_ranks

from recipes.demo import siglip as demo_siglip
from recipes.demo.siglip import LABELS, PaintedPairs
from siglane.cli.main import main
from siglane.config.preprocess import LOCAL_DECODE
from siglane.errors import ConfigError, UserError
from siglane.families.registry import image_facts
from siglane.families.two_tower import TwoTowerModel, load_two_tower, two_tower_plan
from siglane.image.decode import from_pil
from siglane.settings.training import TrainConfig
from siglane.training import evaluate
from siglane.training.contrastive import Trainer, precision_of
from siglane.training.files import caption_tokenizer, copy_files, write_files, write_json
from siglane.training.pairs import batch_indices, load_batch, open_pairs
from siglane.training.report import Skipped
from siglane.training.run import MODEL, open_run, train, world
from siglane.weights.export import checkpoint_tensors
from siglane.weights.hub import Checkpoint

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 80, 220), "black": (10, 10, 10)}


def write_config(folder: Path, kind: str = "siglip") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    grid = {"image_size": 32} if kind == "siglip" else {"num_patches": 4}
    config = {
        "architectures": [{"siglip": "SiglipModel", "siglip2": "Siglip2Model"}[kind]],
        "model_type": kind,
        "text_config": {**SIZES, "vocab_size": 300, "max_position_embeddings": 12, "projection_size": 32},
        "vision_config": {**SIZES, "patch_size": 16, **grid},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "config.json"


def picture(number: int) -> tuple[Image.Image, str]:
    colour = list(COLOURS)[number % len(COLOURS)]
    rng = np.random.default_rng(number)
    noise = rng.integers(-10, 11, (40 + number, 50, 3)) + np.array(COLOURS[colour])
    return Image.fromarray(noise.clip(0, 255).astype(np.uint8)), f"a {colour} picture"


def write_lines(folder: Path, count: int = 12, extra: tuple[str, ...] = ()) -> Path:
    """JSON Lines of `count` good rows, then `extra` ones."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        image, caption = picture(number)
        image.save(folder / "pictures" / f"{number}.png")
        lines.append(json.dumps({"image": f"pictures/{number}.png", "caption": caption}))
    (folder / "pairs.jsonl").write_text("\n".join([*lines, *extra]) + "\n")
    return folder / "pairs.jsonl"


def write_shards(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for number in range(shard * count // 2, (shard + 1) * count // 2):
                image, caption = picture(number)
                file = io.BytesIO()
                image.save(file, "PNG")
                add(tar, f"{number:03}.png", file.getvalue())
                add(tar, f"{number:03}.txt", f"{caption}\n".encode())
    return folder


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


CONFIG = TrainConfig(batch_size=4, steps=6, warmup=2, workers=0, seed=3)


def run(pairs_file: Path, source: Any, out: Path, config: TrainConfig = CONFIG, **options: Any) -> Trainer:
    pairs, _ = open_pairs(pairs_file)
    trainer = open_run(source, pairs, out, config, CPU, resume=options.pop("resume", False))
    train(trainer, pairs, out, skipped=Skipped(), **options)
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def logged(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


# --- pairs


BAD_LINES = (
    '{"image": "pictures/none.png", "caption": "gone"}',
    '{"image": "pictures/0.png", "caption": "  "}',
    '{"image": "pictures/0.png"}',
    '["pictures/0.png", "a list"]',
    "{broken",
    "",
)


def test_bad_lines_are_named_and_left_out(tmp_path: Path) -> None:
    pairs, bad = open_pairs(write_lines(tmp_path, 3, BAD_LINES))
    assert pairs.size == 3
    assert pairs[1].caption == "a green picture"
    assert pairs[1].picture().rgb.shape == (41, 50, 3)
    assert [(row.name.rpartition(":")[2], row.reason) for row in bad] == [
        ("4", "the picture pictures/none.png is missing"),
        ("5", "no caption"),
        ("6", "no caption"),
        ("7", 'not an object {"image": path, "caption": text}'),
        ("8", "not JSON"),
    ]


def test_shards_hold_what_the_lines_hold(tmp_path: Path) -> None:
    lines, _ = open_pairs(write_lines(tmp_path / "lines"))
    shards, bad = open_pairs(write_shards(tmp_path / "shards"))
    assert bad == ()
    assert [pair.caption for pair in shards.pairs] == [pair.caption for pair in lines.pairs]
    assert [pair.picture().digest for pair in shards.pairs] == [pair.picture().digest for pair in lines.pairs]
    assert shards[7].name == f"{tmp_path / 'shards' / '00001.tar'}:007"


def test_bad_samples_are_named(tmp_path: Path) -> None:
    file = io.BytesIO()
    picture(0)[0].save(file, "WEBP")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/one.webp", file.getvalue())
        add(tar, "x/one.txt", b"a picture")
        add(tar, "x/one.json", b"{}")
        add(tar, "alone.webp", file.getvalue())
        add(tar, "words.txt", b"words")
        add(tar, "empty.webp", file.getvalue())
        add(tar, "empty.txt", b" \n")
        add(tar, "two.webp", file.getvalue())
        add(tar, "two.png", file.getvalue())
        add(tar, "two.txt", b"which?")
    (tmp_path / "b.tar").write_bytes(b"not a tar")
    pairs, bad = open_pairs(tmp_path)
    assert [pair.name for pair in pairs.pairs] == [f"{tmp_path / 'a.tar'}:x/one"]
    reasons = {row.name.rpartition("/")[2]: row.reason for row in bad}
    assert reasons.pop("b.tar").startswith("not a readable tar")
    assert reasons == {
        "a.tar:alone": "no caption",
        "a.tar:words": "no picture",
        "a.tar:empty": "no caption",
        "a.tar:two": "more than one picture",
    }


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file or folder"):
        open_pairs(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"holds no \*\.tar"):
        open_pairs(tmp_path)
    (tmp_path / "bad.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"no usable pair.*bad\.jsonl:1: not JSON"):
        open_pairs(tmp_path / "bad.jsonl")


def test_batches_are_functions_of_the_seed() -> None:
    epoch = [batch_indices(11, 4, 0, number).tolist() for number in range(2)]
    assert epoch == [batch_indices(11, 4, 0, number).tolist() for number in range(2)]
    assert len({index for batch in epoch for index in batch}) == 8
    assert batch_indices(11, 4, 0, 2).tolist() != epoch[0]
    assert batch_indices(11, 4, 1, 0).tolist() != epoch[0]
    assert batch_indices(None, 4, 0, 3).tolist() == [12, 13, 14, 15]
    with pytest.raises(UserError, match="do not fill a batch"):
        batch_indices(3, 4, 0, 0)


# --- steps


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainConfig(learning_rate=2.0, warmup=10)
    rates = [config.rate(step, 110) for step in range(111)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[110] == pytest.approx(0.0, abs=1e-12)
    assert sorted(rates[10:], reverse=True) == rates[10:]


@pytest.mark.parametrize(
    ("options", "wrong"),
    [({"batch_size": 0}, "batch_size"), ({"steps": 0}, "steps"), ({"clip": -1.0}, "clip"), ({"warmup": -1}, "warmup")],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        TrainConfig(**options)


@pytest.mark.few("siglip2")
@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_model_learns_colours_from_scratch(kind: str, tmp_path: Path) -> None:
    config = replace(CONFIG, steps=60, batch_size=8, learning_rate=3e-3, initial_bias=-2.0, warmup=5)
    trainer = run(write_lines(tmp_path), write_config(tmp_path, kind), tmp_path / "out", config)
    losses = [row["loss"] for row in logged(tmp_path / "out")]
    assert len(losses) == 60
    assert losses[-1] < 0.6 * losses[0]
    two_tower = trainer.two_tower
    images = evaluate.embed_pictures(
        two_tower, (from_pil(picture(number)[0], LOCAL_DECODE) for number in range(20, 40))
    )
    classes = evaluate.embed_classes(two_tower, list(COLOURS), ("a {label} picture",))
    assert evaluate.zero_shot_accuracy(images, classes, torch.arange(20) % 4) > 0.9


def test_a_step_sees_the_mean_of_its_batches(tmp_path: Path) -> None:
    pairs, _ = open_pairs(write_lines(tmp_path))
    source = write_config(tmp_path)

    def fresh(name: str) -> Trainer:
        return open_run(source, pairs, tmp_path / name, replace(CONFIG, precision="float32"), CPU)

    both = fresh("both")
    batches = [
        load_batch(both.two_tower.images, group, [pairs[i] for i in group]) for group in ((0, 1, 2), (3, 4, 5, 6))
    ]
    together = both.train_on(batches)
    alone = [fresh("alone").train_on([batch]) for batch in batches]
    assert together["loss"] == pytest.approx(sum(facts["loss"] for facts in alone) / 2, rel=1e-5)
    assert together["gradient"] <= sum(facts["gradient"] for facts in alone) / 2 + 1e-6


def test_a_locked_image_tower_stays_and_its_pictures_are_seen_once(tmp_path: Path) -> None:
    lines = write_lines(tmp_path)
    first = run(lines, write_config(tmp_path), tmp_path / "both")
    config = replace(CONFIG, lock_image=True, fresh_text=True, epochs=4, precision="float32")
    model = Checkpoint(tmp_path / "both" / MODEL)
    locked = run(lines, model, tmp_path / "locked", config)
    before, after = weights(first), weights(locked)
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("vision."))
    assert not torch.equal(before["text.head.weight"], after["text.head.weight"])
    assert not any(parameter.requires_grad for parameter in locked.model.vision.parameters())
    # the same steps with pictures instead of their stored embeddings
    pairs, _ = open_pairs(lines)
    again = open_run(model, pairs, tmp_path / "again", config, CPU)
    for step in range(6):
        numbers = batch_indices(12, 4, config.seed, step).tolist()
        again.train_on([load_batch(again.two_tower.images, numbers, [pairs[number] for number in numbers])])
    for name, value in weights(again).items():
        torch.testing.assert_close(value, after[name], atol=1e-5, rtol=0)


@pytest.mark.few("accumulate")
@pytest.mark.parametrize("options", [{}, {"lock_image": True}, {"accumulate": 2}], ids=["both", "locked", "accumulate"])
def test_resuming_gives_the_same_weights(options: dict[str, Any], tmp_path: Path) -> None:
    lines, source = write_lines(tmp_path), write_config(tmp_path)
    config = replace(CONFIG, **options)
    whole = run(lines, source, tmp_path / "whole", config)
    for stops in range(1, 4):
        stopped = run(lines, source, tmp_path / "parts", config, resume=True, minutes=0.0)
        assert stopped.step == stops
    (tmp_path / "parts" / "log.jsonl").open("a").write('{"step": 99, "loss": 0.0}\n{"step": 1')  # a crash later on
    resumed = run(lines, source, tmp_path / "parts", config, resume=True)
    assert resumed.step == whole.step == 6
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    losses = [[row["loss"] for row in logged(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_another_run_is_not_resumed(tmp_path: Path) -> None:
    lines, source = write_lines(tmp_path), write_config(tmp_path)
    run(lines, source, tmp_path / "out", minutes=0.0)
    with pytest.raises(UserError, match="add --resume"):
        run(lines, source, tmp_path / "out")
    with pytest.raises(UserError, match=r"learning_rate 0\.001, not 0\.5"):
        run(lines, source, tmp_path / "out", replace(CONFIG, learning_rate=0.5), resume=True)
    with pytest.raises(UserError, match="pairs 12, not 8"):
        run(write_lines(tmp_path, 8), source, tmp_path / "out", resume=True)


def test_pictures_that_cannot_be_decoded_are_skipped(tmp_path: Path, capsys) -> None:
    lines = write_lines(tmp_path)
    (tmp_path / "pictures" / "5.png").write_bytes(b"nothing")
    for lock in (False, True):
        pairs, bad = open_pairs(lines)
        assert bad == ()
        skipped = Skipped()
        out, config = tmp_path / f"out{lock}", replace(CONFIG, lock_image=lock)
        train(open_run(write_config(tmp_path), pairs, out, config, CPU), pairs, out, skipped=skipped)
        assert skipped.names == {f"{lines}:6"}
        assert capsys.readouterr().err.count(f"skipped {lines}:6: not an image") == 1
        with pytest.raises(UserError, match="without --strict"):
            train(open_run(write_config(tmp_path), pairs, out / "2", config, CPU), pairs, out, skipped=Skipped(True))
    for number in range(12):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not one pair"):
        run(lines, write_config(tmp_path), tmp_path / "none")


def rank(number: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=ranks, timeout=timedelta(seconds=60))
    assert world() is not None
    config = replace(CONFIG, precision="float32", batch_size=5, steps=3)
    trainer = run(folder / "pairs.jsonl", folder / "config.json", folder / "ranks", config)
    torch.save(weights(trainer), folder / f"rank{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_the_model_of_one(tmp_path: Path) -> None:
    write_config(tmp_path)
    lines = write_lines(tmp_path)
    running = start_ranks(rank, (2, tmp_path), 2, join=False)
    config = replace(CONFIG, precision="float32", batch_size=5, steps=3)
    run(lines, tmp_path / "config.json", tmp_path / "alone", config)
    while not running.join():
        pass
    found = [torch.load(tmp_path / f"rank{number}.pt") for number in range(2)]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    # not weight by weight: a key's bias has no gradient but rounding, of which Adam makes whole steps
    for ours, theirs in zip(logged(tmp_path / "ranks"), logged(tmp_path / "alone"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["gradient"] == pytest.approx(theirs["gradient"], rel=1e-4)


# --- what is written


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_transformers_and_siglane_load_the_same_model(kind: str, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast, Siglip2Model, SiglipModel

    trainer = run(write_lines(tmp_path), write_config(tmp_path, kind), tmp_path / "out")
    folder = tmp_path / "out" / MODEL
    theirs = {"siglip": SiglipModel, "siglip2": Siglip2Model}[kind].from_pretrained(folder, dtype=torch.float32).eval()
    ours = load_two_tower(Checkpoint(folder), device="cpu", dtype=torch.float32)
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in ours.model.state_dict().items())
    texts = ["a red picture", "A Blue picture", "nothing of the kind: déjà vu, " + "word " * 20]
    # since 5.20 AutoTokenizer takes SigLIP2's class for every SigLIP2, whatever its files say
    for reader in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer = reader.from_pretrained(folder)
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        assert torch.equal(ids, ours.texts.ids(texts))
    images = [picture(number)[0] for number in range(3)]
    decoded = [from_pil(image, LOCAL_DECODE) for image in images]
    patches = [ours.images.patches(one, ours.images.layouts([one.size])[0]) for one in decoded]
    inputs = AutoImageProcessor.from_pretrained(folder, backend="pil")(images, return_tensors="pt")
    with torch.no_grad():
        expected = theirs(input_ids=ids, **inputs).logits_per_image
        found = ours.model.calibration.logits(ours.model.embed_images(patches), ours.model.embed_texts(ids))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def stored_tensors(model: TwoTowerModel) -> dict[str, torch.Tensor]:
    return checkpoint_tensors(model, two_tower_plan(model.config))


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_checkpoint_of_transformers_is_written_back_as_it_was(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    trainer = run(write_lines(tmp_path), write_config(tmp_path, kind), tmp_path / "out")
    folder = tmp_path / "out" / MODEL
    torch.manual_seed(5)
    AutoModel.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    tensors = stored_tensors(load_two_tower(Checkpoint(folder), device="cpu").model)
    assert tensors.keys() == stored.keys() == stored_tensors(trainer.model).keys()
    for name, value in stored.items():
        assert torch.equal(tensors[name], value), name


def test_pictures_of_a_start_are_described_where_transformers_5_describes_them(tmp_path: Path) -> None:
    """A copy, and a folder written around a configuration, keep the section and write no file beside it."""
    config = write_config(tmp_path / "start")
    side = json.loads(config.read_text())["vision_config"]["image_size"]
    pictures = {"size": {"height": side, "width": side}, "resample": 0, "image_mean": [0.1, 0.2, 0.3]}
    write_json(tmp_path / "start/processor_config.json", {"image_processor": pictures})
    copy_files(Checkpoint(tmp_path / "start"), tmp_path / "copy")
    write_files(config, ["a red circle"], tmp_path / "written")
    for folder in ("copy", "written"):
        assert not (tmp_path / folder / "preprocessor_config.json").exists()
        found = image_facts(Checkpoint(tmp_path / folder)).preprocess
        assert found.mean == (0.1, 0.2, 0.3)
        rule: Any = found.rule
        assert rule.resample == "nearest"


def test_a_tokenizer_of_captions_spells_anything() -> None:
    tokenizer = caption_tokenizer(["a red circle", "a blue square"] * 20, 300)
    ids = tokenizer.encode("A Red CIRCLE", add_special_tokens=False).ids
    assert len(ids) == 3, "a word is one token"
    assert tokenizer.encode("a circle red").ids == [ids[0], ids[2], ids[1], 1]
    assert tokenizer.decode(tokenizer.encode("日本 ☂").ids, skip_special_tokens=True).strip() == "日本 ☂"
    with pytest.raises(ConfigError, match="261"):
        caption_tokenizer(["a"], 100)


def test_the_command(tmp_path: Path, capsys, monkeypatch) -> None:
    lines = write_lines(tmp_path, 12, BAD_LINES[:1])
    words = ["train", str(lines), "--from-scratch", str(write_config(tmp_path)), "--batch-size", "4", "--workers", "0"]
    out = tmp_path / "out"
    assert main([*words, "--out", str(out), "--epochs", "2", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found.items() >= {"model": str(out / "model"), "step": 6, "steps": 6, "skipped": 1, "used": 12}.items()
    assert f"skipped {lines}:13: the picture pictures/none.png is missing" in printed.err
    assert Image.open(out / "loss.png").size == (960, 540)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    words = ["train", str(lines), "--model", str(out / "model"), "--batch-size", "4", "--workers", "0"]
    assert main([*words, "--out", str(tmp_path / "on"), "--store", "float16", "--lock-image"]) == 0
    printed = capsys.readouterr()
    assert "drawing needs matplotlib" in printed.err
    assert not (tmp_path / "on" / "loss.png").exists()
    sizes = [(folder / "model" / "model.safetensors").stat().st_size for folder in (out, tmp_path / "on")]
    assert sizes[1] < 0.6 * sizes[0]
    for wrong, said in (
        ([*words, "--out", str(out)], "add --resume"),
        ([*words, "--out", str(tmp_path / "x"), "--strict"], "pairs.jsonl:13"),
        ([*words, "--out", str(tmp_path / "x"), "--from-scratch", "y"], "either --model or --from-scratch"),
        (["train", str(lines), "--out", "x", "--from-scratch", str(tmp_path / "none.json")], "there is no file"),
        (["train", str(lines), "--out", "x", "--from-scratch", "config", "--fresh-text"], "there is no file"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err


def test_bfloat16_where_the_device_has_it() -> None:
    assert precision_of(CPU, "float32") == torch.float32
    expected = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    assert precision_of(CPU, "auto") == expected


# --- measuring


def test_a_ridge_probe_is_least_squares_and_separates() -> None:
    torch.manual_seed(0)
    targets = torch.arange(90) % 3
    x = torch.randn(90, 8) + 4 * torch.eye(8)[targets]
    weights_ = evaluate.linear_probe(x, targets, 3, ridge=1e-12)
    with_bias = torch.cat((x, torch.ones(90, 1)), 1).double()
    expected = torch.linalg.lstsq(with_bias, torch.nn.functional.one_hot(targets).double()).solution
    torch.testing.assert_close(weights_, expected, atol=1e-8, rtol=0)
    assert evaluate.probe_accuracy(weights_, x, targets) > 0.95
    assert evaluate.linear_probe(x, targets, 3, ridge=10.0).abs().sum() < weights_.abs().sum()


def test_zero_shot_accuracy_counts_the_nearest_class() -> None:
    classes = torch.eye(3)
    images = torch.nn.functional.normalize(torch.tensor([[9.0, 1, 0], [0, 9, 1], [0, 1, 9], [1, 9, 0]]), dim=-1)
    assert evaluate.zero_shot_accuracy(images, classes, torch.tensor([0, 1, 2, 2])) == 0.75


def test_a_folder_of_classes_is_measured(tmp_path: Path, capsys) -> None:
    trainer = run(write_lines(tmp_path), write_config(tmp_path), tmp_path / "out", replace(CONFIG, steps=1, warmup=0))
    for number in range(24):
        image, caption = picture(number)
        folder = tmp_path / "classes" / f"{caption.split()[1]}_picture"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    words = ["--images", str(tmp_path / "classes"), "--templates", "a {label}", "the {label}"]
    assert evaluate.main([str(tmp_path / "out" / MODEL), *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["classes"]) == (24, 4)
    assert found["linear_probe"] == 1.0  # plain colours are apart even in a tower of noise
    order = sorted(COLOURS)
    classes = evaluate.embed_classes(
        trainer.two_tower, [f"{label} picture" for label in order], ("a {label}", "the {label}")
    )
    images = evaluate.embed_pictures(trainer.two_tower, (from_pil(picture(n)[0], LOCAL_DECODE) for n in range(24)))
    targets = torch.tensor([order.index(list(COLOURS)[n % 4]) for n in range(24)])
    assert found["zero_shot"] == evaluate.zero_shot_accuracy(images, classes, targets)
    with pytest.raises(UserError, match="two classes"):
        evaluate.main([str(tmp_path / "out" / MODEL), "--images", str(tmp_path / "pictures")])


# --- the demo


def test_captions_name_what_is_there() -> None:
    pairs = PaintedPairs(11)
    seen = set()
    for number in range(300):
        pair = pairs[number]
        assert pair.caption == pairs[number].caption
        words = pair.caption.lower().replace(",", " ").replace(".", " ")
        there = {f"{shape.colour} {shape.kind}" for shape in pair.scene().shapes}
        named = {label for label in LABELS if label in words}
        assert named <= there
        assert named or "sign" in words
        assert "sign" not in words or pair.scene().sign is not None
        seen |= named
    assert seen == set(LABELS)


def test_a_close_up_shows_the_whole_shape() -> None:
    for number in range(100):
        pair = PaintedPairs(12, beginning=60)[number]
        assert pair.near or number >= 60
        if pair.near:
            (shape,) = pair.scene().shapes
            rgb = pair.picture().rgb.astype(int)
            assert abs(rgb.shape[0] - rgb.shape[1]) <= 1
            inside = np.abs(rgb - shape.rgb).max(-1) < 3
            whole = np.abs(demo_siglip.decoded(demo_siglip.draw(pair.scene())).rgb.astype(int) - shape.rgb).max(-1) < 3
            assert inside.sum() == whole.sum()
