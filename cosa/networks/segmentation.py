"""Standalone segmentation networks: what CoSA-MS trains on pseudo-labels (Tab. 2), and their supervised rows.

Each is an encoder of several feature maps, a decoder that reads them, and at most one auxiliary head. What
the decoders of `segmentation-models-pytorch` lack stands here. docs/method.md has their parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from cosa.config import NetworkConfig
from cosa.networks import _torchvision  # noqa: F401  (before the decoders: see its docstring)
from cosa.networks.encoder import build_encoder
from cosa.networks.heads import LargeFov
from cosa.networks.published import published
from cosa.networks.weights import create_model, require_own_sizes, with_published_weights
from cosa.networks.wideresnet import build_wideresnet
from cosa.storage.model_files import tensors_digest
from cosa.structures import SegmentationOutput

ATROUS_RATES = (6, 12, 18)
"""Of DeepLabV3+'s pyramid at output stride 16; source: its paper, and BECO."""
MULTI_GRID = (1, 2, 4)
"""Factors on the dilation of the last stage's three blocks; source: BECO."""
DROPOUT = 0.1
"""Before the logits, or in DeepLabV3+ behind the pyramid; source: BECO and mmsegmentation's UPerNet."""
AUX_CHANNELS, AUX_STAGE = 256, 2
"""Of UPerNet's auxiliary head: its convolution, and the stage it reads (from 0); source: mmsegmentation."""


class SegmentationNetwork(nn.Module):
    """An encoder, a decoder on its feature maps, and an auxiliary head or None.

    BatchNorm needs two values per channel to train on: a batch of two images for each process, or SyncBN.
    """

    def __init__(self, encoder: Any, decoder: nn.Module, aux_head: nn.Module | None, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.encoder = encoder
        self.decoder = decoder
        self.aux_head = aux_head

    @property
    def patch_size(self) -> int:
        """Pixels that sides of images must be multiples of: the stride of the encoder's coarsest map."""
        return int(self.encoder.patch_size)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> SegmentationOutput:
        """Logits in the decoder's resolution, in fp32 even under autocast.

        Args:
            images: Normalised images, sides multiples of `patch_size`.
        """
        maps = self.encoder(images)
        return SegmentationOutput(
            seg_logits=self.decoder(maps).float(),
            aux_logits=None if self.aux_head is None else self.aux_head(maps).float(),
        )


class Backbone(nn.Module):
    """A ResNet or a Swin Transformer of timm, read behind each of its four stages.

    Args:
        model: With its last stage's norm and its classifier, which are taken off.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.prune_intermediate_layers(4, prune_norm=True)
        self.model = model

    @property
    def channels(self) -> list[int]:
        """Channels of the four maps, finest first."""
        return [stage["num_chs"] for stage in self.model.feature_info[-4:]]

    @property
    def patch_size(self) -> int:
        """Stride of the coarsest map, pixels."""
        return int(self.model.feature_info[-1]["reduction"])

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _d _p _q"]]:
        """The four maps, finest first; h and w are multiples of `patch_size`."""
        maps: list[Tensor] = self.model.forward_intermediates(images, indices=4, intermediates_only=True)
        return maps

    def digest(self) -> str:
        """The SHA-256 of the encoder's tensors: names, types, shapes and values."""
        return tensors_digest(self.model.state_dict())


class _OnMap(nn.Module):
    """A head that reads one of the encoder's maps."""

    def __init__(self, head: nn.Module, index: int) -> None:
        super().__init__()
        self.head = head
        self.index = index

    def forward(self, maps: Sequence[Float[Tensor, "b _d _p _q"]]) -> Float[Tensor, "b k p q"]:
        logits: Tensor = self.head(maps[self.index])
        return logits


class _OnAllMaps(nn.Module):
    """A decoder of `segmentation-models-pytorch`, then a classifier on each of its pixels."""

    def __init__(self, decoder: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.classifier = classifier

    def forward(self, maps: Sequence[Float[Tensor, "b _d _p _q"]]) -> Float[Tensor, "b k p q"]:
        # these decoders count maps from the image's own resolution and read those from stride 4 on
        logits: Tensor = self.classifier(self.decoder([None, None, *maps]))
        return logits


def build_segmentation_network(
    config: NetworkConfig, classes: int, image_size: int, *, state: Mapping[str, Tensor] | None = None
) -> SegmentationNetwork:
    """The standalone network a config describes, for `classes` foreground classes.

    Args:
        config: What it is.
        classes: Foreground classes; the network has one more, the background.
        image_size: Side of the crop, pixels.
        state: The network's own tensors, which the caller will load: no published ones are read then.

    Raises:
        ValueError: `network.architecture` is not standalone, timm has no such encoder, sizes do not fit, or
            the weights are of another architecture.
        FileNotFoundError: `network.weights` names no file.
        OSError: The published weights are not on this machine and the hub does not answer.
    """
    if config.architecture == "cosa":
        raise ValueError(
            "network.architecture must be a standalone network, got 'cosa'; that one is trained by cosa-train"
        )
    if config.architecture == "largefov_vit":
        inside = None
        if state is not None:
            prefix = "encoder.vit."
            inside = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        vit = build_encoder(config, image_size, state=inside)
        head: nn.Module = LargeFov(
            vit.channels, config.decoder_channels, config.decoder_dilation, classes + 1
        )
        network = SegmentationNetwork(vit, _OnMap(head, -1), None, classes)
    elif config.architecture == "largefov_wideresnet38":
        wide = build_wideresnet(config, begun=state is not None)
        head = _wide_fov(wide.channels[-1], config.decoder_channels, config.decoder_dilation, classes + 1)
        network = SegmentationNetwork(wide, _OnMap(head, -1), None, classes)
    else:
        network = _on_stages(config, classes, image_size, begun=state is not None)
    if image_size % network.patch_size:
        raise ValueError(
            f"data.crop_size must be a multiple of the network's stride {network.patch_size}, "
            f"got {image_size}"
        )
    return network


def _on_stages(config: NetworkConfig, classes: int, image_size: int, *, begun: bool) -> SegmentationNetwork:
    """DeepLabV3+ or UPerNet on the four stages of a ResNet or a Swin Transformer."""
    from segmentation_models_pytorch.base.initialization import initialize_decoder
    from segmentation_models_pytorch.decoders.deeplabv3.decoder import DeepLabV3PlusDecoder
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    encoder = Backbone(_stages(config, image_size, begun=begun))
    channels, hidden = [0, 0, *encoder.channels], config.decoder_channels
    aux_head = None
    if config.architecture == "deeplabv3plus":
        _set_multi_grid(encoder.model)
        decoder = DeepLabV3PlusDecoder(
            channels,
            encoder_depth=5,
            out_channels=hidden,
            atrous_rates=ATROUS_RATES,
            output_stride=16,
            aspp_separable=True,
            aspp_dropout=DROPOUT,
        )
        classifier: nn.Module = nn.Conv2d(hidden, classes + 1, 1)
    else:
        decoder = UPerNetDecoder(channels, encoder_depth=5, decoder_channels=hidden)
        classifier = nn.Sequential(nn.Dropout2d(DROPOUT), nn.Conv2d(hidden, classes + 1, 1))
        if config.aux_head:
            aux_head = _OnMap(_fcn_head(encoder.channels[AUX_STAGE], classes + 1), AUX_STAGE)
            initialize_decoder(aux_head)
    initialize_decoder(decoder)
    return SegmentationNetwork(encoder, _OnAllMaps(decoder, classifier), aux_head, classes)


def _wide_fov(channels: int, hidden: int, dilation: int, outputs: int) -> nn.Sequential:
    """LargeFOV as MCTformer puts it on WideResNet38: two dilated 3x3 convolutions, the second the logits."""
    first = nn.Conv2d(channels, hidden, 3, padding=dilation, dilation=dilation)
    last = nn.Conv2d(hidden, outputs, 3, padding=dilation, dilation=dilation)
    for convolution in (first, last):
        nn.init.xavier_uniform_(convolution.weight)
    return nn.Sequential(first, nn.ReLU(), last)


def _fcn_head(channels: int, outputs: int) -> nn.Sequential:
    """One 3x3 convolution, then the logits."""
    return nn.Sequential(
        nn.Conv2d(channels, AUX_CHANNELS, 3, padding=1, bias=False),
        nn.BatchNorm2d(AUX_CHANNELS),
        nn.ReLU(),
        nn.Dropout2d(DROPOUT),
        nn.Conv2d(AUX_CHANNELS, outputs, 1),
    )


def _set_multi_grid(resnet: Any) -> None:
    """Dilate the 3x3 convolutions of the last stage's bottlenecks by twice MULTI_GRID; basic blocks stay."""
    for block, factor in zip(resnet.layer4, MULTI_GRID, strict=False):
        if hasattr(block, "conv3"):
            block.conv2.dilation = block.conv2.padding = (2 * factor, 2 * factor)


def _stages(config: NetworkConfig, image_size: int, *, begun: bool) -> nn.Module:
    """The encoder of `_on_stages` as timm builds it, `begun` where its tensors will be loaded."""
    if begun:  # the tag says where it began; timm may no longer have it
        config = config.replace(encoder=config.encoder.partition(".")[0])
    published(config.encoder, config.architecture)
    if begun or config.from_scratch:
        return _create(config, image_size, num_classes=0)
    require_own_sizes(config, ("patch_size", "width", "depth", "heads"))
    return with_published_weights(_create, config, image_size)


def _create(config: NetworkConfig, image_size: int | None, **more: Any) -> nn.Module:
    """A Swin Transformer for images of any size, or a ResNet, in DeepLabV3+ of output stride 16."""
    own: dict[str, Any] = {}
    if config.encoder.startswith("swin"):
        stages = range(4)
        shape = {
            "patch_size": config.patch_size,
            "embed_dim": config.width,
            "depths": config.depth and (config.depth,) * 4,
            "num_heads": config.heads and tuple(config.heads * 2**stage for stage in stages),
        }
        own = {name: value for name, value in shape.items() if value}
        # windows keep their size on maps that are smaller, as the published position biases need it
        more |= {"img_size": image_size or 224, "strict_img_size": False, "always_partition": True}
    else:
        for name in ("patch_size", "width", "depth", "heads"):
            if getattr(config, name):
                raise ValueError(
                    f"network.{name} must be 0 for a ResNet, which has none to choose, "
                    f"got {getattr(config, name)}"
                )
        if config.architecture == "deeplabv3plus":
            more |= {"output_stride": 16}
    return create_model(config, own, **more)
