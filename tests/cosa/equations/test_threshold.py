from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from cosa.equations.threshold import (
    BINS,
    DynamicThreshold,
    FixedThreshold,
    GaussianPair,
    activation_bin,
    activation_histogram,
    fit_two_gaussians,
    make_threshold,
    search_threshold,
)
from tests.oracles.threshold import slow_search

CPU = torch.device("cpu")
FALLBACK = torch.tensor(0.45)
EVERYTHING = -1.0

histograms = st.lists(st.integers(0, 50), min_size=20, max_size=20).map(torch.tensor)
cuts = st.sampled_from([EVERYTHING, 0.0, 0.05, 0.3])


def centres(histogram: torch.Tensor) -> list[float]:
    """One activation per count, in the middle of its bin."""
    bins = len(histogram)
    return [(i + 0.5) / bins for i, count in enumerate(histogram.tolist()) for _ in range(count)]


def histogram_of(samples: np.ndarray) -> torch.Tensor:
    nu = torch.from_numpy(samples).view(1, 1, -1)
    return activation_histogram(nu, torch.ones_like(nu, dtype=torch.bool))


def two_clusters(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    samples = np.concatenate([rng.normal(0.25, 0.06, 6000), rng.normal(0.7, 0.1, 3000)])
    return samples.clip(0, 1)


def test_histogram_worked_out_by_hand() -> None:
    nu = torch.tensor([[[0.0, 0.24, 0.25, 0.5, 0.99, 1.0]]])
    valid = torch.tensor([[[True, True, True, False, True, True]]])

    assert activation_histogram(nu, valid, bins=4).tolist() == [2, 1, 0, 2]


def test_an_activation_on_an_edge_lies_in_the_bin_above() -> None:
    edges = torch.tensor([i / BINS for i in range(BINS)])

    assert activation_bin(edges).tolist() == list(range(BINS))


def test_histograms_of_shares_add_up_to_that_of_the_batch() -> None:
    nu, valid = torch.rand(4, 8, 8), torch.rand(4, 8, 8) > 0.2

    shares = activation_histogram(nu[:1], valid[:1]) + activation_histogram(nu[1:], valid[1:])

    assert torch.equal(shares, activation_histogram(nu, valid))


def test_the_fit_agrees_with_scikit_learn_on_the_same_samples() -> None:
    samples = two_clusters()
    reference = GaussianMixture(2, random_state=0, tol=1e-9, max_iter=1000).fit(samples[:, None])
    order = reference.means_[:, 0].argsort()

    pair = fit_two_gaussians(histogram_of(samples), EVERYTHING)

    np.testing.assert_allclose(pair.pi, reference.weights_[order], atol=0.005)
    np.testing.assert_allclose(pair.mu, reference.means_[order, 0], atol=1 / BINS)
    np.testing.assert_allclose(pair.var.sqrt(), reference.covariances_[order, 0, 0] ** 0.5, atol=1 / BINS)


def test_the_fit_has_converged_on_clusters_that_run_into_each_other() -> None:
    rng = np.random.default_rng(0)
    samples = np.concatenate([rng.beta(1, 6, 6000), rng.beta(4, 2, 3000)])
    reference = GaussianMixture(2, random_state=0, tol=1e-9, max_iter=1000).fit(samples[:, None])

    pair = fit_two_gaussians(histogram_of(samples), EVERYTHING)

    np.testing.assert_allclose(pair.mu, np.sort(reference.means_[:, 0]), atol=1 / BINS)


def test_the_fit_agrees_with_scikit_learn_without_the_lowest_activations() -> None:
    samples = np.concatenate([np.zeros(20_000), two_clusters()])
    kept = samples[samples > 0.05]
    reference = GaussianMixture(2, random_state=0, tol=1e-9, max_iter=1000).fit(kept[:, None])

    pair = fit_two_gaussians(histogram_of(samples), 0.05)

    np.testing.assert_allclose(pair.mu, np.sort(reference.means_[:, 0]), atol=1 / BINS)


@settings(max_examples=25, deadline=None)
@given(histogram=histograms, cut=cuts)
def test_the_fit_is_finite_and_in_order_for_every_histogram(histogram: torch.Tensor, cut: float) -> None:
    pair = fit_two_gaussians(histogram, cut)

    assert all(part.isfinite().all() for part in (pair.pi.log(), pair.mu, pair.var))
    assert pair.mu[0] <= pair.mu[1]
    assert pair.pi.sum().item() == pytest.approx(1)
    assert pair.var.min() >= 1 / 20**2 - 1e-12


@settings(max_examples=25, deadline=None)
@given(histogram=histograms)
def test_the_number_of_images_does_not_change_the_fit(histogram: torch.Tensor) -> None:
    once, twice = (fit_two_gaussians(histogram * n, EVERYTHING) for n in (1, 2))

    torch.testing.assert_close(once.mu, twice.mu)


@settings(max_examples=25, deadline=None)
@given(
    histogram=histograms.filter(lambda h: (h > 0).sum() >= 2),
    pi=st.floats(0.1, 0.9),
    mu=st.tuples(st.floats(0.0, 0.4), st.floats(0.5, 1.0)),
    var=st.tuples(st.floats(0.003, 0.1), st.floats(0.003, 0.1)),
)
def test_the_search_finds_the_most_likely_edge_of_the_oracle(
    histogram: torch.Tensor, pi: float, mu: tuple[float, float], var: tuple[float, float]
) -> None:
    as_tensor = [torch.tensor(v, dtype=torch.float64) for v in ((1 - pi, pi), mu, var)]

    xi = search_threshold(histogram, GaussianPair(*as_tensor), EVERYTHING, FALLBACK)

    background, foreground = zip(*(t.tolist() for t in as_tensor), strict=True)
    candidates = [i / 20 for i in range(1, 20)]
    expected = slow_search(centres(histogram), background, foreground, candidates)
    # an edge in an empty stretch splits the activations exactly as its neighbours do
    lower, upper = sorted((round(xi.item() * 20), round(expected * 20)))
    assert histogram[lower:upper].sum() == 0


@settings(max_examples=25, deadline=None)
@given(histogram=histograms, cut=cuts)
def test_a_threshold_is_an_inner_edge_above_the_cut_or_the_fallback(
    histogram: torch.Tensor, cut: float
) -> None:
    xi = search_threshold(histogram, fit_two_gaussians(histogram, cut), cut, FALLBACK).item()

    edges = [i / 20 for i in range(1, 20) if i / 20 > cut]
    assert any(abs(xi - value) < 1e-6 for value in [*edges, FALLBACK.item()])


def test_two_clusters_are_split_between_their_means() -> None:
    histogram = histogram_of(two_clusters())

    xi = search_threshold(histogram, fit_two_gaussians(histogram, EVERYTHING), EVERYTHING, FALLBACK)

    assert 0.35 < xi.item() < 0.55


def test_a_threshold_lies_above_the_cut_even_where_all_is_foreground() -> None:
    histogram = torch.zeros(20, dtype=torch.int64)
    histogram[10:] = 5
    foreground_everywhere = GaussianPair(
        pi=torch.tensor([0.01, 0.99]), mu=torch.tensor([0.0, 0.7]), var=torch.tensor([0.01, 0.05])
    )

    xi = search_threshold(histogram, foreground_everywhere, 0.3, FALLBACK)

    assert xi.item() == pytest.approx(0.35)


@pytest.mark.parametrize("filled", [[], [7]], ids=["empty", "constant"])
def test_a_queue_with_nothing_to_split_falls_back(filled: list[int]) -> None:
    histogram = torch.zeros(20, dtype=torch.int64)
    histogram[filled] = 100

    xi = search_threshold(histogram, fit_two_gaussians(histogram, EVERYTHING), EVERYTHING, FALLBACK)

    assert xi == FALLBACK


def test_activations_up_to_the_cut_move_nothing() -> None:
    with_zeros = histogram_of(np.concatenate([np.zeros(50_000), two_clusters()]))
    without = histogram_of(two_clusters())
    found = [search_threshold(h, fit_two_gaussians(h, 0.0), 0.0, FALLBACK) for h in (with_zeros, without)]

    assert found[0] == found[1]


def test_the_dynamic_threshold_leaves_its_start_smoothly() -> None:
    histogram = histogram_of(two_clusters())
    threshold = DynamicThreshold(0.9, queue=4, min_activation=EVERYTHING, min_std=0.0, device=CPU)
    fit = search_threshold(histogram, fit_two_gaussians(histogram, EVERYTHING), EVERYTHING, FALLBACK).item()

    way = [threshold.value.item()]
    for _ in range(5):
        threshold.update(histogram)
        way.append(threshold.value.item())

    expected = [w * fit + (1 - w) * 0.9 for w in (0, 0.25, 0.5, 0.75, 1, 1)]
    assert way == pytest.approx(expected)


def test_the_dynamic_threshold_knows_the_last_batches_and_no_older_ones() -> None:
    batches = [histogram_of(two_clusters(seed) * scale) for seed, scale in enumerate((1, 1, 0.9, 0.7, 0.5))]
    threshold = DynamicThreshold(0.45, queue=3, min_activation=0.05, min_std=0.0, device=CPU)

    for histogram in batches:
        threshold.update(histogram)

    last = batches[2] + batches[3] + batches[4]
    assert threshold.value == search_threshold(last, fit_two_gaussians(last, 0.05), 0.05, FALLBACK)


def test_a_restored_threshold_goes_on_as_if_nothing_had_happened() -> None:
    batches = [histogram_of(two_clusters(seed)[seed::7]) for seed in range(8)]
    undisturbed = DynamicThreshold(0.45, queue=5, min_activation=0.05, min_std=0.0, device=CPU)
    for histogram in batches[:6]:
        undisturbed.update(histogram)
    restored = DynamicThreshold(0.45, queue=5, min_activation=0.05, min_std=0.0, device=CPU)
    restored.load_state_dict(undisturbed.state_dict())

    values = []
    for threshold in (undisturbed, restored):
        values.append([threshold.value.item()])
        for histogram in batches[6:]:
            threshold.update(histogram)
            values[-1].append(threshold.value.item())

    assert values[0] == values[1]


def test_a_saved_state_does_not_move_with_the_threshold() -> None:
    threshold = DynamicThreshold(0.45, queue=2, min_activation=0.05, min_std=0.0, device=CPU)
    state = threshold.state_dict()

    threshold.update(histogram_of(two_clusters()))

    assert state["queue"].sum() == 0


def test_a_queue_of_another_length_is_refused() -> None:
    state = DynamicThreshold(0.45, queue=2, min_activation=0.05, min_std=0.0, device=CPU).state_dict()

    with pytest.raises(ValueError, match=r"threshold.queue must be that of the checkpoint, 2, got 3"):
        DynamicThreshold(0.45, queue=3, min_activation=0.05, min_std=0.0, device=CPU).load_state_dict(state)


def test_a_fixed_threshold_stays_where_it_is() -> None:
    threshold = make_threshold("fixed", 0.3, 100, 0.05, 0.0, CPU)

    threshold.update(histogram_of(two_clusters()))
    threshold.load_state_dict(threshold.state_dict())

    assert threshold.value.item() == pytest.approx(0.3)


@pytest.mark.parametrize(("mode", "kind"), [("fixed", FixedThreshold), ("dynamic", DynamicThreshold)])
def test_the_mode_names_the_threshold(mode: str, kind: type) -> None:
    assert isinstance(make_threshold(mode, 0.45, 10, 0.05, 0.0, CPU), kind)
