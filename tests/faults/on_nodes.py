"""A run whose workers lie on several Ray nodes of this machine, with a fault on the way.

    python on_nodes.py CONFIG OUT NODES FAULT STEP

At STEP the FAULT is done: `none`, `worker` (kill -9 of one), `node` (its raylet and all on it die; another
one joins) or `notice` (Ray hears that a node will be taken back in ten seconds, and then it is). The last
line printed is JSON: the final metrics, the steps seen, on how many nodes the workers were, and whether the
ranks said the same in every report.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
os.environ |= {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}

import psutil
import ray
from ray.cluster_utils import Cluster

from cosa.config import from_json
from cosa.distributed import train as distributed
from cosa.training.trainer import RunSpec

NOTICE_SECONDS = 10


class Watch(distributed._Watch):
    """Notes, on the side of Ray's controller, what every rank reported and from where."""

    notes: Path

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Called by Ray with one dict per rank."""
        clock = {"train/images_per_second"}
        rows = [repr({k: v for k, v in row.items() if k not in clock}) for row in metrics]
        with self.notes.open("a") as file:
            file.write(json.dumps({"ranks": len(rows), "same": len(set(rows)) == 1}) + "\n")


class Nodes:
    """The cluster, and what can be done to one of its nodes."""

    def __init__(self, count: int) -> None:
        head = {
            "num_cpus": 0,
            "include_dashboard": True,
            "dashboard_port": 0,
            "object_store_memory": 100 * 2**20,
        }
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.add() for _ in range(count)]

    def add(self) -> Any:
        """One more node, with room for one worker."""
        return self.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)

    def lose_one(self) -> None:
        """The last node is gone with all on it, and after a moment another one joins."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)
        time.sleep(1)
        self.nodes.append(self.add())

    def lose_one_with_notice(self) -> None:
        """Ray is told first, as an autoscaler tells it."""
        node = self.nodes[-1]
        command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", self.cluster.address]
        command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
        command += ["--reason-message", "spot", "--deadline-remaining-seconds", str(NOTICE_SECONDS)]
        subprocess.run(command, check=True, capture_output=True)
        time.sleep(NOTICE_SECONDS)
        self.lose_one()


def kill_a_worker() -> None:
    """Kill -9 one of the processes that train."""
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "RayTrainWorker" in line and os.getsid(process.pid) == os.getsid(0):
            process.kill()
            return
    raise LookupError("no worker to kill")


def main() -> None:
    """Train, with the fault on the way."""
    config, out = from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    count, fault, step = int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
    nodes = Nodes(count)
    Watch.notes = out.parent / "ranks.jsonl"
    distributed._Watch = Watch  # type: ignore[misc]
    seen: list[int] = []
    ended: list[Any] = []
    places: set[str] = set()
    due = threading.Event()

    def show(progress: Any) -> None:
        seen.append(progress.step)
        if progress.step >= step:
            due.set()

    def fit() -> None:
        try:
            ended.append(distributed.fit(RunSpec(config=config, out=out), workers=count, report=show))
        except BaseException as error:
            ended.append(error)
            raise

    ray.init(address=nodes.cluster.address, log_to_driver=False)
    thread = threading.Thread(target=fit)
    thread.start()
    acts = {"worker": kill_a_worker, "node": nodes.lose_one, "notice": nodes.lose_one_with_notice}
    while thread.is_alive():
        if not places and seen:
            from ray.util.state import list_actors

            states = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
            places = {actor.node_id for actor in states if actor.class_name == "RayTrainWorker"}
        if fault in acts and due.wait(0.2):
            acts.pop(fault)()
        time.sleep(0.2)
    thread.join()
    ray.shutdown()
    nodes.cluster.shutdown()
    if isinstance(ended[0], BaseException):
        raise ended[0]
    notes = [json.loads(line) for line in Watch.notes.read_text().splitlines()]
    told = {
        "metrics": {name: repr(value) for name, value in ended[0].metrics.items()},
        "seen": seen,
        "nodes": len(places),
        "ranks": sorted({note["ranks"] for note in notes}),
        "same": all(note["same"] for note in notes),
        "reports": len(notes),
    }
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
