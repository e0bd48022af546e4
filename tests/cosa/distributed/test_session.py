"""A cluster is divided so that every trial fits, or refused at once instead of waiting for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile

import pytest

from cosa.distributed import session as ray_session
from cosa.distributed.session import Request, allot, connected


@pytest.mark.parametrize(
    ("request_", "cpus", "gpus", "expected"),
    [
        (Request(), 2, 0, (1.0, 0.0, 2)),
        (Request(concurrent=1), 2, 0, (1.0, 0.0, 1)),
        (Request(concurrent=8), 2, 0, (1.0, 0.0, 2)),
        (Request(cpus=0.5, concurrent=8), 2, 0, (0.5, 0.0, 4)),
        (Request(cpus=4), 16, 1, (4, 1.0, 1)),  # one GPU, one trial, unless more are asked for
        (Request(cpus=4, concurrent=4), 16, 1, (4, 0.25, 4)),
        (Request(concurrent=3), 16, 1, (1.0, 0.3333, 3)),
        (Request(concurrent=3), 16, 2, (1.0, 0.5, 3)),
        (Request(concurrent=2), 16, 8, (1.0, 1.0, 2)),
        (Request(gpus=0.5), 16, 2, (1.0, 0.5, 4)),
        (Request(gpus=0.4), 16, 2, (1.0, 0.4, 4)),  # two to a GPU: none spans two
        (Request(gpus=0.0), 4, 1, (1.0, 0.0, 4)),
        (Request(workers=2), 16, 8, (1.0, 1.0, 4)),
        (Request(workers=2), 4, 0, (1.0, 0.0, 2)),
    ],
)
def test_trials_share_the_cluster(request_, cpus, gpus, expected):
    found = allot(request_, cpus, gpus)
    assert (found.cpus, found.gpus, found.slots) == expected


@pytest.mark.parametrize(
    ("request_", "law"),
    [
        (Request(cpus=3), "--cpus-per-trial must fit the cluster's 2 CPUs, got 3"),
        (Request(workers=3), "--cpus-per-trial x --workers-per-trial must fit the cluster's 2 CPUs, got 3"),
        (Request(gpus=1), "--gpus-per-trial must fit the cluster's 0 GPUs, got 1"),
    ],
)
def test_what_never_fits_is_refused(request_, law):
    with pytest.raises(ValueError, match=law):
        allot(request_, 2, 0)


@pytest.mark.parametrize("wrong", [{"cpus": 0}, {"gpus": -1}, {"workers": -1}, {"concurrent": 0}])
def test_an_impossible_request_is_refused(wrong):
    with pytest.raises(ValueError, match="must be >"):
        Request(**wrong)


def test_the_address_for_jobs_is_not_mistaken_for_a_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8299")
    law = "RAY_ADDRESS must be a cluster's address"
    with pytest.raises(ConnectionError, match=law), connected(Request()):
        pass


def test_session_folders_of_killed_sweeps_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        "killed": f"cosa-ray-{dead.pid}-a",
        "just killed": f"cosa-ray-{dead.pid}-b",
        "running": f"cosa-ray-{os.getpid()}-c",
        "somebody's": "cosa-ray-of-mine",
    }
    for what, name in names.items():
        (tmp_path / name).mkdir()
        if what != "just killed":
            os.utime(tmp_path / name, (0, 0))

    ray_session._remove_leftovers()

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name for what, name in names.items() if what != "killed"
    )


LISTENING = """
import json, psutil
from cosa.distributed.session import Request, connected
with connected(Request()):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"))
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
print(json.dumps(found))
"""


def test_a_ray_of_our_own_listens_on_the_loopback_interface_alone():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )

    listening = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _ in listening} >= {"gcs_server", "raylet"}
    assert {address for _, address in listening} == {"127.0.0.1"}
