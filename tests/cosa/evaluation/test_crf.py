from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from cosa.evaluation import crf
from cosa.evaluation.crf import refine, refined_maps, require_crf

installed = pytest.mark.skipif(
    importlib.util.find_spec("pydensecrf") is None,
    reason='needs the optional extra: pip install "cosa-wsss[crf]"',
)


def two_halves(height: int = 24, width: int = 32) -> np.ndarray:
    """A picture that is dark on the left and bright on the right."""
    image = np.full((height, width, 3), 30, np.uint8)
    image[:, width // 2 :] = 220
    return image


def blurred_halves(height: int = 24, width: int = 32, classes: int = 2) -> np.ndarray:
    """Class 1 on the right, its border two pixels too far left and only half sure there."""
    probs = np.zeros((classes, height, width), np.float32)
    probs[1, :, width // 2 :] = 0.9
    probs[1, :, width // 2 - 2 : width // 2] = 0.55
    probs[0] = 1 - probs[1]
    return probs


@installed
def test_a_border_moves_to_the_edge_in_the_image() -> None:
    refined = refine(two_halves(), blurred_halves())

    expected = np.zeros((24, 32), np.int64)
    expected[:, 16:] = 1
    np.testing.assert_array_equal(refined.argmax(0), expected)


@installed
def test_probabilities_stay_probabilities() -> None:
    refined = refine(two_halves(), blurred_halves(classes=3))

    assert (refined >= 0).all()
    np.testing.assert_allclose(refined.sum(0), 1, atol=1e-5)


@installed
def test_a_class_the_image_lacks_stays_at_zero() -> None:
    refined = refine(two_halves(), blurred_halves(classes=3))

    assert (refined[2] == 0).all()


@installed
def test_classes_the_image_lacks_change_nothing_for_the_others() -> None:
    alone, among_others = (
        refine(two_halves(), blurred_halves()),
        refine(two_halves(), blurred_halves(classes=21)),
    )

    np.testing.assert_array_equal(among_others[:2], alone)


@installed
def test_a_single_class_wins_everywhere() -> None:
    probs = np.zeros((3, 5, 7), np.float32)
    probs[1] = 1

    assert (refine(np.zeros((5, 7, 3), np.uint8), probs).argmax(0) == 1).all()


@installed
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_refine_images_of_many_sizes_in_order(workers: int) -> None:
    sizes = [(24, 32), (10, 40), (30, 12)]
    images = [two_halves(*size) for size in sizes]
    probs = [blurred_halves(*size) for size in sizes]

    found = refined_maps(images, probs, workers=workers)

    for index_map, image, maps in zip(found, images, probs, strict=True):
        np.testing.assert_array_equal(index_map, refine(image, maps).argmax(0))


def test_the_likeliest_class_of_each_image_is_taken_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crf, "refine", lambda _, probs: probs)
    probs = [blurred_halves(*size) for size in ((24, 32), (10, 40))]

    found = refined_maps([two_halves(24, 32), two_halves(10, 40)], probs, workers=0)

    assert [(index_map.dtype, index_map.tolist()) for index_map in found] == [
        (np.uint8, maps.argmax(0).tolist()) for maps in probs
    ]


def test_the_missing_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crf.importlib.util, "find_spec", lambda _: None)

    with pytest.raises(ValueError, match=r'got True; pip install "cosa-wsss\[crf\]"'):
        require_crf()
