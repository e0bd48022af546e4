"""A trained network outside of its run: saved, found again, and asked about images.

    from cosa.model import load_model
    model = load_model("runs/voc/model")
    classes = model.predict("image.jpg")

A model's folder holds model.safetensors (the weights), config.json (the run's settings) and model.json
(classes, sizes, scales, metrics, where it came from). Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from safetensors.torch import save as safetensors
from torch import Tensor

import cosa
from cosa import checkpoint
from cosa.cam import to_activation
from cosa.config import Config, from_json, nearest, override, to_json
from cosa.data.dataset import normalise, open_dataset, read_image
from cosa.inference import multiscale, resize
from cosa.networks.encoder import read_tensors
from cosa.networks.network import CosaNetwork, build_network
from cosa.pseudo_labels import keep_labelled
from cosa.ranks import Ranks
from cosa.structures import FusedOutput
from cosa.tracking import download_model

NetworkName = Literal["assignment", "online"]
Picture = str | Path | Image.Image | np.ndarray
"""An image as a file, a Pillow image, or uint8 RGB (h w 3); a file's EXIF orientation is ignored."""

FORMAT = 1
_FILES = ("model.safetensors", "config.json", "model.json")
_RUN_ID = re.compile(r"[0-9a-f]{32}")


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


def save_model(
    folder: Path, network: CosaNetwork, config: Config, classes: tuple[str, ...], *, facts: Facts
) -> list[Path]:
    """Write a network as a model's folder; model.json comes last and marks it as whole.

    Returns:
        The files written.

    Raises:
        OSError: The folder cannot be written.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    return _save(folder, weights, config, classes, facts, network.patch_size)


def _save(
    folder: Path,
    weights: dict[str, Tensor],
    config: Config,
    classes: tuple[str, ...],
    facts: Facts,
    patch_size: int,
) -> list[Path]:
    known = asdict(facts)
    known["metrics"] = {k: v if math.isfinite(v) else None for k, v in facts.metrics.items()}
    about = {
        "format": FORMAT,
        "cosa": cosa.__version__,
        "classes": classes,
        "patch_size": patch_size,
        "evaluation": {
            "size": config.evaluation.size,
            "scales": config.evaluation.scales,
            "flip": config.evaluation.flip,
        },
        "oracle": config.oracle,
        **known,
    }
    content = (
        safetensors(weights),
        to_json(config).encode(),
        (json.dumps(about, indent=2, allow_nan=False) + "\n").encode(),
    )
    paths = [folder / name for name in _FILES]
    paths[-1].unlink(missing_ok=True)
    for path, data in zip(paths, content, strict=True):
        _write(path, data)
    return paths


def _write(path: Path, data: bytes) -> None:
    checkpoint.write_atomically(path, lambda draft: draft.write_bytes(data))


def resolve_model(
    source: str | Path, *, network: NetworkName = "assignment", tracking_uri: str = ""
) -> StoredModel:
    """The network that a run's folder, a checkpoint, a model's folder or an MLflow run id holds.

    Args:
        source: Any of these. A run's folder stands for its final AN, else for its newest checkpoint.
        network: `online` is kept in checkpoints alone.
        tracking_uri: MLflow store that knows the run id.

    Raises:
        FileNotFoundError: `source` is none of these, or a file is missing.
        ValueError: A file is damaged, or does not hold that network.
        TrackingError: The store does not answer or does not have the run.
    """
    path = Path(source).expanduser().absolute()
    if path.is_file():
        return _from_checkpoint(path, network)
    if (path / "model.json").is_file():
        return _from_model_folder(path, network)
    if path.is_dir():
        return _from_run_folder(path, network)
    if _RUN_ID.fullmatch(str(source)) and tracking_uri:
        with tempfile.TemporaryDirectory() as place:
            found = _from_model_folder(download_model(tracking_uri, str(source), Path(place)), network)
        return replace(found, folder=None)
    raise FileNotFoundError(
        f"model must be a run's folder, a checkpoint, a model's folder or an MLflow run id of 32 hex digits, "
        f"got {str(source)!r}; there is no such file or folder"
    )


def _from_run_folder(folder: Path, network: NetworkName) -> StoredModel:
    """The final AN of a finished run, else the newest readable checkpoint."""
    finished = (folder / "result.json").is_file() and (folder / "model" / "model.json").is_file()
    if finished and network == "assignment":
        return _from_model_folder(folder / "model", network)
    skipped: list[str] = []
    saved = checkpoint.newest(folder / "checkpoints", skipped.append)
    if saved is None:
        holds = ", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "nothing"
        raise FileNotFoundError(
            f"model must be a run's or a model's folder, got {str(folder)!r}, which holds no readable "
            f"checkpoint and no model.json but {holds}" + "".join(f"; {line}" for line in skipped)
        )
    return _from_state(saved, network, folder)


def _from_checkpoint(path: Path, network: NetworkName) -> StoredModel:
    if path.suffix == ".safetensors" and (path.parent / "model.json").is_file():
        return _from_model_folder(path.parent, network)
    in_run = path.parent.name == "checkpoints"
    return _from_state(checkpoint.load(path), network, path.parent.parent if in_run else path.parent)


def _from_state(saved: checkpoint.State, network: NetworkName, folder: Path) -> StoredModel:
    config = from_json(saved["config"])
    # a checkpoint that does not name its classes was written beside its data set, which does
    classes = saved.get("classes") or open_dataset(config.data, config.data.val_split, needs="images").classes
    facts = Facts(
        step=saved["step"],
        xi=float(saved["threshold"]["value"]),
        aux_xi=float(saved["aux_threshold"]["value"]),
        data_fingerprint=saved["data_fingerprint"],
        network=network,
        run_id=saved["run_id"],
        metrics=saved["metrics"],
    )
    return StoredModel(
        config=config, classes=tuple(classes), facts=facts, weights=saved[network], folder=folder
    )


def _from_model_folder(folder: Path, network: NetworkName) -> StoredModel:
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
        if about["format"] != FORMAT:
            raise ValueError(f"format {about['format']}")
        known = {name: about[name] for name in Facts.__dataclass_fields__}
        known["metrics"] = {k: math.nan if v is None else v for k, v in known["metrics"].items()}
        return tuple(about["classes"]), Facts(**known)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"model.json must be one that cosa wrote in format {FORMAT}, got {str(path)!r} ({error}); "
            "export the model again"
        ) from None


def load_model(
    source: str | Path,
    *,
    network: NetworkName = "assignment",
    tracking_uri: str = "",
    device: torch.device | None = None,
) -> Model:
    """The network of a run, ready to predict, on the GPU where there is one.

    Takes and raises what `resolve_model` does; `device` overrides where it computes.
    """
    return build_model(resolve_model(source, network=network, tracking_uri=tracking_uri), device=device)


def build_model(stored: StoredModel, *, device: torch.device | None = None) -> Model:
    """The network that was stored, in evaluation mode.

    Raises:
        ValueError: The weights are of other classes or of another architecture than the settings say.
    """
    device = device or Ranks.current().device
    bare = override(stored.config, {"network.pretrained": False, "network.weights": ""})
    network = build_network(bare.network, len(stored.classes), bare.data.crop_size)
    _require_fit(network, stored)
    network.load_state_dict(dict(stored.weights))
    return Model(stored.config, stored.classes, stored.facts, network.to(device).eval(), device)


def _require_fit(network: CosaNetwork, stored: StoredModel) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in stored.weights.items()}
    head = got.get("cam_head.weight", (0,))
    if head[0] not in (0, len(stored.classes)):
        raise ValueError(
            f"weights must be of the model's {len(stored.classes)} classes, got {head[0]} classes"
            + (f" in {str(stored.folder)!r}" if stored.folder else "")
        )
    wrong = sorted(name for name in own.keys() | got.keys() if own.get(name) != got.get(name))
    if wrong:
        raise ValueError(
            f"weights must fit the network {stored.config.network.encoder!r} of the settings, got "
            f"{got.get(wrong[0], 'nothing')} for {wrong[0]} instead of {own.get(wrong[0], 'nothing')} "
            f"({len(wrong)} differences); the two files are not of one run"
        )


@dataclass(frozen=True, eq=False)
class ImageOutput:
    """What the network says of one image; maps get the image's own size only where they are asked for."""

    fused: FusedOutput
    """All scales and flips together, of this image alone."""
    size: tuple[int, int]
    """Height and width of the image."""

    @property
    def cls_probs(self) -> Float32[np.ndarray, " c"]:
        """Probability that the image holds each class, from Z."""
        probs: Float32[np.ndarray, " c"] = self.fused.cls_logits[0].sigmoid().cpu().numpy()
        return probs

    def classes(self, labels: Float[Tensor, "1 c"] | None = None) -> UInt8[np.ndarray, "h w"]:
        """The likeliest class of each pixel; with labels, of the image's own classes alone."""
        classes: UInt8[np.ndarray, "h w"] = self._logits(labels).argmax(1)[0].byte().cpu().numpy()
        return classes

    def seg_probs(self, labels: Float[Tensor, "1 c"] | None = None) -> Float32[np.ndarray, "k h w"]:
        """Probabilities of each pixel; 0 for classes that the labels rule out."""
        probs: Float32[np.ndarray, "k h w"] = self._logits(labels).softmax(1)[0].cpu().numpy()
        return probs

    def activation(
        self, labels: Float[Tensor, "1 c"] | None = None, *, aux: bool = False
    ) -> Float32[np.ndarray, "c h w"]:
        """CAMs in [0, 1], each scaled on its own; of M-dagger where `aux` says so."""
        cam = resize(self.fused.aux_cam if aux else self.fused.cam, self.size)
        everywhere = torch.ones(1, *self.size, dtype=torch.bool, device=cam.device)
        kept = cam.new_ones(1, cam.shape[1]) if labels is None else labels.to(cam.device)
        activation: Float32[np.ndarray, "c h w"] = to_activation(cam, kept, everywhere)[0].cpu().numpy()
        return activation

    def _logits(self, labels: Float[Tensor, "1 c"] | None) -> Float[Tensor, "1 k h w"]:
        logits = resize(self.fused.seg_logits, self.size)
        return logits if labels is None else keep_labelled(logits, labels.to(logits.device))


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network that predicts whole images of any size."""

    config: Config
    """Settings of its run; `evaluation.size`, `scales` and `flip` say how it predicts."""
    classes: tuple[str, ...]
    """Names of the foreground classes; class 0 of a prediction is the background."""
    facts: Facts
    """What else is known of its training."""
    network: CosaNetwork
    """In evaluation mode, on `device`."""
    device: torch.device
    """Where it computes."""

    def predict(self, image: Picture, *, labels: Sequence[str] | None = None) -> UInt8[np.ndarray, "h w"]:
        """Class of each pixel in [0, k), in the image's own size.

        Args:
            image: A file, a Pillow image or uint8 RGB.
            labels: Names of the classes the image holds, where they are known: the labelled protocol.

        Raises:
            ValueError: The image is unreadable or no RGB, or a name is none of the model's classes.
        """
        return self.predict_batch([image], labels=None if labels is None else [labels])[0]

    def predict_batch(
        self, images: Sequence[Picture], *, labels: Sequence[Sequence[str]] | None = None
    ) -> list[UInt8[np.ndarray, "_h _w"]]:
        """As `predict`, for images of any sizes in one forward pass, each with labels of its own."""
        given = [None] * len(images) if labels is None else [self.label_vector(names) for names in labels]
        outputs = self.outputs(images)
        return [output.classes(known) for output, known in zip(outputs, given, strict=True)]

    @torch.inference_mode()
    def outputs(self, images: Sequence[Picture]) -> list[ImageOutput]:
        """All that the network says of images, in one forward pass per scale and flip."""
        settings, sizes, resized = self.config.evaluation, [], []
        for image in images:
            picture = as_rgb(image)
            sizes.append((picture.shape[0], picture.shape[1]))
            square = Image.fromarray(picture).resize((settings.size,) * 2, Image.Resampling.BILINEAR)
            resized.append(np.array(square))
        inputs = normalise(np.stack(resized)).to(self.device)
        bf16 = self.config.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            fused = multiscale(
                self.network,
                inputs,
                scales=settings.scales,
                flip=settings.flip,
                size=(settings.size, settings.size),
            )
        return [
            ImageOutput(FusedOutput(**{k: v[i : i + 1] for k, v in vars(fused).items()}), size)
            for i, size in enumerate(sizes)
        ]

    def label_vector(self, names: Sequence[str]) -> Float[Tensor, "1 c"]:
        """Image-level labels from class names.

        Raises:
            ValueError: A name is none of the model's classes.
        """
        labels = torch.zeros(1, len(self.classes))
        for name in names:
            if name not in self.classes:
                raise ValueError(
                    f"labels must be classes of the model, got {name!r}"
                    + (nearest(name, self.classes) or f"; the classes are {', '.join(self.classes)}")
                )
            labels[0, self.classes.index(name)] = 1
        return labels


def as_rgb(image: Picture) -> UInt8[np.ndarray, "h w 3"]:
    """The image as RGB pixels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no readable image, or the array is no uint8 RGB.
    """
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return np.array(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"image must be uint8 RGB of shape (height, width, 3), got {image.dtype} of shape {image.shape}"
        )
    return image
