"""Sweeps as Ray jobs: logs, status and exit codes as expected; one that is stopped is resumed by another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cosa.tracking.provenance import source_tags
from tests.faults import account
from tests.faults.runs import (
    last_step,
    newest_checkpoint,
    rows,
    start,
    sweep_command,
    wait_until,
)
from tests.reading import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

RAY = str(Path(sys.executable).parent / "ray")
PORT = 20_000 + os.getpid() % 5_000  # beyond the ports of Ray's own workers
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="module")
def head() -> Iterator[None]:
    """A Ray that takes jobs, on ports and in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        log = Path(folder) / "head.log"
        command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={PORT}"]
        command += ["--num-cpus=2", "--dashboard-host=127.0.0.1", f"--dashboard-port={PORT + 1}"]
        command += [f"--dashboard-agent-listen-port={PORT + 2}", f"--temp-dir={folder}/s"]
        process = start(command, log, **ENVIRONMENT)
        wait_until(lambda: ray_job("list").returncode == 0, process, log)
        yield
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
        psutil.wait_procs(children, timeout=60)


def ray_job(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`ray job`, as people call it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    address = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{PORT + 1}"}
    return subprocess.run(
        [RAY, "job", *arguments],
        cwd=ROOT,
        env={**clean, **ENVIRONMENT, **address},
        check=False,
        capture_output=True,
        text=True,
    )


def submit(*arguments: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
    return ray_job("submit", *([] if wait else ["--no-wait"]), "--working-dir", ".", *arguments)


def test_a_stopped_job_stops_its_trials_and_another_job_goes_on(
    head: None, data: Path, undisturbed_sweep: Path, tmp_path: Path
) -> None:
    fault = "ray job stop, resumed by a new job"
    account.tried(fault)
    command = [*sweep_command(tmp_path, data), "--commit", source_tags()["mlflow.source.git.commit"]]
    submitted = submit("--submission-id", "first", "--", *command, wait=False)
    assert submitted.returncode == 0, submitted.stderr + submitted.stdout
    deadline = time.monotonic() + 240
    while not any(last_step(out) >= 7 for out in (tmp_path / "sweep/trials").glob("warmup-*")):
        assert time.monotonic() < deadline, ray_job("logs", "first").stdout
        time.sleep(0.1)
    assert "RUNNING" in ray_job("status", "first").stdout

    stopped = ray_job("stop", "first")

    assert "stopped" in stopped.stdout, stopped.stderr
    assert "was stopped" in ray_job("status", "first").stdout
    assert "stopping: trials save and end" in ray_job("logs", "first").stdout
    (warmup,) = (tmp_path / "sweep/trials").glob("warmup-*")
    newest = newest_checkpoint(warmup)
    assert newest is not None
    reached = last_step(warmup)
    assert int(newest.stem.removeprefix("step_")) == reached
    time.sleep(3)
    assert last_step(warmup) == reached

    second = submit("--", *command)

    assert second.returncode == 0, second.stdout[-3000:]
    assert "Table 4b" in second.stdout
    assert rows(tmp_path) == rows(undisturbed_sweep)
    account.survived(fault, 0)


def test_a_job_that_fails_says_why_and_has_an_exit_code(head: None, tmp_path: Path) -> None:
    command = [sys.executable, "sweeps/ablation.py", "--preset", "shapes", "--tables", "3c"]

    failed = submit("--", *command, "--out", str(tmp_path / "sweep"))

    assert failed.returncode == 1
    assert "did you mean" in failed.stdout
