"""How the processes of one run speak to each other; alone, every call is the identity.

N ranks agree by summing: gradients are averaged by DDP, activation histograms, reliabilities, pixel counts
and confusion matrices are summed over ranks before anything is derived from them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

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

    def gather(self, item: T) -> list[T]:
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
