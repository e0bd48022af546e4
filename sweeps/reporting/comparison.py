"""Ours among the published rows: the paper's tables of other methods with the full model of a sweep in them.

Ours are the means over seeds in the paper's unit, each with its deviation; published values are as printed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import pandas as pd

from sweeps.published import COCO_NAMES, VOC_NAMES, Row, read_published
from sweeps.reporting.grids import ABSENT, Column, Grid, Line
from sweeps.reporting.results import FullModel
from sweeps.reporting.stages import Stage

_VAL = "val/assignment/"
_SEGMENTED = MappingProxyType({"ours, labelled": "seg_miou_labelled", "ours, label-free": "seg_miou"})
_OURS = MappingProxyType({"ours, labelled": "seg_iou_labelled", "ours, label-free": "seg_iou"})
"""Our columns in the paper's tables of classes: which IoU they show, by title."""


def comparisons(full: FullModel | None, stages: Sequence[Stage] = ()) -> tuple[Grid, ...]:
    """All that the full model, and what it taught, may stand beside: the paper's tables of its data.

    On other data its classes alone and, of several `stages`, their hours.
    """
    if full is None:
        return ()
    of_stages = [_table_7(full, stages)] if stages else []
    match full.config.data.layout:
        case "voc":
            note = (
                "CoSA* is with a CRF, ours without. From diningtable on its column is illegible in our copy; "
                "the one beside it is from the log that the authors released, not from the paper."
            )
            on_val = _by_class(full, _OURS, "11", "classes of PASCAL VOC val", VOC_NAMES, note)
            note = "Ours: VOC's server alone can judge its test split."
            on_test = _by_class(full, {}, "12", "classes of PASCAL VOC test", VOC_NAMES, note)
            crf = [_table_6(full)] if f"{_VAL}seg_miou_crf" in full.values else []
            table_2, table_7 = _table_2(full, "VOC val", stages), _table_7(full, stages)
            return (_table_1(full), table_2, *crf, table_7, on_val, on_test)
        case "coco":
            note = "The mean of CoSA is that of CoSA*, with a CRF, in Table 2; ours is without."
            by_class = _by_class(full, _OURS, "13", "classes of COCO val", COCO_NAMES, note)
            return (_table_2(full, "COCO val", stages), *of_stages, by_class)
        case _:
            known = any(f"seg_iou/{name}" in full.values for name in full.classes)
            ours = {title.removeprefix("ours, "): kind for title, kind in _OURS.items()}
            ours |= {"CPL": "cpl_iou", "CPL of M†": "aux_cpl_iou"}
            return (*of_stages, *([_by_class(full, ours)] if known else []))


def whose(full: FullModel) -> str:
    """What ours are: `ours: preset voc (vit_base_patch16_224), 1,449 images of val, one seed`."""
    seeds, config = len(full.values), full.config
    images = f"{full.images:,} images" if full.images is not None else "images"
    over = "one seed" if seeds == 1 else f"mean ± sample deviation over {seeds} seeds"
    network, split = config.network.encoder, config.data.val_split
    return f"ours: preset {full.preset} ({network}), {images} of {split}, {over}"


def percent(fractions: pd.Series | None) -> str:
    """Over seeds as percent, `76.2 ± 0.3`; a dash without any."""
    return number(None if fractions is None else 100 * fractions)


def number(values: pd.Series | None, digits: int = 1) -> str:
    """Mean and sample deviation of values over seeds; a dash without any."""
    if values is None or not values.count():
        return ABSENT
    text = f"{values.mean():.{digits}f}"
    return text if math.isnan(values.std()) else f"{text} ± {values.std():.{digits}f}"


def _columns(*titles: str) -> list[Column]:
    name, *others = titles
    return [Column(name, kind="name"), *map(Column, others)]


def _printed(row: Row, *columns: str) -> Line:
    """A published row: its method, with the venue where that is known, and some columns as printed."""
    method = f"{row['method']}, {row['venue']}" if row.get("venue") else row["method"]
    return Line((method, *(row[column] or ABSENT for column in columns)))


def _ours(full: FullModel, *cells: str) -> Line:
    return Line(cells, looks=("ours",), runs=full.runs)


def _heading(group: str, columns: int) -> Line:
    return Line((group, *[""] * (columns - 1)), looks=("heading",))


def _table_1(full: FullModel) -> Grid:
    """CPL on train and val, alone and as the ensemble of M and M-dagger."""
    lines = [_printed(row, "backbone", "train", "val") for row in read_published("1")]
    for name, metric in (("ours", "cpl_miou"), ("ours•", "ensemble_cpl_miou")):
        values = (percent(full.values.get(f"{split}/assignment/{metric}")) for split in ("train", "val"))
        lines.append(_ours(full, name, "", *values))
    split = full.config.evaluation.train_split
    train = f"the list {split}" if split else "not measured, see --set evaluation.train_split"
    return Grid(
        title="Table 1: CAM pseudo-labels",
        protocol=f"Percent mIoU at ξ 0.5, image-level labels known, on PASCAL VOC; {whose(full)}",
        columns=_columns("method", "backbone", "train", "val"),
        lines=lines,
        remarks=[
            "With •: the ensemble of M and M†; ours averages their activations.",
            f"Ours on train: {train}.",
        ],
    )


def _table_2(full: FullModel, column: str, stages: Sequence[Stage]) -> Grid:
    """Segmentation among all competitors; ours stand in `column`."""
    columns = _columns("method", "sup.", "network", "VOC val", "VOC test", "COCO val")
    lines: list[Line] = []
    for group, rows in itertools.groupby(read_published("2"), key=lambda row: row["group"]):
        lines.append(_heading(group, len(columns)))
        keys = ("supervision", "network", "voc_val", "voc_test", "coco_val")
        lines += [_printed(row, *keys) for row in rows]
    lines.append(_heading("Ours, single-stage", len(columns)))
    for star, crf in (("", ""), ("*", "_crf")):
        for name, metric in _SEGMENTED.items():
            if (found := full.values.get(f"{_VAL}{metric}{crf}")) is not None:
                values = (percent(found) if own.title == column else ABSENT for own in columns[3:])
                lines.append(_ours(full, name.replace("ours", f"ours{star}"), "I", "", *values))
    for heading, oracle in (("Ours, multi-stage", False), ("Ours, supervised upper bounds (oracles)", True)):
        own_stages = [stage for stage in stages if stage.oracle == oracle]
        lines += [_heading(heading, len(columns))] * bool(own_stages)
        for stage in own_stages:
            for name, metric in _SEGMENTED.items():
                found = stage.values.get(f"{_VAL}{metric}")
                values = (percent(found) if own.title == column else ABSENT for own in columns[3:])
                cells = (name, "F" if oracle else "I", stage.name, *values)
                lines.append(Line(cells, looks=("ours",), runs=stage.runs))
    return Grid(
        title="Table 2: weakly supervised semantic segmentation",
        protocol=f"Percent mIoU; {whose(full)}",
        columns=columns,
        lines=lines,
        remarks=[
            "Ours, labelled, knows the image-level labels of val, as CoSA does (the paper's footnote 1).",
            "Ours, label-free, follows the usual protocol of segmentation.",
            "F full supervision, I image-level labels, S saliency maps, L language models; * with CRF.",
        ],
    )


def _table_6(full: FullModel) -> Grid:
    """What a CRF adds, and what it costs."""
    speeds = {row["crf"]: row["images_per_second"] for row in read_published("6b")}
    lines = []
    for row in read_published("6a"):
        cost = [speeds["without"], speeds["with"]] if row["method"] == "CoSA" else ["", ""]
        gains = (row["without_crf"], row["with_crf"], f"+{row['gain']}")
        lines.append(Line((row["method"], *gains, *cost)))
    speed = [
        number(full.values.get(_VAL + key), digits=2)
        for key in ("images_per_second", "crf_images_per_second")
    ]
    for name, metric in _SEGMENTED.items():
        plain, refined = full.values.get(_VAL + metric), full.values.get(f"{_VAL}{metric}_crf")
        if plain is not None and refined is not None:
            gain = percent(refined - plain)
            gain = gain.replace("-", "−") if gain.startswith("-") else f"+{gain}"
            lines.append(_ours(full, name, percent(plain), percent(refined), gain, *speed))
    return Grid(
        title="Table 6: CRF",
        protocol=f"Percent mIoU on PASCAL VOC val; speed on one RTX 3090 in the paper; {whose(full)}",
        columns=_columns("method", "without", "with", "gain", "images/s without", "images/s with"),
        lines=lines,
        remarks=["The gain of ToCo is as the paper prints it."],
    )


def _table_7(full: FullModel, stages: Sequence[Stage]) -> Grid:
    """Training time and parameters; published rows where they are of the same data."""
    steps = ("cam_generation", "cam_refinement", "segmentation", "cooptimization", "total")
    on_voc = full.config.data.layout == "voc"
    lines = []
    for row in read_published("7") if on_voc else ():
        spent = [(row[f"{step}_hours"], row[f"{step}_million_parameters"]) for step in steps]
        cells = (f"{hours} h, {parameters} M" if hours else ABSENT for hours, parameters in spent)
        lines.append(Line((row["method"], *cells, row["voc_test_miou"])))
    own = _spent(full.values.get("hours"), full.parameters)
    lines.append(_ours(full, "ours", ABSENT, ABSENT, ABSENT, own, own, ABSENT))
    for stage in stages:
        alone = _spent(stage.values["hours"], stage.parameters)
        if stage.oracle:
            spent_on = (ABSENT, ABSENT, alone, ABSENT, alone)
        else:
            written = _spent(stage.values["labels_hours"], None)
            hours = full.values["hours"] + stage.values["labels_hours"] + stage.values["hours"]
            known = full.parameters is not None and stage.parameters is not None
            whole = _spent(hours, (full.parameters or 0) + (stage.parameters or 0) if known else None)
            spent_on = (written, ABSENT, alone, own, whole)
        name = f"ours, {stage.name}" + " (oracle)" * stage.oracle
        lines.append(Line((name, *spent_on, ABSENT), looks=("ours",), runs=stage.runs))
    memory, speed = (
        number(full.values.get(f"cost/{name}"))
        for name in ("peak_memory_gib", "evaluation_images_per_second")
    )
    told = f"Ours took {memory} GiB of memory at most, and judges {speed} images per second."
    log = "The authors' log has CoSA's hours, 8:39:10, on two GPUs where the paper says one."
    remarks = [log] if on_voc else []
    remarks += [told] if ABSENT not in (memory, speed) else []
    remarks += ["Under CAMs, of several stages: the hours of writing the pseudo-labels."] if stages else []
    titles = "method", "CAMs", "refinement", "segmentation", "CAMs and segmentation", "total", "test mIoU"
    return Grid(
        title="Table 7: training time and parameters",
        protocol="Hours and million parameters, "
        + "mIoU in percent on PASCAL VOC test; the paper's on one RTX 3090, ours " * on_voc
        + f"on the hardware named below, evaluations included; {whose(full)}",
        columns=_columns(*titles),
        lines=lines,
        remarks=remarks,
    )


def _spent(hours: pd.Series | None, parameters: int | None) -> str:
    """`8.3 ± 0.1 h, 91.6 M`; a dash without hours."""
    text = number(hours, digits=1 if hours is None or hours.mean() >= 1 else 2)
    size = "" if parameters is None else f", {parameters / 1e6:.1f} M"
    return ABSENT if text == ABSENT else f"{text} h{size}"


def _by_class(
    full: FullModel,
    ours: Mapping[str, str],
    table: str = "",
    title: str = "",
    names: Mapping[str, str] = MappingProxyType({}),
    note: str = "",
) -> Grid:
    """The classes as rows, the methods side by side: the paper's table turned round.

    Args:
        full: Ours.
        ours: Our columns: which IoU they show, by title.
        table: The paper's table; without one ours stand alone.
        title: What that shows.
        names: Our names of the classes that it shortens.
        note: What a reader must know of it.
    """
    rows = read_published(table) if table else ()
    others = {"method", "reference", "venue", "mIoU"}
    printed = [column for column in rows[0] if column not in others] if rows else full.classes

    def line(name: str, column: str, keys: Iterable[str], *looks: str) -> Line:
        own = (percent(full.values.get(key)) for key in keys)
        return Line((name, *own, *(row[column] or ABSENT for row in rows)), looks, full.runs)

    lines = [
        line(name := names.get(column, column), column, [f"{kind}/{name}" for kind in ours.values()])
        for column in printed
    ]
    means = [_VAL + kind.replace("iou", "miou", 1) for kind in ours.values()]
    return Grid(
        title=f"Table {table}: {title}" if table else "Classes of the full model",
        protocol=f"Percent IoU; {whose(full) if ours else 'published values alone'}",
        columns=[
            Column("class", kind="name"),
            *(Column(name, kind="ours") for name in ours),
            *(Column(row["method"]) for row in rows),
        ],
        lines=[*lines, line("mean", "mIoU", means, "mean")],
        remarks=[note] if note else [],
    )
