"""What a search found, in four forms: text, Markdown for MLflow, CSV of all trials, one HTML page.

With them come the pictures and `best.json`, the best settings as a preset: `cosa-train OUT/best.json`.
"""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa.config import Config, flatten, to_json
from cosa.config.presets import short_name
from sweeps.planning import folder as folders
from sweeps.reporting.cells import Cell
from sweeps.reporting.plots import Part
from sweeps.reporting.render import ui_command
from sweeps.tuning.agreement import agreements, told
from sweeps.tuning.confirm import Confirmed, Outcome, confirmed
from sweeps.tuning.flow import alone, metric_by_step
from sweeps.tuning.plots import draw
from sweeps.tuning.record import PRESET, Record, State, failed
from sweeps.tuning.space import Space
from sweeps.tuning.verdict import best_config, over_seeds, points, verdict

if TYPE_CHECKING:
    from sweeps.tuning.driver import Request
    from sweeps.tuning.study import SearchStudy

PAGE, BEST, TRIALS = "search.html", "best.json", "trials.csv"
LEAST_FOR_IMPORTANCE, SURE_OF_IMPORTANCE = 20, 60
"""Finished trials. Of searches with made-up noisy values, where two of eight settings matter, one of the two
was first in 75 % with 10 trials, 92 % with 20; both led in 25 % with 20, 58 % with 30, 83 % with 60."""
_TOP = 10
"""Trials that the page lists."""


@dataclass(frozen=True)
class Findings:
    """Everything a report of a search shows."""

    title: str
    preset: str
    space: Space
    records: tuple[Record, ...]
    confirmed: tuple[Confirmed, ...]
    """The preset and the best trials with fresh seeds, the highest mean first; empty without confirmation."""
    verdict: tuple[str, ...]
    """What the confirmation says."""
    own: Mapping[str, Any]
    """The preset's own settings."""
    best: Config | None
    """The settings to go on with; None where no trial was finished."""
    why: str
    """Why these."""
    command: str
    """Trains them."""
    ablation: str
    """Sees what each of their components brings."""
    changes: Mapping[str, tuple[Any, Any]]
    """Settings of `best` that differ from the preset's: the preset's value and the new one."""
    importances: Mapping[str, float]
    agreement: tuple[str, ...]
    """How far evaluations on the way agree with the end, in sentences; empty with too few finished trials."""
    pictures: tuple[Part, ...]
    failures: Mapping[str, str]
    """What failed, by name, with the reason."""
    facts: Mapping[str, str]

    @property
    def complete(self) -> list[Record]:
        """Finished trials, the best first."""
        return sorted((r for r in self.records if r.state == "complete"), key=lambda r: (-r.value, r.number))

    def settings(self, record: Record) -> list[str]:
        """What a trial changes in the preset, in words."""
        changed = {name: value for name, value in record.changes.items() if self.own[name] != value}
        return [f"{name} {_value(value)}" for name, value in changed.items()] or ["as the preset"]

    @property
    def lead(self) -> str:
        """How many trials became what."""
        states = Counter(record.state for record in self.records)
        parts = [f"{states[state]} {word}" for state, word in _STATES.items() if states[state]]
        return f"{len(self.records)} trials: {', '.join(parts)}."


_STATES: Mapping[State, str] = {
    "complete": "finished",
    "pruned": "stopped at a rung",
    "failed": "failed",
    "running": "unfinished",
}


def find(request: Request, study: SearchStudy, outcome: Outcome, data_tags: Mapping[str, str]) -> Findings:
    """Put together what a search and its confirmation left.

    Args:
        request: What was asked for.
        study: The search.
        outcome: What was run.
        data_tags: Fingerprints of the data, by tag.
    """
    order, records = request.order, study.records()
    found: list[Confirmed] = []
    if outcome.plan:
        found = confirmed(
            records, outcome.best, outcome.plan, lambda trial: folders.read_result(order.root, trial)
        )
        found = [one for one in found if one.free.values]
    complete = any(record.state == "complete" for record in records)
    best, why = best_config(found, records, order.base) if complete else (None, "")
    own = flatten(order.base)
    enough = sum(record.state == "complete" for record in records) >= LEAST_FOR_IMPORTANCE
    importances = study.importances() if enough else {}
    steps = [f"{step:,}" for step in request.rungs.steps]
    reasons = {f"trial {record.label}": record.reason for record in failed(records)}
    return Findings(
        title=order.root.name,
        preset=short_name(order.preset),
        space=request.space,
        records=tuple(records),
        confirmed=tuple(found),
        verdict=tuple(verdict(found)),
        own=own,
        best=best,
        why=why,
        command=shlex.join(["cosa-train", str(order.root / BEST)]) if best else "",
        ablation=shlex.join(["python", "sweeps/ablation.py", "--preset", str(order.root / BEST)])
        if best
        else "",
        changes={name: (own[name], value) for name, value in flatten(best).items() if value != own[name]}
        if best
        else {},
        importances=importances,
        agreement=tuple(_agreement(request, study, records)),
        pictures=tuple(draw(records, request.space, importances, request.base.train.iterations)),
        failures={**reasons, **outcome.failures},
        facts={
            "budget": f"{request.budget.text()}; spent: {len(records)} trials, {outcome.spent}",
            "objective": "label-free mIoU of AN on the validation split, its masks known to the search",
            "stopped at": f"{' and '.join(steps)} of {request.base.train.iterations:,} iterations"
            if steps
            else "no rung",
            "suggested by": "Optuna's TPE, multivariate and grouped, seed " + str(request.base.train.seed),
            "training seed": f"{request.base.train.seed} in the search",
            "data": ", ".join(data_tags.values()),
            "study": f"optuna-dashboard {order.root / 'study.journal'}",
            "all runs": ui_command(order.uri),
        },
    )


def _agreement(request: Request, study: SearchStudy, records: Sequence[Record]) -> list[str]:
    """Of all evaluations in co-training, by the journals of trials that this search trained itself."""
    train = request.base.train
    steps = range(train.warmup + 1, train.iterations)
    finished = []
    for record in records:
        name = alone(study.config(record), "").name
        values = metric_by_step(folders.trial_folder(request.order.root, name), steps)
        if record.state == "complete" and values:
            finished.append((values, record.value))
    return told(agreements(finished), train.iterations, request.rungs.steps)


def text(findings: Findings) -> str:
    """The outcome in lines for the terminal."""
    best = (
        f"  {100 * record.value:6.2f}  trial {record.label}  {', '.join(findings.settings(record))}"
        for record in findings.complete[:5]
    )
    lines = [findings.lead, *best]
    lines += findings.verdict
    if findings.best:
        lines += [f"best settings ({findings.why}):", f"  {findings.command}", f"  {findings.ablation}"]
    return "\n".join(lines)


def markdown(findings: Findings) -> str:
    """The outcome for the head of the search's page in MLflow."""
    parts = [findings.lead, *findings.verdict]
    if findings.best:
        parts.append(f"Best settings, {findings.why}:\n\n```\n{findings.command}\n{findings.ablation}\n```")
    rows = [
        f"| {record.label} | {100 * record.value:.2f} | {', '.join(findings.settings(record))} |"
        for record in findings.complete[:_TOP]
    ]
    parts.append("\n".join(["| trial | label-free mIoU | settings |", "|:--|--:|:--|", *rows]))
    parts.append("\n".join(f"- {name}: {value}" for name, value in findings.facts.items()))
    return "\n\n".join(parts) + "\n"


def as_csv(findings: Findings) -> str:
    """Every trial with its settings; values are fractions."""
    stream = io.StringIO()
    names = [dimension.setting for dimension in findings.space.dimensions]
    steps = sorted({d.step for record in findings.records for d in record.decisions})
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(
        ["trial", "origin", "state", "value", *(f"at_{step}" for step in steps), *names, "reason"]
    )
    for record in findings.records:
        at = {decision.step: decision.value for decision in record.decisions}
        writer.writerow(
            [
                record.number,
                record.origin or "TPE",
                record.state,
                "" if math.isnan(record.value) else record.value,
                *(at.get(step, "") for step in steps),
                *(record.changes.get(name, "") for name in names),
                record.reason,
            ]
        )
    return stream.getvalue()


def html(findings: Findings) -> str:
    """The page, complete in itself."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    preset = next((one for one in findings.confirmed if one.is_preset), None)
    slices = [part for part in findings.pictures if part.file.startswith("search-slice")]
    return environment.get_template("search.html.j2").render(
        findings=findings,
        top=[(r, _kind(r), findings.settings(r)) for r in findings.complete[:_TOP]],
        confirmed=[(one, _confirmed_cells(one, preset)) for one in findings.confirmed],
        seeds=max((len(one.free.values) for one in findings.confirmed), default=0),
        changes={name: (_value(old), _value(new)) for name, (old, new) in findings.changes.items()},
        finished=len(findings.complete),
        least=LEAST_FOR_IMPORTANCE,
        sure=SURE_OF_IMPORTANCE,
        slices=slices,
        pictures=[part for part in findings.pictures if part not in slices],
        texts=findings.space.texts(),
    )


def _kind(record: Record) -> str:
    return {"": "suggested", PRESET: "preset"}.get(record.origin, record.origin)


def _confirmed_cells(one: Confirmed, preset: Confirmed | None) -> tuple[str, ...]:
    """In the search, with fresh seeds, their number, loss, gain over the preset, labelled mIoU."""
    gain = Cell({}) if preset is None or one is preset else one.free.minus(preset.free)
    return (
        points(one.searched),
        over_seeds(one.free),
        str(len(one.free.values)),
        points(one.excess),
        over_seeds(gain, signed=True),
        over_seeds(one.labelled),
    )


def _value(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def write(findings: Findings, folder: Path) -> list[Path]:
    """Write the page, the trials, the best settings and the pictures."""
    contents = {PAGE: html(findings).encode(), TRIALS: as_csv(findings).encode()}
    if findings.best:
        contents[BEST] = to_json(findings.best).encode()
    contents |= {f"figures/{part.file}": part.data for part in findings.pictures}
    (folder / "figures" if findings.pictures else folder).mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]
