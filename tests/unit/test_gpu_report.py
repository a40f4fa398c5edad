"""The report that a GPU's first run is: what its stages say reaches a file and a verdict, however they end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark import gpu_report
from benchmark.gpu_report import Stage, run, verdict

REPORT = Path(gpu_report.__file__)


def stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, seconds: int = 60) -> list[dict[str, object]]:
    script = tmp_path / "stages.py"
    script.write_text("import json, sys, time\n" + source)
    monkeypatch.setattr(gpu_report, "STAGES", script)
    return run(Stage("decode", seconds, quick=False), small=True, log=tmp_path / "decode.log")


def test_what_a_stage_says_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said, end = stage(monkeypatch, tmp_path, "print('a warning')\nprint(json.dumps({'argv': sys.argv[1:]}))")
    assert said == {"stage": "decode", "argv": ["decode", "--small"]}
    assert set(end) == {"stage", "seconds"}


def test_a_stage_that_dies_keeps_what_it_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said, end = stage(monkeypatch, tmp_path, "print('{\"ms\": 1}', flush=True)\nraise RuntimeError('no memory')")
    assert said["ms"] == 1
    assert end["error"] == "ended with 1; RuntimeError: no memory"
    assert "Traceback" in (tmp_path / "decode.log").read_text()


def test_a_stage_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said, end = stage(monkeypatch, tmp_path, "print('{\"ms\": 1}', flush=True)\ntime.sleep(600)", seconds=1)
    assert said["ms"] == 1
    assert end["error"] == "did not end within 1 s; nothing was logged"


def test_what_has_no_time_left_says_so(tmp_path: Path) -> None:
    (line,) = run(Stage("decode", 60, quick=False), small=True, log=tmp_path / "decode.log", left=3)
    assert line == {"stage": "decode", "error": "was not begun: no time was left, see --seconds"}


def test_a_part_that_raises_is_said_and_the_next_one_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = (
        f"sys.path.insert(0, {str(REPORT.parent)!r})\nfrom gpu_place import part, say\n"
        "with part('one'):\n    raise ValueError('wrong\\nmore')\nwith part('two'):\n    say(ms=2)"
    )
    first, second, end = stage(monkeypatch, tmp_path, source)
    assert first == {"stage": "decode", "part": "one", "error": "one: ValueError: wrong"}
    assert second == {"stage": "decode", "ms": 2}
    assert "error" not in end


def test_stages_are_those_that_are_asked_for() -> None:
    names = [one.name for one in gpu_report.planned(quick=True, names=None)]
    assert names == ["machine", "kernels", "answers"]
    assert [one.name for one in gpu_report.planned(quick=False, names=["tests", "tower"])] == ["tests", "tower"]
    assert gpu_report.planned(quick=False, names=None) == list(gpu_report.PLAN)


def test_a_stage_imports_the_package_of_this_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where another one, or none, is installed."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "siglane").mkdir()
    said, _ = stage(monkeypatch, tmp_path, "import siglane\nprint(json.dumps({'file': siglane.__file__}))")
    assert said["file"] == str(REPORT.resolve().parents[1] / "python" / "siglane" / "__init__.py")


def test_the_verdict_is_of_every_goal() -> None:
    met = {"stage": "tower", "goal": "tower of 8", "value": "61 %", "wanted": "at least 50 %", "passed": True}
    assert verdict([met], on_gpu=True) == ("ok     tower of 8: 61 % (at least 50 %)", 0)
    table, code = verdict([met, met | {"passed": False}], on_gpu=True)
    assert (table.splitlines()[1][:6], code) == ("MISSED", 1)
    table, code = verdict([met, {"stage": "decode", "error": "no memory"}], on_gpu=True)
    assert (table.splitlines()[1], code) == ("BROKEN stage decode: no memory", 1)
    table, code = verdict([met], on_gpu=False)
    assert "No GPU" in table
    assert code == 2


@pytest.mark.slow
def test_every_stage_runs_without_a_gpu(tmp_path: Path) -> None:
    """On tiny shapes, and says so."""
    ended = subprocess.run([sys.executable, REPORT, "--out", tmp_path], capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "no time above counts" in ended.stdout
    lines = [json.loads(line) for line in (tmp_path / "gpu_report.jsonl").read_text().splitlines()]
    assert {line["stage"] for line in lines} == {one.name for one in gpu_report.PLAN}
    assert not [line for line in lines if "error" in line]
