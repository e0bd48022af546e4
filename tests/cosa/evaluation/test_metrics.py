from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from cosa.equations.threshold import BINS, activation_bin
from cosa.evaluation import metrics
from cosa.evaluation.metrics import (
    confusion_matrix,
    cpl_accuracy,
    cpl_confusion,
    cpl_counts,
    image_counts,
    iou,
    mean_iou,
    precision_recall,
    score_counts,
)
from cosa.structures import IGNORE

CONFUSION = torch.tensor([[3, 1, 0], [2, 4, 0], [0, 0, 0]])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def targets(seed: int, classes: int, *shape: int) -> torch.Tensor:
    target = torch.randint(0, classes, shape, generator=generator(seed))
    target[torch.rand(shape, generator=generator(seed + 1)) < 0.2] = IGNORE
    return target


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_the_confusion_matrix_agrees_with_scikit_learn(seed: int) -> None:
    target = targets(seed, 4, 200)
    prediction = torch.randint(0, 4, (200,), generator=generator(seed + 2))

    found = confusion_matrix(prediction, target, 4)

    counted = target != IGNORE
    expected = reference.confusion_matrix(target[counted], prediction[counted], labels=range(4))
    np.testing.assert_array_equal(found, expected)


def test_an_image_of_ignored_pixels_counts_nothing() -> None:
    ignored = torch.full((2, 2), IGNORE)

    assert confusion_matrix(torch.ones_like(ignored), ignored, 3).sum() == 0


def test_a_class_that_is_not_there_is_no_ignored_pixel() -> None:
    target = torch.tensor([0, 5])

    with pytest.raises(RuntimeError):
        confusion_matrix(torch.zeros_like(target), target, 3)
    with pytest.raises(RuntimeError):
        cpl_counts(torch.zeros(2), torch.zeros_like(target), target, 2)


def test_iou_worked_out_by_hand() -> None:
    scores = iou(CONFUSION)

    assert scores[:2].tolist() == pytest.approx([3 / 6, 4 / 7])
    assert scores[2].isnan()


def test_the_mean_leaves_out_classes_that_are_nowhere() -> None:
    assert mean_iou(CONFUSION) == pytest.approx((3 / 6 + 4 / 7) / 2)


def test_the_mean_over_some_classes_counts_those_alone() -> None:
    assert mean_iou(CONFUSION, [1]) == pytest.approx(4 / 7)


def test_a_class_that_is_only_predicted_counts_as_missed() -> None:
    assert mean_iou(torch.tensor([[3, 1], [0, 0]])) == pytest.approx((3 / 4 + 0) / 2)


def test_nothing_to_average_is_not_a_number() -> None:
    assert math.isnan(mean_iou(torch.zeros(3, 3, dtype=torch.int64)))


def cpl_of(activation: torch.Tensor, strongest: torch.Tensor, xi: float) -> torch.Tensor:
    return torch.where(activation >= xi, strongest + 1, 0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), edge=st.integers(0, BINS - 1))
def test_counts_give_the_confusion_of_the_cpl_at_every_edge(seed: int, edge: int) -> None:
    activation = torch.randint(0, BINS + 1, (20, 20), generator=generator(seed)) / BINS
    strongest = torch.randint(0, 3, (20, 20), generator=generator(seed))
    target = targets(seed, 4, 20, 20)

    counts = cpl_counts(activation, strongest, target, 3)

    direct = confusion_matrix(cpl_of(activation, strongest, edge / BINS), target, 4)
    assert torch.equal(cpl_confusion(counts, edge / BINS), direct)


def test_counts_of_several_images_add_up() -> None:
    activation, strongest = torch.rand(2, 9, 9), torch.randint(0, 2, (2, 9, 9))
    target = targets(0, 3, 2, 9, 9)

    one, other = (cpl_counts(activation[i], strongest[i], target[i], 2) for i in range(2))

    assert torch.equal(one + other, cpl_counts(activation, strongest, target, 2))


def test_counts_give_the_quality_at_each_threshold() -> None:
    activation = torch.tensor([0.9, 0.6, 0.2])
    counts = cpl_counts(activation, torch.zeros(3, dtype=torch.int64), torch.tensor([1, 1, 0]), 1)

    # at 0.5 all three pixels are right; at 0.7 each class has one hit of two
    assert [mean_iou(cpl_confusion(counts, xi)) for xi in (0.5, 0.7)] == [1.0, 0.5]


def average_precision(scores: torch.Tensor, labels: torch.Tensor) -> float:
    return metrics.average_precision(score_counts(scores, labels))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), levels=st.sampled_from([2, 5, 1000]), images=st.integers(1, 40))
def test_average_precision_is_that_of_the_scores_themselves(seed: int, levels: int, images: int) -> None:
    scores = torch.randint(0, levels, (images, 3), generator=generator(seed)) / 50 - 10 + 0.004
    labels = (torch.rand(images, 3, generator=generator(seed + 1)) > 0.6).float()
    labels[0] = 1

    expected = reference.average_precision_score(labels.numpy(), scores.numpy(), average="macro")
    assert average_precision(scores, labels) == pytest.approx(expected)


def test_average_precision_worked_out_by_hand() -> None:
    scores, labels = torch.tensor([[0.9], [0.8], [0.7]]), torch.tensor([[1.0], [0.0], [1.0]])

    assert average_precision(scores, labels) == pytest.approx((1 + 2 / 3) / 2)


def test_classes_that_never_occur_are_left_out_of_the_map() -> None:
    scores, labels = torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])

    assert average_precision(scores, labels) == pytest.approx(0.5)


def test_a_map_of_no_class_is_not_a_number() -> None:
    assert math.isnan(average_precision(torch.zeros(2, 2), torch.zeros(2, 2)))


def scored_images() -> tuple[torch.Tensor, torch.Tensor]:
    cls_logits = torch.randint(-300, 300, (50, 3), generator=generator(0)) / 20 + 0.004
    return cls_logits, (torch.rand(50, 3, generator=generator(1)) > 0.7).float()


def test_score_counts_of_workers_add_up() -> None:
    cls_logits, labels = scored_images()

    one, other = (score_counts(cls_logits[p], labels[p]) for p in (slice(0, 20), slice(20, 50)))

    assert torch.equal(one + other, score_counts(cls_logits, labels))


def test_scores_beyond_the_limit_are_kept_at_the_ends() -> None:
    assert average_precision(torch.tensor([[1000.0], [-1000.0]]), torch.tensor([[1.0], [0.0]])) == 1


def test_precision_and_recall_agree_with_scikit_learn() -> None:
    logits = torch.randn(40, 5, generator=generator(3))
    labels = (torch.rand(40, 5, generator=generator(4)) < 0.4).float()

    found = precision_recall(score_counts(logits, labels))

    said, truth = (logits >= 0).int().flatten(), labels.int().flatten()
    expected = (reference.precision_score(truth, said), reference.recall_score(truth, said))
    assert found == pytest.approx(expected)


def test_precision_of_nothing_named_is_not_a_number() -> None:
    precision, recall = precision_recall(score_counts(torch.full((3, 2), -5.0), torch.ones(3, 2)))

    assert math.isnan(precision)
    assert recall == 0


@pytest.mark.parametrize("edge", [1, 60, 199])
def test_accuracy_by_confidence_agrees_with_the_cpl_pixel_by_pixel(edge: int) -> None:
    activation = torch.randint(0, BINS + 1, (30, 30), generator=generator(5)) / BINS
    strongest = torch.randint(0, 3, (30, 30), generator=generator(6))
    target = targets(7, 4, 30, 30)

    pixels, correct = cpl_accuracy(cpl_counts(activation, strongest, target, 3), edge / BINS)

    cpl = cpl_of(activation, strongest, edge / BINS)
    for b in (0, edge - 1, edge, BINS - 1):
        inside = (activation_bin(activation) == b) & (target != IGNORE)
        assert pixels[b] == inside.sum()
        assert correct[b] == (inside & (cpl == target)).sum()


def test_a_confusion_of_some_bins_counts_their_pixels_alone() -> None:
    activation = torch.tensor([0.1, 0.3, 0.5, 0.9])
    counts = cpl_counts(activation, torch.zeros(4, dtype=torch.int64), torch.tensor([0, 1, 1, 1]), 1)

    sure = (torch.arange(BINS) / BINS - 0.4).abs() > 0.15  # leaves out 0.3 and 0.5

    assert cpl_confusion(counts, 0.4, only=sure).tolist() == [[1, 0], [0, 1]]


def test_single_images_are_counted_where_their_values_lie() -> None:
    one = image_counts(torch.tensor(0.505), torch.tensor(0.81))  # distance (0.495 + 0.81) / 2 = 0.6525
    beyond = image_counts(torch.tensor(1.0), torch.tensor(9.0))  # beyond the last edges

    assert [row.nonzero().flatten().tolist() for row in one + beyond] == [[25, 50], [8, 50], [13, 50]]
