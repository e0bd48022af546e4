"""What MLflow keeps of a sweep's trials over their iterations: metric histories, analysis files, panels.

A trial is found by what its arm changes, whatever table it stands in and whatever it is called there. One
that forked from a shared warm-up begins with the warm-up's own history. Nothing is read before it is asked
for, and nothing is kept but what was asked for.
"""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cosa.config import Config, EvaluationConfig, identity, override
from sweeps.runs import FORK_TAG, base_of
from sweeps.tables.metrics import judged_key
from sweeps.tables.table import from_dict

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

ANALYSIS, PANEL_ARRAYS, PANEL_PICTURES = "analysis.json", "panels.npz", "panels.png"
"""What an evaluation leaves, a file for each step: the folder of a run's artifacts, and the files' suffix."""


def read_bins(content: Mapping[str, Any]) -> pd.DataFrame:
    """A histogram of an analysis file, a line per bin, rising.

    Columns are the edges `low` and `high`, the last of which may be infinite; the `count` of pixels or images
    between them; and how many of these were `correct`, 0 where nothing was judged.
    """
    edges = [math.inf if edge is None else edge for edge in content["edges"]]
    count, correct = content.get("pixels", content.get("count")), content.get("correct", 0)
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": count, "correct": correct})


def merge_bins(bins: pd.DataFrame, share: float) -> pd.DataFrame:
    """Neighbours put together from the left until each bin holds at least `share` of the count.

    What is left at the right end joins the last bin; empty bins before the first full one are left out.
    """
    bins = bins.iloc[np.argmax(bins["count"] > 0) :]
    least, held, group, groups = share * bins["count"].sum(), 0, 0, []
    for count in bins["count"]:
        if held >= least and held > 0:
            held, group = 0, group + 1
        groups.append(group)
        held += count
    if held < least and group:
        groups = [min(place, group - 1) for place in groups]
    return bins.groupby(groups).agg({"low": "first", "high": "last", "count": "sum", "correct": "sum"})


def quantile(bins: pd.DataFrame, share: float) -> float:
    """The value below which `share` of the count lies, evenly spread within a bin.

    NaN of nothing; in an open last bin its lower edge, all that is known.
    """
    bins = bins[bins["count"] > 0]
    if bins.empty:
        return math.nan
    sums = bins["count"].cumsum()
    place = share * sums.iloc[-1]
    index = np.searchsorted(sums, place)
    low, high, count, _ = bins.iloc[index]
    inside = (place - (sums.iloc[index] - count)) / count
    return float(low if math.isinf(high) else low + (high - low) * inside)


@dataclass(frozen=True)
class TrialHistory:
    """One finished trial."""

    seed: int
    client: MlflowClient
    run_ids: tuple[str, ...]
    """Its run, after that of its shared warm-up if it has one."""

    def metric(self, key: str, *, after: int = -1) -> pd.Series:
        """A metric by the step it was taken at, of steps beyond `after`; rising, of equal steps the last."""
        found = {
            int(point.step): float(point.value)
            for run_id in self.run_ids
            for point in self.client.get_metric_history(run_id, key)
            if point.step > after
        }
        return pd.Series(found, dtype=float).sort_index()

    def files(self, kind: str) -> dict[int, Callable[[], bytes]]:
        """By step, rising, what reads the file `step_00000400` of a kind; the trial's own win."""
        folder, suffix = kind.split(".")
        found = {
            int(path.stem.removeprefix("step_")): functools.partial(self._read, run_id, item.path)
            for run_id in self.run_ids
            for item in self.client.list_artifacts(run_id, folder)
            if (path := PurePosixPath(item.path)).suffix == f".{suffix}"
        }
        return dict(sorted(found.items()))

    def last_file(self, kind: str) -> bytes | None:
        """What the last file of a kind holds; None without any."""
        files = [*self.files(kind).values()]
        return files[-1]() if files else None

    def _read(self, run_id: str, path: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run_id, path, folder)).read_bytes()


@dataclass(frozen=True)
class ArmHistories:
    """What a sweep has of one arm."""

    network: str
    """Which one it is judged on: `assignment`, `online` where it has no AN, or `standalone`."""
    planned: bool
    """Whether the sweep was to train it at all."""
    trials: tuple[TrialHistory, ...]
    """Its finished trials, a seed each, rising."""

    def metric(self, key: str, *, after: int = -1) -> list[pd.Series]:
        """A metric's history of every seed that has it; for one of AN that of the network judged."""
        own = judged_key(key, self.network)
        found = (trial.metric(own, after=after) for trial in self.trials)
        return [history for history in found if len(history)]

    def last(self, key: str) -> pd.Series:
        """A metric's last value of every seed that has it."""
        return pd.Series([history.iloc[-1] for history in self.metric(key)], dtype=float)


class Histories:
    """The trials of one sweep, by what their arms change."""

    def __init__(
        self, client: MlflowClient, plan: Mapping[str, Any], runs: Iterable[Run], preset: str
    ) -> None:
        """Sort the runs by the plan's trials.

        Args:
            client: Of the store that holds the runs.
            plan: What the sweep planned, as `plan.to_json` writes it.
            runs: All runs of the sweep, warm-ups too; of equals the last one counts.
            preset: Its name, for captions.

        Raises:
            ValueError, TypeError: The plan holds settings that this version does not know.
        """
        self.base, self.preset = base_of(plan), preset
        self.seeds: tuple[int, ...] = tuple(plan["seeds"])
        self.tables = [from_dict(table) for table in plan["tables"]]
        self._found: dict[str, dict[int, TrialHistory]] = {}
        self._thresholds: set[float] = set()
        changes = {f"{table.name}/{arm.name}": arm.changes for table in self.tables for arm in table.arms}
        finished = [run for run in runs if run.info.status == "FINISHED"]
        by_id = {run.info.run_id: run for run in finished}

        def by_identity(kind: str, tag: str) -> dict[str, Run]:
            own = (run for run in finished if run.data.tags.get("cosa.kind") == kind)
            return {run.data.tags.get(tag, ""): run for run in own}

        runs_of = by_identity("trial", "cosa.identity")
        warmups_of = by_identity("warmup", "cosa.warmup_identity")
        warmups = {trial["name"]: trial["identity"] for trial in plan["trials"] if trial["kind"] == "warmup"}
        for trial in (trial for trial in plan["trials"] if trial["kind"] == "trial"):
            config = override(self.base, changes[trial["arms"][0]])
            arm = self._found.setdefault(_essence(config), {})
            self._thresholds.add(config.threshold.xi)
            if (run := runs_of.get(trial["identity"])) is None:
                continue
            planned = warmups_of.get(warmups.get(trial["warmup"], ""))
            warmup = by_id.get(run.data.tags.get(FORK_TAG, ""), planned)  # an earlier sweep's is told there
            judged = config.ema.momentum == self.base.ema.momentum  # a warm-up is judged by this AN alone
            before = [warmup] if warmup and judged else []
            ids = tuple(one.info.run_id for one in (*before, run))
            arm.setdefault(trial["seed"], TrialHistory(trial["seed"], client, ids))

    def arm(self, changes: Mapping[str, Any]) -> ArmHistories:
        """What there is of the arm that changes these settings, evaluation's aside."""
        config = override(self.base, changes)
        essence = _essence(config)
        found = self._found.get(essence, {})
        trials = tuple(found[seed] for seed in sorted(found))
        return ArmHistories(config.judged_network, essence in self._found, trials)

    def fixed_thresholds(self) -> dict[float, ArmHistories]:
        """Arms that change nothing but the threshold to a fixed one, by its value, rising."""
        arms = {
            xi: self.arm({"threshold.mode": "fixed", "threshold.xi": xi}) for xi in sorted(self._thresholds)
        }
        return {xi: arm for xi, arm in arms.items() if arm.planned}


def _essence(config: Config) -> str:
    """Identity of a config without its seed and evaluation settings."""
    return identity(config.replace(train=config.train.replace(seed=0), evaluation=EvaluationConfig()))
