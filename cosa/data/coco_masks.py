"""COCO's polygons and run lengths drawn as masks, once, into the cache.

Smaller objects are painted over larger ones, by their pixels in the image, ties by annotation id: a cup on a
table stays a cup. A crowd region is one rough outline around many objects and what shows between them, so no
pixel of it is surely its class: it is IGNORE, except where a single object covers it. Its class still counts
among the image's labels. (COCO's own metrics leave crowds uncounted, too.)

A mask is written whole or not at all, and the file `complete` follows the last one: drawing that was ended
half-way goes on with the masks that are missing. One process draws for a cache, others wait for it.
"""

from __future__ import annotations

import logging
import math
from array import array
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from cosa.data.dataset import decoding
from cosa.data.files import OnProblem, in_processes, once
from cosa.storage.files import write_atomically
from cosa.structures import IGNORE

_log = logging.getLogger(__name__)

_REPLACE = "replace the annotations"


class Region(NamedTuple):
    """One annotation: where one object is, or a crowd of them.

    Its label is in [1, 80]; its segmentation is polygons x, y, x, y, ... in pixels, or run lengths in COCO's
    format, columns first.
    """

    id: int
    label: int
    crowd: bool
    segmentation: list[array[float]] | dict[str, Any]


class Scene(NamedTuple):
    """What is annotated in one image of so many rows and columns, in the file's order."""

    height: int
    width: int
    regions: tuple[Region, ...]


def draw_masks(
    store: Path,
    images: Mapping[str, Path],
    total: int,
    parsed: Callable[[], Mapping[str, Scene]],
    on_problem: OnProblem,
    *,
    marker: str,
) -> dict[str, Path]:
    """Paths of the masks of `images`, by file name, all drawn; without those that could not be drawn.

    Args:
        store: Folder of the cache for one annotation file.
        images: Image files by file name.
        total: Images that are to have masks: with fewer in `images`, nothing is complete.
        parsed: Reads the annotations; called only where something is to be drawn.
        on_problem: Is told of images in another size than annotated, and of regions that cannot be drawn.
        marker: File of `store` that says that those are drawn; `complete` says that all of them are.

    Raises:
        OSError: The cache cannot be written.
    """
    masks = {name: store / "masks" / f"{Path(name).stem}.png" for name in images}

    def draw_missing() -> None:
        (store / "masks").mkdir(exist_ok=True)
        there = {path.name for path in (store / "masks").iterdir()}
        missing = [name for name in images if masks[name].name not in there]
        if missing:
            _log.info("drawing the masks of %d images, once, into %s", len(missing), store)
            scenes = parsed()
            jobs = [(scenes[name], images[name], masks[name]) for name in missing]
            for name, problem in zip(missing, in_processes(_draw, jobs), strict=True):
                if problem:
                    on_problem(ValueError(problem))
                    del masks[name]
        if len(masks) == total:
            write_atomically(store / marker, "")

    once(lambda: any((store / name).is_file() for name in {marker, "complete"}), draw_missing, store)
    return masks


def _draw(job: tuple[Scene, Path, Path]) -> str:
    """Draw a scene; returns what is wrong with it or its image, empty where it was drawn."""
    scene, image, target = job
    try:
        with decoding("image", image), Image.open(image) as opened:
            width, height = opened.size
        if (scene.width, scene.height) != (width, height):
            raise ValueError(
                f"image must have the size its annotations say, {scene.width}x{scene.height} pixels, "
                f"got {width}x{height} in {image}; replace one of the two"
            )
        content = BytesIO()
        Image.fromarray(paint(scene)).save(content, "PNG")
    except ValueError as error:
        return str(error)
    write_atomically(target, content.getvalue(), sync=False)
    return ""


def paint(scene: Scene) -> UInt8[np.ndarray, "h w"]:
    """The mask of a scene: crowds first, as IGNORE, then objects from the largest to the smallest.

    Raises:
        ValueError: A region that is no polygon and no run lengths which fill the image.
    """
    drawn = [(region, _rasterise(region, scene)) for region in scene.regions]
    drawn.sort(key=lambda pair: (not pair[0].crowd, -int(pair[1].sum()), pair[0].id))
    mask = np.zeros((scene.height, scene.width), np.uint8)
    for region, inside in drawn:
        mask[inside] = IGNORE if region.crowd else region.label
    return mask


def _rasterise(region: Region, scene: Scene) -> Bool[np.ndarray, "h w"]:
    from pycocotools import mask as run_lengths  # training on labels does without

    shape, found = (scene.height, scene.width), region.segmentation
    if isinstance(found, list):
        for polygon in found:
            if len(polygon) % 2 or not np.isfinite(polygon).all():
                raise ValueError(
                    f"polygon must be finite numbers x, y, x, y, ..., got {len(polygon)} numbers from "
                    f"{list(polygon[:4])} in annotation {region.id}; {_REPLACE}"
                )
        # Two points have no area, and pycocotools takes four numbers for a box.
        polygons = [list(polygon) for polygon in found if len(polygon) >= 6]
        if not polygons:
            return np.zeros(shape, bool)
        runs = run_lengths.merge(run_lengths.frPyObjects(polygons, *shape))
    else:
        counts = _require_runs(found, region.id, scene)
        runs = run_lengths.frPyObjects({"size": list(shape), "counts": counts}, *shape)
    inside: Bool[np.ndarray, "h w"] = run_lengths.decode(runs).astype(bool)
    return inside


def _require_runs(found: Any, annotation: int, scene: Scene) -> list[int]:
    """The run lengths of a segmentation, which fill their image: pycocotools reads on beyond their end.

    Raises:
        ValueError: They do not, or it is no segmentation at all.
    """
    if not isinstance(found, dict):
        raise ValueError(
            f"segmentation must be polygons or run lengths, got {type(found).__name__} in annotation "
            f"{annotation}; {_REPLACE}"
        )
    size, counts = found.get("size"), _decompressed(found.get("counts"))
    if size != [scene.height, scene.width] or not all(type(side) is int for side in size):
        raise ValueError(
            f"run lengths must have the size of their image, {scene.width}x{scene.height} pixels, got "
            f"size {size} (rows, columns) in annotation {annotation}; {_REPLACE}"
        )
    total = sum(counts) if all(type(count) is int and count >= 0 for count in counts) else math.nan
    if total != scene.height * scene.width:
        raise ValueError(
            f"run lengths must be whole numbers >= 0 that fill {scene.width}x{scene.height} pixels, got "
            f"{found.get('counts')!s:.40} with a sum of {total} in annotation {annotation}; {_REPLACE}"
        )
    return counts


def _decompressed(stored: Any) -> list[Any]:
    """Run lengths as they are listed or in COCO's compressed text; [NaN] of what is neither.

    Six bits a character from `0` on: five of a number, the lowest first, in two's complement, and one that
    says whether more follow; from the fourth on each number is the difference to the one before the last.
    """
    if not isinstance(stored, str):
        return stored if isinstance(stored, list) else [math.nan]
    counts: list[int] = []
    value, shift = 0, 0
    for character in stored:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return [math.nan]
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16 and 1) << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return [math.nan] if shift else counts
