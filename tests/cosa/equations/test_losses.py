from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from cosa.equations.losses import (
    averaging_weights,
    c2s_loss,
    cls_loss,
    contrast_regions,
    csc_loss,
    label_counts,
    over_images,
    s2c_loss,
)
from cosa.structures import IGNORE
from tests.oracles.csc import slow_csc_loss

INF = math.inf


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Eq. (1)


def test_cls_worked_out_by_hand() -> None:
    cls_logits, labels = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[1.0, 0.0]])

    # -(log 1/2 + log 1/4) / 2
    assert cls_loss(cls_logits, labels).item() == pytest.approx(1.5 * math.log(2))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_cls_does_not_care_which_answer_is_called_yes(seed: int) -> None:
    cls_logits = torch.randn(3, 4, generator=generator(seed))
    labels = (torch.rand(3, 4, generator=generator(seed)) > 0.5).float()

    torch.testing.assert_close(cls_loss(cls_logits, labels), cls_loss(-cls_logits, 1 - labels))


def test_cls_stays_finite_where_the_network_is_certain_and_wrong() -> None:
    assert cls_loss(torch.tensor([[200.0]]), torch.zeros(1, 1)).item() == pytest.approx(200)


# Eq. (5)


def test_c2s_worked_out_by_hand() -> None:
    seg_logits = torch.zeros(1, 2, 1, 3)
    seg_logits[0, 1, 0, 0] = math.log(3)  # probability 3/4 of class 1
    cpl = torch.tensor([[[1, 0, IGNORE]]])
    raw = torch.tensor([[[0.5, 1.5, 0.0]]])

    expected = (0.5 * math.log(4 / 3) + 1.5 * math.log(2)) / 2
    assert c2s_loss(seg_logits.log_softmax(1), cpl, raw).item() == pytest.approx(expected)


def test_c2s_with_equal_weights_is_cross_entropy() -> None:
    seg_logits, cpl = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))

    torch.testing.assert_close(
        c2s_loss(seg_logits.log_softmax(1), cpl, torch.ones(2, 4, 4)), cross_entropy(seg_logits, cpl)
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), share=st.floats(0, 1))
def test_c2s_is_linear_in_the_weights(seed: int, share: float) -> None:
    seg_logits = torch.randn(1, 3, 4, 4, generator=generator(seed))
    cpl = torch.randint(0, 3, (1, 4, 4), generator=generator(seed))
    a, b = torch.rand(2, 1, 4, 4, generator=generator(seed))

    mixed = c2s_loss(seg_logits.log_softmax(1), cpl, share * a + (1 - share) * b)

    parts = share * c2s_loss(seg_logits.log_softmax(1), cpl, a) + (1 - share) * c2s_loss(
        seg_logits.log_softmax(1), cpl, b
    )
    torch.testing.assert_close(mixed, parts)


def slow_c2s(seg_logits: Tensor, cpl: Tensor, raw: Tensor, *, balanced: bool) -> float:
    """The mean of weighted cross-entropies over labelled pixels, or over each side and then over both."""
    log_probs = seg_logits.log_softmax(1)
    sides: dict[bool, list[float]] = {False: [], True: []}
    for b, i, j in (cpl != IGNORE).nonzero().tolist():
        label = int(cpl[b, i, j])
        sides[label > 0].append(-raw[b, i, j].item() * log_probs[b, label, i, j].item())
    if not balanced:
        every = sides[False] + sides[True]
        return sum(every) / len(every)
    return sum(sum(side) / len(side) for side in sides.values() if side) / 2


@pytest.mark.parametrize("balanced", [False, True])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_averages_of_c2s_agree_with_the_oracle(balanced: bool, seed: int) -> None:
    """Whatever is padding, within a band, or all on one side."""
    random = generator(seed)
    seg_logits, raw = torch.randn(2, 3, 4, 4, generator=random), torch.rand(2, 4, 4, generator=random)
    cpl = torch.tensor([0, 0, 1, 2, IGNORE])[torch.randint(0, 2 + seed % 4, (2, 4, 4), generator=random)]
    valid = (cpl != IGNORE) | (torch.rand(2, 4, 4, generator=random) > 0.5)

    weights = raw * averaging_weights(cpl, label_counts(cpl, valid), balanced=balanced)
    found = c2s_loss(seg_logits.log_softmax(1), cpl, weights, valid.sum().float())

    assert found.item() == pytest.approx(slow_c2s(seg_logits, cpl, raw, balanced=balanced), rel=1e-5)


def test_a_balanced_mean_worked_out_by_hand() -> None:
    cpl, valid = torch.tensor([[[0, 0, 0, 2, IGNORE]]]), torch.tensor([[[True] * 5]])

    found = averaging_weights(cpl, label_counts(cpl, valid), balanced=True)

    # 5 valid pixels: 5 / (2 * 3) for each of the background's, 5 / 2 for the one of the foreground
    torch.testing.assert_close(found, torch.tensor([[[5 / 6, 5 / 6, 5 / 6, 5 / 2, 0]]]))


def test_c2s_of_padding_alone_is_zero_and_teaches_nothing() -> None:
    seg_logits = torch.randn(1, 3, 2, 2, requires_grad=True)

    loss = c2s_loss(seg_logits.log_softmax(1), torch.full((1, 2, 2), IGNORE), torch.zeros(1, 2, 2))
    loss.backward()

    assert loss.item() == 0
    assert seg_logits.grad is not None
    assert seg_logits.grad.eq(0).all()


def shares_and_whole(valid: Tensor) -> tuple[list[slice], Tensor]:
    """Two shares of four images, and the mean number of counted pixels per share."""
    return [slice(0, 2), slice(2, 4)], valid.sum() / 2


def test_the_mean_of_c2s_over_shares_is_that_of_the_batch() -> None:
    seg_logits, raw = torch.randn(4, 3, 4, 4), torch.rand(4, 4, 4)
    cpl = torch.randint(0, 3, (4, 4, 4))
    cpl[0, :3] = IGNORE
    shares, pixels = shares_and_whole(cpl != IGNORE)

    means = torch.stack([c2s_loss(seg_logits[s].log_softmax(1), cpl[s], raw[s], pixels) for s in shares])

    torch.testing.assert_close(means.mean(), c2s_loss(seg_logits.log_softmax(1), cpl, raw))


# Eq. (8)


def every(cam: Tensor) -> Tensor:
    """All classes of `cam`, in order."""
    return torch.arange(cam.shape[1]).expand(cam.shape[:2])


def test_s2c_worked_out_by_hand() -> None:
    cam = torch.tensor([0.0, math.log(3)]).view(1, 2, 1, 1)
    spl = torch.tensor([0.5, 0.5, 0.0]).view(1, 3, 1, 1)

    # class 1: log 2 whatever its target; class 2: -log(1 - 3/4)
    expected = (math.log(2) + math.log(4)) / 2
    assert s2c_loss(cam, spl, every(cam), torch.ones(1, 1, 1, dtype=torch.bool)).item() == pytest.approx(
        expected
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_s2c_is_smallest_where_the_cam_says_what_the_spl_say(seed: int) -> None:
    spl = torch.rand(1, 4, 3, 3, generator=generator(seed)).clamp(0.01, 0.99)
    cam = spl[:, 1:].logit()
    valid = torch.ones(1, 3, 3, dtype=torch.bool)
    other = cam + 0.3 * torch.randn(1, 3, 3, 3, generator=generator(seed))

    assert s2c_loss(cam, spl, every(cam), valid) <= s2c_loss(other, spl, every(cam), valid)


def test_s2c_counts_valid_pixels_alone() -> None:
    cam, spl = torch.randn(1, 2, 2, 2), torch.rand(1, 3, 2, 2)
    valid = torch.tensor([[[True, False], [False, False]]])

    alone = s2c_loss(cam[..., :1, :1], spl[..., :1, :1], every(cam), valid[..., :1, :1])

    torch.testing.assert_close(s2c_loss(cam, spl, every(cam), valid), alone)


def test_s2c_of_padding_alone_is_zero() -> None:
    cam, nowhere = torch.randn(1, 2, 2, 2), torch.zeros(1, 2, 2) > 0

    assert s2c_loss(cam, torch.rand(1, 3, 2, 2), every(cam), nowhere).item() == 0


def test_s2c_guides_all_other_classes_towards_zero() -> None:
    cam, valid = torch.randn(2, 5, 4, 4, requires_grad=True), torch.rand(2, 4, 4) > 0.3
    classes = torch.tensor([[3, 1], [0, 4]])
    spl = torch.rand(2, 3, 4, 4)
    guide = torch.zeros(2, 5, 4, 4).scatter(1, classes[:, :, None, None].expand(-1, -1, 4, 4), spl[:, 1:])
    expected = binary_cross_entropy_with_logits(cam, guide, reduction="none").mean(1)[valid].mean()

    found = s2c_loss(cam, spl, classes, valid)

    torch.testing.assert_close(found, expected)
    (slope,), (expected_slope,) = (torch.autograd.grad(loss, cam) for loss in (found, expected))
    torch.testing.assert_close(slope, expected_slope)


def test_the_mean_of_s2c_over_shares_is_that_of_the_batch() -> None:
    cam, spl = torch.randn(4, 2, 3, 3), torch.rand(4, 3, 3, 3)
    valid = torch.rand(4, 3, 3) > 0.4
    shares, pixels = shares_and_whole(valid)

    means = torch.stack([s2c_loss(cam[s], spl[s], every(cam[s]), valid[s], pixels) for s in shares])

    torch.testing.assert_close(means.mean(), s2c_loss(cam, spl, every(cam), valid))


# One image at a time


def test_terms_made_of_one_image_at_a_time_have_the_sums_and_gradients_of_the_batch() -> None:
    maps = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, 8, 8, dtype=torch.float64)

    def terms(maps: Tensor, place: slice) -> list[Tensor]:
        large = interpolate(maps, size=(8, 8), mode="bilinear")
        return [(large.square() * weights[place]).sum(), large.sigmoid().sum()]

    found, expected = over_images(maps, terms), terms(maps, slice(None))

    torch.testing.assert_close(torch.stack(found), torch.stack(expected))
    for factors in ((1.0, 0.0), (0.3, 2.0)):
        objectives = [sum(f * t for f, t in zip(factors, some, strict=True)) for some in (found, expected)]
        slope, expected_slope = (torch.autograd.grad(o, maps, retain_graph=True)[0] for o in objectives)
        torch.testing.assert_close(slope, expected_slope)


# Eq. (9)


def test_regions_worked_out_by_hand() -> None:
    cpl = torch.tensor([[1, 1, 0, 1, IGNORE]])
    perplexity = torch.tensor([[0.5, 1.0, 0.5, 2.0, 0.5]])

    regions = contrast_regions(cpl, perplexity, epsilon=1.0)

    assert regions.anchor.tolist() == [[True, True, True, False, False]]
    assert regions.positive[0].nonzero().tolist() == [[0, 1], [1, 0]]
    assert regions.negative[0].nonzero().tolist() == [[0, 2], [1, 2], [2, 0], [2, 1]]


# Eq. (10)


def contrast(seed: int, *, classes: int = 3, side: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CAM, CPL, perplexity and keys of two images."""
    rng = generator(seed)
    cam = torch.randn(2, classes, side, side, generator=rng, dtype=torch.float64)
    cpl = torch.randint(0, classes + 1, (2, side, side), generator=rng)
    cpl[torch.rand(2, side, side, generator=rng) < 0.1] = IGNORE
    perplexity = 2 * torch.rand(2, side, side, generator=rng)
    return cam, cpl, perplexity, torch.rand(2, side, side, generator=rng)


def csc(
    parts: tuple[Tensor, Tensor, Tensor, Tensor], *, epsilon: float = 1.0, tau: float = 0.5, cap: int = 99
) -> Tensor:
    cam, cpl, perplexity, keys = parts
    return csc_loss(cam, cpl, perplexity, epsilon, tau, keys, cap)


def test_csc_worked_out_by_hand() -> None:
    # two like vectors of class 1, one orthogonal vector of the background
    cam = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]).view(1, 2, 1, 3)
    cpl, sure = torch.tensor([[[1, 1, 0]]]), torch.zeros(1, 1, 3)

    loss = csc((cam, cpl, sure, torch.rand(1, 1, 3)), tau=0.5)

    # two anchors with L = e^2 and K = e^0; the third has no positive
    assert loss.item() == pytest.approx(2 / 3 * math.log(1 + math.exp(-2)))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    epsilon=st.sampled_from([0.2, 1.0, INF]),
    tau=st.sampled_from([0.05, 0.5, 5.0]),
)
def test_csc_agrees_with_the_oracle(seed: int, epsilon: float, tau: float) -> None:
    parts = contrast(seed)

    loss = csc(parts, epsilon=epsilon, tau=tau)

    assert loss.item() == pytest.approx(slow_csc_loss(*parts[:3], epsilon, tau), rel=1e-6, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), cap=st.integers(2, 12))
def test_capped_csc_agrees_with_the_oracle_on_the_positions_of_the_largest_keys(seed: int, cap: int) -> None:
    cam, cpl, perplexity, keys = contrast(seed)
    sure = (perplexity <= 1) & (cpl != IGNORE)
    ranks = torch.where(sure, keys, -1.0).flatten(1).argsort(descending=True).argsort().view_as(keys)
    kept = torch.where(ranks < cap, perplexity, INF)

    loss = csc((cam, cpl, perplexity, keys), cap=cap)

    assert loss.item() == pytest.approx(slow_csc_loss(cam, cpl, kept, 1.0, 0.5), rel=1e-6, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 10))
def test_csc_sees_directions_and_not_lengths(seed: int, scale: float) -> None:
    cam, *rest = contrast(seed)

    torch.testing.assert_close(csc((cam, *rest)), csc((scale * cam, *rest)))


def test_csc_is_near_zero_where_classes_are_already_apart() -> None:
    cpl = torch.tensor([[[1, 1, 2, 2]]])
    cam = torch.tensor([[[[1.0, 1.0, -1.0, -1.0]], [[-1.0, -1.0, 1.0, 1.0]]]])

    assert csc((cam, cpl, torch.zeros(1, 1, 4), torch.rand(1, 1, 4)), tau=0.1).item() < 1e-7


@pytest.mark.parametrize(
    ("cpl", "perplexity"),
    [([1, 0, 1, 0], 9.0), ([IGNORE] * 4, 0.1), ([0, 1, 2, 3], 0.1), ([1, 1, 1, 1], 0.1)],
    ids=["empty Omega", "padding", "no positives", "no negatives"],
)
def test_csc_without_a_contrast_is_zero_with_a_finite_gradient(cpl: list[int], perplexity: float) -> None:
    cam = torch.randn(1, 3, 2, 2, requires_grad=True)

    loss = csc((cam, torch.tensor(cpl).view(1, 2, 2), torch.full((1, 2, 2), perplexity), torch.rand(1, 2, 2)))
    loss.backward()

    assert loss.item() == 0
    assert cam.grad is not None
    assert cam.grad.isfinite().all()


def test_an_image_without_sure_positions_adds_zero_to_the_mean() -> None:
    cam, cpl, perplexity, keys = contrast(0)
    perplexity[1] = 9.0

    one = csc((cam[:1], cpl[:1], perplexity[:1], keys[:1]))

    torch.testing.assert_close(csc((cam, cpl, perplexity, keys)), one / 2)


@pytest.mark.parametrize("tau", [0.5, 0.005])
def test_the_gradient_of_csc_is_right_and_finite(tau: float) -> None:
    cam, *rest = contrast(3)
    cam.requires_grad_()

    assert torch.autograd.gradcheck(lambda maps: csc((maps, *rest), tau=tau), (cam,))
