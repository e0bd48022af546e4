"""Own data: a folder of images, a table of their labels and, for evaluation, masks.

images/ holds JPEGs and PNGs, subfolders allowed. labels.csv has the header `image,split,labels` and a row for
each image: its path below images/, the split it belongs to, and its classes with `;` between; an image
without objects has an empty cell. classes.txt, one name per line, fixes the classes and their order; without,
they are the labels in use, sorted. masks/ holds index PNGs, named and foldered as the images: 0 background,
1 the first class, 255 not counted.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cosa.config import nearest
from cosa.data.dataset import Needs, SegmentationDataset, classes_of_masks
from cosa.data.files import OnProblem, found, one_hot, read_classes, refuse
from cosa.structures import IGNORE

HEADER = ("image", "split", "labels")
"""First line of labels.csv."""

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
_LISTED = 5  # names that an error shows; the rest are counted


def read_folder(
    root: Path, split: str, *, needs: Needs, verify_masks: bool, on_problem: OnProblem = refuse
) -> SegmentationDataset:
    """The images that labels.csv gives to a split, in its order, named by their paths without suffix.

    Args:
        root: Folder that holds images/ and labels.csv.
        split: Name of the split, as in the table.
        needs: As in `open_dataset`; `images` looks at neither labels nor masks.
        verify_masks: Whether masks are read now, to find a bad one before hours of training; with `needs` =
            `masks` they always are.
        on_problem: Is told of images without row, rows without image, unknown labels, missing and bad masks.

    Raises:
        FileNotFoundError: The root, the table, an image or a mask is missing.
        ValueError: The table breaks its format, leaves out an image, names an unknown label, or gives no
            image to the split.
    """
    images = _images(root)
    table = _read_table(root / "labels.csv", on_problem)
    classes = _classes(root, table)
    _check_images_listed(images, table, root, on_problem)
    rows = {row.image: row for row in table if row.split == split}
    if not rows:
        splits = sorted({row.split for row in table})
        raise ValueError(
            f"split must be one that {root / 'labels.csv'} names, got {split!r}; "
            f"there are: {', '.join(splits)}{nearest(split, splits)}"
        )
    remedy = "add the files or take the rows out"
    law = f"rows of {root / 'labels.csv'} must name images of {root / 'images'}"
    files = found(list(rows), images, law, remedy, on_problem)
    if needs != "images":
        files = _known_labels([rows[file] for file in files], classes, root, on_problem)
    masks = {} if needs == "images" else {file: _mask(root, file) for file in files}
    there = {file: path for file, path in masks.items() if path.is_file()}
    if there or needs == "masks":
        law = f"every image of split {split!r} must have a mask in {root / 'masks'}"
        files = found(files, there, law, "add the masks, or take all of this split's away", on_problem)
    image_paths = tuple(images[file] for file in files)
    mask_paths = tuple(there[file] for file in files) if there else ()
    if mask_paths and (verify_masks or needs == "masks"):
        classes_of_masks(list(zip(mask_paths, image_paths, strict=True)), len(classes), on_problem)
    present = [[] if needs == "images" else [*map(classes.index, rows[file].labels)] for file in files]
    names = tuple(file.rpartition(".")[0] for file in files)
    return SegmentationDataset(classes, names, one_hot(present, len(classes)), image_paths, mask_paths)


def folder_splits(root: Path) -> list[str]:
    """Splits that the good rows of labels.csv name; reading a split tells of the others."""
    return sorted({row.split for row in _read_table(root / "labels.csv", lambda _: None)})


@dataclass(frozen=True)
class _Row:
    """One image of the table."""

    image: str
    """Path below images/, with forward slashes."""
    split: str
    """Its split."""
    labels: tuple[str, ...]
    """Its classes, each once."""
    line: int
    """Line of the table, from 1 on."""


def _images(root: Path) -> dict[str, Path]:
    """Image files by their path below images/, sorted."""
    folder = root / "images"
    if not folder.is_dir():
        state = (", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing") if root.is_dir() else ""
        raise FileNotFoundError(
            f"data.root must hold images and labels.csv, got {str(root)!r}, "
            f"which {'holds ' + state if state else 'is no folder'}; set --data.root"
        )
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"images must hold JPEGs or PNGs, got none in {folder}; put them there")
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _mask(root: Path, image: str) -> Path:
    return (root / "masks" / image).with_suffix(".png")


def _read_table(path: Path, on_problem: OnProblem) -> list[_Row]:
    if not path.is_file():
        raise FileNotFoundError(
            f"labels.csv must lie in the folder of the data set, got none at {path}; write a row per image "
            f"under the header {','.join(HEADER)}"
        )
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(csv.reader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"labels.csv must be a table in UTF-8, got {path} ({error}); save it so") from error
    header = tuple(cell.strip() for cell in lines[0]) if lines else ()
    if header != HEADER:
        raise ValueError(
            f"labels.csv must begin with the line {','.join(HEADER)}, got {','.join(header)!r} in {path}; "
            "correct that line, and separate columns by commas"
        )
    rows = [_row(cells, number, path) for number, cells in enumerate(lines[1:], 2) if any(cells)]
    kept: dict[str, _Row] = {}  # by name: a.jpg and a.png would share the name and the mask
    for row in rows:
        if isinstance(row, ValueError):
            on_problem(row)
            continue
        name = row.image.rpartition(".")[0]
        if name in kept:
            on_problem(
                ValueError(
                    f"images must have a row and a name of their own, got {row.image!r} in line {row.line} "
                    f"after {kept[name].image!r} in line {kept[name].line} of {path}; remove one or rename it"
                )
            )
            continue
        kept[name] = row
    if not kept:
        raise ValueError(f"labels.csv must have a row per image, got none in {path}; fill it")
    return list(kept.values())


def _row(cells: Sequence[str], number: int, path: Path) -> _Row | ValueError:
    cells = [cell.strip() for cell in cells]
    if len(cells) != len(HEADER):
        return ValueError(
            f"row must have {len(HEADER)} columns, got {len(cells)} in line {number} of {path}; "
            "separate several labels by ;"
        )
    image, split, labels = cells
    if not image or not split:
        return ValueError(
            f"row must name an image and a split, got {','.join(cells)!r} in line {number} of {path}; fill it"
        )
    return _Row(image, split, tuple(dict.fromkeys(filter(None, map(str.strip, labels.split(";"))))), number)


def _classes(root: Path, table: Sequence[_Row]) -> tuple[str, ...]:
    """The names in classes.txt; without it the labels that the table uses in any split, sorted."""
    if (root / "classes.txt").is_file():
        return read_classes(root / "classes.txt")
    classes = tuple(sorted({label for row in table for label in row.labels}))
    if not 0 < len(classes) < IGNORE:
        raise ValueError(
            f"labels.csv must use 1 to {IGNORE - 1} labels, got {len(classes)} in {root / 'labels.csv'}; "
            "write each image's classes into its row"
        )
    return classes


def _check_images_listed(
    images: dict[str, Path], table: Sequence[_Row], root: Path, on_problem: OnProblem
) -> None:
    listed = {row.image for row in table}
    missing = [image for image in images if image not in listed]
    if missing:
        law = f"every image of {root / 'images'} must have a row in {root / 'labels.csv'}"
        remedy = "add the rows, or move the files elsewhere"
        shown = ", ".join(missing[:_LISTED]) + (", ..." if len(missing) > _LISTED else "")
        error = ValueError(f"{law}, got {len(missing)} of {len(images)} without: {shown}; {remedy}")
        for image in missing:
            error.add_note(f"{law}, got none for {image!r}; {remedy}")
        on_problem(error)


def _known_labels(
    rows: Sequence[_Row], classes: tuple[str, ...], root: Path, on_problem: OnProblem
) -> tuple[str, ...]:
    """Images of the rows whose labels are all classes."""
    good = []
    for row in rows:
        unknown = [label for label in row.labels if label not in classes]
        if unknown:
            on_problem(
                ValueError(
                    f"label must be a class of classes.txt, got {unknown[0]!r} in line {row.line} of "
                    f"{root / 'labels.csv'}{nearest(unknown[0], classes)}"
                )
            )
        else:
            good.append(row.image)
    return tuple(good)
