"""What each stage of CoSA-MS took and reached: standalone networks, and the pseudo-labels before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from mlflow.entities import Run


@dataclass(frozen=True)
class Stage:
    """One standalone network, over its seeds."""

    name: str
    """Its row's."""
    oracle: bool
    """Whether it learned from masks."""
    values: pd.DataFrame
    """A line per seed. Columns are the metrics of its table by the keys of AN; `hours` of its training, and
    `labels_hours` of writing the pseudo-labels that it learned from."""
    runs: Mapping[int, str]
    """Ids of its runs by seed."""
    parameters: int | None
    """Numbers in the network; None where its weights were not kept."""


def labels_of(plan: Mapping[str, Any], children: Sequence[Run]) -> dict[tuple[str, int], Run]:
    """The run that wrote the pseudo-labels which a row of a seed learned from, by row and seed."""
    runs = {
        run.data.tags.get("cosa.identity"): run
        for run in children
        if run.data.tags.get("cosa.kind") == "labels" and run.info.status == "FINISHED"
    }
    return {
        (row, trial["seed"]): runs[trial["identity"]]
        for trial in plan["trials"]
        if trial["kind"] == "labels" and trial["identity"] in runs
        for row in trial["arms"]
    }
