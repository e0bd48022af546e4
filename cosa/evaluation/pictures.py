"""How images and classes look: one palette, one overlay, one heat map, one legend, one sheet of tiles.

Knows arrays and names, no networks. Classes have the colours of PASCAL VOC, white where nothing is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Float32, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from cosa.data.dataset import SegmentationDataset, palette
from cosa.structures import IGNORE

GAP = 6
"""Pixels between the tiles of a sheet."""
_SHEET_COLUMNS, _SHEET_TILE = 4, 300
_INK, _PAPER, _MARGIN = (32, 32, 32), (255, 255, 255), (236, 236, 236)
_COLOUR_SHARE, _HEAT_SHARE = 0.5, 0.65  # of a class's colour in an overlay, of heat in a heat map
_TITLE = 22  # height of a line of titles

_COLOURS = palette(256)
_COLOURS[IGNORE] = 255


def colourise(classes: Integer[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Each class in its colour, IGNORE in white."""
    colours: UInt8[np.ndarray, "h w 3"] = _COLOURS[classes]
    return colours


def index_png(classes: UInt8[np.ndarray, "h w"]) -> Image.Image:
    """The classes as palette indices in the colours of PASCAL VOC."""
    picture = Image.fromarray(classes)
    picture.putpalette(palette(256).tobytes())
    return picture


def overlay(
    image: UInt8[np.ndarray, "h w 3"], classes: UInt8[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The image under its classes' colours, white lines where classes meet; background stays as it is."""
    mixed = cv2.addWeighted(colourise(classes), _COLOUR_SHARE, image, 1 - _COLOUR_SHARE, 0)
    shown = np.where((classes > 0)[:, :, None], mixed, image)
    shown[1:][classes[1:] != classes[:-1]] = 255
    shown[:, 1:][classes[:, 1:] != classes[:, :-1]] = 255
    return shown


def heat_map(
    image: UInt8[np.ndarray, "h w 3"], activation: Float32[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """An activation in [0, 1] in heat colours over the image in grey."""
    heat = cv2.applyColorMap((255 * activation).round().astype(np.uint8), cv2.COLORMAP_INFERNO)
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2BGR)
    mixed = cv2.addWeighted(heat, _HEAT_SHARE, grey, 1 - _HEAT_SHARE, 0)
    shown: UInt8[np.ndarray, "h w 3"] = cv2.cvtColor(mixed, cv2.COLOR_BGR2RGB)
    return shown


def legend(
    classes: Sequence[int], names: Sequence[str], width: int, *, size: int, title: str = "", lines: int = 0
) -> UInt8[np.ndarray, "h w 3"]:
    """A strip that names classes beside their colours.

    Args:
        classes: Indices in [1, k).
        names: Of the foreground classes 1 ... k - 1.
        width: Pixels.
        size: Of the letters, pixels.
        title: Text before them.
        lines: Lines of the strip, dots at the end of the last for what does not fit; 0 takes as many as the
            classes need.
    """
    font, step = ImageFont.load_default(size), 3 * size // 2
    entries = [*([(0, title)] if title else []), *((index, names[index - 1]) for index in classes)]
    strip = Image.new("RGB", (width, step * max(lines, len(entries), 1)), _PAPER)
    draw = ImageDraw.Draw(strip)
    x, y = size // 2, 0
    for index, text in entries:
        length = math.ceil(font.getlength(text)) + (step if index else 0)
        if x > size // 2 and x + length > width:
            x, y = size // 2, y + step
        if index:
            draw.rectangle((x, y + 2, x + size, y + size + 2), fill=tuple(_COLOURS[index].tolist()))
        draw.text((x + step * bool(index), y + step // 2), text, fill=_INK, font=font, anchor="lm")
        x += length + size
    if lines and y >= lines * step:
        draw.rectangle((width - 2 * size, (lines - 1) * step, width, lines * step), fill=_PAPER)
        draw.text((width - 2, lines * step - step // 2), "...", fill=_INK, font=font, anchor="rm")
    return np.asarray(strip)[: lines * step or y + step]


def place(height: int, width: int, side: int) -> tuple[int, int, int, int]:
    """Left, top, width and height in a tile of this side of a picture of this size."""
    scale = side / max(height, width)
    shown_width, shown_height = max(1, round(width * scale)), max(1, round(height * scale))
    return (side - shown_width) // 2, (side - shown_height) // 2, shown_width, shown_height


def tile(
    picture: UInt8[np.ndarray, "h w 3"], side: int, *, smooth: bool = True
) -> UInt8[np.ndarray, "_s _s 3"]:
    """The picture as large as a square allows, in the middle of it, its proportions kept."""
    left, top, width, height = place(picture.shape[0], picture.shape[1], side)
    resampling = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    square = Image.new("RGB", (side, side), _MARGIN)
    square.paste(Image.fromarray(picture).resize((width, height), resampling), (left, top))
    return np.asarray(square)


def name_peaks(
    square: UInt8[np.ndarray, "s s 3"], maps: Float32[np.ndarray, "n h w"], names: Sequence[str]
) -> UInt8[np.ndarray, "s s 3"]:
    """Write each map's name where it is most activated, as long as no other name is in the way."""
    picture = Image.fromarray(square)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(10)
    height, width = maps.shape[1:]
    side = len(square)
    left, top, shown_width, shown_height = place(height, width, side)
    taken: list[tuple[float, ...]] = []
    for name, activation in zip(names, maps, strict=True):
        if not activation.any():
            continue
        y, x = divmod(int(activation.argmax()), width)
        half = draw.textlength(name, font=font) / 2 + 2
        centre = (
            min(max(left + (x + 0.5) * shown_width / width, half), max(half, side - half)),
            min(max(top + (y + 0.5) * shown_height / height, 8), side - 8),
        )
        box = draw.textbbox(centre, name, font=font, anchor="mm", stroke_width=2)
        if not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            draw.text(centre, name, _PAPER, font, anchor="mm", stroke_width=2, stroke_fill=_INK)
            taken.append(box)
    return np.asarray(picture)


def sheet(
    tiles: UInt8[np.ndarray, "rows columns h w 3"],
    *,
    titles: Sequence[str] = (),
    legends: UInt8[np.ndarray, "rows _h _w 3"] | None = None,
) -> Image.Image:
    """Tiles in rows and columns.

    Args:
        tiles: All of one size.
        titles: One over each column, perhaps of several lines; as large as the width of a tile allows.
        legends: A strip under each row; what is wider than the sheet is cut off.
    """
    rows, columns, height, width, _ = tiles.shape
    header = _TITLE * max((title.count("\n") + 1 for title in titles), default=0)
    step = height + GAP + (0 if legends is None else legends.shape[1])
    whole = Image.new("RGB", (GAP + columns * (width + GAP), (header or GAP) + rows * step), _PAPER)
    draw = ImageDraw.Draw(whole)
    for column, title in enumerate(titles):
        for line, text in enumerate(title.split("\n")):
            fonts = (ImageFont.load_default(size) for size in range(16, 8, -1))
            font = next((f for f in fonts if draw.textlength(text, f) <= width), ImageFont.load_default(8))
            middle = (GAP + column * (width + GAP) + width // 2, _TITLE * line + _TITLE // 2)
            draw.text(middle, text, fill=_INK, font=font, anchor="mm")
    for row in range(rows):
        top = (header or GAP) + row * step
        for column in range(columns):
            whole.paste(Image.fromarray(tiles[row, column]), (GAP + column * (width + GAP), top))
        if legends is not None:
            whole.paste(Image.fromarray(legends[row]), (0, top + height))
    return whole


def draw_sample(dataset: SegmentationDataset, count: int, seed: int) -> Image.Image:
    """A random sample of `count` images, the same for the same seed, in the order of the split.

    Masks are laid over the images. Under each stand its name and the classes it is labelled with.
    """
    shown = []
    for index in sorted(np.random.default_rng(seed).permutation(len(dataset))[:count].tolist()):
        picture = dataset.image(index)
        if dataset.has_masks:
            picture = overlay(picture, dataset.mask(index))
        present = (dataset.labels[index].nonzero().flatten() + 1).tolist()
        caption = legend(present, dataset.classes, _SHEET_TILE, size=11, title=dataset.names[index], lines=3)
        shown.append(np.concatenate([tile(picture, _SHEET_TILE), caption]))
    shown += [np.full_like(shown[0], 255)] * (-len(shown) % _SHEET_COLUMNS)
    return sheet(np.stack(shown).reshape(-1, _SHEET_COLUMNS, *shown[0].shape))
