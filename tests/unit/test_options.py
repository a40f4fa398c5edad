"""Flags and environment variables come from dataclasses: precedence, types, complaints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest

from siglane.cli.common import COMMON
from siglane.cli.doctor import DoctorOptions
from siglane.cli.main import command_options, main
from siglane.cli.verify import VerifyOptions
from siglane.config.preprocess import DecodeConfig
from siglane.errors import ConfigError, UserError
from siglane.hosts.settings import SglangHostConfig, VllmHostConfig
from siglane.media.policy import MediaPolicy
from siglane.settings.engine import EngineConfig
from siglane.settings.flags import OptionGroup, Parser, add_options, known_variables, read_file, read_options
from siglane.settings.media import MediaConfig
from siglane.settings.options import Option, options_of, read_environment
from siglane.settings.server import ServerConfig
from siglane.tiling.rule import ImageBudget
from siglane.types import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Example:
    name: str = field(metadata={"help": "100 % needed", "short": "-n"})
    count: int = 3
    share: float | None = None
    fast: bool = True
    colour: Literal["red", "blue"] = "red"
    folder: Path = Path("here")
    words: tuple[str, ...] = ()
    pairs: tuple[tuple[int, float], ...] = ()
    cache_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UserError(f"count must not be negative, got {self.count}", code="bad")


def read(*words: str, config: type[Any] = Example) -> Any:
    parser = Parser(prog="siglane test")
    add_options(parser, [OptionGroup(config, "example")])
    return read_options(config, parser.parse_args(words))


def test_defaults_are_the_dataclass_s() -> None:
    assert read("--name", "x") == Example(name="x")


def test_every_type_is_read_from_flags() -> None:
    words = "-n x --count 7 --share 0.5 --no-fast --colour blue --folder /tmp --words a b --words c --pairs 3:1.5 4:-2"
    found = read(*words.split(), "--cache-bytes", "2G")
    assert found == Example(
        name="x",
        count=7,
        share=0.5,
        fast=False,
        colour="blue",
        folder=Path("/tmp"),
        words=("a", "b", "c"),
        pairs=((3, 1.5), (4, -2.0)),
        cache_bytes=2 << 30,
    )


def read_without_flags() -> Example:
    return read_environment(Example)


@pytest.mark.parametrize("reader", [read, read_without_flags])
def test_every_type_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, reader: Any) -> None:
    values = {
        "NAME": "x",
        "COUNT": "7",
        "SHARE": "0.5",
        "FAST": "off",
        "COLOUR": "blue",
        "FOLDER": "/tmp",
        "WORDS": '["a,b", "c"]',
        "PAIRS": "3:1.5,4:-2",
        "CACHE_BYTES": "512k",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"SIGLANE_{name}", value)
    assert reader() == Example(
        name="x",
        count=7,
        share=0.5,
        fast=False,
        colour="blue",
        folder=Path("/tmp"),
        words=("a,b", "c"),
        pairs=((3, 1.5), (4, -2.0)),
        cache_bytes=512 << 10,
    )


def test_flag_wins_over_variable_and_variable_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read("-n", "x").count == 3
    monkeypatch.setenv("SIGLANE_COUNT", "4")
    assert read("-n", "x").count == 4
    assert read("-n", "x", "--count", "5").count == 5
    monkeypatch.setenv("SIGLANE_FAST", "0")
    assert read("-n", "x", "--fast").fast is True
    monkeypatch.setenv("SIGLANE_COUNT", "")
    assert read("-n", "x").count == 3


@pytest.mark.parametrize(
    ("variable", "value", "complaint"),
    [
        ("COUNT", "many", "SIGLANE_COUNT='many' is not a whole number"),
        ("SHARE", "half", "SIGLANE_SHARE='half' is not a number"),
        ("FAST", "maybe", "SIGLANE_FAST='maybe' is not a switch; use 1 or 0"),
        ("COLOUR", "green", "SIGLANE_COLOUR='green' is not one of red, blue"),
        ("PAIRS", "3", "SIGLANE_PAIRS='3' is not 2 values joined by ':'"),
        ("WORDS", "[1]", "SIGLANE_WORDS='[1]' is not a JSON list of strings"),
        ("WORDS", '["a"', "SIGLANE_WORDS="),
        ("COUNT", "-1", "count must not be negative, got -1 (from SIGLANE_COUNT)"),
    ],
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, complaint: str) -> None:
    monkeypatch.setenv(f"SIGLANE_{variable}", value)
    for reader in (lambda: read("-n", "x"), lambda: read_environment(Example, name="x")):
        with pytest.raises(UserError) as caught:
            reader()
        assert complaint in caught.value.message
        assert caught.value.param == f"SIGLANE_{variable}"


def test_a_bad_flag_is_not_blamed_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGLANE_SHARE", "0.5")
    with pytest.raises(UserError) as caught:
        read("-n", "x", "--count", "-1")
    assert caught.value.message == "count must not be negative, got -1"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--count many", "argument --count: 'many' is not a whole number"),
        ("--colour green", "argument --colour: 'green' is not one of red, blue"),
        ("--cou 4", "unrecognized arguments: --cou 4"),
        ("--count", "argument --count: expected one argument"),
    ],
)
def test_a_bad_flag_is_named(words: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        read("-n", "x", *words.split())
    assert caught.value.message == f"{complaint}; see siglane test --help"


def test_a_required_option_names_its_flag_and_variable() -> None:
    with pytest.raises(UserError, match=r"--name is missing; give it, or set SIGLANE_NAME"):
        read()


def test_help_shows_default_and_variable() -> None:
    parser = Parser(prog="siglane test")
    add_options(parser, [OptionGroup(Example, "example")])
    text = " ".join(parser.format_help().split())
    assert "100 % needed [SIGLANE_NAME]" in text
    assert "[default: 3, SIGLANE_COUNT]" in text
    assert "[default: on, SIGLANE_FAST]" in text
    assert "[default: 256M, SIGLANE_CACHE_BYTES]" in text


@pytest.mark.parametrize(
    "config", [EngineConfig, ServerConfig, SamplingParams, MediaConfig, SglangHostConfig, ImageBudget]
)
def test_the_real_configurations_have_flags_for_every_field(config: type[Any]) -> None:
    assert read(config=config) == config()
    assert all(option.help for option in options_of(config) if config is not SamplingParams)
    assert known_variables([config]) == {name for option in options_of(config) for name in option.variables}
    assert len({option.variable for option in options_of(config)}) == len(options_of(config))


def test_what_a_caller_gives_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGLANE_COUNT", "not read")
    monkeypatch.setenv("SIGLANE_SHARE", "0.5")
    assert read_environment(Example, name="x", count=9) == Example(name="x", count=9, share=0.5)
    with pytest.raises(UserError) as caught:
        read_environment(Example, name="x", count=-1)
    assert caught.value.message == "count must not be negative, got -1"


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for option in options_of(Example):
        monkeypatch.setenv(option.variable, "")
    assert read_environment(Example, name="x") == Example(name="x")


def test_a_required_variable_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="environment variable SIGLANE_NAME is missing"):
        read_environment(Example)


@dataclass(frozen=True, kw_only=True)
class Alike:
    """`dtype` is a part of the other name."""

    dtype: str = "a"
    vision_dtype: str = "b"

    def __post_init__(self) -> None:
        if self.vision_dtype == "bad":
            raise UserError("vision_dtype must not be bad", code="bad")


def test_a_name_inside_another_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGLANE_DTYPE", "c")
    with pytest.raises(UserError) as caught:
        read_environment(Alike, vision_dtype="bad")
    assert caught.value.message == "vision_dtype must not be bad"
    monkeypatch.setenv("SIGLANE_VISION_DTYPE", "bad")
    with pytest.raises(UserError) as caught:
        read_environment(Alike)
    assert caught.value.param == "SIGLANE_VISION_DTYPE"


def test_an_image_budget_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DETAIL": "low", "MAX_PIXELS": "4096", "GRID_PINPOINTS": "384:768,384:384"}.items():
        monkeypatch.setenv(f"SIGLANE_{name}", value)
    found = read_environment(ImageBudget)
    assert found == ImageBudget(detail="low", max_pixels=4096, grid_pinpoints=((384, 768), (384, 384)))
    monkeypatch.setenv("SIGLANE_MAX_TILES", "0")
    with pytest.raises(UserError, match=r"max_tiles must be at least 1, got 0 \(from SIGLANE_MAX_TILES\)"):
        read_environment(ImageBudget)


class TestMedia:
    def test_a_server_and_a_host_have_the_same_settings(self) -> None:
        common = [(one.name, one.default, one.metadata["help"]) for one in fields(MediaConfig)]
        for config in (ServerConfig, SglangHostConfig):
            assert [(one.name, one.default, one.metadata.get("help")) for one in fields(config)][
                : len(common)
            ] == common

    def test_the_defaults_are_those_of_a_stranger(self) -> None:
        assert MediaPolicy.of(MediaConfig()) == MediaPolicy()
        decode = MediaConfig().decode
        assert decode == DecodeConfig(formats=MediaConfig().image_formats, video_seconds=20.0)

    def test_every_setting_reaches_what_reads_it(self) -> None:
        config = MediaConfig(
            max_image_bytes=11,
            max_image_pixels=12,
            max_video_pixels=13,
            video_seconds=1.5,
            image_alpha="drop",
            image_16bit="clip",
            image_decode="fast",
            image_formats=("PNG", "TIFF"),
            allowed_local_media_path="/pictures",
            allow_http_images=False,
            allow_private_addresses=True,
            image_timeout=2.5,
            image_redirects=0,
        )
        assert MediaPolicy.of(config) == MediaPolicy(
            allowed_local_root=Path("/pictures"),
            allow_http=False,
            allow_private_addresses=True,
            max_bytes=11,
            timeout=2.5,
            max_redirects=0,
        )
        assert config.decode == DecodeConfig(
            alpha="drop",
            depth16="clip",
            jpeg="fast",
            max_pixels=12,
            formats=("PNG", "TIFF"),
            max_video_pixels=13,
            video_seconds=1.5,
        )

    @pytest.mark.parametrize("config", [MediaConfig, ServerConfig, SglangHostConfig])
    @pytest.mark.parametrize(
        ("name", "value", "complaint"),
        [
            ("max_image_bytes", 0, "must be at least 1, got 0"),
            ("max_video_bytes", 0, "must be at least 1, got 0"),
            ("max_image_pixels", 0, "must be at least 1, got 0"),
            ("max_video_pixels", -5, "must be at least 1, got -5"),
            ("max_image_patches", 0, "must be at least 1, got 0"),
            ("max_video_frames", 0, "must be at least 1, got 0"),
            ("max_images", -1, "must be at least 0, got -1"),
            ("max_videos", -1, "must be at least 0, got -1"),
            ("image_redirects", -1, "must be at least 0, got -1"),
            ("image_timeout", 0.0, "must be above 0, got 0.0"),
            ("video_seconds", math.nan, "must be above 0, got nan"),
        ],
    )
    def test_what_cannot_be_is_refused(self, config: type[Any], name: str, value: Any, complaint: str) -> None:
        with pytest.raises(ConfigError) as caught:
            config(**{name: value})
        assert caught.value.message == f"{name} {complaint}"

    def test_the_smallest_values_are_taken(self) -> None:
        config = MediaConfig(max_images=0, max_videos=0, image_redirects=0, max_image_bytes=1, max_video_frames=1)
        assert asdict(config) == asdict(MediaConfig()) | {
            "max_images": 0, "max_videos": 0, "image_redirects": 0, "max_image_bytes": 1, "max_video_frames": 1,
        }  # fmt: skip


class TestCommands:
    """One variable has one meaning, whichever commands read it."""

    @staticmethod
    def options() -> Iterator[tuple[str, Option]]:
        groups = {
            "all": COMMON,
            "hosts": (OptionGroup(SglangHostConfig, ""), OptionGroup(VllmHostConfig, "")),
            **command_options(),
        }
        yield from ((command, option) for command, found in groups.items() for g in found for option in g.options)

    def test_no_two_commands_read_one_variable_with_two_meanings(self) -> None:
        meanings: dict[str, dict[tuple[Any, ...], list[str]]] = {}
        for command, option in self.options():
            for variable in option.variables:
                meaning = (option.name, option.kind, option.choices, option.many, option.help)
                meanings.setdefault(variable, {}).setdefault(meaning, []).append(command)
        assert len(meanings) > 80
        assert {name: found for name, found in meanings.items() if len(found) > 1} == {}

    @pytest.mark.parametrize(
        ("command", "flag", "variable"),
        [
            ("verify", "--threshold", "SIGLANE_VERIFY_THRESHOLD"),
            ("tag", "--threshold", "SIGLANE_TAG_THRESHOLD"),
            ("doctor", "--host", "SIGLANE_DOCTOR_HOST"),
            ("serve", "--host", "SIGLANE_HOST"),
            ("demo", "--port", "SIGLANE_DEMO_PORT"),
            ("generate", "--video", "SIGLANE_GENERATE_VIDEO"),
            ("look", "--video", "SIGLANE_LOOK_VIDEO"),
            ("train", "--batch-size", "SIGLANE_TRAIN_BATCH_SIZE"),
            ("tag", "--batch-size", "SIGLANE_BATCH_SIZE"),
            ("train", "--seed", "SIGLANE_TRAIN_SEED"),
            ("generate", "--max-tokens", "SIGLANE_MAX_TOKENS"),
        ],
    )
    def test_a_commands_own_option_carries_its_name(self, command: str, flag: str, variable: str) -> None:
        (option,) = [one for owner, one in self.options() if owner == command and flag in one.flags]
        assert option.variable == variable

    def test_a_variable_of_one_command_does_not_reach_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SIGLANE_TAG_THRESHOLD", "0.5")
        monkeypatch.setenv("SIGLANE_HOST", "0.0.0.0")
        parsed = Parser().parse_args([])
        assert read_options(VerifyOptions, parsed) == VerifyOptions()
        assert read_options(DoctorOptions, parsed) == DoctorOptions()

    def test_an_older_name_is_still_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert read("--max-seq-len", "7", config=EngineConfig) == EngineConfig(max_batch_patches=7)
        monkeypatch.setenv("SIGLANE_MAX_SEQ_LEN", "8")
        assert read(config=EngineConfig).max_batch_patches == 8
        monkeypatch.setenv("SIGLANE_MAX_BATCH_PATCHES", "9")
        assert read(config=EngineConfig).max_batch_patches == 9


class TestFile:
    """`--config`: a table of the command's name; flags and variables win over it."""

    def read(self, tmp_path: Path, text: str, *words: str) -> Any:
        (tmp_path / "siglane.toml").write_text(text, encoding="utf-8")
        parser = Parser(prog="siglane example")
        groups = [OptionGroup(Example, "example")]
        add_options(parser, groups)
        parsed = parser.parse_args(words)
        parsed.command = "example"
        read_file(parsed, tmp_path / "siglane.toml", groups)
        return read_options(Example, parsed)

    def test_every_type(self, tmp_path: Path) -> None:
        text = (
            '[example]\nname = "x"\ncount = 7\nshare = 1\nfast = false\ncolour = "blue"\nfolder = "/tmp"\n'
            'words = ["a", "b"]\npairs = ["3:1.5"]\ncache_bytes = "2G"\n[other]\nunknown = 1\n'
        )
        assert self.read(tmp_path, text) == Example(
            name="x", count=7, share=1.0, fast=False, colour="blue", folder=Path("/tmp"), words=("a", "b"),
            pairs=((3, 1.5),), cache_bytes=2 << 30,
        )  # fmt: skip

    def test_flags_and_variables_win(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = '[example]\nname = "x"\ncount = 7\n'
        assert self.read(tmp_path, text).count == 7
        monkeypatch.setenv("SIGLANE_COUNT", "8")
        assert self.read(tmp_path, text).count == 8
        assert self.read(tmp_path, text, "--count", "9").count == 9

    @pytest.mark.parametrize(
        ("line", "complaint"),
        [
            ("colour = 'green'", "colour 'green' is not known"),
            ("count = '3'", "count must be int"),
            ("words = 'a'", "words must be a list"),
            ("pairs = ['3']", "is not 2 values joined by ':'"),
            ("cuont = 3", "key 'cuont' is not known; siglane reads name, count"),
            ("cache_bytes = '2X'", "is not a whole number"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, line: str, complaint: str) -> None:
        with pytest.raises(UserError, match=re.escape(complaint)):
            self.read(tmp_path, f"[example]\nname = 'x'\n{line}\n")

    def test_a_value_that_cannot_be_names_its_key(self, tmp_path: Path) -> None:
        file = tmp_path / "siglane.toml"
        file.write_text("[serve]\nmax_queue = 0\n", encoding="utf-8")
        groups = [OptionGroup(ServerConfig, "server")]
        parser = Parser(prog="siglane serve")
        add_options(parser, groups)
        parsed = parser.parse_args([])
        parsed.command = "serve"
        read_file(parsed, file, groups)
        with pytest.raises(UserError) as caught:
            read_options(ServerConfig, parsed)
        assert caught.value.message == f"max_queue must be at least 1, got 0 (from the key max_queue of {file})"

    @pytest.mark.parametrize(
        ("words", "variable", "complaint"),
        [
            (["tag", "-", "a.png"], "SIGLANE_TAG_THRESHOLD=3", "threshold must be between 0 and 1, got 3.0"),
            (["tag", "-", "a.png"], "SIGLANE_TAG_TOP_K=0", "top_k must be at least 1, got 0"),
            (["verify", "demo"], "SIGLANE_VERIFY_THRESHOLD=3", "threshold must be at least 0 and below 1, got 3.0"),
            (["serve", "demo"], "SIGLANE_DRAIN_TIMEOUT=-1", "drain_timeout must be at least 0, got -1.0"),
        ],
    )
    def test_a_variable_or_a_key_is_named_by_every_command(
        self,
        words: list[str],
        variable: str,
        complaint: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        (tmp_path / "labels.txt").write_text("a cat\n", encoding="utf-8")
        command, (name, _, value) = words[0], variable.partition("=")
        words = [*words, "--labels", str(tmp_path / "labels.txt")] if command == "tag" else words
        monkeypatch.setenv(name, value)
        assert main(words) == 2
        assert capsys.readouterr().err == f"siglane: error: {complaint} (from {name})\n"
        monkeypatch.delenv(name)
        key = name.removeprefix("SIGLANE_").removeprefix(f"{command.upper()}_").lower()
        file = tmp_path / "siglane.toml"
        file.write_text(f"[{command}]\n{key} = {value}\n", encoding="utf-8")
        assert main([*words, "--config", str(file)]) == 2
        assert capsys.readouterr().err == f"siglane: error: {complaint} (from the key {key} of {file})\n"
        assert main([*words, f"--{key.replace('_', '-')}={value}"]) == 2
        assert capsys.readouterr().err == f"siglane: error: {complaint}\n"  # a flag needs no other name

    def test_yaml_says_the_same(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "siglane.yaml"
        words = ["tokens", "demo", "--config", str(file)]
        file.write_text("tokens:\n  sizes: [640x480]\n  json: true\nserve:\n")
        assert main(words) == 0
        assert json.loads(capsys.readouterr().out)[0]["image"] == "640x480"
        for text, complaint in [
            ("tokens: [", "is not valid YAML: "),
            ("tokens: {json: 3}", "tokens: json must be bool, got 3"),
            ("tokens: {json: true, json: false}", "is not valid YAML: the key 'json' stands twice"),
            ("tokens: {1: 2}", "key '1' is not known"),
            ("tokens: !!python/object/apply:os.getcwd []", "is not valid YAML: could not determine a constructor"),
            ("- tokens", "must be an object, got list"),
            ("[" * 5000, "is not valid YAML: "),
        ]:
            file.write_text(text)
            assert main(words) == 2
            error = capsys.readouterr().err
            assert complaint in error
            assert error.count("\n") == 1

    def test_on_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "siglane.toml").write_text('[tokens]\nsizes = ["640x480"]\njson = true\n', encoding="utf-8")
        assert main(["tokens", "demo", "--config", str(tmp_path / "siglane.toml")]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert row["image"] == "640x480"
