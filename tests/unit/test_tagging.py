"""The tagger: choosing tags, the label cache, bad pictures and labels, settings."""

from __future__ import annotations

import itertools
import json
import logging
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from two_tower_checkpoint import write_two_tower_checkpoint

from siglane import Tag, Tagged, Tagger
from siglane.errors import ConfigError, UserError
from siglane.families.ahead import PREPARE_AHEAD
from siglane.settings.tagging import TagSettings, read_settings
from siglane.tagging.cache import LabelCache, default_folder
from siglane.tagging.labels import read_labels

LABELS = ["a cat", "a dog", "two shapes", "a red square", "snow boots"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagging") / "siglip"
    write_two_tower_checkpoint(folder, "siglip2", seed=5)
    return folder


@pytest.fixture(scope="module")
def naflex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tagging") / "naflex"
    write_two_tower_checkpoint(folder, "naflex")
    return folder


@pytest.fixture
def tagger(model: Path, tmp_path: Path) -> Tagger:
    return Tagger(model, cache=tmp_path / "cache", batch_size=3)


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


class TestTags:
    def test_the_most_likely_come_first_down_to_the_threshold(self, tagger: Tagger) -> None:
        images = [picture(number) for number in range(5)]
        scores = tagger.scores(images, LABELS)
        threshold = scores.median().item()
        for row, tagged in zip(scores.tolist(), tagger.tag(images, LABELS, threshold=threshold), strict=True):
            expected = sorted(zip(LABELS, row, strict=True), key=lambda pair: -pair[1])
            assert list(tagged.tags) == [Tag(*pair) for pair in expected if pair[1] >= threshold]
            assert tagged.error is None

    def test_limits(self, tagger: Tagger) -> None:
        (every,) = tagger.tag([picture(0)], LABELS, threshold=0)
        assert len(every.tags) == len(LABELS)
        assert tagger.tag([picture(0)], LABELS, threshold=0, max_tags=2)[0].tags == every.tags[:2]
        assert tagger.tag([picture(0)], LABELS, threshold=1, top_k=3)[0].tags == every.tags[:3]
        assert tagger.tag([picture(0)], LABELS, top_k=99)[0].tags == every.tags
        assert tagger.tag([picture(0)], LABELS, threshold=1)[0] == Tagged()

    def test_equals_stand_in_the_order_of_the_labels(self, tagger: Tagger) -> None:
        """Lower case makes them one text, so one score."""
        labels = ["A Cat", "a dog", "a cat", "a CAT"]
        found = [tag for tag in tagger.tag([picture(0)], labels, threshold=0)[0].tags if tag.label != "a dog"]
        assert [tag.label for tag in found] == ["A Cat", "a cat", "a CAT"]
        assert len({tag.confidence for tag in found}) == 1
        backwards = tagger.tag([picture(0)], labels[::-1], threshold=0)[0].tags
        assert [tag.label for tag in backwards if tag.label != "a dog"] == ["a CAT", "a cat", "A Cat"]

    def test_as_json(self) -> None:
        assert Tagged((Tag("a", 0.5),)).as_json() == {"tags": [{"label": "a", "confidence": 0.5}]}
        assert Tagged(error="broken").as_json() == {"tags": [], "error": "broken"}

    def test_a_batch_is_one_forward(self, tagger: Tagger) -> None:
        calls: list[int] = []
        tagger._model.vision.tower.register_forward_pre_hook(lambda module, given: calls.append(len(given[0].grids)))
        tagger.tag([picture(number) for number in range(7)], LABELS)
        assert calls == [3, 3, 1]

    def test_nothing_to_tag(self, tagger: Tagger) -> None:
        assert tagger.tag([], LABELS) == []
        assert tagger.scores([], LABELS).shape == (0, 5)
        assert tagger.embed_images([]).shape == (0, 32)
        assert tagger.embed_texts([]).shape == (0, 32)

    def test_embeddings_have_unit_length_and_take_gradients_elsewhere(self, tagger: Tagger) -> None:
        images, texts = tagger.embed_images([picture(0), picture(1)]), tagger.embed_texts(["a", "b", "a"])
        assert torch.allclose(images.norm(dim=1), torch.ones(2))
        assert torch.equal(texts[0], texts[2])
        weight = torch.ones(32, requires_grad=True)
        ((texts * weight).sum() + (images * weight).sum()).backward()
        assert weight.grad is not None

    def test_thousands_of_labels(self, tagger: Tagger) -> None:
        labels = [f"thing number {number}" for number in range(2500)]
        (tagged,) = tagger.tag([picture(0)], labels, threshold=0)
        assert len(tagged.tags) == 50
        row = tagger.scores([picture(0)], labels)[0]
        assert [tag.confidence for tag in tagged.tags] == row.sort(descending=True).values[:50].tolist()

    @pytest.mark.parametrize(
        ("limits", "complaint"),
        [
            ({"threshold": 1.1}, "threshold must be between 0 and 1, got 1.1"),
            ({"threshold": float("nan")}, "threshold must be between 0 and 1"),
            ({"max_tags": 0}, "max_tags must be at least 1, got 0"),
            ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ],
    )
    def test_limits_that_cannot_be(self, tagger: Tagger, limits: dict[str, Any], complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            tagger.stream([], LABELS, **limits)

    def test_a_high_threshold_is_warned_of(self, tagger: Tagger, caplog: pytest.LogCaptureFixture) -> None:
        tagger.tag([], LABELS, threshold=0.49)
        assert not caplog.messages
        tagger.tag([], LABELS, threshold=0.5)
        assert "sigmoid scores are low" in caplog.text


class TestStream:
    def test_it_reads_a_bounded_number_ahead_and_keeps_nothing(self, tagger: Tagger) -> None:
        """An endless source: only a lazy reader comes back from it, and memory does not follow its length."""
        given = itertools.count()

        def endless() -> Iterator[Image.Image]:
            for _ in given:
                yield Image.new("RGB", (8, 8), "red")

        stream = tagger.stream(endless(), LABELS, top_k=1)
        peaks = []
        tracemalloc.start()
        try:
            for _ in range(3):
                tracemalloc.reset_peak()
                for _ in itertools.islice(stream, 100):
                    pass
                peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
            stream = iter(())
        assert next(given) <= 300 + PREPARE_AHEAD + 2 * 3
        assert peaks[2] < peaks[0] + 200_000

    def test_a_bad_picture_is_an_error_of_its_row(self, tagger: Tagger, tmp_path: Path) -> None:
        picture(0).save(tmp_path / "good.png")
        (tmp_path / "bad.png").write_bytes(b"not a picture")
        cut = (tmp_path / "good.png").read_bytes()[:-200]
        images = [
            str(tmp_path / "good.png"),
            tmp_path / "bad.png",
            tmp_path / "none.png",
            cut,
            picture(1),
            None,
            tmp_path,
        ]
        found = tagger.tag(images, LABELS, threshold=0)  # type: ignore[arg-type]
        expected = tagger.tag([picture(0), picture(1)], LABELS, threshold=0)
        assert [tagged.error is None for tagged in found] == [True, False, False, False, True, False, False]
        for ours, alone in zip((found[0], found[4]), expected, strict=True):
            assert [tag.label for tag in ours.tags] == [tag.label for tag in alone.tags]
            assert (
                max(abs(one.confidence - two.confidence) for one, two in zip(ours.tags, alone.tags, strict=True)) < 1e-6
            )
        assert "none.png: cannot be read: No such file" in (found[2].error or "")
        assert "images[5] must be a path" in (found[5].error or "")
        assert tagger.tag([tmp_path / "bad.png"], LABELS)[0].tags == ()
        for method in (tagger.embed_images, lambda given: tagger.scores(given, LABELS)):
            with pytest.raises(UserError, match=r"bad\.png"):
                method([picture(0), tmp_path / "bad.png"])

    def test_an_overflow_is_an_error_not_a_tag(self, model: Path, tmp_path: Path) -> None:
        tagger = Tagger(model, cache=tmp_path / "cache")
        torch.nn.init.constant_(tagger._model.vision.tower.patch_embedding.bias, float("nan"))
        (tagged,) = tagger.tag([picture(0)], LABELS, top_k=2)
        assert tagged.tags == ()
        assert "no finite numbers" in (tagged.error or "")

    def test_budgets_of_single_pictures(self, naflex: Path, tmp_path: Path) -> None:
        tagger = Tagger(naflex, cache=tmp_path / "cache")
        found = tagger.tag([{"image": picture(0), "max_num_patches": 9}, {"image": picture(0), "max_tiles": 3}], LABELS)
        assert found[0].error is None
        assert "max_tiles does not apply" in (found[1].error or "")


class TestCache:
    @pytest.fixture
    def texts(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many texts each pass of the text tower had."""
        calls: list[int] = []
        embed = Tagger.embed_texts

        def counted(self: Tagger, texts: list[str]) -> torch.Tensor:
            calls.append(len(texts))
            return embed(self, texts)

        monkeypatch.setattr(Tagger, "embed_texts", counted)
        return calls

    def test_labels_are_embedded_once(self, model: Path, tmp_path: Path, texts: list[int]) -> None:
        def tags(**options: Any) -> list[Tagged]:
            tagger = Tagger(model, cache=tmp_path / "cache", **options)
            return [*tagger.tag([picture(0)], LABELS, threshold=0), *tagger.tag([picture(0)], LABELS, threshold=0)]

        first = tags()
        assert texts == [5]
        assert tags() == first
        assert texts == [5], "the second tagger reads the file"
        tags(templates=("{label}", "the {label}"))
        assert texts == [5, 5, 5]
        Tagger(model, cache=tmp_path / "cache").tag([picture(0)], LABELS[::-1])
        assert texts == [5, 5, 5, 5]
        tags(dtype="bfloat16")
        assert texts == [5, 5, 5, 5, 5]
        assert len(list((tmp_path / "cache").iterdir())) == 4

    def test_another_model_at_the_same_place_is_another_key(self, tmp_path: Path, texts: list[int]) -> None:
        write_two_tower_checkpoint(tmp_path / "model", "siglip2")
        first = Tagger(tmp_path / "model", cache=tmp_path / "cache").scores([picture(0)], LABELS)
        write_two_tower_checkpoint(tmp_path / "model", "siglip2", seed=9)
        second = Tagger(tmp_path / "model", cache=tmp_path / "cache").scores([picture(0)], LABELS)
        assert texts == [5, 5]
        assert (first - second).abs().max() > 1e-3
        os.utime(tmp_path / "model/tokenizer.json", (1, 1))
        Tagger(tmp_path / "model", cache=tmp_path / "cache").scores([picture(0)], LABELS)
        assert texts == [5, 5, 5]

    @pytest.mark.parametrize("damage", ["cut", "empty", "noise", "flipped", "other", "folder"])
    def test_a_damaged_file_is_computed_again(
        self, model: Path, tmp_path: Path, texts: list[int], damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = tmp_path / "cache"
        expected = Tagger(model, cache=cache).scores([picture(0)], LABELS)
        (file,) = cache.iterdir()
        data = file.read_bytes()
        match damage:
            case "cut":
                file.write_bytes(data[:-7])
            case "empty":
                file.write_bytes(b"")
            case "noise":
                file.write_bytes(os.urandom(len(data)))
            case "flipped":
                file.write_bytes(data[:-100] + bytes(byte ^ 1 for byte in data[-100:-99]) + data[-99:])
            case "other":
                Tagger(model, cache=cache).scores([picture(0)], LABELS[::-1])
                (other,) = {*cache.iterdir()} - {file}
                other.replace(file)
                texts.clear()
                texts.append(5)
            case "folder":
                file.unlink()
                file.mkdir()
        assert torch.equal(Tagger(model, cache=cache).scores([picture(0)], LABELS), expected)
        assert texts == [5, 5]
        assert "is damaged and computed again" in caplog.text
        if damage != "folder":
            assert file.read_bytes() == data
            Tagger(model, cache=cache).scores([picture(0)], LABELS)
            assert texts == [5, 5]

    def test_the_file_is_plain_safetensors_with_a_header(self, model: Path, tmp_path: Path) -> None:
        tagger = Tagger(model, cache=tmp_path / "cache")
        tagger.scores([picture(0)], LABELS)
        (file,) = (tmp_path / "cache").iterdir()
        assert load_file(file)["labels"].shape == (5, 32)
        size = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + size])["__metadata__"]
        assert json.loads(header["siglane"])["key"] == file.stem

    def test_a_cache_that_cannot_be_written_costs_only_time(
        self, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").write_text("")
        tagger = Tagger(model, cache=tmp_path / "file" / "cache")
        assert tagger.scores([picture(0)], LABELS).shape == (1, 5)
        assert "the label matrix is not kept" in caplog.text

    def test_memory_holds_a_few(self, tagger: Tagger) -> None:
        for number in range(9):
            tagger.scores([], [f"label {number}"])
        assert len(tagger._cache._recent) == 4

    def test_disk_holds_those_used_last(self, tmp_path: Path) -> None:
        def get(cache: LabelCache, number: int) -> torch.Tensor:
            return cache.get(["{label}"], [f"label {number}"] * 100, lambda: torch.full((100, 25), float(number)))

        def on_disk() -> int:
            return len(list(tmp_path.glob("*.safetensors")))

        mine = tmp_path / "weights.safetensors"  # of somebody else
        mine.write_bytes(bytes(100_000))
        os.utime(mine, (0, 0))
        for number in range(4):
            get(LabelCache(tmp_path, b"state", 45_000), number)
        assert on_disk() == 5
        first, *_, last = sorted(set(tmp_path.glob("*.safetensors")) - {mine}, key=lambda file: file.stat().st_mtime_ns)
        os.utime(first, (1, 1))
        get(LabelCache(tmp_path, b"state", 45_000), 0)
        assert first.stat().st_mtime > 1, "what is read counts as used"
        get(LabelCache(tmp_path, b"state", 45_000), 4)
        assert on_disk() == 5
        assert first.exists()
        assert last.exists()
        assert mine.exists()
        get(LabelCache(tmp_path, b"other model", 1), 5)
        assert on_disk() == 2, "the newest stays, however large"

    def test_its_place(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        assert default_folder() == tmp_path / ".cache/siglane/labels"
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
        assert default_folder() == tmp_path / "x/siglane/labels"


class TestLabels:
    def write(self, folder: Path, data: bytes) -> Path:
        (folder / "labels.txt").write_bytes(data)
        return folder / "labels.txt"

    def test_a_file(self, tmp_path: Path) -> None:
        data = "\ufeffcat\r\n dog \r\ncafé {x}\u2028y\r\n".encode()
        assert read_labels(self.write(tmp_path, data)) == ("cat", "dog", "café {x}\u2028y")
        assert read_labels(self.write(tmp_path, b"one")) == ("one",)
        brackets = b"[sic]\n{curly}\n[1] one"
        assert read_labels(self.write(tmp_path, brackets)) == ("[sic]", "{curly}", "[1] one")

    @pytest.mark.parametrize(
        ("data", "complaint"),
        [
            (b"", "labels.txt holds no labels"),
            (b"\n", "labels.txt holds no labels"),
            (b"cat\n\ndog\n", "labels.txt, line 2 is empty"),
            (b"cat\n  \n", "labels.txt, line 2 is empty"),
            (b"cat\ndog\n cat\n", "labels.txt, line 3 repeats 'cat' of .*labels.txt, line 1"),
            (b"cat\n\xff\xfe\n", "labels.txt, line 2 is not UTF-8"),
            (b'["a cat", "a dog"]', "labels.txt holds JSON"),
            (b'[\n "a cat",\n "a dog"\n]\n', "labels.txt holds JSON"),
            (b'{"label": "a cat"}\n{"label": "a dog"}\n', "labels.txt holds JSON"),
            (b'{"0": "a cat",\n"1": "a dog"}', "labels.txt holds JSON"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, data: bytes, complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            read_labels(self.write(tmp_path, data))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"cannot read .*labels.txt: No such file"):
            read_labels(tmp_path / "labels.txt")

    @pytest.mark.parametrize(
        ("labels", "complaint"),
        [
            ([], "labels is empty"),
            ("cat", "must be a list of strings"),
            (["cat", 3], "must be a list of strings"),
            (["cat", " "], r"labels\[1\] is empty"),
            (["cat", "dog", "cat "], r"labels\[2\] repeats 'cat' of labels\[0\]"),
            (["cat", "\ud800"], r"labels\[1\] is not Unicode"),
        ],
    )
    def test_bad_labels(self, tagger: Tagger, labels: Any, complaint: str) -> None:
        for method in (tagger.tag, tagger.scores):
            with pytest.raises(UserError, match=complaint):
                method([picture(0)], labels)

    def test_a_cut_label_is_reported(self, tagger: Tagger, caplog: pytest.LogCaptureFixture) -> None:
        labels = ["cat", *(f"{number} " + "word " * 500 for number in range(5))]
        tagger.scores([picture(0)], labels)
        (message,) = caplog.messages
        assert message.startswith("5 labels are longer than the 64 tokens the model reads: '0 word word")
        assert "(63 of " in message
        assert message.endswith("and 2 more")

    def test_a_label_that_siglip_deletes_is_reported(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        write_two_tower_checkpoint(tmp_path)
        Tagger(tmp_path, cache=tmp_path / "cache").scores([picture(0)], ["cat", "+++"])
        assert caplog.messages == ["1 labels hold nothing that the model reads: '+++'"]

    @pytest.mark.parametrize("templates", [(), ("a photo",), ("{label}", "{}"), "{label}"])
    def test_bad_templates(self, model: Path, templates: Any) -> None:
        with pytest.raises(UserError, match="template"):
            Tagger(model, templates=templates)

    def test_braces_are_text(self, model: Path, tmp_path: Path) -> None:
        tagger = Tagger(model, cache=tmp_path / "cache", templates=("{a} {label}",))
        ours = tagger._matrix(("{label} {0}",))
        assert torch.equal(ours, tagger.embed_texts(["{a} {label} {0}"]))


class TestSettings:
    def toml(self, folder: Path, text: str) -> Path:
        (folder / "siglane.toml").write_text(text)
        return folder / "siglane.toml"

    def test_defaults(self, tmp_path: Path) -> None:
        expected = TagSettings(
            enabled=True, model=None, batch_size=0, attention="auto", dtype="auto", quantization="none", device="auto",
            confidence_threshold=0.01, max_tags=50, max_num_patches=None,
        )  # fmt: skip
        assert read_settings() == expected
        assert read_settings(self.toml(tmp_path, "[plugins.other]\nx = 1\n")) == expected

    def test_file_environment_flags(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = self.toml(
            tmp_path,
            '[plugins.siglip]\nmodel = "a"\nbatch_size = 4\nattention = "sdpa"\nconfidence_threshold = 0\n'
            "max_tags = 7\n",
        )
        monkeypatch.setenv("SIGLANE_BATCH_SIZE", "5")
        monkeypatch.setenv("SIGLANE_MAX_TAGS", "8")
        found = read_settings(file, {"max_tags": 9})
        assert found == TagSettings(model="a", batch_size=5, attention="sdpa", confidence_threshold=0.0, max_tags=9)
        monkeypatch.setenv("SIGLANE_MAX_TAGS", "0")
        with pytest.raises(UserError, match=r"max_tags must be at least 1, got 0 \(from SIGLANE_MAX_TAGS\)"):
            read_settings(file)

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("batch = 3", "plugins.siglip: key 'batch' is not known; siglane reads enabled, model, batch_size"),
            ('batch_size = "3"', "plugins.siglip: batch_size must be int"),
            ("batch_size = true", "batch_size must be int"),
            ("batch_size = -1", "plugins.siglip: batch_size must not be negative"),
            ("enabled = 1", "enabled must be bool"),
            ('attention = "flash"', "attention 'flash' is not known"),
            ('quantization = "3bit"', "quantization '3bit' is not known"),
            ("confidence_threshold = 2.0", "plugins.siglip: confidence_threshold must be between 0 and 1"),
            ("max_num_patches = 0", "max_num_patches must be at least 1"),
            ("model", "is not valid TOML"),
        ],
    )
    def test_a_bad_file(self, tmp_path: Path, line: str, complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            read_settings(self.toml(tmp_path, f"[plugins.siglip]\n{line}\n"))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"cannot read .*No such file"):
            read_settings(tmp_path / "none.toml")

    def test_a_section_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="must be an object"):
            read_settings(self.toml(tmp_path, "plugins = 3\n"))

    def test_a_high_threshold_is_warned_of(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        read_settings(self.toml(tmp_path, "[plugins.siglip]\nconfidence_threshold = 0.5\n"))
        assert "confidence_threshold 0.5 leaves out almost everything" in caplog.text

    def test_a_tagger_of_settings(self, model: Path, naflex: Path, tmp_path: Path, caplog: Any) -> None:
        caplog.set_level(logging.INFO, logger="siglane")  # a command that ran before leaves warnings only
        found = Tagger.from_settings(TagSettings(model=str(model)), cache=tmp_path / "cache")
        assert (
            "tagging on cpu, torch.float32, 8 pictures a batch; texts: lower case, punctuation kept, 64" in caplog.text
        )
        assert "does not apply" not in caplog.text
        assert "vision attention: onednn (cpu, torch.float32, asked for auto)" in caplog.text
        direct = Tagger(model, cache=tmp_path / "cache")
        assert torch.equal(found.scores([picture(0)], LABELS), direct.scores([picture(0)], LABELS))
        Tagger.from_settings(TagSettings(model=str(model), max_num_patches=64), cache=tmp_path / "cache")
        assert "max_num_patches 64 does not apply to this model" in caplog.text
        wide = Tagger.from_settings(TagSettings(model=str(naflex), max_num_patches=100), cache=tmp_path / "cache")
        same = Tagger(naflex, max_num_patches=100, cache=tmp_path / "cache")
        assert torch.equal(wide.embed_images([picture(0)]), same.embed_images([picture(0)]))
        unset = Tagger.from_settings(TagSettings(model=str(naflex)), cache=tmp_path / "cache")
        own = Tagger(naflex, cache=tmp_path / "cache")
        assert torch.equal(unset.embed_images([picture(0)]), own.embed_images([picture(0)]))
        assert not torch.equal(unset.embed_images([picture(0)]), wide.embed_images([picture(0)]))

    @pytest.mark.parametrize(
        ("settings", "complaint"),
        [
            (TagSettings(enabled=False, model="x"), "tagging is switched off"),
            (TagSettings(), "no model is given"),
            (TagSettings(model="/nowhere"), "there is no folder"),
        ],
    )
    def test_settings_without_a_tagger(self, settings: TagSettings, complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            Tagger.from_settings(settings)

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"quantization": "3bit", "device": "cpu"}, "quantization '3bit' is not known"),
            ({"attention": "flash_attention_2", "device": "cpu"}, "attention 'flash_attention_2' cannot run on cpu"),
            ({"attention": "flash"}, "attention 'flash' is not known; use auto, sdpa, eager, flash_attention_2"),
            ({"dtype": "float8"}, "dtype 'float8' is not known"),
            ({"device": "tpu"}, "device 'tpu' is not known"),
            ({"batch_size": -2}, "batch_size must not be negative"),
            ({"max_num_patches": 64}, "max_num_patches does not apply"),
        ],
    )
    def test_options_that_cannot_be_used(self, model: Path, options: dict[str, Any], complaint: str) -> None:
        with pytest.raises(UserError, match=complaint):
            Tagger(model, **options)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_transformers_names_of_attention(self, model: Path, tmp_path: Path, attention: Any) -> None:
        found = Tagger(model, attention=attention, cache=tmp_path / "cache").embed_images([picture(0)])
        expected = Tagger(model, cache=tmp_path / "cache").embed_images([picture(0)])
        assert torch.allclose(found, expected, atol=1e-6)  # eager sums in another order

    def test_a_dtype_is_checked_before_the_model_is_read(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="dtype"):
            Tagger(tmp_path, dtype="double")  # type: ignore[arg-type]
