"""The MS-COCO 2014 layout: train2014/, val2014/ and annotations/instances_*.json under one root.

A split is called as its folder is. Its classes are COCO's 80 in the order of their category ids: ids run from
1 to 90 with gaps, classes from 1 to 80 without. Image-level labels are the classes of all annotations of an
image, crowds among them; an image without annotations is left out, as in the lists that the authors use, or
stays with no label and a mask of background (`data.keep_empty`).

The annotation file, 450 MB for train2014, is parsed once: names and labels go into the cache, under the
file's digest, so that another file never meets them. Masks go there, too, but only where they are needed:
training on labels draws none.
"""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError

from cosa.config import nearest
from cosa.data.coco_masks import Region, Scene, draw_masks
from cosa.data.dataset import Needs, SegmentationDataset, assemble
from cosa.data.files import OnProblem, found, once, refuse, require_root
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
    root: Path,
    split: str,
    cache: Path,
    *,
    needs: Needs,
    draw: bool,
    keep_empty: bool,
    on_problem: OnProblem = refuse,
) -> SegmentationDataset:
    """The images of a split in the order of their file names, with their labels.

    Args and errors are those of `open_dataset`. A split is called as its folder. Names, labels and masks are
    kept in `cache`; with `draw`, or where masks are needed, those that it lacks are drawn. Where images alone
    are needed, nothing is known of their objects and all stay, as with `keep_empty`.
    """
    remedy = "set --data.root to the folder that holds annotations, train2014 and val2014"
    require_root(root, "COCO", (), remedy)
    folders = [path.name for path in sorted(root.iterdir()) if path.is_dir() and path.name != "annotations"]
    if split not in folders:
        raise FileNotFoundError(
            f"split must be a folder of images in {root}, got {split!r}; there are: "
            f"{', '.join(folders) or 'none'}{nearest(split, folders)}"
        )
    images = {p.name: p for p in (root / split).iterdir() if p.suffix.lower() in _SUFFIXES}
    if needs == "images":
        return assemble(
            COCO_CLASSES, tuple(sorted(images)), images, {}, lambda _: [], on_problem
        ).named_by_stem()
    path = root / "annotations" / f"instances_{split}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"annotations of {split!r} must be in {path}, which does not exist; there are those of: "
            f"{', '.join(coco_splits(root)) or 'no split'}"
        )
    version = digest(path)[:16]
    store = cache / f"coco-{split}-{version}-{_FORMAT}"
    parsed = functools.cache(functools.partial(read_annotations, path))

    def write_index() -> None:
        labels = {name: {region.label - 1 for region in scene.regions} for name, scene in parsed().items()}
        write_atomically(store / "index.json", json.dumps({name: sorted(labels[name]) for name in labels}))

    once((store / "index.json").is_file, write_index, store)
    whole: dict[str, list[int]] = json.loads((store / "index.json").read_bytes())
    index = {name: labels for name, labels in whole.items() if labels or keep_empty}
    if whole and not index:
        raise ValueError(
            f"split must hold an image with an object, got none in {path}; set data.keep_empty to keep all"
        )
    law = f"annotations of {split} must name images of {root / split}"
    remedy = "add the files, or take the annotation file that belongs to them"
    files = found(index, images, law, remedy, on_problem)
    masks: Mapping[str, Path] = {}
    if draw or needs == "masks":
        named = {name: images[name] for name in files}
        marker = "complete" if keep_empty else "complete_labelled"
        masks = draw_masks(store, named, len(index), parsed, on_problem, marker=marker)
        files = tuple(name for name in files if name in masks)
    dataset = assemble(COCO_CLASSES, files, images, masks, index.__getitem__, on_problem)
    return replace(dataset.named_by_stem(), mask_source=version)


def coco_splits(root: Path) -> list[str]:
    """Splits whose annotations lie under `root`."""
    return sorted(p.stem.removeprefix("instances_") for p in (root / "annotations").glob("instances_*.json"))


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
        _Content.model_validate(content, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        wrong = f"{place} {first['input']!r:.60}, which is wrong: {first['msg']}"
        raise ValueError(
            f"annotations must be COCO's images, annotations and categories, got {path} "
            f"{f'without {place!r}' if first['type'] == 'missing' else f'with {wrong}'}; {_REMEDY}"
        ) from None
    return _scenes(content, path)


_REMEDY = "take COCO's instances_*.json"


class _Category(BaseModel):
    id: int
    name: str


class _Image(BaseModel):
    id: int
    file_name: str
    height: Annotated[int, Field(gt=0)]
    width: Annotated[int, Field(gt=0)]


class _Annotation(BaseModel):
    id: int
    image_id: int
    category_id: int
    iscrowd: Literal[0, 1]
    segmentation: Any  # looked at where it is drawn


class _Content(BaseModel):
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def _shrink(item: dict[str, Any]) -> dict[str, Any]:
    """What is needed of one JSON object, polygons in 8 bytes a number instead of 32."""
    kept = {key: value for key, value in item.items() if key in _KEPT}
    if isinstance(kept.get("segmentation"), list):
        kept["segmentation"] = [array("d", polygon) for polygon in kept["segmentation"]]
    return kept


def _scenes(content: Any, path: Path) -> dict[str, Scene]:
    ours = dict(zip(COCO_CATEGORIES, COCO_CLASSES, strict=True))
    theirs = {category["id"]: category["name"] for category in content["categories"]}
    if theirs != ours:
        wrong = next(i for i in sorted({*ours, *theirs}) if ours.get(i) != theirs.get(i))
        raise ValueError(
            f"categories must be COCO's 80, got {theirs.get(wrong)!r} for id {wrong} in {path}, "
            f"which is {ours.get(wrong)!r}; {_REMEDY}, or the layout `folder` for own classes"
        )
    labels = {category: position + 1 for position, category in enumerate(COCO_CATEGORIES)}
    regions: dict[int, list[Region]] = {image["id"]: [] for image in content["images"]}
    laws: dict[str, tuple[Container[int], str]] = {
        "image_id": (regions, "belong to an image of its file"),
        "category_id": (labels, "have one of COCO's categories"),
    }
    for item in content["annotations"]:
        for key, (known, law) in laws.items():
            if item[key] not in known:
                raise ValueError(
                    f"annotation must {law}, got {key} {item[key]!r} in annotation {item['id']!r} of {path}; "
                    f"{_REMEDY}"
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
