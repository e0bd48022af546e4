"""The embedded data set: what it promises to hold, and that it is written whole or not at all.

Its numbers are tuned elsewhere; nothing here depends on how large, how faint or how frequent something is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cosa.config import DataConfig
from cosa.data import open_dataset, shapes
from cosa.data.shapes import CLASSES, COEXISTENCE, SIZE, draw, write_shapes

DRAWS = 120
CONTEXTS = (("rails", "train"), ("water", "boat"))


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture(scope="module")
def pictures() -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    return [draw(np.random.default_rng(seed)) for seed in range(DRAWS)]


def without(context: str, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The picture of a seed as it would be with a context painted on something else, all the rest equal."""
    really = shapes._CONTEXTS[context]

    def elsewhere(image: NDArray[np.float64], *rest: Any) -> None:
        really(image.copy(), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes._CONTEXTS, context, elsewhere)
        return draw(np.random.default_rng(seed))


# What is drawn


def test_an_image_and_its_ground_truth_have_the_same_size(pictures: Any) -> None:
    assert {(image.shape, mask.shape) for image, mask in pictures} == {((SIZE, SIZE, 3), (SIZE, SIZE))}


def test_every_image_holds_objects_and_background_and_some_hold_several(pictures: Any) -> None:
    held = [set(np.unique(mask)) for _, mask in pictures]

    assert all(0 in classes and len(classes) > 1 for classes in held)
    assert any(len(classes) > 2 for classes in held)


def test_every_class_occurs_and_nothing_else_does(pictures: Any) -> None:
    found = set(np.concatenate([np.unique(mask) for _, mask in pictures]).tolist())

    assert found == set(range(len(CLASSES) + 1))


def test_the_same_generator_draws_the_same_and_others_do_not() -> None:
    first, again, other = (draw(np.random.default_rng(seed)) for seed in (4, 4, 5))

    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_an_object_is_where_its_ground_truth_is(pictures: Any) -> None:
    """Erasing the labels' pixels erases what tells classes apart: the vivid colours are all inside."""
    for image, mask in pictures:
        channels = image.astype(int)
        vivid = channels.max(2) - channels.min(2) > 120
        outside = vivid & (mask == 0)
        assert outside.sum() <= 0.02 * max(1, vivid.sum())


def test_the_classes_with_a_context_are_named() -> None:
    assert {name for _, name in CONTEXTS} == set(COEXISTENCE) <= set(CLASSES)
    assert shapes._CONTEXTS.keys() == {context for context, _ in CONTEXTS}


@pytest.mark.parametrize(("context", "name"), CONTEXTS)
def test_a_context_is_nearly_always_under_its_class_rarely_elsewhere_and_never_labelled(
    pictures: Any, context: str, name: str
) -> None:
    across: dict[bool, list[bool]] = {True: [], False: []}
    below = []
    for seed, (image, mask) in enumerate(pictures):
        bare_image, bare_mask = without(context, seed)
        seen = (image != bare_image).any(2)
        assert np.array_equal(mask, bare_mask)
        assert not mask[seen].any()  # where it is seen, the ground truth says background
        own = mask == CLASSES.index(name) + 1
        across[bool(own.any())].append(seen.any(0).sum() > SIZE / 2)
        if own.any() and seen.any():
            below.append(np.nonzero(seen)[0].mean() > np.nonzero(own)[0].mean())

    assert np.mean(across[True]) > 0.7
    assert np.mean(across[False]) < 0.35
    assert np.mean(below) > 0.8


# What is written


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("written") / "deep/shapes"
    write_shapes(root, train_images=5, val_images=3, seed=7)
    return root


def test_it_is_written_in_the_voc_layout(root: Path) -> None:
    names = [f"train_aug_{i:05}" for i in range(5)] + [f"val_{i:05}" for i in range(3)]

    assert set(content(root)) == {
        "classes.txt",
        "ImageSets/Segmentation/train_aug.txt",
        "ImageSets/Segmentation/val.txt",
        *(f"JPEGImages/{name}.png" for name in names),
        *(f"SegmentationClassAug/{name}.png" for name in names),
    }


@pytest.mark.parametrize(("split", "count"), [("train_aug", 5), ("val", 3)])
def test_labels_are_the_classes_of_the_masks(root: Path, split: str, count: int) -> None:
    dataset = open_dataset(DataConfig(layout="shapes", root=str(root)), split)

    assert dataset.classes == CLASSES
    assert len(dataset) == count
    for i, name in enumerate(dataset.names):
        mask = read(root / f"SegmentationClassAug/{name}.png")
        held = [CLASSES[value - 1] for value in np.unique(mask) if value]
        assert [c for c, label in zip(CLASSES, dataset.labels[i], strict=True) if label] == held
        assert np.array_equal(dataset.mask(i), mask)


def test_the_same_seed_writes_the_same_bytes(root: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "again", train_images=5, val_images=3, seed=7)

    assert content(tmp_path / "again") == content(root)


def test_another_seed_draws_other_images(root: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "other", train_images=5, val_images=3, seed=8)

    first, other = content(root), content(tmp_path / "other")
    assert not any(first[name] == other[name] for name in first if name.startswith("JPEGImages"))


def test_a_larger_set_begins_with_the_smaller_one(root: Path, tmp_path: Path) -> None:
    write_shapes(tmp_path / "larger", train_images=7, val_images=4, seed=7)

    larger = content(tmp_path / "larger")
    assert all(larger[name] == value for name, value in content(root).items() if name.endswith(".png"))


def test_no_image_is_in_both_splits(root: Path) -> None:
    pictures = [path.read_bytes() for path in (root / "JPEGImages").iterdir()]

    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interruption_midway_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    seeds = iter(range(9))

    def draws(rng: np.random.Generator) -> Any:
        if next(seeds) == 4:
            raise interruption
        return draw(rng)

    with monkeypatch.context() as midway:
        midway.setattr(shapes, "draw", draws)
        with pytest.raises(interruption):
            write_shapes(tmp_path / "shapes", train_images=3, val_images=3)
    assert [*tmp_path.iterdir()] == []

    write_shapes(tmp_path / "shapes", train_images=1, val_images=1)
    assert (tmp_path / "shapes/classes.txt").is_file()


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")

    law = r"data.root must not exist yet to write shapes there, got '.+'"
    with pytest.raises(FileExistsError, match=law):
        write_shapes(tmp_path, train_images=1, val_images=1)

    assert content(tmp_path) == {"mine.txt": b"mine"}


def test_two_workers_that_both_find_nothing_both_read_the_first_one_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "shapes"
    seeds = iter(range(9))

    def small(where: Path, **more: Any) -> None:
        write_shapes(where, train_images=2, val_images=1)

    def draws(rng: np.random.Generator) -> Any:
        if next(seeds) == 1:  # the other one finishes while this one still draws
            with monkeypatch.context() as other:
                other.setattr(shapes, "draw", draw)
                small(root)
        return draw(rng)

    monkeypatch.setattr(shapes, "draw", draws)
    monkeypatch.setattr("cosa.data.open.write_shapes", small)

    dataset = open_dataset(DataConfig(layout="shapes", root=str(root)), "train_aug")

    assert len(dataset) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
