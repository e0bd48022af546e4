"""The CAM pseudo-labels of a whole split, made and written: what CoSA-MS trains standalone networks on.

Paper: supplement, "CoSA-MS Implementation Details": the CPL as they are, without PSA, IRN or CRF.

Their files are listed in `cosa.storage.label_files`. The same call goes on where an earlier one stopped, and
makes again what is not whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from cosa.config import identity
from cosa.data.dataset import SegmentationDataset, read_mask
from cosa.equations.cam import to_activation
from cosa.evaluation.metrics import confusion_matrix, iou, mean_iou
from cosa.evaluation.pictures import index_png
from cosa.evaluation.predict import predict_files
from cosa.model import ImageOutput, Model
from cosa.networks.multiscale import resize
from cosa.storage.files import lock, write_atomically
from cosa.storage.label_files import FORMAT, SUMMARY, label_paths, labels_fingerprint
from cosa.storage.model_files import tensors_digest
from cosa.structures import IGNORE

_SETTINGS = "settings.json"

Source = Literal["cam", "aux_cam", "ensemble"]
"""What is thresholded: M', M-dagger', or the mean of both (Tab. 1)."""


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How activations become labels."""

    source: Source = "cam"
    xi: float = 0.5
    """Activation from which a pixel is foreground, in (0, 1)."""
    ignore: float = 0.0
    """Activations closer to `xi` than this are IGNORE, in [0, 1); 0 labels every pixel."""

    def __post_init__(self) -> None:
        if not 0 < self.xi < 1:
            raise ValueError(f"xi must lie in (0, 1), got {self.xi}")
        if not 0 <= self.ignore < 1:
            raise ValueError(f"ignore must lie in [0, 1), got {self.ignore}")


def label_map(
    output: ImageOutput, labels: Float[Tensor, " c"], settings: LabelSettings
) -> UInt8[np.ndarray, "h w"]:
    """CPL of one image in its own size, as `cosa.equations.pseudo_labels` has them of a batch.

    An image without a class is background.
    """
    fused = output.cams
    held = labels.nonzero().flatten().to(fused.cam.device)
    if not len(held):
        return np.zeros(output.size, np.uint8)
    everywhere = torch.ones(1, *output.size, dtype=torch.bool, device=held.device)
    sources = {"cam": [fused.cam], "aux_cam": [fused.aux_cam]}
    sources["ensemble"] = sources["cam"] + sources["aux_cam"]
    activation = torch.stack(
        [
            to_activation(resize(raw[:, held], output.size), raw.new_ones(1, len(held)), everywhere)[0]
            for raw in sources[settings.source]
        ]
    ).mean(0)
    nu, strongest = activation.max(0)
    classes = torch.where(nu >= settings.xi, held[strongest] + 1, 0)
    unsure = (nu - settings.xi).abs() < settings.ignore
    return np.asarray(torch.where(unsure, IGNORE, classes).byte().cpu())


def write_pseudo_labels(
    model: Model,
    dataset: SegmentationDataset,
    out: Path,
    settings: LabelSettings,
    *,
    counted: Callable[[int], object] = lambda _: None,
) -> Mapping[str, Any]:
    """Write the pseudo-labels of every image of `dataset`, or what is missing of them.

    Args:
        model: Its run's `evaluation.size`, `scales` and `flip` say how images are seen.
        dataset: The images; their labels are known, their masks judge the result where there are any.
        out: A folder of these pseudo-labels alone.
        settings: How activations become labels.
        counted: Told of each image that is done, those of earlier calls at once.

    Returns:
        What pseudo_labels.json holds.

    Raises:
        ValueError: `out` holds other pseudo-labels, the classes are others, or an image is bad.
        OSError: `out` cannot be written.
    """
    if model.classes != dataset.classes:
        raise ValueError(
            f"images must be of the model's {len(model.classes)} classes, got {len(dataset.classes)} classes "
            "in data.root; name the data set that the run was trained on"
        )
    made_of = _made_of(model, dataset, settings)
    with lock(out / ".lock"):
        _claim(out, made_of)
        paths = label_paths(out, dataset.names)
        missing = [i for i, path in enumerate(paths) if not _is_whole(path, dataset.image_paths[i], dataset)]
        if missing:
            (out / SUMMARY).unlink(missing_ok=True)
        if len(missing) < len(paths):
            counted(len(paths) - len(missing))
        for index, classes in _label_maps(model, dataset, missing, settings):
            save = partial(index_png(classes).save, format="PNG")
            write_atomically(paths[index], save, sync=False)
            counted(1)
        summary = {**made_of, **_judge(dataset, paths), "fingerprint": labels_fingerprint(out, dataset.names)}
        write_atomically(out / SUMMARY, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def _made_of(model: Model, dataset: SegmentationDataset, settings: LabelSettings) -> dict[str, Any]:
    """All that the pseudo-labels follow from, as plain data."""
    seen = model.config.evaluation
    return {
        "format": FORMAT,
        "run_id": model.facts.run_id,
        "identity": identity(model.config),
        "step": model.facts.step,
        "network": model.facts.network,
        "weights": tensors_digest(model.network.state_dict())[:16],
        "oracle": model.config.oracle,
        **asdict(settings),
        "size": seen.size,
        "scales": list(seen.scales),
        "flip": seen.flip,
        "classes": list(dataset.classes),
        "images": len(dataset),
        "data_fingerprint": dataset.fingerprint(),
    }


def _claim(out: Path, made_of: Mapping[str, Any]) -> None:
    """Note what `out` is to hold; refuse it where it holds other pseudo-labels, or something else."""
    path = out / _SETTINGS
    if path.is_file():
        before = json.loads(path.read_text())
        other = [name for name in made_of if made_of[name] != before.get(name)]
        if other:
            raise ValueError(
                f"out must be a new folder or hold these very pseudo-labels, got {str(out)!r}, made with "
                + ", ".join(f"{name} {before.get(name)!r} instead of {made_of[name]!r}" for name in other[:3])
                + "; choose another folder"
            )
    elif any(out.glob("*.png")):
        raise ValueError(
            f"out must be a new folder or hold pseudo-labels, got {str(out)!r}, which holds other pictures; "
            "choose another folder"
        )
    else:
        write_atomically(path, json.dumps(made_of, indent=2) + "\n")


def _is_whole(path: Path, image: Path, dataset: SegmentationDataset) -> bool:
    try:
        read_mask(path, image, len(dataset.classes))
    except (FileNotFoundError, ValueError):
        return False
    return True


def _label_maps(
    model: Model, dataset: SegmentationDataset, indices: Sequence[int], settings: LabelSettings
) -> Iterator[tuple[int, UInt8[np.ndarray, "h w"]]]:
    """The pseudo-labels of the images `indices`, each with its index."""
    predictions = predict_files(model, [dataset.image_paths[index] for index in indices])
    for index, prediction in zip(indices, predictions, strict=True):
        if prediction.output is None:
            raise ValueError(prediction.error)
        yield index, label_map(prediction.output, dataset.labels[index], settings)


def _judge(dataset: SegmentationDataset, paths: Sequence[Path]) -> dict[str, Any]:
    """Share of pixels that have a label and, where there are masks, IoU over those pixels, as fractions."""
    k = len(dataset.classes) + 1
    confusion = torch.zeros(k, k, dtype=torch.int64)
    labelled = pixels = 0
    for index, path in enumerate(paths):
        cpl = torch.from_numpy(read_mask(path, dataset.image_paths[index], k - 1)).long()
        sure = cpl != IGNORE
        labelled, pixels = labelled + int(sure.sum()), pixels + sure.numel()
        if dataset.has_masks:
            target = torch.from_numpy(dataset.mask(index)).long()
            confusion += confusion_matrix(cpl.where(sure, 0), target.where(sure, IGNORE), k)
    found: dict[str, Any] = {"labelled": labelled / max(pixels, 1)}
    if dataset.has_masks:
        scores = dict(zip(("background", *dataset.classes), iou(confusion).tolist(), strict=True))
        found["iou"] = {name: value for name, value in scores.items() if not math.isnan(value)}
        found["miou"] = mean_iou(confusion)
    return found
