"""The MS-COCO 2014 layout: train2014/, val2014/ and annotations/instances_*.json under one root.

A split is called as its folder is. Its classes are COCO's 80 in the order of their category ids: ids run from
1 to 90 with gaps, classes from 1 to 80 without. Image-level labels are the classes of all annotations of an
image, crowds among them; an image without annotations stays, with no label and a mask of background.

The annotation file, 450 MB for train2014, is parsed once: names and labels go into the cache, under the
file's digest, so that another file never meets them. Masks go there, too, but only where they are needed:
training on labels draws none.
"""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cosa.config import nearest
from cosa.data.coco_masks import Region, Scene, draw_masks
from cosa.data.dataset import Needs, SegmentationDataset
from cosa.data.files import OnProblem, found, locked, one_hot, refuse
from cosa.storage.files import digest, write_atomically

# fmt: off
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)
# fmt: on

_GAPS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
COCO_CATEGORIES = tuple(i for i in range(1, 91) if i not in _GAPS)
"""Category ids of COCO_CLASSES, in their order."""

_SUFFIXES = (".jpg", ".jpeg", ".png")
_FORMAT = 1  # of what is in the cache; a change of what masks show raises it

# What is kept of the annotation file while it is parsed; the rest would take most of the memory.
_KEPT = frozenset(
    {"images", "annotations", "categories", "id", "name", "file_name", "height", "width"}
    | {"image_id", "category_id", "iscrowd", "segmentation", "counts", "size"}
)


def read_coco(
    root: Path, split: str, cache: Path, *, needs: Needs, draw: bool, on_problem: OnProblem = refuse
) -> SegmentationDataset:
    """The images of a split in the order of their file names, with their labels.

    Args:
        root: Folder that holds the images' folders and `annotations`.
        split: Name of the images' folder, such as `val2014`.
        cache: Where names, labels and masks are kept.
        needs: As in `open_dataset`; `images` takes what lies in the folder and needs no annotations.
        draw: Whether masks are wanted; they are drawn where the cache does not have them yet.
        on_problem: Is told of files that are missing or bad.

    Raises:
        FileNotFoundError: The root, the split, or an image that the annotations name is missing.
        ValueError: The annotations are no JSON, not COCO's, or contradict themselves or an image's size.
        OSError: The cache cannot be written.
    """
    _check_root(root, split)
    images = {p.name: p for p in (root / split).iterdir() if p.suffix.lower() in _SUFFIXES}
    if needs == "images":
        paths = tuple(images[name] for name in sorted(images))
        names, labels = tuple(path.stem for path in paths), one_hot([[]] * len(paths), len(COCO_CLASSES))
        return SegmentationDataset(COCO_CLASSES, names, labels, paths, ())
    path = _annotations(root, split)
    version = digest(path)[:16]
    store = cache / f"coco-{split}-{version}-{_FORMAT}"
    parsed = functools.cache(functools.partial(read_annotations, path))
    index = _index(store, parsed)
    law = f"annotations of {split} must name images of {root / split}"
    remedy = "add the files, or take the annotation file that belongs to them"
    files = found(list(index), images, law, remedy, on_problem)
    mask_paths: tuple[Path, ...] = ()
    if draw:
        kept = draw_masks(store, {name: images[name] for name in files}, len(index), parsed, on_problem)
        files = tuple(name for name in files if name in kept)
        mask_paths = tuple(kept[name] for name in files)
    return SegmentationDataset(
        COCO_CLASSES,
        tuple(name.rpartition(".")[0] for name in files),
        one_hot([index[name] for name in files], len(COCO_CLASSES)),
        tuple(images[name] for name in files),
        mask_paths,
        mask_source=version,
    )


def coco_splits(root: Path) -> list[str]:
    """Splits whose annotations lie under `root`."""
    return sorted(p.stem.removeprefix("instances_") for p in (root / "annotations").glob("instances_*.json"))


def _check_root(root: Path, split: str) -> None:
    remedy = "set --data.root to the folder that holds annotations, train2014 and val2014"
    if not root.is_dir():
        state = "which is not a folder" if root.exists() else "which does not exist"
        raise FileNotFoundError(
            f"data.root must be a folder in the COCO layout, got {str(root)!r}, {state}; {remedy}"
        )
    if not (root / split).is_dir() or split in {"", ".", "..", "annotations"}:
        folders = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "annotations")
        raise FileNotFoundError(
            f"split must be a folder of images in {root}, got {split!r}; there are: "
            f"{', '.join(folders) or 'none'}{nearest(split, folders)}"
        )


def _annotations(root: Path, split: str) -> Path:
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"annotations of {split!r} must be in {path}, which does not exist; there are those of: "
            f"{', '.join(coco_splits(root)) or 'no split'}"
        )
    return path


def _index(store: Path, parsed: Callable[[], Mapping[str, Scene]]) -> Mapping[str, list[int]]:
    """Positions of the classes of each image, by file name in order; from the cache once it is there."""
    path = store / "index.json"
    if not path.is_file():
        with locked(store):
            if not path.is_file():  # nobody wrote it while we waited
                index = {
                    name: sorted({region.label - 1 for region in scene.regions})
                    for name, scene in parsed().items()
                }
                write_atomically(path, json.dumps(index))
    content: dict[str, list[int]] = json.loads(path.read_bytes())
    return content


def read_annotations(path: Path) -> dict[str, Scene]:
    """What an annotation file says of each image, by file name in order.

    Raises:
        ValueError: The file is no JSON, not in COCO's format, has other classes, or names an image or a
            category that it does not have.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file, object_hook=_shrink)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"annotations must be JSON, got {path} ({error}); download it again") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"polygons must be lists of numbers, got {path} ({error}); {_REMEDY}") from None
    try:
        return _scenes(content, path)
    except (KeyError, TypeError, AttributeError) as error:
        missing = f"without {error}" if isinstance(error, KeyError) else f"({error})"
        raise ValueError(
            f"annotations must be COCO's images, annotations and categories, got {path} {missing}; {_REMEDY}"
        ) from None


_REMEDY = "take COCO's instances_*.json"


def _shrink(item: dict[str, Any]) -> dict[str, Any]:
    """What is needed of one JSON object, polygons in 8 bytes a number instead of 32."""
    kept = {key: value for key, value in item.items() if key in _KEPT}
    if isinstance(kept.get("segmentation"), list):
        kept["segmentation"] = [array("d", polygon) for polygon in kept["segmentation"]]
    return kept


def _scenes(content: Any, path: Path) -> dict[str, Scene]:
    _check_categories(content["categories"], path)
    labels = {category: position + 1 for position, category in enumerate(COCO_CATEGORIES)}
    regions: dict[int, list[Region]] = {image["id"]: [] for image in content["images"]}
    for item in content["annotations"]:
        if item["image_id"] not in regions:
            raise ValueError(
                f"annotation must belong to an image of its file, got image_id {item['image_id']!r} "
                f"in annotation {item['id']!r} of {path}; {_REMEDY}"
            )
        if item["category_id"] not in labels:
            raise ValueError(
                f"annotation must have one of COCO's categories, got category_id {item['category_id']!r} "
                f"in annotation {item['id']!r} of {path}; {_REMEDY}"
            )
        regions[item["image_id"]].append(
            Region(item["id"], labels[item["category_id"]], bool(item["iscrowd"]), item["segmentation"])
        )
    images = sorted(content["images"], key=lambda image: image["file_name"])
    stems = [Path(image["file_name"]).stem for image in images]
    if len(set(stems)) < len(stems) or len(regions) < len(stems):
        raise ValueError(f"images must have ids and names of their own, got one twice in {path}; {_REMEDY}")
    return {
        image["file_name"]: Scene(image["height"], image["width"], tuple(regions[image["id"]]))
        for image in images
    }


def _check_categories(categories: Any, path: Path) -> None:
    ours = dict(zip(COCO_CATEGORIES, COCO_CLASSES, strict=True))
    theirs = {category["id"]: category["name"] for category in categories}
    if theirs != ours:
        wrong = next(i for i in sorted({*ours, *theirs}) if ours.get(i) != theirs.get(i))
        raise ValueError(
            f"categories must be COCO's 80, got {theirs.get(wrong)!r} for id {wrong} in {path}, "
            f"which is {ours.get(wrong)!r}; {_REMEDY}, or the layout `folder` for own classes"
        )
