"""What a search found, in four forms: text, Markdown for MLflow, CSV of all trials, one HTML page.

With them come the pictures and `best.json`, the best settings as a preset: `cosa-train OUT/best.json`.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial

from cosa.cli.console import markdown_cell
from cosa.config import Config, flatten, to_json
from cosa.config.presets import short_name
from cosa.tracking import ui_hint
from sweeps.planning.folder import trial_folder
from sweeps.planning.plan import Plan
from sweeps.reporting.render import render_page, write_files
from sweeps.tuning import confirm
from sweeps.tuning.arguments import SearchArgs
from sweeps.tuning.confirm import over_seeds, points
from sweeps.tuning.plots import SLICE, draw
from sweeps.tuning.study import (
    JOURNAL,
    PRESET,
    SearchStudy,
    failed,
    finished,
    label,
    last_value,
    metric_by_step,
    origin,
    reason,
    state,
)

PAGE, BEST, TRIALS = "search.html", "best.json", "trials.csv"
LEAST_FOR_IMPORTANCE, SURE_OF_IMPORTANCE = 20, 60
"""Finished trials. Of searches with made-up noisy values, where two of eight settings matter, one of the two
was first in 75 % with 10 trials, 92 % with 20; both led in 25 % with 20, 58 % with 30, 83 % with 60."""
LEAST_FOR_AGREEMENT = 10
"""Finished trials; the rank correlation of fewer says nothing."""
_TOP = 10
"""Trials that the page lists."""
_STATES = {
    "complete": "finished",
    "pruned": "stopped on their way",
    "failed": "failed",
    "running": "unfinished",
}


class Findings:
    """Everything a report of a search shows."""

    def __init__(
        self,
        args: SearchArgs,
        study: SearchStudy,
        plan: Plan,
        failures: Mapping[str, str],
        data_tags: Mapping[str, str],
    ) -> None:
        """Put together what a search and its confirmation left.

        Args:
            args: What was asked for.
            study: The search.
            plan: Of the confirmation.
            failures: Why runs of the confirmation did not finish, by name.
            data_tags: Fingerprints of the data, by tag.
        """
        self.args, self.study, self.trials = args, study, study.trials
        self.finished = finished(self.trials)
        """The best one first."""
        self.confirmation = confirm.read_confirmation(study, plan, args.out)
        self.summary = confirm.summary(self.confirmation)
        self.best: Config | None = None
        """The settings to go on with; None where no trial was finished."""
        self.why = ""
        """Why these."""
        if self.finished:
            self.best, self.why = confirm.best_config(study, self.confirmation, args.sweep.base)
        enough = len(self.finished) >= LEAST_FOR_IMPORTANCE
        self.importances = study.importances() if enough else {}
        self.failures = {f"trial {label(t)}": reason(t) for t in failed(self.trials)} | dict(failures)
        """What failed, by name, with the reason."""
        train, steps = args.base.train, " and ".join(f"{step:,}" for step in args.steps)
        self.facts = {
            "budget": f"{args.limits}; spent: {len(self.trials)} trials, {args.budget()}",
            "objective": "label-free mIoU of AN, of ON without SA, on the validation split, whose masks the "
            "search knows",
            "stopped at": f"{steps} of {train.iterations:,} iterations" if steps else "no step",
            "suggested by": f"Optuna's TPE, multivariate and grouped, seed {train.seed}",
            "training seed": f"{train.seed} in the search",
            "data": ", ".join(data_tags.values()),
            "study": f"optuna-dashboard {args.out / JOURNAL}",
            "all runs": ui_hint(args.sweep.uri),
        }
        self.pictures = draw(study, self.importances, train.iterations)

    @property
    def lead(self) -> str:
        """How many trials became what."""
        states = Counter(state(trial) for trial in self.trials)
        parts = [f"{states[name]} {word}" for name, word in _STATES.items() if states[name]]
        return f"{len(self.trials)} trials: {', '.join(parts)}."

    @property
    def commands(self) -> list[str]:
        """What trains the best settings, and what sees what each of their components brings."""
        file = str(self.args.out / BEST)
        ablation = ["python", "sweeps/ablation.py", "--preset", file]
        return [shlex.join(["cosa-train", file]), shlex.join(ablation)] if self.best else []

    def changes(self, settings: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """Those of `settings` that differ from the preset's: its value and the new one."""
        own = flatten(self.args.sweep.base)
        return {n: (_text(own[n]), _text(value)) for n, value in settings.items() if value != own[n]}

    def settings(self, trial: FrozenTrial) -> list[str]:
        """What a trial changes in the preset, in words."""
        changed = self.changes(self.study.changes(trial))
        return [f"{name} {new}" for name, (_, new) in changed.items()] or ["as the preset"]

    def agreement(self) -> pd.DataFrame:
        """`agreement` of all evaluations in co-training, by the journals of trials that were trained here."""
        steps = range(self.args.base.train.warmup + 1, self.args.base.train.iterations)
        on_way, ends = {}, {}
        for trial in self.finished:
            run = self.study.runs(trial)[-1]
            folder = trial_folder(self.args.out, run.name)
            if values := metric_by_step(folder, steps, run.config):
                on_way[trial.number], ends[trial.number] = values, last_value(trial)
        return agreement(pd.DataFrame.from_dict(on_way, orient="index"), pd.Series(ends, dtype=float))

    def confirmed(self) -> list[dict[str, str]]:
        """The confirmation's table for people, percent: a row for each setting, by the columns' titles."""
        mean = "fresh seeds, mean" if self.confirmation.seeds > 1 else "fresh seed"
        return [
            {
                "settings": confirm.name(arm),
                "in the search, its one seed": points(row["searched"]),
                mean: over_seeds(row["mean"], row["std"]),
                "n": f"{row['count']:.0f}",
                "lost since the search": points(row["lost"]),
                "over the preset": over_seeds(row["difference"], row["difference_std"], signed=True),
                "p": "–" if math.isnan(row["p"]) else "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}",
                "labelled mIoU": over_seeds(row["labelled"], row["labelled_std"]),
            }
            for arm, row in self.confirmation.table.iterrows()
        ]


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def agreement(on_way: pd.DataFrame, end: pd.Series) -> pd.DataFrame:
    """How far the order of trials on their way agrees with that at the end: whether a step can judge at all.

    Args:
        on_way: The metric of finished trials (rows) by step (columns), NaN where one was not evaluated.
        end: Their metric at the end.

    Returns:
        By step the number of `trials` and Spearman's rank correlation over `all` and over the `better_half`
        at the end: 1 for the same order, 0 for chance, NaN over fewer than LEAST_FOR_AGREEMENT.
    """
    found = {}
    for step, values in on_way.dropna(axis="columns", thresh=LEAST_FOR_AGREEMENT).sort_index(axis=1).items():
        known = values.dropna()
        best = known[end[known.index].nlargest(len(known) // 2).index]
        found[step] = (len(known), _spearman(known, end), _spearman(best, end))
    return pd.DataFrame.from_dict(found, orient="index", columns=["trials", "all", "better_half"])


def _spearman(values: pd.Series, end: pd.Series) -> float:
    if len(values) >= LEAST_FOR_AGREEMENT and 1 in {values.nunique(), end[values.index].nunique()}:
        return 0.0  # no order to agree with
    return float(values.corr(end, method="spearman", min_periods=LEAST_FOR_AGREEMENT))


def text(findings: Findings) -> str:
    """The outcome in lines for the terminal."""
    lines = [findings.lead]
    for trial in findings.finished[:5]:
        settings = ", ".join(findings.settings(trial))
        lines.append(f"  {100 * last_value(trial):6.2f}  trial {label(trial)}  {settings}")
    if rows := findings.confirmed():
        lines.append("trained again with fresh seeds:")
        lines += pd.DataFrame(rows).rename(columns={"settings": ""}).to_string(index=False).splitlines()
        lines += [f"{name}: {value}" for name, value in findings.summary.items()]
    if findings.best:
        lines += [f"best settings ({findings.why}):", *(f"  {command}" for command in findings.commands)]
    return "\n".join(lines)


def markdown(findings: Findings) -> str:
    """The outcome for the head of the search's page in MLflow."""
    parts = [findings.lead]
    if findings.summary:
        parts.append("\n".join(f"- {name}: {value}" for name, value in findings.summary.items()))
    if findings.best:
        commands = "\n".join(findings.commands)
        parts.append(f"Best settings, {findings.why}:\n\n```\n{commands}\n```")
    rows = []
    for trial in findings.finished[:_TOP]:
        settings = markdown_cell(", ".join(findings.settings(trial)))
        rows.append(f"| {label(trial)} | {100 * last_value(trial):.2f} | {settings} |")
    parts.append("\n".join(["| trial | label-free mIoU | settings |", "|:--|--:|:--|", *rows]))
    parts.append("\n".join(f"- {name}: {value}" for name, value in findings.facts.items()))
    return "\n\n".join(parts) + "\n"


def as_csv(study: SearchStudy, trials: Sequence[FrozenTrial]) -> str:
    """Every trial with its settings; values are fractions."""
    rows = [
        {
            "trial": trial.number,
            "origin": origin(trial) or "TPE",
            "state": state(trial),
            "value": trial.value if state(trial) == "complete" else None,
            **{f"at_{step}": value for step, value in trial.intermediate_values.items()},
            **study.changes(trial),
            "reason": reason(trial),
        }
        for trial in trials
    ]
    steps = sorted({step for trial in trials for step in trial.intermediate_values})
    names = [dimension.setting for dimension in study.space.dimensions]
    columns = ["trial", "origin", "state", "value", *(f"at_{step}" for step in steps), *names, "reason"]
    return str(pd.DataFrame(rows, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n"))


def html(findings: Findings) -> str:
    """The page, complete in itself."""
    kinds = {"": "suggested", PRESET: "preset"}
    slices = [part for part in findings.pictures if part.file.startswith(SLICE)]
    return render_page(
        Path(__file__).with_name("search.html.j2"),
        preset=short_name(findings.args.sweep.preset),
        findings=findings,
        top=[
            (t.number, kinds.get(origin(t), origin(t)), points(last_value(t)), findings.settings(t))
            for t in findings.finished[:_TOP]
        ],
        confirmed=findings.confirmed(),
        changes=findings.changes(flatten(findings.best) if findings.best else {}),
        agreement=list(findings.agreement().itertuples()),
        least=LEAST_FOR_IMPORTANCE,
        sure=SURE_OF_IMPORTANCE,
        slices=slices,
        pictures=[part for part in findings.pictures if part not in slices],
    )


def write(findings: Findings) -> list[Path]:
    """Write the page, the trials, the best settings and the pictures into the search's folder."""
    contents = {PAGE: html(findings), TRIALS: as_csv(findings.study, findings.trials)}
    if findings.best:
        contents[BEST] = to_json(findings.best)
    pictures = {f"figures/{part.file}": part.data for part in findings.pictures}
    return write_files(findings.args.out, {k: text.encode() for k, text in contents.items()} | pictures)
