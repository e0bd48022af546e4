"""The swap: what AN assigns, which term of Eq. 11 it reaches, and where gradients go."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from cosa.config import Config, override
from cosa.equations.cam import to_activation
from cosa.equations.pseudo_labels import cam_pseudo_labels, seg_pseudo_labels
from cosa.equations.threshold import activation_histogram
from cosa.networks.multiscale import multiscale
from cosa.networks.network import CosaNetwork, build_network
from cosa.structures import IGNORE, Assignment, Batch, CamTargets, NetworkOutput
from cosa.training.step import build_state
from cosa.training.swap import Thresholds, assign, learn, middles, objective

CLASSES, IMAGE, PATCH = 3, 16, 4
CPU = torch.device("cpu")
SETTINGS = override(
    Config(),
    {
        "data.crop_size": IMAGE,
        "network.encoder": "vit_tiny_patch16_224",
        "network.pretrained": False,
        "network.patch_size": PATCH,
        "network.width": 16,
        "network.depth": 3,
        "network.heads": 2,
        "network.aux_block": -2,
        "network.decoder_channels": 4,
        "network.decoder_dilation": 1,
        "cam.scales": (1.0,),
        "cam.stride": 2,
        "threshold.mode": "fixed",
        "threshold.xi": 0.4,
        "threshold.queue": 3,
        "csc.epsilon": math.inf,
        "csc.max_anchors": 16,
        "train.batch_size": 4,
    },
)
TERMS = ("cls", "aux_cls", "c2s", "aux_c2s", "s2c", "csc")


def settings(changes: Mapping[str, Any]) -> Config:
    return override(SETTINGS, changes)


@pytest.fixture(scope="module")
def network() -> CosaNetwork:
    torch.manual_seed(2)
    return build_network(SETTINGS.network, CLASSES, IMAGE).eval()


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Four images with one or two classes; two of them are padded, one of these by whole patches."""
    random = torch.Generator().manual_seed(1)
    valid = torch.ones(4, IMAGE, IMAGE, dtype=torch.bool)
    valid[1, 8:], valid[2, :, :3] = False, False
    return Batch(
        weak=torch.randn(4, 3, IMAGE, IMAGE, generator=random),
        strong=torch.randn(4, 3, IMAGE, IMAGE, generator=random),
        labels=torch.tensor([[1.0, 0, 0], [0, 1, 1], [1, 0, 1], [0, 1, 0]]),
        valid=valid,
    )


def alone(tensor: Tensor) -> Tensor:
    return tensor


def thresholds(config: Config) -> Thresholds:
    """Those of a run at its beginning."""
    return build_state(config, CLASSES, CPU).thresholds


def assigned(network: CosaNetwork, batch: Batch, config: Config = SETTINGS) -> Assignment:
    return assign(network, batch, thresholds(config), config, alone)


def keys_for(batch: Batch) -> Tensor:
    side = IMAGE // PATCH
    return torch.rand(len(batch.labels), side, side, generator=torch.Generator().manual_seed(2))


def output_of(batch: Batch) -> NetworkOutput:
    """An output of ON that is its own leaf, so that gradients show where each term reaches."""
    random = torch.Generator().manual_seed(4)
    count, side = len(batch.labels), IMAGE // PATCH
    sizes = {
        "cls_logits": (count, CLASSES),
        "aux_cls_logits": (count, CLASSES),
        "cam": (count, CLASSES, side, side),
        "aux_cam": (count, CLASSES, side, side),
        "seg_logits": (count, CLASSES + 1, side, side),
    }
    return NetworkOutput(
        **{name: torch.randn(size, generator=random).requires_grad_() for name, size in sizes.items()}
    )


def learned(output: NetworkOutput, batch: Batch, target: Assignment, config: Config = SETTINGS) -> Any:
    return learn(output, batch, target, config, keys=keys_for(batch))


# What is assigned


def test_cpl_and_spl_are_those_of_the_fused_weak_view(network: CosaNetwork, batch: Batch) -> None:
    config = settings({"cam.scales": (1.0, 0.5), "cam.flip": True})

    found = assigned(network, batch, config)

    with torch.no_grad():
        fused = multiscale(network, batch.weak, scales=(1.0, 0.5), flip=True, size=(8, 8))
    valid = batch.valid[:, 1::2, 1::2]
    for cam, targets in ((fused.cam, found.cam), (fused.aux_cam, found.aux_cam)):
        activation = to_activation(cam, batch.labels, valid)
        assert torch.equal(targets.activation, activation.amax(1))
        assert torch.equal(targets.cpl, cam_pseudo_labels(activation, torch.tensor(0.4), valid))
    spl = seg_pseudo_labels(fused.seg_logits, batch.labels, config.s2c.tau)
    assert torch.equal(over_all_classes(found), spl)


def over_all_classes(found: Assignment) -> Tensor:
    """The SPL with a channel for each class, 0 where they have none."""
    full = torch.zeros(len(found.spl), CLASSES + 1, *found.spl.shape[2:])
    full[:, 0] = found.spl[:, 0]
    for i, present in enumerate(found.present.tolist()):
        full[i, [c + 1 for c in present]] = found.spl[i, 1:]
    return full


def test_maps_are_made_of_the_classes_an_image_holds_alone(network: CosaNetwork, batch: Batch) -> None:
    found = assigned(network, batch)

    assert found.present.tolist() == [[0, 1], [1, 2], [0, 2], [1, 0]]  # filled up where an image holds one
    assert found.spl.shape[1] == 3


def test_no_class_is_assigned_that_the_image_does_not_hold(network: CosaNetwork, batch: Batch) -> None:
    found = assigned(network, batch)

    for i, labels in enumerate(batch.labels):
        absent = [c + 1 for c in range(CLASSES) if not labels[c]]
        assert not torch.isin(found.cam.cpl[i], torch.tensor(absent)).any()
        assert over_all_classes(found)[i, absent].max() == 0


def test_padding_is_ignored_and_weighs_nothing(network: CosaNetwork, batch: Batch) -> None:
    found = assigned(network, batch)

    padding = ~batch.valid[:, 1::2, 1::2]
    assert padding.any()
    for targets in (found.cam, found.aux_cam):
        assert torch.equal(targets.cpl == IGNORE, padding)
        assert targets.raw[padding].max() == 0


def test_weights_have_mean_1_over_the_batch(network: CosaNetwork, batch: Batch) -> None:
    found = assigned(network, batch)

    valid = batch.valid[:, 1::2, 1::2]
    for targets in (found.cam, found.aux_cam):
        assert targets.raw[valid].mean().item() == pytest.approx(1, abs=1e-5)
        assert targets.raw[valid].std() > 0.1


def test_without_raw_every_pixel_weighs_the_same(network: CosaNetwork, batch: Batch) -> None:
    found = assigned(network, batch, settings({"raw.enabled": False}))

    assert torch.equal(found.cam.raw, batch.valid[:, 1::2, 1::2].float())


def test_each_cam_has_a_band_of_its_own_whose_pixels_weigh_nothing(
    network: CosaNetwork, batch: Batch
) -> None:
    bands = {"threshold.band": (0.3, 0.5), "threshold.aux_band": (0.2, 0.9)}

    found = assigned(network, batch, settings(bands))

    plain, valid = assigned(network, batch), batch.valid[:, 1::2, 1::2]
    for targets, before, (low, high) in (
        (found.cam, plain.cam, (0.3, 0.5)),
        (found.aux_cam, plain.aux_cam, (0.2, 0.9)),
    ):
        unsure = (targets.activation >= low) & (targets.activation < high)
        assert (unsure & valid).any()
        assert torch.equal(targets.cpl, torch.where(unsure, IGNORE, before.cpl))
        assert torch.equal(targets.raw == 0, unsure | ~valid)
        assert targets.raw[valid].mean().item() == pytest.approx(1, abs=1e-5)
    only = assigned(network, batch, settings({"threshold.band": (0.3, 0.5)}))
    assert torch.equal(
        only.aux_cam.cpl == IGNORE,
        (only.aux_cam.activation >= 0.3) & (only.aux_cam.activation < 0.5) | ~valid,
    )


def test_balanced_sides_weigh_the_same_however_large(network: CosaNetwork, batch: Batch) -> None:
    found = assigned(network, batch, settings({"raw.enabled": False, "c2s.average": "balanced"})).cam

    background, foreground = (
        found.raw[side].sum().item() for side in (found.cpl == 0, (found.cpl > 0) & (found.cpl != IGNORE))
    )
    assert (found.cpl == 0).sum() != ((found.cpl > 0) & (found.cpl != IGNORE)).sum()
    assert background == pytest.approx(foreground, rel=1e-5)
    assert background + foreground == pytest.approx(batch.valid[:, 1::2, 1::2].sum().item(), rel=1e-5)


def test_each_cam_has_a_threshold_of_its_own_that_takes_in_the_batch_once(
    network: CosaNetwork, batch: Batch
) -> None:
    config = settings({"threshold.mode": "dynamic"})
    both = thresholds(config)

    found = assign(network, batch, both, config, alone)

    valid = batch.valid[:, 1::2, 1::2]
    for targets, threshold in ((found.cam, both.cam), (found.aux_cam, both.aux_cam)):
        expected = thresholds(config).cam
        expected.update(activation_histogram(targets.activation, valid))
        state, expected_state = threshold.state_dict(), expected.state_dict()
        assert all(torch.equal(state[name], expected_state[name]) for name in expected_state)
    assert not torch.equal(both.cam.state_dict()["queue"], both.aux_cam.state_dict()["queue"])


@pytest.mark.parametrize(
    "changes",
    [{"threshold.mode": "dynamic"}, {"threshold.band": (0.3, 0.5), "c2s.average": "balanced"}],
    ids=["paper", "authors"],
)
def test_two_workers_assign_what_one_with_the_whole_batch_assigns(
    network: CosaNetwork, batch: Batch, changes: dict[str, Any]
) -> None:
    config = settings(changes)
    barrier, told = threading.Barrier(2, timeout=60), [torch.zeros(0)] * 2

    def worker(rank: int) -> Assignment:
        def total(tensor: Tensor) -> Tensor:
            told[rank] = tensor
            barrier.wait()
            summed = told[0] + told[1]
            barrier.wait()
            return summed

        share = slice(2 * rank, 2 * rank + 2)
        half = Batch(**{name: t[share] for name, t in vars(batch).items() if t is not None})
        return assign(network, half, thresholds(config), config, total)

    with ThreadPoolExecutor(2) as pool:
        halves = [*pool.map(worker, range(2))]

    whole = assigned(network, batch, config)
    for head in ("cam", "aux_cam"):
        expected = getattr(whole, head)
        for name, value in vars(expected).items():
            found = torch.cat([getattr(getattr(half, head), name) for half in halves])
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5, msg=f"{head}.{name}")
    torch.testing.assert_close(torch.cat([half.spl for half in halves]), whole.spl)


def test_micro_batches_assign_what_the_whole_batch_assigns(network: CosaNetwork, batch: Batch) -> None:
    config = settings({"threshold.mode": "dynamic"})

    parts = assigned(network, batch, override(config, {"train.accumulate": 2}))

    whole = assigned(network, batch, config)
    torch.testing.assert_close(parts.cam.raw, whole.cam.raw, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts.spl, whole.spl)
    assert torch.equal(parts.aux_cam.cpl, whole.aux_cam.cpl)


def test_an_assignment_carries_no_gradient(network: CosaNetwork, batch: Batch) -> None:
    """Not even where the network that assigns is one that learns."""
    assert all(parameter.requires_grad for parameter in network.parameters())

    found = assigned(network, batch)

    tensors = [found.spl, *vars(found.cam).values(), *vars(found.aux_cam).values()]
    assert not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("size", [16, 8, 4])
def test_a_patch_takes_the_value_in_its_middle(size: int) -> None:
    pixels = torch.arange(size * size).view(1, size, size)

    found = middles(pixels, size // 4)

    places = torch.tensor([size // 4 * p + size // 8 for p in range(4)])
    assert torch.equal(found[0], pixels[0][places][:, places])


# What is learned


def test_the_warm_up_learns_classification_alone(batch: Batch) -> None:
    terms = learn(output_of(batch), batch, None, SETTINGS)

    assert set(terms) == {"cls", "aux_cls"}


def test_co_training_learns_every_term_of_the_objective(network: CosaNetwork, batch: Batch) -> None:
    terms = learned(output_of(batch), batch, assigned(network, batch))

    assert tuple(terms) == TERMS
    assert all(torch.isfinite(term) and term > 0 for term in terms.values())


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"c2s.weight": 0}, {"c2s", "aux_c2s"}),
        ({"c2s.aux": False}, {"aux_c2s"}),
        ({"network.aux_head": False, "csc.weight": 0}, {"aux_cls", "aux_c2s", "csc"}),
        ({"s2c.weight": 0}, {"s2c"}),
        ({"csc.weight": 0}, {"csc"}),
        ({"c2s.weight": 0, "s2c.weight": 0, "csc.weight": 0}, {"c2s", "aux_c2s", "s2c", "csc"}),
    ],
)
def test_a_term_that_is_off_is_not_there_and_the_others_stay_as_they_are(
    network: CosaNetwork, batch: Batch, changes: dict[str, Any], missing: set[str]
) -> None:
    target, output = assigned(network, batch), output_of(batch)

    terms = learned(output, batch, target, settings(changes))

    assert terms.keys() == set(TERMS) - missing
    every = learned(output, batch, target)
    assert all(torch.equal(term, every[name]) for name, term in terms.items())


@pytest.mark.parametrize(
    ("off", "poisoned"),
    [
        ({"c2s.weight": 0}, {"seg_logits": torch.nan}),
        ({"s2c.weight": 0, "csc.weight": 0}, {"cam": torch.nan}),
        ({"s2c.weight": 0, "csc.weight": 0}, {"cam": torch.inf}),
    ],
)
def test_nan_in_a_term_that_is_off_cannot_reach_the_sum_or_a_gradient(
    network: CosaNetwork, batch: Batch, off: dict[str, Any], poisoned: dict[str, float]
) -> None:
    config, output = settings(off), output_of(batch)
    bad = {name: torch.full_like(getattr(output, name), value) for name, value in poisoned.items()}
    terms = learned(dataclasses.replace(output, **bad), batch, assigned(network, batch), config)

    total = objective(terms, config)

    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(output.cls_logits.grad).all()


REACH = {
    "cls": {"cls_logits"},
    "aux_cls": {"aux_cls_logits"},
    "c2s": {"seg_logits"},
    "aux_c2s": {"seg_logits"},
    "s2c": {"cam"},
    "csc": {"cam"},
}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_teaches_the_outputs_it_is_about_and_no_others(
    network: CosaNetwork, batch: Batch, term: str
) -> None:
    output = output_of(batch)

    learned(output, batch, assigned(network, batch))[term].backward()

    leaves = {name: leaf for name, leaf in vars(output).items() if leaf is not None}
    touched = {name for name, leaf in leaves.items() if leaf.grad is not None and leaf.grad.any()}
    assert touched == REACH[term]


def other(targets: CamTargets) -> CamTargets:
    """The same with other CPL: one class on the left of every image, another on the right."""
    right = torch.arange(targets.cpl.shape[2]) >= targets.cpl.shape[2] // 2
    return dataclasses.replace(targets, cpl=torch.where(targets.cpl == IGNORE, IGNORE, 1 + right.long()))


@pytest.mark.parametrize(
    ("swapped", "affected"),
    [
        (lambda target: {"cam": other(target.cam)}, {"c2s"}),
        (lambda target: {"aux_cam": other(target.aux_cam)}, {"aux_c2s", "csc"}),
        (lambda target: {"spl": target.spl.roll(1, dims=2)}, {"s2c"}),
    ],
    ids=["cpl", "aux cpl", "spl"],
)
def test_assignments_are_swapped(
    network: CosaNetwork, batch: Batch, swapped: Any, affected: set[str]
) -> None:
    """CPL supervise the segmentation, SPL the CAMs, and M-dagger's CPL say what is contrasted."""
    target, output = assigned(network, batch), output_of(batch)

    before = learned(output, batch, target)
    after = learned(output, batch, dataclasses.replace(target, **swapped(target)))

    assert {name for name in TERMS if not torch.equal(before[name], after[name])} == affected


def test_guidance_of_the_positive_part_on_the_patch_grid_worked_out_slowly(
    network: CosaNetwork, batch: Batch
) -> None:
    target, output = assigned(network, batch), output_of(batch)

    found, spl = (
        learned(output, batch, target, settings({"s2c.cam": "relu"}))["s2c"],
        over_all_classes(target),
    )

    # a patch is 2 x 2 of the pseudo-labels' pixels: bilinear interpolation is their mean
    total, count = 0.0, 0
    for b in range(len(batch.labels)):
        for i in range(IMAGE // PATCH):
            for j in range(IMAGE // PATCH):
                if not batch.valid[b, 4 * i + 3, 4 * j + 3]:
                    continue
                count += 1
                for c in range(CLASSES):
                    guide = spl[b, c + 1, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean().item()
                    x = max(0.0, output.cam[b, c, i, j].item())
                    total += (math.log1p(math.exp(-x)) + (1 - guide) * x) / CLASSES
    assert found.item() == pytest.approx(total / count, rel=1e-5)
    found.backward()
    assert not output.cam.grad[output.cam < 0].any()


def test_padding_teaches_nothing(network: CosaNetwork, batch: Batch) -> None:
    """What ON says of patches that are padding through and through changes no term over pixels."""
    target, output = assigned(network, batch), output_of(batch)
    changed = dataclasses.replace(output, seg_logits=output.seg_logits.clone(), cam=output.cam.clone())
    # image 1 is padding from row 8 on; a patch further, interpolation does not reach valid pixels either
    changed.seg_logits[1, :, 3:], changed.cam[1, :, 3:] = 50.0, 50.0

    before, after = (learned(each, batch, target) for each in (output, changed))

    assert all(torch.equal(before[name], after[name]) for name in TERMS)


@pytest.mark.parametrize(
    "changes",
    [{}, {"s2c.cam": "relu", "c2s.average": "balanced", "threshold.band": (0.3, 0.5)}],
    ids=["paper", "authors"],
)
def test_the_mean_over_shares_is_the_mean_over_the_batch(
    network: CosaNetwork, batch: Batch, changes: dict[str, Any]
) -> None:
    """Although the second share holds more padding than the first."""
    config = settings(changes)
    order = torch.tensor([0, 3, 1, 2])
    batch = Batch(**{name: t[order] for name, t in vars(batch).items() if t is not None})
    target, output, keys = assigned(network, batch, config), output_of(batch), keys_for(batch)
    whole = learn(output, batch, target, config, keys=keys)
    valid = batch.valid[:, 1::2, 1::2]
    patches = middles(valid, 2).sum() / 2
    assert valid[:2].sum() != valid[2:].sum()

    shares = []
    for share in (slice(0, 2), slice(2, 4)):
        part, said = (
            type(item)(**{name: t[share] for name, t in vars(item).items() if t is not None})
            for item in (batch, output)
        )
        heads = {
            head: CamTargets(**{name: t[share] for name, t in vars(getattr(target, head)).items()})
            for head in ("cam", "aux_cam")
        }
        half = Assignment(spl=target.spl[share], present=target.present[share], **heads)
        shares.append(
            learn(said, part, half, config, pixels=valid.sum() / 2, patches=patches, keys=keys[share])
        )

    for name in TERMS:
        torch.testing.assert_close((shares[0][name] + shares[1][name]) / 2, whole[name])


def test_the_objective_is_the_weighted_sum_worked_out_by_hand() -> None:
    config = settings({"c2s.weight": 0.1, "s2c.weight": 0.05, "csc.weight": 0.2})
    terms = {name: torch.tensor(float(i + 1)) for i, name in enumerate(TERMS)}

    assert objective(terms, config).item() == pytest.approx(1 + 2 + 0.1 * (3 + 4) + 0.05 * 5 + 0.2 * 6)


def test_the_objective_of_the_warm_up_is_classification() -> None:
    terms = {"cls": torch.tensor(0.5), "aux_cls": torch.tensor(0.25)}

    assert objective(terms, SETTINGS).item() == 0.75
