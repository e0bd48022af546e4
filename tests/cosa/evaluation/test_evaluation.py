from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn.functional import interpolate

from cosa.config import Config, DataConfig, EvaluationConfig
from cosa.equations.cam import to_activation
from cosa.equations.reliability import perplexity
from cosa.evaluation.evaluate import Evaluation, coexistence_indices, evaluate
from cosa.evaluation.metrics import confusion_matrix, mean_iou
from cosa.structures import IGNORE, EvaluationBatch
from tests.oracles.evaluation import slow_evaluation
from tests.oracles.network import ColourNetwork

CLASSES = ("boat", "cat")
SETTINGS = EvaluationConfig(scales=(1.0,), flip=False, coexistence=("boat",), xi=0.5)


def split(images: int = 5, seed: int = 0) -> list[EvaluationBatch]:
    """Batches of at most two random images; masks of many sizes, labels that fit them."""
    rng = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, images, 2):
        count = min(2, images - start)
        masks = [random_mask(9 + start, 12 + start, rng) for _ in range(count)]
        batches.append(
            EvaluationBatch(
                names=tuple(f"image_{start + i}" for i in range(count)),
                images=torch.randn(count, 3, 16, 16, generator=rng),
                sizes=tuple((mask.shape[0], mask.shape[1]) for mask in masks),
                masks=tuple(masks),
                labels=torch.tensor([[float((mask == c).any()) for c in (1, 2)] for mask in masks]),
            )
        )
    return batches


def random_mask(height: int, width: int, rng: torch.Generator) -> Tensor:
    """Background and one random class, with a border that is not counted."""
    mask = torch.randint(0, 2, (height, width), generator=rng)
    mask = mask * torch.randint(1, 3, (), generator=rng)
    mask[0] = IGNORE
    return mask


def run(
    batches: Sequence[EvaluationBatch],
    settings: EvaluationConfig = SETTINGS,
    *,
    network: ColourNetwork | None = None,
    xi: float = 0.3,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Evaluation:
    return evaluate(
        network or ColourNetwork(),
        batches,
        config=Config(evaluation=settings),
        classes=CLASSES,
        xi=xi,
        aux_xi=0.7,
        reduce=reduce,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_metrics_agree_with_a_second_implementation(seed: int) -> None:
    batches = split(seed=seed)

    metrics = run(batches).metrics

    found = [metrics[name] for name in ("seg_miou", "seg_miou_labelled", "cpl_miou", "cpl_miou_own")]
    slow = slow_evaluation(ColourNetwork(), batches, {"at evaluation.xi": 0.5, "own": 0.3})
    assert found == pytest.approx(list(slow.values()))


def test_the_protocols_agree_where_every_image_holds_every_class() -> None:
    batches = [dataclasses.replace(b, labels=torch.ones_like(b.labels)) for b in split()]

    metrics = run(batches).metrics

    assert metrics["seg_miou"] == metrics["seg_miou_labelled"]


def test_a_confusion_with_an_absent_class_costs_only_the_label_free_protocol() -> None:
    # the network prefers class 1 everywhere, then class 2; the image holds class 2 alone
    network = ColourNetwork()
    network.weights["seg_logits"] = torch.tensor([[0.0, 0, 0], [2.0, 0, 0], [1.0, 0, 0]])
    batch = EvaluationBatch(
        names=("image",),
        images=torch.ones(1, 3, 8, 8),
        sizes=((8, 8),),
        masks=(torch.full((8, 8), 2),),
        labels=torch.tensor([[0.0, 1.0]]),
    )

    metrics = run([batch], network=network).metrics

    assert metrics["seg_miou"] == 0
    assert metrics["seg_miou_labelled"] == 1


def test_two_workers_that_sum_their_counts_see_the_whole_split() -> None:
    batches = split(6)
    shares: list[list[Tensor]] = []
    for part in (batches[:1], batches[1:]):
        counts: list[Tensor] = []
        run(part, reduce=lambda tensor, counts=counts: counts.append(tensor) or tensor)
        shares.append(counts)
    order = iter(range(len(shares[0])))

    def total(tensor: Tensor) -> Tensor:
        place = next(order)
        assert torch.equal(tensor, shares[0][place])
        return shares[0][place] + shares[1][place]

    assert run(batches[:1], reduce=total) == run(batches)


def test_a_worker_without_images_adds_nothing() -> None:
    counts: list[Tensor] = []

    run([], reduce=lambda tensor: counts.append(tensor) or tensor)

    assert counts
    assert not any(count.any() for count in counts)


def test_images_are_counted_alike_in_every_batching() -> None:
    batches = split(4)
    singles = [
        EvaluationBatch(
            b.names[i : i + 1],
            b.images[i : i + 1],
            b.sizes[i : i + 1],
            b.masks[i : i + 1],
            b.labels[i : i + 1],
        )
        for b in batches
        for i in range(len(b.names))
    ]

    assert run(singles).metrics == pytest.approx(run(batches).metrics)


def test_the_best_threshold_is_the_top_of_the_curve() -> None:
    found = run(split())

    best_xi, best = found.metrics["cpl_best_xi"], found.metrics["cpl_best_miou"]
    assert (best_xi, best) in found.curves["cam"]
    assert best == max(quality for _, quality in found.curves["cam"])
    assert found.metrics["aux_cpl_best_miou"] == max(quality for _, quality in found.curves["aux_cam"])


def test_the_curve_passes_through_the_metric_at_its_threshold() -> None:
    found = run(split(), xi=0.25)

    assert dict(found.curves["cam"])[0.5] == found.metrics["cpl_miou"]
    assert dict(found.curves["cam"])[0.25] == found.metrics["cpl_miou_own"]
    assert dict(found.curves["aux_cam"])[0.7] == found.metrics["aux_cpl_miou_own"]


def test_two_equal_cams_are_their_own_ensemble() -> None:
    network = ColourNetwork()
    network.weights["aux_cam"] = network.weights["cam"]

    metrics = run(split(), network=network).metrics

    assert metrics["ensemble_cpl_miou"] == metrics["cpl_miou"] == metrics["aux_cpl_miou"]


def test_c_miou_averages_the_affected_classes() -> None:
    found = run(split(8))

    assert found.metrics["seg_cmiou"] == pytest.approx(found.per_class["seg_iou"]["boat"])
    assert found.metrics["cpl_cmiou"] == pytest.approx(found.per_class["cpl_iou"]["boat"])


def test_c_miou_is_left_out_where_no_class_is_affected() -> None:
    metrics = run(split(), SETTINGS.replace(coexistence=())).metrics

    assert not [name for name in metrics if "cmiou" in name]


def test_the_mean_over_classes_is_the_mean_metric() -> None:
    found = run(split(8))

    for mean, per_class in (
        ("seg_miou", "seg_iou"),
        ("seg_miou_labelled", "seg_iou_labelled"),
        ("aux_cpl_miou", "aux_cpl_iou"),
    ):
        scores = found.per_class[per_class].values()
        assert found.metrics[mean] == pytest.approx(sum(scores) / len(scores)), mean


def test_a_class_that_is_nowhere_has_no_iou() -> None:
    network = ColourNetwork()
    network.weights["seg_logits"][2] = -network.weights["seg_logits"][:2].sum(0) - 9
    batch = EvaluationBatch(
        names=("image",),
        images=torch.ones(1, 3, 8, 8),
        sizes=((8, 8),),
        masks=(torch.zeros(8, 8, dtype=torch.int64),),
        labels=torch.tensor([[1.0, 0.0]]),
    )

    assert "cat" not in run([batch], network=network).per_class["seg_iou"]


def test_classification_is_scored_by_average_precision() -> None:
    batches, network = split(12), ColourNetwork()
    network.weights = {name: 5 * weight for name, weight in network.weights.items()}  # few equal scores
    labels = torch.cat([b.labels for b in batches])
    scores = torch.cat([network(b.images).cls_logits for b in batches])

    expected = average_precision_score(labels.numpy(), scores.numpy(), average="macro")
    assert run(batches, network=network).metrics["cls_map"] == pytest.approx(expected, abs=1e-3)


def test_a_split_without_pixels_has_no_quality() -> None:
    assert math.isnan(run([]).metrics["seg_miou"])


def test_an_affected_class_that_the_data_set_lacks_is_named() -> None:
    settings = SETTINGS.replace(coexistence=("boot",))

    with pytest.raises(ValueError, match=r"coexistence must name classes .* got 'boot'; did you mean 'boat'"):
        coexistence_indices(settings, CLASSES)


def test_evaluation_leaves_no_gradient() -> None:
    network = ColourNetwork()
    network.weights["cam"].requires_grad_()

    run(split(1), network=network)

    assert network.weights["cam"].grad is None


# What the analysis figures need


def by_pixel(batches: Sequence[EvaluationBatch], xi: float) -> list[tuple[float, int, int]]:
    """(activation, CPL at xi, ground truth) of every pixel that counts, read off one by one."""
    network, found = ColourNetwork(), []
    for batch in batches:
        for i, mask in enumerate(batch.masks):
            cam = network(batch.images[i : i + 1]).cam
            for size in (batch.images.shape[2:], mask.shape):
                cam = interpolate(cam, size=tuple(size), mode="bilinear", align_corners=False)
            everywhere = torch.ones(1, *mask.shape, dtype=torch.bool)
            activation, strongest = to_activation(cam, batch.labels[i : i + 1], everywhere)[0].max(0)
            pixels = zip(
                activation.flatten().tolist(),
                strongest.flatten().tolist(),
                mask.flatten().tolist(),
                strict=True,
            )
            found += [(nu, s + 1 if nu >= xi else 0, t) for nu, s, t in pixels if t != IGNORE]
    return found


def test_accuracy_by_confidence_is_that_of_the_pixels() -> None:
    batches = split(6)

    confidence = run(batches, xi=0.3).analysis["cam"]["confidence"]

    pixels = by_pixel(batches, 0.3)
    edges = confidence["edges"]
    assert (len(edges), edges[0], edges[-1]) == (51, 0, 1)
    for b in (0, 10, 20, 49):
        last = b == 49
        inside = [p for p in pixels if edges[b] <= p[0] and (p[0] < edges[b + 1] or last)]
        assert confidence["pixels"][b] == len(inside)
        assert confidence["correct"][b] == sum(cpl == true for _, cpl, true in inside)


def test_perplexity_is_that_of_the_pixels_to_the_width_of_a_bin() -> None:
    batches = split(6)

    found = run(batches, xi=0.3)

    nu = torch.tensor([p[0] for p in by_pixel(batches, 0.3)])[None, None]
    exact = perplexity(nu, 0.3, alpha=0.8, beta=1.0).mean().item()
    assert found.metrics["cpl_perplexity"] == pytest.approx(exact, rel=0.05)
    counted = found.analysis["cam"]["perplexity"]
    assert sum(counted["pixels"]) == nu.numel()
    assert counted["edges"][-1] is None
    assert sum(counted["correct"]) == sum(found.analysis["cam"]["confidence"]["correct"])
    assert counted["pixels"][0] == 0  # nothing is surer than -log(0.8) = 0.223


def test_sure_pixels_are_those_of_low_perplexity() -> None:
    """At xi 0.5 a perplexity up to 1 is a distance of 0.46 or more: below 0.27 or above 0.73."""
    batches = split(6)

    found = run(batches, xi=0.5).metrics["cpl_miou_sure"]

    # whole bins are sure or not: the bins that hold the two bounds are told by their middles
    sure = [(t, c) for nu, c, t in by_pixel(batches, 0.5) if nu < 0.27 or nu >= 0.73]
    classes = {value for pair in sure for value in pair}
    ious = [sum(t == c == k for t, c in sure) / sum(k in (t, c) for t, c in sure) for k in sorted(classes)]
    assert found == pytest.approx(sum(ious) / len(ious))


def test_each_image_enters_the_distributions_once() -> None:
    batches = split(5)

    images = run(batches).analysis["images"]

    assert [sum(images[name]["count"]) for name in ("iou", "perplexity", "distance")] == [5, 5, 5]
    assert all(len(part["edges"]) == len(part["count"]) + 1 for part in images.values())


def test_the_analysis_is_plain_json() -> None:
    analysis = run(split(3)).analysis

    assert json.loads(json.dumps(analysis, allow_nan=False)) == analysis


def test_a_split_without_masks_is_judged_by_its_labels_alone() -> None:
    batches = split(5)
    bare = [dataclasses.replace(b, masks=()) for b in batches]

    found = run(bare)

    whole = run(batches).metrics
    assert found.metrics == {name: value for name, value in whole.items() if "cls" in name}
    assert (found.per_class, found.curves, found.analysis) == ({}, {}, {})


def test_training_images_are_judged_by_their_cams_and_scores_alone() -> None:
    batches = split(5)

    found = evaluate(
        ColourNetwork(),
        batches,
        config=Config(evaluation=SETTINGS),
        classes=CLASSES,
        xi=0.3,
        aux_xi=0.7,
        device=torch.device("cpu"),
        segmentation=False,
    ).metrics

    assert found == {name: value for name, value in run(batches).metrics.items() if "seg" not in name}


@pytest.mark.parametrize("flip", [False, True])
def test_the_crf_judges_both_protocols_beside_the_network_alone(
    monkeypatch: pytest.MonkeyPatch, flip: bool
) -> None:
    """It is given the softmax of the sum of the views' logits: mirrored, these views are twice the same."""
    settings = SETTINGS.replace(flip=flip)

    def refine(image: np.ndarray, probs: np.ndarray) -> np.ndarray:
        """Stands for the CRF, which is an extra: depends on both, keeps impossible classes at 0."""
        return np.roll(probs, 1, axis=2) * (0.5 + image.mean(-1) / 255)

    monkeypatch.setattr("cosa.evaluation.crf.refine", refine)
    monkeypatch.setattr("cosa.evaluation.evaluate.require_crf", lambda: None)
    batches = split(4)
    rng = np.random.default_rng(0)
    pictured = [
        dataclasses.replace(
            b, originals=tuple(rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in b.sizes)
        )
        for b in batches
    ]
    plain, refined = (
        evaluate(
            ColourNetwork(),
            pictured,
            config=Config(data=DataConfig(loader_workers=0), evaluation=settings.replace(crf=crf)),
            classes=CLASSES,
            xi=0.3,
            aux_xi=0.7,
            device=torch.device("cpu"),
        ).metrics
        for crf in (False, True)
    )

    # the CRF by hand, image by image
    matrix = torch.zeros(3, 3, dtype=torch.int64)
    for batch in pictured:
        for i, mask in enumerate(batch.masks):
            logits = ColourNetwork()(batch.images[i : i + 1]).seg_logits
            for size in (batch.images.shape[2:], mask.shape):
                logits = interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
            probs = refine(batch.originals[i], ((1 + flip) * logits).softmax(1)[0].numpy())
            matrix += confusion_matrix(torch.from_numpy(probs.argmax(0)), mask, 3)
    assert refined["seg_miou_crf"] == pytest.approx(mean_iou(matrix))
    assert {name: refined[name] for name in plain} == plain
    assert refined["images_per_second"] > refined["crf_images_per_second"] > 0
