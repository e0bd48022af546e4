"""Quality over a whole data set, from counts that add up over batches and workers.

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

from cosa.equations.threshold import BINS, activation_bin
from cosa.structures import IGNORE


def confusion_matrix(
    prediction: Int[Tensor, "*s"], target: Int[Tensor, "*s"], classes: int
) -> Int[Tensor, "k k"]:
    """Number of pixels of each true class (row) predicted as each class (column); IGNORE is left out."""
    counted = target != IGNORE
    pairs = target[counted].long() * classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def iou(confusion: Int[Tensor, "k k"]) -> Float[Tensor, " k"]:
    """Intersection over union of each class, in [0, 1]; NaN for a class that is nowhere."""
    hits = confusion.diagonal()
    return hits.double() / (confusion.sum(0) + confusion.sum(1) - hits)


def mean_iou(confusion: Int[Tensor, "k k"], classes: Sequence[int] | None = None) -> float:
    """Mean IoU over all classes, or over some of them (C-mIoU); NaN if none of them is anywhere."""
    scores = iou(confusion)
    return (scores if classes is None else scores[list(classes)]).nanmean().item()


class CplCounts:
    """Pixels by true class, strongest class and activation: CPL quality at every threshold from one pass."""

    def __init__(self, classes: int, device: torch.device, bins: int = BINS) -> None:
        """Empty counts for `classes` foreground classes."""
        self.counts = torch.zeros(classes + 1, classes, bins, dtype=torch.int64, device=device)
        """(k, c, bins); of several workers the counts add up."""

    def update(
        self, activation: Float[Tensor, "*s"], strongest: Int[Tensor, "*s"], target: Int[Tensor, "*s"]
    ) -> None:
        """Count one image's pixels.

        Args:
            activation: nu in [0, 1].
            strongest: Foreground class with that activation, in [0, c).
            target: Ground truth in [0, k), or IGNORE.
        """
        _, classes, bins = self.counts.shape
        counted = target != IGNORE
        place = (target[counted].long() * classes + strongest[counted]) * bins
        place = place + activation_bin(activation[counted], bins)
        self.counts += torch.bincount(place, minlength=self.counts.numel()).view_as(self.counts)

    @property
    def activations(self) -> Float[Tensor, " bins"]:
        """The activation in the middle of each bin."""
        bins = self.counts.shape[2]
        return (torch.arange(bins, device=self.counts.device, dtype=torch.float64) + 0.5) / bins

    def confusion(self, xi: float, only: Bool[Tensor, " bins"] | None = None) -> Int[Tensor, "k k"]:
        """Confusion matrix of the CPL at threshold xi, taken to the nearest bin edge; exact on edges.

        Args:
            xi: Confidence threshold in [0, 1].
            only: Bins of activation whose pixels are counted; all by default.
        """
        counts = self.counts if only is None else self.counts * only
        edge = round(xi * counts.shape[2])
        background = counts[:, :, :edge].sum((1, 2))
        return torch.cat([background[:, None], counts[:, :, edge:].sum(2)], dim=1)

    def accuracy(self, xi: float) -> tuple[Int[Tensor, " bins"], Int[Tensor, " bins"]]:
        """For each bin of activation its pixels, and those of them whose CPL at threshold xi is right."""
        bins = self.counts.shape[2]
        foreground = self.counts[1:].diagonal(dim1=0, dim2=1).sum(1)
        below = torch.arange(bins, device=self.counts.device) < round(xi * bins)
        return self.counts.sum((0, 1)), torch.where(below, self.counts[0].sum(0), foreground)

    def curve(self, xis: Sequence[float]) -> list[tuple[float, float]]:
        """(xi, CPL mIoU) at each threshold."""
        return [(xi, mean_iou(self.confusion(xi))) for xi in xis]


class ScoreCounts:
    """Images by class, presence and score, from which the mAP of a data set shared among workers follows.

    Logits are told apart to 0.01 and beyond +-20 not at all.
    """

    _LIMIT = 20.0
    _BINS = 4000

    def __init__(self, classes: int, device: torch.device) -> None:
        """Empty counts for `classes` foreground classes."""
        self.counts = torch.zeros(2, classes, self._BINS, dtype=torch.int64, device=device)
        """(absent or present, c, bins); of several workers the counts add up."""

    def update(self, cls_logits: Float[Tensor, "b c"], labels: Float[Tensor, "b c"]) -> None:
        """Count the images of a batch."""
        share = (cls_logits + self._LIMIT) / (2 * self._LIMIT)
        scores = (share * self._BINS).long().clamp(0, self._BINS - 1)
        columns = torch.arange(labels.shape[1], device=labels.device).expand_as(scores)
        self.counts.index_put_((labels.long(), columns, scores), torch.ones_like(scores), accumulate=True)

    def precision_recall(self) -> tuple[float, float]:
        """Precision and recall over all images and classes, a class being named from probability 0.5 on."""
        named = self.counts[:, :, self._BINS // 2 :].sum((1, 2)).double()
        present = self.counts[1].sum().double()
        return (named[1] / named.sum()).item(), (named[1] / present).item()

    def average_precision(self) -> float:
        """mAP: average precision of each class that occurs, not interpolated, averaged; NaN if none does."""
        from sklearn.metrics import average_precision_score  # takes a second to import

        present, scores = np.divmod(np.arange(2 * self._BINS), self._BINS)
        counts = self.counts.transpose(0, 1).cpu().numpy()
        found = [
            average_precision_score(present, scores, sample_weight=of_class.reshape(-1))
            for of_class in counts
            if of_class[1].any()
        ]
        return float(np.mean(found)) if found else math.nan


class ImageCounts:
    """Single images by how good their CPL are and how sure: for distributions over a data set of any size."""

    STEPS = (0.02, 0.1, 0.05)
    """Width of a bin of the mIoU, the mean perplexity, and the distance of both from (1, 0)."""
    BINS = 51
    """Bins of each; the last one takes all that lies beyond."""

    def __init__(self, device: torch.device) -> None:
        """Empty counts."""
        self.counts = torch.zeros(3, self.BINS, dtype=torch.int64, device=device)
        """(mIoU, perplexity, distance) by bins; of several workers the counts add up."""

    def update(self, miou: Float[Tensor, ""], perplexity: Float[Tensor, ""]) -> None:
        """Count one image.

        Paper: Fig. 7 shows the "MAE to (1,0)" without a formula; we take the mean of |1 - mIoU| and
        perplexity.

        Args:
            miou: Of its CPL, over the classes it holds or is said to hold.
            perplexity: Mean over its pixels.
        """
        values = torch.stack([miou, perplexity, ((1 - miou).abs() + perplexity) / 2])
        places = (values / torch.tensor(self.STEPS, device=values.device)).long().clamp(0, self.BINS - 1)
        self.counts.scatter_add_(1, places[:, None], torch.ones_like(places)[:, None])
