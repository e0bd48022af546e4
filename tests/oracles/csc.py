"""Contrastive separation, one pair of positions after the other, straight from Eq. (9) and (10)."""

from __future__ import annotations

import math
from itertools import product

from torch import Tensor

from cosa.structures import IGNORE


def slow_csc_loss(cam: Tensor, cpl: Tensor, perplexity: Tensor, epsilon: float, tau: float) -> float:
    """Mean over images, no cap on the anchors."""
    images = [
        _image(cam[i].tolist(), cpl[i].tolist(), perplexity[i].tolist(), epsilon, tau)
        for i in range(len(cam))
    ]
    return sum(images) / len(images)


def _image(
    cam: list[list[list[float]]],
    cpl: list[list[int]],
    perplexity: list[list[float]],
    epsilon: float,
    tau: float,
) -> float:
    rows, columns = len(cpl), len(cpl[0])
    omega = [
        (x, y)
        for x, y in product(range(rows), range(columns))
        if perplexity[x][y] <= epsilon and cpl[x][y] != IGNORE
    ]
    vectors = {(x, y): [channel[x][y] for channel in cam] for x, y in omega}

    def similarity(a: tuple[int, int], b: tuple[int, int]) -> float:
        return math.exp(_cosine(vectors[a], vectors[b]) / tau)

    total = 0.0
    for anchor in omega:
        own = cpl[anchor[0]][anchor[1]]
        positive = [p for p in omega if cpl[p[0]][p[1]] == own and p != anchor]
        negative = [p for p in omega if cpl[p[0]][p[1]] != own]
        k = sum(similarity(anchor, n) for n in negative)
        for p in positive:
            contrast = similarity(anchor, p)
            total -= math.log(contrast / (contrast + k)) / len(positive)
    return total / len(omega) if omega else 0.0


def _cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))
