"""Ours among the published rows: in the right place, under the right name, with what was measured."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from types import SimpleNamespace

import pandas as pd
import pytest

from cosa.config import Config, NetworkConfig, identity, override, to_json
from cosa.data.voc import VOC_CLASSES
from sweeps.planning.plan import make_plan
from sweeps.planning.plan import to_json as to_json_of_plan
from sweeps.reporting import forms, render
from sweeps.reporting.comparison import comparisons
from sweeps.reporting.results import FullModel, Results, fill, read_full_model, read_stages
from sweeps.reporting.stages import Stage, labels_of
from sweeps.tables import Arm, Table
from sweeps.tables.metrics import LABELS_MIOU, SEG_MIOU

VAL = "val/assignment/"
CLASSES = ("background", *VOC_CLASSES)


VALUES = pd.DataFrame(
    {
        "train/assignment/cpl_miou": [0.781],
        f"{VAL}cpl_miou": [0.76],
        f"{VAL}ensemble_cpl_miou": [0.771],
        f"{VAL}seg_miou_labelled": [0.75],
        f"{VAL}seg_miou": [0.731],
        **{f"seg_iou/{name}": [0.5] for name in CLASSES},
        **{f"seg_iou_labelled/{name}": [0.6] for name in CLASSES if name != "tvmonitor"},
        "hours": [8.25],
    }
)


def full_model(layout="voc", train_split="train", **changes):
    """One seed but for the labelled mIoU, which has two."""
    settings = {"network.encoder": "vit_base_patch16_224", "evaluation.train_split": train_split}
    model = FullModel(
        preset="voc",
        config=override(Config(), {"data.layout": layout, "data.val_split": "val", **settings}),
        images=1449,
        values=pd.concat([VALUES, pd.DataFrame({f"{VAL}seg_miou_labelled": [0.77]}, index=[1])]),
        classes=CLASSES,
        parameters=91_600_000,
    )
    return dataclasses.replace(model, **changes)


def table(number, **changes):
    return next(t for t in comparisons(full_model(**changes)) if t.title.startswith(f"Table {number}:"))


def ours(comparison):
    return [line.cells for line in comparison.lines if "ours" in line.looks]


def titles(comparison):
    return [column.title for column in comparison.columns]


def test_voc_is_held_against_all_its_tables_and_coco_against_its_own():
    def numbers(layout):
        return [t.title.partition(":")[0] for t in comparisons(full_model(layout=layout))]

    assert numbers("voc") == [f"Table {n}" for n in (1, 2, 7, 11, 12)]
    assert numbers("coco") == ["Table 2", "Table 13"]


def test_other_data_have_their_classes_alone():
    (alone,) = comparisons(full_model(layout="folder"))
    assert titles(alone) == ["class", "labelled", "label-free", "CPL", "CPL of M†"]
    assert alone.lines[0].cells == ("background", "60.0", "50.0", "–", "–")
    assert alone.lines[-1].cells == ("mean", "76.0 ± 1.4", "73.1", "76.0", "–")


def test_a_sweep_without_the_full_model_compares_nothing():
    assert comparisons(None) == ()


@pytest.mark.parametrize("number", [1, 2, 7, 11])
def test_every_table_says_what_ours_were_measured_on(number):
    assert "ours: preset voc (vit_base_patch16_224), 1,449 images of val" in table(number).protocol


def test_every_line_fills_every_column():
    for layout in ("voc", "coco", "folder"):
        for comparison in comparisons(full_model(layout=layout)):
            assert {len(line.cells) for line in comparison.lines} == {len(comparison.columns)}


def test_table_1_has_ours_on_train_and_val_alone_and_as_ensemble():
    assert ours(table(1)) == [("ours", "", "78.1", "76.0"), ("ours•", "", "–", "77.1")]
    assert [line.cells[0] for line in table(1).lines][:2] == ["RRM, AAAI 2020", "1Stage, CVPR 2020"]


def test_table_1_says_why_ours_on_train_are_missing():
    assert any("not measured" in note for note in table(1, train_split="").remarks)


def test_table_2_names_the_protocol_of_each_of_ours():
    assert ours(table(2)) == [
        ("ours, labelled", "I", "", "76.0 ± 1.4", "–", "–"),
        ("ours, label-free", "I", "", "73.1", "–", "–"),
    ]


def test_table_2_puts_coco_under_coco():
    assert ours(table(2, layout="coco"))[0][3:] == ("–", "–", "76.0 ± 1.4")


WITH_CRF = VALUES.assign(
    **{
        f"{VAL}seg_miou_crf": 0.729,
        f"{VAL}images_per_second": 4.0,
        f"{VAL}crf_images_per_second": 1.75,
    }
)


def test_table_6_stands_where_a_crf_was_evaluated():
    assert ours(table(6, values=WITH_CRF)) == [("ours, label-free", "73.1", "72.9", "−0.2", "4.00", "1.75")]


def test_table_2_has_a_row_for_the_crf():
    assert ours(table(2, values=WITH_CRF))[-1] == ("ours*, label-free", "I", "", "72.9", "–", "–")


def test_table_7_has_our_hours_and_parameters():
    assert ours(table(7))[0][4:] == ("8.2 h, 91.6 M", "8.2 h, 91.6 M", "–")
    assert ours(table(7, values=VALUES.drop(columns="hours")))[0][4:] == ("–", "–", "–")


def test_table_7_says_what_ours_took_of_memory_and_how_fast_it_judges():
    took = VALUES.assign(**{"cost/peak_memory_gib": 9.5, "cost/evaluation_images_per_second": 31.25})
    said = "Ours took 9.5 GiB of memory at most, and judges 31.2 images per second."
    assert said in table(7, values=took).remarks
    assert not any("GiB" in remark for remark in table(7).remarks)


# CoSA-MS

TAUGHT = Stage(
    name="WR38",
    oracle=False,
    values=pd.DataFrame(
        {
            f"{VAL}seg_miou": [0.76, 0.78],
            f"{VAL}seg_miou_labelled": [0.79, 0.81],
            "hours": [15.0, 15.0],
            "labels_hours": [0.25, 0.25],
        }
    ),
    runs={0: "a", 1: "b"},
    parameters=124_000_000,
)
BOUND = dataclasses.replace(
    TAUGHT, name="SWIN", oracle=True, values=TAUGHT.values.iloc[:1].drop(columns=f"{VAL}seg_miou_labelled")
)


def of_stages(number, layout="voc", stages=(TAUGHT, BOUND)):
    found = comparisons(full_model(layout=layout), stages)
    return next(t for t in found if t.title.startswith(f"Table {number}:"))


def test_table_2_has_the_standalone_networks_under_a_heading_and_bounds_apart():
    lines = [line.cells for line in of_stages(2).lines]

    begun = lines.index(("Ours, multi-stage", *[""] * 5))
    assert lines[begun + 1 :] == [
        ("ours, labelled", "I", "WR38", "80.0 ± 1.4", "–", "–"),
        ("ours, label-free", "I", "WR38", "77.0 ± 1.4", "–", "–"),
        ("Ours, supervised upper bounds (oracles)", *[""] * 5),
        ("ours, labelled", "F", "SWIN", "–", "–", "–"),
        ("ours, label-free", "F", "SWIN", "76.0", "–", "–"),
    ]


def test_table_7_has_each_stage_of_a_chain_and_its_sum():
    assert ours(of_stages(7))[1:] == [
        (
            "ours, WR38",
            *("0.25 ± 0.00 h", "–", "15.0 ± 0.0 h, 124.0 M", "8.2 h, 91.6 M", "23.5 h, 215.6 M", "–"),
        ),
        ("ours, SWIN (oracle)", "–", "–", "15.0 h, 124.0 M", "–", "15.0 h, 124.0 M", "–"),
    ]


def test_on_other_data_the_stages_stand_without_published_rows():
    own = of_stages(7, "folder")

    assert [line.cells[0] for line in own.lines] == ["ours", "ours, WR38", "ours, SWIN (oracle)"]
    assert own.protocol.startswith("Hours and million parameters, on the hardware named below")
    assert not any(word in str(own) for word in ("paper", "PASCAL", "RTX"))
    assert "the paper's on one RTX 3090, ours on the hardware named below" in of_stages(7).protocol


def test_every_line_of_the_stages_fills_every_column():
    for layout in ("voc", "coco", "folder"):
        for comparison in comparisons(full_model(layout=layout), (TAUGHT, BOUND)):
            assert {len(line.cells) for line in comparison.lines} == {len(comparison.columns)}


def test_table_11_has_our_classes_under_the_papers():
    by_class = {line.cells[0]: line.cells for line in table(11).lines}
    assert titles(table(11))[:4] == ["class", "ours, labelled", "ours, label-free", "AdvCAM"]
    assert by_class["aeroplane"] == (
        "aeroplane",
        "60.0",
        "50.0",
        "79.8",
        "78.3",
        "80.6",
        "84.7",
        "81.8",
        "85.5",
        "85.5",
    )
    assert by_class["tvmonitor"] == (
        *("tvmonitor", "–", "50.0", "52.9", "58.8", "63.1", "62.5", "60.6", "–", "63.4"),
    )
    assert titles(table(11))[-2:] == ["CoSA*", "CoSA*, authors' log"]
    assert by_class["mean"][:4] == ("mean", "76.0 ± 1.4", "73.1", "68.1")


def test_table_12_claims_nothing_of_ours():
    assert not any(line.is_ours(column) for line in table(12).lines for column in table(12).columns)
    assert not any("ours" in title for title in titles(table(12)))


@pytest.fixture
def results():
    return Results(
        sweep="s",
        preset="voc",
        seeds=(0, 1),
        tables=(),
        full=full_model(),
        provenance={"trials": "", "training": ""},
    )


def test_the_csv_says_whose_each_number_is(results):
    rows = list(csv.DictReader(io.StringIO(forms.comparison_csv(results))))
    assert {row["source"] for row in rows if row["row"].startswith("ours")} == {"ours"}
    found = {
        row["column"]: row["source"] for row in rows if row["row"] == "aeroplane" and "val" in row["table"]
    }
    assert (found["ours, labelled"], found["MCT"]) == ("ours", "published")


def test_markdown_sets_ours_apart(results):
    text = forms.comparison_markdown(results)
    assert "| **ours** | **** |" not in text
    assert "| **ours** |  | **78.1** | **76.0** |" in text
    assert "| CoSA | ViT-B | 78.5 | 76.4 |" in text


def test_the_page_marks_ours_and_nothing_else(results):
    page = render.html(results, "")
    assert "<h2>Beside the paper</h2>" in page
    assert '<tr class="ours">\n<th class="name" scope="row">ours•</th>' in page
    assert '<tr class="">\n<th class="name" scope="row">CoSA</th>' in page
    assert '<td class="ours" data-title="ours, labelled">60.0</td>' in page
    assert '<td class="value" data-title="MCT">78.3</td>' in page


class Store:
    """Stands for MLflow's client: artifacts by run and name."""

    def __init__(self, artifacts):
        self.artifacts = artifacts

    def download_artifacts(self, run_id, name, folder):
        from mlflow.exceptions import MlflowException

        if (run_id, name) not in self.artifacts:
            raise MlflowException("no such artifact")
        from pathlib import Path

        path = Path(folder) / "file"
        path.write_text(json.dumps(self.artifacts[run_id, name]))
        return str(path)

    def list_artifacts(self, run_id, folder=None):
        return [
            SimpleNamespace(path=name, file_size=content if isinstance(content, int) else 9)
            for (run, name), content in self.artifacts.items()
            if run == run_id and name.rpartition("/")[0] == (folder or "")
        ]


def run_of(run_id, config, **tags):
    return SimpleNamespace(
        info=SimpleNamespace(run_id=run_id, status="FINISHED"),
        data=SimpleNamespace(
            tags={"cosa.kind": "trial", "cosa.identity": identity(config), "cosa.seed": "0"} | tags,
            metrics={f"{VAL}seg_miou": 0.7},
        ),
    )


def test_the_full_model_is_the_presets_own_run_with_its_warmups_hours():
    plan = {"config": json.loads(to_json(Config())), "seeds": [0]}
    runs = [
        run_of("warm", Config(), **{"cosa.kind": "warmup"}),
        run_of("other", override(Config(), {"csc.weight": 0.0})),
        run_of("full", Config(), **{"cosa.forked_from": "warm"}),
    ]
    per_class = {"seg_iou": {"background": 0.9, "cat": 0.5}}
    store = Store(
        {
            ("warm", "result.json"): {"seconds": 1800.0},
            ("full", "result.json"): {
                "seconds": 5400.0,
                "classes": ["cat"],
                "assignment": {"per_class": per_class},
            },
            ("full", "analysis/step_00020000.json"): {
                "networks": {"assignment": {"images": {"iou": {"count": [3, 4]}}}}
            },
            ("full", "assignment.safetensors"): 400,
        }
    )
    found = read_full_model(store, "voc", plan, runs)
    assert (found.values["hours"].to_dict(), found.images, found.parameters) == ({0: 2.0}, 7, 100)
    assert found.classes == ("background", "cat")
    assert found.values["seg_iou/cat"].to_dict() == {0: 0.5}
    assert found.values[f"{VAL}seg_miou"].to_dict() == {0: 0.7}


def test_a_full_model_that_is_not_finished_is_none():
    plan = {"config": json.loads(to_json(Config())), "seeds": [0]}
    assert (
        read_full_model(Store({}), "voc", plan, [run_of("x", override(Config(), {"csc.tau": 1.0}))]) is None
    )


def test_a_full_model_without_an_assignment_network_is_ons():
    config = override(Config(), {"cam.source": "online"})
    run = run_of("full", config)
    run.data.metrics = {f"{VAL}seg_miou": 0.7, "val/online/seg_miou": 0.6}
    ious = {
        name: {"per_class": {"seg_iou": {"cat": iou}}} for name, iou in (("assignment", 0.5), ("online", 0.4))
    }
    store = Store({("full", "result.json"): {"classes": ["cat"], **ious}})
    found = read_full_model(store, "voc", {"config": json.loads(to_json(config)), "seeds": [0]}, [run])
    assert found.values[f"{VAL}seg_miou"].to_dict() == {0: 0.6}
    assert found.values["seg_iou/cat"].to_dict() == {0: 0.4}


NETWORK = {
    "network.architecture": "deeplabv3plus",
    "network.encoder": "resnet18",
    "network.pretrained": False,
    "network.aux_head": False,
}
CHAIN = Table(
    name="2",
    title="",
    reference="CoSA",
    metrics=(SEG_MIOU, LABELS_MIOU),
    arms=(
        Arm("CoSA"),
        Arm("R101", NETWORK),
        Arm("R101-masks", {**NETWORK, "segmentation.supervision": "masks"}),
    ),
)


@pytest.fixture
def chain():
    """The plan of a chain, its runs of one seed, and the store that has their results."""
    plan = make_plan(Config(network=NetworkConfig(pretrained=False)), [CHAIN], [0])
    full, labels, taught, bound = plan.trials
    hours = {full.name: 8.0, labels.name: 0.5, taught.name: 2.0, bound.name: 3.0}
    runs = [run_of(t.name, t.config, **{"cosa.kind": t.kind}) for t in plan.trials]
    for run, network in zip(runs, ("assignment", "", "standalone", "standalone"), strict=True):
        run.data.metrics = {f"val/{network}/seg_miou": 0.7} if network else {LABELS_MIOU: 0.6}
    store = Store({(name, "result.json"): {"seconds": 3600 * spent} for name, spent in hours.items()})
    return json.loads(to_json_of_plan(plan)), runs, store


def test_a_standalone_network_is_judged_on_itself_beside_the_labels_that_it_learned_from(chain):
    plan, runs, store = chain
    labels = labels_of(plan, runs)
    by_identity = {
        run.data.tags["cosa.identity"]: run for run in runs if run.data.tags["cosa.kind"] == "trial"
    }

    filled = fill(CHAIN, plan, by_identity, {}, labels)

    found = {(one.arm, one.metric): one.value for one in filled.values.itertuples()}
    assert found == {
        ("CoSA", SEG_MIOU): 0.7,
        ("R101", SEG_MIOU): 0.7,
        ("R101", LABELS_MIOU): 0.6,
        ("R101-masks", SEG_MIOU): 0.7,
    }
    assert [(row.network, row.oracle) for row in filled.rows] == [
        ("assignment", False),
        ("standalone", False),
        ("standalone", True),
    ]
    taught, bound = read_stages(store, [filled], labels, lambda _: 45_700_000)
    assert (taught.name, taught.oracle, taught.parameters) == ("R101", False, 45_700_000)
    assert taught.values[["hours", "labels_hours"]].loc[0].to_list() == [2.0, 0.5]
    assert (bound.oracle, bound.values.loc[0, "hours"]) == (True, 3.0)
    assert math.isnan(bound.values.loc[0, "labels_hours"])
