"""Class maps, overlays and heat maps of image files, streamed: memory holds a few batches, not the files.

For each image NAME.png holds the class of each pixel (index PNG in the colours of VOC), NAME_overlay.png
shows it on the image, NAME_cam_CLASS.png shows where a class is activated. `write_submission` packs the class
maps of a whole split instead, as the VOC server takes them.
"""

from __future__ import annotations

import glob
import gzip
import io
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from cosa.data.dataset import read_image
from cosa.data.files import read_ahead
from cosa.evaluation.crf import refined_maps, require_crf
from cosa.evaluation.pictures import heat_map, index_png, legend, overlay
from cosa.model import ImageOutput, Model
from cosa.networks.multiscale import view_count
from cosa.storage.files import write_atomically

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Files of a folder that are taken for images."""

SUBMISSION_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
"""Where the PASCAL VOC server looks for NAME.png of its test set (comp6: any training data)."""

_LONGEST = 60  # characters of a class's name in a file's


@dataclass(frozen=True, eq=False)
class Prediction:
    """One image file and what the model says of it, or why it could not be read."""

    path: Path
    """The image file."""
    error: str = ""
    """Empty where the file could be read; the rest is there then."""
    image: UInt8[np.ndarray, "h w 3"] | None = None
    """RGB."""
    classes: UInt8[np.ndarray, "h w"] | None = None
    """Class of each pixel in [0, k)."""
    output: ImageOutput | None = None
    """All else that the network says."""


def find_images(sources: Sequence[str]) -> list[Path]:
    """The files that are named one by one, by folder (not its subfolders) or by a pattern; each once.

    Raises:
        FileNotFoundError: A source names no file, or its folder or pattern no image.
    """
    found: dict[Path, Path] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            paths = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
        elif path.exists():
            paths = [path]
        else:
            names = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
            matches = map(Path, sorted(names))
            paths = [p for p in matches if p.is_file() and p.suffix.lower() in SUFFIXES]
        if not paths:
            raise FileNotFoundError(
                f"images must be files, folders or patterns that match some, got {source!r}; "
                f"taken for images are {', '.join(sorted(SUFFIXES))}"
            )
        found.update({_place(p): p for p in paths})
    return list(found.values())


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name for each file, its own where no other has it, else with as many folders as tell them apart."""
    parts = [_place(path).with_suffix("").parts[1:] for path in paths]
    ends = [[own[-depth:] for depth in range(1, len(own) + 1)] for own in parts]
    shared = Counter(end for own in {of[-1]: of for of in ends}.values() for end in own)
    taken: set[str] = set()
    names = []
    for own in ends:
        name = "/".join(next((end for end in own if shared[end] == 1), own[-1]))
        # a number tells `a.jpg` from `a.png`, or an image `a_overlay` from `a`'s overlay
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        free = next(n for n in itertools.chain([name], numbered) if not {n, f"{n}_overlay"} & taken)
        taken |= {free, f"{free}_overlay"}
        names.append(free)
    return names


def _place(path: Path) -> Path:
    """Where a file was said to be, links not followed: data versioning and hub caches link to hashes."""
    return Path(os.path.abspath(path))  # noqa: PTH100 (resolve follows links, absolute keeps `..`)


def predict_files(
    model: Model,
    paths: Sequence[Path],
    *,
    labels: Sequence[str] | None = None,
    crf: bool = False,
) -> Iterator[Prediction]:
    """What the model says of each file, in order; files are read ahead while the network computes.

    Args:
        model: Its `evaluation.batch_size` images share a forward pass.
        paths: Image files; one that cannot be read comes back with its error.
        labels: Classes that all the images hold, where they are known.
        crf: Refine the class maps, `data.loader_workers` at a time.

    Raises:
        ValueError: A label is no class of the model, or pydensecrf is missing.
    """
    if crf:
        require_crf()
    known = None if labels is None else model.label_vector(labels)
    size = model.config.evaluation.batch_size
    batches = (paths[i : i + size] for i in range(0, len(paths), size))
    for batch in read_ahead(_read, batches, model.config.data.loader_workers):
        yield from _predict(model, batch, known, crf)


def _read(paths: Iterable[Path]) -> list[Prediction]:
    found = []
    for path in paths:
        try:
            found.append(Prediction(path, image=read_image(path)))
        except (OSError, ValueError) as error:
            found.append(Prediction(path, error=" ".join(str(error).split())))
    return found


def _predict(
    model: Model, batch: Sequence[Prediction], labels: Float[Tensor, "1 c"] | None, crf: bool
) -> Iterator[Prediction]:
    images = [item.image for item in batch if item.image is not None]
    outputs = model.outputs(images) if images else []
    if crf:
        settings = model.config.evaluation
        views = view_count(settings.scales, flip=settings.flip)
        probs = [output.seg_probs(labels, views=views) for output in outputs]
        maps = refined_maps(images, probs, workers=model.config.data.loader_workers)
    else:
        maps = [output.classes(labels) for output in outputs]
    said = zip(maps, outputs, strict=True)
    for item in batch:
        classes, output = (None, None) if item.image is None else next(said)
        yield replace(item, classes=classes, output=output)


def write_prediction(
    prediction: Prediction, stem: Path, classes: Sequence[str], *, cams: Sequence[int] = ()
) -> list[Path]:
    """Write the class map, the overlay and a heat map for each class in `cams`.

    Args:
        prediction: Of a file that could be read.
        stem: Folder and name of what is written, without a suffix.
        classes: Names of the foreground classes.
        cams: Indices in [0, c).

    Returns:
        The files written.

    Raises:
        OSError: A file cannot be written.
    """
    assert prediction.image is not None
    assert prediction.classes is not None
    assert prediction.output is not None
    pictures = {
        "": index_png(prediction.classes),
        "_overlay": named_overlay(prediction.image, prediction.classes, classes),
    }
    for index in cams:
        heat = heat_map(prediction.image, prediction.output.activation(index))
        pictures[f"_cam_{_file_name(classes, index)}"] = Image.fromarray(heat)
    paths = [stem.with_name(f"{stem.name}{suffix}.png") for suffix in pictures]
    for path, picture in zip(paths, pictures.values(), strict=True):
        write_atomically(path, partial(picture.save, format="PNG"), sync=False)
    return paths


def _file_name(classes: Sequence[str], index: int) -> str:
    """A class's name as a part of a file's; its number tells apart those that have to be changed for it."""
    name = re.sub(r"[^\w .()-]", "_", classes[index])[:_LONGEST]
    return name if name == classes[index] else f"{name}_{index + 1}"


def named_overlay(
    image: UInt8[np.ndarray, "h w 3"], classes: UInt8[np.ndarray, "h w"], names: Sequence[str]
) -> Image.Image:
    """The image under its foreground classes' colours, over lines that name them."""
    shown = overlay(image, classes)
    present = [int(c) for c in np.unique(classes) if c]
    if present:
        width = shown.shape[1]
        shown = np.concatenate([shown, legend(present, names, width, size=max(14, width // 32))])
    return Image.fromarray(shown)


def write_submission(path: Path, predictions: Iterable[Prediction]) -> int:
    """Write the archive that the VOC server takes: a palette PNG of each image's class map, in its own size.

    The same predictions give the same bytes. The archive is read back, and is there whole or not at all.

    Args:
        path: A .tar.gz file.
        predictions: In the order of the test list; images are streamed.

    Returns:
        The number of images.

    Raises:
        ValueError: An image could not be read: a submission needs all of them.
        OSError: The archive cannot be written.
    """
    sizes: dict[str, tuple[int, ...]] = {}

    def write(draft: Path) -> None:
        with (
            draft.open("wb") as file,
            gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for prediction in predictions:
                if prediction.classes is None:
                    raise ValueError(prediction.error)
                content = io.BytesIO()
                index_png(prediction.classes).save(content, format="PNG")
                entry = tarfile.TarInfo(f"{SUBMISSION_FOLDER}/{prediction.path.stem}.png")
                entry.size, entry.mode = content.tell(), 0o644
                content.seek(0)
                archive.addfile(entry, content)
                sizes[entry.name] = prediction.classes.shape[::-1]
        assert _read_back(draft) == sizes, "what was written is what is read"

    write_atomically(path, write)
    return len(sizes)


def _read_back(path: Path) -> dict[str, tuple[int, ...] | None]:
    """Width and height of each palette PNG of an archive, None for any other file."""
    found: dict[str, tuple[int, ...] | None] = {}
    with tarfile.open(path, "r:gz") as archive:
        for entry in archive:
            content = archive.extractfile(entry)
            assert content is not None, "only files are written"
            with Image.open(content) as picture:
                picture.load()
                found[entry.name] = picture.size if picture.mode == "P" else None
    return found
