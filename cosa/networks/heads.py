"""What sits on the encoder's feature maps: a CAM head and the LargeFOV decoder."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own convention)


class CamHead(nn.Module):
    """Global max pooling, then a bias-free classifier; the same weights on each patch give the CAM."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.trunc_normal_(nn.Linear(channels, classes).weight, std=0.02))

    def forward(
        self, features: Float[Tensor, "b d p q"]
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b c p q"]]:
        """Class logits Z = pool(F) W and the map M = F W, both unbounded."""
        logits = F.linear(features.amax(dim=(2, 3)), self.weight)
        return logits, self._map(features, self.weight)

    def guided(
        self, features: Float[Tensor, "b d p q"], detach: Literal["features", "classifier"]
    ) -> Float[Tensor, "b c p q"]:
        """The same M, whose gradient does not reach F (`features`) or W (`classifier`).

        Paper: Tab. 4a.
        """
        if detach == "features":
            return self._map(features.detach(), self.weight)
        return self._map(features, self.weight.detach())

    @staticmethod
    def _map(features: Float[Tensor, "b d p q"], weight: Float[Tensor, "c d"]) -> Float[Tensor, "b c p q"]:
        return F.conv2d(features, weight[:, :, None, None])


class LargeFov(nn.Sequential):
    """The LargeFOV decoder: two dilated 3x3 convolutions, then 1x1 to k classes, no biases."""

    def __init__(self, channels: int, hidden: int, dilation: int, classes: int) -> None:
        def dilated(inputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, hidden, 3, padding=dilation, dilation=dilation, bias=False)

        super().__init__(
            dilated(channels),
            nn.ReLU(),
            dilated(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, classes, 1, bias=False),
        )
