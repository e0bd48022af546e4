"""A sweep on a real Ray survives what can happen to it: kill -9, Ctrl-C, failing arms.

One sweep with two arms that fail is run four times over: its driver is interrupted, then killed, then comes
to its end; then the arms are mended and `--retry-failed` runs them. The tests look at what each run left.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from cosa.config import Config
from sweeps.planning import folder as folders
from sweeps.planning.plan import Plan, make_plan
from sweeps.running.arguments import read_args
from sweeps.running.launch import where_time_went
from sweeps.running.queue import Attempt
from sweeps.tables import get_table

STUB = Path(__file__).with_name("stub_sweep.py")
PATIENCE = 240  # seconds; a busy machine starts Ray slowly

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Story:
    """What happened, run by run."""

    root: Path
    uri: str
    plan: Plan
    codes: list[int] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    starts: list[dict[str, list[int]]] = field(default_factory=list)
    """Steps that each trial started from, by label, after each run."""
    finished: list[set[str]] = field(default_factory=list)
    """Labels of the trials that were finished after each run."""
    runs: list[list[tuple[str, str]]] = field(default_factory=list)
    """Name and state of every run in MLflow, after each run."""
    reports: list[str] = field(default_factory=list)
    """The tables as text after each run; empty before the first report."""


@contextlib.contextmanager
def driver(story, control, arguments):
    """A run of the sweep, ended with all its processes whatever happens here; its story is noted."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    output = control / f"output{len(story.codes)}.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(STUB), str(control), *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    try:
        yield process
        process.wait(PATIENCE)
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
    note(story, process.wait(), output.read_text())


def note(story, code, output):
    story.codes.append(code)
    story.outputs.append(output)
    trials = story.plan.trials
    story.starts.append({trial.label: starts for trial in trials if (starts := starts_of(story, trial))})
    story.finished.append({trial.label for trial in trials if folders.read_result(story.root, trial)})
    story.runs.append(sorted((run.info.run_name, run.info.status) for run in runs_of(story)))
    table = story.root / "tables.txt"
    story.reports.append(table.read_text() if table.is_file() else "")


def runs_of(story):
    from mlflow import MlflowClient

    return MlflowClient(story.uri).search_runs(["1"])


def starts_of(story, trial):
    return numbers(folders.trial_folder(story.root, trial.name) / "starts.txt")


def numbers(path):
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def wait_for_held_trial(story, process, step):
    """Until the held arm itself says that it stands at `step`, its checkpoint of that step written."""
    held = next(trial for trial in story.plan.trials if trial.label == "no-CSC, seed 0")
    deadline = time.monotonic() + PATIENCE
    while step not in numbers(folders.trial_folder(story.root, held.name) / "held.txt"):
        assert process.poll() is None, "the driver ended early"
        assert time.monotonic() < deadline, f"the held arm never came to step {step}"
        time.sleep(0.2)


def trial_processes(process):
    """The processes of Ray that train or could: all but its two helpers, which outlive a kill by a minute."""
    helpers = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
    return [p for p in psutil.Process(process.pid).children(recursive=True) if p.name() not in helpers]


@pytest.fixture(scope="module")
def story(tmp_path_factory, shapes_root):
    base = tmp_path_factory.mktemp("launch")
    control = base / "control"
    control.mkdir()
    uri = f"sqlite:///{base}/mlflow.db"
    arguments = [
        *("--out", str(base / "sweep"), "--tracking-uri", uri, "--retries", "0", "--max-concurrent", "2"),
        *("--cpus-per-trial", "0.5"),
        *("--set", f"data.root={shapes_root}", "train.iterations=12", "train.warmup=4"),
    ]
    args = read_args("stub", "", ("3b",), arguments)
    story = Story(base / "sweep", uri, make_plan(args.base, args.tables, args.seeds))
    (control / "break").touch()

    (control / "hold").write_text("7")
    with driver(story, control, arguments) as process:
        wait_for_held_trial(story, process, step=7)
        processes = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        psutil.wait_procs(processes, timeout=60)
        story.survivors += [f"Ctrl-C: {p}" for p in processes if p.is_running()]

    (control / "hold").write_text("9")
    with driver(story, control, arguments) as process:
        wait_for_held_trial(story, process, step=9)
        processes = trial_processes(process)
        process.kill()
        psutil.wait_procs(processes, timeout=60)
        story.survivors += [f"kill -9: {p}" for p in processes if p.is_running()]

    (control / "hold").unlink()
    with driver(story, control, arguments):
        pass

    (control / "break").unlink()
    with driver(story, control, [*arguments, "--retry-failed"]):
        pass
    return story


def test_no_process_outlives_an_interrupted_or_killed_driver(story):
    assert story.survivors == []


def test_exit_codes_say_what_happened(story):
    assert story.codes == [130, -signal.SIGKILL, 1, 0]


def test_what_was_finished_is_never_run_again(story):
    assert {"warm-up, seed 0", "full, seed 0", "no-DT, seed 0"} <= story.finished[0]
    for earlier, before, after in zip(story.finished, story.starts, story.starts[1:], strict=False):
        for label in earlier:
            assert after[label] == before[label]


def test_a_trial_that_was_cut_goes_on_from_its_own_checkpoint(story):
    assert story.starts[2]["no-CSC, seed 0"] == [4, 7, 9]


def test_an_interrupted_driver_says_how_to_go_on(story):
    assert "interrupted; this goes on from here:" in story.outputs[0]
    assert f"--out {story.root}" in story.outputs[0]


def test_failing_arms_leave_the_others_alone(story):
    labels = {trial.label for trial in story.plan.trials}
    assert story.finished[2] == labels - {"no-RAW, seed 0", "no-GC, seed 0"}


def test_failing_arms_are_reported_with_their_reasons(story):
    assert "2 of 7 trials failed; the same command tries them again" in story.outputs[2]
    assert "  no-RAW, seed 0  RuntimeError: this arm is broken\n" in story.outputs[2]
    killed = next(line for line in story.outputs[2].splitlines() if line.startswith("  no-GC, seed 0"))
    assert re.search(r"killed|died|out of memory", killed)


def test_what_failed_is_all_that_retry_failed_runs(story):
    again = {label for label, starts in story.starts[3].items() if starts != story.starts[2][label]}
    assert again == {"no-RAW, seed 0", "no-GC, seed 0"}
    assert story.finished[3] == {trial.label for trial in story.plan.trials}
    assert "2 trials to run" in story.outputs[3]


def test_every_trial_has_one_run_in_mlflow_that_says_how_it_ended(story):
    assert story.runs[2] == [
        ("full, seed 0", "FINISHED"),
        ("no-CSC, seed 0", "FINISHED"),
        ("no-DT, seed 0", "FINISHED"),
        ("no-GC, seed 0", "FAILED"),
        ("no-RAW, seed 0", "FAILED"),
        ("no-SA, seed 0", "FINISHED"),
        ("sweep", "FAILED"),
        ("warm-up, seed 0", "FINISHED"),
    ]
    assert story.runs[3] == [(name, "FINISHED") for name, _ in story.runs[2]]


def test_a_run_that_finished_after_all_carries_no_reason_any_more(story):
    assert [run.info.run_name for run in runs_of(story) if "cosa.failure" in run.data.tags] == []


def test_every_arms_run_names_the_warmup_it_was_forked_from(story):
    runs = runs_of(story)
    warmup = next(run.info.run_id for run in runs if run.data.tags["cosa.kind"] == "warmup")
    forks = {run.data.tags["cosa.forked_from"] for run in runs if run.data.tags["cosa.kind"] == "trial"}
    assert forks == {warmup}


def test_the_report_has_every_row_and_names_the_gaps(story):
    text = story.reports[2]
    assert all(name in text for name in ("full", "no-DT", "no-CSC", "no-RAW", "no-SA", "no-GC"))
    gaps = [line for line in text.splitlines() if "seed 0:" in line]
    assert gaps[0] == "no-RAW, seed 0: failed (RuntimeError: this arm is broken)"
    assert [line.partition(" (")[0] for line in gaps] == [
        *("no-RAW, seed 0: failed", "no-GC, seed 0: failed")
    ]
    assert "seed 0:" not in story.reports[3]
    assert (story.root / "report.html").is_file()


def test_the_time_of_a_launch_is_told_apart_by_where_it_went():
    (trial, *_) = make_plan(Config(), [get_table("3b")], [0]).trials
    ended = [Attempt(trial, 0.0, 0, seconds) for seconds in (60.0, 60.0, 30.0, 12.0)]

    assert where_time_went(90.0, 2, ended, inside=153.0) == (
        "2 min on 2 slots: 85.0% of it in trials, 5.0% between them (2.2 s each), "
        "10.0% waiting for a warm-up or with nothing left to start"
    )


def test_a_trial_tells_how_long_it_was_in_its_own_hands(story):
    told = re.search(r"([\d.]+)% of it in trials, ([\d.]+)% between them", story.outputs[-1])

    assert told is not None
    assert 0 < float(told[1]) < 100
    assert float(told[2]) > 0
