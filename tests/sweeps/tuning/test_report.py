"""What a search leaves: a page that says no more than it knows, and settings that can be trained at once."""

from __future__ import annotations

import json
import math
import shlex

import pandas as pd
import pytest

from cosa import cli
from cosa.cli.common import as_text
from cosa.config import flatten, from_json, identity, override
from cosa.config.presets import get_preset
from sweeps.running.arguments import read_args
from sweeps.tables.metrics import SEG_MIOU, SEG_MIOU_LABELLED
from sweeps.tuning import report
from sweeps.tuning.arguments import read_arguments
from sweeps.tuning.confirm import best_of, plan_confirmation
from sweeps.tuning.study import open_study


class Finished:
    """A search that found csc.weight 0.2, with folders as trials would have left them."""

    def __init__(self, root, config, confirm_seeds=3, trials=4):
        preset = flatten(get_preset("shapes"))
        changes = [f"{k}={as_text(v)}" for k, v in flatten(config).items() if v != preset[k]]
        seeds = ("--confirm", "2", "--confirm-seeds", str(confirm_seeds))
        self.root = root
        self.args = read_arguments(
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
        self.base = self.args.base
        root.mkdir()
        self.study = open_study(root, self.args.space, self.base)
        space = self.args.space
        self.study.enqueue(
            {
                origin: space.parameters(override(self.base, {"csc.weight": weight}), self.base)
                for origin, weight in {"full": 0.1, "5a/x2": 0.2, "5a/x4": 0.4}.items()
            }
        )
        for _ in range(trials):
            trial = self.study.ask()
            self.study.finish(trial.number, 0.5 - abs(trial.params["csc.weight"] - 0.2))
        self.best = best_of(self.study, self.args.confirm)
        self.plan = plan_confirmation(self.study, self.best, self.base, self.args.seeds)
        for trial in self.plan.trials:
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
        return report.Findings(self.args, self.study, self.plan, {}, {"cosa.data_fingerprint": "f00"})


@pytest.fixture
def finished(tmp_path, tiny_config):
    return lambda **options: Finished(tmp_path / "search", tiny_config, **options)


def test_the_best_settings_are_trained_by_the_command_that_is_printed(
    finished, tmp_path, monkeypatch, capsys
):
    findings = finished().findings()
    report.write(findings)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    printed = report.text(findings).splitlines()
    (line,) = [line.strip() for line in printed if line.strip().startswith("cosa-train ")]

    assert cli.train(shlex.split(line)[1:]) == 0

    assert "2 of 2 steps" in capsys.readouterr().out
    (run,) = tmp_path.glob("runs/best-*")
    trained = from_json((run / "config.json").read_text())
    assert trained == findings.best
    assert trained.csc.weight == pytest.approx(0.2)


def test_the_best_settings_are_a_preset_of_other_sweeps(finished, tmp_path, monkeypatch):
    findings = finished().findings()
    report.write(findings)
    monkeypatch.chdir(tmp_path)
    python, script, *arguments = shlex.split(findings.commands[1])
    assert (python, script) == ("python", "sweeps/ablation.py")

    args = read_args("ablation", "", ("3b",), arguments)

    assert args.base == findings.best
    assert args.out == tmp_path / "runs/ablation-best"


def test_with_three_fresh_seeds_the_page_shows_means_deviations_and_what_was_lost(finished):
    page = report.html(finished().findings())
    assert "fresh seeds, mean" in page
    assert "45.20 ± 0.10" in page
    assert ">4.80<" in page, "lost since the search"
    assert '<td data-title="n">3</td>' in page


def test_with_one_fresh_seed_nothing_on_the_page_speaks_of_a_deviation_over_seeds(finished):
    page = report.html(finished(confirm_seeds=1).findings())
    assert "±" not in page
    assert "one fresh seed, so no deviation can be told" in page
    assert "mean ± sample deviation" not in page


def agreement(ends, step=6):
    """Of trials by (value on the way, end)."""
    on_way, end = zip(*ends, strict=True)
    return report.agreement(pd.DataFrame({step: on_way}), pd.Series(end))


def test_the_same_order_agrees_by_one_and_the_opposite_one_by_minus_one():
    same = agreement([(0.1 * i, i) for i in range(10)])
    assert (list(same.index), same.at[6, "trials"]) == ([6], 10)
    assert same.at[6, "all"] == pytest.approx(1)
    assert agreement([(-0.1 * i, i) for i in range(10)]).at[6, "all"] == pytest.approx(-1)


def test_two_neighbours_that_change_places_are_worked_out_by_hand():
    found = agreement(list(enumerate([1, 0, 2, 3, 4, 5, 6, 7, 8, 9])))
    assert found.at[6, "all"] == pytest.approx(1 - 6 * 2 / (10 * 99))  # 1 - 6 sum d^2 / n (n^2 - 1)


def test_hopeless_trials_can_make_all_of_the_agreement():
    good = [((7 * i) % 10, 50 + i) for i in range(10)]
    found = agreement([(-10 - i, i) for i in range(10)] + good)
    assert found.at[6, "all"] > 0.6
    assert found.at[6, "better_half"] == pytest.approx(agreement(good).at[6, "all"])
    assert found.at[6, "better_half"] < 0.3


def test_few_trials_say_nothing_of_agreement():
    assert agreement([(i, i) for i in range(9)]).empty
    assert math.isnan(agreement([(i, i) for i in range(19)]).at[6, "better_half"])


def test_values_that_are_all_equal_agree_with_nothing():
    assert agreement([(1, i) for i in range(10)]).at[6, "all"] == 0


def test_a_search_of_its_own_size_shows_every_picture(finished):
    found = finished(trials=25)
    files = {path.name for path in report.write(found.findings())}
    slices = {f"search-slice-{name}.svg" for name in ("csc-weight", "ema-half_life", "threshold-mode")}
    assert {"search-history.svg", "search-importance.svg", "search-parallel.svg"} | slices <= files
    assert (found.root / "search.html").read_text().count("<figure>") == len(files) - 3


def test_without_a_finished_trial_there_is_a_page_and_no_best(finished):
    findings = finished(trials=0).findings()
    assert (findings.best, findings.commands, findings.pictures) == (None, [], [])
    assert [path.name for path in report.write(findings)] == ["search.html", "trials.csv"]
    assert "Best settings" not in report.html(findings)
