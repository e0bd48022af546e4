"""How AN follows ON."""

from __future__ import annotations

import pytest
import torch

from cosa.config import NetworkConfig
from cosa.networks.ema import assignment_of, follow
from cosa.networks.network import CosaNetwork, build_network

TINY = NetworkConfig(
    encoder="vit_tiny_patch16_224",
    pretrained=False,
    patch_size=4,
    width=16,
    depth=3,
    heads=2,
    drop_path=0.5,
    aux_block=-2,
    decoder_channels=4,
    decoder_dilation=1,
)


@pytest.fixture
def online() -> CosaNetwork:
    torch.manual_seed(0)
    return build_network(TINY, classes=2, image_size=8).train()


def learn_something(online: CosaNetwork) -> None:
    """Change every weight, as an optimiser would."""
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.add_(torch.randn_like(parameter))


def weights(network: CosaNetwork) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in network.named_parameters()}


def test_assignment_starts_equal_to_online(online: CosaNetwork) -> None:
    own = weights(online)

    copied = weights(assignment_of(online))

    assert own.keys() == copied.keys()
    assert all(torch.equal(own[name], copied[name]) for name in own)


def test_assignment_has_weights_of_its_own(online: CosaNetwork) -> None:
    assignment = assignment_of(online)
    before = weights(assignment)

    learn_something(online)

    assert all(torch.equal(before[name], now) for name, now in weights(assignment).items())


def test_assignment_is_in_evaluation_mode_and_leaves_online_in_training(online: CosaNetwork) -> None:
    assignment = assignment_of(online)

    assert not any(module.training for module in assignment.modules())
    assert all(module.training for module in online.modules())


def test_no_weight_of_assignment_asks_for_a_gradient(online: CosaNetwork) -> None:
    assignment = assignment_of(online)

    assert not any(parameter.requires_grad for parameter in assignment.parameters())
    assert all(parameter.requires_grad for parameter in online.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.9994, 1.0])
def test_assignment_is_the_moving_average_of_all_that_online_was(
    online: CosaNetwork, momentum: float
) -> None:
    assignment = assignment_of(online)
    history = [weights(online)]
    for _ in range(4):
        learn_something(online)
        follow(assignment, online, momentum)
        history.append(weights(online))

    for name, found in weights(assignment).items():
        expected = history[0][name].double()
        for past in history[1:]:
            expected = momentum * expected + (1 - momentum) * past[name].double()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


def test_momentum_0_copies_online_bit_for_bit(online: CosaNetwork) -> None:
    assignment = assignment_of(online)
    learn_something(online)

    follow(assignment, online, 0.0)

    own = weights(online)
    assert all(torch.equal(own[name], now) for name, now in weights(assignment).items())


def test_momentum_1_leaves_assignment_as_it_is_bit_for_bit(online: CosaNetwork) -> None:
    assignment = assignment_of(online)
    before = weights(assignment)
    learn_something(online)

    follow(assignment, online, 1.0)

    assert all(torch.equal(before[name], now) for name, now in weights(assignment).items())


def test_following_changes_nothing_in_online(online: CosaNetwork) -> None:
    assignment = assignment_of(online)
    learn_something(online)
    before = weights(online)

    follow(assignment, online, 0.3)

    assert all(torch.equal(before[name], now) for name, now in weights(online).items())


def test_everything_a_network_knows_is_in_the_weights_that_are_averaged(online: CosaNetwork) -> None:
    assert online.state_dict().keys() == dict(online.named_parameters()).keys()
