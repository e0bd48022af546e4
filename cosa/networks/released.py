"""The authors' released checkpoints, read under our names.

Facts of their files: a dict whose `model` is the network's state, whose `args` is the argparse.Namespace of
the training and whose `epoch` is the step. In the state are the ViT under timm's names, two 1x1 convolutions
without bias as CAM heads and three convolutions as the decoder.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosa.config import PAPER_ENCODER, Config, override
from cosa.config.presets import get_preset
from cosa.storage.files import one_line

_NAMES = {
    "classifier.weight": "cam_head.weight",
    "aux_classifier.weight": "aux_cam_head.weight",
    "decoder.conv6.weight": "decoder.0.weight",
    "decoder.conv7.weight": "decoder.2.weight",
    "decoder.conv8.weight": "decoder.4.weight",
}
_PRESETS = {"VOC12": "voc_released", "COCO": "coco_released"}
_RELEASED: dict[str, tuple[Any, ...]] = {
    "dataset": tuple(_PRESETS),
    "backbone": ("vit_base_patch16_224",),
    "isgap": (False,),
}
"""What their arguments must say: their code trains other networks and pools in another way, too."""
_SETTINGS = {
    "crop_size": "data.crop_size",
    "aux_layer": "network.aux_block",
    "max_iters": "train.iterations",
    "warmup_iters": "train.warmup",
    "lr": "optim.lr",
    "wt_dec": "optim.weight_decay",
    "momentum": "ema.momentum",
}
"""Their arguments that say just what one of our settings says; the weights of their terms do not."""


_FORGOTTEN = (
    "pathlib.PosixPath",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)
"""What their code puts into a checkpoint beside: the folder of the run, and the mIoU that it was kept for."""


@dataclass(frozen=True)
class Released:
    """A checkpoint of the authors, as ours would be."""

    config: Config
    """The preset of its data set, with what their arguments say of the network and its training."""
    weights: dict[str, Tensor]
    """The network's tensors under the names of `CosaNetwork`."""
    step: int
    """Optimiser steps done."""
    xi: float
    """The threshold at which they judge CAMs; they train with two."""


def read_released(path: Path) -> Released:
    """What a checkpoint of the authors' release holds; of its objects the Namespace alone is rebuilt.

    Folders and numbers of numpy are read as nothing, and all else is refused.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such checkpoint, or of another network than the released ones.
    """
    if not path.is_file():
        raise FileNotFoundError(f"released checkpoint must exist, got {str(path)!r}")
    allowed: list[Any] = [argparse.Namespace, *((_Forgotten, name) for name in _FORGOTTEN)]
    try:
        with torch.serialization.safe_globals(allowed):
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 (torch's readers have a dozen ways to say "not such a file")
        reason = one_line(error, kind=False)
        raise ValueError(
            f"released checkpoint must hold tensors and an argparse.Namespace, got {str(path)!r} ({reason})"
        ) from None
    state = found.get("model") if isinstance(found, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"released checkpoint must hold a state by the name 'model', got {str(path)!r} without; "
            "take one of the authors' release"
        )
    given = found.get("args")
    arguments = vars(given) if isinstance(given, argparse.Namespace) else {}
    return Released(
        config=_config(path, arguments),
        weights=_weights(path, state),
        step=int(found.get("epoch", 0)),
        xi=float(arguments.get("bkg_thre", 0.5)),
    )


class _Forgotten:
    """Stands for an object of theirs that nobody needs; keeps nothing of what it is given."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _config(path: Path, arguments: dict[str, Any]) -> Config:
    """Their arguments as our settings, on the preset of the data set."""
    for name, expected in _RELEASED.items():
        if arguments.get(name) not in expected:
            raise ValueError(
                f"released checkpoint must say in its args that {name} is {' or '.join(map(str, expected))}, "
                f"got {arguments.get(name)!r} in {str(path)!r}"
            )
    own = {ours: arguments[theirs] for theirs, ours in _SETTINGS.items() if theirs in arguments}
    network = {"encoder": PAPER_ENCODER, "aux_norm": False, "train_pos_embed": False}
    changes = own | {f"network.{name}": value for name, value in network.items()}
    return override(get_preset(_PRESETS[arguments["dataset"]]), changes)


def _weights(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names; the encoder's ImageNet classifier, which nothing reads, is left out."""
    found = {}
    for name, tensor in state.items():
        if name.startswith("encoder.head."):
            continue
        ours = (
            name.replace("encoder.", "encoder.vit.", 1) if name.startswith("encoder.") else _NAMES.get(name)
        )
        if ours is None:
            raise ValueError(
                f"released checkpoint must hold the released network, got an unknown {name} in {str(path)!r}"
            )
        found[ours] = tensor.flatten(1) if ours.endswith("cam_head.weight") else tensor
    return found
