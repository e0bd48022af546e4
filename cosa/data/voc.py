"""The PASCAL VOC 2012 layout: lists, images, masks and annotations under one root.

JPEGImages/*.jpg (or .png), SegmentationClassAug/*.png and SegmentationClass/*.png, Annotations/*.xml,
ImageSets/Segmentation/*.txt. A classes.txt in the root, one name per line, replaces VOC's twenty classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cosa.config import nearest
from cosa.data.dataset import Needs, SegmentationDataset, read_mask
from cosa.structures import IGNORE

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)

_IMAGES = "JPEGImages"
_LISTS = "ImageSets/Segmentation"
_MASKS = ("SegmentationClassAug", "SegmentationClass")
_ANNOTATIONS = "Annotations"

# One line of a list: `2007_000032`, or paths from the root with an optional second column for the mask.
_ENTRY = re.compile(
    rf"(?:/?{_IMAGES}/)?(?P<name>[^/\\\s]+?)(?:\.(?:jpg|jpeg|png))?"
    rf"(?:\s+/?(?:{'|'.join(_MASKS)})/(?P<mask>[^/\\\s]+)\.png)?"
)

T = TypeVar("T")

_THREADS = 8  # files are read in parallel: most of the wait is the disk's, and decoding frees the GIL


def read_voc(root: Path, split: str, *, needs: Needs, verify_masks: bool) -> SegmentationDataset:
    """The images that list `split` names, with their labels.

    Image-level labels are those of Annotations/*.xml (every object, difficult ones, too) where the folder
    is there, else the classes of the masks. Ground truth is SegmentationClassAug's, else SegmentationClass's.

    Args:
        root: Folder that holds JPEGImages and ImageSets.
        split: Name of the list.
        needs: As in `open_dataset`; `images` looks at neither annotations nor masks.
        verify_masks: Whether masks that no label comes from are read now, to find a bad one before hours of
            training; with `needs` = `masks` they always are.

    Raises:
        FileNotFoundError: The root, the list, or a file that the list names is missing.
        ValueError: A list, a mask, an annotation or classes.txt breaks its format.
    """
    _check_root(root)
    classes = _read_classes(root / "classes.txt")
    images = _files(root / _IMAGES, (".png", ".jpeg", ".jpg"))
    names = _list_names(root, split, derive_from_masks=split == "train_aug")
    image_paths = _find(names, images, f"list {split!r} must name images of {root / _IMAGES}")
    if needs == "images":
        return SegmentationDataset(classes, names, torch.zeros(len(names), len(classes)), image_paths, ())
    masks = {k: v for folder in reversed(_MASKS) for k, v in _files(root / folder, (".png",)).items()}
    annotated = (root / _ANNOTATIONS).is_dir()
    mask_paths: tuple[Path, ...] = ()
    if needs == "masks" or not annotated or any(name in masks for name in names):
        mask_paths = _find(names, masks, f"every image of list {split!r} must have a mask in {root}")
    present = []
    if needs == "masks" or verify_masks or not annotated:
        pairs = list(zip(mask_paths, image_paths, strict=True)) if mask_paths else []
        present = _in_threads(lambda pair: _classes_of_mask(*pair, len(classes)), pairs)
    if annotated:
        annotations = _files(root / _ANNOTATIONS, (".xml",))
        paths = _find(names, annotations, f"every image of list {split!r} must be in {root / _ANNOTATIONS}")
        present = _in_threads(lambda path: _annotated_classes(path, classes), paths)
    return SegmentationDataset(classes, names, _one_hot(present, len(classes)), image_paths, mask_paths)


def _check_root(root: Path) -> None:
    remedy = "set --data.root to the folder that holds JPEGImages and ImageSets"
    if not root.is_dir():
        state = "which is not a folder" if root.exists() else "which does not exist"
        raise FileNotFoundError(
            f"data.root must be a folder in the VOC layout, got {str(root)!r}, {state}; {remedy}"
        )
    for folder in (_IMAGES, _LISTS):
        if not (root / folder).is_dir():
            inner = [p for p in (root / "VOC2012", root / "VOCdevkit/VOC2012") if (p / _IMAGES).is_dir()]
            found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(
                f"data.root must hold {folder}, got {str(root)!r}, which holds {found}; "
                + (f"did you mean {str(inner[0])!r}?" if inner else remedy)
            )
    if not any((root / _IMAGES).iterdir()):
        raise FileNotFoundError(
            f"{_IMAGES} must hold images, got an empty folder {root / _IMAGES}; unpack the data"
        )


def _read_classes(path: Path) -> tuple[str, ...]:
    """The names in classes.txt, or VOC's where there is no such file."""
    if not path.is_file():
        return VOC_CLASSES
    names = tuple(line.strip() for line in _lines(path))
    if not 0 < len(names) < IGNORE:
        raise ValueError(
            f"classes.txt must name 1 to {IGNORE - 1} classes, got {len(names)} in {path}; "
            "write one foreground class per line"
        )
    _require_distinct(names, path)
    return names


def _list_names(root: Path, split: str, *, derive_from_masks: bool) -> tuple[str, ...]:
    """The image names of a split; a missing `train_aug` is every augmented mask whose image is not in val."""
    path = root / _LISTS / f"{split}.txt"
    if path.is_file():
        names = tuple(_entry_name(line, path) for line in _lines(path))
    elif derive_from_masks and (root / _MASKS[0]).is_dir():
        held_out = set(_list_names(root, "val", derive_from_masks=False))
        names = tuple(sorted(set(_files(root / _MASKS[0], (".png",))) - held_out))
        path = root / _MASKS[0]
    else:
        lists = sorted(p.stem for p in (root / _LISTS).glob("*.txt"))
        raise FileNotFoundError(
            f"split must be a list in {root / _LISTS}, got {split!r}; "
            f"there are: {', '.join(lists) or 'none'}{nearest(split, lists)}"
        )
    if not names:
        raise ValueError(f"list {split!r} must name at least one image, got none in {path}; fill it")
    _require_distinct(names, path)
    return names


def _entry_name(line: str, path: Path) -> str:
    match = _ENTRY.fullmatch(line.strip())
    if match is None or match["name"] in (".", "..") or match["mask"] not in (None, match["name"]):
        raise ValueError(
            f"list must hold one image name per line, such as 2007_000032, got {line.strip()!r} in {path}; "
            "correct that line"
        )
    return match["name"]


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def _require_distinct(names: Sequence[str], path: Path) -> None:
    if len(set(names)) < len(names):
        seen: set[str] = set()
        again = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"names must be distinct, got {again!r} twice in {path}; remove one")


def _files(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """The files of a folder by stem; a later suffix wins over an earlier one. Empty without the folder."""
    if not folder.is_dir():
        return {}
    paths = sorted(folder.iterdir())  # one listing: a look-up per file takes minutes on a network disk
    return {path.stem: path for suffix in suffixes for path in paths if path.suffix.lower() == suffix}


def _find(names: Sequence[str], files: dict[str, Path], law: str) -> tuple[Path, ...]:
    missing = [name for name in names if name not in files]
    if missing:
        raise FileNotFoundError(
            f"{law}, got {len(missing)} missing of {len(names)}, first {missing[0]!r}; "
            "add the files or take the names out of the list"
        )
    return tuple(files[name] for name in names)


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


def _classes_of_mask(mask_path: Path, image_path: Path, classes: int) -> list[int]:
    mask = read_mask(mask_path, image_path, classes)
    return [int(value) - 1 for value in np.flatnonzero(np.bincount(mask.ravel())) if value not in (0, IGNORE)]


def _in_threads(function: Callable[[T], list[int]], items: Sequence[T]) -> list[list[int]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, items))


def _one_hot(present: Sequence[Sequence[int]], classes: int) -> Float[Tensor, "n c"]:
    labels = torch.zeros(len(present), classes)
    for row, indices in zip(labels, present, strict=True):
        row[list(indices)] = 1
    return labels
