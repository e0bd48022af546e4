"""A trained network outside of its run, asked about images.

    from cosa.model import load_model
    model = load_model("runs/voc/model")
    classes = model.predict("image.jpg")

How it is saved is told in `cosa.storage.model_files`, what `load_model` takes in `resolve_model`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from PIL import Image
from torch import Tensor

from cosa.config import Config, nearest
from cosa.data.dataset import normalise, read_image, to_rgb
from cosa.equations.cam import to_activation
from cosa.equations.pseudo_labels import keep_labelled
from cosa.networks.multiscale import AnyNetwork, look, resize
from cosa.networks.network import autocast, build_network
from cosa.networks.segmentation import build_segmentation_network
from cosa.storage import checkpoint
from cosa.storage.model_files import Facts, NetworkName, StoredModel, read_model_folder, read_state
from cosa.structures import FusedOutput, FusedSegmentation, Ranks, split
from cosa.tracking import download_model

Picture = str | Path | Image.Image | np.ndarray
"""An image as a file, a Pillow image, or uint8 RGB (h w 3); a file's EXIF orientation is ignored."""

_MAX_ELEMENTS = 2**26  # numbers held at a time where class maps of a huge image are compared


def load_model(
    source: str | Path,
    *,
    network: NetworkName | None = None,
    tracking_uri: str = "",
    device: torch.device | None = None,
) -> Model:
    """The network of a run, ready to predict, on the GPU where there is one.

    Takes and raises what `resolve_model` does; `device` overrides where it computes.
    """
    return build_model(resolve_model(source, network=network, tracking_uri=tracking_uri), device=device)


def resolve_model(
    source: str | Path, *, network: NetworkName | None = None, tracking_uri: str = ""
) -> StoredModel:
    """The network that a run's folder, a checkpoint, a model's folder or an MLflow run id holds.

    Args:
        source: Any of these. A run's folder stands for its final network, else for its newest checkpoint.
        network: By default what the run is for: AN, or its standalone network. `online` is kept in
            checkpoints alone.
        tracking_uri: MLflow store that knows the run id.

    Raises:
        FileNotFoundError: `source` is none of these, or a file is missing.
        ValueError: A file is damaged, or does not hold that network.
        TrackingError: The store does not answer or does not have the run.
    """
    path = Path(source).expanduser().absolute()
    folders = [path.parent if path.suffix == ".safetensors" else path]
    if network != "online" and (path / "result.json").is_file():
        folders.append(path / "model")
    for folder in folders:
        if (folder / "model.json").is_file():
            return read_model_folder(folder, network)
    if path.is_file():
        in_run = path.parent.name == "checkpoints"
        return read_state(checkpoint.load(path), network, path.parent.parent if in_run else path.parent)
    if path.is_dir():
        skipped: list[str] = []
        if saved := checkpoint.newest(path / "checkpoints", skipped.append):
            return read_state(saved, network, path)
        holds = ", ".join(sorted(inside.name for inside in path.iterdir())[:6]) or "nothing"
        raise FileNotFoundError(
            f"model must be a run's or a model's folder, got {str(path)!r}, which holds no readable "
            f"checkpoint and no model.json but {holds}" + "".join(f"; {line}" for line in skipped)
        )
    if tracking_uri and re.fullmatch(r"[0-9a-f]{32}", str(source)):
        with tempfile.TemporaryDirectory() as place:
            found = read_model_folder(download_model(tracking_uri, str(source), Path(place)), network)
        return replace(found, folder=None)
    raise FileNotFoundError(
        f"model must be a run's folder, a checkpoint, a model's folder or an MLflow run id of 32 hex digits, "
        f"got {str(source)!r}; there is no such file or folder"
    )


def build_model(stored: StoredModel, *, device: torch.device | None = None) -> Model:
    """The network that was stored, in evaluation mode.

    Raises:
        ValueError: The weights are of other classes or of another architecture than the settings say.
    """
    device = device or Ranks.current().device
    config = stored.config
    build = build_segmentation_network if config.standalone else build_network
    network = build(config.network, len(stored.classes), config.data.crop_size, state=stored.weights)
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in stored.weights.items()}
    classes = got.get("cam_head.weight", (0,))[0]
    if classes not in (0, len(stored.classes)):
        raise ValueError(
            f"weights must be of the model's {len(stored.classes)} classes, got {classes} classes"
            + (f" in {str(stored.folder)!r}" if stored.folder else "")
        )
    wrong = sorted(name for name in own.keys() | got.keys() if own.get(name) != got.get(name))
    if wrong:
        raise ValueError(
            f"weights must fit the network {stored.config.network.encoder!r} of the settings, got "
            f"{got.get(wrong[0], 'nothing')} for {wrong[0]} instead of {own.get(wrong[0], 'nothing')} "
            f"({len(wrong)} differences); the two files are not of one run"
        )
    network.load_state_dict(dict(stored.weights))
    return Model(stored.config, stored.classes, stored.facts, network.to(device).eval(), device)


@dataclass(frozen=True, eq=False)
class ImageOutput:
    """What the network says of one image; maps get the image's own size only where they are asked for."""

    fused: FusedSegmentation
    """All scales and flips together, of this image alone."""
    size: tuple[int, int]
    """Height and width of the image."""

    @property
    def cams(self) -> FusedOutput:
        """`fused` of CoSA's network.

        Raises:
            ValueError: It is of a standalone one.
        """
        if not isinstance(self.fused, FusedOutput):
            raise ValueError("model must be CoSA's to have CAMs, got a standalone segmentation network")
        return self.fused

    @property
    def cls_probs(self) -> Float32[np.ndarray, " c"]:
        """Probability that the image holds each class, from Z."""
        return np.asarray(self.cams.cls_logits[0].sigmoid().cpu())

    def classes(self, labels: Float[Tensor, "1 c"] | None = None) -> UInt8[np.ndarray, "h w"]:
        """The likeliest class of each pixel; with labels, of the image's own classes alone.

        Of a huge image no more than a few maps are held in its size at a time.
        """
        logits = self.fused.seg_logits
        held = (torch.ones(1, logits.shape[1] - 1) if labels is None else labels)[0].nonzero().flatten() + 1
        allowed = torch.cat([held.new_zeros(1), held]).to(logits.device)  # the background is always there
        best = torch.full((1, *self.size), -torch.inf, device=logits.device)
        classes = torch.zeros(1, *self.size, dtype=torch.uint8, device=logits.device)
        together = max(1, _MAX_ELEMENTS // (self.size[0] * self.size[1]))
        for first in range(0, len(allowed), together):
            some = allowed[first : first + together]
            highest, which = resize(logits[:, some], self.size).max(1)
            classes = torch.where(highest > best, some[which].byte(), classes)
            best = torch.maximum(best, highest)
        return np.asarray(classes[0].cpu())

    def seg_probs(
        self, labels: Float[Tensor, "1 c"] | None = None, *, views: int = 1
    ) -> Float32[np.ndarray, "k h w"]:
        """Probabilities of each pixel; 0 for classes that the labels rule out.

        They are the softmax of the views' mean logits; of the sum of so many `views`, where a CRF is to see
        them, as in evaluation.
        """
        logits = resize(self.fused.seg_logits, self.size)
        if labels is not None:
            logits = keep_labelled(logits, labels.to(logits.device))
        return np.asarray((views * logits).softmax(1)[0].cpu())

    def activation(self, index: int) -> Float32[np.ndarray, "h w"]:
        """The CAM of class `index` in [0, c), scaled to [0, 1]."""
        cam = resize(self.cams.cam[:, index : index + 1], self.size)
        everywhere = torch.ones(1, *self.size, dtype=torch.bool, device=cam.device)
        return np.asarray(to_activation(cam, cam.new_ones(1, 1), everywhere)[0, 0].cpu())


@dataclass(frozen=True, eq=False)
class Model:
    """A trained network that predicts whole images of any size."""

    config: Config
    """Settings of its run; `evaluation.size`, `scales` and `flip` say how it predicts."""
    classes: tuple[str, ...]
    """Names of the foreground classes; class 0 of a prediction is the background."""
    facts: Facts
    """What else is known of its training."""
    network: AnyNetwork
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

    @torch.no_grad()
    def outputs(self, images: Sequence[Picture]) -> list[ImageOutput]:
        """All that the network says of images, in one forward pass per scale and flip."""
        pictures = [Image.fromarray(_rgb(image)) for image in images]
        settings = self.config.evaluation
        size = (settings.size, settings.size)
        squares = np.stack([np.array(one.resize(size, Image.Resampling.BILINEAR)) for one in pictures])
        inputs = normalise(squares, self.config.data).to(self.device)
        with self.autocast():
            fused = look(self.network, inputs, scales=settings.scales, flip=settings.flip, size=size)
        each = zip(split(fused, len(pictures)), pictures, strict=True)
        return [ImageOutput(one, (picture.height, picture.width)) for one, picture in each]

    def autocast(self) -> torch.autocast:
        """The precision that the run was trained in."""
        return autocast(self.config.train, self.device)

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


def _rgb(image: Picture) -> UInt8[np.ndarray, "h w 3"]:
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return to_rgb(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"image must be uint8 RGB of shape (height, width, 3), got {image.dtype} of shape {image.shape}"
        )
    return image


@dataclass(frozen=True)
class Predictor:
    """A model behind the one method that MLflow calls: `mlflow.pyfunc.load_model(FOLDER)`."""

    model: Model

    def predict(self, model_input: Any) -> list[UInt8[np.ndarray, "_h _w"]] | UInt8[np.ndarray, "n h w"]:
        """The class of each pixel of each image, as `Model.predict`; one array for one array of images.

        Args:
            model_input: A data frame whose first column names image files, a list of what `Model.predict`
                takes, or one uint8 array (images, height, width, 3).
        """
        images = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        classes = [self.model.predict(image) for image in images]
        return np.stack(classes) if isinstance(model_input, np.ndarray) else classes


def _load_pyfunc(path: str) -> Predictor:
    """Called by MLflow, by this name, with the folder that `export` put the model in."""
    return Predictor(load_model(Path(path)))
