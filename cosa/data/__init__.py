"""Data sets on disk, the two views of the paper, and the batches of training and evaluation."""

from cosa.data.coco import COCO_CLASSES
from cosa.data.dataset import SegmentationDataset
from cosa.data.loader import evaluation_batches, step_names, train_batches
from cosa.data.open import open_dataset
from cosa.data.voc import VOC_CLASSES

__all__ = [
    "COCO_CLASSES",
    "VOC_CLASSES",
    "SegmentationDataset",
    "evaluation_batches",
    "open_dataset",
    "step_names",
    "train_batches",
]
