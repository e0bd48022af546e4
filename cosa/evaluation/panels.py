"""The picture panel of an evaluation: what the network makes of a few images, one row each.

Maps are shown in the size of the image's own mask. `step_00000400.npz` beside the picture holds the same as
arrays, so that the panels of several runs can be put together with `cosa.evaluation.pictures.sheet`:

    network  text               whose view it is, `assignment` or `online`
    names    (n,) text          the images' names in the split's list
    columns  (7,) text          image, ground truth, M, M-dagger, CPL, SPL, prediction
    tiles    (n, 7, 128, 128, 3) uint8    RGB; the first column is the image itself, the same in every run
    legends  (n, 18, 944, 3) uint8        RGB; the strip under a row: its name and the classes it has

A standalone network has no CAMs: its four columns are image, ground truth, the prediction among the image's
own classes, and the prediction.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from cosa.config import Config, DataConfig, EvaluationConfig
from cosa.data.dataset import normalise
from cosa.equations.cam import to_activation
from cosa.equations.pseudo_labels import cam_pseudo_labels, keep_labelled
from cosa.evaluation.pictures import GAP, colourise, heat_map, legend, name_peaks, sheet, tile
from cosa.networks.multiscale import AnyNetwork, look, resize
from cosa.storage.files import write_atomically
from cosa.structures import IGNORE, EvaluationBatch, FusedOutput, FusedSegmentation, split

COLUMNS = ("image", "ground truth", "M", "M-dagger", "CPL", "SPL", "prediction")
_STANDALONE_COLUMNS = ("image", "ground truth", "labelled", "prediction")
_TILE = 128


@dataclass(frozen=True)
class PanelRow:
    """One image and all that is said of it, in the size of its mask."""

    name: str
    """The image's name in the split's list."""
    labels: Float[Tensor, " c"]
    """Image-level labels, 0 or 1."""
    image: UInt8[np.ndarray, "h w 3"]
    """RGB."""
    activations: Float[Tensor, "_cams n h w"]
    """Of M and M-dagger, where there are CAMs, in [0, 1], of the n classes that the image is said to hold."""
    class_maps: Int[Tensor, "_maps h w"]
    """Classes in [0, k) or IGNORE: the ground truth, all IGNORE where the split has no masks; the CPL from M,
    where there are CAMs; the likeliest class of the SPL, and of the segmentation, label-free."""


def panel_indices(
    labels: Float[Tensor, "n c"], classes: tuple[str, ...], config: EvaluationConfig
) -> list[int]:
    """Which images of a split are shown: the same ones for every network and at every step.

    `evaluation.panel_choice` says which may be, `evaluation.panel_seed` draws from them; a split without an
    image of the classes of `evaluation.coexistence` shows others.
    """
    candidates = torch.arange(len(labels))[: config.max_images or None]
    if config.panel_choice == "coexistence":
        affected = [classes.index(name) for name in config.coexistence]
        chosen = candidates[labels[candidates][:, affected].sum(1) > 0]
        candidates = chosen if len(chosen) else candidates
    if config.panel_choice != "first":
        generator = torch.Generator().manual_seed(config.panel_seed)
        candidates = candidates[torch.randperm(len(candidates), generator=generator)]
    return sorted(candidates[: config.panel_images].tolist())


@torch.no_grad()
def panel_rows(
    network: AnyNetwork,
    batches: Iterable[EvaluationBatch],
    *,
    config: Config,
    xi: float | None,
    device: torch.device,
) -> list[PanelRow]:
    """What the network makes of the images of `batches`.

    Args:
        network: In evaluation mode, on `device`.
        batches: The images to show.
        config: Scales, flips and how images were normalised.
        xi: The training's threshold of M, for the CPL; None of a standalone network.
        device: Where to compute.
    """
    rows: list[PanelRow] = []
    settings = config.evaluation
    for batch in batches:
        size = (batch.images.shape[2], batch.images.shape[3])
        images = batch.images.to(device)
        fused = look(network, images, scales=settings.scales, flip=settings.flip, size=size)
        rows += [_row(batch, i, one, xi, config.data) for i, one in enumerate(split(fused, len(images)))]
    return rows


def _row(
    batch: EvaluationBatch, index: int, fused: FusedSegmentation, xi: float | None, data: DataConfig
) -> PanelRow:
    size, labels = batch.sizes[index], batch.labels[index : index + 1]
    everywhere = torch.ones(1, *size, dtype=torch.bool)
    seg_logits = resize(fused.seg_logits, size).cpu()
    class_maps = [batch.masks[index] if batch.masks else torch.full(size, IGNORE)]
    activations = labels.new_zeros(0, labels.shape[1], *size)
    if isinstance(fused, FusedOutput):
        assert xi is not None, "there is a threshold wherever there are CAMs"
        maps = [to_activation(resize(m, size).cpu(), labels, everywhere) for m in (fused.cam, fused.aux_cam)]
        activations = torch.cat(maps)
        class_maps.append(cam_pseudo_labels(maps[0], xi, everywhere)[0])
    class_maps += [keep_labelled(seg_logits, labels).argmax(1)[0], seg_logits.argmax(1)[0]]
    return PanelRow(
        name=batch.names[index],
        labels=labels[0],
        image=_rgb(resize(batch.images[index : index + 1], size)[0], data),
        activations=activations[:, labels[0] > 0],
        class_maps=torch.stack(class_maps),
    )


def _rgb(normalised: Float[Tensor, "3 h w"], data: DataConfig) -> UInt8[np.ndarray, "h w 3"]:
    """The picture a normalised image was made from."""
    extremes = np.array([0, 255], dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    black, white = normalise(extremes, data)
    picture = ((normalised - black) / (white - black)).clamp(0, 1) * 255
    rgb: NDArray[np.uint8] = picture.round().byte().permute(1, 2, 0).numpy()
    return rgb


def panel_arrays(
    rows: Sequence[PanelRow], classes: tuple[str, ...], network: str = "assignment"
) -> dict[str, Any]:
    """The panel as arrays, as the module's docstring lists them."""
    columns = _STANDALONE_COLUMNS if network == "standalone" else COLUMNS
    width = GAP + len(columns) * (_TILE + GAP)
    tiles, legends = [], []
    for row in rows:
        present = row.labels.nonzero().flatten().tolist()
        heats = []
        for maps in row.activations.numpy():
            strongest = maps.max(0) if len(maps) else np.zeros(row.image.shape[:2], np.float32)
            square = tile(heat_map(row.image, strongest), _TILE)
            heats.append(name_peaks(square, maps, [classes[index] for index in present]))
        truth, *said = (tile(colourise(m), _TILE, smooth=False) for m in row.class_maps.numpy())
        tiles.append(np.stack([tile(row.image, _TILE), truth, *heats, *said]))
        own = [index + 1 for index in present]
        legends.append(legend(own, classes, width, size=12, title=row.name, lines=1))
    return {
        "network": np.array(network),
        "names": np.array([row.name for row in rows]),
        "columns": np.array(columns),
        "tiles": np.stack(tiles),
        "legends": np.stack(legends),
    }


def save_panels(
    path: Path, rows: Sequence[PanelRow], classes: tuple[str, ...], network: str = "assignment"
) -> tuple[Path, Path]:
    """Write the panel as a PNG, and its arrays beside it; returns both paths.

    The picture has one header, and under each row its image's name and the classes it is labelled with.

    Raises:
        OSError: They cannot be written.
    """
    arrays = panel_arrays(rows, classes, network)
    picture = sheet(arrays["tiles"], titles=arrays["columns"].tolist(), legends=arrays["legends"])
    data = path.with_suffix(".npz")

    def write_arrays(draft: Path) -> None:
        with draft.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, lambda draft: picture.save(draft, format="PNG"))
    write_atomically(data, write_arrays)
    return path, data
