"""The recipes' tracking server, run for real: a login, two addresses and no others, no secret to be seen."""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster.reading import CLUSTER
from tests.reading import ROOT

PRIVATE = "127.0.0.2"  # stands for the machine's address on the private network
pytestmark = pytest.mark.slow

EXPERIMENT = "/api/2.0/mlflow/experiments/get?experiment_id=0"


@dataclass(frozen=True)
class Server:
    process: psutil.Process
    port: int
    password: str

    def status(self, address: str, path: str = EXPERIMENT, password: str = "", host: str = "") -> int:
        """The HTTP status that a request gets."""
        request = urllib.request.Request(f"http://{address}:{self.port}{path}")
        if password:
            login = base64.b64encode(f"cosa:{password}".encode()).decode()
            request.add_header("Authorization", f"Basic {login}")
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment = {
        **kept,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    subprocess.run(["bash", str(CLUSTER / "secrets.sh")], env=environment, check=True, capture_output=True)
    password = (home / ".mlflow/credentials").read_text().rpartition("= ")[2].strip()
    with socket.socket() as free:
        free.bind((PRIVATE, 0))
        port = free.getsockname()[1]
    log = home / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "cluster/tracking/serve.sh", str(home / "store"), PRIVATE, str(port)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    found = Server(psutil.Process(process.pid), port, password)
    try:
        for _ in range(120):
            assert process.poll() is None, log.read_text()
            try:
                found.status("127.0.0.1", "/health")
                break
            except OSError:
                time.sleep(0.5)
        yield found
    finally:
        children = found.process.children(recursive=True)
        process.terminate()
        process.wait(120)  # a busy machine
        assert not psutil.wait_procs(children, timeout=30)[1]


@pytest.mark.parametrize("address", ["127.0.0.1", PRIVATE])
def test_it_asks_for_the_login_at_both_addresses(server: Server, address: str) -> None:
    assert server.status(address) == 401
    assert server.status(address, password="wrong") == 401
    assert server.status(address, password=server.password) == 200


def test_it_listens_at_these_two_addresses_alone(server: Server) -> None:
    processes = [server.process, *server.process.children(recursive=True)]
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in processes
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }

    assert listening == {("127.0.0.1", server.port), (PRIVATE, server.port)}


def test_a_page_of_a_foreign_name_cannot_speak_to_it(server: Server) -> None:
    assert server.status("127.0.0.1", password=server.password, host="evil.example") == 403


def test_its_login_stands_on_no_command_line(server: Server) -> None:
    processes = [server.process, *server.process.children(recursive=True)]

    assert not [process for process in processes if server.password in " ".join(process.cmdline())]
