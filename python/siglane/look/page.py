"""The page that `siglane look` draws: the source with its tiles, what the tower gets, what the prompt becomes."""

from __future__ import annotations

from PIL import Image, ImageDraw

from siglane.look.drawing import INK, LINE, MUTED, PAPER, font, printable, stacked, text_at
from siglane.look.legend import chips, facts_panel, prompt_panel
from siglane.look.tiles import source_panel, tile_panel
from siglane.look.view import COLUMN, GROUP_GAP, GUTTER, MARGIN, View
from siglane.look.words import counted


def draw(view: View) -> Image.Image:
    """One page: header, source and tiles side by side, prompt below."""
    left = stacked([source_panel(view), facts_panel(view)], COLUMN, GROUP_GAP)
    right, prompt = tile_panel(view), prompt_panel(chips(view), 2 * COLUMN + GUTTER)
    top = MARGIN + 128
    body = max(left.height, right.height)
    page = Image.new("RGB", (2 * (MARGIN + COLUMN) + GUTTER, top + body + 88 + prompt.height + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    _header(pen, view)
    page.paste(left, (MARGIN, top))
    page.paste(right, (MARGIN + COLUMN + GUTTER, top))
    below = top + body + 36
    pen.line([(MARGIN, below), (page.width - MARGIN, below)], LINE, 2)
    medium = "video" if view.layout.frames else "picture"
    becomes = f"In the prompt the {medium} becomes" if view.speaks else "The tower gives"
    text_at(pen, (MARGIN, below + 14), becomes, 20, MUTED)
    page.paste(prompt, (MARGIN, below + 52))
    return page


def _header(pen: ImageDraw.ImageDraw, view: View) -> None:
    layout = view.layout
    text_at(pen, (MARGIN, MARGIN - 8), printable(view.name), 38, INK, bold=True)
    facts = [
        f"{layout.source.width} x {layout.source.height} pixels",
        *([counted(layout.frames, "frame")] if layout.frames else []),
        counted(len(layout.tiles), "tile"),
        counted(layout.patches, "patch", "patches"),
        counted(layout.image_tokens, "image token" if view.speaks else "row"),
        f"as {printable(view.model)} sees it",
    ]
    x = MARGIN
    for number, fact in enumerate(facts):
        if number:
            text_at(pen, (x + 12, MARGIN + 50), "·", 24, MUTED)
            x += 30
        strong = number == len(facts) - 2
        text_at(pen, (x, MARGIN + 50), fact, 24, INK if strong else MUTED, bold=strong)
        x += int(font(24).getlength(fact)) + 2
