"""Where the number of a report leads: the MLflow run that it is from, or several compared."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass

from cosa.tracking import mask


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

    def address(self, runs: list[str]) -> str:
        """The page of one run, or of several compared; empty without a server."""
        if not self.uri.startswith(("http://", "https://")) or not runs:
            return ""
        home = mask(self.uri).replace("***@", "").rstrip("/")
        if len(runs) == 1:
            return f"{home}/#/experiments/{self.experiment_id}/runs/{runs[0]}"
        several = urllib.parse.urlencode(
            {
                "runs": json.dumps(runs, separators=(",", ":")),
                "experiments": json.dumps([self.experiment_id]),
            }
        )
        return f"{home}/#/compare-runs?{several}"
