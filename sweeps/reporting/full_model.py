"""The full model of a sweep, its preset unchanged: what may stand beside the paper's own rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cosa.config import identity, override
from sweeps.reporting.cells import Cell
from sweeps.runs import base_of, is_trial, read_json

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


@dataclass(frozen=True)
class FullModel:
    """The preset unchanged, over its seeds: what may stand beside the paper's own rows."""

    preset: str
    layout: str
    """Layout of its data, `voc`, which says what it may be held against."""
    encoder: str
    """Its encoder, as timm names it."""
    split: str
    """The list that it was judged on."""
    train_split: str
    """The list of training images whose CPL were judged; empty where none were."""
    images: int | None
    """Images of that list that were judged; None where it is not known."""
    metrics: Mapping[str, Cell]
    """Every metric that the runs have, by key."""
    per_class: Mapping[str, Mapping[str, Cell]]
    """IoU of AN by protocol (`seg_iou`, `seg_iou_labelled`, `cpl_iou`, `aux_cpl_iou`), then by class."""
    classes: tuple[str, ...]
    """Background first."""
    hours: Cell
    """Hours of training, evaluations and a shared warm-up included."""
    parameters: int | None
    """Numbers in the assignment network; None where its weights were not kept."""
    runs: Mapping[int, str] = field(default_factory=dict)
    """Ids of its runs by seed."""


def read_full_model(
    client: MlflowClient, preset: str, plan: Mapping[str, Any], children: Sequence[Run]
) -> FullModel | None:
    """The runs of the plan's own settings, whatever tables hold them; None where none has finished."""
    base = base_of(plan)
    runs: dict[int, Run] = {}
    for seed in plan["seeds"]:
        wanted = identity(override(base, {"train.seed": seed}))
        for run in children:  # the last one counts
            if is_trial(run) and run.info.status == "FINISHED" and run.data.tags["cosa.identity"] == wanted:
                runs[seed] = run
    if not runs:
        return None
    details = {seed: read_json(client, run.info.run_id, "result.json") for seed, run in runs.items()}
    by_class = {seed: detail.get("assignment", {}).get("per_class", {}) for seed, detail in details.items()}
    seconds = {seed: detail["seconds"] for seed, detail in details.items() if "seconds" in detail}
    warmups = _warmup_seconds(client, children, list(runs.values()))
    first_run, first = next(iter(runs.values())), next(iter(details.values()))
    keys = dict.fromkeys(key for run in runs.values() for key in run.data.metrics)
    return FullModel(
        preset=preset,
        layout=base.data.layout,
        encoder=base.network.encoder,
        split=base.data.val_split,
        train_split=base.evaluation.train_split,
        images=_judged_images(client, first_run),
        metrics={
            key: Cell({s: run.data.metrics[key] for s, run in runs.items() if key in run.data.metrics})
            for key in keys
        },
        per_class=_cells_by_class(by_class),
        classes=("background", *first.get("classes", ())),
        hours=Cell({seed: (own + warmups.get(seed, 0.0)) / 3600 for seed, own in seconds.items()}),
        parameters=_parameters(client, first_run),
        runs={seed: run.info.run_id for seed, run in runs.items()},
    )


def _warmup_seconds(client: MlflowClient, children: Sequence[Run], runs: Sequence[Run]) -> dict[int, float]:
    """By seed, how long the warm-up took that a run was forked from, where it shared one."""
    forked_from = {run.data.tags.get("cosa.forked_from") for run in runs}
    return {
        int(run.data.tags["cosa.seed"]): read_json(client, run.info.run_id, "result.json").get("seconds", 0.0)
        for run in children
        if run.info.run_id in forked_from
    }


def _cells_by_class(
    details: Mapping[int, Mapping[str, Mapping[str, float]]],
) -> dict[str, dict[str, Cell]]:
    """IoU over seeds by protocol and class, from each seed's own."""
    values: dict[str, dict[str, dict[int, float]]] = {}
    for seed, protocols in details.items():
        for protocol, classes in protocols.items():
            for name, iou in classes.items():
                values.setdefault(protocol, {}).setdefault(name, {})[seed] = iou
    return {
        protocol: {name: Cell(found) for name, found in classes.items()}
        for protocol, classes in values.items()
    }


def _judged_images(client: MlflowClient, run: Run) -> int | None:
    """How many images the run's last evaluation judged, from its histogram of single images."""
    paths = sorted(item.path for item in client.list_artifacts(run.info.run_id, "analysis"))
    if not paths:
        return None
    analysis = read_json(client, run.info.run_id, paths[-1])
    try:
        counts: list[int] = analysis["networks"]["assignment"]["images"]["iou"]["count"]
    except KeyError:
        return None
    return sum(counts)


def _parameters(client: MlflowClient, run: Run) -> int | None:
    """Numbers in the final AN, from the size of its file: four bytes each behind a short header."""
    for folder in ("", "model"):
        for item in client.list_artifacts(run.info.run_id, folder or None):
            if item.path.endswith(".safetensors") and item.file_size:
                return int(item.file_size) // 4
    return None
