"""Where the number of a report leads: the MLflow run that it is from, or several compared."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

from cosa.tracking import mask
from sweeps.tables.metrics import SEG_MIOU


@dataclass(frozen=True)
class Source:
    """What a number was made from."""

    address: str
    """Page of the run, or of several beside each other; empty where no server shows the store."""
    text: str
    """The runs' ids by seed, in words."""


@dataclass(frozen=True)
class Links:
    """Addresses of a store's runs."""

    uri: str = ""
    """The store's own; one of a file has no addresses."""
    experiment_id: str = ""

    def source(self, runs: Mapping[int, str]) -> Source | None:
        """Of a number made from `runs`, ids by seed; None of none."""
        if not runs:
            return None
        text = ", ".join(f"seed {seed}: run {run_id}" for seed, run_id in sorted(runs.items()))
        return Source(self.address(list(runs.values())), text)

    def arms(self, sweep: str) -> str:
        """The chart view of a sweep's trials, best first; empty without a server.

        Sorted by a metric, MLflow lists trials side by side instead of folding them under their sweep.
        """
        if not self._served:
            return ""
        view = {
            "workflowType": "machine_learning",
            "searchFilter": trial_filter(sweep),
            "orderByKey": f"metrics.`{SEG_MIOU}`",
            "orderByAsc": "false",
            "compareRunsMode": "CHART",
        }
        query = urllib.parse.urlencode(view, quote_via=urllib.parse.quote)
        return f"{self._home}/#/experiments/{self.experiment_id}/runs?{query}"

    def address(self, runs: list[str]) -> str:
        """The page of one run, or of several compared; empty without a server."""
        if not self._served or not runs:
            return ""
        if len(runs) == 1:
            return f"{self._home}/#/experiments/{self.experiment_id}/runs/{runs[0]}"
        several = urllib.parse.urlencode(
            {
                "runs": json.dumps(runs, separators=(",", ":")),
                "experiments": json.dumps([self.experiment_id]),
            }
        )
        return f"{self._home}/#/compare-runs?{several}"

    @property
    def _served(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    @property
    def _home(self) -> str:
        return mask(self.uri).replace("***@", "").rstrip("/")


def trial_filter(sweep: str) -> str:
    """What finds the trials of a sweep, and nothing else, in MLflow's search."""
    quote = '"' if "'" in sweep else "'"  # it is the name of the user's folder
    return f"tags.cosa.sweep = {quote}{sweep}{quote} and tags.cosa.kind = 'trial'"
