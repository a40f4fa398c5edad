"""A verification as one HTML page that needs nothing else: verdict, pictures, a plot by hand, tables."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from html import escape
from itertools import groupby, pairwise

from siglane.verify.pictures import thumbnail
from siglane.verify.stages import Comparison, Picture, Report, summary

# the first diverging stage keeps its colour for itself; cases take turns
COLOURS = ("#2563eb", "#059669", "#9333ea", "#ca8a04", "#0891b2", "#db2777")
BAD = "#dc2626"
LEFT, RIGHT, PANEL, GAP, LABELS = 78, 24, 190, 46, 112
KEY_WIDTH, KEY_HEIGHT = 92, 20  # of one case in the legend
STEP, NARROWEST = 17, 1100  # pixels between two stages; of the plot
FAINT = 'stroke="currentColor" stroke-opacity="0.15"'
SMALLEST = {"max abs error": 1e-9, "1 − min cosine": 1e-13}  # nothing below is told apart from zero

STYLE = """
:root { color-scheme: light dark; --ink: #1c2026; --muted: #6c727c; --line: #dededa; --paper: #fafaf8; --card: #fff }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e4; --muted: #9aa0a8; --line: #3a3e45; --paper: #16181c; --card: #1e2126 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 40px auto;
  max-width: 1180px; padding: 0 24px }
h1 { font-size: 26px; margin: 0 0 4px } h2 { font-size: 17px; margin: 36px 0 10px }
p { margin: 4px 0 } .muted { color: var(--muted) }
.verdict { border-left: 5px solid #059669; background: var(--card); padding: 12px 18px; margin: 20px 0 }
.verdict.bad { border-color: #dc2626 }
.pictures { display: flex; flex-wrap: wrap; gap: 18px } figure { margin: 0 }
figure div { width: 168px; height: 120px; display: flex; align-items: center; justify-content: center;
  background: var(--card); border: 1px solid var(--line) }
figure img { max-width: 160px; max-height: 112px; min-width: 3px; min-height: 3px; image-rendering: pixelated }
figcaption { font-size: 13px; max-width: 168px; overflow-wrap: anywhere }
.plot { overflow-x: auto; background: var(--card); border: 1px solid var(--line) }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100% }
th, td { text-align: right; padding: 4px 12px; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; color: var(--muted) } td.text, th.text { text-align: left } td.note { white-space: normal }
tr.bad td { color: #dc2626 } tr.first td { font-weight: 600 }
summary { cursor: pointer; margin: 28px 0 10px; font-weight: 600 }
"""


def html(report: Report) -> str:
    """The whole page, ASCII but for what names contain."""
    body = "\n".join((
        f"<h1>{escape(report.model)}</h1>",
        f'<p class="muted">{escape(report.family)}, {report.dtype} on {escape(report.device)}, '
        f"compared with {escape(report.reference)}</p>",
        _verdict(report),
        "<h2>Pictures</h2>" if report.pictures else "",
        f'<div class="pictures">{"".join(_figure(*one) for one in enumerate(report.pictures))}</div>',
        f"<p class='muted'>Asked: {escape(report.prompt)}</p>" if report.prompt else "",
        "<h2>Error and cosine at each stage</h2>",
        f'<div class="plot">{plot(report)}</div>',
        "<h2>Stages, the worst of all cases</h2>",
        _table([summary(cases) for _, cases in report.stages()], report, with_case=False),
        "<details><summary>Every case</summary>",
        _table(list(report.comparisons), report, with_case=True),
        "</details>",
    ))  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>siglane verify: {escape(report.model)}'
        f'</title><meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n"
    )


def verdict(report: Report) -> str:
    """One sentence."""
    stages = list(report.stages())
    failed = report.first_diverging
    if failed is not None:
        first = summary(next(cases for stage, cases in stages if stage == failed))
        reason = first.note or f"mean cosine {first.mean_cosine:.6f}, min {first.min_cosine:.6f}"
        return f"diverges at {failed} ({first.case}): {reason}"
    bar = f"min cosine above {report.threshold:g}"
    if any(one.min_threshold not in (None, report.threshold) for one in report.comparisons):
        bar = f"each above the thresholds of its kind for {report.quantization}"
    text = f"all {len(stages)} stages agree with {report.reference} ({bar})"
    if report.first_inexact is not None:
        text += f"; {report.first_inexact} is the first that is not exact in float32, a cause may be worth finding"
    return text


def _verdict(report: Report) -> str:
    text = verdict(report)
    return f'<div class="verdict{"" if report.ok else " bad"}">{escape(text[:1].upper() + text[1:])}.</div>'


def _figure(number: int, picture: Picture) -> str:
    data = b64encode(thumbnail(picture)).decode()
    return (
        f'<figure><div><img alt="" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>image.{number}: {escape(picture.name)}<br>"
        f'<span class="muted">{picture.width} x {picture.height}</span></figcaption></figure>'
    )


def _table(rows: Sequence[Comparison], report: Report, *, with_case: bool) -> str:
    case = '<th class="text">case</th>' if with_case else ""
    head = f'<th class="text">stage</th>{case}<th class="text">shape</th><th>max abs error</th><th>mean cosine</th>'
    head += '<th>min cosine</th><th>scale</th><th>ok</th><th class="text">note</th>'
    return f"<table><tr>{head}</tr>{''.join(_row(one, report, with_case) for one in rows)}</table>"


def _row(one: Comparison, report: Report, with_case: bool) -> str:
    classes = "" if one.ok else "bad first" if one.stage == report.first_diverging else "bad"
    case = f'<td class="text">{escape(one.case)}</td>' if with_case else ""
    numbers = (
        number(one.max_abs_error, ".2e"),
        number(one.mean_cosine, ".8f"),
        number(one.min_cosine, ".8f"),
        number(one.scale, ".6f"),
        "yes" if one.ok else "no",
    )
    cells = "".join(f"<td>{text}</td>" for text in numbers)
    return (
        f'<tr class="{classes}"><td class="text">{escape(one.stage)}</td>{case}<td class="text">{shape(one)}</td>'
        f'{cells}<td class="text note">{escape(one.note)}</td></tr>'
    )


def number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def shape(one: Comparison) -> str:
    """`864 x 128`, and the reference's where it differs."""
    sides = [" x ".join(map(str, side)) if side else "none" for side in (one.shape, one.reference_shape)]
    return sides[0] if sides[0] == sides[1] else f"{sides[0]} / {sides[1]}"


def plot(report: Report) -> str:
    """SVG: two panels over the stages, a line per case, both on logarithmic axes."""
    stages = [stage for stage, _ in report.stages()]
    cases = list(dict.fromkeys(one.case for one in report.comparisons))
    width = max(NARROWEST, LEFT + STEP * len(stages) + RIGHT)
    step = (width - LEFT - RIGHT) / max(1, len(stages))
    places = {stage: LEFT + (index + 0.5) * step for index, stage in enumerate(stages)}
    legend, top = _legend(cases, width)
    bars = {one.stage: 1 - one.min_threshold for one in report.comparisons if one.min_threshold is not None}
    measures: tuple[tuple[str, Callable[[Comparison], float | None], dict[str, float]], ...] = (
        ("max abs error", lambda one: one.max_abs_error, {}),
        ("1 − min cosine", lambda one: None if one.min_cosine is None else 1 - one.min_cosine, bars),
    )
    parts = [legend]
    for index, (title, measure, limits) in enumerate(measures):
        parts.append(_panel(report, places, cases, title, measure, limits, top + index * (PANEL + GAP), width))
    bottom = top + 2 * PANEL + GAP
    parts += [_label(report, stage, x, bottom + 14) for stage, x in places.items()]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + LABELS}" viewBox="0 0 {width} '
        f'{bottom + LABELS}" font-family="system-ui, sans-serif" font-size="12" fill="currentColor" role="img" '
        f'aria-label="error and cosine at each stage">{"".join(parts)}</svg>'
    )


def _panel(
    report: Report,
    places: dict[str, float],
    cases: Sequence[str],
    title: str,
    measure: Callable[[Comparison], float | None],
    limits: dict[str, float],
    top: float,
    width: float,
) -> str:
    floor = SMALLEST[title]
    measured = {(one.case, one.stage): measure(one) for one in report.comparisons}
    values = {key: max(floor, value) for key, value in measured.items() if value is not None}
    logs = [math.log10(value) for value in [*values.values(), *limits.values()]] or [0.0]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)

    def y(value: float) -> float:
        return top + PANEL * (high - math.log10(value)) / (high - low)

    parts = [f'<text x="{LEFT}" y="{top - 10}" font-weight="600">{title}</text>']
    every = -(-(high - low) // 6)
    for exponent in range(low, high + 1, every):
        line = y(10.0**exponent)
        below = "≤" if 10.0**exponent <= floor else ""
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{line:.1f}" y2="{line:.1f}" {FAINT}/>')
        parts.append(f'<text x="{LEFT - 8}" y="{line + 4:.1f}" text-anchor="end">{below}1e{exponent}</text>')
    parts += _bars(limits, places, y, width)
    for index, case in enumerate(cases):
        points = [(places[stage], y(value), stage, value) for (of, stage), value in values.items() if of == case]
        parts.append(_line(report, points, case, COLOURS[index % len(COLOURS)], title))
    return "".join(parts)


def _bars(
    limits: dict[str, float], places: dict[str, float], y: Callable[[float], float], width: float
) -> Iterator[str]:
    """The thresholds of neighbouring stages, one line where they are equal."""
    half, text = (width - LEFT - RIGHT) / max(1, len(places)) / 2, ""
    for limit, stages in groupby(places, limits.get):
        if limit is not None:
            xs = [places[stage] for stage in stages]
            title = f"threshold {1 - limit:g}"
            yield (
                f'<line x1="{xs[0] - half:.1f}" x2="{xs[-1] + half:.1f}" y1="{y(limit):.1f}" y2="{y(limit):.1f}" '
                f'stroke="{BAD}" stroke-dasharray="5 4"/>'
            )
            if title != text:
                yield f'<text x="{xs[0] - half + 4:.1f}" y="{y(limit) - 5:.1f}" fill="{BAD}">{title}</text>'
            text = title


def _line(
    report: Report, points: Sequence[tuple[float, float, str, float]], case: str, colour: str, title: str
) -> str:  # fmt: skip
    failed = {one.stage for one in report.comparisons if one.case == case and not one.ok}
    parts = [
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{other:.1f}" y2="{height:.1f}" stroke="{colour}" stroke-width="1.5"/>'
        for (x, y, *_), (other, height, *_) in pairwise(points)
    ]
    for x, y, stage, value in points:
        bad = stage in failed
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{5 if bad else 3.2}" fill="{BAD if bad else colour}">'
            f"<title>{escape(stage)}, {escape(case)}: {title} {value:.3g}</title></circle>"
        )
    return "".join(parts)


def _label(report: Report, stage: str, x: float, y: float) -> str:
    first = stage == report.first_diverging
    style = f' fill="{BAD}" font-weight="600"' if first else ""
    turned = f'transform="rotate(-55 {x:.1f} {y:.1f})"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="end" {turned}{style}>{escape(stage)}</text>'


def _legend(cases: Sequence[str], width: float) -> tuple[str, int]:
    """The cases' colours, and where the first panel begins below them."""
    across = max(1, int((width - LEFT - RIGHT) // KEY_WIDTH))
    parts = []
    for index, case in enumerate(cases):
        x, y = LEFT + 4 + index % across * KEY_WIDTH, 18 + index // across * KEY_HEIGHT
        parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{COLOURS[index % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 9}" y="{y + 4}">{escape(case)}</text>')
    return "".join(parts), 40 + -(-len(cases) // across) * KEY_HEIGHT
