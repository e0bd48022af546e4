"""The weak and the strong view of one image (paper Tables 8-10): one geometry, two appearances.

Importing this module imports albumentations, which takes seconds: import it where a view is first needed.
"""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else its import asks the network for a newer version

import albumentations as A
import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from cosa.config import DataConfig
from cosa.data.dataset import normalise

# Range of the factor C of Table 10.
ENHANCEMENT = (0.05, 0.95)


@dataclass(frozen=True)
class ViewPair:
    """Both views of one image: a pixel of one is the same pixel of the other."""

    weak: Float[Tensor, "3 h w"]
    """Input of AN."""
    strong: Float[Tensor, "3 h w"]
    """Input of ON."""
    valid: Bool[Tensor, "h w"]
    """False on padding, where both views are 0."""


class Views:
    """Cuts both views from an image, the same ones whenever it gets the same image and seed."""

    def __init__(self, data: DataConfig) -> None:
        cv2.setNumThreads(0)  # each loader process reads for itself: more threads only get in its way
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a misspelt argument of albumentations only warns
            self._size = data.crop_size
            self._geometry = geometry(data)
            self._weak = A.Compose([_blur(data)], is_check_shapes=False)
            looks = [A.OneOf(appearances(), p=1)] if data.strong_appearance else []
            self._strong = A.Compose([_blur(data), *looks], is_check_shapes=False)

    def __call__(self, image: UInt8[np.ndarray, "h w 3"], seed: int) -> ViewPair:
        """Both views of `image` under the random choices of `seed`."""
        # One stream for all transforms: Compose.set_random_seed would give each its own stream of the SAME
        # seed, and an image would be flipped exactly when it is scaled down.
        streams = np.random.default_rng(seed), random.Random(seed)
        for pipeline in (self._geometry, self._weak, self._strong):
            pipeline.set_random_state(*streams)
        placed = self._geometry(image=image, mask=np.ones(image.shape[:2], np.uint8))
        valid = placed["mask"].astype(bool)
        # Appearance sees the image's own pixels alone: padding would enter blur, histograms and mean grey.
        inside = _rectangle(valid)
        own = np.ascontiguousarray(placed["image"][inside])
        views = torch.zeros(2, 3, self._size, self._size)
        for view, pipeline in zip(views, (self._weak, self._strong), strict=True):
            view[:, inside[0], inside[1]] = normalise(pipeline(image=own)["image"])
        return ViewPair(views[0], views[1], torch.from_numpy(valid))


def geometry(data: DataConfig) -> A.Compose:
    """Random scale, padding, crop and flip, shared by both views.

    Paper: Tables 8 and 9. An image smaller than the crop lands at a random place of it; downscaling averages
    areas, upscaling is bilinear.
    """
    return A.Compose(
        [
            A.RandomScale((data.scale_min - 1, data.scale_max - 1), area_for_downscale="image", p=1),
            A.RandomCrop(data.crop_size, data.crop_size, pad_if_needed=True, pad_position="random"),
            A.HorizontalFlip(p=data.flip_prob),
        ],
        is_check_shapes=False,
    )


def _blur(data: DataConfig) -> A.GaussianBlur:
    """Gaussian blur, its kernel as wide as its sigma asks for.

    Paper silent on sigma: we take U(0.1, 2) pixels, as self-supervised learning does at 224 pixels, and
    proportionally less on smaller crops, whose objects would vanish.
    """
    largest = min(2.0, data.crop_size / 112)
    return A.GaussianBlur(blur_limit=0, sigma_limit=(largest / 20, largest), p=data.blur_prob)


def appearances() -> list[A.BasicTransform]:
    """TransAppearance, of which the strong view gets one.

    Paper: Table 10. Pillow computes what albumentations computes otherwise: its AutoContrast leaves 255 out
    of the histogram, its Equalize and ColorJitter round differently.
    """
    return [
        A.NoOp(p=1),
        Pillow(_autocontrast),
        Pillow(_equalize),
        A.Solarize(threshold_range=(0, 1), p=1),
        Enhance(ImageEnhance.Color),
        Enhance(ImageEnhance.Contrast),
        Enhance(ImageEnhance.Brightness),
        Enhance(ImageEnhance.Sharpness),
        A.Posterize(num_bits=(4, 8), p=1),
    ]


def _autocontrast(image: Image.Image) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image) -> Image.Image:
    return ImageOps.equalize(image)


class Pillow(A.ImageOnlyTransform):  # type: ignore[misc]  # albumentations gives no types
    """An operation of Pillow without a parameter, always applied."""

    def __init__(self, operation: Callable[[Image.Image], Image.Image]) -> None:
        super().__init__(p=1)
        self.operation = operation

    def apply(self, img: np.ndarray, *args: Any, **params: Any) -> np.ndarray:
        """`img` after the operation."""
        return np.array(self.operation(Image.fromarray(img)))


class Enhance(A.ImageOnlyTransform):  # type: ignore[misc]  # albumentations gives no types
    """One of Pillow's enhancers with a factor C from U(0.05, 0.95); C = 1 returns the original image."""

    def __init__(
        self,
        enhancer: Callable[[Image.Image], ImageEnhance._Enhance],
        factors: tuple[float, float] = ENHANCEMENT,
    ) -> None:
        super().__init__(p=1)
        self.enhancer = enhancer
        self.factors = factors

    def get_params(self) -> dict[str, float]:
        """A factor, drawn for one image."""
        return {"factor": self.py_random.uniform(*self.factors)}

    def apply(self, img: np.ndarray, factor: float, **params: Any) -> np.ndarray:
        """`img`, enhanced by `factor`."""
        return np.array(self.enhancer(Image.fromarray(img)).enhance(factor))


def _rectangle(valid: Bool[np.ndarray, "h w"]) -> tuple[slice, slice]:
    """Rows and columns of the pixels that are no padding: these always fill a rectangle."""
    rows, columns = (np.flatnonzero(valid.any(axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
