"""A whole data set read, file by file: all that is wrong with it, what its splits hold, how fast it comes.

Unlike training, which stops at the first thing, a check goes on to the last. COCO's masks are drawn into the
cache on the way, as reading the annotations alone would not tell whether they can be.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from cosa.config import Config, DataConfig, override
from cosa.data.coco import coco_splits
from cosa.data.dataset import Needs, SegmentationDataset, read_image, read_mask
from cosa.data.files import OnProblem, contents, in_processes, refuse
from cosa.data.folder import folder_splits, stray_masks
from cosa.data.loader import train_batches
from cosa.data.open import open_dataset
from cosa.data.voc import voc_splits
from cosa.structures import IGNORE

_BATCH = 32  # files between two reports of progress
_SEVERAL = 3  # images, of which one and another may hide its object under smaller ones
_MOST_IGNORED = 1 / 5  # of the pixels: VOC's borders are 5 %

Advance = Callable[[str, int, int], None]
"""Is told the split, how many of its images are read, and how many there are: 0 of 0 while it is opened."""


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

    def doubts(self) -> Iterator[str]:
        """What no single file shows to be wrong: labels and masks that do not say the same."""
        if self.unlabelled_masks:
            yield (
                f"labels must name what masks show, got {self.unlabelled_masks} of {self.images} images of "
                f"{self.name} whose mask shows more; correct the labels, or the order of the classes"
            )
        if not any(self.pixels):
            return
        for name, images, pixels in zip(self.classes, self.images_per_class, self.pixels[1:-1], strict=True):
            if images >= _SEVERAL and not pixels:
                yield (
                    f"masks must show what labels name, got {images} images of {self.name} labelled {name!r} "
                    "and no pixel of it; write the number of the class into the masks"
                )
        ignored = self.pixels[-1] / sum(self.pixels)
        if ignored > _MOST_IGNORED:
            yield (
                f"{IGNORE} in a mask must mark borders that are not counted, got {ignored:.0%} of all pixels "
                f"of {self.name}; write 1 for the first class, 2 for the second"
            )


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
    raise FileNotFoundError(
        f"ROOT must hold {', '.join(signs.values())}, or be named with --layout, got {str(root)!r}, "
        f"which {contents(root)}; see the README for the layouts"
    )


def splits_of(data: DataConfig) -> list[str]:
    """Every split that the data set has.

    Raises:
        FileNotFoundError: What names the splits is missing.
        ValueError: It names none.
    """
    of_layout = {"voc": voc_splits, "coco": coco_splits, "folder": folder_splits}
    splits = of_layout[data.layout](Path(data.root))
    if not splits:
        raise ValueError(
            f"data set must have a split, got none in {data.root!r}; see the README for the layouts"
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
        summary = _read_all(dataset, split, labelled, on_problem, advance)
        summaries.append(summary)
        for doubt in summary.doubts():
            on_problem(ValueError(doubt))
    if data.layout == "folder" and summaries and (stray := stray_masks(Path(data.root))):
        on_problem(ValueError(stray))
    return Summary(tuple(problems), tuple(summaries))


def open_split(data: DataConfig, split: str, on_problem: OnProblem = refuse) -> SegmentationDataset:
    """A split with all that it has; masks are not verified beforehand."""
    return open_dataset(data.replace(val_split=""), split, needs=needs_of(data, split), on_problem=on_problem)


def needs_of(data: DataConfig, split: str) -> Needs:
    """What a split has: COCO's masks are drawn on request alone, and nobody publishes those of VOC's test."""
    if data.layout == "coco":
        return "masks"
    return "images" if (data.layout, split) == ("voc", "test") else "labels"


def _read_all(
    dataset: SegmentationDataset, split: str, labelled: bool, on_problem: OnProblem, advance: Advance
) -> SplitSummary:
    count, total = len(dataset.classes), len(dataset)
    pixels = np.zeros((total, count + 2), np.int64)
    masks = dataset.mask_paths or (None,) * total
    advance(split, 0, total)
    jobs = list(zip(dataset.image_paths, masks, (count,) * total, strict=True))
    for row, (problem, found) in enumerate(in_processes(_read, jobs)):
        if problem:
            on_problem(ValueError(problem))
        pixels[row] = found
        if row % _BATCH == _BATCH - 1 or row == total - 1:
            advance(split, row + 1, total)
    labels = dataset.labels.numpy().astype(bool)
    return SplitSummary(
        name=split,
        classes=dataset.classes,
        images=total,
        without_objects=int((~labels.any(1)).sum()) if labelled else 0,
        images_per_class=tuple(map(int, labels.sum(0))),
        pixels=tuple(map(int, pixels.sum(0))) if dataset.has_masks else (),
        unlabelled_masks=int(((pixels[:, 1:-1] > 0) & ~labels).any(1).sum()),
    )


def _read(job: tuple[Path, Path | None, int]) -> tuple[str, Int[np.ndarray, " k"]]:
    """Decode an image and its mask.

    Returns:
        What is wrong, empty where nothing is; and the pixels of background, of each class, and not counted.
    """
    image, mask, classes = job
    pixels = np.zeros(classes + 2, np.int64)
    try:
        read_image(image)
        if mask:
            counts = np.bincount(read_mask(mask, image, classes).ravel(), minlength=IGNORE + 1)
            pixels[:] = *counts[: classes + 1], counts[IGNORE]
    except (OSError, ValueError) as error:
        return str(error), pixels
    return "", pixels


@dataclass(frozen=True)
class Speed:
    """How fast the images of a data set come."""

    mean_bytes: float
    """Of an image file, over the whole split."""
    disk: float
    """Bytes per second of the files alone, eight at a time, past the system's memory where it allows that."""
    loader: float
    """Images per second, read, decoded and augmented, as one training process gets them."""


def measure(dataset: SegmentationDataset, data: DataConfig, images: int) -> Speed:
    """Read `images` images, drawn by a seed, from the disk alone, then from the loader.

    Raises:
        ValueError, OSError: An image cannot be read.
    """
    drawn = np.random.default_rng(0).permutation(len(dataset))[:images]
    return Speed(
        mean_bytes=float(np.mean([path.stat().st_size for path in dataset.image_paths])),
        disk=_read_bytes([dataset.image_paths[index] for index in drawn]),
        loader=_load(dataset, data, images),
    )


def _read_bytes(paths: Sequence[Path]) -> float:
    """Bytes per second."""
    for path in paths if hasattr(os, "posix_fadvise") else ():
        with path.open("rb") as file:  # have the system drop what it keeps of it in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begun = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        total = sum(len(content) for content in pool.map(Path.read_bytes, paths))
    return total / (time.perf_counter() - begun)


def _load(dataset: SegmentationDataset, data: DataConfig, images: int) -> float:
    """Images per second, without the start of the loader's processes and what they had read ahead by then."""
    batch, ahead = 8, 2 * data.loader_workers
    iterations = ahead + max(1, images // batch)
    changes = {"train.batch_size": batch, "train.iterations": iterations, "train.warmup": 0}
    batches = train_batches(dataset, override(Config(data=data), changes), start=0)
    for _ in itertools.islice(batches, ahead):
        pass
    begun = time.perf_counter()
    done = sum(len(batch.labels) for batch in batches)
    return done / (time.perf_counter() - begun)
