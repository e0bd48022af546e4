"""Picture panels of several arms put together: the same images side by side, as each arm sees them.

A panel is what `cosa.evaluation.pictures.draw_panels` draws; its layout is repeated here because drawing
there needs torch and cutting up here does not. A test holds both together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = ("image", "ground truth", "M", "M-dagger", "CPL", "SPL", "prediction")
TILE, GAP, HEADER, CAPTION = 128, 6, 22, 18
_HEADER = 52
_INK, _PAPER = (29, 33, 38), (255, 255, 255)
_COMMON = ("image", "ground truth")


def rows(panel: Image.Image) -> int:
    """How many images a panel shows; 0 where it is none that can be cut up."""
    count, rest = divmod(panel.height - HEADER, TILE + CAPTION + GAP)
    whole = rest == 0 and panel.width == GAP + len(COLUMNS) * (TILE + GAP)
    return count if whole else 0


def tile(panel: Image.Image, row: int, column: str) -> Image.Image:
    """One picture of a panel."""
    left = GAP + COLUMNS.index(column) * (TILE + GAP)
    top = HEADER + row * (TILE + CAPTION + GAP)
    return panel.crop((left, top, left + TILE, top + TILE))


def compose(panels: Mapping[str, Image.Image], columns: Sequence[str]) -> Image.Image | None:
    """Image and ground truth, then each of `columns` of every arm beside each other.

    Args:
        panels: By arm. One that shows other images than the first is left out.
        columns: Some of COLUMNS.

    Returns:
        None where there is nothing to show.
    """
    panels = _alike(panels)
    if not panels:
        return None
    first = next(iter(panels.values()))
    cells = [(column, "", first) for column in _COMMON]
    cells += [(column, arm, panel) for column in columns for arm, panel in panels.items()]
    width = GAP + len(cells) * (TILE + GAP)
    step = TILE + CAPTION + GAP
    whole = Image.new("RGB", (width, _HEADER + rows(first) * step), _PAPER)
    draw = ImageDraw.Draw(whole)
    for place, (column, arm, panel) in enumerate(cells):
        left = GAP + place * (TILE + GAP)
        _write(draw, left, column, arm)
        for row in range(rows(first)):
            whole.paste(tile(panel, row, column), (left, _HEADER + row * step))
    for row in range(rows(first)):  # the names of images and classes that stand under each row
        top = HEADER + row * step + TILE
        legend = first.crop((0, top, min(width, first.width), top + CAPTION))
        whole.paste(legend, (0, _HEADER + row * step + TILE))
    return whole


def _alike(panels: Mapping[str, Image.Image]) -> dict[str, Image.Image]:
    """Those that show the same images as the first one that can be cut up."""
    known = {arm: panel for arm, panel in panels.items() if rows(panel)}
    if not known:
        return {}
    first = next(iter(known.values()))
    return {arm: panel for arm, panel in known.items() if _same_images(first, panel)}


def _same_images(one: Image.Image, other: Image.Image) -> bool:
    return rows(one) == rows(other) and all(
        np.array_equal(np.asarray(tile(one, row, "image")), np.asarray(tile(other, row, "image")))
        for row in range(rows(one))
    )


def _write(draw: ImageDraw.ImageDraw, left: int, column: str, arm: str) -> None:
    """A column's title over two lines, as large as its width allows: it must be legible on a phone."""
    middle = left + TILE // 2
    for text, y in ((column, 14 if arm else _HEADER // 2), (arm, 38)):
        size = next((s for s in range(21, 9, -1) if draw.textlength(text, _font(s)) <= TILE), 9)
        draw.text((middle, y), text, fill=_INK, font=_font(size), anchor="mm")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
