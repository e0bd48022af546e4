"""A tiny data set in the COCO layout, for the tests of the data package."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cosa.config import DataConfig
from cosa.data.coco import COCO_CATEGORIES, COCO_CLASSES


@dataclass
class CocoFolder:
    """Collects images and annotations of `val2014`; `write` writes the annotation file."""

    root: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        (self.root / "val2014").mkdir(parents=True)
        (self.root / "train2014").mkdir()
        (self.root / "annotations").mkdir()

    @property
    def path(self) -> Path:
        return self.root / "annotations/instances_val2014.json"

    @property
    def cache(self) -> Path:
        return self.root.parent / "cache"

    def config(self, **changes: Any) -> DataConfig:
        """The data section that reads it: `val2014` is the split that is evaluated."""
        values = {"root": str(self.root), "cache": str(self.cache), "val_split": "val2014"} | changes
        return DataConfig(layout="coco", train_split="train2014", **values)

    def image(self, name: str = "a.jpg", size: tuple[int, int] = (8, 6), mode: str = "RGB") -> int:
        """An image of this width and height; returns its id."""
        Image.new(mode, size, 90 if mode == "L" else (255, 0, 0, 0)[: len(mode)]).save(
            self.root / "val2014" / name, quality=100
        )
        self.images.append(
            {"id": 100 + len(self.images), "file_name": name, "width": size[0], "height": size[1]}
        )
        return int(self.images[-1]["id"])

    def object(self, image: int, name: str, segmentation: Any, *, crowd: bool = False, id: int = 0) -> None:  # noqa: A002
        """An annotation; its id is the next one where none is given."""
        self.annotations.append(
            {
                "id": id or 1 + len(self.annotations),
                "image_id": image,
                "category_id": COCO_CATEGORIES[COCO_CLASSES.index(name)],
                "iscrowd": int(crowd),
                "segmentation": segmentation,
            }
        )

    def write(self, **changes: Any) -> CocoFolder:
        """Write the annotation file, some of its parts replaced or (None) left out."""
        categories = [
            {"id": i, "name": n, "supercategory": "x"}
            for i, n in zip(COCO_CATEGORIES, COCO_CLASSES, strict=True)
        ]
        content = {
            "info": {"year": 2014},
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        } | changes
        self.path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        return self


def box(left: int, top: int, right: int, bottom: int) -> list[list[int]]:
    """The polygon of a rectangle of whole pixels."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def run_lengths(inside: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths of a mask: columns first, beginning with the pixels outside."""
    counts, value, last = [], 0, 0
    bits = inside.T.ravel().astype(int)
    for place, bit in enumerate(bits):
        if bit != value:
            counts.append(place - last)
            value, last = int(bit), place
    counts.append(len(bits) - last)
    return {"counts": counts, "size": list(inside.shape)}
