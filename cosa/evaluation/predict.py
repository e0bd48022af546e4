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
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from cosa.data.dataset import read_image
from cosa.evaluation.crf import refined_maps, require_crf
from cosa.evaluation.pictures import heat_map, index_png, legend, overlay
from cosa.model import ImageOutput, Model
from cosa.storage.files import write_atomically, write_error

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Files of a folder that are taken for images."""

SUBMISSION_FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
"""Where the PASCAL VOC server looks for NAME.png of its test set (comp6: any training data)."""

_BATCHES_AHEAD = 2


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
        found.update({p.resolve(): p for p in paths})
    return list(found.values())


def output_names(paths: Sequence[Path]) -> list[str]:
    """A name for each file, its own where no other has it, else with as many folders as tell them apart."""
    parts = [path.resolve().with_suffix("").parts[1:] for path in paths]
    depths = [1] * len(paths)
    while True:
        names = ["/".join(p[-depth:]) for p, depth in zip(parts, depths, strict=True)]
        again = Counter(name for name, _ in set(zip(names, parts, strict=True)))
        longer = [
            min(depth + 1, len(p)) if again[name] > 1 else depth
            for name, p, depth in zip(names, parts, depths, strict=True)
        ]
        if longer == depths:
            return _numbered(names)
        depths = longer


def _numbered(names: Sequence[str]) -> list[str]:
    """Distinct names: a number tells `a.jpg` from `a.png`, or an image `a_overlay` from `a`'s overlay."""
    taken: set[str] = set()
    distinct = []
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        free = next(n for n in itertools.chain([name], numbered) if not {n, f"{n}_overlay"} & taken)
        taken |= {free, f"{free}_overlay"}
        distinct.append(free)
    return distinct


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
    groups = [paths[i : i + size] for i in range(0, len(paths), size)]
    with ThreadPoolExecutor(max(1, model.config.data.loader_workers)) as pool:
        ahead: list[Future[list[Prediction]]] = []
        for group in groups:
            ahead.append(pool.submit(_read, group))
            if len(ahead) > _BATCHES_AHEAD:
                yield from _predict(model, ahead.pop(0).result(), known, crf)
        for future in ahead:
            yield from _predict(model, future.result(), known, crf)


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
        probs = [output.seg_probs(labels) for output in outputs]
        maps = refined_maps(images, probs, workers=model.config.data.loader_workers)
    else:
        maps = [output.classes(labels) for output in outputs]
    said = zip(maps, outputs, strict=True)
    for item in batch:
        if item.image is None:
            yield item
        else:
            classes, output = next(said)
            yield Prediction(item.path, image=item.image, classes=classes, output=output)


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
        f"{stem.name}.png": index_png(prediction.classes),
        f"{stem.name}_overlay.png": named_overlay(prediction.image, prediction.classes, classes),
    }
    for index in cams:
        heat = heat_map(prediction.image, prediction.output.activation(index))
        pictures[f"{stem.name}_cam_{classes[index]}.png"] = Image.fromarray(heat)
    return [_write(stem.parent / name, picture) for name, picture in pictures.items()]


def _write(path: Path, picture: Image.Image) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, format="PNG")
    except OSError as error:
        raise write_error(path, error) from error
    return path


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

    All of them are read back.

    The same predictions give the same bytes. The archive is there whole or not at all.

    Args:
        path: A .tar.gz file.
        predictions: In the order of the test list; images are streamed.

    Returns:
        The number of images.

    Raises:
        ValueError: An image could not be read: a submission needs all of them.
        OSError: The archive cannot be written.
    """
    sizes: dict[str, tuple[int, int]] = {}

    def write(draft: Path) -> None:
        with (
            draft.open("wb") as file,
            gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for name, classes in _class_maps(predictions):
                content = io.BytesIO()
                index_png(classes).save(content, format="PNG")
                entry = tarfile.TarInfo(f"{SUBMISSION_FOLDER}/{name}.png")
                entry.size, entry.mode = content.tell(), 0o644
                content.seek(0)
                archive.addfile(entry, content)
                sizes[entry.name] = (classes.shape[1], classes.shape[0])
        _read_back(draft, sizes)

    write_atomically(path, write)
    return len(sizes)


def _class_maps(predictions: Iterable[Prediction]) -> Iterator[tuple[str, UInt8[np.ndarray, "h w"]]]:
    for prediction in predictions:
        if prediction.classes is None:
            raise ValueError(prediction.error)
        yield prediction.path.stem, prediction.classes


def _read_back(path: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Every image is in the archive, once, as a palette PNG of its size."""
    found = {}
    with tarfile.open(path, "r:gz") as archive:
        for entry in archive:
            content = archive.extractfile(entry)
            assert content is not None, "only files are written"
            with Image.open(content) as picture:
                picture.load()
                found[entry.name] = picture.size if picture.mode == "P" else None
    assert found == sizes, "what was written is what is read"
