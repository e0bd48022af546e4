"""How fast the images of a data set come: from their disk alone, and from the loader as training uses it."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosa.config import Config, DataConfig, override
from cosa.data.dataset import SegmentationDataset
from cosa.data.loader import train_batches

_BATCH = 8  # images
_READERS = 8  # files read at a time


@dataclass(frozen=True)
class Speed:
    """What was measured."""

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
    sizes = [path.stat().st_size for path in dataset.image_paths]
    drawn = np.random.default_rng(0).permutation(len(dataset))[:images]
    return Speed(
        mean_bytes=float(np.mean(sizes)),
        disk=_read([dataset.image_paths[index] for index in drawn]),
        loader=_load(dataset, data, images),
    )


def _read(paths: Sequence[Path]) -> float:
    """Bytes per second."""
    if hasattr(os, "posix_fadvise"):
        for path in paths:
            _forget(path)
    begun = time.perf_counter()
    with ThreadPoolExecutor(_READERS) as pool:
        total = sum(len(content) for content in pool.map(Path.read_bytes, paths))
    return total / (time.perf_counter() - begun)


def _forget(path: Path) -> None:
    """Have the system drop what it keeps of a file in memory; some file systems do not."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _load(dataset: SegmentationDataset, data: DataConfig, images: int) -> float:
    """Images per second, without the start of the loader's processes and what they had read ahead by then."""
    ahead = 2 * data.loader_workers
    counted = max(1, images // _BATCH)
    changes = {"train.batch_size": _BATCH, "train.iterations": ahead + counted, "train.warmup": 0}
    config = override(Config(data=data), changes)
    batches = train_batches(dataset, config, start=0)
    for _ in itertools.islice(batches, ahead):
        pass
    begun = time.perf_counter()
    done = sum(len(batch.labels) for batch in batches)
    return done / (time.perf_counter() - begun)
