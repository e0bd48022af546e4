"""One of two processes that train together over gloo, without Ray: `one_of_two.py RANK CONFIG OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import distributed

from cosa.config import from_json
from cosa.training.trainer import RunSpec, train

if __name__ == "__main__":
    rank, config, out = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = f"file://{out.absolute().with_suffix('.store')}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    train(RunSpec(config=from_json(config.read_text()), out=str(out)))
    distributed.destroy_process_group()
