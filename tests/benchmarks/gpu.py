"""What a GPU makes of a training step and of an evaluation, in under 25 minutes on the first one at hand.

    python tests/benchmarks/gpu.py              # ViT-B/16 at 448 pixels
    python tests/benchmarks/gpu.py --small      # a small ViT at 64: only to see that it runs, also on a CPU

Needs torch, timm and what `cosa.config` and the equations import (pydantic, jaxtyping); no Ray, no MLflow, no
albumentations, no data: images are noise, weights random. Prints, one after the other, each with its minutes:

    step        seconds and peak memory in fp32, TF32, bf16 and bf16 compiled, at batch 4 and 16
    share       what part of the card's own matrix products a step reaches: FLOPs as torch counts them over
                seconds, over the FLOPs a second of one large product in the same precision
    kernels     launches a step, the attention that runs, the longest kernels, what waits for the device
    evaluation  images a second of `evaluate`, five scales with flips, in bf16
    trials      images a second of one, two and three processes that train side by side, at batch 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from cosa.config import Config, override
from cosa.evaluation.evaluate import evaluate
from cosa.networks.network import autocast
from cosa.structures import Batch, EvaluationBatch, Ranks
from cosa.training.step import TrainingState, build_state, training_step, wrap

CLASSES = 20
VARIANTS = {
    "fp32": ("fp32", "none", False),
    "TF32": ("fp32", "tf32", False),
    "bf16": ("bf16", "tf32", False),
    "bf16 compiled": ("bf16", "tf32", True),
}
"""`train.precision`, what matrix products of fp32 are computed in, and `train.compile`, by name."""
SMALL = {
    "data.crop_size": 64,
    "network.encoder": "vit_tiny_patch16_224",
    "network.decoder_channels": 32,
    "evaluation.size": 64,
}
GIBIBYTE = 2**30
SECONDS = 5.0
"""Of steps that are timed, after two that are not."""


def main() -> None:
    """Measure all of it, or be one of several trials."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a small ViT at 64 pixels, on a CPU, too")
    parser.add_argument("--trial", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args()
    ranks = Ranks.current()
    if not (given.small or ranks.device.type == "cuda"):
        parser.error("a GPU must be there, got none; --small shows on a CPU that the script runs")
    base = override(
        Config(), {"network.pretrained": False, "train.warmup": 0, **(SMALL if given.small else {})}
    )
    if given.trial:
        say(json.dumps(_trial(base, ranks, given.trial)))
        return
    name = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU"
    say(f"{name}, torch {torch.__version__}, {base.network.encoder}, {base.data.crop_size} pixels")
    for part in (steps, kernels, evaluation, trials):
        begun = time.perf_counter()
        part(base, ranks)
        say(f"({part.__name__}: {(time.perf_counter() - begun) / 60:.1f} min)")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def wait(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()


def noise(config: Config, device: torch.device) -> Batch:
    """A batch of noise, of whose images the i-th holds 1 + i % 3 classes."""
    size, side = config.train.batch_size, config.data.crop_size
    labels = torch.zeros(size, CLASSES)
    for i, row in enumerate(labels):
        row[5 * (i % 3) : 5 * (i % 3) + 1 + i % 3] = 1
    weak, strong = torch.randn(2, size, 3, side, side)
    batch = Batch(weak, strong, labels, torch.ones(size, side, side, dtype=torch.bool))
    return batch.to(device)


def prepared(config: Config, ranks: Ranks) -> tuple[TrainingState, Callable[[], Any]]:
    """A run's state and its next step."""
    state = build_state(config, CLASSES, ranks.device)
    learner, batch = wrap(state, config, ranks), noise(config, ranks.device)
    return state, lambda: training_step(state, learner, batch, config, ranks)


def seconds_of(step: Callable[[], Any], ranks: Ranks) -> float:
    """Seconds of one call, over as many as fill SECONDS."""
    for _ in range(2):
        step()
    wait(ranks)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < SECONDS or count < 3:
        step()
        wait(ranks)
        count += 1
    return (time.perf_counter() - begun) / count


def product_rate(precision: str, ranks: Ranks) -> float:
    """FLOPs a second of one large matrix product in the precision of a variant."""
    side = 8192 if ranks.device.type == "cuda" else 512
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = torch.randn(2, side, side, device=ranks.device, dtype=kind)
    return 2 * side**3 / seconds_of(lambda: one @ other, ranks)


def steps(base: Config, ranks: Ranks) -> None:
    """Time, memory and share of the card's own matrix products by precision and batch."""
    cuda = ranks.device.type == "cuda"
    for size in (4, 16):
        for name, (precision, products, compiled) in VARIANTS.items():
            changes = {"train.precision": precision, "train.compile": compiled, "train.batch_size": size}
            try:
                if cuda:
                    torch.cuda.reset_peak_memory_stats()
                _, step = prepared(override(base, changes), ranks)
                torch.backends.cuda.matmul.fp32_precision = products
                torch.backends.cudnn.conv.fp32_precision = products
                seconds = seconds_of(step, ranks)
                counted = ""
                if not compiled:
                    with FlopCounterMode(display=False) as counter:
                        step()
                    share = counter.get_total_flops() / seconds / product_rate(precision, ranks)
                    counted = f", {share:.0%} of the card's own matrix products"
                if cuda:
                    counted += f", {torch.cuda.max_memory_allocated() / GIBIBYTE:.1f} GiB"
                say(f"batch {size:>2} {name:<14} {seconds:.3f} s, {size / seconds:.1f} images/s{counted}")
            except (RuntimeError, torch.OutOfMemoryError) as error:  # the next may fit or compile
                say(f"batch {size:>2} {name:<14} {' '.join(str(error).split())[:120]}")
            torch.compiler.reset()
            if cuda:
                torch.cuda.empty_cache()


def kernels(base: Config, ranks: Ranks) -> None:
    """Launches, attention, the longest kernels and what waits, of a step in bf16 at batch 4."""
    _, step = prepared(override(base, {"train.precision": "bf16"}), ranks)
    step()
    wait(ranks)
    cuda = ranks.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
        step()
        wait(ranks)
    found = seen.key_averages()
    launches = sum(one.count for one in found if "LaunchKernel" in one.key)
    attention = sorted({one.key for one in found if "scaled_dot_product" in one.key})
    say(f"{launches} launches a step; attention: {', '.join(attention)}")
    order = "self_device_time_total" if cuda else "self_cpu_time_total"
    say(found.table(sort_by=order, row_limit=15, max_name_column_width=70))
    if cuda:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        say(f"{len(waits)} operations of a step wait for the device")


def evaluation(base: Config, ranks: Ranks) -> None:
    """Images a second of `evaluate` in bf16, at the batch of the default and at four times that."""
    config = override(base, {"train.precision": "bf16", "evaluation.coexistence": ()})
    state, _ = prepared(config, ranks)
    network, side = state.assignment, config.evaluation.size
    for size in (config.evaluation.batch_size, 4 * config.evaluation.batch_size):
        labels = torch.zeros(size, CLASSES)
        labels[:, 3] = labels[:, 7] = 1
        batch = EvaluationBatch(
            names=tuple(map(str, range(size))),
            images=torch.randn(size, 3, side, side),
            sizes=((375, 500),) * size,
            masks=tuple(torch.randint(0, CLASSES + 1, (375, 500)) for _ in range(size)),
            labels=labels,
        )

        def judge(batch: EvaluationBatch = batch) -> None:
            with autocast(config.train, ranks.device):
                evaluate(
                    network,
                    [batch],
                    config=config,
                    classes=tuple(f"class {i}" for i in range(CLASSES)),
                    xi=0.45,
                    aux_xi=0.45,
                    device=ranks.device,
                )

        say(f"evaluation, batch {size:>2}: {size / seconds_of(judge, ranks):.1f} images/s")


def trials(base: Config, ranks: Ranks) -> None:
    """Images a second of all processes together, that train side by side in bf16 at batch 2."""
    for count in (1, 2, 3):
        start = time.time() + 60 + 15 * count  # all have imported and warmed up by then
        command = [sys.executable, *sys.argv, "--trial", str(start)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        said = [process.communicate()[0].strip().splitlines() for process in running]
        rates = [json.loads(lines[-1]) for lines in said if lines]
        say(f"{count} side by side: {sum(rates):.1f} images/s together, from {len(rates)} of them")


def _trial(base: Config, ranks: Ranks, start: float) -> float:
    """Images a second of this process from the moment `start` on."""
    config = override(base, {"train.precision": "bf16", "train.batch_size": 2})
    _, step = prepared(config, ranks)
    step()
    wait(ranks)
    time.sleep(max(0.0, start - time.time()))
    return config.train.batch_size / seconds_of(step, ranks)


if __name__ == "__main__":
    main()
