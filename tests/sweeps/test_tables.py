"""The tables are the paper's, and every arm of every table is a valid Config."""

from __future__ import annotations

import pytest

from cosa.config import Config, difference, flatten, identity, override
from cosa.presets import PRESETS
from sweeps.tables import TABLES, get_table
from sweeps.tables.table import WITHOUT, Arm, Table

ARMS = [(table, arm) for table in TABLES.values() for arm in table.arms]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("table", "arm"), ARMS, ids=lambda x: x.name)
def test_every_arm_is_a_valid_config_of_every_preset(table, arm, preset):
    base = PRESETS[preset]()
    changed = {name for name, _, _ in difference(base, override(base, arm.changes))}
    assert changed <= set(arm.changes)


def test_tables_3a_and_3b_have_eleven_distinct_arms():
    arms = [arm for name in ("3a", "3b") for arm in get_table(name).arms]
    assert len(arms) == 13
    assert len({identity(override(Config(), arm.changes)) for arm in arms}) == 11


def test_base_is_the_plain_cam_supervising_its_own_segmentation():
    base = flatten(override(Config(), get_table("3a").arm("Base").changes))
    paper = flatten(Config())
    assert {name: value for name, value in base.items() if value != paper[name]} == {
        "cam.source": "online",
        "s2c.weight": 0.0,
        "csc.weight": 0.0,
        "raw.enabled": False,
        "threshold.mode": "fixed",
    }
    assert base["c2s.weight"] > 0
    assert base["threshold.xi"] == 0.45


# The check marks of the paper's Table 3, row by row: GC SA RAW CSC DT.
CHECK_MARKS = {
    "3a": {
        "Base": "-----",
        "GC": "x----",
        "GC+SA": "xx---",
        "GC+SA+RAW": "xxx--",
        "GC+SA+CSC": "xx-x-",
        "GC+SA+RAW+CSC": "xxxx-",
        "full": "xxxxx",
    },
    "3b": {
        "full": "xxxxx",
        "no-DT": "xxxx-",
        "no-CSC": "xxx-x",
        "no-RAW": "xx-xx",
        "no-SA": "x-xxx",
        "no-GC": "-xxxx",
    },
}


@pytest.mark.parametrize("name", CHECK_MARKS)
def test_check_marks_are_those_of_the_paper_in_its_order(name):
    table = get_table(name)
    marks = {arm.name: "".join("-x"[arm.has(c)] for c in table.components) for arm in table.arms}
    assert list(marks.items()) == list(CHECK_MARKS[name].items())


def test_published_values_of_rows_that_are_the_same_config_agree():
    by_config = {}
    for _, arm in ARMS:
        by_config.setdefault(identity(override(Config(), arm.changes)), []).append(dict(arm.paper))
    assert all(values.count(values[0]) == len(values) for values in by_config.values())


@pytest.mark.parametrize(
    ("name", "reference", "printed"),
    [
        # Differences to the first row as the paper prints them: a check on every published value.
        ("3a", "Base", [0, 7.13, 8.45, 12.26, 15.70, 19.58, 20.23]),
        ("3b", "full", [0, -0.65, -6.30, -3.74, -4.09, -2.07]),
    ],
)
def test_published_voc_values_have_the_differences_that_the_paper_prints(name, reference, printed):
    table = get_table(name)
    start = table.arm(reference).paper["VOC"]
    assert [arm.paper["VOC"] - start for arm in table.arms] == pytest.approx(printed, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "reference", "printed"),
    [
        ("3a", "Base", [0, 5.23, 6.60, 8.07, 9.78, 12.35, 13.68]),
        ("3b", "full", [0, -1.33, -5.05, -3.17, -1.96, -1.33]),
    ],
)
def test_published_coco_values_have_the_differences_that_the_paper_prints(name, reference, printed):
    table = get_table(name)
    start = table.arm(reference).paper["COCO"]
    assert [arm.paper["COCO"] - start for arm in table.arms] == pytest.approx(printed, abs=1e-6)


def test_unknown_table_names_the_nearest_one():
    with pytest.raises(ValueError, match=r"got '3c'; did you mean '3[ab]'"):
        get_table("3c")


def _table(*arms, columns=("VOC",), reference="full"):
    return Table("t", "", "val/assignment/seg_miou", columns, tuple(WITHOUT), reference, arms)


def test_two_rows_of_one_name_are_refused():
    with pytest.raises(ValueError, match="name each arm once, got 'full' twice"):
        _table(Arm("full", {}, {}), Arm("full", {}, {}))


def test_a_value_under_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match="must stand under"):
        _table(Arm("full", {}, {"COCO": 1.0}))


def test_a_table_without_its_reference_arm_is_refused():
    with pytest.raises(ValueError, match="must hold its reference arm, got 'full'"):
        _table(Arm("other", {}, {}))


def test_an_arm_name_with_a_space_is_refused():
    with pytest.raises(ValueError, match="name without"):
        _table(Arm("full", {}, {}), Arm("no CSC", {}, {}))
