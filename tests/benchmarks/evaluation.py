"""Images per second of `evaluate` beside that of a second checkout, and what takes how much of ours.

    python tests/benchmarks/evaluation.py OLD_CHECKOUT --set data.root=DIR/VOCdevkit/VOC2012

The case is the default evaluation (448 pixels, five scales and their flips) of the first images of VOC's val,
with DeiT-Tiny from random numbers, on one CPU core; images and masks are decoded within the time.
"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import pairs

SETTINGS = {
    "network.encoder": "deit_tiny_patch16_224",
    "network.pretrained": "false",
    "data.loader_workers": "1",
    "evaluation.batch_size": "4",
    "evaluation.max_images": "4",
}


def prepare(given: argparse.Namespace, config: Any) -> pairs.Work:
    """An evaluation of the same few images, again and again."""
    import torch

    evaluation = pairs.module("cosa.evaluation.evaluate", "cosa.evaluation")
    from cosa.data.loader import evaluation_batches
    from cosa.networks.network import build_network

    data = pairs.module("cosa.data.open", "cosa.data").open_dataset(config.data, config.data.val_split)
    torch.manual_seed(0)
    network = build_network(config.network, len(data.classes), config.data.crop_size).eval()
    if given.side == "here":
        _share(network, evaluation)

    def work() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            evaluation.evaluate(
                network,
                evaluation_batches(data, config),
                config=config,
                classes=data.classes,
                xi=0.45,
                aux_xi=0.45,
                device=torch.device("cpu"),
            )
        return int(config.evaluation.max_images)

    return work


def _share(network: Any, evaluation: Any) -> None:
    """Watch the parts of our own evaluation."""
    multiscale = importlib.import_module("cosa.networks.multiscale")
    pairs.share("encoder", type(network.encoder), ["forward"])
    pairs.share("decoder", type(network.decoder), ["forward"])
    pairs.share("CAM heads", type(network.cam_head), ["forward"])
    pairs.share("resizing while views are fused", multiscale, ["resize"])
    pairs.share("fusing views", evaluation, ["look"])
    pairs.share("counting segmentation", evaluation, ["_count_segmentation"])
    pairs.share("counting CPL", evaluation, ["_count_cams"])
    pairs.share("metrics of the counts", evaluation, ["_summarise"])


if __name__ == "__main__":
    pairs.run(__doc__, SETTINGS, prepare)
