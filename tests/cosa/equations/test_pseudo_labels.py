from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosa.equations.pseudo_labels import cam_pseudo_labels, keep_labelled, max_activation, seg_pseudo_labels
from cosa.structures import IGNORE

ALL = torch.ones(1, 1, 3, dtype=torch.bool)


def test_cpl_worked_out_by_hand() -> None:
    activation = torch.tensor([[[[0.9, 0.2, 0.1]], [[0.3, 0.5, 0.4]]]])

    cpl = cam_pseudo_labels(activation, 0.5, ALL)

    assert cpl.flatten().tolist() == [1, 2, 0]


def test_an_activation_at_the_threshold_is_foreground() -> None:
    activation = torch.full((1, 1, 1, 3), 0.5)

    assert cam_pseudo_labels(activation, torch.tensor(0.5), ALL).eq(1).all()


def test_a_band_leaves_unlabelled_what_lies_between_its_thresholds() -> None:
    activation = torch.tensor([[[[0.1, 0.2, 0.69, 0.7]], [[0.0, 0.1, 0.2, 0.9]]]])
    valid = torch.ones(1, 1, 4, dtype=torch.bool)

    cpl = cam_pseudo_labels(activation, 0.45, valid, (0.2, 0.7))

    assert cpl.flatten().tolist() == [0, IGNORE, IGNORE, 2]


def test_padding_gets_no_pseudo_label() -> None:
    valid = torch.tensor([[[True, False, True]]])

    cpl = cam_pseudo_labels(torch.ones(1, 2, 1, 3), 0.5, valid)

    assert cpl.flatten().tolist() == [1, IGNORE, 1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), low=st.floats(0.01, 0.98), step=st.floats(0, 0.5))
def test_a_higher_threshold_only_turns_foreground_into_background(seed: int, low: float, step: float) -> None:
    activation = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    valid = torch.ones(2, 4, 5, dtype=torch.bool)

    before = cam_pseudo_labels(activation, low, valid)
    after = cam_pseudo_labels(activation, low + step, valid)

    assert torch.where(after > 0, before == after, True).all()


def test_the_maximum_activation_is_taken_over_classes() -> None:
    activation = torch.tensor([[[[0.9, 0.2]], [[0.3, 0.5]]]])

    assert max_activation(activation).flatten().tolist() == pytest.approx([0.9, 0.5])


def test_spl_worked_out_by_hand() -> None:
    seg_logits = torch.tensor([1.0, 3.0, 2.0]).view(1, 3, 1, 1)
    labels = torch.tensor([[0.0, 1.0]])

    spl = seg_pseudo_labels(seg_logits, labels, tau=0.5)

    # over background and class 2: softmax of (1, 2) / 0.5, that is 1 / (1 + e^2)
    assert spl.flatten().tolist() == pytest.approx([0.119203, 0.0, 0.880797], abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), tau=st.floats(0.01, 10))
def test_spl_are_probabilities_over_the_classes_of_the_image(seed: int, tau: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    seg_logits = torch.randn(2, 4, 3, 3, generator=generator)
    labels = (torch.rand(2, 3, generator=generator) > 0.5).float()

    spl = seg_pseudo_labels(seg_logits, labels, tau)

    torch.testing.assert_close(spl.sum(1), torch.ones(2, 3, 3))
    assert (spl[:, 1:] * (1 - labels)[:, :, None, None]).eq(0).all()


def test_spl_do_not_change_when_all_scores_shift() -> None:
    seg_logits, labels = torch.randn(1, 3, 2, 2), torch.ones(1, 2)

    torch.testing.assert_close(
        seg_pseudo_labels(seg_logits + 5, labels, 0.3), seg_pseudo_labels(seg_logits, labels, 0.3)
    )


def test_an_image_without_labels_is_background() -> None:
    spl = seg_pseudo_labels(torch.randn(1, 3, 2, 2), torch.zeros(1, 2), 0.01)

    assert spl[:, 0].eq(1).all()


def test_filtering_scores_leaves_the_background_and_present_classes_alone() -> None:
    seg_logits = torch.tensor([1.0, 3.0, 2.0]).view(1, 3, 1, 1)

    kept = keep_labelled(seg_logits, torch.tensor([[0.0, 1.0]]))

    assert kept.flatten().tolist() == [1.0, -torch.inf, 2.0]
