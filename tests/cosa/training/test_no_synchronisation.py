"""No step reads a value back from the device: a GPU would stand still once per call.

On a CPU nothing waits, so every operation of a whole step is looked at instead, and those are refused whose
result or whose size is a value on the device. Where there is a GPU, CUDA itself is asked.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosa.config import Config, override
from cosa.data import open_dataset, train_batches
from cosa.structures import Batch, Ranks
from cosa.training.step import build_state, training_step, wrap

CLASSES = 6
READS = (
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.equal,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.bincount,
    torch.ops.aten._unique2,
    torch.ops.aten.repeat_interleave,
)
INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class NoReading(TorchDispatchMode):
    """Refuses what a GPU would have to finish before Python could go on."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet = func.overloadpacket
        masks = [x for x in tree_leaves(args[1:2]) if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
        if packet in READS or (packet in INDEXED and masks):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["dynamic, raw", "fixed band, balanced", "noise", "accumulated", "warm-up"])
def config(tiny_config: Config, request: pytest.FixtureRequest) -> Config:
    changes: dict[str, Any] = {
        "dynamic, raw": {},
        "fixed band, balanced": {
            "threshold.mode": "fixed",
            "threshold.band": (0.2, 0.7),
            "c2s.average": "balanced",
            "s2c.cam": "relu",
        },
        "noise": {"s2c.source": "noise"},
        "accumulated": {"train.accumulate": 2, "optim.clip_norm": 1.0},
        "warm-up": {"train.warmup": 8},
    }[request.param]
    return override(tiny_config, {"train.warmup": 0, "train.iterations": 8, **changes})


@pytest.fixture
def batches(config: Config) -> list[Batch]:
    return [*itertools.islice(train_batches(open_dataset(config.data, "train_aug"), config, start=0), 3)]


@pytest.mark.parametrize(
    "reading",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool((x > 0).all()),
        lambda x: x.masked_select(x > 0),
    ],
)
def test_reading_a_value_is_seen(reading: Any) -> None:
    with NoReading(), pytest.raises(AssertionError, match="waits for the device"):
        reading(torch.ones(3))


def test_no_operation_of_a_step_reads_a_value(config: Config, batches: list[Batch]) -> None:
    ranks = Ranks.current()
    state = build_state(config, CLASSES, ranks.device)
    learner = wrap(state, config, ranks)

    with NoReading():
        for batch in batches:
            terms = training_step(state, learner, batch.to(ranks.device), config, ranks)

    assert all(bool(term.isfinite()) for term in terms.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_never_waits_in_a_step(config: Config, batches: list[Batch], precision: str) -> None:
    config, ranks = override(config, {"train.precision": precision}), Ranks.current()
    state = build_state(config, CLASSES, ranks.device)
    learner = wrap(state, config, ranks)
    first, *later = [batch.pin_memory() for batch in batches]
    training_step(state, learner, first.to(ranks.device), config, ranks)  # libraries set themselves up

    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in later:
            training_step(state, learner, batch.to(ranks.device), config, ranks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
