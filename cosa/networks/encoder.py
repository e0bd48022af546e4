"""Any Vision Transformer of timm as an encoder of two feature maps: an earlier block's and the last's."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor, nn

from cosa.config import NetworkConfig, nearest
from cosa.networks import _torchvision  # noqa: F401  (before timm: see its docstring)
from cosa.storage.files import one_line
from cosa.storage.model_files import read_tensors

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


class Encoder(nn.Module):
    """A ViT whose blocks `aux_block` and last are read as feature maps, both through the final norm."""

    def __init__(self, vit: VisionTransformer, aux_block: int) -> None:
        super().__init__()
        self.vit = vit
        self.indices = [len(vit.blocks) + aux_block, len(vit.blocks) - 1]

    @property
    def channels(self) -> int:
        """Channels of both feature maps."""
        return int(self.vit.embed_dim)

    @property
    def patch_size(self) -> int:
        """Side of a patch, pixels."""
        return int(self.vit.patch_embed.patch_size[0])

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor]:
        """Feature maps (b d p q) of the earlier and of the last block; h and w are multiples of the patch."""
        maps: Any = self.vit.forward_intermediates(
            images, indices=self.indices, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        aux, last = maps
        return aux, last


def build_encoder(config: NetworkConfig, image_size: int) -> Encoder:
    """The encoder a config describes, its position embeddings resampled to `image_size` pixels.

    Raises:
        ValueError: timm knows no such ViT, the sizes do not fit, or the weights are of another architecture.
        FileNotFoundError: `network.weights` names no file.
        OSError: The published weights are not on this machine and the hub does not answer.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    names = [*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")]
    if config.encoder.partition(".")[0] not in names:
        raise ValueError(
            f"network.encoder must be a Vision Transformer of timm, got {config.encoder!r}"
            f"{nearest(config.encoder, names)}"
        )
    shape: dict[str, Any] = {
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
    }
    own = {name: value for name, value in shape.items() if value}
    try:
        with _asked_once() if config.pretrained else nullcontext():
            vit = timm.create_model(
                config.encoder,
                pretrained=config.pretrained,
                img_size=image_size,
                dynamic_img_size=True,
                num_classes=0,
                global_pool="",
                drop_path_rate=config.drop_path,
                **own,
            )
    except (AssertionError, RuntimeError) as error:  # timm's own checks: heads that do not divide the width
        raise ValueError(
            f"network must be one that timm can build, got {config.encoder!r} with {own} "
            f"({one_line(error, kind=False)}); change these settings"
        ) from error
    except OSError as error:  # whatever kept timm from the hub: no network, a proxy, a full disk
        reason = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
        raise OSError(
            f"network.pretrained must find the weights of {config.encoder!r} on this machine or on the hub, "
            f"got neither ({reason}); set --network.pretrained false and --network.weights FILE.safetensors, "
            "or fetch them once where there is a network"
        ) from error
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"network.encoder must be a plain Vision Transformer, got {config.encoder!r}")
    if -config.aux_block > len(vit.blocks):
        raise ValueError(
            f"network.aux_block must name one of the encoder's {len(vit.blocks)} blocks, "
            f"got {config.aux_block}"
        )
    if config.weights:
        load_weights(vit, Path(config.weights))
    return Encoder(vit, config.aux_block)


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


def load_weights(vit: VisionTransformer, path: Path) -> None:
    """Load ImageNet weights in timm's naming; the classifier is dropped, position embeddings resampled.

    Only tensors are read: .safetensors, or a .pth that holds nothing but tensors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no checkpoint, or one of another architecture.
    """
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = {k: v for k, v in read_tensors(path).items() if not k.startswith(("head.", "head_dist."))}
    own = vit.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if not missing and not unknown:
        state = checkpoint_filter_fn(state, vit)
    shapes = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own.keys() & state.keys()
        if state[k].shape != own[k].shape
    ]
    if missing or unknown or shapes:
        first = (
            f"misses {missing[0]}" if missing else f"has an unknown {unknown[0]}" if unknown else min(shapes)
        )
        count = len(missing) + len(unknown) + len(shapes)
        raise ValueError(
            f"network.weights must fit the encoder, got {str(path)!r}, which {first} ({count} differences); "
            "set network.encoder to the architecture the file was made for"
        )
    vit.load_state_dict(state)
