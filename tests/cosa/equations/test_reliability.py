from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosa.equations.reliability import perplexity, reliability_sum, reliability_weights

XI = st.floats(0.05, 0.95)


def activations(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, 1, -1)


def own_weights(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    total, count = reliability_sum(values, valid)
    return reliability_weights(values, valid, total / count.clamp(min=1))


def test_perplexity_worked_out_by_hand() -> None:
    found = perplexity(activations(0.7, 1.0, 0.1, 0.0), 0.4, alpha=0.8, beta=2.0)

    # distances 0.3 / 0.6, 1, 0.3 / 0.4, 1
    expected = [math.log(0.8 * d) ** 2 for d in (0.5, 1.0, 0.75, 1.0)]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(xi=XI, near=st.floats(0.02, 1), step=st.floats(0.01, 0.9))
def test_perplexity_falls_with_the_distance_from_the_threshold(xi: float, near: float, step: float) -> None:
    far = min(1.0, near + step)
    above = perplexity(activations(xi + near * (1 - xi), xi + far * (1 - xi)), xi, 0.8, 1.0)
    below = perplexity(activations(xi - near * xi, xi - far * xi), xi, 0.8, 1.0)

    assert above[0, 0, 0] >= above[0, 0, 1]
    assert below[0, 0, 0] >= below[0, 0, 1]


@settings(max_examples=25, deadline=None)
@given(xi=XI, distance=st.floats(0.05, 1))
def test_equal_distances_on_both_sides_are_equally_perplexing(xi: float, distance: float) -> None:
    found = perplexity(activations(xi + distance * (1 - xi), xi - distance * xi), xi, 0.8, 1.0)

    assert found[0, 0, 0].item() == pytest.approx(found[0, 0, 1].item(), rel=1e-3)


@settings(max_examples=25, deadline=None)
@given(nu=st.floats(0, 1, width=32), xi=XI)
def test_alpha_sets_the_smallest_perplexity(nu: float, xi: float) -> None:
    assert perplexity(activations(nu), xi, 0.8, 1.0).item() >= -math.log(0.8) - 1e-6


@pytest.mark.parametrize("xi", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("alpha", [0.8, 1.0])
def test_perplexity_and_weights_are_finite_for_every_threshold(xi: float, alpha: float) -> None:
    nu = activations(0.0, 0.3, 1.0)

    found = perplexity(nu, torch.tensor(xi), alpha, 1.0)

    assert found.isfinite().all()
    assert own_weights(found, torch.ones_like(nu, dtype=torch.bool)).isfinite().all()


def test_raw_worked_out_by_hand() -> None:
    weights = own_weights(activations(1.0, 2.0, 4.0), torch.ones(1, 1, 3, dtype=torch.bool))

    # reliabilities 1, 1/2, 1/4 over their mean 7/12
    assert weights.flatten().tolist() == pytest.approx([12 / 7, 6 / 7, 3 / 7])


def test_padding_weighs_nothing_and_does_not_enter_the_mean() -> None:
    valid = torch.tensor([[[True, True, False]]])

    assert own_weights(activations(1.0, 3.0, 0.1), valid).flatten().tolist() == pytest.approx([1.5, 0.5, 0.0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_weights_have_mean_one_over_valid_pixels(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = 0.2 + 5 * torch.rand(2, 4, 5, generator=generator)
    valid = torch.rand(2, 4, 5, generator=generator) > 0.4
    valid[0, 0, 0] = True

    weights = own_weights(values, valid)

    assert weights[valid].mean().item() == pytest.approx(1, abs=1e-5)


def test_shares_of_a_batch_weigh_as_the_whole() -> None:
    values = 0.2 + torch.rand(4, 3, 3)
    valid = torch.rand(4, 3, 3) > 0.2
    total, count = reliability_sum(values[:1], valid[:1]) + reliability_sum(values[1:], valid[1:])

    shares = [reliability_weights(values[s], valid[s], total / count) for s in (slice(0, 1), slice(1, 4))]

    torch.testing.assert_close(torch.cat(shares), own_weights(values, valid))


def test_a_batch_of_padding_has_no_weights() -> None:
    assert own_weights(torch.ones(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool)).eq(0).all()
