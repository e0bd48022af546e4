"""Any Vision Transformer of timm as an encoder of two feature maps: an earlier block's and the last's.

Published weights are taken with the final norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from cosa.config import NetworkConfig
from cosa.networks.published import published
from cosa.networks.weights import create_model, require_own_sizes, with_published_weights
from cosa.storage.model_files import tensors_digest

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class Encoder(nn.Module):
    """A ViT whose blocks `aux_block` and last are read as feature maps, the last through the final norm.

    Args:
        vit: Without a classifier, and of dynamic image size.
        aux_block: Counted from the end, -1 is the last.
        aux_norm: Whether the earlier map goes through the final norm, too.
        train_pos_embed: Whether position embeddings are trained; else they stay on the grid that they have.
    """

    def __init__(
        self, vit: VisionTransformer, aux_block: int, *, aux_norm: bool, train_pos_embed: bool
    ) -> None:
        super().__init__()
        self.vit = vit
        self.aux_index = len(vit.blocks) + aux_block
        self.aux_norm = aux_norm
        self.train_pos_embed = train_pos_embed or vit.pos_embed is None
        if vit.pos_embed is not None:
            vit.pos_embed.requires_grad_(self.train_pos_embed)

    @property
    def channels(self) -> int:
        """Channels of both feature maps."""
        return int(self.vit.embed_dim)

    @property
    def patch_size(self) -> int:
        """Side of a patch, pixels."""
        return int(self.vit.patch_embed.patch_size[0])

    def forward(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b d p q"], Float[Tensor, "b d p q"]]:
        """Feature maps of the earlier and of the last block; h and w are multiples of the patch."""
        vit = self.vit
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        patches = vit.patch_embed(images)
        # timm's own way of placing patches has no public name
        tokens = vit._pos_embed(patches) if self.train_pos_embed else self._placed(patches)  # noqa: SLF001
        tokens = aux = vit.norm_pre(vit.patch_drop(tokens))
        for index, block in enumerate(vit.blocks):
            tokens = block(tokens)
            if index == self.aux_index:
                aux = vit.norm(tokens) if self.aux_norm else tokens
        return self._map(aux, grid), self._map(vit.norm(tokens), grid)

    def _placed(self, patches: Float[Tensor, "b p q d"]) -> Float[Tensor, "b t d"]:
        """Prefix tokens and patches with the position embeddings resampled to their grid.

        Paper silent; as the authors' code does it, bicubically and not antialiased, from the published grid.
        """
        vit = self.vit
        tokens = (getattr(vit, name, None) for name in ("cls_token", "dist_token", "reg_token"))
        prefix = [token.expand(len(patches), -1, -1) for token in tokens if token is not None]
        count = 0 if vit.no_embed_class else vit.num_prefix_tokens
        assert vit.pos_embed is not None, "there are positions to train where there are none to place"
        own, grid = vit.pos_embed[:, :count], vit.pos_embed[:, count:].transpose(1, 2)
        side = math.isqrt(grid.shape[2])
        square = grid.reshape(1, -1, side, side)
        positions = F.interpolate(square, patches.shape[1:3], mode="bicubic", align_corners=False)
        positions = positions.flatten(2).transpose(1, 2)
        if vit.no_embed_class:
            return torch.cat([*prefix, patches.flatten(1, 2) + positions], 1)
        return torch.cat([*prefix, patches.flatten(1, 2)], 1) + torch.cat([own, positions], 1)

    def _map(self, tokens: Float[Tensor, "b t d"], grid: tuple[int, int]) -> Float[Tensor, "b d p q"]:
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return patches.reshape(len(tokens), *grid, -1).permute(0, 3, 1, 2).contiguous()

    def digest(self) -> str:
        """The SHA-256 of the encoder's tensors: names, types, shapes and values."""
        return tensors_digest(self.vit.state_dict())


def build_encoder(
    config: NetworkConfig, image_size: int, *, state: Mapping[str, Tensor] | None = None
) -> Encoder:
    """The encoder a config describes.

    Args:
        config: What it is.
        image_size: Side of the crop, pixels: trained position embeddings are resampled to its grid.
        state: The ViT's own tensors, which the caller will load: no published ones are read then.

    Raises:
        ValueError: timm knows no such ViT, the sizes do not fit, or the weights are of another architecture.
        FileNotFoundError: `network.weights` names no file.
        OSError: The published weights are not on this machine and the hub does not answer.
    """
    if state is not None:  # the tag says where it began; timm may no longer have it
        config = config.replace(encoder=config.encoder.partition(".")[0])
    published(config.encoder)
    if config.pretrained and state is None:
        require_own_sizes(config, ("width", "depth", "heads"))
    frozen = not (config.train_pos_embed or config.from_scratch)
    size = None if frozen else image_size
    if state is not None or config.from_scratch:
        vit = _create(config, size, num_classes=0)
        if frozen and state is not None and "pos_embed" in state:
            vit.pos_embed = nn.Parameter(torch.empty_like(state["pos_embed"]))
    else:
        vit = with_published_weights(_create, config, size)
    vit = _without_head(vit)
    if -config.aux_block > len(vit.blocks):
        raise ValueError(
            f"network.aux_block must name one of the encoder's {len(vit.blocks)} blocks, "
            f"got {config.aux_block}"
        )
    return Encoder(vit, config.aux_block, aux_norm=config.aux_norm, train_pos_embed=not frozen)


def _create(config: NetworkConfig, image_size: int | None, **more: Any) -> VisionTransformer:
    """The ViT as timm builds it, with what it was published with around the blocks; None keeps its own size.

    Raises:
        ValueError: timm cannot build it, or it is no plain Vision Transformer.
    """
    from timm.models.vision_transformer import VisionTransformer

    shape: dict[str, Any] = {
        "img_size": image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    own = {name: value for name, value in shape.items() if value}
    vit = create_model(config, own, dynamic_img_size=True, **more)
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"network.encoder must be a plain Vision Transformer, got {config.encoder!r}")
    return vit


def _without_head(vit: VisionTransformer) -> VisionTransformer:
    """The ViT down to its final norm; one that was published behind the pooling norms the patches instead."""
    if isinstance(vit.norm, nn.Identity):
        vit.norm, vit.fc_norm = vit.fc_norm, nn.Identity()
    vit.reset_classifier(0, "")
    return vit
