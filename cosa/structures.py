"""What travels between rooms, as frozen dataclasses: tensors of a step, and the ranks of a run.

Shape letters, here and everywhere: b images, c foreground classes, k = c + 1 classes with the background
as 0, h w pixels, p q patches. A `cam` is raw unless its name says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch import distributed as dist

IGNORE = 255
"""Class of pixels that no loss and no metric counts: padding in training, VOC's borders in evaluation."""


def present_classes(labels: Float[Tensor, "b c"]) -> Int[Tensor, "b n"]:
    """Indices in [0, c) of the classes that each image holds, ascending, then of some that it does not.

    n is the most that one image of the batch holds, at least 1; reading it waits for the device of `labels`.
    """
    width = max(1, int(labels.sum(1).max()))
    return labels.argsort(stable=True, dim=1, descending=True)[:, :width]


@dataclass(frozen=True)
class Batch:
    """Weak and strong view of the same crops: a pixel of one is the same pixel of the other."""

    weak: Float[Tensor, "b 3 h w"]
    """Input of AN, normalised by `data.mean` and `data.std`."""
    strong: Float[Tensor, "b 3 h w"]
    """Input of ON."""
    labels: Float[Tensor, "b c"]
    """Image-level labels, 0 or 1."""
    valid: Bool[Tensor, "b h w"]
    """False on padding."""
    masks: Int[Tensor, "b h w"] | None = None
    """Classes in [0, k) or IGNORE, meaningless on padding: what a standalone network learns, or the ground
    truth for the oracle of the guidance study."""
    present: Int[Tensor, "b n"] | None = None
    """See `present_classes`; told from `labels` before they are on a device, since their number is a size."""

    def __post_init__(self) -> None:
        if self.present is None:
            object.__setattr__(self, "present", present_classes(self.labels))

    def to(self, device: torch.device) -> Self:
        """The batch on `device`, copied without waiting where its memory is pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The batch in page-locked memory; the loader of torch calls this by name."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        present: dict[str, Any] = {k: v for k, v in vars(self).items() if v is not None}
        return type(self)(**{k: change(v) for k, v in present.items()})


@dataclass(frozen=True)
class EvaluationBatch:
    """Whole images for inference, their ground truth in its own size."""

    names: tuple[str, ...]
    """Image names, as in the split's list."""
    images: Float[Tensor, "b 3 h w"]
    """Resized to `evaluation.size`, normalised as in training."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width of each image's file, pixels."""
    masks: tuple[Int[Tensor, "_h _w"], ...]
    """Ground truth, classes in [0, k) or IGNORE, each in the size of its own image; empty where the split
    has none."""
    labels: Float[Tensor, "b c"]
    """Image-level labels, 0 or 1."""
    originals: tuple[UInt8[np.ndarray, "_h _w 3"], ...] = ()
    """The images as RGB in their own size, where a CRF is to see them."""


@dataclass(frozen=True)
class NetworkOutput:
    """What one network says of a batch of images."""

    cls_logits: Float[Tensor, "b c"]
    """Z, from the last block."""
    aux_cls_logits: Float[Tensor, "b c"]
    """Z-dagger, from the earlier block."""
    cam: Float[Tensor, "b c p q"]
    """M, raw."""
    aux_cam: Float[Tensor, "b c p q"]
    """M-dagger, raw."""
    seg_logits: Float[Tensor, "b k p q"] | None
    """S; None where the caller asked for no segmentation."""
    guided_cam: Float[Tensor, "b c p q"] | None = None
    """M for the guidance, which spares a part of it from its gradient; None where it reaches all of M."""


@dataclass(frozen=True)
class SegmentationOutput:
    """What a standalone segmentation network says of a batch of images."""

    seg_logits: Float[Tensor, "b k p q"]
    """S, in the resolution of the network's decoder."""
    aux_logits: Float[Tensor, "b k r s"] | None
    """The same by the auxiliary head, which training alone reads; None where there is none."""


@dataclass(frozen=True, kw_only=True)
class FusedSegmentation:
    """What a network says of a batch over several scales and flips, in one resolution."""

    seg_logits: Float[Tensor, "b m h w"]
    """S, mean over scales and flips."""


@dataclass(frozen=True, kw_only=True)
class FusedOutput(FusedSegmentation):
    """The same of CoSA's network, with its CAMs and what they rest on.

    n of M's maps and m of S's, those that the caller wanted: all c and all k where it did not say.
    """

    cam: Float[Tensor, "b n h w"]
    """M, raw, maximum over scales and flips."""
    aux_cam: Float[Tensor, "b n h w"]
    """M-dagger, raw, maximum over scales and flips."""
    cls_logits: Float[Tensor, "b c"]
    """Z, mean over scales and flips."""
    aux_cls_logits: Float[Tensor, "b c"]
    """Z-dagger, mean over scales and flips."""


@dataclass(frozen=True)
class CamTargets:
    """What one CAM assigns: labels, how sure, and how much each pixel weighs."""

    activation: Float[Tensor, "b h w"]
    """nu: the maximum activation over the image's classes, in [0, 1]."""
    cpl: Int[Tensor, "b h w"]
    """CAM pseudo-labels in [0, k), IGNORE on padding and within `threshold.band`."""
    perplexity: Float[Tensor, "b h w"]
    """Perplexity of the CPL, >= 0 and finite."""
    raw: Float[Tensor, "b h w"]
    """Weight of each pixel in c2s, mean 1 over the batch's pixels unless `c2s.average` is balanced; 0 where
    there is no label."""


@dataclass(frozen=True)
class Assignment:
    """All that is assigned to ON for one batch; nothing here carries a gradient."""

    cam: CamTargets
    """From M'."""
    aux_cam: CamTargets
    """From M-dagger'."""
    spl: Float[Tensor, "b m h w"]
    """Segmentation pseudo-labels: probabilities of the background and of the classes in `present`."""
    present: Int[Tensor, "b n"]
    """See `Batch`; classes that the image does not hold are 0 in `spl`, and so are all others."""


T = TypeVar("T", bound=Batch | FusedSegmentation | Assignment | CamTargets)
Item = TypeVar("Item")


def split(item: T, count: int) -> list[T]:
    """`item` as `count` equal shares of its images, in order; `count` divides their number."""
    parts: dict[str, Any] = {
        k: v.chunk(count) if isinstance(v, Tensor) else split(v, count)
        for k, v in vars(item).items()
        if v is not None
    }
    return [type(item)(**{k: part[i] for k, part in parts.items()}) for i in range(count)]


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; alone, every call is the identity.

    N ranks agree by summing: gradients are averaged by DDP; activation histograms, reliabilities, pixel
    counts and confusion matrices are summed over ranks before anything is derived from them.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def current(cls) -> Ranks:
        """The rank torch.distributed says, or the only one; on its GPU where there is one."""
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    @property
    def first(self) -> bool:
        """Whether this rank writes: files, tracking, progress."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, the same on each."""
        if self.world == 1:
            return tensor
        summed = tensor.clone()
        dist.all_reduce(summed)
        return summed

    def gather(self, item: Item) -> list[Item]:
        """What each rank has to say, in their order, the same on each; small things that can be pickled."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def wait(self) -> None:
        """Return once every rank is here."""
        if self.world > 1:
            dist.barrier()
