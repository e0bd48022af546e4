"""A sweep whose driver is killed at random times, again and again, ends with the undisturbed one's report."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.faults import account
from tests.reading import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

KILLS = int(os.environ.get("COSA_FAULT_KILLS", "20"))
SEED = int(os.environ.get("COSA_FAULT_SEED", "0"))
LONGEST = 25.0  # seconds that a driver lives at most; it needs about 10 before its first trial starts


def command(base: Path, name: str, data: Path) -> list[str]:
    settings = [
        f"data.root={data}",
        "train.iterations=100",
        "train.warmup=40",
        "train.batch_size=4",
        "train.checkpoint_every=5",
        "train.log_every=5",
        "evaluation.every=50",
        "evaluation.panel_images=1",
    ]
    return [
        *(sys.executable, "sweeps/ablation.py", "--preset", "shapes", "--tables", "3b"),
        *("--out", str(base / name), "--tracking-uri", f"sqlite:///{base}/{name}.db"),
        *("--set", *settings),
    ]


def start(arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            arguments,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def run_to_the_end(arguments: Sequence[str], log: Path) -> None:
    process = start(arguments, log)
    assert process.wait(1200) == 0, log.read_text()[-3000:]


def _trains(process: psutil.Process) -> bool:
    """Whether a process of Ray's runs a trial just now: it says so in its title."""
    try:
        return any("ImplicitFunc.train" in part for part in process.cmdline())
    except psutil.Error:
        return False


def kill(process: subprocess.Popen[bytes], dice: random.Random) -> str:
    """Kill -9 the driver, or first one of the processes that train, and say which."""
    children = psutil.Process(process.pid).children(recursive=True)
    training = [child for child in children if _trains(child)]
    if training and dice.random() < 0.3:
        victim = dice.choice(training)
        victim.kill()
        time.sleep(dice.uniform(0, 3))
        what = "a trial, then the driver"
    else:
        what = "the driver"
    process.send_signal(signal.SIGKILL)
    process.wait()
    gone = psutil.wait_procs(children, timeout=120)[1]
    assert not gone, f"processes outlived their driver: {gone}"
    return what


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of both sweeps, and what was killed when."""
    from cosa.data.shapes import write_shapes

    base = tmp_path_factory.mktemp("kills")
    write_shapes(base / "shapes", train_images=64, val_images=12)
    run_to_the_end(command(base, "undisturbed", base / "shapes"), base / "undisturbed.log")

    dice, told = random.Random(SEED), []
    disturbed = command(base, "disturbed", base / "shapes")
    finished = 0
    while len(told) < KILLS:
        process = start(disturbed, base / "disturbed.log")
        life = dice.uniform(2, LONGEST)
        try:
            code = process.wait(life)
        except subprocess.TimeoutExpired:
            what = kill(process, dice)
            account.tried(f"kill -9 of {what} at a random time")
            told.append(f"{what} after {life:.1f} s")
            continue
        assert code == 0, (base / "disturbed.log").read_text()[-3000:]
        finished += 1  # faster than its killers: another sweep takes the rest of the kills
        compare(base, "disturbed")
        (base / "disturbed").rename(base / f"disturbed-{finished}")
        (base / "disturbed.db").rename(base / f"disturbed-{finished}.db")
    run_to_the_end(disturbed, base / "disturbed.log")
    sys.stdout.write("\n".join(["killed:", *told, f"sweeps finished in between: {finished}"]) + "\n")
    return base, told


def rows(base: Path, name: str) -> list[dict[str, str]]:
    """What the report says, but for the ids of the runs that say it."""
    with (base / name / "tables.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "runs"} for row in csv.DictReader(file)]


def compare(base: Path, name: str) -> None:
    assert rows(base, name) == rows(base, "undisturbed")


def test_the_report_is_that_of_the_undisturbed_sweep(tables: tuple[Path, list[str]]) -> None:
    base, told = tables

    assert len(told) == KILLS
    compare(base, "disturbed")


def test_no_run_is_counted_twice(tables: tuple[Path, list[str]]) -> None:
    from mlflow import MlflowClient

    base, told = tables
    counts = {}
    for name in ("undisturbed", "disturbed"):
        client = MlflowClient(f"sqlite:///{base}/{name}.db")
        experiment = client.get_experiment_by_name("cosa")
        runs = client.search_runs([experiment.experiment_id])
        counts[name] = sorted(run.info.run_name.replace(name, "sweep") for run in runs)
        assert {run.info.status for run in runs} == {"FINISHED"}
        for run in runs:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss/total")]
            assert len(steps) == len(set(steps)), run.info.run_name
    assert counts["disturbed"] == counts["undisturbed"]
    for what in ("the driver", "a trial, then the driver"):
        for line in told:
            if line.startswith(f"{what} after"):
                account.survived(f"kill -9 of {what} at a random time")
