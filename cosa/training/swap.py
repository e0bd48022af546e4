"""Co-training with swapping assignments on one page: AN assigns, ON learns.

Paper: Algorithm 1. AN looks at the weak view and says what each pixel is, twice: by its CAMs (CPL) and by its
segmentation (SPL). The two are swapped: CPL supervise ON's segmentation, SPL supervise ON's CAMs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from cosa.config import Config
from cosa.equations.cam import to_activation
from cosa.equations.losses import (
    averaging_weights,
    c2s_loss,
    cls_loss,
    csc_loss,
    label_counts,
    over_images,
    s2c_loss,
)
from cosa.equations.pseudo_labels import cam_pseudo_labels, max_activation, seg_pseudo_labels
from cosa.equations.reliability import perplexity, reliability_sum, reliability_weights
from cosa.equations.threshold import Threshold, activation_histogram
from cosa.networks.multiscale import multiscale, resize
from cosa.networks.network import CosaNetwork
from cosa.structures import IGNORE, Assignment, Batch, CamTargets, NetworkOutput

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""


@dataclass(frozen=True)
class Thresholds:
    """xi for M' and for M-dagger', each with a queue of its own."""

    cam: Threshold
    aux_cam: Threshold

    def values(self) -> tuple[float, float]:
        """Both as numbers, for files and evaluation; waits for the device."""
        return float(self.cam.value), float(self.aux_cam.value)


def middles(pixels: Shaped[Tensor, "b h w"], step: int) -> Shaped[Tensor, "b p q"]:
    """The middle of each cell of `step` pixels: exact where an average would mix classes or confidences."""
    return pixels[:, step // 2 :: step, step // 2 :: step]


@torch.no_grad()
def assign(
    network: CosaNetwork, batch: Batch, thresholds: Thresholds, config: Config, total: Total
) -> Assignment:
    """CPL, their reliability, and SPL of a batch, from AN (or from ON, where SA is ablated).

    Paper: Algorithm 1, lines 6-18. Advances both thresholds by this batch.

    Args:
        network: The network that assigns, in evaluation mode.
        batch: This rank's images; AN sees their weak view.
        thresholds: Changed in place: the histogram of the whole batch over all ranks enters their queues.
        config: Sections cam, threshold, raw and s2c are read.
        total: Sums over ranks, so that thresholds and weights agree on all of them.
    """
    present, valid = batch.present, middles(batch.valid, config.cam.stride)
    assert present is not None
    labels, count = batch.labels.gather(1, present), config.train.accumulate
    chunks = [
        multiscale(
            network,
            images,
            scales=config.cam.scales,
            flip=config.cam.flip,
            size=(valid.shape[1], valid.shape[2]),
            fusion=config.cam.fusion,
            aux_fusion=config.cam.aux_fusion,
            cam_classes=share,
            seg_classes=pad(share + 1, (1, 0)),
        )
        for images, share in zip(batch.weak.chunk(count), present.chunk(count), strict=True)
    ]
    seg_logits = torch.cat([chunk.seg_logits for chunk in chunks])

    def targets(cam: Tensor, threshold: Threshold, band: tuple[float, ...]) -> CamTargets:
        activation = to_activation(cam, labels, valid)
        return _targets(activation, present, valid, threshold, band, config, total)

    band, aux_band = config.threshold.band, config.threshold.aux_band or config.threshold.band
    return Assignment(
        cam=targets(torch.cat([chunk.cam for chunk in chunks]), thresholds.cam, band),
        aux_cam=targets(torch.cat([chunk.aux_cam for chunk in chunks]), thresholds.aux_cam, aux_band),
        spl=seg_pseudo_labels(seg_logits, labels, config.s2c.tau),
        present=present,
    )


def _targets(
    activation: Float[Tensor, "b n h w"],
    present: Int[Tensor, "b n"],
    valid: Bool[Tensor, "b h w"],
    threshold: Threshold,
    band: tuple[float, ...],
    config: Config,
    total: Total,
) -> CamTargets:
    """Threshold, CPL, perplexity and RAW of one normalised CAM; RAW knows the labelled pixels alone."""
    confidence = max_activation(activation)
    threshold.update(total(activation_histogram(confidence, valid)))
    xi = threshold.value
    perplexities = perplexity(confidence, xi, config.raw.alpha, config.raw.beta)
    cpl = cam_pseudo_labels(activation, xi, valid, band, present)
    labelled = cpl != IGNORE
    if config.raw.enabled:
        reliability, count = total(reliability_sum(perplexities, labelled)).unbind()
        mean = (reliability / count.clamp(min=1)).to(perplexities.dtype)
        raw = reliability_weights(perplexities, labelled, mean)
    else:
        raw = labelled.to(perplexities.dtype)
    balanced = config.c2s.average == "balanced"
    if band or balanced:
        raw = raw * averaging_weights(cpl, total(label_counts(cpl, valid)), balanced=balanced)
    return CamTargets(activation=confidence, cpl=cpl, perplexity=perplexities, raw=raw)


def learn(
    output: NetworkOutput,
    batch: Batch,
    assigned: Assignment | None,
    config: Config,
    *,
    pixels: Tensor | None = None,
    patches: Tensor | None = None,
    keys: Tensor | None = None,
    noise: Tensor | None = None,
) -> dict[str, Tensor]:
    """The terms of ON's objective on a batch, by name, unweighted; a term that is off is not there.

    Paper: Eq. (2). The swap itself: c2s hands CPL to the segmentation, s2c hands SPL to the CAMs.

    Args:
        output: What ON says of the strong view.
        batch: Labels and the pixels that are no padding.
        assigned: What AN says of the weak view; None in the warm-up, which learns classification alone.
        config: Weights decide which terms are there.
        pixels: Denominator of the means over pixels; the batch's valid pixels by default. A caller with
            several shares of a batch passes the mean over shares, so that the mean over shares is exact.
        patches: The same of valid patches, for s2c on the patch grid.
        keys: Random numbers in [0, 1) per patch that draw the contrasted positions; for csc.
        noise: Random numbers in [0, 1) per patch that draw its class; for guidance by noise.
    """
    terms = {"cls": cls_loss(output.cls_logits, batch.labels)}
    if config.network.aux_head:
        terms["aux_cls"] = cls_loss(output.aux_cls_logits, batch.labels)
    if assigned is None:
        return terms
    size = (assigned.spl.shape[2], assigned.spl.shape[3])
    if config.c2s.weight:
        assert output.seg_logits is not None
        valid = middles(batch.valid, config.cam.stride).sum().float() if pixels is None else pixels
        heads = {"c2s": assigned.cam}
        if config.c2s.aux and config.network.aux_head:
            heads["aux_c2s"] = assigned.aux_cam

        def c2s(seg_logits: Tensor, i: slice) -> list[Tensor]:
            log_probs = resize(seg_logits, size).log_softmax(1)
            return [c2s_loss(log_probs, head.cpl[i], head.raw[i], valid) for head in heads.values()]

        terms |= zip(heads, over_images(output.seg_logits, c2s), strict=True)
    if config.guided:
        cam = output.cam if output.guided_cam is None else output.guided_cam
        guide, classes, counted = guidance(batch, assigned, config, noise)
        if config.s2c.cam == "raw":
            valid = counted.sum().float() if pixels is None else pixels

            def s2c(cam: Tensor, i: slice) -> list[Tensor]:
                return [s2c_loss(resize(cam, size), guide[i], classes[i], counted[i], valid)]

            (terms["s2c"],) = over_images(cam, s2c)
        else:
            grid = (cam.shape[2], cam.shape[3])
            on_patches = middles(counted, size[0] // grid[0])
            terms["s2c"] = s2c_loss(cam.relu(), resize(guide, grid), classes, on_patches, patches)
    if config.csc.weight:
        assert keys is not None
        patch = size[0] // output.cam.shape[2]
        terms["csc"] = csc_loss(
            output.cam,
            middles(assigned.aux_cam.cpl, patch),
            middles(assigned.aux_cam.perplexity, patch),
            epsilon=config.csc.epsilon,
            tau=config.csc.tau,
            keys=keys,
            max_anchors=config.csc.max_anchors,
        )
    return terms


def guidance(
    batch: Batch, assigned: Assignment, config: Config, noise: Float[Tensor, "b p q"] | None = None
) -> tuple[Float[Tensor, "b m h w"], Int[Tensor, "b n"], Bool[Tensor, "b h w"]]:
    """What ON's CAMs are to show, in place of the SPL where the guidance study says so.

    Paper: Fig. 1 and Tab. 4a.
    Paper: does not say what its random masks look like; ours name, per patch and step, the background or one
    of the image's classes, each as likely.

    Args:
        batch: Ground truth for the source `gt`; pixels that it ignores are not guided.
        assigned: The SPL, and the size of the result.
        config: Sections cam and s2c are read.
        noise: Random numbers in [0, 1) per patch, for the source `noise`.

    Returns:
        Probabilities of the background and of n classes, which classes these are, and the guided pixels.
    """
    valid = middles(batch.valid, config.cam.stride)
    if config.s2c.source == "gt":
        assert batch.masks is not None, "the loader reads masks for the oracle"
        masks = middles(batch.masks, config.cam.stride)
        every = torch.arange(batch.labels.shape[1], device=masks.device).expand_as(batch.labels)
        return _one_hot(masks, batch.labels.shape[1] + 1), every, valid & (masks != IGNORE)
    if config.s2c.source == "noise":
        assert noise is not None
        likely = pad(batch.labels.gather(1, assigned.present), (1, 0), value=1.0)
        bounds = (likely / likely.sum(1, keepdim=True)).cumsum(1)
        drawn = (noise.flatten(1)[:, :, None] >= bounds[:, None, :-1]).sum(2).view_as(noise)
        scale = assigned.spl.shape[2] // noise.shape[1]
        masks = drawn.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return _one_hot(masks, assigned.spl.shape[1]), assigned.present, valid
    return assigned.spl, assigned.present, valid


def _one_hot(masks: Int[Tensor, "b h w"], channels: int) -> Float[Tensor, "b k h w"]:
    """1 in the channel of each pixel's class; nothing where it is IGNORE."""
    classes = torch.arange(channels, device=masks.device)
    return (masks[:, None] == classes[:, None, None]).float()


def objective(terms: dict[str, Tensor], config: Config) -> Tensor:
    """L_CoSA: the weighted sum of the terms that are there.

    Paper: Eq. (11).
    """
    weights = {
        "cls": 1.0,
        "aux_cls": 1.0,
        "c2s": config.c2s.weight,
        "aux_c2s": config.c2s.weight,
        "s2c": config.s2c.weight,
        "csc": config.csc.weight,
    }
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
