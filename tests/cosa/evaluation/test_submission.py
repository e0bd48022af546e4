from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosa.evaluation import predict
from cosa.evaluation.predict import Prediction, write_submission


def predictions(count: int = 3) -> Iterator[Prediction]:
    """Class maps of sizes (4, 6), (5, 6), ... with classes in [0, 21)."""
    rng = np.random.default_rng(0)
    for i in range(count):
        classes = rng.integers(0, 21, (4 + i, 6), np.uint8)
        yield Prediction(Path(f"/images/2008_00000{i}.jpg"), classes=classes)


def test_the_archive_holds_a_palette_png_of_each_image_where_the_server_looks(tmp_path: Path) -> None:
    count = write_submission(tmp_path / "out.tar.gz", predictions())

    assert count == 3
    with tarfile.open(tmp_path / "out.tar.gz", "r:gz") as archive:
        names = archive.getnames()
        folder = "results/VOC2012/Segmentation/comp6_test_cls"
        assert names == [f"{folder}/2008_00000{i}.png" for i in range(3)]
        for name, expected in zip(names, predictions(), strict=True):
            content = archive.extractfile(name)
            assert content is not None
            with Image.open(io.BytesIO(content.read())) as picture:
                assert picture.mode == "P"
                np.testing.assert_array_equal(np.array(picture), expected.classes)


def test_the_same_predictions_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "b.tar.gz"):
        write_submission(tmp_path / name, predictions())

    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()


def test_an_unreadable_image_leaves_no_archive(tmp_path: Path) -> None:
    broken = [*predictions(), Prediction(Path("bad.jpg"), error="image must be readable, got bad.jpg")]

    with pytest.raises(ValueError, match=r"got bad\.jpg"):
        write_submission(tmp_path / "out.tar.gz", broken)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_read_back_is_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "index_png", Image.fromarray)

    with pytest.raises(AssertionError, match="what was written is what is read"):
        write_submission(tmp_path / "out.tar.gz", predictions())
    assert list(tmp_path.iterdir()) == []
