"""Batches for training and evaluation, the same ones however many processes share them.

Step s takes samples s * B ... s * B + B - 1 of an endless sequence: epoch e of n images is a permutation
seeded by (seed, e), and the views of image i in epoch e are seeded by (seed, e, i). The data position of a
run is therefore its step, and no generator has to be saved.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cosa.config import Config, EvaluationConfig
from cosa.data.dataset import SegmentationDataset, normalise
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
    return _train_batches(dataset, config, start, rank, world)


def _train_batches(
    dataset: SegmentationDataset, config: Config, start: int, rank: int, world: int
) -> Iterator[Batch]:
    workers = config.data.loader_workers
    loader: Iterable[Batch | Exception] = DataLoader(
        _Samples(dataset, config),
        batch_sampler=_Shares(len(dataset), config, range(start, config.train.iterations), rank, world),
        collate_fn=_collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else starting it draws from the run's own random numbers
        # A fork would copy a process that already runs CUDA and threads; a fork server's children outlive a
        # killed run, as torch's watchdog looks at their parent alone.
        multiprocessing_context="spawn" if workers else None,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def step_names(dataset: SegmentationDataset, config: Config, step: int) -> tuple[str, ...]:
    """Names of the images in the batch of `step`, all ranks' shares in order."""
    (places,) = _Shares(len(dataset), config, range(step, step + 1))
    return tuple(dataset.names[index] for _, index in places)


class _Shares:
    """The (epoch, index) pairs of this rank's share of every step."""

    def __init__(self, images: int, config: Config, steps: range, rank: int = 0, world: int = 1) -> None:
        self.images, self.seed, self.steps, self.rank = images, config.train.seed, steps, rank
        self.batch, self.share = config.train.batch_size, config.train.batch_size // world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = functools.lru_cache(maxsize=2)(self._order)  # a batch may reach into the next epoch
        for step in self.steps:
            first = step * self.batch + self.rank * self.share
            places = (divmod(k, self.images) for k in range(first, first + self.share))
            yield [(epoch, int(order(epoch)[position])) for epoch, position in places]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, epoch)).permutation(self.images)


class _Samples(Dataset["tuple[ViewPair, Tensor] | Exception"]):
    """Views and labels of an image, by (epoch, index)."""

    def __init__(self, dataset: SegmentationDataset, config: Config) -> None:
        self.dataset, self.config = dataset, config

    @functools.cached_property
    def views(self) -> Views:
        """Built where it is used: in the loader's own process."""
        from cosa.data.views import Views

        return Views(self.config.data)

    def __getitem__(self, place: tuple[int, int]) -> tuple[ViewPair, Tensor] | Exception:
        epoch, index = place
        (seed,) = np.random.SeedSequence((self.config.train.seed, epoch, index)).generate_state(1)
        mask = None
        try:
            image = self.dataset.image(index)
            if self.config.oracle:
                mask = self.dataset.mask(index)
        except (OSError, ValueError) as error:
            # Handed on as a value: torch would wrap it in the traceback of the process it was raised in.
            return error.with_traceback(None)
        return self.views(image, int(seed), mask), self.dataset.labels[index]


def _collate(samples: Sequence[tuple[ViewPair, Tensor] | Exception]) -> Batch | Exception:
    pairs: list[tuple[ViewPair, Tensor]] = []
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
        pairs.append(sample)
    valid = torch.from_numpy(np.stack([views.valid for views, _ in pairs]))
    padding = ~valid[:, None]
    masks = [views.mask for views, _ in pairs if views.mask is not None]
    return Batch(
        weak=normalise(np.stack([views.weak for views, _ in pairs])).masked_fill_(padding, 0),
        strong=normalise(np.stack([views.strong for views, _ in pairs])).masked_fill_(padding, 0),
        labels=torch.stack([labels for _, labels in pairs]),
        valid=valid,
        masks=torch.from_numpy(np.stack(masks).astype(np.int64)) if masks else None,
    )


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
    # Threads, not processes: decoding and resizing free the GIL, and an evaluation starts at once.
    with ThreadPoolExecutor(max(1, config.data.loader_workers)) as pool:
        load = functools.partial(_evaluation_batch, dataset, settings)
        ahead: list[Future[EvaluationBatch]] = []
        for group in groups:
            ahead.append(pool.submit(load, group))
            if len(ahead) > 2:
                yield ahead.pop(0).result()
        yield from (future.result() for future in ahead)


def _evaluation_batch(
    dataset: SegmentationDataset, config: EvaluationConfig, indices: Iterable[int]
) -> EvaluationBatch:
    indices, square = list(indices), (config.size, config.size)
    images = [dataset.image(i) for i in indices]
    resized = [np.array(Image.fromarray(image).resize(square, Image.Resampling.BILINEAR)) for image in images]
    masks = [dataset.mask(i) for i in indices] if dataset.mask_paths else []
    return EvaluationBatch(
        names=tuple(dataset.names[i] for i in indices),
        images=normalise(np.stack(resized)),
        sizes=tuple((image.shape[0], image.shape[1]) for image in images),
        masks=tuple(torch.from_numpy(mask.astype(np.int64)) for mask in masks),
        labels=dataset.labels[indices],
        originals=tuple(images) if config.crf else (),
    )
