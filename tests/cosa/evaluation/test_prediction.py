from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosa.config import Config, override
from cosa.data.dataset import palette
from cosa.evaluation.pictures import heat_map, index_png, overlay
from cosa.evaluation.predict import (
    Prediction,
    find_images,
    named_overlay,
    output_names,
    predict_files,
    write_prediction,
)
from cosa.model import Model
from cosa.networks.network import build_network
from cosa.storage.model_files import Facts

CLASSES = ("cat", "dog", "bird")


@pytest.fixture(scope="module")
def model(tiny_config: Config) -> Model:
    torch.manual_seed(0)
    config = override(tiny_config, {"evaluation.batch_size": 2})
    network = build_network(config.network, len(CLASSES), config.data.crop_size).eval()
    facts = Facts(step=1, xi=0.3, aux_xi=0.4, data_fingerprint="")
    return Model(config, CLASSES, facts, network, torch.device("cpu"))


def image_file(path: Path, size: tuple[int, int] = (12, 8), seed: int = 0) -> Path:
    """A picture of (width, height) in random colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_files_folders_and_patterns_give_each_image_once(tmp_path: Path) -> None:
    a, b, c = (image_file(tmp_path / name) for name in ("x/a.png", "x/b.JPG", "y/deep/c.png"))
    (tmp_path / "x" / "notes.txt").touch()

    found = find_images([str(tmp_path / "x"), str(tmp_path / "**" / "*.png"), str(a)])

    assert found == [a, b, c]


def test_a_file_that_is_named_is_taken_whatever_its_suffix(tmp_path: Path) -> None:
    path = image_file(tmp_path / "a.png").rename(tmp_path / "a.picture")

    assert find_images([str(path)]) == [path]


@pytest.mark.parametrize("source", ["nowhere.png", "*.nothing", "."])
def test_a_source_without_images_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(FileNotFoundError, match=f"got '{source.replace('*', '.')}'"):
        find_images([source])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/d/a.jpg", "/d/b.jpg"], ["a", "b"]),
        (["/d/a.jpg", "/e/a.jpg", "/e/b.jpg"], ["d/a", "e/a", "b"]),
        (["/p/d/a.jpg", "/q/d/a.jpg"], ["p/d/a", "q/d/a"]),
        (["/d/a.jpg", "/d/a.png"], ["a", "a_2"]),
        (["/d/a.jpg", "/d/a_overlay.jpg"], ["a", "a_overlay_2"]),
        (["/a.jpg", "/a.png", "/d/a.png"], ["a", "a_2", "d/a"]),
    ],
)
def test_no_two_images_share_a_name(paths: Sequence[str], names: Sequence[str]) -> None:
    assert output_names([Path(path) for path in paths]) == names


def test_linked_files_are_named_as_they_are_called_and_not_as_what_they_link_to(tmp_path: Path) -> None:
    store = tmp_path / "store/3f2a9c"
    store.parent.mkdir()
    Image.new("RGB", (4, 4)).save(store, "PNG")
    for name in ("cat.png", "dog.png"):
        (tmp_path / name).symlink_to(store)

    found = find_images([str(tmp_path / "*.png"), str(tmp_path / "cat.png")])

    assert output_names(found) == ["cat", "dog"]


def test_predictions_come_in_order_in_each_images_own_size(model: Model, tmp_path: Path) -> None:
    sizes = [(12, 8), (30, 20), (9, 40), (16, 16), (8, 8)]
    paths = [image_file(tmp_path / f"{i}.png", size, seed=i) for i, size in enumerate(sizes)]

    found = list(predict_files(model, paths))

    assert [prediction.path for prediction in found] == paths
    assert [p.classes.shape[::-1] for p in found if p.classes is not None] == sizes
    for prediction in found:
        assert (
            prediction.classes == model.predict(prediction.path)
        ).mean() > 0.99  # batches round differently


def test_an_unreadable_file_comes_back_with_its_reason_and_stops_nothing(
    model: Model, tmp_path: Path
) -> None:
    paths = [image_file(tmp_path / "a.png"), tmp_path / "bad.jpg", image_file(tmp_path / "c.png")]
    paths[1].write_bytes(b"no image")

    found = list(predict_files(model, paths))

    assert [bool(p.error) for p in found] == [False, True, False]
    assert "bad.jpg" in found[1].error
    assert "\n" not in found[1].error
    assert [p.classes is None for p in found] == [False, True, False]


def test_a_batch_of_nothing_but_unreadable_files_is_skipped(model: Model, tmp_path: Path) -> None:
    paths = [tmp_path / "a.jpg", tmp_path / "b.jpg"]

    assert [bool(p.error) for p in predict_files(model, paths)] == [True, True]


def test_labels_hold_for_all_images(model: Model, tmp_path: Path) -> None:
    paths = [image_file(tmp_path / f"{i}.png", seed=i) for i in range(3)]

    for prediction in predict_files(model, paths, labels=["dog"]):
        assert set(np.unique(prediction.classes)) <= {0, 2}


def test_images_are_read_no_further_ahead_than_a_few_batches(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = image_file(tmp_path / "0.png")
    paths = [first, *(Path(os.fspath(first.with_name(f"{i}.png"))) for i in range(1, 100))]
    read: list[Path] = []

    def note(path: Path) -> np.ndarray:
        read.append(path)
        return np.zeros((8, 12, 3), np.uint8)

    monkeypatch.setattr("cosa.evaluation.predict.read_image", note)

    next(predict_files(model, paths))

    assert len(read) <= 6  # of three batches


def test_the_class_map_is_an_index_png_in_the_colours_of_voc(tmp_path: Path) -> None:
    classes = np.array([[0, 1], [15, 20]], np.uint8)

    index_png(classes).save(tmp_path / "map.png")

    with Image.open(tmp_path / "map.png") as stored:
        assert stored.mode == "P"
        np.testing.assert_array_equal(np.array(stored), classes)
        colours = np.array(stored.convert("RGB"))
    assert colours[0].tolist() == [[0, 0, 0], [128, 0, 0]]
    assert colours[1].tolist() == [[192, 128, 128], [0, 64, 128]]


def test_the_overlay_leaves_the_background_and_tints_the_rest() -> None:
    image = np.full((40, 60, 3), 100, np.uint8)
    classes = np.zeros((40, 60), np.uint8)
    classes[:, 30:] = 1

    shown = np.array(named_overlay(image, classes, CLASSES))

    assert shown.shape[0] > 40, "class names stand below"
    assert (shown[:40, :30] == 100).all()
    assert (shown[:40, 30] == 255).all(), "a line where classes meet"
    assert shown[:40, 31:].reshape(-1, 3)[0].tolist() == [114, 50, 50]


def test_what_is_not_counted_is_white_under_an_overlay() -> None:
    image, classes = np.full((1, 5, 3), 100, np.uint8), np.array([[255, 255, 255, 2, 2]], np.uint8)

    shown = overlay(image, classes)[0]

    assert shown[0].tolist() == [178] * 3
    assert shown[4].tolist() == [(100 + int(c)) // 2 for c in palette(3)[2]]


def test_the_overlay_of_background_alone_is_the_image() -> None:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)

    np.testing.assert_array_equal(np.array(named_overlay(image, np.zeros((4, 6), np.uint8), CLASSES)), image)


def test_many_classes_on_a_narrow_image_are_named_on_many_lines() -> None:
    names = [f"class number {i}" for i in range(20)]
    classes = np.arange(21, dtype=np.uint8)[None].repeat(4, axis=0)
    image = np.zeros((4, 21, 3), np.uint8)

    shown = named_overlay(image, classes, names)

    assert shown.height > 4 + 20 * 14


def test_heat_rises_with_activation() -> None:
    activation = np.linspace(0, 1, 5, dtype=np.float32)[None]

    shown = heat_map(np.full((1, 5, 3), 128, np.uint8), activation).astype(int)

    assert (np.diff(shown.sum(-1)[0]) > 0).all()


def test_the_pictures_of_an_image_are_written_beside_each_other(model: Model, tmp_path: Path) -> None:
    path = image_file(tmp_path / "in" / "a.png")
    (prediction,) = predict_files(model, [path])

    written = write_prediction(prediction, tmp_path / "out" / "d" / "a", CLASSES, cams=[1])

    assert [p.name for p in written] == ["a.png", "a_overlay.png", "a_cam_dog.png"]
    assert sorted((tmp_path / "out" / "d").iterdir()) == sorted(written)


def test_a_heat_map_has_a_file_whatever_its_class_is_called(model: Model, tmp_path: Path) -> None:
    names = ("car/truck", "x" * 260, "x" * 261)
    (prediction,) = predict_files(model, [image_file(tmp_path / "in.png")])

    written = write_prediction(prediction, tmp_path / "a", names, cams=[0, 1, 2])

    shown = ["a_cam_car_truck_1.png", f"a_cam_{'x' * 60}_2.png", f"a_cam_{'x' * 60}_3.png"]
    assert written[2:] == [tmp_path / name for name in shown]
    assert all(path.is_file() for path in written)


def test_a_folder_that_cannot_be_written_is_named(model: Model, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    image = np.zeros((4, 6, 3), np.uint8)
    (said,) = model.outputs([image])
    prediction = Prediction(Path("a.png"), image=image, classes=np.zeros((4, 6), np.uint8), output=said)

    with pytest.raises(OSError, match=r"cannot write '.*file/a\.png'"):
        write_prediction(prediction, tmp_path / "file" / "a", CLASSES)
