"""What a search found, in four forms: text, Markdown for MLflow, CSV of all trials, one HTML page.

With them come the pictures and `best.json`, the best settings as a preset: `cosa-train OUT/best.json`.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from optuna.trial import FrozenTrial

from cosa.config import Config, flatten, to_json
from cosa.config.presets import short_name
from sweeps.planning.folder import trial_folder
from sweeps.reporting.plots import Part
from sweeps.reporting.render import render_page, ui_command, write_files
from sweeps.tuning import confirm
from sweeps.tuning.arguments import SearchArgs
from sweeps.tuning.confirm import Confirmation, ConfirmResult, over_seeds, points
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


@dataclass(frozen=True)
class Findings:
    """Everything a report of a search shows."""

    args: SearchArgs
    study: SearchStudy
    trials: tuple[FrozenTrial, ...]
    confirmation: Confirmation
    best: Config | None
    """The settings to go on with; None where no trial was finished."""
    why: str
    """Why these."""
    importances: Mapping[str, float]
    agreement: pd.DataFrame
    """See `agreement`."""
    pictures: tuple[Part, ...]
    failures: Mapping[str, str]
    """What failed, by name, with the reason."""
    facts: Mapping[str, str]

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

    @property
    def changes(self) -> Mapping[str, tuple[Any, Any]]:
        """Settings of `best` that differ from the preset's: the preset's value and the new one."""
        own, best = flatten(self.args.sweep.base), flatten(self.best) if self.best else {}
        return {name: (own[name], value) for name, value in best.items() if value != own[name]}

    def settings(self, trial: FrozenTrial) -> list[str]:
        """What a trial changes in the preset, in words."""
        own, changes = flatten(self.args.sweep.base), self.study.changes(trial)
        changed = {name: value for name, value in changes.items() if own[name] != value}
        return [f"{name} {_text(value)}" for name, value in changed.items()] or ["as the preset"]


def find(
    args: SearchArgs, study: SearchStudy, result: ConfirmResult, data_tags: Mapping[str, str]
) -> Findings:
    """Put together what a search and its confirmation left.

    Args:
        args: What was asked for.
        study: The search.
        result: What was run to confirm it.
        data_tags: Fingerprints of the data, by tag.
    """
    trials, train = study.trials, args.base.train
    complete = finished(trials)
    confirmation = confirm.read_confirmation(study, result, args.out)
    best, why = confirm.best_config(study, confirmation, args.sweep.base) if complete else (None, "")
    importances = study.importances() if len(complete) >= LEAST_FOR_IMPORTANCE else {}
    steps = " and ".join(f"{step:,}" for step in args.steps)
    return Findings(
        args=args,
        study=study,
        trials=tuple(trials),
        confirmation=confirmation,
        best=best,
        why=why,
        importances=importances,
        agreement=_agreement(args, study, complete),
        pictures=tuple(draw(study, importances, train.iterations)),
        failures={f"trial {label(t)}": reason(t) for t in failed(trials)} | dict(result.failures or {}),
        facts={
            "budget": f"{args.limits}; spent: {len(trials)} trials, {args.budget()}",
            "objective": "label-free mIoU of AN on the validation split, its masks known to the search",
            "stopped at": f"{steps} of {train.iterations:,} iterations" if steps else "no step",
            "suggested by": f"Optuna's TPE, multivariate and grouped, seed {train.seed}",
            "training seed": f"{train.seed} in the search",
            "data": ", ".join(data_tags.values()),
            "study": f"optuna-dashboard {args.out / JOURNAL}",
            "all runs": ui_command(args.sweep.uri),
        },
    )


def _agreement(args: SearchArgs, study: SearchStudy, complete: list[FrozenTrial]) -> pd.DataFrame:
    """Of all evaluations in co-training, by the journals of trials that this search trained itself."""
    steps = range(args.base.train.warmup + 1, args.base.train.iterations)
    names = {trial.number: study.runs(trial)[-1].name for trial in complete}
    on_way = {n: metric_by_step(trial_folder(args.out, name), steps) for n, name in names.items()}
    ends = {trial.number: last_value(trial) for trial in complete if on_way[trial.number]}
    return agreement(pd.DataFrame([on_way[n] for n in ends], index=list(ends)), pd.Series(ends, dtype=float))


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
    for step in sorted(on_way.columns):
        known = on_way[step].dropna()
        best = known[end[known.index].nlargest(len(known) // 2).index]
        if len(known) >= LEAST_FOR_AGREEMENT:
            found[step] = {
                "trials": len(known),
                "all": _spearman(known, end),
                "better_half": _spearman(best, end),
            }
    return pd.DataFrame.from_dict(found, orient="index", columns=["trials", "all", "better_half"])


def _spearman(values: pd.Series, end: pd.Series) -> float:
    from scipy.stats import spearmanr  # a second of imports

    if len(values) < LEAST_FOR_AGREEMENT:
        return math.nan
    if values.nunique() == 1 or end[values.index].nunique() == 1:  # no order to agree with
        return 0.0
    return float(spearmanr(values, end[values.index]).statistic)


def text(findings: Findings) -> str:
    """The outcome in lines for the terminal."""
    lines = [findings.lead]
    for trial in finished(findings.trials)[:5]:
        settings = ", ".join(findings.settings(trial))
        lines.append(f"  {100 * last_value(trial):6.2f}  trial {label(trial)}  {settings}")
    rows = confirmed_rows(findings.confirmation)
    if rows:
        lines.append("trained again with fresh seeds:")
        lines += pd.DataFrame(rows).rename(columns={"settings": ""}).to_string(index=False).splitlines()
        lines += [f"{name}: {value}" for name, value in confirm.summary(findings.confirmation).items()]
    if findings.best:
        lines += [f"best settings ({findings.why}):", *(f"  {command}" for command in findings.commands)]
    return "\n".join(lines)


def markdown(findings: Findings) -> str:
    """The outcome for the head of the search's page in MLflow."""
    parts = [findings.lead]
    if summary := confirm.summary(findings.confirmation):
        parts.append("\n".join(f"- {name}: {value}" for name, value in summary.items()))
    if findings.best:
        commands = "\n".join(findings.commands)
        parts.append(f"Best settings, {findings.why}:\n\n```\n{commands}\n```")
    rows = [
        f"| {label(trial)} | {100 * last_value(trial):.2f} | {', '.join(findings.settings(trial))} |"
        for trial in finished(findings.trials)[:_TOP]
    ]
    parts.append("\n".join(["| trial | label-free mIoU | settings |", "|:--|--:|:--|", *rows]))
    parts.append("\n".join(f"- {name}: {value}" for name, value in findings.facts.items()))
    return "\n\n".join(parts) + "\n"


def as_csv(findings: Findings) -> str:
    """Every trial with its settings; values are fractions."""
    names = [dimension.setting for dimension in findings.args.space.dimensions]
    steps = sorted({step for trial in findings.trials for step in trial.intermediate_values})
    columns = ["trial", "origin", "state", "value", *(f"at_{step}" for step in steps), *names, "reason"]
    rows = [
        {
            "trial": trial.number,
            "origin": origin(trial) or "TPE",
            "state": state(trial),
            "value": trial.value if state(trial) == "complete" else None,
            **{f"at_{step}": value for step, value in trial.intermediate_values.items()},
            **findings.study.changes(trial),
            "reason": reason(trial),
        }
        for trial in findings.trials
    ]
    text = pd.DataFrame(rows, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n")
    return str(text)


def confirmed_rows(confirmation: Confirmation) -> list[dict[str, str]]:
    """The confirmation's table for people, percent: a row for each setting, by the columns' titles."""
    return [
        {
            "settings": confirm.name(arm),
            "in the search, its one seed": points(row["searched"]),
            "fresh seeds, mean" if confirmation.seeds > 1 else "fresh seed": over_seeds(
                row["mean"], row["std"]
            ),
            "n": f"{row['count']:.0f}",
            "lost since the search": points(row["lost"]),
            "over the preset": over_seeds(row["difference"], row["difference_std"], signed=True),
            "p": "–" if math.isnan(row["p"]) else "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}",
            "labelled mIoU": over_seeds(row["labelled"], row["labelled_std"]),
        }
        for arm, row in confirmation.table.iterrows()
    ]


def html(findings: Findings) -> str:
    """The page, complete in itself."""
    complete = finished(findings.trials)
    slices = [part for part in findings.pictures if part.file.startswith(SLICE)]
    return render_page(
        Path(__file__).with_name("search.html.j2"),
        title=findings.args.out.name,
        preset=short_name(findings.args.sweep.preset),
        findings=findings,
        top=[(t, _kind(t), points(last_value(t)), findings.settings(t)) for t in complete[:_TOP]],
        confirmed=confirmed_rows(findings.confirmation),
        summary=confirm.summary(findings.confirmation),
        several=findings.confirmation.seeds > 1,
        changes={name: (_text(old), _text(new)) for name, (old, new) in findings.changes.items()},
        agreement=findings.agreement.itertuples(),
        finished=len(complete),
        least=LEAST_FOR_IMPORTANCE,
        sure=SURE_OF_IMPORTANCE,
        slices=slices,
        pictures=[part for part in findings.pictures if part not in slices],
        texts=findings.args.space.texts(),
    )


def _kind(trial: FrozenTrial) -> str:
    return {"": "suggested", PRESET: "preset"}.get(origin(trial), origin(trial))


def _text(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def write(findings: Findings) -> list[Path]:
    """Write the page, the trials, the best settings and the pictures into the search's folder."""
    contents = {PAGE: html(findings).encode(), TRIALS: as_csv(findings).encode()}
    if findings.best:
        contents[BEST] = to_json(findings.best).encode()
    contents |= {f"figures/{part.file}": part.data for part in findings.pictures}
    return write_files(findings.args.out, contents)
