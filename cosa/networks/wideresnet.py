"""WideResNet38 (Wu et al., Wider or Deeper) as WSSS uses it: dilated to stride 8, without its classifier.

Facts of its published weights, mxnet's file `ilsvrc-cls_rna-a1_cls1000_ep-0001.params`: a convolution is
`arg:res4b3_branch2a_weight`, the norm before it `arg:bn4b3_branch2a_gamma` (`_beta`, and behind `aux:`
`_moving_mean`, `_moving_var`), in the third repetition of stage 4, whose first block is `res4a`. PSA has the
same tensors for PyTorch as `b4_3.conv_branch2a.weight` and so on; those are our names. `network.weights` is
PSA's file, or mxnet's once its tensors are in one that torch reads, written where mxnet is installed:

    tensors = {name: torch.from_numpy(v.asnumpy()) for name, v in mxnet.nd.load(PARAMS).items()}
    safetensors.torch.save_file(tensors, "wideresnet38.safetensors")
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Self

from jaxtyping import Float
from torch import Tensor, nn

from cosa.config import NetworkConfig, nearest
from cosa.networks.weights import misfit, read_weights, require_finite
from cosa.storage.model_files import tensors_digest

WIDTHS = {"wideresnet38": 64, "wideresnet38_thin": 8}
"""Channels of the first convolution, by name; those of all later ones are multiples of it."""

_MXNET = re.compile(r"(?:arg|aux):(?:(res|bn)(\d)(?:a|b(\d+))_(branch\w+?)|(conv1a|bn7|linear1000))_(\w+)")
_KINDS = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}


class WideResNet38(nn.Sequential):
    """One feature map of 64 times the first width, at stride 8.

    Args:
        width: Channels of the first convolution: 64 in the published network.
        frozen_norms: Whether BatchNorm keeps the numbers it has, in training, too; as PSA and MCTformer train
            from published weights.
    """

    patch_size = 8

    def __init__(self, width: int, *, frozen_norms: bool) -> None:
        def block(inputs: int, middle: int, outputs: int, **more: int) -> _Block:
            return _Block(inputs * width, middle * width, outputs * width, **more)

        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["conv1a"] = nn.Conv2d(3, width, 3, padding=1, bias=False)
        for stage, (inputs, outputs, repeats) in {2: (1, 2, 2), 3: (2, 4, 2), 4: (4, 8, 5)}.items():
            layers[f"b{stage}"] = block(inputs, outputs, outputs, stride=2)
            for index in range(1, repeats + 1):
                layers[f"b{stage}_{index}"] = block(outputs, outputs, outputs)
        layers["b5"] = block(8, 8, 16, dilation=2, first_dilation=1)
        layers["b5_1"] = block(16, 8, 16, dilation=2)
        layers["b5_2"] = block(16, 8, 16, dilation=2)
        layers["b6"] = _Bottleneck(16 * width, 32 * width, dilation=4, dropout=0.3)
        layers["b7"] = _Bottleneck(32 * width, 64 * width, dilation=4, dropout=0.5)
        layers["bn7"] = nn.BatchNorm2d(64 * width)
        layers["relu"] = nn.ReLU()
        super().__init__(layers)
        self.channels = [64 * width]
        self.frozen_norms = frozen_norms
        if frozen_norms:
            for norm in self._norms():
                norm.requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b d p q"]]:
        """The last feature map, alone in its list; h and w are multiples of 8."""
        features: Tensor = nn.Sequential.forward(self, images)  # type: ignore[no-untyped-call]
        return [features]

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; frozen norms stay in evaluation."""
        super().train(mode)
        if self.frozen_norms:
            for norm in self._norms():
                norm.eval()
        return self

    def digest(self) -> str:
        """The SHA-256 of the encoder's tensors: names, types, shapes and values."""
        return tensors_digest(self.state_dict())

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]


class _Block(nn.Module):
    """Two 3x3 convolutions, each behind its norm; where the shape changes the shortcut is a convolution."""

    def __init__(
        self,
        inputs: int,
        middle: int,
        outputs: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        first_dilation: int = 0,
    ) -> None:
        super().__init__()
        first = first_dilation or dilation
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, middle, 3, stride, padding=first, dilation=first, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(middle)
        self.conv_branch2b1 = nn.Conv2d(middle, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        self.conv_branch1 = None
        if inputs != outputs or stride != 1:
            self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "b _c _h _w"]) -> Float[Tensor, "b _d _p _q"]:
        activated = self.bn_branch2a(x).relu()
        shortcut = x if self.conv_branch1 is None else self.conv_branch1(activated)
        branch = self.bn_branch2b1(self.conv_branch2a(activated)).relu()
        changed: Tensor = self.conv_branch2b1(branch)
        return changed + shortcut


class _Bottleneck(nn.Module):
    """A 1x1, a dilated 3x3 and a 1x1 convolution, each behind its norm, with dropout before the last two."""

    def __init__(self, inputs: int, outputs: int, *, dilation: int, dropout: float) -> None:
        super().__init__()
        quarter, half = outputs // 4, outputs // 2
        self.bn_branch2a = nn.BatchNorm2d(inputs)
        self.conv_branch2a = nn.Conv2d(inputs, quarter, 1, bias=False)
        self.bn_branch2b1 = nn.BatchNorm2d(quarter)
        self.conv_branch2b1 = nn.Conv2d(quarter, half, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn_branch2b2 = nn.BatchNorm2d(half)
        self.conv_branch2b2 = nn.Conv2d(half, outputs, 1, bias=False)
        self.conv_branch1 = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Float[Tensor, "b _c h w"]) -> Float[Tensor, "b _d h w"]:
        activated = self.bn_branch2a(x).relu()
        branch = self.conv_branch2a(activated)
        branch = self.conv_branch2b1(self.dropout(self.bn_branch2b1(branch).relu()))
        changed: Tensor = self.conv_branch2b2(self.dropout(self.bn_branch2b2(branch).relu()))
        shortcut: Tensor = self.conv_branch1(activated)
        return changed + shortcut


def build_wideresnet(config: NetworkConfig, *, begun: bool) -> WideResNet38:
    """The encoder `network.encoder`, from random numbers, or from the file `network.weights`.

    Args:
        config: What it is.
        begun: Whether its tensors will be loaded by the caller: the file is not read then.

    Raises:
        ValueError: There is no such variant, or the file holds another network's tensors.
        FileNotFoundError: There is no such file.
    """
    if config.encoder not in WIDTHS:
        raise ValueError(
            f"network.encoder must be one of {', '.join(WIDTHS)} for a WideResNet38, "
            f"got {config.encoder!r}{nearest(config.encoder, WIDTHS)}"
        )
    network = WideResNet38(WIDTHS[config.encoder], frozen_norms=not config.from_scratch)
    if config.from_scratch or begun:
        return network
    state = _as_ours(read_weights(config))
    own = network.state_dict()
    counts = {name: own[name] for name in own.keys() - state.keys() if name.endswith("num_batches_tracked")}
    try:
        network.load_state_dict(state | counts)  # mxnet counts no batches
    except RuntimeError as error:
        raise misfit(config, network, state | counts, "torch does not take") from error
    require_finite(network, config)
    return network


def _as_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under PSA's names, those of mxnet renamed; ImageNet's classifier is left out."""
    found = {}
    for name, tensor in state.items():
        parts = _MXNET.fullmatch(name)
        if parts is None:
            found[name] = tensor
            continue
        kind, stage, repeat, branch, whole, what = parts.groups()
        what = _KINDS.get(what, what)
        if whole:
            found[f"{whole}.{what}"] = tensor
        else:
            block = f"b{stage}_{repeat}" if repeat else f"b{stage}"
            found[f"{block}.{'conv' if kind == 'res' else 'bn'}_{branch}.{what}"] = tensor
    return {name: tensor for name, tensor in found.items() if not name.startswith(("linear1000.", "fc8."))}
