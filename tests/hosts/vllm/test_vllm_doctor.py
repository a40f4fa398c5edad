"""What can go wrong before the first request inside the real vLLM: `siglane doctor --host vllm` says it, and a model
that siglane cannot serve as asked stops the start."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_nvila_checkpoint
from host_broken import BROKEN, break_behind_view
from host_process import HostError
from nanovlm_checkpoint import write_nanovlm_checkpoint
from ovis2_5_checkpoint import write_ovis2_5_checkpoint
from safetensors.torch import load_file, save_file
from vllm_host import HERE, PYTHON, Imported, environment, vllm_server

from siglane.hosts.view import write_view
from siglane.weights.hub import Checkpoint

SECONDS = 600  # for one command, with everybody else on the same two cores
REPLY = "@@ "
PAGE = HERE.parents[2] / "docs" / "vllm.md"


def write_models(root: Path) -> dict[str, str]:
    """Those that siglane takes, those that are vLLM's own, and broken ones."""
    write_nanovlm_checkpoint(root / "nanovlm", names="untied")
    write_nvila_checkpoint(root / "vila")
    write_ovis2_5_checkpoint(root / "vllm's own")
    (root / "unknown").mkdir()
    (root / "unknown/config.json").write_text('{"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}')
    for name in ("missing weight", "wrong value", "wrong width"):
        write_nanovlm_checkpoint(root / name, names="untied")
    state = load_file(root / "missing weight/model.safetensors")
    del state["MP.proj.weight"]
    save_file(state, root / "missing weight/model.safetensors", metadata={"format": "pt"})
    change(root / "wrong value/config.json", mp_pixel_shuffle_factor="three")
    change(root / "wrong width/config.json", vit_inter_dim=48)
    return {folder.name: str(folder) for folder in root.iterdir()}


def change(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def scenarios(models: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    done = subprocess.run(
        [str(PYTHON), str(HERE / "vllm_scenarios.py")],
        input=json.dumps(models), capture_output=True, text=True, timeout=SECONDS,
        env=environment({"SIGLANE_VLLM_VIEWS": str(tmp_path_factory.mktemp("views"))}),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix(REPLY) for line in done.stdout.splitlines() if line.startswith(REPLY)]
    return dict(json.loads(line) for line in lines)


def broken(findings: list[Any]) -> dict[str, str]:
    return {name: detail for name, is_broken, detail in findings if is_broken}


def test_nothing_is_wrong_here(scenarios: Mapping[str, Any]) -> None:
    found = {name: detail for name, _, detail in scenarios["as it should be"]}
    assert not broken(scenarios["as it should be"])
    assert set(found) == {"vllm", "configuration", "hook", "settings", "calls", "model"}


@pytest.mark.parametrize(
    ("scenario", "name", "reason"),
    [
        ("no entry point", "plugin", "no entry point in group vllm.general_plugins; install siglane again"),
        ("left out", "plugin", "VLLM_PLUGINS=other, another leaves siglane out; add it"),
        ("failing plugin", "plugin", "AttributeError: "),
        ("hook replaced", "hook", "somebody else replaced it"),
        ("bad setting", "settings", "SIGLANE_ENCODER_PARALLEL"),
        ("changed signatures", "vllm.inputs:mm_input", "has no parameter mm_kwargs, mm_hashes, mm_placeholders"),
        (
            "changed signatures",
            "vllm.multimodal.processing:BaseMultiModalProcessor._merge_mm_kwargs",
            "not in this version",
        ),
        ("broken model", "imports", "siglane.hosts.vllm.model"),
    ],
)
def test_the_doctor_finds(scenarios: Mapping[str, Any], scenario: str, name: str, reason: str) -> None:
    assert reason in broken(scenarios[scenario])[name]


def test_another_version_is_a_note(scenarios: Mapping[str, Any]) -> None:
    findings = scenarios["another version"]
    assert findings[0] == ["vllm", False, "0.40.0; siglane is tested with 0.32.0"]
    assert not broken(findings)


def test_the_plugin_can_run_twice(scenarios: Mapping[str, Any]) -> None:
    assert scenarios["registered again"] is True


def test_which_models_are_taken(scenarios: Mapping[str, Any], models: Mapping[str, str]) -> None:
    found = scenarios["each model"]
    for name in ("nanovlm", "vila"):
        assert Path(found[name]["model"]).name.startswith(f"{name}-")
        assert found[name]["served_model_name"] == models[name]
    for name in ("vllm's own", "unknown"):
        assert (found[name]["model"], found[name]["served_model_name"]) == (models[name], None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing weight", "WeightError: "),
        ("missing weight", "vision.projector.layers.0.weight"),
        ("wrong value", "ConfigError: "),
        ("wrong value", "mp_pixel_shuffle_factor"),
        ("wrong width", "WeightError: "),
        ("wrong width", "shape"),
    ],
)
def test_a_broken_checkpoint_is_refused_with_a_reason(scenarios: Mapping[str, Any], name: str, reason: str) -> None:
    found = scenarios["each model"][name]
    assert reason in found
    assert "\n" not in found


def test_what_would_leave_siglane_out_is_refused(scenarios: Mapping[str, Any]) -> None:
    for found, named in zip(
        scenarios["refused arguments"],
        ("enable_mm_embeds=True", "allowed_media_domains=['a.b']", "model_impl=transformers"),
        strict=True,
    ):
        assert f"cannot be served with {named}" in found
    assert "VLLM_MEDIA_CONNECTOR is http; unset it" in scenarios["another connector"]


def test_the_path_of_a_model_becomes_that_of_its_view(scenarios: Mapping[str, Any], models: Mapping[str, str]) -> None:
    plain, again, named = scenarios["twice and named"]
    assert again["model"] == plain["model"] == named["model"]
    assert (plain["served_model_name"], named["served_model_name"]) == (models["nanovlm"], "eyes")
    assert plain["tokenizer"] == named["tokenizer"] is None


def test_what_becomes_of_media(scenarios: Mapping[str, Any]) -> None:
    found = scenarios["media"]
    assert found["fields"] == [{"detail": "low"}, {"detail": "low"}, {"detail": "high"}]
    assert found["refused later"] == "UserError: image[1]: a data URL must have the form data:image/png;base64,…"
    assert found["audio"] == "UserError: this model does not read audio"
    assert found["uuid alone"].startswith("UserError: image[0]: siglane takes the media themselves, not a uuid")
    assert found["pictures"] == {"image": [[6, 4], [3, 2], [6, 4]]}
    assert found["a picture"] == {"image": [[6, 4]]}
    assert found["frames"] == {"video": [[[6, 4], [6, 4]]]}
    assert found["videos"] == {"video": [[[6, 4]], [[6, 4], [6, 4]]]}
    assert found["floats"].endswith("got float64 [2, 3, 3]")


def test_every_option_that_the_page_names_exists(scenarios: Mapping[str, Any]) -> None:
    inline = {word for part in PAGE.read_text().split("`")[1::2] for word in part.split() if word.startswith("--")}
    assert len(inline) > 4
    others = {"--host", "--no-deps", "--target"}  # the doctor's and pip's
    assert inline - others <= set(scenarios["options"])


def test_the_command_and_its_self_test() -> None:
    command = [str(PYTHON.with_name("siglane")), "doctor", "--host", "vllm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment({}))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BROKEN" not in done.stdout
    assert "reads CAFE from cafe.png" in done.stdout.splitlines()[-1]


def test_vllm_serve_stops_at_a_broken_checkpoint(models: Mapping[str, str], tmp_path: Path) -> None:
    env = {"SIGLANE_VLLM_VIEWS": str(tmp_path / "views")}
    with pytest.raises(HostError, match="ended with code 1") as caught, vllm_server(models["missing weight"], env=env):
        pass
    words = str(caught.value)
    assert "siglane.errors.WeightError: " in words
    assert "vision.projector.layers.0.weight" in words


@pytest.mark.parametrize("what", BROKEN)
def test_a_checkpoint_broken_behind_its_view_stops_the_start(what: str, tmp_path: Path, imported: Imported) -> None:
    write_nvila_checkpoint(tmp_path / "vila", layout="folders", lite=True)
    view = write_view(Checkpoint(tmp_path / "vila"), tmp_path / "views")
    message = break_behind_view(tmp_path / "vila", what)
    with pytest.raises(HostError, match="ended with code") as caught, vllm_server(view, env={}, imported=imported):
        pass
    assert message in caught.value.words
