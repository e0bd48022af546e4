from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cosa.config import Config, DataConfig, EvaluationConfig
from cosa.data.dataset import normalise, palette
from cosa.evaluation.panels import (
    COLUMNS,
    PanelRow,
    panel_arrays,
    panel_indices,
    panel_rows,
    save_panels,
)
from cosa.evaluation.pictures import sheet
from cosa.structures import IGNORE, EvaluationBatch
from tests.oracles.network import ColourNetwork

CLASSES = ("boat", "cat")
SETTINGS = EvaluationConfig(scales=(1.0,), flip=False, coexistence=(), panel_images=3)
CPU = torch.device("cpu")


def batches(count: int = 4) -> list[EvaluationBatch]:
    rng = np.random.default_rng(0)
    return [
        EvaluationBatch(
            names=(f"first_{i}", f"second_{i}"),
            images=normalise(rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8), DataConfig()),
            sizes=((16, 16), (8, 12)),
            masks=(torch.zeros(16, 16, dtype=torch.int64), torch.ones(8, 12, dtype=torch.int64)),
            labels=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
        )
        for i in range(count)
    ]


def row(**changes: object) -> PanelRow:
    plain = PanelRow(
        name="image",
        labels=torch.tensor([1.0, 1.0]),
        image=np.full((10, 10, 3), 100, dtype=np.uint8),
        activations=torch.zeros(2, 2, 10, 10),
        class_maps=torch.zeros(4, 10, 10, dtype=torch.int64),
    )
    return dataclasses.replace(plain, **changes)


def full(place: int, fill: int) -> torch.Tensor:
    """Class maps of background, but for one of the four."""
    maps = torch.zeros(4, 10, 10, dtype=torch.int64)
    maps[place] = fill
    return maps


def drawn(rows: list[PanelRow], classes: tuple[str, ...] = CLASSES) -> Image.Image:
    arrays = panel_arrays(rows, classes)
    return sheet(arrays["tiles"], titles=COLUMNS, legends=arrays["legends"])


def tile_centres(panel: object, rows: int = 1) -> list[tuple[int, ...]]:
    """Colour in the middle of each of the seven tiles of the first row."""
    width, height = panel.size
    return [panel.getpixel((round((i + 0.5) * width / 7), height // (2 * rows))) for i in range(7)]


def test_the_palette_is_that_of_pascal_voc() -> None:
    colours = palette(21)

    assert [tuple(colours[i].tolist()) for i in (0, 1, 2, 3, 8, 15, 20)] == [
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (64, 0, 0),
        (192, 128, 128),
        (0, 64, 128),
    ]


def test_the_palette_tells_256_classes_apart() -> None:
    assert len({tuple(colour) for colour in palette(256).tolist()}) == 256


def test_there_is_a_row_for_each_image() -> None:
    rows = panel_rows(ColourNetwork(), batches(2), config=Config(evaluation=SETTINGS), xi=0.5, device=CPU)

    assert [r.name for r in rows] == ["first_0", "second_0", "first_1", "second_1"]


def test_an_image_without_a_mask_is_shown_with_nothing_to_compare_it_to() -> None:
    batch = dataclasses.replace(batches()[0], masks=())

    shown = panel_rows(ColourNetwork(), [batch], config=Config(evaluation=SETTINGS), xi=0.5, device=CPU)

    assert [r.class_maps[0].shape for r in shown] == [(16, 16), (8, 12)]
    assert all(r.class_maps[0].eq(IGNORE).all() for r in shown)


# labels of eight images; boat is class 0
LABELS = torch.tensor([[float(i in {1, 4, 6}), 1.0] for i in range(8)])


def chosen(**changes: object) -> list[int]:
    settings = SETTINGS.replace(coexistence=("boat",), **changes)
    return panel_indices(LABELS, CLASSES, settings)


def test_panel_images_are_drawn_by_their_seed() -> None:
    draws = {tuple(chosen(panel_seed=seed)) for seed in range(20)}

    assert len(draws) > 5
    assert all(len(set(draw)) == 3 for draw in draws)
    assert chosen(panel_seed=3) == chosen(panel_seed=3)


def test_the_first_images_are_shown_on_request() -> None:
    assert chosen(panel_choice="first") == [0, 1, 2]


def test_images_that_suffer_from_coexistence_are_shown_alone() -> None:
    assert chosen(panel_choice="coexistence") == [1, 4, 6]


def test_images_that_are_not_evaluated_are_not_shown() -> None:
    assert chosen(panel_choice="coexistence", max_images=5) == [1, 4]


def test_a_split_without_coexistence_shows_other_images() -> None:
    assert len(chosen(panel_choice="coexistence", max_images=1)) == 1


def test_a_row_shows_the_picture_that_was_read() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    batch = dataclasses.replace(batches()[0], images=normalise(picture.repeat(2, axis=0), DataConfig()))

    shown = panel_rows(ColourNetwork(), [batch], config=Config(evaluation=SETTINGS), xi=0.5, device=CPU)[
        0
    ].image

    np.testing.assert_array_equal(shown, picture[0])


def test_assignments_of_a_row_know_the_labels_and_the_prediction_does_not() -> None:
    network = ColourNetwork()
    network.weights["seg_logits"] = torch.zeros(3, 3)
    network.weights["seg_logits"][1] = torch.tensor([9.0, 9.0, 9.0])
    bright = normalise(np.full((2, 16, 16, 3), 255, dtype=np.uint8), DataConfig())
    batch = dataclasses.replace(batches()[0], images=bright)

    shown = panel_rows(network, [batch], config=Config(evaluation=SETTINGS), xi=0.5, device=CPU)[1]

    _, cpl, spl, prediction = shown.class_maps
    assert prediction.eq(1).all()
    assert not spl.eq(1).any()
    assert not cpl.eq(1).any()
    assert shown.activations.shape[1] == 1  # of its one class


@pytest.mark.parametrize(("column", "place"), [(1, 0), (4, 1), (5, 2), (6, 3)])
def test_a_label_map_stands_in_its_column_in_the_colour_of_its_class(column: int, place: int) -> None:
    panel = drawn([row(class_maps=full(place, 2))])

    centres = tile_centres(panel)
    assert centres[column] == (0, 128, 0)
    assert centres.count((0, 128, 0)) == 1


def test_pixels_that_do_not_count_are_white() -> None:
    panel = drawn([row(class_maps=full(0, IGNORE))])

    assert tile_centres(panel)[1] == (255, 255, 255)


@pytest.mark.parametrize("cam", [0, 1])
def test_activation_is_shown_as_heat(cam: int) -> None:
    activations = torch.zeros(2, 2, 10, 10)
    activations[cam] = 1
    hot = tile_centres(drawn([row(activations=activations)]))[2 + cam]
    cold = tile_centres(drawn([row()]))[2 + cam]

    assert sum(hot) > 2 * sum(cold)


def test_every_row_makes_the_panel_taller() -> None:
    one, two, three = (drawn([row()] * n).size for n in (1, 2, 3))

    assert one[0] == two[0] == three[0]
    assert three[1] - two[1] == two[1] - one[1] > 128


def test_more_labels_than_fit_end_in_dots_within_the_panel() -> None:
    classes = tuple(f"a class with a long name {i}" for i in range(40))
    crowded = row(labels=torch.ones(40), activations=torch.rand(2, 40, 10, 10))

    panel = drawn([crowded], classes)

    assert panel.size == drawn([row()]).size
    legend = np.asarray(panel)[-20:, -30:]
    assert (legend < 128).any()


def test_names_of_peaks_do_not_write_over_each_other() -> None:
    together = torch.zeros(2, 2, 10, 10)
    together[0, :, 5, 5] = 1

    both = drawn([row(activations=together)])
    second = together.clone()
    second[0, 1, 5, 5] = 0.999  # the same place, less hot
    again = drawn([row(activations=second)])

    assert np.array_equal(np.asarray(both), np.asarray(again))


def test_a_saved_panel_can_be_put_together_from_its_arrays(tmp_path: Path) -> None:
    rows = [row(name="one"), row(name="two", class_maps=full(3, 1))]

    picture, data = save_panels(tmp_path / "step_00000400.png", rows, CLASSES)

    with np.load(data) as arrays, Image.open(picture) as shown:
        assert arrays["names"].tolist() == ["one", "two"]
        assert tuple(arrays["columns"].tolist()) == COLUMNS
        assert arrays["tiles"].shape == (2, 7, 128, 128, 3)
        again = sheet(arrays["tiles"], titles=COLUMNS, legends=arrays["legends"])
        np.testing.assert_array_equal(np.asarray(again), np.asarray(shown))
    assert data.name == "step_00000400.npz"
    assert data.stat().st_size < 200_000


def test_equal_panels_are_equal_files(tmp_path: Path) -> None:
    first, second = (save_panels(tmp_path / name / "a.png", [row()], CLASSES) for name in "ab")

    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_titles_may_have_several_lines_and_longer_ones_are_smaller() -> None:
    tiles = np.zeros((1, 2, 40, 60, 3), np.uint8)

    one, two = (sheet(tiles, titles=titles) for titles in (["M", "a title too long for it"], ["M\nfull", ""]))

    assert two.height > one.height
    assert (np.asarray(one)[:, 60:66][:20] == 255).all(), "titles do not run into each other"
