"""A search in MLflow: its parent run, a run nested in it for each trial, and what became of each as tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cosa.config import Config
from cosa.config.presets import short_name
from cosa.tracking import TrackingSpec, read_run_id
from cosa.tracking.provenance import source_tags
from sweeps import runs
from sweeps.planning import folder as folders
from sweeps.planning.plan import Plan, Trial
from sweeps.planning.reuse import COMMIT_TAG, find_reusable
from sweeps.running import store
from sweeps.tables.metrics import SEG_MIOU
from sweeps.tuning.confirm import Outcome
from sweeps.tuning.flow import trial_of
from sweeps.tuning.record import Record

if TYPE_CHECKING:
    from sweeps.running.arguments import Order
    from sweeps.running.store import Sweep
    from sweeps.tuning.report import Findings
    from sweeps.tuning.study import SearchStudy

KIND = "search"
"""Under `cosa.kind` on the parent."""


@dataclass(frozen=True)
class Reused:
    """What earlier runs spare a search."""

    values: Mapping[str, float]
    """The metric, by the trials' names."""
    refused: str = ""
    """Why trials that finished earlier are run again all the same; empty where there are none."""


def find_earlier(order: Order, trials: Sequence[Trial], data_tags: Mapping[str, str]) -> Reused:
    """The metric of `trials` that finished in earlier runs, by this code and on the data of these tags."""
    found = runs.find_experiment(order.uri, order.experiment) if trials else None
    if found is None:
        return Reused({})
    code = {COMMIT_TAG: order.commit} if order.commit else source_tags()
    with runs.explained(order.uri):
        reuse = find_reusable(*found, trials, code, data_tags)
        metrics = {name: found[0].get_run(run_id).data.metrics for name, run_id in reuse.runs.items()}
    return Reused({name: own[SEG_MIOU] for name, own in metrics.items() if SEG_MIOU in own}, reuse.refused)


class SearchTrack:
    """The search's runs, as its driver writes them."""

    def __init__(
        self, sweep: Sweep, root: Path, base: Config, study: SearchStudy, momenta: tuple[float, ...]
    ) -> None:
        self._sweep = sweep
        self._root = root
        self._base = base
        self._study = study
        self._momenta = momenta

    @classmethod
    def open(cls, order: Order, base: Config, study: SearchStudy, momenta: tuple[float, ...]) -> SearchTrack:
        """Make the parent run, or open it again.

        Raises:
            TrackingError: The store does not answer or refuses the run.
            ValueError: The search was tracked elsewhere before.
        """
        tags = {"cosa.preset": short_name(order.preset)}
        if order.commit:
            tags["mlflow.source.git.commit"] = order.commit
        nothing = Plan(base, (), (base.train.seed,), (), 0, 0)
        sweep = store.open_sweep(order.uri, order.experiment, order.root, base, nothing, tags)
        sweep.tag("cosa.kind", KIND)
        return cls(sweep, order.root, base, study, momenta)

    def spec(self, trial: Trial) -> TrackingSpec:
        """Where to track a trial of the search or of its confirmation."""
        return self._sweep.spec(trial)

    def mend(self, outcome: Outcome) -> None:
        """Bring the runs to what study and folders say; each says its number and what became of it."""
        self._sweep.collect(self._root)
        for record in self._study.records():
            trial = self._trial(record)
            result = folders.read_result(self._root, trial)
            if record.state == "complete" and result is not None:
                self._sweep.mend(self._root, trial, result)
            if record.state == "failed":
                self._sweep.fail(self._root, {trial.name: record.reason})
            self._tag(trial, _facts(record))
        for trial in outcome.plan.trials if outcome.plan else ():
            result = folders.read_result(self._root, trial)
            if result is not None:
                self._sweep.mend(self._root, trial, result)
        self._sweep.fail(self._root, outcome.failures)
        self._sweep.tag("cosa.search.spent", outcome.spent)

    def close(self, findings: Findings, files: Sequence[Path]) -> None:
        """Show the findings at the head of the search's page, keep the report's files, and close the run."""
        from sweeps.tuning.report import markdown

        self._sweep.close(markdown(findings)[:8000], files, failed=bool(findings.failures))

    def stop(self, status: Literal["FAILED", "KILLED"]) -> None:
        """Close the search's run and those of its trials that were training."""
        running = [self._trial(r) for r in self._study.records() if r.state == "running"]
        self._sweep.stop(self._root, running, status)

    def _trial(self, record: Record) -> Trial:
        return trial_of(record, self._study.config(record), self._base, self._momenta)[-1]

    def _tag(self, trial: Trial, tags: Mapping[str, str]) -> None:
        run_id = read_run_id(folders.trial_folder(self._root, trial.name))
        client = runs.client_of(self._sweep.uri)
        for key, value in tags.items() if run_id else ():
            client.set_tag(run_id, key, value)


def _facts(record: Record) -> dict[str, str]:
    facts = {
        "cosa.search.trial": str(record.number),
        "cosa.search.state": record.state,
        "cosa.search.origin": record.origin or "TPE",
    }
    if record.state == "pruned" and record.decisions:
        facts["cosa.search.pruned_at"] = str(record.decisions[-1].step)
    return facts
