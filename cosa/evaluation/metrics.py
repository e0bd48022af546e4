"""Quality over a whole data set, from counts that add up over images, batches and workers.

Every mIoU comes from ONE confusion matrix over all pixels, never from a mean over images. Rows are the
ground truth, columns the prediction; classes are in [0, k) with the background as 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from cosa.equations.threshold import BINS, activation_bin
from cosa.structures import IGNORE

SCORE_BINS = 4000
"""Bins of a class logit: told apart to 0.01, and beyond +-20 not at all."""
_SCORE_LIMIT = 20.0

IMAGE_STEPS = {"iou": 0.02, "perplexity": 0.1, "distance": 0.05}
"""What single images are counted by, each with the width of its bins."""
IMAGE_BINS = 51
"""Bins of each; the last one takes all that lies beyond."""


def confusion_matrix(
    prediction: Int[Tensor, "*s"], target: Int[Tensor, "*s"], classes: int
) -> Int[Tensor, "k k"]:
    """Number of pixels of each true class (row) predicted as each class (column); IGNORE is left out."""
    pairs = _rows(target, classes) * classes + prediction.long()
    counts = torch.bincount(pairs.flatten(), minlength=(classes + 1) * classes)
    return counts.view(classes + 1, classes)[:classes]


def _rows(target: Int[Tensor, "*s"], classes: int) -> Int[Tensor, "*s"]:
    """Classes, and one beyond the last for IGNORE: to cut its row off is faster than to leave pixels out."""
    return torch.where(target == IGNORE, classes, target.long())


def iou(confusion: Int[Tensor, "k k"]) -> Float[Tensor, " k"]:
    """Intersection over union of each class, in [0, 1]; NaN for a class that is nowhere."""
    hits = confusion.diagonal()
    return hits.double() / (confusion.sum(0) + confusion.sum(1) - hits)


def mean_iou(confusion: Int[Tensor, "k k"], classes: Sequence[int] | None = None) -> float:
    """Mean IoU over all classes, or over some of them (C-mIoU); NaN if none of them is anywhere."""
    scores = iou(confusion)
    return (scores if classes is None else scores[list(classes)]).nanmean().item()


def cpl_counts(
    activation: Float[Tensor, "*s"], strongest: Int[Tensor, "*s"], target: Int[Tensor, "*s"], classes: int
) -> Int[Tensor, "k c bins"]:
    """Pixels by true class, strongest class and activation: CPL quality at every threshold from one pass.

    Args:
        activation: nu in [0, 1].
        strongest: Foreground class with that activation, in [0, c).
        target: Ground truth in [0, k), or IGNORE.
        classes: Number of foreground classes.
    """
    shape = (classes + 2, classes, BINS)
    places = (_rows(target, classes + 1) * classes + strongest) * BINS + activation_bin(activation)
    return torch.bincount(places.flatten(), minlength=math.prod(shape)).view(shape)[:-1]


def cpl_confusion(
    counts: Int[Tensor, "k c bins"], xi: float, only: Bool[Tensor, " bins"] | None = None
) -> Int[Tensor, "k k"]:
    """Confusion matrix of the CPL at threshold xi in [0, 1], taken to the nearest bin edge; exact on edges.

    Of `only` some bins of activation where they are given.
    """
    counts = counts if only is None else counts * only
    background, foreground = counts.tensor_split([round(xi * BINS)], dim=2)
    return torch.cat([background.sum((1, 2))[:, None], foreground.sum(2)], dim=1)


def cpl_accuracy(counts: Int[Tensor, "k c bins"], xi: float) -> Int[Tensor, "2 bins"]:
    """For each bin of activation its pixels, and those of them whose CPL at threshold xi is right."""
    below = torch.arange(BINS, device=counts.device) < round(xi * BINS)
    foreground = counts[1:].diagonal(dim1=0, dim2=1).sum(1)
    return torch.stack([counts.sum((0, 1)), torch.where(below, counts[0].sum(0), foreground)])


def score_counts(cls_logits: Float[Tensor, "b c"], labels: Float[Tensor, "b c"]) -> Int[Tensor, "2 c bins"]:
    """Images by presence, class and logit, from which the mAP of a shared data set follows."""
    share = (cls_logits + _SCORE_LIMIT) / (2 * _SCORE_LIMIT)
    scores = (share * SCORE_BINS).long().clamp(0, SCORE_BINS - 1)
    shape = (2, labels.shape[1], SCORE_BINS)
    columns = torch.arange(labels.shape[1], device=labels.device)
    places = (labels.long() * labels.shape[1] + columns) * SCORE_BINS + scores
    return torch.bincount(places.flatten(), minlength=math.prod(shape)).view(shape)


def precision_recall(counts: Int[Tensor, "2 c bins"]) -> tuple[float, float]:
    """Precision and recall over all images and classes, a class being named from probability 0.5 on."""
    named = counts[:, :, SCORE_BINS // 2 :].sum((1, 2)).double()
    return (named[1] / named.sum()).item(), (named[1] / counts[1].sum()).item()


def average_precision(counts: Int[Tensor, "2 c bins"]) -> float:
    """mAP: average precision of each class that occurs, not interpolated, averaged; NaN if none does."""
    from sklearn.metrics import average_precision_score  # takes a second to import

    present, scores = np.divmod(np.arange(2 * SCORE_BINS), SCORE_BINS)
    found = [
        average_precision_score(present, scores, sample_weight=of_class.reshape(-1))
        for of_class in counts.transpose(0, 1).cpu().numpy()
        if of_class[1].any()
    ]
    return float(np.mean(found)) if found else math.nan


def image_counts(miou: Float[Tensor, ""], perplexity: Float[Tensor, ""]) -> Int[Tensor, "3 bins"]:
    """One image by how good its CPL are, how sure, and the distance of both from (1, 0).

    Paper: Fig. 7 shows the "MAE to (1,0)" without a formula; we take the mean of |1 - mIoU| and perplexity.

    Args:
        miou: Of its CPL, over the classes it holds or is said to hold.
        perplexity: Mean over its pixels.
    """
    values = torch.stack([miou, perplexity, ((1 - miou).abs() + perplexity) / 2])
    places = values / torch.tensor([*IMAGE_STEPS.values()], device=values.device)
    return one_hot(places.long().clamp(0, IMAGE_BINS - 1), IMAGE_BINS)
