"""What can go wrong before the first request: nothing of it ends in SGLang serving another model class in silence.

SGLang logs a plugin, model module or processor that fails and goes on; `siglane doctor --host sglang` must say so. A
model that siglane cannot serve as asked stops the start.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import write_nvila_checkpoint
from host_process import HostError
from nanovlm_checkpoint import write_nanovlm_checkpoint
from safetensors.torch import load_file, save_file
from sglang_host import ENVIRONMENT, sglang_server

import siglane
from siglane.errors import ConfigError, UserError, WeightError
from siglane.hosts.sglang.register import PACKAGES, point_at_view

SECONDS = 400  # for one command, with everybody else on the same two cores
HERE = Path(__file__).parent


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, **ENVIRONMENT, **env}
    return subprocess.run(command, env=everything, capture_output=True, text=True, timeout=SECONDS)


# --- the doctor ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenarios() -> Mapping[str, Any]:
    done = run(sys.executable, str(HERE / "sglang_scenarios.py"))
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


def broken(findings: list[Any]) -> dict[str, str]:
    return {name: detail for name, is_broken, detail in findings if is_broken}


def test_nothing_is_wrong_here(scenarios: Mapping[str, Any]) -> None:
    found = {name: detail for name, _, detail in scenarios["as it should be"]}
    assert not broken(scenarios["as it should be"])
    assert {"sglang", *PACKAGES, "configuration", "hook", "settings", "calls", "models", "processors"} == set(found)
    assert found["models"] == found["processors"] == "SiglaneForConditionalGeneration"


@pytest.mark.parametrize(
    ("scenario", "name", "reason"),
    [
        ("no entry point", "plugin", "no entry point in group sglang.srt.plugins; install siglane again"),
        ("left out", "plugin", "SGLANG_PLUGINS=other, another leaves siglane out; add it"),
        ("failing plugin", "plugin", "RuntimeError: broken on purpose"),
        ("another model package", "SGLANG_EXTERNAL_MODEL_PACKAGE", "is their.models; unset it, siglane needs"),
        ("another processor package", "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE", "is their.processors; unset it"),
        ("hook not applied", "hook", "SGLang did not apply it to sglang.srt.server_args.ServerArgs.resolve_once"),
        ("bad setting", "settings", "SIGLANE_ENCODER_PARALLEL"),
        ("changed signatures", "sglang.srt.managers.mm_utils:pad_mm_tokens", "has no parameter mm_inputs"),
        ("changed signatures", "sglang.srt.managers.mm_utils:general_mm_embed_routine", "not in this version"),
        (
            "changed signatures",
            "sglang.srt.managers.schedule_batch:MultimodalDataItem.set_identity",
            "has no parameter identity",
        ),
        ("broken processor", "imports", "processors.siglane_vlm"),
    ],
)
def test_the_doctor_finds(scenarios: Mapping[str, Any], scenario: str, name: str, reason: str) -> None:
    assert reason in broken(scenarios[scenario])[name]


def test_sglang_only_warns_of_a_model_module_that_cannot_be_imported(scenarios: Mapping[str, Any]) -> None:
    found = scenarios["broken model"]
    assert found["registry"] == []
    assert "models.siglane_vlm" in broken(found["findings"])["imports"]


def test_another_version_is_a_note(scenarios: Mapping[str, Any]) -> None:
    findings = scenarios["another version"]
    assert findings[0] == ["sglang", False, "0.6.0; siglane is tested with 0.5.23"]
    assert not broken(findings)


def test_the_plugin_can_run_twice(scenarios: Mapping[str, Any]) -> None:
    assert scenarios["registered again"] is True


def test_why_resolve_once_is_hooked(scenarios: Mapping[str, Any]) -> None:
    """SGLang's comments propose __post_init__, but msgspec has looked it up already when plugins are loaded."""
    assert scenarios["hooked __post_init__"] == {"__post_init__": 0, "resolve_once": 1}


def test_the_command_and_its_self_test() -> None:
    done = run(str(Path(sys.executable).with_name("siglane")), "doctor", "--host", "sglang")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKEN" not in done.stdout
    assert "reads CAFE from cafe.png" in done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def broken_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of siglane whose model module fails."""
    folder = tmp_path_factory.mktemp("broken")
    source = Path(siglane.__file__).parent
    shutil.copytree(source, folder / "siglane", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    (folder / "siglane" / "demo").symlink_to(source / "demo")
    module = folder / "siglane" / "hosts" / "sglang" / "models" / "siglane_vlm.py"
    module.write_text(module.read_text() + '\nraise RuntimeError("broken on purpose")\n')
    return folder


def test_the_command_fails_where_the_package_does(broken_package: Path) -> None:
    done = run(sys.executable, "-m", "siglane.cli.main", "doctor", "--host", "sglang", PYTHONPATH=str(broken_package))
    assert done.returncode == 1
    assert "BROKEN  imports              RuntimeError: broken on purpose" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("imports: RuntimeError: broken on purpose")
    assert "self-test" not in done.stdout


# --- the start of a model -----------------------------------------------------------------------------------------


@pytest.fixture
def views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As in a process where the plugin ran."""
    for variable, package in PACKAGES.items():
        monkeypatch.setenv(variable, package)
    monkeypatch.setenv("SIGLANE_SGLANG_VIEWS", str(tmp_path / "views"))
    monkeypatch.setenv("SGLANG_HTTP_SERVER_APP_PATH", "their.app:app")  # restored afterwards
    return tmp_path / "views"


def arguments(model: Path | str, **more: Any) -> SimpleNamespace:
    """SGLang's, as far as the hook reads them."""
    defaults = {
        "revision": None, "tokenizer_path": None, "served_model_name": None, "encoder_only": False,
        "language_only": False, "pp_size": 1,
    }  # fmt: skip
    return SimpleNamespace(model_path=str(model), **{**defaults, **more})


@pytest.fixture
def nanovlm(tmp_path: Path) -> Path:
    (tmp_path / "nanovlm").mkdir()
    write_nanovlm_checkpoint(tmp_path / "nanovlm", names="untied")
    return tmp_path / "nanovlm"


def test_the_path_of_a_model_becomes_that_of_its_view(nanovlm: Path, views: Path) -> None:
    plain, named = arguments(nanovlm), arguments(nanovlm, served_model_name="eyes", tokenizer_path=str(nanovlm))
    for one in (plain, named):
        point_at_view(one)
        assert Path(one.model_path).parent == views
        assert one.tokenizer_path is None
    assert (plain.served_model_name, named.served_model_name) == (str(nanovlm), "eyes")
    once = vars(plain).copy()
    point_at_view(plain)  # in SGLang's other processes
    assert vars(plain) == once


@pytest.mark.parametrize("option", ["encoder_only", "language_only", "pp_size"])
def test_what_would_leave_siglane_out_is_refused(nanovlm: Path, views: Path, option: str) -> None:
    with pytest.raises(UserError, match=f"cannot be served with {option}=2"):
        point_at_view(arguments(nanovlm, **{option: 2}))


@pytest.mark.parametrize("variable", PACKAGES)
def test_another_package_is_refused(nanovlm: Path, views: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "their.package")
    with pytest.raises(UserError, match=f"{variable} is their.package; unset it"):
        point_at_view(arguments(nanovlm))


def test_models_that_are_sglangs_own(tmp_path: Path, views: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVILA under transformers' names, unless asked; every model of no family; names of nothing. Nothing else of the
    environment matters to them."""
    (tmp_path / "qwen2").mkdir()
    (tmp_path / "qwen2" / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}')
    write_nvila_checkpoint(tmp_path / "nvila", layout="hf")
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "their.package")
    for model in (tmp_path / "qwen2", tmp_path / "nvila", tmp_path, "dummy", tmp_path / "missing"):
        before = arguments(model, pp_size=2)
        point_at_view(before)
        assert vars(before) == vars(arguments(model, pp_size=2))
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", PACKAGES["SGLANG_EXTERNAL_MODEL_PACKAGE"])
    monkeypatch.setenv("SIGLANE_SGLANG_OVERRIDE", "nvila")
    taken = arguments(tmp_path / "nvila")
    point_at_view(taken)
    assert Path(taken.model_path).parent == views


def missing_weight(folder: Path) -> str:
    file = folder / "model.safetensors"
    state = load_file(file)
    save_file({key: x for key, x in state.items() if key != "MP.proj.weight"}, file, metadata={"format": "pt"})
    return "vision.projector.layers.0.weight"  # the parameter that stays empty


def wrong_value(folder: Path) -> str:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mp_pixel_shuffle_factor": "three"}))
    return "mp_pixel_shuffle_factor"


def wrong_width(folder: Path) -> str:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"vit_inter_dim": config["vit_inter_dim"] + 8}))
    return "shape"


@pytest.mark.parametrize(
    ("damage", "kind"), [(missing_weight, WeightError), (wrong_value, ConfigError), (wrong_width, WeightError)]
)
def test_a_broken_checkpoint(nanovlm: Path, views: Path, damage: Any, kind: type[UserError]) -> None:
    named = damage(nanovlm)
    with pytest.raises(kind, match=named) as caught:
        point_at_view(arguments(nanovlm))
    assert "\n" not in str(caught.value)
    assert not list(views.glob("*"))


def last_words(model: Path, **env: str) -> str:
    """What `sglang serve` says last when it does not start."""
    with pytest.raises(HostError, match="ended with code 1") as caught, sglang_server(model, env=env):
        pass
    return str(caught.value).splitlines()[-1]


def test_sglang_serve_stops_at_a_broken_checkpoint(nanovlm: Path, views: Path) -> None:
    named = missing_weight(nanovlm)
    words = last_words(nanovlm)
    assert words.startswith("siglane.errors.WeightError: ")
    assert named in words


def test_sglang_serve_stops_where_another_package_is_set(nanovlm: Path, views: Path) -> None:
    words = last_words(nanovlm, SGLANG_EXTERNAL_MODEL_PACKAGE="their.models")
    assert words.startswith("siglane.errors.UserError: ")
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE is their.models; unset it" in words


def test_sglang_serve_stops_where_siglanes_model_cannot_be_imported(nanovlm: Path, broken_package: Path) -> None:
    """It does not fall back to transformers: a view is of a class that only siglane has."""
    words = last_words(nanovlm, PYTHONPATH=str(broken_package))
    assert "SiglaneForConditionalGeneration" in words
