"""A tiny data set of one's own, for the tests of the data package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cosa.config import DataConfig


@dataclass
class OwnFolder:
    """Writes images, masks and the table under one root."""

    root: Path

    def config(self, **changes: Any) -> DataConfig:
        values = {"root": str(self.root), "train_split": "train", "val_split": "val"} | changes
        return DataConfig(layout="folder", **values)

    def image(self, name: str) -> Path:
        path = self.root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path)
        return path

    def mask(self, name: str, value: int = 1, size: tuple[int, int] = (8, 6)) -> Path:
        path = self.root / "masks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, value).save(path)
        return path

    def table(self, *rows: str, header: str = "image,split,labels") -> OwnFolder:
        """labels.csv with these rows."""
        self.root.mkdir(exist_ok=True)
        (self.root / "labels.csv").write_text("".join(f"{row}\n" for row in (header, *rows)))
        return self

    def fill(self, *rows: str) -> OwnFolder:
        """The table with these rows, and an image for each."""
        for row in rows:
            self.image(row.partition(",")[0])
        return self.table(*rows)
