"""A tiny data set in the VOC layout, for the tests of the data package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from cosa.config import DataConfig


@dataclass
class VocFolder:
    """Writes images, masks, lists and annotations under one root, one call each."""

    root: Path
    size: tuple[int, int] = (8, 6)
    """Width and height of what is written where nothing else is asked for."""
    lists: Path = field(init=False)

    def __post_init__(self) -> None:
        self.lists = self.root / "ImageSets/Segmentation"
        self.lists.mkdir(parents=True)
        (self.root / "JPEGImages").mkdir()

    def config(self, **changes: object) -> DataConfig:
        return DataConfig(root=str(self.root), **changes)  # type: ignore[arg-type]

    def image(self, name: str, pixels: np.ndarray | None = None, suffix: str = "png") -> Path:
        if pixels is None:
            pixels = np.full((self.size[1], self.size[0], 3), 90, np.uint8)
        path = self.root / f"JPEGImages/{name}.{suffix}"
        Image.fromarray(pixels).save(path)
        return path

    def mask(self, name: str, values: Sequence[int], folder: str = "SegmentationClassAug") -> Path:
        """A mask of the standard size whose first pixels are `values`, the rest background."""
        pixels = np.zeros((self.size[1], self.size[0]), np.uint8)
        pixels.flat[: len(values)] = values
        (self.root / folder).mkdir(exist_ok=True)
        path = self.root / f"{folder}/{name}.png"
        Image.fromarray(pixels).save(path)
        return path

    def annotation(self, name: str, objects: Sequence[str], difficult: Sequence[str] = ()) -> Path:
        (self.root / "Annotations").mkdir(exist_ok=True)
        parts = [f"<object><name>{o}</name><difficult>0</difficult></object>" for o in objects]
        parts += [f"<object><name>{o}</name><difficult>1</difficult></object>" for o in difficult]
        path = self.root / f"Annotations/{name}.xml"
        path.write_text(f"<annotation><filename>{name}.jpg</filename>{''.join(parts)}</annotation>")
        return path

    def split(self, name: str, lines: Sequence[str]) -> Path:
        path = self.lists / f"{name}.txt"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    def fill(self, masks: Mapping[str, Sequence[int]], split: str = "train") -> VocFolder:
        """An image and a mask for each name, listed in `split`."""
        for name, values in masks.items():
            self.image(name)
            self.mask(name, values)
        self.split(split, list(masks))
        return self
