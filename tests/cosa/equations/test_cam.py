from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosa.equations.cam import filter_by_labels, normalise, to_activation

ALL = torch.ones(1, 2, 2, dtype=torch.bool)


def random_maps(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_map_worked_out_by_hand() -> None:
    cam = torch.tensor([[[[-3.0, 1.0], [2.0, 4.0]], [[5.0, 1.0], [1.0, 1.0]]]])
    labels = torch.tensor([[1.0, 0.0]])

    activation = to_activation(cam, labels, ALL)

    torch.testing.assert_close(
        activation, torch.tensor([[[[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    )


def test_negative_activation_counts_as_none_before_the_scaling() -> None:
    cam = torch.tensor([[[[-100.0, 0.0], [1.0, 2.0]]]])

    activation = to_activation(cam, torch.ones(1, 1), ALL)

    assert activation.flatten().tolist() == [0.0, 0.0, 0.5, 1.0]


def test_a_class_that_the_image_lacks_has_no_activation() -> None:
    cam = torch.full((1, 2, 2, 2), 3.0)

    kept = filter_by_labels(cam, torch.tensor([[0.0, 1.0]]))

    assert kept[0, 0].eq(0).all()
    assert kept[0, 1].eq(3).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.01, 100), shift=st.floats(-100, 100))
def test_normalising_forgets_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    maps, valid = random_maps(seed), torch.ones(2, 4, 5, dtype=torch.bool)

    torch.testing.assert_close(
        normalise(maps * scale + shift, valid), normalise(maps, valid), atol=1e-9, rtol=1e-9
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_each_map_spans_zero_to_one_on_its_valid_pixels(seed: int) -> None:
    valid = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(seed)) > 0.3
    valid[:, 0, :2] = True  # two different values at least

    activation = normalise(random_maps(seed), valid)

    inside = activation[valid[:, None].expand_as(activation)].view(-1)
    assert inside.min() == 0
    assert activation.amax((-2, -1)).eq(1).all()
    assert activation.ge(0).all()


def test_padding_decides_no_range_and_ends_as_zero() -> None:
    cam = torch.tensor([[[[9.0, 1.0], [2.0, 3.0]]]])
    valid = torch.tensor([[[False, True], [True, True]]])

    assert normalise(cam, valid).flatten().tolist() == [0.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize("valid", [True, False])
def test_a_map_without_a_range_is_all_zero(valid: bool) -> None:
    constant = torch.full((1, 1, 2, 2), 7.0)

    assert normalise(constant, torch.full((1, 2, 2), valid)).eq(0).all()
