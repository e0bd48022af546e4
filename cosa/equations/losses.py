"""The loss terms, one pure function each; their sum is written in `swap`.

Targets (labels, CPL, SPL, perplexity, weights) are constants: gradients go to the online network's outputs
only. Each term is a mean over pixels. A worker or micro-batch that holds a share of the batch passes
`pixels`, the mean number of counted pixels per share, so that the mean over shares is that of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from cosa.structures import IGNORE


def cls_loss(cls_logits: Float[Tensor, "b c"], labels: Float[Tensor, "b c"]) -> Float[Tensor, ""]:
    """L_cls: multi-label classification by the image-level labels.

    Paper: Eq. (1).

    Returns:
        Mean over images and classes, in nats.
    """
    return functional.binary_cross_entropy_with_logits(cls_logits, labels)


def c2s_loss(
    log_probs: Float[Tensor, "b k h w"],
    cpl: Int[Tensor, "b h w"],
    raw: Float[Tensor, "b h w"],
    pixels: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """L_c2s: fit the online segmentation to the CAM pseudo-labels, trusting each by its reliability.

    Paper: Eq. (5).

    Args:
        log_probs: Log-softmax of the online network's scores; both CPL are held against the same one.
        cpl: Classes in [0, k), or IGNORE on padding.
        raw: Reliability weights with mean 1 over the batch; all ones gives plain cross-entropy.
        pixels: Divisor in place of the number of labelled pixels here.

    Returns:
        Mean over labelled pixels, in nats; 0 (not NaN) when every pixel is IGNORE.
    """
    losses = raw * functional.nll_loss(log_probs, cpl, ignore_index=IGNORE, reduction="none")
    return _mean(losses, cpl != IGNORE, pixels)


def label_counts(cpl: Int[Tensor, "b h w"], valid: Bool[Tensor, "b h w"]) -> Float[Tensor, "3"]:
    """Numbers of valid pixels, of those labelled background and of those labelled foreground, as float64.

    `averaging_weights` needs those of the whole batch: workers add theirs up first.
    """
    background = valid & (cpl == 0)
    foreground = valid & (cpl != 0) & (cpl != IGNORE)
    return torch.stack([pixels.sum(dtype=torch.float64) for pixels in (valid, background, foreground)])


def averaging_weights(
    cpl: Int[Tensor, "b h w"], counts: Float[Tensor, "3"], *, balanced: bool
) -> Float[Tensor, "b h w"]:
    """What turns a mean over all valid pixels into the mean over the labelled ones, or into a balanced one.

    Paper: takes the mean over all pixels in Eq. 5; the authors' code takes half of the background's mean and
    half of the foreground's.

    Args:
        cpl: IGNORE where a pixel has no label.
        counts: Sum of `label_counts` over all pixels of the batch.
        balanced: Background and foreground count half each, however large; a side without a pixel counts 0.

    Returns:
        Factors of each pixel's loss, 0 where it has no label.
    """
    valid, background, foreground = counts.unbind()
    labelled = background + foreground
    sides = (2 * background, 2 * foreground) if balanced else (labelled, labelled)
    of_background, of_foreground = ((valid / side.clamp_min(1)).float() for side in sides)
    return torch.where(cpl == IGNORE, 0.0, torch.where(cpl == 0, of_background, of_foreground))


def s2c_loss(
    cam: Float[Tensor, "b c h w"],
    spl: Float[Tensor, "b m h w"],
    classes: Int[Tensor, "b n"],
    valid: Bool[Tensor, "b h w"],
    pixels: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """L_s2c: guide the online CAMs by the segmentation pseudo-labels.

    Paper: Eq. (8).

    Args:
        cam: Raw M of the online network, neither normalised nor cut at 0, in the size of the SPL; in the
            authors' code it is ReLU(M), and both are on the patch grid.
        spl: Probabilities of the background, whose channel guides no map, and of n classes; 0 of all others.
        classes: Index in [0, c) of these n, no two of them the same.
        valid: False on padding; R is the valid pixels.
        pixels: Divisor in place of the number of valid pixels here.

    Returns:
        Mean over valid pixels and all c classes, absent ones, too, in nats; 0 without a valid pixel.
    """
    guided = cam.take_along_dim(classes[:, :, None, None], 1)
    # against a probability q the cross-entropy of M is softplus(M) - q M, and most q are 0
    losses = (functional.softplus(cam).sum(1) - (spl[:, 1:] * guided).sum(1)) / cam.shape[1]
    return _mean(losses, valid, pixels)


def over_images(
    maps: Float[Tensor, "b n p q"], terms: Callable[[Tensor, slice], Sequence[Tensor]]
) -> tuple[Tensor, ...]:
    """Terms of small maps that are sums over images, made of one image at a time.

    What a term needs at full resolution, 81 classes of COCO for instance, is gone before the next image: the
    gradient on `maps` is made along with the value and is all that is kept.

    Args:
        maps: What the terms are functions of; their gradient reaches nothing else.
        terms: Terms of one image's maps, (1 n p q), and its place in the batch.
    """
    summed: Tensor = _OverImages.apply(maps, terms)  # type: ignore[no-untyped-call]
    return summed.unbind()


class _OverImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, terms: Callable[[Tensor, slice], Sequence[Tensor]]) -> Tensor:
        values, slopes = [], []
        for i in range(len(maps)):
            place = slice(i, i + 1)
            with torch.enable_grad():
                image = maps[place].detach().requires_grad_()
                found = terms(image, place)
                slopes.append(
                    torch.stack([torch.autograd.grad(term, image, retain_graph=True)[0] for term in found])
                )
            values.append(torch.stack([term.detach() for term in found]))
        ctx.save_for_backward(torch.cat(slopes, 1))
        return torch.stack(values).sum(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return torch.einsum("t,tbnpq->bnpq", gradients[0], slopes), None


def _mean(
    losses: Float[Tensor, "b h w"], counted: Bool[Tensor, "b h w"], pixels: Float[Tensor, ""] | None
) -> Float[Tensor, ""]:
    """Sum over the counted pixels divided by their number, or by `pixels`; 0 where that is 0."""
    number = counted.sum() if pixels is None else pixels
    return torch.where(counted, losses, 0.0).sum() / torch.where(number > 0, number, 1)


@dataclass(frozen=True)
class Regions:
    """Which positions are contrasted with which, within each image."""

    anchor: Bool[Tensor, "b n"]
    """Omega."""
    positive: Bool[Tensor, "b n n"]
    """R+ of each anchor; empty rows elsewhere."""
    negative: Bool[Tensor, "b n n"]
    """R- of each anchor; empty rows elsewhere."""


def contrast_regions(cpl: Int[Tensor, "b n"], perplexity: Float[Tensor, "b n"], epsilon: float) -> Regions:
    """Omega, R+ and R-: sure positions, and for each of them those of its class and of all others.

    Paper: Eq. (9).

    Args:
        cpl: CPL of M-dagger' in [0, k); IGNORE is in no region.
        perplexity: Perplexity of M-dagger'.
        epsilon: Largest perplexity of a sure position; `inf` takes every one.
    """
    anchor = (perplexity <= epsilon) & (cpl != IGNORE)
    both = anchor[:, :, None] & anchor[:, None, :]
    same = cpl[:, :, None] == cpl[:, None, :]
    itself = torch.eye(cpl.shape[1], dtype=torch.bool, device=cpl.device)
    return Regions(anchor=anchor, positive=both & same & ~itself, negative=both & ~same)


def csc_loss(
    cam: Float[Tensor, "b c p q"],
    cpl: Int[Tensor, "b p q"],
    perplexity: Float[Tensor, "b p q"],
    epsilon: float,
    tau: float,
    keys: Float[Tensor, "b p q"],
    max_anchors: int,
) -> Float[Tensor, ""]:
    """L_csc: pull the online CAMs together within a class of M-dagger', push them apart between classes.

    Paper: Eq. (10).
    Paper: calls l_d a distance and leaves it and tau open; we take the cosine similarity of
    class-activation vectors.

    Args:
        cam: Raw M of the online network.
        cpl: CPL of M-dagger' at the same positions, IGNORE on padding.
        perplexity: Perplexity of M-dagger'.
        epsilon: Largest perplexity that is contrasted.
        tau: InfoNCE temperature, > 0.
        keys: Random numbers in [0, 1). Of a larger Omega the `max_anchors` positions with the largest keys
            stay, and R+ and R- lie within them: memory is b * max_anchors ** 2.
        max_anchors: Most positions contrasted per image.

    Returns:
        Mean over images, in nats. An image with an empty Omega and an anchor with an empty R+ add 0.
    """
    sure = (perplexity <= epsilon) & (cpl != IGNORE)
    ranked = torch.where(sure, keys, -1.0).flatten(1)
    kept = ranked.topk(min(max_anchors, ranked.shape[1]), sorted=False).indices
    regions = contrast_regions(cpl.flatten(1).gather(1, kept), perplexity.flatten(1).gather(1, kept), epsilon)

    vectors = cam.flatten(2).gather(2, kept[:, None].expand(-1, cam.shape[1], -1))
    vectors = functional.normalize(vectors, dim=1, eps=1e-6)
    similarity = vectors.transpose(1, 2) @ vectors / tau
    # a finite floor, not -inf: the gradient of a log-sum-exp over -inf alone is NaN
    floor = torch.finfo(similarity.dtype).min
    log_k = similarity.masked_fill(~regions.negative, floor).logsumexp(2, keepdim=True)
    losses = functional.softplus(log_k - similarity)  # -log(L / (L + K))

    per_anchor = _masked_mean(losses, regions.positive)
    return _masked_mean(per_anchor, regions.anchor).mean()


def _masked_mean(values: Float[Tensor, "*s n"], mask: Bool[Tensor, "*s n"]) -> Float[Tensor, "*s"]:
    """Mean of the marked values along the last axis; 0 where none is marked."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)
