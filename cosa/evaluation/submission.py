"""The archive that the PASCAL VOC server takes for its test set (comp6: any training data)."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cosa.evaluation.pictures import index_png
from cosa.evaluation.predict import Prediction
from cosa.storage.files import write_atomically

FOLDER = "results/VOC2012/Segmentation/comp6_test_cls"
"""Where the server looks for NAME.png."""


def write_submission(path: Path, predictions: Iterable[Prediction]) -> int:
    """Write a palette PNG of each image's class map, in the image's own size; then read all of them back.

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
                entry = tarfile.TarInfo(f"{FOLDER}/{name}.png")
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
