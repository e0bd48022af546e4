"""A sweep on a cluster that has no worker yet: Ray's own autoscaler starts one for it, on this machine."""

from __future__ import annotations

import csv
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray

from tests.reading import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

BIN = Path(sys.executable).parent
PORT, DASHBOARD = 23979, 23980
HEAD = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"


@pytest.fixture
def growing(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a client; the cluster's head takes no trial, and it may grow by one node."""
    config = {
        "cluster_name": "growing",
        "max_workers": 1,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 1,
        "provider": {
            "type": "external",  # Ray's own for tests: its machines are further Ray nodes of this one
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"{ray.util.get_node_ip_address()}:{PORT}",
            "head_node_id": HEAD,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 2, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 1,
            },
        },
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        **{f"{name}_commands": [] for name in ("initialization", "setup", "head_setup", "worker_setup")},
        **{f"{name}_start_ray_commands": [] for name in ("head", "worker")},
    }
    (tmp_path / "autoscaler.json").write_text(json.dumps(config))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {
        **kept,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    folder = tempfile.mkdtemp(prefix="cosa-grow-")  # not below tmp_path: sockets have short paths
    with (tmp_path / "head.log").open("wb") as output:
        head = subprocess.Popen(
            [
                *(
                    "ray",
                    "start",
                    "--head",
                    "--block",
                    "--disable-usage-stats",
                    f"--port={PORT}",
                    "--num-cpus=0",
                ),
                *(
                    "--dashboard-host=127.0.0.1",
                    f"--dashboard-port={DASHBOARD}",
                    "--dashboard-agent-listen-port=23981",
                    "--object-store-memory=100000000",
                ),
                *(
                    f"--autoscaling-config={tmp_path / 'autoscaler.json'}",
                    f"--temp-dir={folder}",
                ),
            ],
            env={
                **environment,
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "RAY_CLOUD_INSTANCE_ID": HEAD,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until(lambda: listening(DASHBOARD))
        yield environment
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        head.send_signal(signal.SIGTERM)
        head.wait(60)
        for process in psutil.wait_procs(children, timeout=30)[1]:
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def until(done: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until `done()` holds."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_a_sweep_makes_an_empty_cluster_grow_and_finishes_there(
    growing: dict[str, str], tmp_path: Path
) -> None:
    # No job: the nodes of this one machine share the folder that holds a job's code, and one removes it.
    out = tmp_path / "out"
    done = subprocess.run(
        [
            *(
                sys.executable,
                "sweeps/ablation.py",
                "--preset",
                "shapes",
                "--tables",
                "4b",
                "--out",
                str(out),
            ),
            *(
                "--tracking-uri",
                f"sqlite:///{tmp_path}/mlflow.db",
                "--set",
                f"data.root={tmp_path / 'shapes'}",
            ),
            *("train.iterations=20", "train.warmup=10", "train.batch_size=4", "evaluation.every=10"),
            *("evaluation.panel_images=1", "optim.lr_warmup=0"),
        ],
        cwd=ROOT,
        env={**growing, "RAY_ADDRESS": f"127.0.0.1:{PORT}", "COSA_GROWS_TO": "CPU=2"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "head.log").read_text()
    assert "2 at a time" in done.stdout
    with (out / "tables.csv").open() as file:
        assert {row["arm"] for row in csv.DictReader(file)} == {"no-CSC", "full"}
