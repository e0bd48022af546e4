"""A sheet of images with their masks laid over them, to be looked at before anything is trained."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from cosa.data.dataset import SegmentationDataset
from cosa.evaluation.pictures import palette
from cosa.structures import IGNORE

_COLUMNS, _TILE, _CAPTION, _GAP = 4, 300, 50, 8
_PAPER, _INK, _MARGIN = (255, 255, 255), (20, 20, 20), (235, 235, 235)


def draw_gallery(dataset: SegmentationDataset, count: int, seed: int) -> Image.Image:
    """A random sample of `count` images, the same for the same seed, in the order of the split.

    Classes have the colours of PASCAL VOC, pixels that are not counted are white. Under each image stand its
    name and the classes it is labelled with.
    """
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:count]
    rows = -(-len(chosen) // _COLUMNS)
    sheet = Image.new(
        "RGB", (_COLUMNS * (_TILE + _GAP) + _GAP, rows * (_TILE + _CAPTION + _GAP) + _GAP), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for place, index in enumerate(sorted(int(index) for index in chosen)):
        left = _GAP + place % _COLUMNS * (_TILE + _GAP)
        top = _GAP + place // _COLUMNS * (_TILE + _CAPTION + _GAP)
        sheet.paste(_tile(dataset, index), (left, top))
        _draw_caption(draw, dataset, index, left, top + _TILE)
    return sheet


def _tile(dataset: SegmentationDataset, index: int) -> Image.Image:
    picture = dataset.image(index)
    if dataset.has_masks:
        picture = overlay(picture, dataset.mask(index), len(dataset.classes) + 1)
    image = Image.fromarray(picture)
    image.thumbnail((_TILE, _TILE))
    tile = Image.new("RGB", (_TILE, _TILE), _MARGIN)
    tile.paste(image, ((_TILE - image.width) // 2, (_TILE - image.height) // 2))
    return tile


def overlay(
    picture: UInt8[np.ndarray, "h w 3"], mask: UInt8[np.ndarray, "h w"], k: int
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with the colours of the k classes laid over it; background stays as it is."""
    colours = np.full((IGNORE + 1, 3), 255, np.uint8)
    colours[:k] = palette(k)
    blended = (picture.astype(np.uint16) * 2 + colours[mask].astype(np.uint16) * 3) // 5
    shown: UInt8[np.ndarray, "h w 3"] = np.where((mask > 0)[..., None], blended, picture).astype(np.uint8)
    return shown


def _draw_caption(
    draw: ImageDraw.ImageDraw, dataset: SegmentationDataset, index: int, left: int, top: int
) -> None:
    """The name on one line, the classes beside their colours on two more; what does not fit is left out."""
    font = ImageFont.load_default(11)
    draw.text((left, top + 2), dataset.names[index], fill=_INK, font=font)
    colours = palette(len(dataset.classes) + 1)
    x, y = left, top + 18
    for place in dataset.labels[index].nonzero().flatten().tolist():
        width = 14 + int(draw.textlength(dataset.classes[place], font=font)) + 10
        if x + width > left + _TILE:
            x, y = left, y + 15
        if y > top + _CAPTION - 15:
            return
        red, green, blue = (int(value) for value in colours[place + 1])
        draw.rectangle((x, y + 1, x + 10, y + 11), fill=(red, green, blue))
        draw.text((x + 14, y), dataset.classes[place], fill=_INK, font=font)
        x += width
