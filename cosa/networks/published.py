"""Which published weights an encoder's name stands for, told by timm's registry without loading any.

Nothing heavy is imported before it is needed: a sweep's plan asks here, too.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa.config import IMAGENET_MEAN, IMAGENET_STD, Config, NetworkConfig, nearest, override
from cosa.storage.files import digest
from cosa.storage.label_files import read_summary

if TYPE_CHECKING:
    from timm.models import PretrainedCfg
else:
    PretrainedCfg = Any  # timm imports torch; tests check annotations as the program runs


def pinned(config: Config) -> Config:
    """`config` with all written down that it leaves to its encoder, so that no default of timm decides later.

    That is the tag of the published weights, or the SHA-256 of a local file where it is there, mean and
    deviation, and the fingerprint of the pseudo-labels where they are there. Pinning what is pinned changes
    nothing, and needs no timm.

    Raises:
        ValueError: `network.encoder` is no such model of timm, or has no such weights.
        FileNotFoundError: The pseudo-labels are not whole.
    """
    network, data = config.network, config.data
    encoder, mean, std = network.encoder, data.mean, data.std
    untagged = network.pretrained and "." not in encoder
    if network.sees_imagenet:
        mean, std = mean or IMAGENET_MEAN, std or IMAGENET_STD
    elif untagged or not (mean and std):
        cfg = published(encoder, network.architecture)
        encoder = f"{encoder}.{cfg.tag}" if untagged else encoder
        mean, std = mean or tuple(cfg.mean), std or tuple(cfg.std)
        if network.pretrained and not cfg.has_weights:
            raise ValueError(
                f"network.encoder must have published weights, got {encoder!r}, which has none; "
                "choose another, or set --network.pretrained false"
            )
    sha256 = network.weights_sha256
    if network.weights and not sha256 and (path := Path(network.weights).expanduser()).is_file():
        sha256 = _digest(path, path.stat().st_mtime_ns)
    labels, fingerprint = config.segmentation.labels, config.segmentation.labels_fingerprint
    if labels and not fingerprint and (folder := Path(labels).expanduser()).is_dir():
        fingerprint = str(read_summary(folder)["fingerprint"])
    return override(
        config,
        {
            "segmentation.labels_fingerprint": fingerprint,
            "network.encoder": encoder,
            "network.weights_sha256": sha256,
            "data.mean": mean,
            "data.std": std,
        },
    )


def require_weights(config: NetworkConfig) -> None:
    """Refuse a network whose weights have to come from a file that is not there.

    Raises:
        ValueError: It is the full WideResNet38, which is never trained from scratch, without a file.
        FileNotFoundError: `network.weights` names no file.
    """
    if config.encoder == "wideresnet38" and config.from_scratch:
        raise ValueError(
            "network.weights must name a file with WideResNet38's published weights, got none; "
            "cosa/networks/wideresnet.py says which, and wideresnet38_thin is the one to train from scratch"
        )
    if config.weights and not Path(config.weights).expanduser().is_file():
        raise FileNotFoundError(f"network.weights must be a file, got {config.weights!r}")


@functools.lru_cache(maxsize=8)  # every arm of a sweep starts from the same file
def _digest(path: Path, changed: int) -> str:  # noqa: ARG001 (a file that has changed is another)
    return digest(path)


_KINDS = {
    "deeplabv3plus": ("ResNet", ("resnet",)),
    "upernet": ("Swin Transformer or ResNet", ("swin_transformer", "resnet")),
}
"""What an architecture's encoder must be, and timm's modules that have such; else a Vision Transformer."""


def published(encoder: str, architecture: str = "cosa") -> PretrainedCfg:
    """What timm's registry knows of the weights called `encoder`, of its default ones where that has no tag.

    Raises:
        ValueError: timm knows no such model that the architecture can stand on, or no such tag of it.
    """
    importlib.import_module("cosa.networks._torchvision")  # before timm: see its docstring
    import timm

    kind, modules = _KINDS.get(architecture, ("Vision Transformer", ("vision_transformer", "deit")))
    names = [name for module in modules for name in timm.list_models(module=module)]
    name = encoder.partition(".")[0]
    if name not in names:
        raise ValueError(
            f"network.encoder must be a {kind} of timm, got {encoder!r}{nearest(encoder, names)}"
        )
    tagged = timm.list_pretrained(f"{name}.*")
    if "." in encoder and encoder not in tagged:
        raise ValueError(
            f"network.encoder must name weights that timm has, got {encoder!r}"
            + (nearest(encoder, tagged) or f"; it has {', '.join(tagged) or 'none'}")
        )
    cfg = timm.get_pretrained_cfg(encoder, allow_unregistered=False)
    assert cfg is not None, "timm describes the weights of every model that it lists"
    return cfg


def starting_point(config: Config, sha256: str) -> dict[str, str]:
    """Where the weights of an encoder came from, in plain text: what a run records of them.

    Args:
        config: Pinned, and not from scratch.
        sha256: Of the encoder's tensors as they were loaded, see `Encoder.digest`.
    """
    network, data = config.network, config.data
    if network.weights:
        source = f"{Path(network.weights).name} of SHA-256 {network.weights_sha256}"
    else:
        cfg = published(network.encoder, network.architecture)
        source = str(cfg.hf_hub_id or cfg.url)
    return {
        "name": network.encoder,
        "source": source,
        "sha256": sha256,
        "mean": ", ".join(map(str, data.mean)),
        "std": ", ".join(map(str, data.std)),
    }
