from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosa.networks.multiscale import multiscale, resize
from cosa.structures import FusedOutput, NetworkOutput
from tests.oracles.network import ColourNetwork


class LeftNetwork(ColourNetwork):
    """Not flip-equivariant: activates the left half of whatever it sees."""

    def forward(self, images: Tensor, *, segment: bool = True) -> NetworkOutput:
        output = super().forward(images, segment=segment)
        left = torch.zeros_like(output.cam)
        left[..., : left.shape[-1] // 2] = 1
        return NetworkOutput(
            cls_logits=output.cls_logits,
            aux_cls_logits=output.aux_cls_logits,
            cam=left,
            aux_cam=left,
            seg_logits=torch.cat([left, left[:, :1]], dim=1),
        )


def images(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(seed))


def fuse(network: ColourNetwork, *scales: float, flip: bool = False, seed: int = 0) -> FusedOutput:
    return multiscale(network, images(seed), scales=scales, flip=flip, size=(16, 24))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_flipping_changes_nothing_for_a_flip_equivariant_network(seed: int) -> None:
    plain, flipped = (fuse(ColourNetwork(seed), 1.0, 0.5, flip=flip, seed=seed) for flip in (False, True))

    for name, value in vars(plain).items():
        torch.testing.assert_close(getattr(flipped, name), value, msg=name)


def test_mirrored_maps_are_mirrored_back() -> None:
    fused = fuse(LeftNetwork(), 1.0, flip=True)

    # the left half of each view covers both halves of the image: wholly by maximum, by half in the mean
    assert fused.cam[..., [0, 1, 22, 23]].eq(1).all()
    torch.testing.assert_close(fused.seg_logits, torch.full_like(fused.seg_logits, 0.5))


def test_cams_are_fused_by_maximum_after_resizing() -> None:
    network = ColourNetwork()
    parts = [fuse(network, scale) for scale in (1.0, 0.5, 1.5)]

    fused = fuse(network, 1.0, 0.5, 1.5)

    torch.testing.assert_close(fused.cam, torch.stack([p.cam for p in parts]).amax(0))
    torch.testing.assert_close(fused.aux_cam, torch.stack([p.aux_cam for p in parts]).amax(0))


def test_the_authors_fusion_is_the_sum_of_positive_parts_and_the_last_scale_of_m_dagger() -> None:
    """Both flips of a scale by maximum, first."""
    network = ColourNetwork()
    parts = [fuse(network, scale, flip=True) for scale in (1.0, 0.5, 1.5)]

    found = multiscale(
        network,
        images(),
        scales=(1.0, 0.5, 1.5),
        flip=True,
        size=(16, 24),
        fusion="sum",
        aux_fusion="last",
    )

    torch.testing.assert_close(found.cam.relu(), sum(part.cam.relu() for part in parts))
    assert torch.equal(found.aux_cam, parts[2].aux_cam)
    assert torch.equal(found.seg_logits, fuse(network, 1.0, 0.5, 1.5, flip=True).seg_logits)


def test_logits_are_fused_by_mean() -> None:
    network = ColourNetwork()
    parts = [fuse(network, scale) for scale in (1.0, 0.5, 1.5)]

    fused = fuse(network, 1.0, 0.5, 1.5)

    for name in ("seg_logits", "cls_logits", "aux_cls_logits"):
        mean = torch.stack([getattr(part, name) for part in parts]).mean(0)
        torch.testing.assert_close(getattr(fused, name), mean, msg=name)


def test_one_scale_is_the_network_itself_in_another_resolution() -> None:
    network = ColourNetwork()
    output = network(images())

    torch.testing.assert_close(fuse(network, 1.0).cam, resize(output.cam, (16, 24)))


def test_scaled_sides_are_whole_patches_and_at_least_one() -> None:
    network = ColourNetwork()

    fuse(network, 1.0, 0.7, 0.05)

    assert network.sizes == [(16, 24), (12, 16), (4, 4)]


@pytest.mark.parametrize("flip", [False, True])
def test_each_scale_is_seen_once_or_in_both_directions(flip: bool) -> None:
    network = ColourNetwork()

    fuse(network, 1.0, 0.5, flip=flip)

    assert len(network.sizes) == (4 if flip else 2)


def test_maps_come_in_the_size_that_is_asked_for() -> None:
    output = ColourNetwork()(images())
    fused = multiscale(ColourNetwork(), images(), scales=(1.0,), flip=False, size=(7, 9))

    torch.testing.assert_close(fused.seg_logits, resize(output.seg_logits, (7, 9)))
