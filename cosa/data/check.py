"""A whole data set read, file by file: everything that is wrong with it, and what its splits hold.

Unlike training, which stops at the first thing, a check goes on to the last. COCO's masks are drawn into the
cache on the way, as reading the annotations alone would not tell whether they can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from cosa.config import DataConfig
from cosa.data.coco import coco_splits
from cosa.data.dataset import Needs, SegmentationDataset, read_image, read_mask
from cosa.data.files import OnProblem, refuse
from cosa.data.folder import folder_splits
from cosa.data.open import open_dataset
from cosa.data.processes import CHUNK, in_processes
from cosa.data.voc import voc_splits
from cosa.structures import IGNORE

_BATCH = 32  # files between two reports of progress

Advance = Callable[[str, int, int], None]
"""Is told the split, how many of its images are read, and how many there are."""


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds, of the images that could be read."""

    name: str
    """The split."""
    classes: tuple[str, ...]
    """Its foreground classes."""
    images: int
    """Images that are listed and there."""
    without_objects: int
    """Images without a label; 0 where the split has no labels at all."""
    images_per_class: tuple[int, ...]
    """Images labelled with each class."""
    pixels: tuple[int, ...]
    """Pixels of background, of each class, and not counted (the last); empty where there are no masks."""
    unlabelled_masks: int
    """Images whose mask shows a class that its labels do not name."""


@dataclass(frozen=True)
class Summary:
    """What a check found."""

    problems: tuple[str, ...]
    """One line for each thing that is wrong, in the order of reading."""
    splits: tuple[SplitSummary, ...]
    """The splits that could be opened."""


def detect_layout(root: Path) -> Literal["voc", "coco", "folder"]:
    """`voc`, `coco` or `folder`, by what lies under `root`; `shapes` has the VOC layout.

    Raises:
        FileNotFoundError: There is none of them.
    """
    signs: dict[Literal["voc", "coco", "folder"], str]
    signs = {"voc": "ImageSets/Segmentation", "coco": "annotations", "folder": "labels.csv"}
    for layout, sign in signs.items():
        if (root / sign).exists():
            return layout
    held = (", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing") if root.is_dir() else ""
    raise FileNotFoundError(
        f"ROOT must hold {', '.join(signs.values())}, or be named with --layout, got {str(root)!r}, "
        f"which {'holds ' + held if held else 'is no folder'}; see the README for the layouts"
    )


def splits_of(data: DataConfig) -> list[str]:
    """Every split that the data set has.

    Raises:
        FileNotFoundError: What names the splits is missing.
        ValueError: It names none.
    """
    root = Path(data.root)
    of_layout = {"voc": voc_splits, "coco": coco_splits, "folder": folder_splits}
    splits = of_layout[data.layout](root)
    if not splits:
        raise ValueError(
            f"data set must have a split, got none in {str(root)!r}; see the README for the layouts"
        )
    return splits


def check(data: DataConfig, splits: Sequence[str], advance: Advance) -> Summary:
    """Read every file of the splits, over processes."""
    problems: dict[str, None] = {}  # in order, each once: splits share images
    summaries = []

    def on_problem(error: Exception) -> None:
        notes = getattr(error, "__notes__", [str(error)])
        problems.update(dict.fromkeys(" ".join(note.split()) for note in notes))

    for split in splits:
        advance(split, 0, 0)
        try:
            dataset = open_split(data, split, on_problem)
        except (OSError, ValueError) as error:
            on_problem(error)
            continue
        labelled = needs_of(data, split) != "images"
        summaries.append(_read_all(dataset, split, labelled, on_problem, advance))
    return Summary(tuple(problems), tuple(summaries))


def open_split(data: DataConfig, split: str, on_problem: OnProblem = refuse) -> SegmentationDataset:
    """A split with all that it has; masks are not verified beforehand."""
    return open_dataset(data.replace(val_split=""), split, needs=needs_of(data, split), on_problem=on_problem)


def needs_of(data: DataConfig, split: str) -> Needs:
    """What a split has: COCO's masks are drawn on request alone, and nobody publishes those of VOC's test."""
    if data.layout == "coco":
        return "masks"
    return "images" if (data.layout, split) == ("voc", "test") else "labels"


@dataclass(frozen=True)
class _Part:
    """Some images of a data set, for one process at a time."""

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    classes: int


@dataclass(frozen=True)
class _Found:
    """What one part holds; the rows are its images."""

    problems: tuple[str, ...]
    pixels: Int[np.ndarray, "n k"]
    """Pixels by value of the mask, the last those not counted; 0 without masks."""


def _read_all(
    dataset: SegmentationDataset,
    split: str,
    labelled: bool,
    on_problem: OnProblem,
    advance: Advance,
) -> SplitSummary:
    count = len(dataset.classes)
    total = np.zeros(count + 2, np.int64)
    shown: list[Bool[np.ndarray, "n c"]] = []
    done = 0
    parts = list(_parts(dataset))
    for found in in_processes(_read_part, parts) if len(dataset) > CHUNK else map(_read_part, parts):
        for problem in found.problems:
            on_problem(ValueError(problem))
        total += found.pixels.sum(0)
        shown.append(found.pixels[:, 1 : count + 1] > 0)
        done += len(found.pixels)
        advance(split, done, len(dataset))
    unlabelled = np.concatenate(shown) & ~dataset.labels.numpy().astype(bool) if shown else np.zeros((0, 1))
    return SplitSummary(
        name=split,
        classes=dataset.classes,
        images=len(dataset),
        without_objects=int((dataset.labels.sum(1) == 0).sum()) if labelled else 0,
        images_per_class=_whole(dataset.labels.sum(0)),
        pixels=tuple(int(pixels) for pixels in total) if dataset.has_masks else (),
        unlabelled_masks=int(unlabelled.any(1).sum()),
    )


def _whole(values: Tensor) -> tuple[int, ...]:
    return tuple(int(value) for value in values.to(torch.int64))


def _parts(dataset: SegmentationDataset) -> Iterator[_Part]:
    for start in range(0, len(dataset), _BATCH):
        rows = slice(start, start + _BATCH)
        yield _Part(dataset.image_paths[rows], dataset.mask_paths[rows], len(dataset.classes))


def _read_part(part: _Part) -> _Found:
    """Decode every file of a part."""
    problems = []
    pixels = np.zeros((len(part.images), part.classes + 2), np.int64)
    for row, image in enumerate(part.images):
        try:
            read_image(image)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue  # the mask's size could not be judged
        if part.masks:
            try:
                counts = np.bincount(read_mask(part.masks[row], image, part.classes).ravel(), minlength=256)
            except (OSError, ValueError) as error:
                problems.append(str(error))
            else:
                pixels[row] = [*counts[: part.classes + 1], counts[IGNORE]]
    return _Found(tuple(problems), pixels)
