"""A chain of CoSA, pseudo-labels and a standalone network is killed in each stage, and ends the same."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cosa.runs import read_journal
from tests.faults import account
from tests.faults.runs import SETTINGS, finish, last_step, newest_checkpoint, rows, start, wait_until

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

TABLE = """
from sweeps.tables import Arm, Table
from sweeps.tables.metrics import LABELS_MIOU, SEG_MIOU

NETWORK = {
    "network.architecture": "deeplabv3plus",
    "network.encoder": "test_resnet",
    "network.patch_size": 0,
    "network.width": 0,
    "network.depth": 0,
    "network.heads": 0,
    "network.aux_head": False,
}
MASKS = {**NETWORK, "segmentation.supervision": "masks"}
ARMS = (Arm("CoSA"), Arm("R101", NETWORK), Arm("R101-masks", MASKS))
TABLE = Table(name="2", title="A chain", reference="CoSA", metrics=(SEG_MIOU, LABELS_MIOU), arms=ARMS)
"""


def chain_command(folder: Path, data: Path) -> list[str]:
    """CoSA, its pseudo-labels, a network that learns from them and one that learns from masks."""
    folder.mkdir(exist_ok=True)
    (folder / "chain.py").write_text(TABLE)
    return [
        *(sys.executable, "sweeps/ablation.py", "--preset", "shapes", "--tables", str(folder / "chain.py")),
        *("--out", str(folder / "sweep"), "--tracking-uri", f"sqlite:///{folder}/mlflow.db"),
        *("--set", f"data.root={data}", *(f"{name}={value}" for name, value in SETTINGS.items())),
        *("--max-concurrent", "1"),
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images enough that writing their pseudo-labels takes longer than it takes to kill it."""
    from cosa.data.shapes import write_shapes

    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, train_images=400, val_images=6)
    return root


@pytest.fixture(scope="module")
def undisturbed_chain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished chain."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(chain_command(folder, data), folder / "log")
    return folder


def stages(folder: Path) -> dict[str, Path]:
    """The folders of the trials that were started, by what they are."""
    found = {}
    for path in sorted((folder / "sweep" / "trials").glob("*")):
        name = path.name.partition("-")[0]
        if (path / "config.json").is_file() and name == "trial":
            settings = json.loads((path / "config.json").read_text())
            network, taught = settings["network.architecture"], settings["segmentation.supervision"]
            name = "CoSA" if network == "cosa" else taught
        found[name] = path
    return found


def in_training(name: str) -> Callable[[Path], bool]:
    def met(folder: Path) -> bool:
        return name in (found := stages(folder)) and newest_checkpoint(found[name]) is not None

    return met


def in_writing(folder: Path) -> bool:
    return "labels" in (found := stages(folder)) and any(found["labels"].glob("labels/*.png"))


@pytest.mark.parametrize(
    ("stage", "met"),
    [
        ("CoSA", in_training("CoSA")),
        ("labels", in_writing),
        ("pseudo-labels", in_training("pseudo-labels")),
        ("masks", in_training("masks")),
    ],
)
def test_a_chain_killed_in_a_stage_ends_the_same_and_runs_nothing_twice(
    stage: str, met: Callable[[Path], bool], data: Path, undisturbed_chain: Path, tmp_path: Path
) -> None:
    fault = "kill -9 of a chain's driver and trials"
    account.tried(fault)
    command = chain_command(tmp_path, data)
    process = start(command, tmp_path / "log")
    wait_until(lambda: met(tmp_path), process, tmp_path / "log")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {name: (path / "result.json") for name, path in stages(tmp_path).items()}
    finished = {name: path.stat().st_mtime_ns for name, path in before.items() if path.is_file()}
    assert stage not in finished, "the kill came too late"
    steps = last_step(stages(tmp_path)[stage])

    finish(command, tmp_path / "log")

    assert rows(tmp_path) == rows(undisturbed_chain)
    after = stages(tmp_path)
    assert after.keys() == {"CoSA", "labels", "pseudo-labels", "masks"}
    assert {name: (after[name] / "result.json").stat().st_mtime_ns for name in finished} == finished
    for path in (after[name] for name in after if name != "labels"):
        journal = [entry["step"] for entry in read_journal(path)]
        assert journal == sorted(set(journal))
    account.survived(fault, steps % 5)
