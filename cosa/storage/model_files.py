"""A trained network as files: written, and found again by whatever holds it.

A model's folder holds model.safetensors (the weights), config.json (the run's settings) and model.json
(classes, sizes, scales, metrics, where it came from). Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors
from torch import Tensor

import cosa
from cosa.config import Config, from_json, to_json
from cosa.storage import checkpoint
from cosa.storage.files import one_line, write_atomically

NetworkName = Literal["assignment", "online"]

_FORMAT = 1
_FILES = ("model.safetensors", "config.json", "model.json")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model remembers of its training beside its settings."""

    step: int
    """Optimiser steps done."""
    xi: float
    """The training's threshold of M."""
    aux_xi: float
    """The training's threshold of M-dagger."""
    data_fingerprint: str
    """What the training images were, see `SegmentationDataset.fingerprint`."""
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


@runtime_checkable
class Network(Protocol):
    """What can be saved."""

    @property
    def patch_size(self) -> int:
        """Side of its patches, pixels."""

    def state_dict(self) -> dict[str, Any]:
        """Its tensors by name."""


def save_model(
    folder: Path, network: Network, config: Config, classes: tuple[str, ...], *, facts: Facts
) -> list[Path]:
    """Write a network as a model's folder; model.json comes last and marks it as whole.

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


def read_model(source: str | Path, *, network: NetworkName = "assignment") -> StoredModel:
    """The network that a run's folder, a checkpoint or a model's folder holds.

    Args:
        source: Any of these. A run's folder stands for its final AN, else for its newest checkpoint.
        network: `online` is kept in checkpoints alone.

    Raises:
        FileNotFoundError: `source` is none of these, or a file is missing.
        ValueError: A file is damaged, or does not hold that network.
    """
    path = Path(source).expanduser().absolute()
    if path.suffix == ".safetensors" and (path.parent / "model.json").is_file():
        path = path.parent
    if path.is_file():
        in_run = path.parent.name == "checkpoints"
        return _from_state(checkpoint.load(path), network, path.parent.parent if in_run else path.parent)
    if (path / "model.json").is_file():
        return read_model_folder(path, network)
    if path.is_dir():
        return _from_run_folder(path, network)
    raise FileNotFoundError(
        f"model must be a run's folder, a checkpoint, a model's folder or an MLflow run id of 32 hex digits, "
        f"got {str(source)!r}; there is no such file or folder"
    )


def _from_run_folder(folder: Path, network: NetworkName) -> StoredModel:
    """The final AN of a finished run, else the newest readable checkpoint."""
    finished = (folder / "result.json").is_file() and (folder / "model" / "model.json").is_file()
    if finished and network == "assignment":
        return read_model_folder(folder / "model", network)
    skipped: list[str] = []
    saved = checkpoint.newest(folder / "checkpoints", skipped.append)
    if saved is None:
        holds = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise FileNotFoundError(
            f"model must be a run's or a model's folder, got {str(folder)!r}, which holds no readable "
            f"checkpoint and no model.json but {holds}" + "".join(f"; {line}" for line in skipped)
        )
    return _from_state(saved, network, folder)


def _from_state(saved: checkpoint.State, network: NetworkName, folder: Path) -> StoredModel:
    config = from_json(saved["config"])
    facts = Facts(
        step=saved["step"],
        xi=saved["xi"],
        aux_xi=saved["aux_xi"],
        data_fingerprint=saved["data_fingerprint"],
        network=network,
        run_id=saved["run_id"],
        metrics=saved["metrics"],
    )
    return StoredModel(
        config=config, classes=tuple(saved["classes"]), facts=facts, weights=saved[network], folder=folder
    )


def read_model_folder(folder: Path, network: NetworkName = "assignment") -> StoredModel:
    """As `read_model`, of a model's folder."""
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"model's folder must hold {missing[0]}, got {str(folder)!r}; export it again"
        )
    classes, facts = _read_about(folder / "model.json")
    if facts.network != network:
        raise ValueError(
            f"network must be {facts.network}, the one that {str(folder)!r} holds, got {network!r}; "
            "name a checkpoint, which holds both"
        )
    in_run = folder.name == "model" and (folder.parent / "config.json").is_file()
    return StoredModel(
        config=from_json((folder / "config.json").read_text()),
        classes=classes,
        facts=facts,
        weights=read_tensors(folder / "model.safetensors"),
        folder=folder.parent if in_run else folder,
    )


def _read_about(path: Path) -> tuple[tuple[str, ...], Facts]:
    """Classes and facts of a model.json."""
    try:
        about: dict[str, Any] = json.loads(path.read_text())
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']}")
        known = {name: about[name] for name in Facts.__dataclass_fields__}
        known["metrics"] = {k: math.nan if v is None else v for k, v in known["metrics"].items()}
        return tuple(about["classes"]), Facts(**known)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model.json must be one that cosa wrote in format {_FORMAT}, got {str(path)!r} ({error}); "
            "export the model again"
        ) from None


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
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"weights file must hold tensors by name, got {str(path)!r}")
    return found
