"""The guidance study: what guides the CAMs, what its gradient spares, and that an oracle never hides."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from cosa.config import Config, DataConfig, identity, override
from cosa.data import open_dataset, train_batches
from cosa.data.views import Views
from cosa.equations.losses import s2c_loss
from cosa.networks.heads import CamHead
from cosa.networks.multiscale import resize
from cosa.structures import IGNORE, Assignment, Batch, CamTargets, Ranks
from cosa.training.step import build_state, training_step, wrap
from cosa.training.swap import guidance, learn
from tests.cosa.runs import Recorder, train

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))


def config(source: str, **changes: Any) -> Config:
    return override(Config(), {"cam.stride": 2, "s2c.source": source, **changes})


@pytest.fixture
def batch() -> Batch:
    """Two images of 8 pixels; the first holds class 2, the second classes 1 and 3 and padding below."""
    valid = torch.ones(2, 8, 8, dtype=torch.bool)
    valid[1, 6:] = False
    masks = torch.zeros(2, 8, 8, dtype=torch.int64)
    masks[0, :4], masks[0, 4] = 2, IGNORE
    masks[1, :, :4], masks[1, :, 4:] = 1, 3
    return Batch(
        weak=torch.randn(2, 3, 8, 8),
        strong=torch.randn(2, 3, 8, 8),
        labels=torch.tensor([[0.0, 1, 0], [1, 0, 1]]),
        valid=valid,
        masks=masks,
    )


@pytest.fixture
def assigned() -> Assignment:
    """SPL that say nothing like the ground truth, on a grid of 4."""
    targets = CamTargets(
        activation=torch.zeros(2, 4, 4),
        cpl=torch.zeros(2, 4, 4, dtype=torch.int64),
        perplexity=torch.ones(2, 4, 4),
        raw=torch.ones(2, 4, 4),
    )
    present = torch.tensor([[1, 0], [0, 2]])
    return Assignment(cam=targets, aux_cam=targets, spl=torch.full((2, 3, 4, 4), 0.25), present=present)


def over_all_classes(guide: Tensor, classes: Tensor) -> Tensor:
    """`guide` with a channel for each of the three classes, 0 where it has none."""
    full = torch.zeros(len(guide), 4, *guide.shape[2:])
    full[:, 0] = guide[:, 0]
    for i, named in enumerate(classes.tolist()):
        full[i, [c + 1 for c in named]] = guide[i, 1:]
    return full


# What guides


def test_the_spl_guide_by_default(batch: Batch, assigned: Assignment) -> None:
    guide, classes, counted = guidance(batch, assigned, config("spl"))

    assert guide is assigned.spl
    assert classes is assigned.present
    assert torch.equal(counted, batch.valid[:, 1::2, 1::2])


def test_the_oracle_guides_by_the_ground_truth_at_the_pseudo_labels_pixels(
    batch: Batch, assigned: Assignment
) -> None:
    guide, classes, _ = guidance(batch, assigned, config("gt"))

    assert classes.tolist() == [[0, 1, 2]] * 2

    # stride 2 reads rows and columns 1, 3, 5, 7
    assert guide[0, 2].tolist() == [[1.0] * 4, [1.0] * 4, [0.0] * 4, [0.0] * 4]
    assert guide[1, :, 0].T.tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]


def test_the_oracle_counts_neither_padding_nor_pixels_without_a_class(
    batch: Batch, assigned: Assignment
) -> None:
    assert batch.masks is not None
    batch.masks[0, 5] = IGNORE

    *_, counted = guidance(batch, assigned, config("gt"))

    assert counted[0].all(1).tolist() == [True, True, False, True]
    assert counted[1].all(1).tolist() == [True, True, True, False]


def test_guidance_by_ground_truth_is_binary_cross_entropy_to_its_masks(
    batch: Batch, assigned: Assignment
) -> None:
    cam = torch.randn(2, 3, 4, 4)
    guide, classes, counted = guidance(batch, assigned, config("gt"))
    assert batch.masks is not None
    masks = batch.masks[:, 1::2, 1::2]

    by_hand = []
    for i, y, x in itertools.product(range(2), range(4), range(4)):
        if batch.valid[i, 2 * y + 1, 2 * x + 1] and masks[i, y, x] != IGNORE:
            for c in range(3):
                truth = (masks[i, y, x] == c + 1).float()
                by_hand.append(binary_cross_entropy_with_logits(cam[i, c, y, x], truth))

    torch.testing.assert_close(s2c_loss(cam, guide, classes, counted), torch.stack(by_hand).mean())


def test_noise_names_the_background_and_the_image_s_classes_alone(batch: Batch, assigned: Assignment) -> None:
    drawn = set()
    for seed in range(200):
        noise = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(seed))
        guide = over_all_classes(*guidance(batch, assigned, config("noise"), noise)[:2])
        assert guide.sum(1).eq(1).all()
        drawn |= {(i, int(c)) for i in range(2) for c in guide[i].argmax(0).flatten()}

    assert drawn == {(0, 0), (0, 2), (1, 0), (1, 1), (1, 3)}


def test_noise_is_one_class_per_patch_and_each_as_likely(batch: Batch, assigned: Assignment) -> None:
    noise = torch.tensor([[[0.49, 0.51], [0.0, 0.99]], [[0.33, 0.34], [0.66, 0.67]]])

    guide, named, _ = guidance(batch, assigned, config("noise"), noise)

    classes = over_all_classes(guide, named).argmax(1)
    assert classes[:, ::2, ::2].tolist() == [[[0, 2], [0, 2]], [[0, 1], [1, 3]]]
    assert torch.equal(classes, classes[:, ::2, ::2].repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_noise_is_new_in_every_step_and_repeats_with_the_seed(tiny_config: Config) -> None:
    changes = {"s2c.source": "noise", "train.warmup": 0, "train.iterations": 8}
    noisy = override(tiny_config, changes)
    batches = [*itertools.islice(train_batches(open_dataset(noisy.data, "train_aug"), noisy, start=0), 1)]

    def s2c_at(step: int, chosen: Config) -> float:
        state = build_state(chosen, 6, ALONE.device)
        state.step = step
        return training_step(state, wrap(state, chosen, ALONE), batches[0], chosen, ALONE)["s2c"].item()

    assert s2c_at(0, noisy) == s2c_at(0, noisy)
    assert len({s2c_at(step, noisy) for step in range(4)}) == 4
    assert s2c_at(0, noisy) != s2c_at(0, override(tiny_config, {**changes, "s2c.source": "spl"}))


@pytest.mark.parametrize("off", [{"s2c.source": "none"}, {"s2c.weight": 0.0}])
def test_without_guidance_there_is_no_term(off: dict[str, Any], tiny_config: Config) -> None:
    changed = override(tiny_config, {"train.warmup": 0, **off})
    batch = next(train_batches(open_dataset(changed.data, "train_aug"), changed, start=0))
    state = build_state(changed, 6, ALONE.device)

    terms = training_step(state, wrap(state, changed, ALONE), batch, changed, ALONE)

    assert set(terms) == {"cls", "aux_cls", "c2s", "aux_c2s", "csc"}


# What the gradient spares


@pytest.mark.parametrize(("detach", "reached"), [("features", (False, True)), ("classifier", (True, False))])
def test_the_guided_map_is_m_with_a_part_spared_from_its_gradient(
    detach: Any, reached: tuple[bool, bool]
) -> None:
    head = CamHead(5, 3)
    features = torch.randn(2, 5, 4, 4, requires_grad=True)

    guided = head.guided(features, detach)
    (guided**2).sum().backward()

    assert torch.equal(guided, head(features)[1])
    assert (features.grad is not None, head.weight.grad is not None) == reached


@pytest.mark.parametrize("detach", ["features", "classifier"])
def test_only_the_guidance_is_spared(detach: str, tiny_config: Config) -> None:
    """The network still learns classification through both, and the terms start from the same values."""
    values = []
    for chosen in ("none", detach):
        changed = override(tiny_config, {"train.warmup": 0, "s2c.detach": chosen})
        batch = next(train_batches(open_dataset(changed.data, "train_aug"), changed, start=0))
        state = build_state(changed, 6, ALONE.device)
        values.append(training_step(state, wrap(state, changed, ALONE), batch, changed, ALONE))
        assert all(p.grad is not None and p.grad.any() for p in state.online.cam_head.parameters())

    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])


def test_the_guidance_reaches_the_encoder_only_through_what_is_not_spared(tiny_config: Config) -> None:
    def encoder_gradient(detach: str) -> Tensor:
        changed = override(tiny_config, {"train.warmup": 0, "s2c.detach": detach, "cam.stride": 4})
        batch = next(train_batches(open_dataset(changed.data, "train_aug"), changed, start=0))
        online = build_state(changed, 6, ALONE.device).online
        output = online(batch.strong, detach=detach)
        side = changed.data.crop_size // 4
        spl = torch.full((4, 7, side, side), 1 / 7)
        cam = output.cam if output.guided_cam is None else output.guided_cam
        every = torch.arange(6).expand(4, 6)
        s2c_loss(
            resize(cam, (side, side)), spl, every, torch.ones(4, side, side, dtype=torch.bool)
        ).backward()
        gradients = [p.grad.flatten() for p in online.encoder.parameters() if p.grad is not None]
        return torch.cat(gradients) if gradients else torch.zeros(1)

    assert not encoder_gradient("features").any()
    assert encoder_gradient("classifier").any()
    torch.testing.assert_close(encoder_gradient("classifier"), encoder_gradient("none"))


def test_learn_reads_the_guided_map_where_there_is_one(batch: Batch, assigned: Assignment) -> None:
    plain = override(Config(), {"cam.stride": 2, "c2s.weight": 0.0, "csc.weight": 0.0})
    whole = learn_with(None, batch, assigned, plain)
    other = learn_with(torch.full((2, 3, 2, 2), 3.0), batch, assigned, plain)

    assert whole["s2c"] != other["s2c"]
    assert whole["cls"] == other["cls"]


def learn_with(
    guided: Tensor | None, batch: Batch, assigned: Assignment, config: Config
) -> dict[str, Tensor]:
    from cosa.structures import NetworkOutput

    zeros = torch.zeros(2, 3, 2, 2)
    output = NetworkOutput(
        cls_logits=torch.zeros(2, 3),
        aux_cls_logits=torch.zeros(2, 3),
        cam=zeros,
        aux_cam=zeros,
        seg_logits=None,
        guided_cam=guided,
    )
    return learn(output, batch, assigned, config)


# Masks that go the way of the views


def placed(seed: int, crop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the weak view shows a bright rectangle, where its mask says it is, and what is no padding."""
    data = DataConfig(crop_size=crop, scale_min=0.5, scale_max=2.0, blur_prob=0.0, strong_appearance=False)
    mask = np.zeros((40, 56), np.uint8)
    mask[8:29, 13:42] = 3
    image = np.repeat((mask > 0)[:, :, None] * 255, 3, 2).astype(np.uint8)
    pair = Views(data)(image, seed, mask)
    assert pair.mask is not None
    assert set(np.unique(pair.mask)) <= {0, 3}
    return pair.weak[..., 0] > 127, pair.mask == 3, pair.valid


@pytest.mark.parametrize("seed", range(30))
def test_the_mask_lies_on_the_object_after_any_geometry(seed: int) -> None:
    shown, said, valid = placed(seed, crop=48)

    outline = sum(np.abs(np.diff(said.astype(int), axis=axis)).sum() for axis in (0, 1))
    assert (shown != said)[valid].sum() <= outline  # no edge is more than one pixel off


def test_the_mask_is_shifted_to_no_side() -> None:
    """Half a pixel to the top left is what nearest-neighbour resampling does by default."""
    shifts = []
    for seed in range(60):
        shown, said, _ = placed(seed, crop=128)  # the whole image is in it
        shifts.append(np.argwhere(said).mean(0) - np.argwhere(shown).mean(0))

    assert np.abs(np.mean(shifts, axis=0)).max() < 0.1


def test_a_mask_changes_nothing_of_the_views() -> None:
    data = DataConfig(crop_size=32)
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    views = Views(data)

    with_mask, without = views(image, 5, np.zeros((40, 30), np.uint8)), views(image, 5)

    assert np.array_equal(with_mask.weak, without.weak)
    assert np.array_equal(with_mask.strong, without.strong)
    assert without.mask is None


def test_masks_are_read_for_the_oracle_alone(tiny_config: Config) -> None:
    def first(source: str) -> Batch:
        changed = override(tiny_config, {"s2c.source": source})
        return next(train_batches(open_dataset(changed.data, "train_aug"), changed, start=0))

    assert first("spl").masks is None
    masks = first("gt").masks
    assert masks is not None
    assert masks.shape == (4, 32, 32)
    present = [set(mask.unique().tolist()) - {0, IGNORE} for mask in masks]
    labels = [{int(c) + 1 for c in row.nonzero()} for row in first("gt").labels]
    assert all(found <= named for found, named in zip(present, labels, strict=True))
    assert any(present)


# An oracle never hides


def test_a_run_that_saw_ground_truth_is_tagged_so(tiny_config: Config, tmp_path: Path) -> None:
    oracle, honest = Tags(), Tags()

    train(override(tiny_config, {"s2c.source": "gt"}), out=tmp_path / "gt", tracker=oracle)
    train(tiny_config, out=tmp_path / "spl", tracker=honest)

    assert oracle.tags["cosa.oracle"] == "gt"
    assert "cosa.oracle" not in honest.tags
    assert json.loads((tmp_path / "gt/model/model.json").read_text())["oracle"] is True


class Tags(Recorder):
    """A tracker that keeps the tags it is given."""

    def start(self, *arguments: Any, tags: Any = None, **more: Any) -> Any:
        self.tags = dict(tags)
        return super().start(*arguments, tags=tags, **more)


def test_an_oracle_without_masks_is_refused_before_it_starts(tiny_config: Config, tmp_path: Path) -> None:
    import shutil

    root = tmp_path / "data"
    shutil.copytree(tiny_config.data.root, root)
    names = (root / "ImageSets/Segmentation/train_aug.txt").read_text().split()
    annotated = root / "Annotations"
    annotated.mkdir()
    for name in (root / "ImageSets/Segmentation/val.txt").read_text().split() + names:
        (annotated / f"{name}.xml").write_text("<annotation/>")
    for name in names:
        for mask in root.glob(f"SegmentationClass*/{name}.png"):
            mask.unlink()

    with pytest.raises(FileNotFoundError, match="mask"):
        train(override(tiny_config, {"s2c.source": "gt", "data.root": str(root)}), out=tmp_path / "run")


def test_no_guidance_is_one_experiment_however_it_is_switched_off() -> None:
    ways = [
        {"s2c.weight": 0.0},
        {"s2c.source": "none"},
        {"s2c.source": "none", "s2c.weight": 0.2, "s2c.tau": 0.5},
        {"s2c.weight": 0.0, "s2c.source": "gt", "s2c.detach": "features"},
    ]

    assert len({identity(override(Config(), way)) for way in ways}) == 1
    assert not any(override(Config(), way).oracle for way in ways)
    assert identity(Config()) != identity(override(Config(), ways[0]))


@pytest.mark.parametrize(("source", "reference"), [("gt", "spl"), ("noise", "spl")], ids=["oracle", "noise"])
def test_another_source_trains_other_cams(source: str, reference: str, tiny_config: Config) -> None:
    def cam_weight(chosen: str) -> Tensor:
        changed = override(tiny_config, {"train.warmup": 0, "s2c.source": chosen, "s2c.weight": 1.0})
        batch = next(train_batches(open_dataset(changed.data, "train_aug"), changed, start=0))
        state = build_state(changed, 6, ALONE.device)
        training_step(state, wrap(state, changed, ALONE), batch, changed, ALONE)
        return state.online.cam_head.weight.detach()

    moved = (cam_weight(source) - cam_weight(reference)).abs().max().item()
    assert math.isfinite(moved)
    assert moved > 0
