"""A trained network as files: written, and found again by whatever holds it.

A model's folder holds model.safetensors (the weights), config.json (the run's settings) and model.json
(classes, sizes, scales, metrics, where it came from). Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors
from torch import Tensor

import cosa
from cosa.config import Config, from_json, to_json
from cosa.storage import checkpoint
from cosa.storage.files import one_line, write_atomically

NetworkName = Literal["assignment", "online", "standalone"]

_FORMAT = 1
_FILES = ("model.safetensors", "config.json", "model.json")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model remembers of its training beside its settings."""

    step: int
    """Optimiser steps done."""
    data_fingerprint: str
    """What the training images were, see `SegmentationDataset.fingerprint`."""
    xi: float | None = None
    """The training's threshold of M; None where there are no CAMs."""
    aux_xi: float | None = None
    """The training's threshold of M-dagger; None where there are no CAMs."""
    network: NetworkName = "assignment"
    """Which of the run's networks this is."""
    run_id: str | None = None
    """The tracker's id of the run."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the run's last evaluation found, fractions by name."""


@dataclass(frozen=True, kw_only=True)
class StoredModel:
    """A network as it lies in a file: plain data, not built yet."""

    config: Config
    """Settings of the run."""
    classes: tuple[str, ...]
    """Names of the foreground classes."""
    facts: Facts
    """What else is known of it."""
    weights: Mapping[str, Tensor]
    """The network's tensors by name, on the CPU."""
    folder: Path | None
    """The run's folder, the model's where it lies in no run, None for one from MLflow."""


def save_model(
    folder: Path, network: torch.nn.Module, config: Config, classes: tuple[str, ...], *, facts: Facts
) -> list[Path]:
    """Write a network with its `patch_size` as a model's folder; model.json comes last: it is whole then.

    Returns:
        The files written.

    Raises:
        OSError: The folder cannot be written.
    """
    about = {
        "format": _FORMAT,
        "cosa": cosa.__version__,
        "classes": classes,
        "patch_size": network.patch_size,
        "evaluation": {name: getattr(config.evaluation, name) for name in ("size", "scales", "flip")},
        "oracle": config.oracle,
        **asdict(facts),
        "metrics": {k: v if math.isfinite(v) else None for k, v in facts.metrics.items()},
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    facts_text = json.dumps(about, indent=2, allow_nan=False) + "\n"
    content: tuple[str | bytes, ...] = (safetensors(weights), to_json(config), facts_text)
    paths = [folder / name for name in _FILES]
    paths[-1].unlink(missing_ok=True)
    for path, data in zip(paths, content, strict=True):
        write_atomically(path, data)
    return paths


def read_state(saved: checkpoint.State, network: NetworkName | None, folder: Path) -> StoredModel:
    """A network of a checkpoint's state, by default the one that the run is for; `folder` is the run's.

    Raises:
        ValueError: The run has no such network.
    """
    config = from_json(saved["config"])
    network = network or config.final_network
    if network not in saved:
        raise ValueError(f"network must be {config.final_network} of this run, got {network!r}")
    return StoredModel(
        config=config,
        classes=tuple(saved["classes"]),
        facts=facts_of({**saved, "network": network}),
        weights=saved[network],
        folder=folder,
    )


def read_model_folder(folder: Path, network: NetworkName | None = None) -> StoredModel:
    """The network of a model's folder, which is checked to be `network` where that is given.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, or the network is the other one.
    """
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"model's folder must hold {missing[0]}, got {str(folder)!r}; export it again"
        )
    about = folder / "model.json"
    try:
        known: dict[str, Any] = json.loads(about.read_text())
        if known["format"] != _FORMAT:
            raise ValueError(f"format {known['format']}")
        metrics = {k: math.nan if v is None else v for k, v in known["metrics"].items()}
        classes, facts = tuple(known["classes"]), facts_of({**known, "metrics": metrics})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model.json must be one that cosa wrote in format {_FORMAT}, got {str(about)!r} ({error}); "
            "export the model again"
        ) from None
    if network not in {None, facts.network}:
        raise ValueError(
            f"network must be {facts.network}, the one that {str(folder)!r} holds, got {network!r}"
            + ("" if facts.network == "standalone" else "; name a checkpoint, which holds both")
        )
    in_run = folder.name == "model" and (folder.parent / "config.json").is_file()
    return StoredModel(
        config=from_json((folder / "config.json").read_text()),
        classes=classes,
        facts=facts,
        weights=read_tensors(folder / "model.safetensors"),
        folder=folder.parent if in_run else folder,
    )


def facts_of(known: Mapping[str, Any]) -> Facts:
    """The facts among what is known of a network: a checkpoint's state with `network`, or a model.json."""
    return Facts(**{name: known[name] for name in Facts.__dataclass_fields__})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth file without unpickling any object.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no tensors by name, or more than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"weights file must exist, got {str(path)!r}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (each reader has a dozen ways to say "not such a file")
        raise ValueError(
            f"weights file must hold nothing but tensors, got {str(path)!r} ({one_line(error, kind=False)}); "
            "convert it to .safetensors"
        ) from None
    for key in ("state_dict", "model", "teacher"):  # the last is DINO's name
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"weights file must hold tensors by name, got {str(path)!r}")
    return found


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors, 64 hex digits: names, types, shapes and values, whatever their order."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return whole.hexdigest()
