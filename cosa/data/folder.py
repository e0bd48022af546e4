"""Own data: a folder of images, a table of their labels and, for evaluation, masks.

images/ holds JPEGs and PNGs, subfolders allowed. labels.csv has the header `image,split,labels` and a row for
each image: its path below images/, the split it belongs to, and its classes with `;` between; an image
without objects has an empty cell. classes.txt, one name per line, fixes the classes and their order; without,
they are the labels in use, sorted. masks/ holds index PNGs, named and foldered as the images: 0 background,
1 the first class, 255 not counted.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cosa.config import nearest
from cosa.data.dataset import Needs, SegmentationDataset, assemble
from cosa.data.files import OnProblem, contents, found, read_classes, refuse, require_foreground
from cosa.structures import IGNORE

HEADER = ("image", "split", "labels")
"""First line of labels.csv."""

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})


def read_folder(
    root: Path, split: str, *, needs: Needs, verify_masks: bool, on_problem: OnProblem = refuse
) -> SegmentationDataset:
    """The images that labels.csv gives to a split, in its order, named by their paths without suffix.

    Args and errors are those of `open_dataset`. `verify_masks` reads masks now.
    """
    images = _images(root)
    path = root / "labels.csv"
    table = _read_table(path, on_problem)
    classes = _classes(root, table)
    law = f"every image of {root / 'images'} must have a row in {path}"
    remedy = "add the rows, or move the files elsewhere"
    found(images, {row.image for row in table}, law, remedy, on_problem, ValueError)
    rows = {row.image: row for row in table if row.split == split}
    if not rows:
        splits = sorted({row.split for row in table})
        raise ValueError(
            f"split must be one that {path} names, got {split!r}; "
            f"there are: {', '.join(splits)}{nearest(split, splits)}"
        )
    law = f"rows of {path} must name images of {root / 'images'}"
    files = found(rows, images, law, "add the files or take the rows out", on_problem)
    if needs == "images":
        return assemble(classes, files, images, {}, lambda _: [], on_problem).named_by_stem()
    every, strays = _masks(root, images)
    masks = {file: every[file] for file in files if file in every}
    if strays and not masks:
        on_problem(ValueError(stray_masks(root)))
    if masks or needs == "masks":
        law = f"every image of split {split!r} must have a mask in {root / 'masks'}"
        files = found(files, masks, law, "add the masks, or take all of this split's away", on_problem)

    def labels_of(file: str) -> list[int]:
        for label in rows[file].labels:
            if label not in classes:
                raise ValueError(
                    f"label must be a class of classes.txt, got {label!r} in line {rows[file].line} of "
                    f"{path}{nearest(label, classes)}"
                )
        return [*map(classes.index, rows[file].labels)]

    dataset = assemble(classes, files, images, masks, labels_of, on_problem, verify_masks=verify_masks)
    return dataset.named_by_stem()


def stray_masks(root: Path) -> str:
    """What is wrong with the names of the masks under `root`; empty where each belongs to an image."""
    images = _images(root)
    masks, strays = _masks(root, images)
    if not strays:
        return ""
    return (
        f"masks must be named and foldered as their images, got {len(strays)} in {strays[0].parent} that "
        f"belong to none, first {strays[0].name!r}, and {len(images) - len(masks)} of {len(images)} images "
        "without a mask; rename the masks, or take them away"
    )


def _masks(root: Path, images: Iterable[str]) -> tuple[dict[str, Path], list[Path]]:
    """The mask of each image that has one, by the image's path, and the files that belong to none.

    Names are found whatever their case, that of the folder and of the suffix, too.
    """
    folders = [path for path in sorted(root.iterdir()) if path.name.lower() == "masks" and path.is_dir()]
    files = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() == ".png"
    }
    stems = {image: image.rpartition(".")[0] for image in images}
    shared = Counter(map(str.casefold, stems.values()))
    by_case = {stem.casefold(): path for stem, path in files.items() if shared[stem.casefold()] == 1}
    matched = {image: files.get(stem) or by_case.get(stem.casefold()) for image, stem in stems.items()}
    masks = {image: path for image, path in matched.items() if path}
    used = set(masks.values())
    return masks, [path for path in files.values() if path not in used]


def folder_splits(root: Path) -> list[str]:
    """Splits that the good rows of labels.csv name; reading a split tells of the others."""
    return sorted({row.split for row in _read_table(root / "labels.csv", lambda _: None)})


class _Row(NamedTuple):
    """An image of the table: its path below images/, its split, its classes, each once, and its line."""

    image: str
    split: str
    labels: tuple[str, ...]
    line: int


def _images(root: Path) -> dict[str, Path]:
    """Image files by their path below images/, sorted."""
    folder = root / "images"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"data.root must hold images and labels.csv, got {str(root)!r}, which {contents(root)}; "
            "set --data.root"
        )
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"images must hold JPEGs or PNGs, got none in {folder}; put them there")
    return {path.relative_to(folder).as_posix(): path for path in paths}


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
    rows: dict[str, _Row] = {}
    for number, cells in enumerate(lines[1:], 2):
        try:
            if any(cells):
                _add_row(rows, cells, number, path)
        except ValueError as error:
            on_problem(error)
    if not rows:
        raise ValueError(f"labels.csv must have a row per image, got none in {path}; fill it")
    return list(rows.values())


def _add_row(rows: dict[str, _Row], cells: Sequence[str], number: int, path: Path) -> None:
    """Add a row by its image's name: a.jpg and a.png would share the name and the mask."""
    cells = [cell.strip() for cell in cells]
    if len(cells) != len(HEADER):
        raise ValueError(
            f"row must have {len(HEADER)} columns, got {len(cells)} in line {number} of {path}; "
            "separate several labels by ;"
        )
    image, split, labels = cells
    if not image or not split:
        raise ValueError(
            f"row must name an image and a split, got {','.join(cells)!r} in line {number} of {path}; fill it"
        )
    before = rows.get(image.rpartition(".")[0])
    if before:
        raise ValueError(
            f"images must have a row and a name of their own, got {image!r} in line {number} "
            f"after {before.image!r} in line {before.line} of {path}; remove one or rename it"
        )
    named = dict.fromkeys(filter(None, map(str.strip, labels.split(";"))))
    rows[image.rpartition(".")[0]] = _Row(image, split, tuple(named), number)


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
    require_foreground(classes, root / "labels.csv")
    return classes
