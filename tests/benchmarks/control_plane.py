"""What a sweep of many trials costs apart from training: trials whose trainer does nothing, all else real.

    python tests/benchmarks/control_plane.py TRIALS [--metrics N] [--out DIR]

Runs Table 3b with as many seeds as make TRIALS trials, on a Ray of its own, tracked in a SQLite store, with a
trainer that writes the files of a finished run and logs N metrics of one step. Prints the driver's and the
children's memory, the time between trials, what MLflow took, the report's time, and what a study of as many
trials weighs. A benchmark: nothing here is asserted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])

import psutil

ROWS = 6  # of Table 3b, each a trial of its own; a warm-up a seed comes on top
METRICS = 40
MEGABYTE = 2**20


def train(spec: Any, **_: Any) -> None:
    """Leave what a finished run leaves, and log as it does."""
    import json
    import os

    from cosa.config import identity, warmup_identity
    from cosa.storage.checkpoint import hash_path
    from cosa.storage.files import digest

    config, out, tracker = spec.config, spec.out, spec.tracking.tracker()
    step = spec.stop_at or config.train.iterations
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    path = out / f"checkpoints/step_{step:08d}.pt"
    path.touch()
    hash_path(path).write_text(f"{digest(path)}  {path.name}\n")
    tags = {"cosa.data_fingerprint": spec.data_tags.get("cosa.data_fingerprint", "")}
    tracker.start(config, out=out, tags=tags)
    metrics = {f"train/{i}": float(i) for i in range(int(os.environ["COSA_BENCHMARK_METRICS"]))}
    metrics["val/assignment/seg_miou"] = 0.5
    tracker.log_metrics(metrics, step)
    result = {
        "identity": identity(config),
        "warmup_identity": warmup_identity(config),
        "step": step,
        "metrics": {"val/assignment/seg_miou": 0.5},
        "seconds": 1.0,
        **{key.removeprefix("cosa."): value for key, value in spec.data_tags.items()},
    }
    (out / "result.json").write_text(json.dumps(result))
    tracker.log_artifact(out / "result.json")
    tracker.finish("FINISHED")


class Memory:
    """The most memory seen, of this process and of all it started, looked at twice a second."""

    def __init__(self) -> None:
        self.own = self.children = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.5):
            self.own = max(self.own, me.memory_info().rss)
            total = 0
            for child in me.children(recursive=True):
                try:
                    total += child.memory_info().rss
                except psutil.Error:
                    continue
            self.children = max(self.children, total)

    def end(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()


def tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    return work(), time.perf_counter() - begun


def sweep(trials: int, folder: Path) -> None:
    """The sweep, from its command line to its report."""
    from cosa.data.shapes import write_shapes
    from sweeps.reporting import render as report
    from sweeps.running import driver
    from tests.sweeps.running.stub_trainer import train_with

    write_shapes(folder / "shapes", train_images=8, val_images=2)
    seeds = -(-trials // ROWS)
    arguments = [
        "--preset",
        "shapes",
        "--tables",
        "3b",
        "--seeds",
        str(seeds),
        "--out",
        str(folder / "sweep"),
    ]
    arguments += [
        "--tracking-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--set",
        f"data.root={folder / 'shapes'}",
    ]

    written: list[float] = []
    write = report.write

    def timed_write(*given: Any) -> Any:
        files, seconds = timed(lambda: write(*given))
        written.append(seconds)
        return files

    report.write = timed_write
    memory = Memory()
    begun = time.perf_counter()
    train_with(train)
    code = driver.main("control_plane", "", ["3b"], arguments)
    wall = time.perf_counter() - begun
    memory.end()
    count = seeds * (ROWS + 1)
    size = sum(path.stat().st_size for path in folder.glob("mlflow.db*"))
    tell(f"trials {count} with warm-ups, exit code {code}, wall {wall:.0f} s, {wall / count:.3f} s a trial")
    tell(f"driver {memory.own / MEGABYTE:.0f} MB, its processes {memory.children / MEGABYTE:.0f} MB at most")
    tell(
        f"MLflow file {size / MEGABYTE:.1f} MB, {size / count / 1024:.1f} KB a run; report {written[0]:.1f} s"
    )


def writes(trials: int, folder: Path) -> None:
    """How many metrics a second one process delivers to the store."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.search_experiments()[0].experiment_id
    run = client.create_run(experiment).info.run_id
    now = int(time.time() * 1000)
    points = [Metric(f"m{i % METRICS}", float(i), now, i // METRICS) for i in range(20_000)]

    def deliver() -> None:
        for i in range(0, len(points), 1000):
            client.log_batch(run, metrics=points[i : i + 1000])

    _, seconds = timed(deliver)
    tell(f"MLflow takes {len(points) / seconds:.0f} metrics a second from one process, in batches of 1,000")
    _, seconds = timed(lambda: client.search_runs([experiment], max_results=min(1000, trials)))
    tell(f"a page of {min(1000, trials)} runs is read in {seconds:.1f} s")


def study(trials: int, folder: Path) -> None:
    """A search's study of as many trials: its size, its opening, and the time to suggest one more."""
    from cosa.config.presets import get_preset
    from sweeps.tuning.space import SPACE
    from sweeps.tuning.study import open_study

    base = get_preset("shapes")
    space = SPACE.resolved(base)
    opened = open_study(folder, space, base)
    spent = []
    for _ in range(trials):
        record, seconds = timed(opened.ask)
        spent.append(seconds)
        opened.finish(record.number, 0.5)
    last = sorted(spent[-20:])[10]
    _, seconds = timed(lambda: open_study(folder, space, base))
    size = sum(path.stat().st_size for path in folder.glob("study.journal*"))
    tell(f"study of {trials}: {size / MEGABYTE:.2f} MB, opened in {seconds:.1f} s, {last:.2f} s a suggestion")


def main() -> None:
    """Measure, print, leave nothing behind."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trials", type=int)
    parser.add_argument("--metrics", type=int, default=METRICS)
    parser.add_argument("--study", type=int, default=300, help="trials of the study (default 300)")
    given = parser.parse_args()
    os.environ["COSA_BENCHMARK_METRICS"] = str(given.metrics)
    folder = Path(tempfile.mkdtemp(prefix="control-plane-"))
    try:
        sweep(given.trials, folder)
        writes(given.trials, folder)
        study(given.study, folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
