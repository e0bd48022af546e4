"""The metrics that a table may show, by the name that a run keeps them under in MLflow."""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Metric:
    """A number that every finished run has."""

    key: str
    """Its name in MLflow."""
    title: str
    """What stands at the head of its column."""
    meaning: str
    percent: bool = True
    """Whether it is a fraction, to be printed as percent."""

    def over(self, classes: Collection[str]) -> Metric:
        """C-mIoU over `classes` instead of those of coexistence; others, and of no classes, as it is."""
        if not classes or "C-mIoU" not in self.title:
            return self
        title, names = self.title.replace("C-mIoU", "mIoU") + ", chosen", ", ".join(classes)
        return replace(self, title=title, meaning=self.meaning.replace(_COEXISTENCE, names))


_COEXISTENCE = "the classes that suffer from coexistence"

_SEGMENTATION = {
    "seg_miou_labelled": (
        "labelled mIoU",
        "segmentation without the classes that the image-level labels exclude: the paper's protocol on val",
    ),
    "seg_miou": ("label-free mIoU", "segmentation by the usual protocol, which knows no labels"),
    "seg_cmiou_labelled": ("labelled C-mIoU", f"labelled mIoU over {_COEXISTENCE}"),
    "seg_cmiou": ("label-free C-mIoU", f"label-free mIoU over {_COEXISTENCE}"),
    "seg_miou_labelled_crf": ("labelled mIoU, CRF", "labelled mIoU after a dense CRF"),
    "seg_miou_crf": ("label-free mIoU, CRF", "label-free mIoU after a dense CRF"),
}
_CPL = {
    "cpl_miou": ("CPL mIoU", "CAM pseudo-labels of M at evaluation.xi, image-level labels known"),
    "cpl_cmiou": ("CPL C-mIoU", f"CPL mIoU over {_COEXISTENCE}"),
    "cpl_miou_own": ("own-ξ CPL mIoU", "CPL mIoU at the training's own threshold"),
    "cpl_cmiou_own": ("own-ξ CPL C-mIoU", f"own-ξ CPL mIoU over {_COEXISTENCE}"),
    "cpl_best_miou": ("best-ξ CPL mIoU", "CPL mIoU at the threshold that suits the ground truth best"),
    "cpl_miou_sure": ("sure CPL mIoU", "CPL mIoU at the own threshold where perplexity <= csc.epsilon"),
    "cpl_best_xi": ("best ξ", "the threshold of the best CPL mIoU"),
    "cpl_perplexity": ("CPL perplexity", "mean perplexity of the CPL over pixels"),
}
_ENSEMBLE = {
    "ensemble_cpl_miou": ("ensemble CPL mIoU", "CPL of M and M† together, at evaluation.xi"),
    "ensemble_cpl_cmiou": ("ensemble CPL C-mIoU", f"the same over {_COEXISTENCE}"),
}
_CLASSIFICATION = {
    "cls_map": ("mAP", "mean average precision of the classification"),
    "cls_precision": ("precision", "classification precision over all images and classes at probability 0.5"),
    "cls_recall": ("recall", "classification recall over all images and classes at probability 0.5"),
}
_PLAIN = frozenset({"cpl_best_xi", "cpl_perplexity"})


def _metrics() -> Iterator[Metric]:
    of_m = _CPL | _CLASSIFICATION
    aux = {f"aux_{name}": (f"M† {title}", f"{meaning}; of M†") for name, (title, meaning) in of_m.items()}
    of_both = of_m | _ENSEMBLE | aux
    for split, network, names in (
        ("val", "assignment", _SEGMENTATION | of_both),
        ("val", "online", _SEGMENTATION | of_both),
        ("train", "assignment", of_both),
    ):
        for name, (title, meaning) in names.items():
            online, train = network == "online", split == "train"
            yield Metric(
                f"{split}/{network}/{name}",
                "ON: " * online + "train " * train + title,
                meaning + "; of ON" * online + "; on the training images" * train,
                percent=name.removeprefix("aux_") not in _PLAIN,
            )


LABELS_MIOU = "pseudo_labels/miou"
_LABELS = Metric(LABELS_MIOU, "pseudo-labels", "mIoU of the files that a standalone network learned from")

METRICS: Mapping[str, Metric] = types.MappingProxyType(
    {metric.key: metric for metric in (*_metrics(), _LABELS)}
)
"""By key; those of AN without a prefix in their titles, since rows are judged on AN where they have one."""


def judged_key(key: str, network: str) -> str:
    """A metric of AN by its key, or the same of ON for a run that is judged on ON; others as they are.

    Paper: Sec. 4.2 and Fig. 6. Where ON assigns its own pseudo-labels there is no AN: the average of ON that
    such a run keeps has no part in its training.

    Args:
        key: `val/assignment/seg_miou`.
        network: As `Config.judged_network` has it.
    """
    return key.replace("/assignment/", f"/{network}/")


SEG_MIOU_LABELLED, SEG_MIOU = "val/assignment/seg_miou_labelled", "val/assignment/seg_miou"
STANDARD = (SEG_MIOU_LABELLED, SEG_MIOU, "val/assignment/cpl_miou", "val/assignment/cpl_cmiou")
"""What a table shows that names no metrics of its own."""
