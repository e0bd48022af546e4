"""The Slurm script with stand-ins for Slurm and real Ray nodes: told to stop, queued again, finished."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.reading import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

BIN = Path(sys.executable).parent

# One "machine" for each node: srun starts its command here, on an address of its own.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$SLURM_CALLS"
while [[ ${1:-} == --* ]]; do
    case $1 in
        --nodelist=*) node=${1#*=} ;;
        --exclude=*) node=worker ;;
    esac
    shift
done
if [[ $1 == hostname ]]; then echo "8.8.8.8 10.1.2.3"; exit; fi
if [[ ${node:-} == worker ]]; then set -- "$@" --node-ip-address=127.0.0.3; fi
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$SLURM_CALLS"
if [[ $1 == show ]]; then printf 'one\\ntwo\\n'; fi
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two nodes."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    project = tmp_path / "project"
    project.mkdir()
    for name in ("cosa", "sweeps", "cluster"):
        (project / name).symlink_to(ROOT / name)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment = {
        **kept,
        "HOME": str(home),
        "PATH": f"{tools}:{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_CALLS": str(tmp_path / "calls"),
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_ID": str(random.randrange(4000)),
        "SLURM_JOB_NODELIST": "nodes[1-2]",
        "SLURM_SUBMIT_DIR": str(project),
        "COSA_HEAD_ADDRESS": "127.0.0.2",
    }
    subprocess.run(
        ["bash", str(ROOT / "cluster/secrets.sh")], env=environment, check=True, capture_output=True
    )
    return environment


def sbatch(environment: dict[str, str], log: Path, *command: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            ["bash", str(ROOT / "cluster/slurm.sh"), *command],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def ended(process: subprocess.Popen[bytes], children: list[psutil.Process]) -> int:
    """The exit code, once nothing that the job started is left."""
    code = process.wait(300)
    assert not psutil.wait_procs(children, timeout=60)[1], "processes outlived the job"
    return code


def test_a_job_that_is_told_to_stop_is_queued_again_and_finishes(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    log, out = tmp_path / "job.log", tmp_path / "out"
    command = [
        *("python", "sweeps/ablation.py", "--preset", "shapes", "--tables", "4b", "--out", str(out)),
        *("--set", f"data.root={tmp_path / 'shapes'}", "train.iterations=120", "train.warmup=60"),
        *("train.batch_size=4", "train.checkpoint_every=10", "train.log_every=10", "evaluation.every=60"),
        *("evaluation.panel_images=1",),
    ]
    first = sbatch(slurm, log, *command)
    deadline = time.monotonic() + 300
    while not list(out.glob("trials/*/checkpoints/*")) and time.monotonic() < deadline:
        assert first.poll() is None, log.read_text()
        time.sleep(0.5)
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGTERM)

    assert ended(first, children) == 0, log.read_text()
    calls = (tmp_path / "calls").read_text()
    assert f"scontrol requeue {slurm['SLURM_JOB_ID']}" in calls
    assert "2 nodes" in log.read_text()
    assert not (out / "report.html").exists()

    second = sbatch({**slurm, "SLURM_RESTART_COUNT": "1"}, log, *command)
    time.sleep(5)
    children = psutil.Process(second.pid).children(recursive=True)
    assert ended(second, children) == 0, log.read_text()
    with (out / "tables.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"no-CSC", "full"}
    assert (tmp_path / "project/runs/mlflow/mlflow.db").is_file()
    assert (tmp_path / "calls").read_text().count("scontrol requeue") == 1


def test_the_head_takes_the_private_one_of_its_nodes_addresses(slurm: dict[str, str], tmp_path: Path) -> None:
    del slurm["COSA_HEAD_ADDRESS"]
    log = tmp_path / "job.log"
    process = sbatch(slurm, log, "true")
    deadline = time.monotonic() + 60
    while "head one at" not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()  # 10.1.2.3 is no address of this machine: no head starts there
    ended(process, children)

    assert "head one at 10.1.2.3:" in log.read_text()


@pytest.mark.parametrize("mode", [0o644, None])
def test_a_token_that_others_can_read_is_refused(
    slurm: dict[str, str], tmp_path: Path, mode: int | None
) -> None:
    token = Path(slurm["HOME"]) / ".ray" / "auth_token"
    token.unlink() if mode is None else token.chmod(mode)
    log = tmp_path / "job.log"

    assert sbatch(slurm, log, "true").wait(60) == 2
    assert "Ray's token must be a file of mode 600" in log.read_text()
