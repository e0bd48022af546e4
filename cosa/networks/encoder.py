"""Any Vision Transformer of timm as an encoder of two feature maps: an earlier block's and the last's.

An encoder starts from random numbers or exactly from published weights, its final norm included; one that
cannot is refused.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own convention)

from cosa.config import NetworkConfig
from cosa.networks import _torchvision  # noqa: F401  (before timm: see its docstring)
from cosa.networks.published import published
from cosa.storage.files import digest, one_line
from cosa.storage.model_files import read_tensors, tensors_digest

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
        for name in ("width", "depth", "heads"):
            if getattr(config, name):
                raise ValueError(
                    f"network.{name} must be 0, the encoder's own, where it starts from published weights, "
                    f"got {getattr(config, name)}; set --network.pretrained false"
                )
    frozen = not (config.train_pos_embed or config.from_scratch)
    size = None if frozen else image_size
    if state is not None or config.from_scratch:
        vit = _create(config, size, num_classes=0)
        if frozen and state is not None and "pos_embed" in state:
            vit.pos_embed = nn.Parameter(torch.empty_like(state["pos_embed"]))
    else:
        vit = _from_file(config, size) if config.weights else _from_hub(config, size)
        _require_finite(vit, config)
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
    import timm
    from timm.models.vision_transformer import VisionTransformer

    shape: dict[str, Any] = {
        "img_size": image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    own = {name: value for name, value in shape.items() if value}
    try:
        vit = timm.create_model(
            config.encoder, dynamic_img_size=True, drop_path_rate=config.drop_path, **own, **more
        )
    except (AssertionError, RuntimeError) as error:  # timm's own checks: heads that do not divide the width
        reason = " ".join(str(error).split())[:300]  # of tensors that do not fit the first line says nothing
        raise ValueError(
            f"network must be one that timm can build, got {config.encoder!r} with {own} ({reason}); "
            "change these settings"
        ) from error
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"network.encoder must be a plain Vision Transformer, got {config.encoder!r}")
    return vit


def _without_head(vit: VisionTransformer) -> VisionTransformer:
    """The ViT down to its final norm; one that was published behind the pooling norms the patches instead."""
    if isinstance(vit.norm, nn.Identity):
        vit.norm, vit.fc_norm = vit.fc_norm, nn.Identity()
    vit.reset_classifier(0, "")
    return vit


def _from_hub(config: NetworkConfig, image_size: int | None) -> VisionTransformer:
    """The ViT with its published weights, which timm checks tensor by tensor, as its classifier is there."""
    try:
        with _asked_once():
            return _create(config, image_size, pretrained=True)
    except OSError as error:  # whatever kept timm from the hub: no network, a proxy, a full disk
        reason = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
        raise OSError(
            f"network.pretrained must find the weights of {config.encoder!r} on this machine or on the hub, "
            f"got neither ({reason}); set --network.pretrained false and --network.weights FILE.safetensors, "
            "or fetch them once where there is a network"
        ) from error


@contextmanager
def _asked_once() -> Iterator[None]:
    """Take weights from this machine alone where the hub does not answer: its client retries for a minute."""
    hub: Any = importlib.import_module("timm.models._hub")

    download, silent = hub.hf_hub_download, ""
    try:
        hub.model_info("timm/vit_base_patch16_224", timeout=5.0)
    except OSError:
        pass  # an answer of the hub, or one that is switched off by its own variable
    except Exception as error:  # noqa: BLE001 (of whichever HTTP client the hub has)
        silent = str(error)
        hub.hf_hub_download = partial(download, local_files_only=True)
    try:
        yield
    except OSError as error:
        if silent:
            raise OSError(silent) from error
        raise
    finally:
        hub.hf_hub_download = download


def _from_file(config: NetworkConfig, image_size: int | None) -> VisionTransformer:
    """The ViT with the weights of a local file, converted and resampled as timm does with those it fetches.

    Only tensors are read: .safetensors, or a .pth that holds nothing but tensors. A classifier is dropped.
    """
    path = Path(config.weights).expanduser()
    state = _encoder_tensors(read_tensors(path))
    if config.weights_sha256 and digest(path) != config.weights_sha256.lower():
        raise ValueError(
            f"network.weights must have the SHA-256 {config.weights_sha256}, got {str(path)!r} with another; "
            "take that file, or set --network.weights_sha256="
        )
    with torch.device("meta"):
        like = _create(config, None, num_classes=0)
    side = _grid_side(like, state)
    if image_size is None and side:  # the positions' own grid: timm then has nothing to resample
        image_size = side * int(like.patch_embed.patch_size[0])
    try:
        vit = _create(
            config,
            image_size,
            num_classes=0,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": state, "num_classes": 0},
        )
    except Exception as error:  # (timm's filters for a dozen namings meet what they do not expect)
        difference = _difference(like, state, error)
        raise ValueError(
            f"network.weights must fit the encoder, got {str(path)!r}, which {difference}; "
            "set network.encoder to the architecture the file was made for"
        ) from error
    cfg: Any = vit.pretrained_cfg
    del cfg["state_dict"]  # or every copy of the network would hold it, too
    return vit


def _encoder_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file without those of a classifier, under the names that they have in the ViT itself.

    Training tools put the ViT into others: DistributedDataParallel calls it `module`, DINO `backbone`.
    """
    found = dict(state)
    while prefix := next((p for p in ("module.", "backbone.") for name in found if name.startswith(p)), ""):
        found = {name.removeprefix(prefix): v for name, v in found.items() if name.startswith(prefix)}
    return {name: v for name, v in found.items() if not name.startswith(("head.", "head_dist."))}


def _grid_side(vit: VisionTransformer, state: Mapping[str, Tensor]) -> int:
    """Side of the square grid of a file's position embeddings, patches; 0 where there is none."""
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3:
        return 0
    patches = positions.shape[1] - (0 if vit.no_embed_class else vit.num_prefix_tokens)
    side = math.isqrt(max(patches, 0))
    return side if side**2 == patches else 0


def _difference(vit: VisionTransformer, state: Mapping[str, Tensor], error: Exception) -> str:
    """The first thing in which a file is not one of the ViT, whose tensors may be on the meta device."""
    own = vit.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own.keys() & state.keys() - {"pos_embed"}
        if state[k].shape != own[k].shape
    ]
    if missing or unknown or shapes:
        first = (
            f"misses {missing[0]}" if missing else f"has an unknown {unknown[0]}" if unknown else min(shapes)
        )
        return f"{first} ({len(missing) + len(unknown) + len(shapes)} differences)"
    if "pos_embed" in state and not _grid_side(vit, state):
        return f"has {state['pos_embed'].shape[1]} position embeddings, which are no square grid"
    return f"timm does not take ({one_line(error, kind=False)})"


def _require_finite(vit: VisionTransformer, config: NetworkConfig) -> None:
    """Refuse weights that training could only spoil further."""
    for name, tensor in vit.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"weights must be finite, got NaN or infinity in {name} of "
                f"{config.weights or config.encoder!r}; fetch or convert them again"
            )
