"""What a training step costs beside that of a second checkout, interleaved in one run.

    python tests/benchmarks/step.py OLD_CHECKOUT
    python tests/benchmarks/step.py . --set data.crop_size=448 --classes 20 --classes-here 80
    python tests/benchmarks/step.py . --set-here cam.stride=4

The case is full CoSA, none of it warm-up: DeiT-Tiny from random numbers, crop 224, three scales with flips,
batch 4 of images of noise with one, two, three and one class, on one CPU core.
"""

from __future__ import annotations

import argparse
from typing import Any

import pairs

SETTINGS = {
    "data.crop_size": "224",
    "network.encoder": "deit_tiny_patch16_224",
    "network.pretrained": "false",
    "network.drop_path": "0",
    "train.warmup": "0",
    "train.batch_size": "4",
}


def random_batch(batch_size: int, classes: int, side: int) -> Any:
    """Images of noise, of which the i-th holds 1 + i % 3 classes; a tenth of each is padding."""
    import torch

    from cosa.structures import Batch

    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(batch_size, classes)
    for i, row in enumerate(labels):
        row[torch.randperm(classes, generator=generator)[: 1 + i % 3]] = 1
    valid = torch.ones(batch_size, side, side, dtype=torch.bool)
    valid[:, -side // 10 :] = False
    weak, strong = torch.randn(2, batch_size, 3, side, side, generator=generator)
    return Batch(weak=weak, strong=strong, labels=labels, valid=valid)


def prepare(given: argparse.Namespace, config: Any) -> pairs.Work:
    """A training step on the same batch, again and again."""
    step = pairs.module("cosa.training.step", "cosa.step")
    ranks = pairs.module("cosa.ranks", "cosa.structures").Ranks.current()
    batch = random_batch(config.train.batch_size, given.classes, config.data.crop_size).to(ranks.device)
    state = step.build_state(config, given.classes, ranks.device)
    learner = step.wrap(state, config, ranks)

    def work() -> int:
        step.training_step(state, learner, batch, config, ranks)
        return int(config.train.batch_size)

    return work


if __name__ == "__main__":
    pairs.run(__doc__, SETTINGS, prepare)
