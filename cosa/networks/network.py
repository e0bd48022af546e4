"""The network that ON and AN both are: encoder, two CAM heads, segmentation decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cosa.config import NetworkConfig, TrainConfig
from cosa.networks.encoder import Encoder, build_encoder
from cosa.networks.heads import CamHead, LargeFov
from cosa.structures import NetworkOutput


class CosaNetwork(nn.Module):
    """Class logits and CAMs from the last and an earlier block, segmentation logits from the last."""

    def __init__(self, encoder: Encoder, classes: int, decoder_channels: int, decoder_dilation: int) -> None:
        super().__init__()
        self.classes = classes
        self.encoder = encoder
        self.cam_head = CamHead(encoder.channels, classes)
        self.aux_cam_head = CamHead(encoder.channels, classes)
        self.decoder = LargeFov(encoder.channels, decoder_channels, decoder_dilation, classes + 1)

    @property
    def patch_size(self) -> int:
        """Side of a patch, pixels: images must be multiples of it."""
        return self.encoder.patch_size

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        *,
        segment: bool = True,
        detach: Literal["none", "features", "classifier"] = "none",
    ) -> NetworkOutput:
        """All outputs on the patch grid, in fp32 even under autocast.

        Args:
            images: Normalised images, sides multiples of `patch_size`.
            segment: False leaves the decoder out, as the warm-up does.
            detach: What of M = F W the guidance's gradient is not to reach; it then gets a map of its own.
        """
        aux_features, features = self.encoder(images)
        cls_logits, cam = self.cam_head(features)
        aux_cls_logits, aux_cam = self.aux_cam_head(aux_features)
        return NetworkOutput(
            cls_logits=cls_logits.float(),
            aux_cls_logits=aux_cls_logits.float(),
            cam=cam.float(),
            aux_cam=aux_cam.float(),
            seg_logits=self.decoder(features).float() if segment else None,
            guided_cam=None if detach == "none" else self.cam_head.guided(features, detach).float(),
        )


def in_bf16(config: TrainConfig, device: torch.device) -> bool:
    """Whether networks compute in bfloat16: `train.precision` says so, or leaves it to `device`."""
    if config.precision == "auto":
        return device.type == "cuda" and not emulates_bf16(device)
    return config.precision == "bf16"


def emulates_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is slower than float32 on `device`, for want of its own instructions.

    Source: products of a DeiT-Tiny's size took 50 times as long on a CPU with AVX2 alone.
    """
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def warning_of(config: TrainConfig, device: torch.device) -> str:
    """What to say before networks compute on `device`: that its bfloat16 is emulated; mostly nothing."""
    if not (in_bf16(config, device) and emulates_bf16(device)):
        return ""
    return f"train.precision bf16 is emulated on this {device.type}, many times slower: take fp32"


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The context in which networks compute as `train.precision` says."""
    return torch.autocast(device.type, torch.bfloat16, enabled=in_bf16(config, device))


def plain_attention(network: nn.Module) -> None:
    """Have the blocks of timm's attention in `network` multiply and normalise one after the other.

    For learning in bfloat16 on a CPU: torch's fused attention takes four times as long there over the 101
    tokens of 160 pixels, nearly all of it in its gradient. Elsewhere, and without gradients, it is faster.
    """
    module: Any
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def build_network(
    config: NetworkConfig, classes: int, image_size: int, *, state: Mapping[str, Tensor] | None = None
) -> CosaNetwork:
    """The network a config describes, for `classes` foreground classes and crops of `image_size` pixels.

    Args:
        config: What it is.
        classes: Foreground classes.
        image_size: Side of the crop, pixels.
        state: The network's own tensors, which the caller will load: no published ones are read then.

    Raises:
        ValueError: As `build_encoder`, the crop is no multiple of the patch, or it is another architecture.
        FileNotFoundError: `network.weights` names no file.
    """
    if config.architecture != "cosa":
        raise ValueError(
            f"network.architecture must be cosa, got {config.architecture!r}; "
            "a standalone network is trained by cosa-segment"
        )
    inside = None
    if state is not None:
        prefix = "encoder.vit."
        inside = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
    encoder = build_encoder(config, image_size, state=inside)
    if image_size % encoder.patch_size:
        raise ValueError(
            f"data.crop_size must be a multiple of the patch size {encoder.patch_size}, got {image_size}"
        )
    network = CosaNetwork(encoder, classes, config.decoder_channels, config.decoder_dilation)
    network.aux_cam_head.requires_grad_(config.aux_head)
    return network
