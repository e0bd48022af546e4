"""The metrics that tables may show are those that a run leaves."""

from __future__ import annotations

from cosa.config import override
from cosa.tracking import Tracker
from sweeps.tables.metrics import LABELS_MIOU, METRICS, STANDARD
from tests.cosa.runs import train


def test_every_metric_that_a_table_may_show_is_left_by_a_run(tiny_config, tmp_path):
    config = override(tiny_config, {"evaluation.train_split": tiny_config.data.val_split})
    left = train(config, out=tmp_path, tracker=Tracker()).metrics
    assert {key for key in METRICS if not key.endswith("_crf")} - {LABELS_MIOU} <= left.keys()


def test_titles_are_unique_so_that_columns_can_be_told_apart():
    assert len({metric.title for metric in METRICS.values()}) == len(METRICS)


def test_the_standard_metrics_are_fractions_of_an():
    assert all(METRICS[key].percent and key.startswith("val/assignment/") for key in STANDARD)
