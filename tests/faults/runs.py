"""What tests of faults share: a small run's command, its processes, and what two runs have in common."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from cosa.storage.run_folder import read_metrics
from tests.reading import ROOT

STEPS = 40
EVERY = 5
"""Steps between two checkpoints."""
PATIENCE = 240.0  # seconds; a busy machine starts Ray slowly

SETTINGS = {
    "data.crop_size": 32,
    "data.loader_workers": 0,
    "network.encoder": "vit_tiny_patch16_224",
    "network.pretrained": "false",
    "network.patch_size": 4,
    "network.width": 32,
    "network.depth": 4,
    "network.heads": 2,
    "network.aux_block": -2,
    "network.decoder_channels": 16,
    "cam.scales": "1.0",
    "threshold.queue": 4,
    "csc.max_anchors": 32,
    "optim.lr_warmup": 0,
    "train.iterations": STEPS,
    "train.warmup": 10,
    "train.batch_size": 6,
    "train.log_every": 1,
    "train.checkpoint_every": EVERY,
    "evaluation.every": 20,
    "evaluation.size": 32,
    "evaluation.scales": "1.0",
    "evaluation.panel_images": 1,
}
"""A run of some seconds."""


def train_command(out: Path, data: Path, *more: str) -> list[str]:
    """`cosa-train` of a small run."""
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    return [
        *(sys.executable, "-c", "import sys; from cosa.cli import train; sys.exit(train())", "shapes"),
        *("--out", str(out), "--data.root", str(data), *flags, *more),
    ]


SWEEP_STEPS, SWEEP_WARMUP = 60, 30


def sweep_command(folder: Path, data: Path) -> list[str]:
    """Table 4b: one warm-up and two arms."""
    changes = {
        **SETTINGS,
        "train.iterations": SWEEP_STEPS,
        "train.warmup": SWEEP_WARMUP,
        "evaluation.every": 30,
    }
    return [
        *(sys.executable, "sweeps/ablation.py", "--preset", "shapes", "--tables", "4b"),
        *("--out", str(folder / "sweep"), "--tracking-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--set", f"data.root={data}", *(f"{name}={value}" for name, value in changes.items())),
    ]


def rows(folder: Path) -> list[dict[str, str]]:
    """What a sweep's report says, but for the ids of the runs that say it."""
    with (folder / "sweep" / "tables.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "runs"} for row in csv.DictReader(file)]


def start(
    command: Sequence[str], log: Path, *, folder: Path = ROOT, **environment: str
) -> subprocess.Popen[bytes]:
    """A command in a session of its own, as a scheduler starts it; in `folder`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        )


def finish(command: Sequence[str], log: Path, *, folder: Path = ROOT, **environment: str) -> str:
    """Run a command to its end, which must be a good one; returns what it printed."""
    process = start(command, log, folder=folder, **environment)
    code = process.wait(PATIENCE)
    assert code == 0, log.read_text()[-3000:]
    return log.read_text()


def wait_until(met: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for something that `process` is to do."""
    deadline = time.monotonic() + PATIENCE
    while not met():
        assert process.poll() is None, f"ended too early: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"waited in vain: {log.read_text()[-3000:]}"
        time.sleep(0.02)


def end(process: subprocess.Popen[bytes], number: signal.Signals) -> int:
    """Send a signal and wait for the end, of the processes that it started, too; returns the exit code."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    code = process.wait(PATIENCE)
    alive = psutil.wait_procs(children, timeout=120)[1]
    assert not alive, f"processes outlived their parent: {alive}"
    return code


def last_step(out: Path) -> int:
    """The last step in a run's journal."""
    path = out / "journal.jsonl"
    steps = [0]
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            steps.append(int(json.loads(line)["step"]))
        except ValueError:  # a line being written
            continue
    return steps[-1]


def newest_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of a run, whole or not."""
    return max((out / "checkpoints").glob("step_*.pt"), default=None)


def what_counts(out: Path) -> dict[str, Any]:
    """What a run found and says of every step, without what depends on the clock or on MLflow."""
    result = json.loads((out / "result.json").read_text())
    clock = "train/images_per_second"
    return {
        "result": {k: v for k, v in result.items() if k not in {"seconds", "run_id"}},
        "journal": [
            (step, {name: repr(value) for name, value in metrics.items() if name != clock})
            for step, metrics in read_metrics(out)
        ],
    }


def tracked_steps(uri: str) -> dict[str, list[int]]:
    """Steps of the total loss of every run in a store, by the run's id."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    return {
        run.info.run_id: [p.step for p in client.get_metric_history(run.info.run_id, "train/loss/total")]
        for run in runs
    }


def run_tags(uri: str, run_id: str) -> dict[str, str]:
    """The tags of a run in a store."""
    from mlflow import MlflowClient

    tags: dict[str, str] = MlflowClient(uri).get_run(run_id).data.tags
    return tags
