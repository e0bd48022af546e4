"""The weak and the strong view of one image (paper Tables 8-10): one geometry, two appearances.

Importing this module imports albumentations, which takes seconds: import it where a view is first needed.
"""

from __future__ import annotations

import math
import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the network for a newer version

import albumentations
import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from cosa.config import DataConfig

FACTORS = (0.05, 0.95)
"""Range of the factor C of Table 10."""


@dataclass(frozen=True)
class ViewPair:
    """Both views of one image, not yet normalised: a pixel of one is the same pixel of the other."""

    weak: UInt8[np.ndarray, "h w 3"]
    """What AN is to see."""
    strong: UInt8[np.ndarray, "h w 3"]
    """What ON is to see."""
    valid: Bool[np.ndarray, "h w"]
    """False on padding, where both views are 0."""
    mask: UInt8[np.ndarray, "h w"] | None
    """Ground truth of the same pixels, meaningless on padding; None where none was given."""


class Views:
    """Cuts both views from an image, the same ones whenever it gets the same image and seed."""

    def __init__(self, data: DataConfig) -> None:
        cv2.setNumThreads(0)  # each loader process reads for itself: more threads only get in its way
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a misspelt argument of albumentations only warns
            self._geometry = geometry(data)
            self._weak = albumentations.Compose([_blur(data)], is_check_shapes=False)
            looks = (
                [albumentations.OneOf(list(appearances().values()), p=1)] if data.strong_appearance else []
            )
            self._strong = albumentations.Compose([_blur(data), *looks], is_check_shapes=False)
        self._least = math.ceil(1 / data.scale_min)  # pixels a side, of which the smallest scale leaves one

    def __call__(
        self, image: UInt8[np.ndarray, "h w 3"], seed: int, mask: UInt8[np.ndarray, "h w"] | None = None
    ) -> ViewPair:
        """Both views of `image` under the random choices of `seed`; `mask` goes the way of their geometry."""
        # One stream for all transforms: Compose.set_random_seed would give each its own stream of the SAME
        # seed, and an image would be flipped exactly when it is scaled down.
        streams = np.random.default_rng(seed), random.Random(seed)  # noqa: S311 - no secret
        for pipeline in (self._geometry, self._weak, self._strong):
            pipeline.set_random_state(*streams)
        layers = np.dstack([np.ones(image.shape[:2], np.uint8), *([] if mask is None else [mask])])
        for axis in (0, 1):  # of the thinnest images, scaling down would leave nothing
            times = math.ceil(self._least / image.shape[axis])
            if times > 1:
                image, layers = image.repeat(times, axis), layers.repeat(times, axis)
        placed = self._geometry(image=image, mask=layers)
        valid = placed["mask"][:, :, 0].astype(bool)
        # Appearance sees the image's own pixels alone: padding would enter blur, histograms and mean grey.
        inside = _rectangle(valid)
        own = np.ascontiguousarray(placed["image"][inside])
        views = np.zeros((2, *placed["image"].shape), np.uint8)
        for view, pipeline in zip(views, (self._weak, self._strong), strict=True):
            view[inside] = pipeline(image=own)["image"]
        moved = None if mask is None else np.ascontiguousarray(placed["mask"][:, :, 1])
        return ViewPair(views[0], views[1], valid, moved)


def geometry(data: DataConfig) -> albumentations.Compose:
    """Random scale, padding, crop and flip, shared by both views.

    Paper: Tables 8 and 9. An image smaller than the crop lands at a random place of it; downscaling averages
    areas, upscaling is bilinear.
    """
    return albumentations.Compose(
        [
            albumentations.RandomScale(
                (data.scale_min - 1, data.scale_max - 1),
                # not INTER_NEAREST, which is half a pixel off against the image
                mask_interpolation=cv2.INTER_NEAREST_EXACT,
                area_for_downscale="image",
                p=1,
            ),
            albumentations.RandomCrop(
                data.crop_size, data.crop_size, pad_if_needed=True, pad_position="random"
            ),
            albumentations.HorizontalFlip(p=data.flip_prob),
        ],
        is_check_shapes=False,
    )


def _blur(data: DataConfig) -> albumentations.GaussianBlur:
    """Gaussian blur, its kernel as wide as its sigma asks for.

    Paper silent on sigma: we draw up to 2 pixels, as self-supervised learning does at 224, proportionally
    less on smaller crops, whose objects would vanish, and never less than up to 1, which still blurs.
    """
    largest = min(max(1.0, data.crop_size / 112), 2.0)
    return albumentations.GaussianBlur(blur_limit=0, sigma_limit=(largest / 20, largest), p=data.blur_prob)


def appearances() -> dict[str, albumentations.BasicTransform]:
    """TransAppearance by the names of the table; the strong view gets one of them.

    Paper: Table 10. All are as Pillow has them, which albumentations computes otherwise: its AutoContrast
    leaves 255 out of the histogram, its Equalize and ColorJitter round differently.
    """
    return {
        "Identity": albumentations.NoOp(p=1),
        "Autocontrast": Levels(stretched),
        "Equalize": Levels(equalised),
        "RandSolarize": albumentations.Solarize(threshold_range=(0, 1), p=1),
        "RandColor": Pillow(lambda image, factor: ImageEnhance.Color(image).enhance(factor)),
        "RandContrast": Pillow(lambda image, factor: ImageEnhance.Contrast(image).enhance(factor)),
        "RandBrightness": Pillow(lambda image, factor: ImageEnhance.Brightness(image).enhance(factor)),
        "RandSharpness": Pillow(lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)),
        "RandPosterize": albumentations.Posterize(num_bits=(4, 8), p=1),
    }


class Pillow(albumentations.ImageOnlyTransform):  # type: ignore[misc]  # it carries no types
    """An operation of Pillow, always applied, with a factor C drawn from U(0.05, 0.95)."""

    def __init__(self, operation: Callable[[Image.Image, float], Image.Image]) -> None:
        super().__init__(p=1)
        self.operation = operation

    def get_params(self) -> dict[str, float]:
        """C of one image."""
        return {"factor": self.py_random.uniform(*FACTORS)}

    def apply(self, img: NDArray[np.uint8], **params: Any) -> NDArray[np.uint8]:
        """`img` after the operation."""
        return np.array(self.operation(Image.fromarray(img), params["factor"]))


class Levels(albumentations.ImageOnlyTransform):  # type: ignore[misc]  # it carries no types
    """A new level for each of the 256 of a channel, by how many of its pixels have each; always applied.

    The same bits as Pillow's ImageOps, whose tables take Python half of an image's time.
    """

    def __init__(self, table: Callable[[NDArray[np.int64]], NDArray[Any]]) -> None:
        super().__init__(p=1)
        self.table = table

    def apply(self, img: NDArray[np.uint8], **_: Any) -> NDArray[np.uint8]:
        """`img` after the operation."""
        counts = [cv2.calcHist([img], [i], None, [256], [0, 256]).ravel().astype(int) for i in range(3)]
        tables = np.stack([self.table(own) for own in counts], axis=-1).clip(0, 255).astype(np.uint8)
        return np.asarray(cv2.LUT(img, tables[None]), np.uint8)


def stretched(counts: NDArray[np.int64]) -> NDArray[Any]:
    """Levels spread from the darkest, which becomes 0, to the lightest, which becomes 255."""
    low, high = counts.nonzero()[0][[0, -1]]
    if low == high:
        return np.arange(256)
    scale = 255 / (high - low)
    return np.asarray(np.arange(256) * scale - low * scale)


def equalised(counts: NDArray[np.int64]) -> NDArray[Any]:
    """Levels after which about as many pixels have each."""
    step = (counts.sum() - counts[counts.nonzero()[0][-1]]) // 255
    if not step:
        return np.arange(256)
    return np.asarray((step // 2 + counts.cumsum() - counts) // step)


def _rectangle(valid: Bool[np.ndarray, "h w"]) -> tuple[slice, slice]:
    """Rows and columns of the pixels that are no padding: these always fill a rectangle."""
    rows, columns = (np.flatnonzero(valid.any(axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
