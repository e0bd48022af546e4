"""Images per second that one core reads and augments, beside those of a second checkout.

    python tests/benchmarks/loader.py OLD_CHECKOUT --set data.root=DIR/VOCdevkit/VOC2012

The case is the default pipeline at crop 224 on the training images of VOC, JPEGs of about 500 x 375 pixels:
decoding, both views, normalised batches of 8, in the process itself. The files come from the page cache.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from typing import Any

import pairs

SETTINGS = {
    "data.crop_size": "224",
    "data.loader_workers": "0",
    "train.batch_size": "8",
}
BATCHES = 8


def prepare(given: argparse.Namespace, config: Any) -> pairs.Work:
    """The same batches, again and again."""
    from cosa.data.loader import train_batches

    data = pairs.module("cosa.data.open", "cosa.data").open_dataset(config.data, config.data.train_split)
    if given.side == "here":
        _share()

    def work() -> int:
        batches = itertools.islice(train_batches(data, config, start=0), BATCHES)
        return sum(len(batch.labels) for batch in batches)

    return work


def _share() -> None:
    """Watch the parts of our own loader."""
    dataset = importlib.import_module("cosa.data.dataset")
    views = importlib.import_module("cosa.data.views")
    loader = importlib.import_module("cosa.data.loader")
    pairs.share("decoding", dataset, ["read_image"])
    pairs.share("views", views.Views, ["__call__"])
    pairs.share("normalising", loader, ["normalise"])


if __name__ == "__main__":
    pairs.run(__doc__, SETTINGS, prepare)
