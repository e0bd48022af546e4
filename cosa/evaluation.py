"""How good a network is on a split: segmentation by both protocols, CPL over all thresholds, classification.

Counts are summed over the whole split, and over all workers, before anything is divided. Metrics:

    seg_miou, seg_cmiou                     segmentation, label-free: the usual protocol, the one to select by
    seg_miou_labelled, seg_cmiou_labelled   the paper's protocol on val: never a class that the image lacks
    cpl_miou, cpl_cmiou                     CPL of M at `evaluation.xi`
    cpl_miou_own, cpl_cmiou_own             CPL of M at the training's threshold
    cpl_best_miou, cpl_best_xi              CPL of M at the best threshold of the curve
    aux_cpl_...                             the same of M-dagger
    ensemble_cpl_miou                       CPL of the mean of both activations at `evaluation.xi`
    cls_map, aux_cls_map                    mean average precision of Z and Z-dagger

C-mIoU (`..._cmiou`) averages the classes of `evaluation.coexistence` and is left out where none are given.
CPL always know the image-level labels, as they do in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cosa.cam import to_activation
from cosa.config import EvaluationConfig, nearest
from cosa.inference import multiscale, resize
from cosa.metrics import CplCounts, ScoreCounts, confusion_matrix, iou, mean_iou
from cosa.networks.network import CosaNetwork
from cosa.pseudo_labels import keep_labelled
from cosa.structures import EvaluationBatch, FusedOutput

_CURVE = tuple(i / 40 for i in range(1, 40))


@dataclass(frozen=True)
class Evaluation:
    """Fractions in [0, 1] throughout."""

    metrics: dict[str, float]
    """By name, as the module's docstring lists them; NaN where the split has nothing to count."""
    per_class: dict[str, dict[str, float]]
    """IoU by protocol (`seg_iou`, `seg_iou_labelled`, `cpl_iou`, `aux_cpl_iou`), then by class; a class
    that is neither in the ground truth nor predicted is left out."""
    curves: dict[str, list[tuple[float, float]]]
    """CPL mIoU over the threshold, of `cam` and `aux_cam`."""


class _Counts:
    """Everything that is counted over a split."""

    def __init__(self, classes: int, device: torch.device) -> None:
        self.seg = torch.zeros(classes + 1, classes + 1, dtype=torch.int64, device=device)
        self.labelled = torch.zeros_like(self.seg)
        self.cpl, self.aux_cpl, self.ensemble = (CplCounts(classes, device) for _ in range(3))
        self.cls, self.aux_cls = (ScoreCounts(classes, device) for _ in range(2))

    def add(
        self, fused: FusedOutput, labels: Float[Tensor, "b c"], masks: Sequence[Int[Tensor, "_h _w"]]
    ) -> None:
        """Count a batch: each image in the size of its own mask."""
        self.cls.update(fused.cls_logits, labels)
        self.aux_cls.update(fused.aux_cls_logits, labels)
        for i, mask in enumerate(masks):
            one = slice(i, i + 1)
            self._add_segmentation(fused.seg_logits[one], labels[one], mask)
            self._add_cams(fused.cam[one], fused.aux_cam[one], labels[one], mask)

    def _add_segmentation(
        self, seg_logits: Float[Tensor, "1 k _h _w"], labels: Float[Tensor, "1 c"], target: Int[Tensor, "h w"]
    ) -> None:
        logits = resize(seg_logits, (target.shape[0], target.shape[1]))
        classes = logits.shape[1]
        self.seg += confusion_matrix(logits.argmax(1)[0], target, classes)
        self.labelled += confusion_matrix(keep_labelled(logits, labels).argmax(1)[0], target, classes)

    def _add_cams(
        self,
        cam: Float[Tensor, "1 c _h _w"],
        aux_cam: Float[Tensor, "1 c _h _w"],
        labels: Float[Tensor, "1 c"],
        target: Int[Tensor, "h w"],
    ) -> None:
        size = (target.shape[0], target.shape[1])
        everywhere = torch.ones_like(target, dtype=torch.bool)[None]
        activation, aux_activation = (
            to_activation(resize(raw, size), labels, everywhere) for raw in (cam, aux_cam)
        )
        ensemble = (activation + aux_activation) / 2
        for counts, maps in (
            (self.cpl, activation),
            (self.aux_cpl, aux_activation),
            (self.ensemble, ensemble),
        ):
            nu, strongest = maps[0].max(0)
            counts.update(nu, strongest, target)

    def reduce(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Take the sum over all workers for each count."""
        self.seg, self.labelled = reduce(self.seg), reduce(self.labelled)
        for part in (self.cpl, self.aux_cpl, self.ensemble, self.cls, self.aux_cls):
            part.counts = reduce(part.counts)


def _alone(count: Tensor) -> Tensor:
    return count


@torch.no_grad()
def evaluate(
    network: CosaNetwork,
    batches: Iterable[EvaluationBatch],
    *,
    config: EvaluationConfig,
    classes: tuple[str, ...],
    xi: float,
    aux_xi: float,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] = _alone,
) -> Evaluation:
    """Evaluate a network on the images of a split.

    Paper: does not say how M' and M-dagger' are ensembled (Tab. 1); we average their activations.

    Args:
        network: In evaluation mode, on `device`.
        batches: This worker's images; those of all workers together are the split.
        config: Scales, flips, the threshold CPL are reported at, the classes of C-mIoU.
        classes: Names of the foreground classes.
        xi: The training's threshold of M.
        aux_xi: The training's threshold of M-dagger.
        device: Where to compute.
        reduce: Sum of a tensor over all workers; every worker then returns the same.

    Raises:
        ValueError: `evaluation.coexistence` names a class that the data set does not have.
    """
    affected = coexistence_indices(config, classes)
    counts = _Counts(len(classes), device)
    for batch in batches:
        images = batch.images.to(device)
        size = (images.shape[2], images.shape[3])
        fused = multiscale(network, images, scales=config.scales, flip=config.flip, size=size)
        counts.add(fused, batch.labels.to(device), [mask.to(device) for mask in batch.masks])
    counts.reduce(reduce)
    return _summarise(counts, config, classes, affected, {"cpl": xi, "aux_cpl": aux_xi})


def coexistence_indices(config: EvaluationConfig, classes: tuple[str, ...]) -> list[int]:
    """Indices in [1, k) of the classes that C-mIoU averages.

    Raises:
        ValueError: A name is none of `classes`.
    """
    for name in config.coexistence:
        if name not in classes:
            raise ValueError(
                f"evaluation.coexistence must name classes of the data set, got {name!r}"
                + (nearest(name, classes) or f"; the classes are {', '.join(classes)}")
            )
    return [1 + classes.index(name) for name in config.coexistence]


def _summarise(
    counts: _Counts,
    config: EvaluationConfig,
    classes: tuple[str, ...],
    affected: list[int],
    own: dict[str, float],
) -> Evaluation:
    """Metrics from the counts over the whole split; `own` holds the training's threshold of each CAM."""
    cpl = {"cpl": counts.cpl, "aux_cpl": counts.aux_cpl}
    curves = {head: heads_counts.curve(_CURVE) for head, heads_counts in cpl.items()}
    confusions = {
        ("seg", ""): counts.seg,
        ("seg", "_labelled"): counts.labelled,
        **{(head, ""): cpl[head].confusion(config.xi) for head in cpl},
        **{(head, "_own"): cpl[head].confusion(own[head]) for head in cpl},
    }
    metrics = {f"{head}_miou{suffix}": mean_iou(matrix) for (head, suffix), matrix in confusions.items()}
    if affected:
        for (head, suffix), matrix in confusions.items():
            metrics[f"{head}_cmiou{suffix}"] = mean_iou(matrix, affected)
    for head, curve in curves.items():
        metrics[f"{head}_best_xi"], metrics[f"{head}_best_miou"] = max(curve, key=lambda point: point[1])
    metrics["ensemble_cpl_miou"] = mean_iou(counts.ensemble.confusion(config.xi))
    metrics["cls_map"] = counts.cls.average_precision()
    metrics["aux_cls_map"] = counts.aux_cls.average_precision()
    return Evaluation(
        metrics=metrics,
        per_class={
            f"{head}_iou{suffix}": _by_class(matrix, classes)
            for (head, suffix), matrix in confusions.items()
            if suffix != "_own"
        },
        curves={"cam": curves["cpl"], "aux_cam": curves["aux_cpl"]},
    )


def _by_class(confusion: Int[Tensor, "k k"], classes: tuple[str, ...]) -> dict[str, float]:
    """IoU by the class's name, of the classes that are anywhere."""
    scores = zip(("background", *classes), iou(confusion).tolist(), strict=True)
    return {name: score for name, score in scores if not math.isnan(score)}
