"""A tracking server that is killed, frozen and restarted while sixteen processes write: all arrives, once.

The server is a real `mlflow server`, on SQLite and on a PostgreSQL of the test's own. Every writer does what
a trial does: it opens its run, logs steps, keeps files, ends. Some are killed and resumed from an earlier
step; some begin or end while the server is away. Counted is what they were told and what is there afterwards.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from cosa.config import Config
from cosa.tracking import MlflowTracker, TrackingSpec, find_tracked
from cosa.tracking.journal import read_state, write_state
from tests.reading import ROOT

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]

WRITERS = 16
STEPS = 120
KILLED = 4  # writers that are killed at a third of their way, and resumed some steps before
FILES = 3
PATIENCE = 240.0  # seconds for a server to be ready on a busy machine
PAUSE = float(os.environ.get("COSA_FAULT_STEP_SECONDS", "0.5"))


def write(uri: str, out: Path, number: int, begun: int, kill: int, pause: float) -> None:
    """What one process does; at step `kill` it dies."""
    logging.disable()  # sixteen times the same warnings
    tracker = MlflowTracker(TrackingSpec(uri=uri, experiment="outage", tags={"number": str(number)}))
    tracker.start(Config(), out=out, resume_step=begun)
    for step in range(begun + 1, STEPS + 1):
        time.sleep(pause)
        tracker.log_metrics({"loss": step / 3, "threshold": 1 / step, "number": float(number)}, step)
        if step % (STEPS // FILES) == 0:
            path = out / "panels" / f"step_{step}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"panel {step} of {number}")
            tracker.log_artifact(path, "panels")
        if step == kill:
            os.kill(os.getpid(), signal.SIGKILL)
    tracker.finish()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass
class Server:
    """A tracking server that can be killed, frozen and started again, at one address."""

    store: str
    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
                    *(
                        "--backend-store-uri",
                        self.store,
                        "--artifacts-destination",
                        str(self.folder / "files"),
                    ),
                    *("--host", "127.0.0.1", "--port", str(self.port)),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"},
            )
        deadline = time.monotonic() + PATIENCE
        while not self.answers():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the server never became ready"
            time.sleep(0.5)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=2) as reply:
            return reply.status == 200
        return False

    def signal(self, number: signal.Signals) -> None:
        """To the server and the workers that it started."""
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


class Postgres:
    """A PostgreSQL of the test's own, in a temporary folder; as another user where we are root."""

    def __init__(self, folder: Path) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if not found:
            pytest.skip("needs PostgreSQL: install Debian's package postgresql")
        pytest.importorskip("psycopg2", reason="needs psycopg2: pip install psycopg2-binary")
        self.bin, self.data, self.port = found[-1].parent, folder / "data", free_port()
        self.user = ["setpriv", "--reuid=nobody", "--clear-groups"] if os.geteuid() == 0 else []
        if self.user and not shutil.which("setpriv"):
            pytest.skip("needs setpriv: PostgreSQL refuses to run as root")
        folder.chmod(0o777)
        self.run("initdb", "-D", str(self.data), "-U", "cosa", "-A", "trust", "--no-sync")
        self.control("start", "-o", f"-p {self.port} -k {folder} -c listen_addresses=127.0.0.1")
        self.run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "cosa", "mlflow")
        self.uri = f"postgresql+psycopg2://cosa@127.0.0.1:{self.port}/mlflow"

    def run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*self.user, str(self.bin / program), *arguments],
            capture_output=True,
            text=True,
            cwd="/",
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def control(self, what: str, *options: str) -> None:
        log = str(self.data / "log")
        self.run(
            "pg_ctl",
            "-D",
            str(self.data),
            "-l",
            log,
            "-w",
            "-m" if what != "start" else "-s",
            *(["immediate"] if what != "start" else []),
            *options,
            what,
        )


@pytest.fixture(params=["sqlite", "postgresql"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with contextlib.ExitStack() as stack:
        if request.param == "postgresql":
            folder = stack.enter_context(tempfile.TemporaryDirectory())  # pytest's are closed to other users
            postgres = Postgres(Path(folder))
            stack.callback(postgres.control, "stop")
            store = postgres.uri
        else:
            store = f"sqlite:///{tmp_path}/mlflow.db"
        found = Server(store, tmp_path)
        stack.callback(found.kill)
        yield found


class Writers:
    """The processes that write, each into a run of its own."""

    def __init__(self, uri: str, root: Path, pause: float) -> None:
        self.root = root
        self._uri = uri
        self._pause = pause
        self._context = multiprocessing.get_context("forkserver")  # imports once for all
        self._context.set_forkserver_preload([__name__, "mlflow", "torch"])
        self._begun: list[BaseProcess] = []

    def start(self, number: int, *, begun: int = 0, kill: int = 0) -> BaseProcess:
        arguments = (self._uri, self.root / f"run{number}", number, begun, kill, self._pause)
        process = self._context.Process(target=write, args=arguments)
        process.start()
        self._begun.append(process)
        return process

    def end(self) -> None:
        for process in self._begun:
            process.kill()
            process.join()

    def reached(self, step: int) -> bool:
        """Whether all writers are there, by their journals."""
        return all(self._last(number) >= step for number in range(WRITERS))

    def _last(self, number: int) -> int:
        path = self.root / f"run{number}" / "journal.jsonl"
        if not path.is_file():
            return -1
        steps = [json.loads(line).get("step", 0) for line in path.read_text().splitlines()]
        return max(steps, default=-1)


@pytest.fixture
def writers(server: Server, tmp_path: Path) -> Iterator[Writers]:
    root = tmp_path / "sweep"
    root.mkdir()
    found = Writers(server.uri, root, PAUSE)
    yield found
    found.end()


def code_of(process: BaseProcess) -> int | None:
    process.join(600)
    return process.exitcode


def wait_for(what: Callable[[], bool], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def track(action: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from cosa.cli import track; sys.exit(track())",
            action,
            str(root),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


@dataclass
class Counts:
    """What is in a store, or ought to be."""

    runs: int = 0
    finished: int = 0
    metrics: int = 0
    twice: int = 0
    out_of_order: int = 0
    files: int = 0


def count(uri: str) -> Counts:
    from mlflow import MlflowClient

    client, found = MlflowClient(uri), Counts()
    experiment = client.get_experiment_by_name("outage")
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        found.runs += 1
        found.finished += run.info.status == "FINISHED"
        for name, value_of in (
            ("loss", lambda step: step / 3),
            ("threshold", lambda step: 1 / step),
            ("number", lambda _: float(run.data.tags["number"])),  # noqa: B023 (called in this very pass)
        ):
            points = client.get_metric_history(run.info.run_id, name)
            assert all(point.value == value_of(point.step) for point in points)
            steps = [point.step for point in points]
            found.metrics += len(set(steps))
            found.twice += len(steps) - len(set(steps))
            moments = sorted((point.timestamp, point.step) for point in points)
            found.out_of_order += [step for _, step in moments] != sorted(steps)
        found.files += len(client.list_artifacts(run.info.run_id, "panels"))
        found.files += len(client.list_artifacts(run.info.run_id))
    return found


EXPECTED = Counts(
    runs=WRITERS,
    finished=WRITERS,
    metrics=WRITERS * STEPS * 3,
    files=WRITERS * (FILES + len(("config.json", "panels"))),
)


def test_what_sixteen_writers_were_told_is_there_once_after_outages(server: Server, writers: Writers) -> None:
    server.start()
    begun = time.monotonic()
    first = [writers.start(n, kill=STEPS // 3 if n < KILLED else 0) for n in range(WRITERS // 2)]
    wait_for(lambda: writers._last(0) >= 5)
    server.kill()  # while half of the writers write
    away = time.monotonic()
    late = [writers.start(n) for n in range(WRITERS // 2, WRITERS)]  # these begin without a server
    wait_for(lambda: writers.reached(10))
    server.start()
    away = time.monotonic() - away
    for process in first[:KILLED]:
        assert code_of(process) == -signal.SIGKILL
    again = [writers.start(n, begun=STEPS // 3 - 7) for n in range(KILLED)]  # from an earlier checkpoint
    server.signal(signal.SIGSTOP)  # frozen: it takes requests and does not answer
    frozen = time.monotonic()
    time.sleep(20)
    server.signal(signal.SIGCONT)
    frozen = time.monotonic() - frozen
    for process in (*first[KILLED:], *late, *again):
        assert code_of(process) == 0
    trained = time.monotonic() - begun
    left = track("status", writers.root).stdout
    done = track("flush", writers.root)

    found = count(server.uri)
    sys.stdout.write(
        f"{server.store.partition(':')[0]}: {WRITERS} writers, {STEPS} steps, away {away:.0f} s, frozen "
        f"{frozen:.0f} s, trained {trained:.0f} s: {found} of {EXPECTED}\n{left}{done.stdout}"
    )
    assert done.returncode == 0, done.stderr
    assert found == EXPECTED


def test_writers_that_end_without_a_server_leave_all_to_the_command(server: Server, tmp_path: Path) -> None:
    writers = Writers(server.uri, tmp_path, pause=0.01)
    begun = time.monotonic()
    processes = [writers.start(n) for n in range(WRITERS)]
    for process in processes:
        assert code_of(process) == 0
    trained = time.monotonic() - begun
    refused = track("flush", tmp_path)
    server.start()
    done = track("flush", tmp_path)

    found = count(server.uri)
    sys.stdout.write(
        f"{server.store.partition(':')[0]}: no server for {trained:.0f} s of {WRITERS} writers; {found}\n"
    )
    assert refused.returncode == 1
    assert refused.stderr.count("tracking store must answer") == 1
    assert done.returncode == 0, done.stderr
    assert found == EXPECTED

    for out in find_tracked(tmp_path):  # as if every process had died before it noted what it gave
        state = read_state(out)
        state.journal = 0
        write_state(out, state)
    again = track("flush", tmp_path)
    entries = 2 * STEPS + FILES + 3  # with each step's metrics the load of the machine
    assert again.stdout.count(f": {entries} entries delivered") == WRITERS
    assert count(server.uri) == EXPECTED
