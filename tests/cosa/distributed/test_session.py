"""Ray is started or joined, and divided so that every trial fits, or refused at once."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import ray
from ray._private.utils import validate_socket_filepath

from cosa.distributed import session
from cosa.distributed.session import (
    GROWS_TO,
    TrialResources,
    capacity,
    divide,
    in_memory,
    ray_session,
    require_cluster,
    trial_slots,
)
from cosa.storage.files import temporary_folder


@pytest.mark.parametrize(
    ("resources", "cpus", "gpus", "expected"),
    [
        (TrialResources(), 2, 0, (1.0, 0.0, 2)),
        (TrialResources(concurrent=1), 2, 0, (1.0, 0.0, 1)),
        (TrialResources(concurrent=8), 2, 0, (1.0, 0.0, 2)),
        (TrialResources(cpus=0.5, concurrent=8), 2, 0, (0.5, 0.0, 4)),
        (TrialResources(cpus=4), 16, 1, (4, 1.0, 1)),  # one GPU, one trial, unless more are asked for
        (TrialResources(cpus=4, concurrent=4), 16, 1, (4, 0.25, 4)),
        (TrialResources(concurrent=3), 16, 1, (1.0, 0.3333, 3)),
        (TrialResources(concurrent=3), 16, 2, (1.0, 0.5, 3)),
        (TrialResources(concurrent=2), 16, 8, (1.0, 1.0, 2)),
        (TrialResources(gpus=0.5), 16, 2, (1.0, 0.5, 4)),
        (TrialResources(gpus=0.4), 16, 2, (1.0, 0.4, 4)),  # two to a GPU: none spans two
        (TrialResources(gpus=0.0), 4, 1, (1.0, 0.0, 4)),
        (TrialResources(workers=2), 16, 8, (1.0, 1.0, 4)),
        (TrialResources(workers=2), 4, 0, (1.0, 0.0, 2)),
    ],
)
def test_trials_share_the_cluster(resources, cpus, gpus, expected):
    found = divide(cpus, gpus, resources)
    assert (found.cpus, found.gpus, found.count) == expected


@pytest.mark.parametrize(
    ("cpus", "gpus", "packed", "expected"),
    [
        (16, 1, 3, (1.0, 0.3333, 3)),
        (16, 2, 3, (1.0, 0.3333, 6)),
        (2, 1, 8, (1.0, 0.5, 2)),  # CPUs for two alone
        (4, 4, 8, (1.0, 1.0, 4)),  # no two share a GPU while another has none
        (16, 1, 1, (1.0, 1.0, 1)),
        (4, 0, 0, (1.0, 0.0, 4)),  # as without auto
    ],
)
def test_auto_packs_as_many_on_a_gpu_as_its_memory_holds(cpus, gpus, packed, expected):
    found = divide(cpus, gpus, TrialResources(concurrent="auto"), packed)
    assert (found.cpus, found.gpus, found.count) == expected


@pytest.mark.parametrize(("gpu", "gib", "count"), [(80, 16.0, 4), (80, 15.9, 4), (24, 9.0, 2), (24, 24.0, 1)])
def test_a_gpus_memory_is_filled_but_for_what_is_left_over(gpu, gib, count):
    assert in_memory(gpu, gib) == count  # 1 GiB of each process's own beside its tensors
    assert count == 1 or count * (gib + 1) <= 0.85 * gpu


@pytest.mark.parametrize(
    ("resources", "count"),
    [
        (TrialResources(concurrent="auto"), 6),
        (TrialResources(concurrent="auto", workers=2), 1),  # NCCL: a GPU for each rank
        (TrialResources(concurrent="auto", gpus=0.5), 4),
    ],
)
def test_memory_decides_only_where_trials_may_share_a_gpu(resources, count, monkeypatch):
    monkeypatch.setattr(session, "ray_session", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(session, "capacity", lambda: {"CPU": 16.0, "GPU": 2.0})
    monkeypatch.setattr(session, "_least_gpu_gib", lambda: 80.0)
    monkeypatch.setattr(session.signal, "signal", lambda *_: None)
    with trial_slots(resources, 20.0) as slots:
        assert slots.count == count


@pytest.mark.parametrize(
    ("resources", "law"),
    [
        (TrialResources(cpus=3), "--cpus-per-trial must fit the cluster's 2 CPUs, got 3"),
        (
            TrialResources(workers=3),
            "--cpus-per-trial x --workers-per-trial must fit the cluster's 2 CPUs, got 3",
        ),
        (TrialResources(gpus=1), "--gpus-per-trial must fit the cluster's 0 GPUs, got 1"),
    ],
)
def test_what_never_fits_is_refused(resources, law):
    with pytest.raises(ValueError, match=law):
        divide(2, 0, resources)


@pytest.mark.parametrize("wrong", [{"cpus": 0}, {"gpus": -1}, {"workers": -1}, {"concurrent": 0}])
def test_an_impossible_resourcesis_refused(wrong):
    with pytest.raises(ValueError, match="must be >"):
        TrialResources(**wrong)


def test_the_address_for_jobs_is_not_mistaken_for_a_cluster(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8299")
    law = "RAY_ADDRESS must be a cluster's address"
    with pytest.raises(ConnectionError, match=law), trial_slots(TrialResources()):
        pass


@pytest.mark.parametrize("entry", [ray_session, lambda: trial_slots(TrialResources())])
def test_a_cluster_that_is_gone_is_told_at_once_in_one_line(entry, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    law = rf"a Ray cluster must answer at '{address}' \(RAY_ADDRESS\), got ConnectionRefusedError.*ray start"
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    with pytest.raises(ConnectionError, match=law) as refused, entry():
        pass
    assert "\n" not in str(refused.value)


def serve_once(server, answer):
    """Accept one connection, send `answer`, and keep silent until the other side has enough."""

    def serve():
        connection, _ = server.accept()
        with connection, contextlib.suppress(ConnectionResetError):
            connection.sendall(answer)
            while connection.recv(1024):
                pass

    threading.Thread(target=serve, daemon=True).start()


@pytest.mark.parametrize("entry", [ray_session, lambda: trial_slots(TrialResources())])
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"", "TimeoutError: a port that is open and says nothing for 0.2 s"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "ConnectionError: an answer that is not Ray's"),
    ],
)
def test_a_port_where_no_ray_answers_is_told_in_one_line(entry, answer, said, monkeypatch):
    monkeypatch.setattr(session, "_CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would try for minutes"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        serve_once(server, answer)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(ConnectionError, match="a Ray cluster must answer at") as refused, entry():
            pass
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_a_cluster_that_answers_is_joined(prefix, monkeypatch):
    server = grpc.server(ThreadPoolExecutor(1))
    address = f"{prefix}127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert require_cluster() == address
    finally:
        server.stop(0)


def test_rays_sockets_fit_where_the_folder_for_temporary_files_has_a_long_name(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr("cosa.storage.files.gettempdir", lambda: str(long))
    validate_socket_filepath(temporary_folder(session._SOCKET) + session._SOCKET)


@pytest.fixture
def there(monkeypatch):
    """A cluster of four CPUs and one GPU."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("", {"CPU": 4.0, "GPU": 1.0}),
        ("CPU=64,GPU=8", {"CPU": 64.0, "GPU": 8.0}),
        ("GPU=8", {"CPU": 4.0, "GPU": 8.0}),
        ("CPU=2", {"CPU": 4.0, "GPU": 1.0}),  # it has more already
    ],
)
def test_a_cluster_can_offer_what_is_there_or_what_may_come(there, monkeypatch, said, expected):
    monkeypatch.setenv(GROWS_TO, said)
    assert capacity() == expected


@pytest.mark.parametrize("said", ["64", "CPU=many", "CPU=1=2"])
def test_what_is_no_list_of_resources_is_refused(there, monkeypatch, said):
    monkeypatch.setenv(GROWS_TO, said)
    with pytest.raises(ValueError, match="COSA_GROWS_TO must read like CPU=64,GPU=8, got"):
        capacity()


def test_folders_of_killed_processes_rays_are_removed_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "temporary_folder", lambda _: str(tmp_path))
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

    session._remove_leftovers()

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        name for what, name in names.items() if what != "killed"
    )


LISTENING = """
import json, os, subprocess, sys, psutil, ray
from cosa.distributed.session import ray_session

def answers(**changes):
    command = [os.path.dirname(sys.executable) + "/ray", "health-check", "--address"]
    command.append(ray.get_runtime_context().gcs_address)
    return subprocess.run(command, env={**os.environ, **changes}, capture_output=True).returncode == 0

with ray_session(dashboard=False):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [
        (process.name(), connection.laddr.ip.removeprefix("::ffff:"))
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    admitted = [answers(), answers(RAY_AUTH_TOKEN="0" * 64), answers(RAY_AUTH_MODE="disabled")]
print(json.dumps([found, admitted]))
"""


def test_a_ray_of_our_own_listens_on_the_loopback_interface_alone_and_asks_for_its_token():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", LISTENING],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )

    listening, admitted = json.loads(done.stdout.splitlines()[-1])
    assert {name for name, _ in listening} >= {"gcs_server", "raylet"}
    assert {address for _, address in listening} == {"127.0.0.1"}
    assert admitted == [True, False, False]
