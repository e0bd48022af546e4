"""Both views of an image: one geometry, appearances as in the paper's Table 10, all decided by the seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import albumentations
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cosa.config import DataConfig
from cosa.data import views as views_module
from cosa.data.views import ViewPair, Views, appearances, geometry

SEEDS = range(60)


def plain(**changes: object) -> DataConfig:
    """No random choice but the crop's place, unless one is asked for."""
    settings: dict[str, object] = {
        "crop_size": 24,
        "scale_min": 1.0,
        "scale_max": 1.0,
        "flip_prob": 0.0,
        "blur_prob": 0.0,
        "strong_appearance": False,
    }
    return DataConfig(**{**settings, **changes})  # type: ignore[arg-type]


def unique_pixels(height: int, width: int) -> np.ndarray:
    """An image whose pixels carry their row and column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.full_like(rows, 200)], -1).astype(np.uint8)


def noise(seed: int = 0, low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (20, 30, 3), dtype=np.uint8)


def only(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views_module, "appearances", lambda: {name: appearances()[name]})


# --- geometry -----------------------------------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop=st.integers(1, 40),
    flip=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_a_view_is_a_piece_of_the_image_in_its_order_and_the_rest_is_padding(
    size: tuple[int, int], crop: int, flip: float, seed: int
) -> None:
    pair = Views(plain(crop_size=crop, flip_prob=flip))(unique_pixels(*size), seed)

    height, width = (min(side, crop) for side in size)
    piece = pair.weak[pair.valid].reshape(height, width, 3).astype(int)
    top, left = piece[0, 0, 0], piece[0, :, 1].min()
    expected = unique_pixels(*size)[top : top + height, left : left + width]
    assert np.array_equal(piece, expected[:, ::-1] if flip else expected)
    assert not pair.weak[~pair.valid].any()


def test_both_views_have_the_same_geometry() -> None:
    make = Views(plain(scale_min=0.5, scale_max=2.0, flip_prob=0.5))

    pairs = [make(unique_pixels(30, 40), seed) for seed in SEEDS]

    assert all(np.array_equal(pair.weak, pair.strong) for pair in pairs)


def edges(view: np.ndarray) -> tuple[int, int]:
    """Row and column after which a view changes most."""
    gray = view.astype(int).sum(-1)
    profiles = (np.abs(np.diff(gray, axis=axis)).sum(1 - axis) for axis in (0, 1))
    row, column = (int(profile.argmax()) for profile in profiles)
    return row, column


def test_an_edge_lies_at_the_same_pixel_of_both_views_under_every_appearance() -> None:
    image = np.full((60, 60, 3), 60, np.uint8)
    image[27:] += 70
    image[:, 33:] += 70
    make = Views(plain(crop_size=40, flip_prob=0.5, strong_appearance=True))

    pairs = [make(image, seed) for seed in range(150)]

    assert [edges(pair.strong) for pair in pairs] == [edges(pair.weak) for pair in pairs]


def test_the_scale_covers_its_range_and_keeps_the_shape() -> None:
    make = Views(plain(crop_size=200, scale_min=0.5, scale_max=2.0))

    valid = [make(noise(), seed).valid for seed in SEEDS]
    heights, widths = (np.array([v.any(axis).sum() for v in valid]) for axis in (1, 0))

    assert heights.min() in range(10, 13)
    assert heights.max() in range(37, 41)
    assert np.abs(widths / heights - 1.5).max() < 0.15


def test_the_flip_does_not_follow_from_the_scale() -> None:
    # Compose.set_random_seed of albumentations would flip exactly the images that it scales below 1.25.
    make = Views(plain(crop_size=80, scale_min=0.5, scale_max=2.0, flip_prob=0.5))
    image = unique_pixels(20, 30)

    small = [pair for pair in (make(image, seed) for seed in range(150)) if pair.valid.sum() < 600 * 1.25**2]
    flipped = [edge[1, 0] > edge[1, -1] for edge in (own(pair) for pair in small)]

    assert 0.3 < np.mean(flipped) < 0.7


def own(pair: ViewPair) -> np.ndarray:
    """The column numbers in the weak view's own pixels."""
    rows, columns = np.nonzero(pair.valid)
    return pair.weak[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1, 1].astype(int)


def test_a_small_image_lands_in_different_places_of_the_crop() -> None:
    make = Views(plain(crop_size=40))

    corners = {tuple(np.argwhere(make(noise(), seed).valid)[0]) for seed in SEEDS}

    assert len(corners) > 20


def test_shrinking_averages_and_drops_no_stripe() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 200

    pair = Views(plain(crop_size=16, scale_min=0.25, scale_max=0.25))(stripes, 0)

    assert pair.weak.min() == pair.weak.max() == 50


# --- appearance ---------------------------------------------------------------------------------------------


def apply(name: str, image: np.ndarray, **params: float) -> np.ndarray:
    return np.array(appearances()[name].apply(image, **params))


def test_the_table_has_nine_appearances() -> None:
    assert list(appearances()) == [
        "Identity",
        "Autocontrast",
        "Equalize",
        "RandSolarize",
        "RandColor",
        "RandContrast",
        "RandBrightness",
        "RandSharpness",
        "RandPosterize",
    ]


def test_identity_returns_the_original_image() -> None:
    assert np.array_equal(apply("Identity", noise()), noise())


@pytest.mark.parametrize("name", ["RandColor", "RandContrast", "RandBrightness", "RandSharpness"])
def test_a_factor_of_one_returns_the_original_image(name: str) -> None:
    assert np.array_equal(apply(name, noise(), factor=1.0), noise())


def test_a_color_factor_of_zero_returns_a_black_and_white_image() -> None:
    gray = apply("RandColor", noise(), factor=0.0)

    assert np.array_equal(gray[..., 0], gray[..., 1])
    assert np.array_equal(gray[..., 0], gray[..., 2])
    assert np.abs(gray[..., 0] - noise() @ [0.299, 0.587, 0.114]).max() <= 1


def test_a_contrast_factor_of_zero_returns_a_solid_image_of_the_mean_gray() -> None:
    solid = apply("RandContrast", noise(), factor=0.0)

    assert solid.min() == solid.max()
    assert abs(int(solid[0, 0, 0]) - (noise() @ [0.299, 0.587, 0.114]).mean()) <= 1


def test_a_brightness_factor_scales_every_pixel() -> None:
    assert np.abs(apply("RandBrightness", noise(), factor=0.05) - 0.05 * noise()).max() <= 1
    assert np.abs(apply("RandBrightness", noise(), factor=0.95) - 0.95 * noise()).max() <= 1


def test_a_sharpness_factor_of_zero_blurs_by_the_three_by_three_kernel_of_pillow() -> None:
    image = np.zeros((5, 5, 3), np.uint8)
    image[2, 2] = 130

    blurred = apply("RandSharpness", image, factor=0.0)[..., 0]

    assert blurred[1:4, 1:4].tolist() == [[10, 10, 10], [10, 50, 10], [10, 10, 10]]


def test_autocontrast_sets_the_darkest_pixel_to_black_and_the_lightest_to_white() -> None:
    stretched = apply("Autocontrast", noise(low=100, high=151))

    assert np.abs(stretched - (noise(low=100, high=151).astype(float) - 100) * 5.1).max() <= 1


def test_autocontrast_keeps_an_image_that_already_reaches_white() -> None:
    # AutoContrast of albumentations 2.0.8 leaves the value 255 out of the histogram and blows the rest up.
    image = noise(low=0, high=60)
    image[:2] = 255

    assert np.array_equal(
        apply("Autocontrast", image),
        image,
    )


def test_equalize_spreads_the_levels_evenly() -> None:
    image = np.repeat(np.array([10, 11, 12, 13], np.uint8), 510)[:, None, None].repeat(3, -1)

    levels = np.unique(apply("Equalize", image))

    assert np.abs(levels - np.array([0, 85, 170, 255])).max() <= 1


@pytest.mark.parametrize(
    ("name", "pillow"), [("Autocontrast", ImageOps.autocontrast), ("Equalize", ImageOps.equalize)]
)
@pytest.mark.parametrize(
    ("low", "high", "side"),
    [(0, 256, 31), (40, 200, 224), (7, 8, 20), (100, 102, 23), (0, 3, 7), (250, 256, 90)],
)
def test_levels_are_pillows_to_the_last_bit(
    name: str, pillow: Callable[[Image.Image], Image.Image], low: int, high: int, side: int
) -> None:
    image = np.random.default_rng(side).integers(low, high, (side, side + 2, 3)).astype(np.uint8)
    image[: side // 2, :, 1] = low  # one channel with a level that most pixels have

    assert np.array_equal(apply(name, image), pillow(Image.fromarray(image)))


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.0, [255, 155, 0]), (0.5, [0, 100, 0]), (1.0, [0, 100, 0])]
)
def test_solarize_inverts_the_pixels_above_its_threshold(threshold: float, expected: list[int]) -> None:
    image = np.array([0, 100, 255], np.uint8)[None, :, None].repeat(3, -1)

    assert apply("RandSolarize", image, threshold=threshold)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("bits", "kept"), [(4, 0b11110000), (6, 0b11111100), (8, 0b11111111)])
def test_posterize_keeps_the_highest_bits(bits: int, kept: int) -> None:
    assert np.array_equal(apply("RandPosterize", noise(), num_bits=bits), noise() & kept)


def drawn(name: str, parameter: str) -> list[float]:
    transform = albumentations.Compose([appearances()[name]])
    transform.set_random_seed(0)
    values = []
    for _ in range(300):
        transform(image=noise())
        values.append(transform.transforms[0].params[parameter])
    return values


@pytest.mark.parametrize("name", ["RandColor", "RandContrast", "RandBrightness", "RandSharpness"])
def test_factors_cover_the_range_of_the_table(name: str) -> None:
    factors = drawn(name, "factor")

    assert 0.05 <= min(factors) < 0.08
    assert 0.92 < max(factors) <= 0.95


def test_solarize_thresholds_cover_the_range_of_the_table() -> None:
    thresholds = drawn("RandSolarize", "threshold")

    assert 0 <= min(thresholds) < 0.03
    assert 0.97 < max(thresholds) <= 1


def test_posterize_draws_four_to_eight_bits() -> None:
    assert set(drawn("RandPosterize", "num_bits")) == {4, 5, 6, 7, 8}


def test_the_strong_view_gets_each_appearance_about_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    def paint(value: int) -> Callable[[object, object], object]:
        return lambda *_: np.full((24, 24, 3), value, np.uint8)

    monkeypatch.setattr(
        views_module, "appearances", lambda: {str(v): views_module.Pillow(paint(v)) for v in range(9)}
    )
    make = Views(plain(strong_appearance=True))

    values = [make(unique_pixels(30, 30), seed).strong[0, 0, 0] for seed in range(450)]

    assert np.bincount(values).min() > 25
    assert np.bincount(values).size == 9


def test_the_weak_view_never_gets_an_appearance() -> None:
    make = Views(plain(strong_appearance=True))
    image = unique_pixels(24, 24)

    assert all(np.array_equal(make(image, seed).weak, image) for seed in SEEDS)


def test_padding_does_not_enter_the_histogram_of_an_appearance(monkeypatch: pytest.MonkeyPatch) -> None:
    only("Autocontrast", monkeypatch)

    pair = Views(plain(crop_size=60, strong_appearance=True))(noise(low=100, high=151), 3)

    assert (pair.strong[pair.valid].min(), pair.strong[pair.valid].max()) == (0, 255)
    assert not pair.strong[~pair.valid].any()


# --- blur ---------------------------------------------------------------------------------------------------


def test_blur_is_drawn_for_each_view_on_its_own() -> None:
    make = Views(plain(crop_size=24, blur_prob=0.5))
    image = noise()[:, :24].repeat(2, 0)[:24]

    blurred = [
        (not np.array_equal(pair.weak, image), not np.array_equal(pair.strong, image))
        for pair in (make(image, seed) for seed in range(200))
    ]

    assert {(True, False), (False, True), (True, True), (False, False)} == set(blurred)


def spread(crop: int) -> float:
    """Largest share of a bright pixel that blur takes away, over the seeds."""
    image = np.zeros((crop, crop, 3), np.uint8)
    image[crop // 2, crop // 2] = 255
    make = Views(plain(crop_size=crop, blur_prob=1.0))
    return 1 - min(int(make(image, seed).weak.max()) for seed in SEEDS) / 255


def test_blur_on_a_small_crop_is_weaker_than_on_a_large_one() -> None:
    assert 0.6 < spread(48) < 0.9
    assert spread(224) > 0.92


def test_blur_keeps_the_pixels_beside_padding() -> None:
    pair = Views(plain(crop_size=60, blur_prob=1.0))(np.full((20, 30, 3), 77, np.uint8), 0)

    assert np.unique(pair.weak[pair.valid]).tolist() == [77]


# --- seeds --------------------------------------------------------------------------------------------------


def same(first: ViewPair, second: ViewPair) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in vars(first))


def test_the_same_seed_gives_the_same_views_whatever_came_before() -> None:
    data = DataConfig(crop_size=24)
    first, second = Views(data), Views(data)
    for seed in SEEDS:
        second(noise(1), seed)

    assert all(same(first(noise(), seed), second(noise(), seed)) for seed in SEEDS)


def test_another_seed_gives_other_views() -> None:
    make = Views(DataConfig(crop_size=24))

    assert len({make(noise(), seed).strong.tobytes() for seed in SEEDS}) == len(SEEDS)


def test_the_weak_view_is_the_same_with_and_without_strong_appearance() -> None:
    with_it, without = (Views(DataConfig(crop_size=24, strong_appearance=on)) for on in (True, False))

    assert all(np.array_equal(with_it(noise(), s).weak, without(noise(), s).weak) for s in SEEDS)


def test_a_misspelt_argument_of_albumentations_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views_module, "appearances", lambda: {"Typo": albumentations.NoOp(prob=1)})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserWarning, match="prob"):
            Views(plain(strong_appearance=True))


def test_a_mask_sent_through_the_geometry_stays_a_mask() -> None:
    pipeline = geometry(plain(scale_min=0.5, scale_max=2.0))
    mask = np.zeros((20, 30), np.uint8)
    mask[5:, 7:] = 200

    masks = [pipeline(image=noise(), mask=mask)["mask"] for _ in SEEDS]

    assert set(np.unique(masks)) == {0, 200}


@pytest.mark.parametrize("shape", [(1, 1), (1, 400), (400, 1), (2, 3)])
@pytest.mark.parametrize("scale", [0.05, 0.3, 2.0])
def test_the_thinnest_image_has_views(shape: tuple[int, int], scale: float) -> None:
    views = Views(plain(scale_min=scale, scale_max=scale))

    pair = views(np.full((*shape, 3), 100, np.uint8), 0, np.full(shape, 7, np.uint8))

    assert pair.valid.any()
    assert pair.mask is not None
    assert (pair.weak[pair.valid] == 100).all()
    assert (pair.mask[pair.valid] == 7).all()
