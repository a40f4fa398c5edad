"""The loss curve of a run as a picture, where matplotlib is installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

CURVE = "loss.png"
POINTS = 200  # of the smoothed line


def draw_curve(log: Path, picture: Path) -> bool:
    """Draws the losses of a `log.jsonl`; False, and nothing is drawn, without matplotlib or without a step."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if not rows:
        return False
    steps, losses = np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows])
    groups = np.array_split(np.arange(len(rows)), min(len(rows), POINTS))
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.8", linewidth=0.8)
    axes.plot([steps[group].mean() for group in groups], [losses[group].mean() for group in groups], color="tab:blue")
    axes.set(xlabel="step", ylabel="sigmoid loss per image", ylim=(0, None))
    figure.savefig(picture, dpi=150)
    return True
