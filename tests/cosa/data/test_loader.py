"""Batches: the same images by step however they are shared, and errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cosa.config import Config, override
from cosa.data import SegmentationDataset, evaluation_batches, open_dataset, step_names, train_batches
from cosa.structures import Batch, EvaluationBatch
from tests.cosa.data.voc_folder import VocFolder

IMAGES = 10
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in one gray level each, 20 times their number, and with one class each, their number + 1."""
    folder = VocFolder(tmp_path_factory.mktemp("data") / "voc", size=(12, 9))
    folder.fill({f"{i:02}": [i + 1, 255] for i in range(IMAGES)})
    for i in range(IMAGES):
        folder.image(f"{i:02}", np.full((9, 12, 3), 20 * i, np.uint8))
    folder.split("val", [f"{i:02}" for i in range(IMAGES)])
    return folder.root


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    return override(
        Config(),
        {
            "data.root": str(root),
            "data.train_split": "train",
            "data.crop_size": 8,
            "data.loader_workers": 0,
            "train.iterations": 8,
            "train.warmup": 0,
            "train.batch_size": 4,
            "evaluation.size": 16,
            "evaluation.batch_size": 3,
        },
    )


@pytest.fixture(scope="module")
def dataset(config: Config) -> SegmentationDataset:
    return open_dataset(config.data, "train")


@pytest.fixture(scope="module")
def batches(dataset: SegmentationDataset, config: Config) -> list[Batch]:
    """Every batch of the run in one process."""
    return list(train_batches(dataset, config, start=0))


def equal(first: Batch, second: Batch) -> bool:
    pairs = [(value, getattr(second, name)) for name, value in vars(first).items()]
    return all(one is other if one is None else torch.equal(one, other) for one, other in pairs)


def pixels(images: torch.Tensor) -> torch.Tensor:
    """Normalised images as the values 0 ... 255 they were."""
    return (255 * (images * STD + MEAN)).round()


# --- the sequence of images ---------------------------------------------------------------------------------


def test_a_run_has_one_batch_for_each_step(batches: list[Batch]) -> None:
    assert [len(batch.labels) for batch in batches] == [4] * 8


def test_every_epoch_sees_each_image_once(batches: list[Batch]) -> None:
    seen = torch.cat([batch.labels for batch in batches])[: 3 * IMAGES].argmax(1).view(3, IMAGES)

    assert seen.sort(1).values.tolist() == [list(range(IMAGES))] * 3


def test_epochs_differ_in_order(batches: list[Batch]) -> None:
    seen = torch.cat([batch.labels for batch in batches])[: 3 * IMAGES].argmax(1).view(3, IMAGES)

    assert len({tuple(epoch) for epoch in seen.tolist()}) == 3


def test_an_image_comes_with_its_own_labels(dataset: SegmentationDataset, config: Config) -> None:
    changed = override(config, {"data.strong_appearance": False, "data.blur_prob": 0.0})

    for batch in train_batches(dataset, changed, start=0):
        shown = [
            view[:, valid].unique().tolist()
            for view, valid in zip(pixels(batch.weak), batch.valid, strict=True)
        ]
        assert shown == [[20.0 * i] for i in batch.labels.argmax(1).tolist()]


def test_step_names_are_the_images_of_that_step(
    dataset: SegmentationDataset, config: Config, batches: list[Batch]
) -> None:
    named = [step_names(dataset, config, step) for step in range(8)]

    assert named == [tuple(f"{i:02}" for i in batch.labels.argmax(1)) for batch in batches]


def test_starting_at_a_step_goes_on_as_without_interruption(
    dataset: SegmentationDataset, config: Config, batches: list[Batch]
) -> None:
    rest = list(train_batches(dataset, config, start=3))

    assert len(rest) == 5
    assert all(equal(first, second) for first, second in zip(rest, batches[3:], strict=True))


def test_starting_at_the_end_gives_nothing(dataset: SegmentationDataset, config: Config) -> None:
    assert list(train_batches(dataset, config, start=8)) == []


@pytest.mark.parametrize("world", [2, 4])
def test_the_shares_of_all_ranks_are_the_batch_of_one_process(
    dataset: SegmentationDataset, config: Config, batches: list[Batch], world: int
) -> None:
    shares = [train_batches(dataset, config, start=0, rank=rank, world=world) for rank in range(world)]

    for whole, *parts in zip(batches, *shares, strict=True):
        names = [name for name, value in vars(whole).items() if value is not None]
        joined = Batch(**{name: torch.cat([getattr(p, name) for p in parts]) for name in names})
        assert equal(joined, whole)


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(
    dataset: SegmentationDataset, config: Config
) -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size must be a multiple of the 3 workers, got 4"):
        train_batches(dataset, config, start=0, rank=0, world=3)


def test_a_batch_may_hold_more_images_than_the_data_set(dataset: SegmentationDataset, config: Config) -> None:
    large = override(config, {"train.batch_size": 3 * IMAGES, "train.iterations": 1})

    (batch,) = train_batches(dataset, large, start=0)

    assert torch.equal(batch.labels.sum(0)[:IMAGES], torch.full((IMAGES,), 3.0))


def test_another_seed_gives_another_order_and_other_views(
    dataset: SegmentationDataset, config: Config, batches: list[Batch]
) -> None:
    other = next(train_batches(dataset, override(config, {"train.seed": 1}), start=0))

    assert not torch.equal(other.labels, batches[0].labels)
    assert not torch.equal(other.valid, batches[0].valid)


def test_an_image_gets_other_views_in_the_next_epoch(batches: list[Batch]) -> None:
    strong = torch.cat([batch.strong for batch in batches])[: 3 * IMAGES]

    assert len({view.numpy().tobytes() for view in strong}) > 2 * IMAGES


def test_reading_leaves_the_random_numbers_of_the_run_alone(
    dataset: SegmentationDataset, config: Config
) -> None:
    before = torch.get_rng_state()
    next(train_batches(dataset, config, start=0))
    next(evaluation_batches(dataset, config))

    assert torch.equal(torch.get_rng_state(), before)


# --- the tensors --------------------------------------------------------------------------------------------


def test_views_are_normalised_by_the_mean_and_deviation_of_imagenet(
    dataset: SegmentationDataset, config: Config
) -> None:
    changes = {
        "data.strong_appearance": False,
        "data.blur_prob": 0.0,
        "data.scale_min": 1.0,
        "data.scale_max": 1.0,
    }
    batch = next(train_batches(dataset, override(config, changes), start=0))

    gray = 20 * batch.labels.argmax(1) / 255
    expected = (gray[:, None] - MEAN.flatten()) / STD.flatten()
    torch.testing.assert_close(batch.weak, expected[:, :, None, None].expand(-1, -1, 8, 8))


def test_views_and_judged_images_are_normalised_by_the_mean_and_deviation_of_the_settings(
    dataset: SegmentationDataset, config: Config
) -> None:
    ours = override(config, {"data.mean": (0.5, 0.25, 0.0), "data.std": (0.5, 0.25, 1.0)})
    scale, shift = (torch.tensor(v).view(3, 1, 1) for v in ((0.5, 0.25, 1.0), (0.5, 0.25, 0.0)))

    imagenet, own = (next(train_batches(dataset, c, start=0)) for c in (config, ours))
    judged_imagenet, judged_own = (next(evaluation_batches(dataset, c)) for c in (config, ours))

    for one, other in ((imagenet.weak, own.weak), (judged_imagenet.images, judged_own.images)):
        inside = one != 0  # padding stays 0
        torch.testing.assert_close((other * scale + shift)[inside], (one * STD + MEAN)[inside])


def test_padding_is_zero_after_normalisation_and_marked(batches: list[Batch]) -> None:
    padding = [~batch.valid[:, None].expand_as(batch.weak) for batch in batches]

    assert sum(int(p.sum()) for p in padding) > 0
    assert all(not b.weak[p].any() and not b.strong[p].any() for b, p in zip(batches, padding, strict=True))


# --- loader processes ---------------------------------------------------------------------------------------


@dataclass
class InProcesses:
    """What two loader processes gave until a broken file stopped them."""

    batches: list[Batch]
    error: Exception
    broken: Path


@pytest.fixture(scope="module")
def in_processes(
    config: Config, dataset: SegmentationDataset, tmp_path_factory: pytest.TempPathFactory
) -> InProcesses:
    """A run by two processes, in which the last image of the first epoch is cut off: it is due in step 2."""
    index = int(step_names(dataset, config, 2)[1])
    broken = tmp_path_factory.mktemp("broken") / "cut.png"
    broken.write_bytes(dataset.image_paths[index].read_bytes()[:40])
    paths = list(dataset.image_paths)
    paths[index] = broken
    loader = train_batches(
        replace(dataset, image_paths=tuple(paths)), override(config, {"data.loader_workers": 2}), start=0
    )
    batches = []
    try:
        for batch in loader:
            batches.append(batch)  # noqa: PERF402 - what came before the error counts
    except ValueError as error:
        return InProcesses(batches, error, broken)
    pytest.fail("the broken image went unseen")


def test_loader_processes_give_the_batches_of_one_process(
    in_processes: InProcesses, batches: list[Batch]
) -> None:
    assert len(in_processes.batches) == 2
    assert all(equal(a, b) for a, b in zip(in_processes.batches, batches, strict=False))


def test_a_broken_image_in_a_loader_process_ends_in_one_line_that_names_it(in_processes: InProcesses) -> None:
    assert type(in_processes.error) is ValueError
    assert f"image must be a readable JPEG or PNG, got {in_processes.broken}" in str(in_processes.error)
    assert "\n" not in str(in_processes.error)


def test_an_image_that_vanished_after_opening_is_named(dataset: SegmentationDataset, config: Config) -> None:
    gone = replace(dataset, image_paths=tuple(p.with_name(f"gone_{p.name}") for p in dataset.image_paths))

    with pytest.raises(FileNotFoundError, match=r"gone_\d\d.png"):
        next(train_batches(gone, config, start=0))


# --- evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 3, 4, 12])
def test_all_ranks_together_evaluate_each_image_exactly_once(
    dataset: SegmentationDataset, config: Config, world: int
) -> None:
    names = [
        name
        for rank in range(world)
        for batch in evaluation_batches(dataset, config, rank=rank, world=world)
        for name in batch.names
    ]

    assert sorted(names) == list(dataset.names)


def evaluated(
    dataset: SegmentationDataset, config: Config
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for batch in evaluation_batches(dataset, config):
        yield from zip(batch.names, batch.images, batch.masks, strict=True)


def test_evaluation_batches_keep_the_order_and_the_size_asked_for(
    dataset: SegmentationDataset, config: Config
) -> None:
    found = [batch.names for batch in evaluation_batches(dataset, config)]

    assert found == [("00", "01", "02"), ("03", "04", "05"), ("06", "07", "08"), ("09",)]


def test_max_images_evaluates_the_start_of_the_split(dataset: SegmentationDataset, config: Config) -> None:
    few = override(config, {"evaluation.max_images": 5})

    assert [name for name, *_ in evaluated(dataset, few)] == ["00", "01", "02", "03", "04"]


def test_an_evaluated_image_is_resized_and_normalised(dataset: SegmentationDataset, config: Config) -> None:
    for name, image, _ in evaluated(dataset, config):
        expected = (20 * int(name) / 255 - MEAN) / STD
        torch.testing.assert_close(image, expected.expand(3, 16, 16))


def test_an_evaluated_mask_keeps_its_size_and_its_borders(
    dataset: SegmentationDataset, config: Config
) -> None:
    for name, _, mask in evaluated(dataset, config):
        expected = torch.zeros(9, 12, dtype=torch.int64)
        expected[0, 0], expected[0, 1] = int(name) + 1, 255
        assert torch.equal(mask, expected)


def test_evaluated_labels_are_those_of_the_image(dataset: SegmentationDataset, config: Config) -> None:
    rows: list[EvaluationBatch] = list(evaluation_batches(dataset, config))

    assert torch.equal(torch.cat([batch.labels for batch in rows]), dataset.labels)


def test_an_image_is_averaged_where_evaluation_shrinks_it(tmp_path: Path, config: Config) -> None:
    folder = VocFolder(tmp_path / "voc", size=(64, 64)).fill({"a": [1]})
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    folder.image("a", stripes)

    (batch,) = evaluation_batches(open_dataset(folder.config(), "train"), config)

    inner = pixels(batch.images)[..., 2:-2]
    assert (inner.min(), inner.max()) == (100, 100)


def test_a_broken_image_stops_the_evaluation_with_its_name(
    tmp_path: Path, dataset: SegmentationDataset, config: Config
) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(dataset.image_paths[0].read_bytes()[:40])
    broken = replace(dataset, image_paths=(*dataset.image_paths[:5], path, *dataset.image_paths[6:]))

    with pytest.raises(ValueError, match=r"image must be a readable JPEG or PNG, got .*cut\.png"):
        list(evaluation_batches(broken, config))


def test_a_split_without_masks_is_read_without_them(dataset: SegmentationDataset, config: Config) -> None:
    found = list(evaluation_batches(replace(dataset, mask_paths=()), config))

    assert sum(len(batch.images) for batch in found) == len(dataset)
    assert all(batch.masks == () for batch in found)
    assert {size for batch in found for size in batch.sizes} == {(9, 12)}


# --- the real images ----------------------------------------------------------------------------------------


def test_real_batches_show_both_views_at_the_same_place(real_data: Path) -> None:
    config = override(
        Config(),
        {
            "data.root": str(real_data / "data/VOCdevkit/VOC2012"),
            "data.crop_size": 160,
            "data.loader_workers": 0,
            "train.batch_size": 8,
            "train.iterations": 2,
            "train.warmup": 0,
        },
    )
    dataset = open_dataset(config.data, "train_aug")

    for batch in train_batches(dataset, config, start=0):
        weak, strong = (edge_strength(images) for images in (batch.weak, batch.strong))
        aligned = correlation(weak, strong)
        shifted = correlation(weak, strong.roll(8, -1))
        assert (aligned > shifted + 0.1).all()


def edge_strength(images: torch.Tensor) -> torch.Tensor:
    gray = images.mean(1)
    return (gray.diff(dim=-1)[:, 1:].abs() + gray.diff(dim=-2)[..., 1:].abs()).flatten(1).sqrt()


def correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    pairs = torch.stack([first, second.view_as(first)], 1)
    return torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs])
