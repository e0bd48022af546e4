"""How AN follows ON: an exact copy at the start, an exponential moving average after every step."""

from __future__ import annotations

import copy

import torch

from cosa.networks.network import CosaNetwork


def assignment_of(online: CosaNetwork) -> CosaNetwork:
    """A copy of ON in evaluation mode that no gradient reaches."""
    return copy.deepcopy(online).requires_grad_(False).eval()


@torch.no_grad()
def follow(assignment: CosaNetwork, online: CosaNetwork, momentum: float) -> None:
    """AN <- m AN + (1 - m) ON, parameter by parameter, in place.

    Args:
        assignment: Changed in place.
        online: Read only.
        momentum: m in [0, 1]; 1 leaves AN as it is, 0 copies ON.
    """
    torch._foreach_lerp_(list(assignment.parameters()), list(online.parameters()), 1 - momentum)
