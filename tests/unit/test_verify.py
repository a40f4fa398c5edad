"""How traces are compared, what a report says, the command's exit codes, and that references are independent."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from checkpoints import write_nvila_checkpoint, write_siglip_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file

import siglane.verify
from siglane.cli.main import main
from siglane.verify import Report, verify
from siglane.verify.bars import Thresholds
from siglane.verify.golden import FORMAT, load_golden
from siglane.verify.pictures import SHAPES, draw_pictures
from siglane.verify.report import html
from siglane.verify.stages import Bars, Comparison, compare, compare_traces, packing, place, summary

FLOATS = Thresholds(0.99).of
NEAR = FLOATS("features")
REFERENCES = Path(siglane.verify.__file__).parent / "references"
Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def model(nvila_folder: Path) -> str:
    return str(nvila_folder)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_siglip_checkpoint(tmp_path_factory.mktemp("verify") / "tower").folder)


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory, model: str) -> str:
    """The model's copy with another position table."""
    folder = tmp_path_factory.mktemp("verify") / "turned"
    written = write_nvila_checkpoint(folder).folder / "vision_tower/model.safetensors"
    state = load_file(written)
    name = "vision_model.embeddings.position_embedding.weight"
    save_file(state | {name: state[name].flip(0).contiguous()}, written)
    return str(folder)


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(seed))


class TestCompare:
    def test_equal_rows(self) -> None:
        found = compare("image.0", "features", rows(), rows(), NEAR)
        assert (found.ok, found.max_abs_error, found.shape, found.note) == (True, 0.0, (6, 32), "")
        assert found.min_cosine == pytest.approx(1)
        assert found.scale == pytest.approx(1)

    @pytest.mark.parametrize(
        ("change", "note"),
        [
            (lambda x: x.roll(1, 0), ""),
            (lambda x: torch.cat((x[:5], -x[5:])), ""),
            (lambda x: 1.02 * x, "siglane's values are 1.02 times the reference's"),
            (lambda x: 0.98 * x, "siglane's values are 0.98 times the reference's"),
            (torch.zeros_like, ""),
            (lambda x: x[:5], "the reference has shape [6, 32]"),
            (lambda x: x / 0, "siglane gives values that are not finite"),
        ],
        ids=["other order", "one row turned round", "too large", "too small", "nothing", "a row missing", "infinite"],
    )
    def test_what_differs_is_not_ok(self, change: Change, note: str) -> None:
        found = compare("image.0", "features", change(rows()), rows(), NEAR)
        assert not found.ok
        assert found.note == note

    def test_a_reference_that_is_broken_is_named(self) -> None:
        found = compare("image.0", "features", rows(), rows() * torch.nan, NEAR)
        assert found.note == "the reference gives values that are not finite"

    def test_the_bar_is_the_worst_row(self) -> None:
        ours = rows()
        ours[3] += 0.3 * rows(1)[3]
        found = compare("image.0", "features", ours, rows(), NEAR)
        expected = torch.cosine_similarity(ours.double(), rows().double())
        assert found.min_cosine == pytest.approx(expected.min().item())
        assert found.mean_cosine == pytest.approx(expected.mean().item())
        assert not found.ok
        assert compare("image.0", "features", ours, rows(), Bars(0.8, 0.8, 0.8)).ok

    def test_rows_of_almost_nothing_have_no_direction(self) -> None:
        """Black patches where nothing is normalised: 0 here, 1e-9 there."""
        ours, reference = rows(), rows()
        ours[2], reference[2] = 0.0, 1e-9
        assert compare("image.0", "preprocessing", ours, reference, NEAR).ok
        assert compare("image.0", "preprocessing", torch.zeros(2, 4), torch.zeros(2, 4), NEAR).ok

    def test_tokens_are_equal_or_not(self) -> None:
        ours, reference = torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])
        (found,) = compare_traces("together", {"tokens": ours}, {"tokens": reference}, FLOATS)
        assert (found.ok, found.note) == (False, "[1, 2, 3] instead of [1, 2, 4]")
        (found,) = compare_traces("together", {"tokens": ours}, {"tokens": ours}, FLOATS)
        assert (found.ok, found.note, found.min_cosine) == (True, "", None)

    def test_tokens_may_part_in_half_precision(self) -> None:
        logits = rows().bfloat16()
        ours = {"logits": logits, "tokens": torch.tensor([1])}
        found = compare_traces("image.0", ours, ours | {"tokens": torch.tensor([2])}, FLOATS)
        assert [one.ok for one in found] == [True, True]
        assert found[1].note == "[1] instead of [2]"

    def test_stages_stand_in_the_order_of_the_forward(self) -> None:
        names = ["logits", "block.10", "lm.block.2", "block.9", "features", "preprocessing", "packing", "projector"]
        expected = ["preprocessing", "block.9", "block.10", "features", "projector", "packing", "lm.block.2", "logits"]
        assert sorted(names, key=place) == expected

    def test_a_stage_of_one_side(self) -> None:
        both = {"features": rows(), "block.0": rows()}
        found = compare_traces("image.0", both, both | {"block.1": rows()}, FLOATS)
        assert [(one.stage, one.ok) for one in found] == [("block.0", True), ("block.1", True), ("features", True)]
        assert found[1].note == "only the reference has it"
        found = compare_traces("image.0", both | {"pooled": rows()}, both, FLOATS)
        assert [(one.stage, one.ok) for one in found][-1] == ("pooled", False)

    def test_packing_finds_the_stage_where_pictures_touch(self) -> None:
        alone = [{"positions": rows(seed), "block.0": rows(seed + 9)} for seed in (0, 1)]
        packed = {stage: torch.cat([trace[stage] for trace in alone]) for stage in alone[0]}
        assert packing(alone, packed, NEAR).ok
        packed["block.0"] = packed["block.0"].roll(1, 0)
        found = packing(alone, packed, NEAR)
        assert (found.stage, found.ok, found.note) == ("packing", False, "first at block.0")

    def test_a_summary_is_the_worst_of_its_cases(self) -> None:
        good = compare("image.0", "features", rows(), rows(), NEAR)
        bad = compare("image.1", "features", rows()[:4].flip(0), rows()[:4], NEAR)
        found = summary([good, bad])
        assert (found.case, found.ok, found.shape) == ("image.1", False, (10, 32))
        assert found.min_cosine == bad.min_cosine
        assert found.max_abs_error == bad.max_abs_error
        assert good.mean_cosine is not None
        assert bad.mean_cosine is not None
        assert found.mean_cosine == pytest.approx((6 * good.mean_cosine + 4 * bad.mean_cosine) / 10)


def report_of(*comparisons: Comparison, dtype: str = "float32") -> Report:
    return Report(
        model="<b>tiny</b>", reference="transformers", family="siglip", device="cpu", dtype=dtype, threshold=0.99,
        prompt="What & where?", pictures=draw_pictures(1), comparisons=comparisons,
    )  # fmt: skip


def test_the_first_stage_that_is_not_ok_is_named() -> None:
    first = compare("image.0", "positions", rows(), rows(), NEAR)
    second = compare("image.0", "block.0", rows(1), rows(), NEAR)
    third = compare("image.0", "features", rows(2), rows(), NEAR)
    assert report_of(first).ok
    assert report_of(first, second, third).first_diverging == "block.0"


def test_a_stage_that_passes_but_is_not_exact_is_named_in_float32() -> None:
    near = compare("image.0", "block.0", rows() + 0.003 * rows(1), rows(), NEAR)
    assert near.ok
    assert report_of(near).first_inexact == "block.0"
    assert report_of(near, dtype="bfloat16").first_inexact is None
    assert report_of(compare("image.0", "block.0", rows(), rows(), NEAR)).first_inexact is None


class Page(HTMLParser):
    """Texts, elements and links of a page. An element that is never closed, or closed twice, is an error."""

    ALONE = ("meta", "br", "img", "line", "circle")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.elements: list[str] = []
        self.links: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_everything_and_needs_nothing_else() -> None:
    good = compare("image.0", "positions", rows(), rows(), NEAR)
    bad = compare("image.0", "lm.block.0", rows(1), rows(), NEAR)
    text = html(report_of(good, bad))
    page = Page(text)
    assert page.elements.count("svg") == 1
    assert page.elements.count("img") == 1
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert {"positions", "lm.block.0"} <= set(page.texts)
    assert any(line.startswith("Diverges at lm.block.0 (image.0)") for line in page.texts)
    assert "<b>tiny</b>" in page.texts
    assert "<b>" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_page_of_odd_reports_is_well_formed() -> None:
    shapes = compare("image.0", "features", rows()[:3], rows(), NEAR)
    (tokens,) = compare_traces(
        "image.0", {"tokens": torch.tensor([1])}, {"tokens": torch.tensor([2])}, Thresholds(0.99)
    )
    for report in (report_of(shapes, tokens), report_of(tokens), report_of()):
        assert "svg" in Page(html(report)).elements


def test_drawn_pictures_are_always_the_same_and_of_different_shapes() -> None:
    pictures = draw_pictures(9)
    assert pictures == draw_pictures(9)
    sizes = [(one.width, one.height) for one in pictures]
    assert tuple(sizes[: len(SHAPES)]) == SHAPES
    assert len(set(sizes)) == 9


def run(*words: str) -> int:
    return main(["verify", *words])


def test_a_model_that_agrees_is_exit_code_0(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, "--random", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "shape", "max", "abs", "error", "mean", "cosine", "min", "cosine", "ok"]
    assert lines[1].startswith("preprocessing")
    assert lines[-2].startswith("tokens")
    assert lines[-1].startswith("ok: all 13 stages agree with transformers")


def test_a_model_that_differs_is_exit_code_1(
    turned: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "report.html"
    assert run(turned, "--random", "1", "--reference", model, "--report", str(page)) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("NOT OK: diverges at positions (image.0)")
    assert any("Diverges at positions" in text for text in Page(page.read_text()).texts)


def test_the_json_document(turned: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(turned, "--random", "2", "--reference", model, "--steps", "3", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {
        "model", "family", "reference", "device", "dtype", "threshold", "quantization", "ok",
        "first_diverging_stage", "first_inexact_stage", "prompt", "images", "stages", "cases",
    }  # fmt: skip
    assert (found["ok"], found["first_diverging_stage"], found["family"]) == (False, "positions", "nvila")
    assert [image["width"] for image in found["images"]] == [317, 97]
    numbers = {"stage", "shape", "reference_shape", "max_abs_error", "mean_cosine", "min_cosine", "scale", "ok", "note"}
    numbers |= {"mean_threshold", "min_threshold"}
    assert all(set(row) == numbers for row in found["stages"])
    names = ["preprocessing", "patch_embedding", "positions", "block.0", "block.1", "features", "projector", "packing"]
    names += ["spliced", "lm.block.0", "lm.block.1", "logits", "tokens"]
    assert [row["stage"] for row in found["stages"]] == names
    cases = [row["case"] for row in found["cases"] if row["stage"] == "logits"]
    assert cases == ["image.0", "image.1", "together"]
    assert [row["case"] for row in found["cases"] if row["stage"] == "packing"] == ["packed"]
    tokens = next(row for row in found["stages"] if row["stage"] == "tokens")
    assert (tokens["shape"], tokens["min_cosine"]) == ([9], None)


def test_pictures_of_ones_own(tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Transparent, 16 bit, turned by EXIF and animated ones: siglane decodes them as the reference does."""
    grey = Image.frombytes("I;16", (20, 30), torch.arange(600, dtype=torch.int16).mul(100).numpy().tobytes())
    grey.save(tmp_path / "grey.png")
    noise = Image.effect_noise((90, 40), 80)
    Image.merge("RGBA", [noise, noise.rotate(90), noise.rotate(180), noise.rotate(270)]).save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[274] = 6
    noise.convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    noise.save(tmp_path / "moving.gif", save_all=True, append_images=[noise.rotate(90)])
    paths = [str(tmp_path / name) for name in ("grey.png", "clear.png", "turned.jpg", "moving.gif")]
    assert run(tower, "--images", *paths, "--threshold", "0.99999", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(image["image"], image["width"]) for image in found["images"]] == list(
        zip(paths, (20, 90, 40, 90), strict=True)
    )
    assert found["first_inexact_stage"] is None
    assert found["prompt"] is None


def test_the_function_takes_pictures_in_every_form(tower: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.effect_noise((60, 40), 90).save(path)
    report = verify(tower, [path, str(path), path.read_bytes(), Image.open(path), f"file://{path}"])
    assert report.ok
    assert [picture.width for picture in report.pictures] == [60] * 5
    assert len({comparison.case for comparison in report.comparisons}) == 5 + 2  # together, packed


def test_golden_values_stand_in_for_the_reference(
    model: str, turned: str, tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = str(tmp_path / "golden.safetensors")
    assert run(model, "--random", "2", "--prompt", " Count the circles. ", "--steps", "4", "--save-golden", golden) == 0
    stored = load_golden(Path(golden))
    assert (stored.prompt, stored.steps, stored.family) == ("Count the circles.", 4, "nvila")
    assert [picture.name for picture in stored.pictures] == ["random 317x211", "random 97x409"]
    capsys.readouterr()
    assert run(model, "--reference", golden, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["prompt"], found["reference"]) == ("Count the circles.", f"{golden} (transformers)")
    assert run(turned, "--reference", golden) == 1
    assert "diverges at positions" in capsys.readouterr().out
    assert run(tower, "--reference", golden) == 2
    assert "golden values of nvila, the model is of siglip" in capsys.readouterr().err
    assert run(model, "--reference", golden, "--random", "1") == 2
    assert "brings its own pictures" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tensors", "metadata", "complaint"),
    [
        ({"a": rows()}, {}, "its format is None"),
        ({"a": rows()}, {"format": FORMAT}, "it lacks or does not explain 'pictures'"),
        (
            {"image.0/feelings": rows()},
            {"format": FORMAT, "pictures": "[]", "prompt": "null", "family": "siglip", "reference": "x"},
            "'image.0/feelings'",
        ),
        (
            {"image.0/features": rows()},
            {"format": FORMAT, "pictures": '["a"]', "prompt": "null", "family": "siglip", "reference": "x"},
            "'picture.0'",
        ),
    ],
    ids=["another file", "no pictures", "unknown stage", "a picture missing"],
)
def test_a_file_that_holds_no_golden_values(
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str],
    complaint: str,
    tower: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    assert run(tower, "--reference", str(tmp_path / "x.safetensors")) == 2
    assert complaint in capsys.readouterr().err


MISTAKES: list[tuple[list[str], str]] = [
    (["/nowhere"], "there is no folder '/nowhere'"),
    (["EMPTY"], "has no config.json"),
    (["UNKNOWN"], "model_type 'bert'"),
    (["TOWER", "--images", "/nowhere.png"], "/nowhere.png: cannot be read"),
    (["TOWER", "--images", "BROKEN"], "broken.png: the image cannot be decoded"),
    (["TOWER", "--images", "BROKEN", "--random", "2"], "--images and --random exclude each other"),
    (["TOWER", "--random", "0"], "random must be between 1 and 64, got 0"),
    (["TOWER", "--threshold", "1"], "threshold must be at least 0 and below 1"),
    (["MODEL", "--steps", "-1"], "steps must be between 0 and 256"),
    (["MODEL", "--prompt", " "], "the prompt is empty"),
    (["TOWER", "--device", "toaster"], "device 'toaster' is not known"),
    (["TOWER", "--dtype", "int8"], "is not one of float32, bfloat16, float16"),
    (["TOWER", "--reference", "MODEL"], "is a checkpoint of nvila, the model is of siglip"),
    (["TOWER", "--reference", "EMPTY"], "is no checkpoint that siglane has a reference for"),
    (["TOWER", "--reference", "/nowhere"], "there is no folder '/nowhere'"),
    (["TOWER", "--reference", "/nowhere.safetensors"], "/nowhere.safetensors holds no golden values"),
    (["TOWER", "--report", "/nowhere/report.html"], "there is no folder /nowhere"),
    (["TOWER", "--save-golden", "/"], "it is a folder"),
]


@pytest.mark.parametrize(("words", "complaint"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str], complaint: str, model: str, tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in (("empty", None), ("unknown", '{"model_type": "bert"}')):
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "config.json").write_text(text)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n nothing behind it")
    places = {"MODEL": model, "TOWER": tower, "EMPTY": tmp_path / "empty", "UNKNOWN": tmp_path / "unknown"}
    places["BROKEN"] = broken
    assert run(*(str(places.get(word, word)) for word in words)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("siglane: error: ")
    assert complaint in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("config.json", "the reference does not understand its configuration: KeyError('vision_config')"),
        ("model.safetensors", "is not a usable safetensors file"),
    ],
)
def test_a_reference_that_cannot_be_loaded(
    file: str, complaint: str, tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_siglip_checkpoint(tmp_path / "other").folder
    (other / file).write_text('{"model_type": "siglip"}')
    assert run(tower, "--reference", str(other), "--random", "1") == 2
    assert complaint in capsys.readouterr().err


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] == "siglane"}


@pytest.mark.parametrize("path", sorted(REFERENCES.glob("*.py")), ids=lambda path: path.name)
def test_a_reference_computes_nothing_with_siglane(path: Path) -> None:
    """Only errors, its own room and the names of the stages: a mistake in a config, a plan or a layout must show."""
    allowed = ("siglane.errors", "siglane.verify.references", "siglane.verify.stages")
    assert all(name.startswith(allowed) for name in imports_of(path)), imports_of(path)


def test_stages_need_nothing_of_siglane() -> None:
    """The one file that both sides import."""
    assert imports_of(REFERENCES.parent / "stages.py") == set()
    assert PurePosixPath(REFERENCES.name) == PurePosixPath("references")


def test_the_report_is_a_plain_document(tower: str) -> None:
    report = verify(tower, random=1)
    document: dict[str, Any] = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["ok"] is True
    assert document["stages"][0]["shape"] == [16, 588]
