"""The published values are transcribed as printed: the paper's own sums, counts and gains check them."""

from __future__ import annotations

import re
import statistics

import pytest

from cosa.data.coco import COCO_CLASSES
from cosa.data.voc import VOC_CLASSES
from sweeps.published import COCO_NAMES, VOC_NAMES, read_published

NOT_CLASSES = {"method", "reference", "venue", "mIoU"}
TABLES = ["1", "2", "6a", "6b", "7", "11", "12", "13"]
SPELLED_OUT = {"method", "reference", "venue", "group", "backbone", "network", "supervision", "crf"}


def classes_of(row):
    return {name: float(value) for name, value in row.items() if name not in NOT_CLASSES and value}


def printed(table):
    """The rows that the paper prints: all but that of the authors' log."""
    return [row for row in read_published(table) if row["method"] != LOG]


def row_of(table, method):
    return next(row for row in read_published(table) if row["method"] == method)


@pytest.mark.parametrize("table", TABLES)
def test_every_cell_is_a_printed_number_or_empty(table):
    for row in read_published(table):
        for column, text in row.items():
            assert column in SPELLED_OUT or re.fullmatch(r"(\d+(\.\d+)?)?", text), (row["method"], column)


@pytest.mark.parametrize(("table", "count"), [("1", 11), ("2", 29), ("11", 7), ("12", 4), ("13", 4)])
def test_no_row_is_missing(table, count):
    assert len(read_published(table)) == count


PER_CLASS = [(table, row["method"]) for table in ("11", "12", "13") for row in read_published(table)]
MISPRINTED = ("13", "MCT")
ILLEGIBLE = ("11", "CoSA*")
LOG = "CoSA*, authors' log"


@pytest.mark.parametrize(("table", "method"), [p for p in PER_CLASS if p not in {MISPRINTED, ILLEGIBLE}])
def test_the_classes_average_to_the_printed_miou(table, method):
    row = row_of(table, method)
    assert statistics.fmean(classes_of(row).values()) == pytest.approx(float(row["mIoU"]), abs=0.1)


def test_the_one_row_that_does_not_add_up_in_the_paper_stands_as_printed():
    row = row_of(*MISPRINTED)
    assert statistics.fmean(classes_of(row).values()) == pytest.approx(42.157, abs=5e-4)
    assert row["mIoU"] == row_of("2", "MCT")["coco_val"] == "42.0"


def test_what_is_illegible_is_empty():
    row = row_of(*ILLEGIBLE)
    assert len(classes_of(row)) == 11
    assert (row["cow"], row["table"], row["mIoU"]) == ("88.7", "", "")


def test_the_authors_log_says_what_the_paper_prints_where_that_is_legible():
    log = classes_of(row_of("11", LOG))
    printed_half = classes_of(row_of(*ILLEGIBLE))
    assert {name: log[name] for name in printed_half} == printed_half
    assert len(log) == 21


# The supplement, A.2, in words: the classes of Table 13 that CoSA leads in, and by how much.
@pytest.mark.parametrize(
    ("table", "name", "gain"),
    [
        *(("13", *pair) for pair in (("truck", 10.6), ("tie", 14.3), ("kite", 12.4), ("knife", 14.5))),
        *(("13", *pair) for pair in (("baseball glove", 20.3), ("carrot", 13.0), ("donut", 10.0))),
        *(("13", *pair) for pair in (("couch", 13.9), ("oven", 13.0), ("toothbrush", 10.0))),
        *(("11", *pair) for pair in (("boat", 5.9), ("chair", 8.2))),
    ],
)
def test_gains_are_those_that_the_text_names(table, name, gain):
    *others, ours = (float(row[name]) for row in printed(table))
    assert ours - max(others) == pytest.approx(gain, abs=1e-6)


@pytest.mark.parametrize(("table", "best", "of"), [("12", 15, 21), ("13", 56, 81)])
def test_cosa_leads_in_as_many_classes_as_the_text_says(table, best, of):
    *others, ours = map(classes_of, read_published(table))
    assert len(ours) == of
    assert sum(ours[name] >= max(other[name] for other in others) for name in ours) == best


def test_rows_that_two_tables_share_agree():
    single = {row["method"]: row for row in read_published("2")}
    shared = [("11", "ToCo", "voc_val"), ("12", "ToCo", "voc_test"), ("12", "CoSA*", "voc_test")]
    for table, method, column in shared:
        assert single[method][column] == row_of(table, method)["mIoU"]


def test_where_two_tables_of_the_paper_differ_each_stands_as_printed():
    assert (row_of("2", "ToCo")["coco_val"], row_of("13", "ToCo")["mIoU"]) == ("42.3", "42.4")


def test_table_7_adds_up():
    for row in read_published("7"):
        for unit in ("hours", "million_parameters"):
            parts = [
                float(value)
                for name, value in row.items()
                if name.endswith(unit) and value and not name.startswith("total")
            ]
            assert sum(parts) == pytest.approx(float(row[f"total_{unit}"]))


@pytest.mark.parametrize("method", ["AFA", "VIT-PCM", "CoSA"])
def test_the_gains_of_table_6_are_the_differences(method):
    row = row_of("6a", method)
    assert float(row["with_crf"]) - float(row["without_crf"]) == pytest.approx(float(row["gain"]))


def test_the_gain_of_toco_in_table_6_stands_as_printed():
    row = row_of("6a", "ToCo")
    assert (row["without_crf"], row["with_crf"], row["gain"]) == ("69.2", "71.1", "0.9")


@pytest.mark.parametrize(
    ("table", "names", "classes"),
    [("11", VOC_NAMES, VOC_CLASSES), ("12", VOC_NAMES, VOC_CLASSES), ("13", COCO_NAMES, COCO_CLASSES)],
)
def test_the_papers_class_names_are_ours_under_another_spelling(table, names, classes):
    found = [names.get(name, name) for name in read_published(table)[0] if name not in NOT_CLASSES]
    assert found[0] == "background"
    assert sorted(found[1:]) == sorted(classes)
    assert set(names) <= set(read_published(table)[0])
