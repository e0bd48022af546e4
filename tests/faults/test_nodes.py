"""Runs over several Ray nodes: the same as on one, on all ranks, also when a worker or a node is lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cosa.config import Config, override, to_json
from cosa.storage.run_folder import read_metrics
from tests.cosa.runs import differences, saved_state, train
from tests.faults import account
from tests.faults.runs import finish, what_counts

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).with_name("on_nodes.py")
STEPS = 24
WARMUP = 6


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    """Batches that two and three workers can share, and a checkpoint after each fifth step."""
    changes = {"iterations": STEPS, "warmup": WARMUP, "batch_size": 6, "checkpoint_every": 5, "log_every": 1}
    return override(
        tiny_config,
        {**{f"train.{name}": value for name, value in changes.items()}, "evaluation.every": 12},
    )


def run_on(nodes: int, config: Config, folder: Path, fault: str = "none", step: int = 0) -> dict[str, Any]:
    """Train on so many nodes, in processes of its own; what it told at its end."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(to_json(config))
    command = [sys.executable, str(SCRIPT), str(folder / "config.json"), str(folder / "run"), str(nodes)]
    printed = finish([*command, fault, str(step)], folder / "log")
    told: dict[str, Any] = json.loads(printed.strip().splitlines()[-1])
    return told


@pytest.fixture(scope="module")
def on_two(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("nodes") / "two"
    return folder / "run", run_on(2, config, folder)


def _losses(out: Path) -> list[dict[str, float]]:
    wanted = ("train/loss/", "train/threshold", "train/aux_threshold")
    return [{k: v for k, v in line.items() if k.startswith(wanted)} for _, line in read_metrics(out)]


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_run_over_nodes_is_that_of_one_process(
    nodes: int, config: Config, on_two: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    alone = train(config, out=tmp_path / "alone")
    out, told = on_two
    if nodes == 3:
        out, told = tmp_path / "three" / "run", run_on(3, config, tmp_path / "three")

    assert told["nodes"] == nodes
    for step, (one, other) in enumerate(zip(_losses(alone.out), _losses(out), strict=True), start=1):
        # Sums of several ranks round otherwise: once pseudo-labels are learnt from, a pixel at the threshold
        # may fall on its other side.
        near = {"rel": 1e-6} if step <= WARMUP + 1 else {"rel": 5e-3, "abs": 2e-3}
        assert other == pytest.approx(one, **near), step
    for name, value in alone.metrics.items():
        if name.endswith("best_xi"):
            continue  # of two thresholds that are equally good, one or the other
        assert float(told["metrics"][name]) == pytest.approx(value, rel=1e-3, abs=2e-3, nan_ok=True), name


def test_all_ranks_report_the_same_thresholds_losses_and_metrics(
    on_two: tuple[Path, dict[str, Any]],
) -> None:
    _, told = on_two

    assert told["ranks"] == [2]
    assert told["reports"] >= STEPS
    assert told["same"]


@pytest.mark.parametrize(
    ("fault", "name", "most"),
    [
        ("worker", "kill -9 of a worker on another node", 5),
        ("node", "a node lost with its raylet", 5),
        ("notice", "a node taken back after notice", STEPS),
    ],
)
def test_a_loss_on_the_way_changes_nothing(
    fault: str,
    name: str,
    most: int,
    config: Config,
    on_two: tuple[Path, dict[str, Any]],
    tmp_path: Path,
) -> None:
    account.tried(name)
    out = tmp_path / fault / "run"

    told = run_on(2, config, tmp_path / fault, fault, 13)

    repeated = len(told["seen"]) - len(set(told["seen"]))
    assert what_counts(out) == what_counts(on_two[0])
    assert differences(saved_state(out, STEPS), saved_state(on_two[0], STEPS)) == []
    assert repeated <= most
    account.survived(name, repeated)
