"""Batches for training and evaluation, the same ones however many processes share them.

Step s takes samples s * B ... s * B + B - 1 of an endless sequence: epoch e of n images is a permutation
seeded by (seed, e), and the views of image i in epoch e are seeded by (seed, e, i). The data position of a
run is therefore its step, and no generator has to be saved.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cosa.config import Config
from cosa.data.dataset import SegmentationDataset, normalise
from cosa.data.files import in_processes, read_ahead
from cosa.structures import Batch, EvaluationBatch

if TYPE_CHECKING:
    from cosa.data.views import ViewPair, Views


def train_batches(
    dataset: SegmentationDataset, config: Config, *, start: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """This rank's share of the batches of steps `start` ... `train.iterations` - 1.

    The share of rank r is the r-th of `world` equal contiguous parts: the shares of all ranks, concatenated,
    are the batch of one process.

    Raises:
        ValueError: The batch does not divide among the ranks, or a file of the data set is bad.
        FileNotFoundError: A file of the data set is gone.
    """
    if config.train.batch_size % world:
        raise ValueError(
            f"train.batch_size must be a multiple of the {world} workers, got {config.train.batch_size}; "
            "change it or --workers"
        )
    steps = range(start, config.train.iterations)
    share = _Share(dataset, config, rank, world)
    return in_processes(share, steps, config.data.loader_workers, pin=torch.cuda.is_available())


def step_names(dataset: SegmentationDataset, config: Config, step: int) -> tuple[str, ...]:
    """Names of the images in the batch of `step`, all ranks' shares in order."""
    return tuple(dataset.names[index] for _, index in _places(len(dataset), config, step))


def _places(images: int, config: Config, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
    """Epoch and index of each image in a rank's share of the batch of `step`."""
    share = config.train.batch_size // world
    first = step * config.train.batch_size + rank * share
    places = (divmod(k, images) for k in range(first, first + share))
    return [(epoch, int(_order(config.train.seed, epoch, images)[position])) for epoch, position in places]


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _order(seed: int, epoch: int, images: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(images)


class _Share:
    """Reads this rank's share of the batch of a step."""

    def __init__(self, dataset: SegmentationDataset, config: Config, rank: int, world: int) -> None:
        self.dataset, self.config, self.rank, self.world = dataset, config, rank, world

    @functools.cached_property
    def views(self) -> Views:
        """Built where it is used: in the loader's own process."""
        from cosa.data.views import Views

        return Views(self.config.data)

    def __call__(self, step: int) -> Batch:
        places = _places(len(self.dataset), self.config, step, self.rank, self.world)
        pairs = [self._view(epoch, index) for epoch, index in places]
        valid = torch.from_numpy(np.stack([pair.valid for pair in pairs]))
        masks = [pair.mask for pair in pairs if pair.mask is not None]
        return Batch(
            weak=self._normalise([pair.weak for pair in pairs], valid),
            strong=self._normalise([pair.strong for pair in pairs], valid),
            labels=self.dataset.labels[[index for _, index in places]],
            valid=valid,
            masks=torch.from_numpy(np.stack(masks).astype(np.int64)) if masks else None,
        )

    def _normalise(self, views: Sequence[NDArray[np.uint8]], valid: Tensor) -> Tensor:
        images = normalise(np.stack(views), self.config.data)
        for image, own in zip(images, valid, strict=True):
            if not own.all():  # most crops have no padding
                image.masked_fill_(~own, 0)
        return images

    def _view(self, epoch: int, index: int) -> ViewPair:
        (seed,) = np.random.SeedSequence((self.config.train.seed, epoch, index)).generate_state(1)
        mask = self.dataset.mask(index) if self.config.oracle or self.config.standalone else None
        return self.views(self.dataset.image(index), int(seed), mask)


def evaluation_batches(
    dataset: SegmentationDataset,
    config: Config,
    *,
    rank: int = 0,
    world: int = 1,
    only: Sequence[int] | None = None,
) -> Iterator[EvaluationBatch]:
    """Every `world`-th image from `rank` on, so that all ranks together see each image exactly once.

    Images are resized to a square of `evaluation.size` (Pillow's bilinear filter, which averages when it
    shrinks); masks keep their size. `evaluation.max_images` cuts the split before it is shared, and `only`
    names the images to read by their indices instead.

    Raises:
        ValueError: A file of the data set is bad.
        FileNotFoundError: A file of the data set is gone.
    """
    settings = config.evaluation
    indices = (range(len(dataset))[: settings.max_images or None] if only is None else only)[rank::world]
    groups = [indices[i : i + settings.batch_size] for i in range(0, len(indices), settings.batch_size)]
    load = functools.partial(_evaluation_batch, dataset, config)
    return read_ahead(load, groups, config.data.loader_workers)


def _evaluation_batch(
    dataset: SegmentationDataset, config: Config, indices: Iterable[int]
) -> EvaluationBatch:
    indices, square = list(indices), (config.evaluation.size, config.evaluation.size)
    images = [dataset.image(i) for i in indices]
    resized = [np.array(Image.fromarray(image).resize(square, Image.Resampling.BILINEAR)) for image in images]
    masks = [dataset.mask(i) for i in indices] if dataset.mask_paths else []
    return EvaluationBatch(
        names=tuple(dataset.names[i] for i in indices),
        images=normalise(np.stack(resized), config.data),
        sizes=tuple((image.shape[0], image.shape[1]) for image in images),
        masks=tuple(torch.from_numpy(mask.astype(np.int64)) for mask in masks),
        labels=dataset.labels[indices],
        originals=tuple(images) if config.evaluation.crf else (),
    )
