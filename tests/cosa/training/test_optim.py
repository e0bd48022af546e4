"""Parameter groups and the learning rate of every step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import AdamW

from cosa.config import OptimConfig
from cosa.networks.network import CosaNetwork, build_network
from cosa.training.optim import build_optimizer, clip_gradients, learning_rate_scale, set_learning_rate
from tests.cosa.networks.test_ema import TINY

SETTINGS = OptimConfig(lr=1e-3, head_lr_scale=10.0, weight_decay=0.02, beta1=0.8, beta2=0.95)


@pytest.fixture(scope="module")
def online() -> CosaNetwork:
    return build_network(TINY, classes=2, image_size=8)


@pytest.fixture
def optimizer(online: CosaNetwork) -> AdamW:
    return build_optimizer(online, SETTINGS)


def group_of(optimizer: AdamW, parameter: torch.nn.Parameter) -> dict[str, object]:
    (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return group


def test_every_weight_is_in_exactly_one_group(online: CosaNetwork, optimizer: AdamW) -> None:
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]

    assert sorted(grouped) == sorted(id(p) for p in online.parameters())


def test_heads_learn_faster_than_the_encoder_by_the_factor(online: CosaNetwork, optimizer: AdamW) -> None:
    heads = [*online.cam_head.parameters(), *online.aux_cam_head.parameters(), *online.decoder.parameters()]

    assert {group_of(optimizer, p)["peak_lr"] for p in heads} == {1e-2}
    assert {group_of(optimizer, p)["peak_lr"] for p in online.encoder.parameters()} == {1e-3}


def test_everything_decays(online: CosaNetwork, optimizer: AdamW) -> None:
    assert {group_of(optimizer, p)["weight_decay"] for p in online.parameters()} == {0.02}


def test_biases_and_norms_may_be_spared_the_decay(online: CosaNetwork) -> None:
    optimizer = build_optimizer(online, SETTINGS.replace(decay_vectors=False))
    decay = {name: group_of(optimizer, p)["weight_decay"] for name, p in online.named_parameters()}
    free = {name for name in decay if name.endswith(".bias") or ".norm" in name}

    assert {decay[name] for name in free} == {0.0}
    assert {decay[name] for name in decay.keys() - free} == {0.02}


def test_the_optimizer_has_the_betas_of_its_settings(optimizer: AdamW) -> None:
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}


def test_the_rate_rises_linearly_then_falls_to_nothing() -> None:
    settings = OptimConfig(lr_warmup=2, power=1.0)

    scales = [learning_rate_scale(step, 4, settings) for step in range(4)]

    assert scales == pytest.approx([0.5 * 1, 1 * 0.75, 0.5, 0.25])


def test_without_a_rise_the_first_step_has_the_peak() -> None:
    assert learning_rate_scale(0, 100, OptimConfig(lr_warmup=0)) == 1.0


def test_power_0_keeps_the_peak_to_the_end() -> None:
    assert learning_rate_scale(99, 100, OptimConfig(lr_warmup=0, power=0.0)) == 1.0


@given(
    iterations=st.integers(1, 500),
    settings=st.builds(OptimConfig, lr_warmup=st.integers(0, 600), power=st.floats(0, 4)),
)
def test_the_rate_lies_above_0_and_at_most_at_the_peak_and_falls_after_the_rise(
    iterations: int, settings: OptimConfig
) -> None:
    scales = [learning_rate_scale(step, iterations, settings) for step in range(iterations)]

    assert all(0 < scale <= 1 for scale in scales)
    after = scales[max(0, settings.lr_warmup - 1) :]
    assert after == sorted(after, reverse=True)


def test_every_group_is_scaled_from_its_peak_however_often(optimizer: AdamW) -> None:
    for scale in (0.5, 0.5, 0.1):
        set_learning_rate(optimizer, scale)

    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.1 * group["peak_lr"] for group in optimizer.param_groups])


def test_clipping_scales_the_whole_gradient_and_keeps_its_direction() -> None:
    layer = torch.nn.Linear(1, 2)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0], [0.0]]), torch.tensor([0.0, 4.0])

    clip_gradients(layer, 1.0)

    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6], [0.0]]), rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.bias.grad, torch.tensor([0.0, 0.8]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 6.0])
def test_a_gradient_within_the_norm_stays_as_it_is(max_norm: float) -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.grad = torch.tensor([[5.0]])

    clip_gradients(layer, max_norm)

    assert layer.weight.grad.tolist() == [[5.0]]
