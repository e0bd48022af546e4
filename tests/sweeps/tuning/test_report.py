"""What a search leaves: a page that says no more than it knows, and settings that can be trained at once."""

from __future__ import annotations

import json
import shlex

import pytest

from cosa import cli
from cosa.cli.common import as_text
from cosa.config import flatten, from_json, identity, override
from cosa.config.presets import get_preset
from sweeps.running.arguments import read_order
from sweeps.tables.metrics import SEG_MIOU, SEG_MIOU_LABELLED
from sweeps.tuning import report as search_report
from sweeps.tuning.confirm import Outcome
from sweeps.tuning.driver import _confirmation, read_request
from sweeps.tuning.study import open_study


class Finished:
    """A search that found csc.weight 0.2, with folders as trials would have left them."""

    def __init__(self, root, config, confirm_seeds=3, trials=4):
        preset = flatten(get_preset("shapes"))
        changes = [f"{k}={as_text(v)}" for k, v in flatten(config).items() if v != preset[k]]
        seeds = ("--confirm", "2", "--confirm-seeds", str(confirm_seeds))
        self.root = root
        self.request = read_request(
            [
                "--preset",
                "shapes",
                "--out",
                str(root),
                "--tracking-uri",
                "http://127.0.0.1:5",
                *seeds,
                "--set",
                *changes,
            ]
        )
        self.base = self.request.base
        root.mkdir()
        self.study = open_study(root, self.request.space, self.base, seed=0)
        space = self.request.space
        self.study.enqueue(
            {
                origin: space.parameters(override(self.base, {"csc.weight": weight}), self.base)
                for origin, weight in {"full": 0.1, "5a/x2": 0.2, "5a/x4": 0.4}.items()
            }
        )
        for _ in range(trials):
            record = self.study.ask()
            self.study.finish(record.number, 0.5 - abs(record.changes["csc.weight"] - 0.2))
        self.best, self.plan, _ = _confirmation(self.request, self.study)
        for trial in self.plan.trials if self.plan else ():
            if trial.kind == "trial":
                self._leave(trial)

    def _leave(self, trial):
        value = 0.45 - abs(trial.config.csc.weight - 0.2) + 0.001 * trial.seed
        folder = self.root / "trials" / trial.name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / f"checkpoints/step_{trial.last_step:08d}.pt").touch()
        result = {"identity": identity(trial.config), "step": trial.last_step, "metrics": {SEG_MIOU: value}}
        result["metrics"][SEG_MIOU_LABELLED] = value + 0.01
        (folder / "result.json").write_text(json.dumps(result))

    def findings(self):
        outcome = Outcome(tuple(self.best), self.plan, {}, "1 min")
        return search_report.find(self.request, self.study, outcome, {"cosa.data_fingerprint": "f00"})


@pytest.fixture
def finished(tmp_path, tiny_config):
    return lambda **options: Finished(tmp_path / "search", tiny_config, **options)


def test_the_best_settings_are_trained_by_the_command_that_is_printed(
    finished, tmp_path, monkeypatch, capsys
):
    findings = finished().findings()
    search_report.write(findings, tmp_path / "search")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    printed = search_report.text(findings).splitlines()
    (line,) = [line.strip() for line in printed if line.strip().startswith("cosa-train ")]

    assert cli.train(shlex.split(line)[1:]) == 0

    assert "2 of 2 steps" in capsys.readouterr().out
    (run,) = tmp_path.glob("runs/best-*")
    trained = from_json((run / "config.json").read_text())
    assert trained == findings.best
    assert trained.csc.weight == pytest.approx(0.2)


def test_the_best_settings_are_a_preset_of_other_sweeps(finished, tmp_path, monkeypatch):
    findings = finished().findings()
    search_report.write(findings, tmp_path / "search")
    monkeypatch.chdir(tmp_path)
    python, script, *arguments = shlex.split(findings.ablation)
    assert (python, script) == ("python", "sweeps/ablation.py")

    order = read_order("ablation", "", ("3b",), arguments)

    assert order.base == findings.best
    assert order.root == tmp_path / "runs/ablation-best"


def test_with_three_fresh_seeds_the_page_shows_means_deviations_and_what_was_lost(finished):
    page = search_report.html(finished().findings())
    assert "fresh seeds, mean" in page
    assert "45.20 ± 0.10" in page
    assert ">4.80<" in page, "lost since the search"
    assert '<td data-title="fresh seeds, n">3</td>' in page


def test_with_one_fresh_seed_nothing_on_the_page_speaks_of_a_deviation_over_seeds(finished):
    page = search_report.html(finished(confirm_seeds=1).findings())
    assert "±" not in page
    assert "one fresh seed, so no deviation can be told" in page
    assert "mean ± sample deviation" not in page
