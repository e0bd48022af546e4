"""A model of timm as an encoder starts: built from random numbers, or with published weights, all of them.

Weights come from the hub or from a local file and go in tensor by tensor; those that cannot are refused.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cosa.config import NetworkConfig
from cosa.networks import _torchvision  # noqa: F401  (before timm: see its docstring)
from cosa.storage.files import digest, one_line
from cosa.storage.model_files import read_tensors

M = TypeVar("M", bound=nn.Module)
Create = Callable[..., M]
"""Builds the model of a config for images of a size, pixels, or its own where that is None; as
`create(config, image_size, **more)`, with `more` for timm."""


def create_model(config: NetworkConfig, own: Mapping[str, Any], **more: Any) -> nn.Module:
    """The model `network.encoder` as timm builds it.

    Args:
        config: Which model it is.
        own: Settings of its architecture, for timm and for what an error tells.
        more: Other arguments of timm.

    Raises:
        ValueError: timm cannot build it.
    """
    import timm

    try:
        return timm.create_model(config.encoder, drop_path_rate=config.drop_path, **own, **more)
    except (AssertionError, RuntimeError) as error:  # timm's own checks: heads that do not divide the width
        reason = " ".join(str(error).split())[:300]  # of tensors that do not fit the first line says nothing
        raise ValueError(
            f"network must be one that timm can build, got {config.encoder!r} with {dict(own)} ({reason}); "
            "change these settings"
        ) from error


def require_own_sizes(config: NetworkConfig, names: tuple[str, ...]) -> None:
    """Refuse the settings `names` where they are given beside published weights."""
    for name in names:
        if getattr(config, name):
            raise ValueError(
                f"network.{name} must be 0, the encoder's own, where it starts from published weights, "
                f"got {getattr(config, name)}; set --network.pretrained false"
            )


def with_published_weights(create: Create[M], config: NetworkConfig, image_size: int | None) -> M:
    """The model that `create` builds, with the weights of `network.weights` or else of the hub.

    Raises:
        ValueError: They are of another architecture, or not finite.
        FileNotFoundError: `network.weights` names no file.
        OSError: The published weights are not on this machine and the hub does not answer.
    """
    model = (_from_file if config.weights else _from_hub)(create, config, image_size)
    require_finite(model, config)
    return model


def _from_hub(create: Create[M], config: NetworkConfig, image_size: int | None) -> M:
    """The model with its published weights, which timm checks tensor by tensor, the classifier among them."""
    try:
        with _asked_once():
            return create(config, image_size, pretrained=True)
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


def _from_file(create: Create[M], config: NetworkConfig, image_size: int | None) -> M:
    """The model with the weights of a local file, converted and resampled as timm does with those it fetches.

    Only tensors are read: .safetensors, or a .pth that holds nothing but tensors. A classifier is dropped.
    """
    state = read_weights(config)
    with torch.device("meta"):
        like: Any = create(config, None, num_classes=0)
    side = _grid_side(like, state)
    if image_size is None and side:  # the positions' own grid: timm then has nothing to resample
        image_size = side * int(like.patch_embed.patch_size[0])
    try:
        model = create(
            config,
            image_size,
            num_classes=0,
            pretrained=True,
            pretrained_cfg_overlay={"state_dict": state, "num_classes": 0},
        )
    except Exception as error:  # (timm's filters for a dozen namings meet what they do not expect)
        positions = state.get("pos_embed")
        if positions is not None and not side:
            reason = f"has {positions.shape[1]} position embeddings, which are no square grid"
        else:
            reason = f"timm does not take ({one_line(error, kind=False)})"
        raise misfit(config, like, state, reason) from error
    cfg: Any = model.pretrained_cfg
    del cfg["state_dict"]  # or every copy of the network would hold it, too
    return model


def read_weights(config: NetworkConfig) -> dict[str, Tensor]:
    """The tensors of the file `network.weights` without those of a classifier, as the encoder names them.

    Training tools put the encoder into others: DistributedDataParallel calls it `module`, DINO `backbone`.

    Raises:
        ValueError: It holds no tensors, or its SHA-256 is not `network.weights_sha256`.
        FileNotFoundError: There is no such file.
    """
    path = Path(config.weights).expanduser()
    found = read_tensors(path)
    if config.weights_sha256 and digest(path) != config.weights_sha256.lower():
        raise ValueError(
            f"network.weights must have the SHA-256 {config.weights_sha256}, got {str(path)!r} with another; "
            "take that file, or set --network.weights_sha256="
        )
    while prefix := next((p for p in ("module.", "backbone.") for name in found if name.startswith(p)), ""):
        found = {name.removeprefix(prefix): v for name, v in found.items() if name.startswith(prefix)}
    return {name: v for name, v in found.items() if not name.startswith(("head.", "head_dist.", "fc."))}


def _grid_side(model: Any, state: Mapping[str, Tensor]) -> int:
    """Side of the square grid of a ViT's position embeddings in a file, patches; 0 where there is none."""
    positions = state.get("pos_embed")
    if positions is None or positions.ndim != 3 or not hasattr(model, "num_prefix_tokens"):
        return 0
    patches = positions.shape[1] - (0 if model.no_embed_class else model.num_prefix_tokens)
    side = math.isqrt(max(patches, 0))
    return side if side**2 == patches else 0


def misfit(config: NetworkConfig, model: nn.Module, state: Mapping[str, Tensor], reason: str) -> ValueError:
    """What a file is refused with: the first thing in which it is not the model, or else `reason`.

    The tensors of `model` may be on the meta device.
    """
    own = model.state_dict()
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
        reason = f"{first} ({len(missing) + len(unknown) + len(shapes)} differences)"
    path = str(Path(config.weights).expanduser())
    return ValueError(
        f"network.weights must fit the encoder, got {path!r}, which {reason}; "
        "set network.encoder to the architecture the file was made for"
    )


def require_finite(model: nn.Module, config: NetworkConfig) -> None:
    """Refuse weights that training could only spoil further."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"weights must be finite, got NaN or infinity in {name} of "
                f"{config.weights or config.encoder!r}; fetch or convert them again"
            )
