"""Data sets on disk, the two views of the paper, and the batches of training and evaluation."""

from cosa.data.dataset import SegmentationDataset
from cosa.data.loader import evaluation_batches, train_batches
from cosa.data.voc import VOC_CLASSES, open_dataset

__all__ = ["VOC_CLASSES", "SegmentationDataset", "evaluation_batches", "open_dataset", "train_batches"]
