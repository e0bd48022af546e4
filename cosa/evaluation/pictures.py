"""The picture panel of an evaluation: what the network makes of a few images, one row each.

Columns: image, ground truth, M, M-dagger, CPL, SPL, prediction. Maps are shown in the size of the image's
own mask. Label maps have the colours of PASCAL VOC, white where nothing is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cosa.config import EvaluationConfig
from cosa.data.dataset import normalise
from cosa.equations.cam import to_activation
from cosa.equations.pseudo_labels import cam_pseudo_labels, keep_labelled
from cosa.networks.multiscale import multiscale, resize
from cosa.networks.network import CosaNetwork
from cosa.structures import IGNORE, EvaluationBatch, FusedOutput

_COLUMNS = ("image", "ground truth", "M", "M-dagger", "CPL", "SPL", "prediction")
_TILE = 128
_GAP = 6
_HEADER = 22
_CAPTION = 18
_INK = (32, 32, 32)
_PAPER = (255, 255, 255)
_MARGIN = (236, 236, 236)
# From cold to hot, evenly spaced, ever lighter: also readable without colour.
_HEAT = np.array(
    [(13, 8, 60), (90, 15, 120), (190, 45, 95), (245, 120, 45), (252, 235, 130)], dtype=np.float64
)


@dataclass(frozen=True)
class PanelRow:
    """One image and all that is said of it, in the size of its mask."""

    name: str
    """The image's name in the split's list."""
    labels: Float[Tensor, " c"]
    """Image-level labels, 0 or 1."""
    image: UInt8[np.ndarray, "h w 3"]
    """RGB."""
    ground_truth: Int[Tensor, "h w"]
    """Classes in [0, k) or IGNORE; all IGNORE where the split has no masks."""
    activation: Float[Tensor, "n h w"]
    """Activations of M in [0, 1], of the n classes that the image is labelled with."""
    aux_activation: Float[Tensor, "n h w"]
    """Activations of M-dagger in [0, 1], of the same classes."""
    cpl: Int[Tensor, "h w"]
    """CAM pseudo-labels from M."""
    spl: Int[Tensor, "h w"]
    """The likeliest class of the segmentation pseudo-labels."""
    prediction: Int[Tensor, "h w"]
    """The likeliest class of the segmentation, label-free."""


def panel_indices(
    labels: Float[Tensor, "n c"], classes: tuple[str, ...], config: EvaluationConfig
) -> list[int]:
    """Which images of a split are shown: the same ones for every network and at every step.

    `evaluation.panel_choice` says which may be, `evaluation.panel_seed` draws from them; a split without an
    image of the classes of `evaluation.coexistence` shows others.
    """
    candidates = torch.arange(len(labels))[: config.max_images or None]
    if config.panel_choice == "coexistence":
        affected = [classes.index(name) for name in config.coexistence]
        chosen = candidates[labels[candidates][:, affected].sum(1) > 0]
        candidates = chosen if len(chosen) else candidates
    if config.panel_choice != "first":
        generator = torch.Generator().manual_seed(config.panel_seed)
        candidates = candidates[torch.randperm(len(candidates), generator=generator)]
    return sorted(candidates[: config.panel_images].tolist())


@torch.no_grad()
def panel_rows(
    network: CosaNetwork,
    batches: Iterable[EvaluationBatch],
    *,
    config: EvaluationConfig,
    xi: float,
    device: torch.device,
) -> list[PanelRow]:
    """What the network makes of the images of `batches`.

    Args:
        network: In evaluation mode, on `device`.
        batches: The images to show.
        config: Scales and flips.
        xi: The training's threshold of M, for the CPL.
        device: Where to compute.
    """
    rows: list[PanelRow] = []
    for batch in batches:
        size = (batch.images.shape[2], batch.images.shape[3])
        images = batch.images.to(device)
        fused = multiscale(network, images, scales=config.scales, flip=config.flip, size=size)
        rows += [_row(batch, fused, i, xi) for i in range(len(images))]
    return rows


def _row(batch: EvaluationBatch, fused: FusedOutput, index: int, xi: float) -> PanelRow:
    size, one = batch.sizes[index], slice(index, index + 1)
    labels = batch.labels[one]
    own = labels[0] > 0
    everywhere = torch.ones(1, *size, dtype=torch.bool)
    seg_logits = resize(fused.seg_logits[one], size).cpu()
    activation, aux_activation = (
        to_activation(resize(maps[one, own.to(maps.device)], size).cpu(), labels[:, own], everywhere)
        for maps in (fused.cam, fused.aux_cam)
    )
    return PanelRow(
        name=batch.names[index],
        labels=labels[0],
        image=_rgb(resize(batch.images[one], size)[0]),
        ground_truth=batch.masks[index] if batch.masks else torch.full(size, IGNORE),
        activation=activation[0],
        aux_activation=aux_activation[0],
        cpl=_own_pseudo_labels(activation, own, xi, everywhere),
        spl=keep_labelled(seg_logits, labels).argmax(1)[0],
        prediction=seg_logits.argmax(1)[0],
    )


def _own_pseudo_labels(
    activation: Float[Tensor, "1 n h w"], own: Bool[Tensor, " c"], xi: float, valid: Bool[Tensor, "1 h w"]
) -> Int[Tensor, "h w"]:
    """CPL from the maps of the image's own classes alone; background everywhere without one."""
    classes = torch.cat([torch.zeros(1, dtype=torch.int64), own.nonzero().flatten() + 1])
    if not own.any():
        return torch.zeros(activation.shape[2:], dtype=torch.int64)
    return classes[cam_pseudo_labels(activation, xi, valid)[0]]


def _rgb(normalised: Float[Tensor, "3 h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture a normalised image was made from."""
    black, white = normalise(np.array([0, 255], dtype=np.uint8)[:, None, None, None].repeat(3, axis=3))
    picture = ((normalised - black) / (white - black)).clamp(0, 1) * 255
    rgb: NDArray[np.uint8] = picture.round().byte().permute(1, 2, 0).numpy()
    return rgb


def palette(k: int) -> UInt8[np.ndarray, "k 3"]:
    """Colours of PASCAL VOC for classes 0 ... k - 1, black first: a class's bits, spread over RGB."""
    classes = np.arange(k)
    colours = np.zeros((k, 3), dtype=np.uint8)
    for level in range(8):
        for channel in range(3):
            bit = classes >> (3 * level + channel) & 1
            colours[:, channel] |= (bit << (7 - level)).astype(np.uint8)
    return colours


def draw_panels(rows: Sequence[PanelRow], classes: tuple[str, ...]) -> Image.Image:
    """Draw rows under one header, each with its image's name and the classes it is labelled with."""
    width = _GAP + len(_COLUMNS) * (_TILE + _GAP)
    height = _HEADER + len(rows) * (_TILE + _CAPTION + _GAP)
    panel = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(panel)
    for column, title in enumerate(_COLUMNS):
        middle = _GAP + column * (_TILE + _GAP) + _TILE // 2
        draw.text((middle, _HEADER // 2), title, fill=_INK, font=_font(13), anchor="mm")
    for index, row in enumerate(rows):
        top = _HEADER + index * (_TILE + _CAPTION + _GAP)
        for column, tile in enumerate(_tiles(row, classes)):
            panel.paste(tile, (_GAP + column * (_TILE + _GAP), top))
        _draw_legend(draw, row, classes, top + _TILE, width)
    return panel


def _tiles(row: PanelRow, classes: tuple[str, ...]) -> list[Image.Image]:
    """The pictures of a row, in the order of the columns."""
    named = [classes[index] for index in row.labels.nonzero().flatten().tolist()]
    heats = (
        _name_peaks(_tile(_heat(row.image, maps), Image.Resampling.BILINEAR), maps, named)
        for maps in (row.activation, row.aux_activation)
    )
    colours = np.full((IGNORE + 1, 3), 255, dtype=np.uint8)
    colours[: len(classes) + 1] = palette(len(classes) + 1)

    def label_map(labels: Int[Tensor, "h w"]) -> Image.Image:
        return _tile(colours[labels.numpy()], Image.Resampling.NEAREST)

    return [
        _tile(row.image, Image.Resampling.BILINEAR),
        label_map(row.ground_truth),
        *heats,
        *map(label_map, (row.cpl, row.spl, row.prediction)),
    ]


def _tile(picture: UInt8[np.ndarray, "h w 3"], resampling: Image.Resampling) -> Image.Image:
    """The picture as large as a tile allows, in the middle of it, its proportions kept."""
    tile = Image.new("RGB", (_TILE, _TILE), _MARGIN)
    left, top, width, height = _place(picture.shape[0], picture.shape[1])
    tile.paste(Image.fromarray(picture).resize((width, height), resampling), (left, top))
    return tile


def _place(height: int, width: int) -> tuple[int, int, int, int]:
    """Left, top, width and height in a tile of a picture of this size."""
    scale = _TILE / max(height, width)
    shown_width, shown_height = max(1, round(width * scale)), max(1, round(height * scale))
    return (_TILE - shown_width) // 2, (_TILE - shown_height) // 2, shown_width, shown_height


def _heat(image: UInt8[np.ndarray, "h w 3"], maps: Float[Tensor, "n h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """The maximum activation in heat colours over the image in grey; 0 everywhere without a map."""
    strongest = maps.amax(0).numpy() if len(maps) else np.zeros(image.shape[:2])
    stops = np.linspace(0, 1, len(_HEAT))
    heat = np.stack([np.interp(strongest, stops, _HEAT[:, channel]) for channel in range(3)], axis=-1)
    grey = image.mean(-1, keepdims=True)
    blended: NDArray[np.float64] = 0.35 * grey + 0.65 * heat
    return blended.round().astype(np.uint8)


def _name_peaks(tile: Image.Image, maps: Float[Tensor, "n h w"], names: Sequence[str]) -> Image.Image:
    """Write each map's class where it is most activated, as long as no other name is in the way."""
    draw = ImageDraw.Draw(tile)
    height, width = maps.shape[1:]
    left, top, shown_width, shown_height = _place(height, width)
    taken: list[tuple[float, ...]] = []
    for name, activation in zip(names, maps, strict=True):
        if not activation.any():
            continue
        y, x = divmod(int(activation.argmax()), width)
        half = draw.textlength(name, font=_font(10)) / 2 + 2
        middle = left + (x + 0.5) * shown_width / width
        centre = (
            min(max(middle, half), max(half, _TILE - half)),
            min(max(top + (y + 0.5) * shown_height / height, 8), _TILE - 8),
        )
        text_box = draw.textbbox(centre, name, font=_font(10), anchor="mm", stroke_width=2)
        box = tuple(float(edge) for edge in text_box)
        if not any(_overlap(box, other) for other in taken):
            draw.text(centre, name, _PAPER, _font(10), anchor="mm", stroke_width=2, stroke_fill=_INK)
            taken.append(box)
    return tile


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Whether two boxes, each (left, top, right, bottom), share a place."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _draw_legend(
    draw: ImageDraw.ImageDraw, row: PanelRow, classes: tuple[str, ...], top: int, width: int
) -> None:
    """Under a row: the image's name, then the classes it is labelled with beside their colours."""
    middle, x = top + _CAPTION // 2, float(_GAP)
    draw.text((x, middle), row.name, fill=_INK, font=_font(11), anchor="lm")
    x += max(_TILE + _GAP, draw.textlength(row.name, font=_font(11)) + 12)
    colours = palette(len(classes) + 1)
    for index in row.labels.nonzero().flatten().tolist():
        length = draw.textlength(classes[index], font=_font(11))
        if x + 14 + length > width:
            draw.text((width - _GAP, middle), "...", fill=_INK, font=_font(11), anchor="rm")
            break
        red, green, blue = (int(value) for value in colours[index + 1])
        draw.rectangle((x, middle - 5, x + 10, middle + 5), fill=(red, green, blue))
        draw.text((x + 14, middle), classes[index], fill=_INK, font=_font(11), anchor="lm")
        x += 14 + length + 12


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
