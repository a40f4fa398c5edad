"""`benchmark/soak.py`, for seconds: clients that leave and err lose nothing and mix nothing up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmark/soak.py"


@pytest.mark.slow
def test_clients_that_come_go_and_err(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SCRIPT), "--seconds", "12", "--clients", "40", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["left"] > 0
    assert {"bad picture 400", "a call 200", "schema 200", "two pictures 200"} <= report["answered"].keys()
    assert report["bars"]["no wrong answer"] == [True, "0"]
    assert out.with_suffix(".png").stat().st_size > 10_000
