"""A network small enough to reason about: each patch is judged by its average colour alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from cosa.networks.network import CosaNetwork
from cosa.structures import NetworkOutput


class ColourNetwork(CosaNetwork):
    """Two classes; flip-equivariant, because each patch is judged on its own."""

    patch_size = 4
    classes = 2

    def __init__(self, seed: int = 0) -> None:
        nn.Module.__init__(self)  # no encoder
        rng = torch.Generator().manual_seed(seed)
        self.weights = {
            name: torch.randn(rows, 3, generator=rng)
            for name, rows in (("cam", 2), ("aux_cam", 2), ("seg_logits", 3))
        }
        self.sizes: list[tuple[int, int]] = []
        """Height and width of every input so far."""

    def forward(self, images: Tensor, *, segment: bool = True) -> NetworkOutput:
        """Each patch's mean colour through one matrix per map; image scores are the maps' maxima."""
        self.sizes.append((images.shape[2], images.shape[3]))
        patches = avg_pool2d(images, self.patch_size)
        cam, aux_cam, seg_logits = (
            torch.einsum("nd,bdpq->bnpq", weight, patches) for weight in self.weights.values()
        )
        return NetworkOutput(
            cls_logits=cam.amax((-2, -1)),
            aux_cls_logits=aux_cam.amax((-2, -1)),
            cam=cam,
            aux_cam=aux_cam,
            seg_logits=seg_logits if segment else None,
        )
