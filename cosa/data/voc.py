"""The PASCAL VOC 2012 layout: lists, images, masks and annotations under one root.

JPEGImages/*.jpg (or .png), SegmentationClassAug/*.png and SegmentationClass/*.png, Annotations/*.xml,
ImageSets/Segmentation/*.txt. A classes.txt in the root, one name per line, replaces VOC's twenty classes.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from cosa.config import nearest
from cosa.data.dataset import Needs, SegmentationDataset, assemble
from cosa.data.files import (
    OnProblem,
    files_by_stem,
    found,
    read_classes,
    refuse,
    require_distinct,
    require_root,
    text_lines,
)

_log = logging.getLogger(__name__)

# fmt: off
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
# fmt: on

_IMAGES = "JPEGImages"
_LISTS = "ImageSets/Segmentation"
_MASKS = ("SegmentationClassAug", "SegmentationClass")
_ANNOTATIONS = "Annotations"

# One line of a list: `2007_000032`, or paths from the root with an optional second column for the mask.
_ENTRY = re.compile(
    rf"(?:/?{_IMAGES}/)?(?P<name>[^/\\\s]+?)(?:\.(?:jpg|jpeg|png))?"
    rf"(?:\s+/?(?:{'|'.join(_MASKS)})/(?P<mask>[^/\\\s]+)\.png)?"
)


def read_voc(
    root: Path, split: str, *, needs: Needs, verify_masks: bool, on_problem: OnProblem = refuse
) -> SegmentationDataset:
    """The images that list `split` names, with their labels.

    Image-level labels are those of Annotations/*.xml (every object, difficult ones, too) where the folder
    is there, else the classes of the masks. Ground truth is SegmentationClassAug's, else SegmentationClass's.

    Args and errors are those of `open_dataset`. `verify_masks` reads masks that no label comes from, too.
    """
    inner = [p for p in (root / "VOC2012", root / "VOCdevkit/VOC2012") if (p / _IMAGES).is_dir()]
    remedy = "set --data.root to the folder that holds JPEGImages and ImageSets"
    remedy = f"did you mean {str(inner[0])!r}?" if inner else remedy
    require_root(root, "VOC", (_IMAGES, _LISTS), remedy)
    if not any((root / _IMAGES).iterdir()):
        raise FileNotFoundError(
            f"{_IMAGES} must hold images, got an empty folder {root / _IMAGES}; unpack the data"
        )
    custom = root / "classes.txt"
    classes = read_classes(custom) if custom.is_file() else VOC_CLASSES
    images = files_by_stem(root / _IMAGES, (".png", ".jpeg", ".jpg"))
    names = _list_names(root, split)

    def keep(files: dict[str, Path], law: str) -> tuple[str, ...]:
        return found(names, files, law, "add the files or take the names out of the list", on_problem)

    names = keep(images, f"list {split!r} must name images of {root / _IMAGES}")
    if needs == "images":
        return assemble(classes, names, images, {}, lambda _: [], on_problem)
    masks = {k: v for folder in reversed(_MASKS) for k, v in files_by_stem(root / folder, (".png",)).items()}
    annotated = (root / _ANNOTATIONS).is_dir()
    if needs == "masks" or not annotated or any(name in masks for name in names):
        names = keep(masks, f"every image of list {split!r} must have a mask in {root}")
    else:
        masks = {}
    annotations = files_by_stem(root / _ANNOTATIONS, (".xml",))
    if annotated:
        names = keep(annotations, f"every image of list {split!r} must be in {root / _ANNOTATIONS}")

    def labels_of(name: str) -> list[int]:
        return _annotated_classes(annotations[name], classes)

    if not annotated and classes == VOC_CLASSES:
        _warn_of_missing_classes(root, split, names)
    labels = labels_of if annotated else None
    return assemble(classes, names, images, masks, labels, on_problem, verify_masks=verify_masks)


def _warn_of_missing_classes(root: Path, split: str, names: Sequence[str]) -> None:
    """Say how many images may lack a label where labels come from SBD's masks; VOC's own masks lack none.

    Measured against the authors' list of labels: 30 of 493 of SBD's masks lack a class that VOC annotates,
    none of 480 of VOC's own.
    """
    own = files_by_stem(root / _MASKS[1], (".png",))
    drawn = sum(name not in own for name in names)
    if drawn:
        _log.warning(
            "labels of %r come from masks, since %s is missing: of the %d images whose masks are SBD's "
            "about %d lack a class; add VOC's Annotations",
            split,
            root / _ANNOTATIONS,
            drawn,
            round(drawn * 30 / 493),
        )


def voc_splits(root: Path) -> list[str]:
    """Splits that have a list, and `train_aug` where it can be derived."""
    lists = {path.stem for path in (root / _LISTS).glob("*.txt")}
    if "val" in lists:
        with contextlib.suppress(ValueError):  # of a list that breaks its format: whoever opens val is told
            lists |= {"train_aug"} if _beside_val(root) else set()
    return sorted(lists)


def _beside_val(root: Path) -> tuple[str, ...]:
    """What `train_aug` is without a list of its own: every augmented mask whose image is not in val."""
    drawn = files_by_stem(root / _MASKS[0], (".png",))
    return tuple(sorted(drawn.keys() - set(_list_names(root, "val")))) if drawn else ()


def _list_names(root: Path, split: str) -> tuple[str, ...]:
    """The image names of a split; `train_aug` may have no list."""
    path = root / _LISTS / f"{split}.txt"
    if path.is_file():
        names = tuple(_entry_name(line, path) for line in text_lines(path))
    elif not (split == "train_aug" and (names := _beside_val(root))):
        lists = sorted(p.stem for p in (root / _LISTS).glob("*.txt"))
        raise FileNotFoundError(
            f"split must be a list in {root / _LISTS}, got {split!r}; "
            f"there are: {', '.join(lists) or 'none'}{nearest(split, lists)}"
        )
    if not names:
        raise ValueError(f"list {split!r} must name at least one image, got none in {path}; fill it")
    require_distinct(names, path)
    return names


def _entry_name(line: str, path: Path) -> str:
    match = _ENTRY.fullmatch(line.strip())
    if match is None or match["name"] in (".", "..") or match["mask"] not in (None, match["name"]):
        raise ValueError(
            f"list must hold one image name per line, such as 2007_000032, got {line.strip()!r} in {path}; "
            "correct that line"
        )
    return match["name"]


def _annotated_classes(path: Path, classes: tuple[str, ...]) -> list[int]:
    """Indices of the classes whose objects the annotation lists."""
    try:
        tree = ElementTree.parse(path)  # noqa: S314 - the user's own data set
    except ElementTree.ParseError as error:
        raise ValueError(f"annotation must be XML, got {path} ({error}); replace the file") from None
    objects = [element.findtext("name", "").strip() for element in tree.iter("object")]
    unknown = [name for name in objects if name not in classes]
    if unknown:
        raise ValueError(
            f"annotation must name known classes, got {unknown[0]!r} in {path}{nearest(unknown[0], classes)}"
        )
    return sorted({classes.index(name) for name in objects})
