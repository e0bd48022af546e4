"""The tables are the paper's, and every arm of every table is a valid Config."""

from __future__ import annotations

import json
import math

import pytest

from cosa.config import Config, difference, flatten, identity, override
from cosa.config.presets import PRESETS
from sweeps.tables import Arm, Table, get_table, get_tables, memory_times, opposite, plus, tables, times
from sweeps.tables.table import from_dict

ARMS = [(table, arm) for table in tables().values() for arm in table.arms]
VOC = [(table, arm) for table in (t.resolved(Config()) for t in tables().values()) for arm in table.arms]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("table", "arm"), ARMS, ids=lambda x: x.name)
def test_every_arm_is_a_valid_config_of_every_preset(table, arm, preset):
    base = PRESETS[preset]()
    arm = table.resolved(base).arm(arm.name)
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
        "s2c.source": "none",
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
    found = {}
    for table, arm in VOC:
        for column, value in arm.paper.items():
            where = "COCO" if column == "COCO" else "VOC"
            key = (identity(override(Config(), arm.changes)), where, table.columns[column])
            found.setdefault(key, set()).add(value)
    assert {key: values for key, values in found.items() if len(values) > 1} == {}


def test_every_table_holds_the_full_model_once():
    full = identity(Config())
    for table in tables().values():
        same = [arm for arm in table.arms if identity(override(Config(), _changes(table, arm))) == full]
        assert len(same) == 1, table.name


def _changes(table, arm):
    return table.resolved(Config()).arm(arm.name).changes


def test_table_4a_without_guidance_is_table_3b_without_gc():
    no, no_gc = get_table("4a").arm("NO"), get_table("3b").arm("no-GC")
    assert override(Config(), no.changes) == override(Config(), no_gc.changes)


def test_the_oracles_are_those_that_see_the_ground_truth():
    oracles = {f"{table.name}/{arm.name}" for table, arm in VOC if override(Config(), arm.changes).oracle}
    assert oracles == {"4a/GT", "fig1/GT"}


# The values of the paper's Table 5 and Fig. 9, in its order; what the arms must give on VOC and COCO.
@pytest.mark.parametrize(
    ("table", "setting", "values"),
    [
        ("5a", "s2c.weight", [0.2, 0.1, 0.05, 0.025, 0.0125]),
        ("5b", "c2s.weight", [0.4, 0.2, 0.1, 0.05, 0.025]),
        ("5c", "csc.epsilon", [math.inf, 2.0, 1.0, 0.5]),
        ("5d", "ema.momentum", [0.9990, 0.9992, 0.9994, 0.9996, 0.9999, 1.0]),
        ("fig9", "threshold.xi", [0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60, 0.65, 0.45]),
    ],
)
def test_relative_arms_are_exactly_the_papers_values_at_the_papers_optimum(table, setting, values):
    arms = get_table(table).resolved(Config()).arms
    assert [flatten(override(Config(), arm.changes))[setting] for arm in arms] == values


def test_the_thresholds_of_figure_9_are_fixed_but_the_last():
    arms = get_table("fig9").arms
    modes = [override(Config(), _changes(get_table("fig9"), arm)).threshold.mode for arm in arms]
    assert modes == ["fixed"] * 8 + ["dynamic"]


def test_a_momentums_memory_scales_with_the_presets_own():
    # Momentum 0.98 reaches back 50 steps: half of that is 25, twice 100, infinitely far is never.
    assert [memory_times(f).of(0.98) for f in (0.5, 1, 2, math.inf)] == [0.96, 0.98, 0.99, 1.0]


def test_a_reading_that_is_a_switch_is_the_one_that_the_preset_does_not_have():
    for preset in ("voc", "shapes"):
        base = PRESETS[preset]()
        for arm in get_table("readings").resolved(base).arms:
            changed = {name: value for name, _, value in difference(base, override(base, arm.changes))}
            assert changed == arm.changes, (preset, arm.name)
    assert (opposite().of(True), opposite().of(False)) == (False, True)


def test_relative_values_follow_the_preset_and_are_tidy():
    assert (times(4).of(0.05), times(math.inf).of(2.0), plus(-0.15).of(0.45)) == (0.2, math.inf, 0.3)


def test_no_two_arms_of_different_configs_share_a_name():
    by_name = {}
    for _, arm in VOC:
        by_name.setdefault(arm.name, set()).add(identity(override(Config(), arm.changes)))
    assert {name for name, found in by_name.items() if len(found) > 1} == set()


@pytest.mark.parametrize(
    ("table", "column", "values"),
    [
        ("4a", "train", [83.99, 72.28, 74.19, 78.05, 78.54]),
        ("4a", "val", [80.16, 71.38, 73.36, 76.15, 76.37]),
        ("4b", "C-mIoU", [62.61, 82.34]),
        ("4b", "mIoU", [67.82, 76.37]),
        ("5a", "VOC", [73.79, 74.67, 76.19, 75.25, None]),
        ("5b", "VOC", [74.67, 75.56, 76.19, 73.95, 61.55]),
        ("5c", "VOC", [73.66, 75.52, 76.19, 74.30]),
        ("5d", "VOC", [73.79, 75.40, 76.19, 75.58, 71.42, None]),
        ("fig9", "VOC", [None, None, None, 75.54, None, None, None, None, 76.19]),
    ],
)
def test_published_values_are_as_printed_and_illegible_ones_are_left_out(table, column, values):
    assert [arm.paper.get(column) for arm in get_table(table).arms] == values


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


@pytest.mark.parametrize(("name", "nearest"), [("3aa", "3a"), ("fig8", "fig9"), ("al", "all")])
def test_unknown_table_names_the_nearest_one(name, nearest):
    with pytest.raises(ValueError, match=f"got '{name}'; did you mean '{nearest}'"):
        get_table(name)


def test_all_is_every_table_and_none_twice():
    others = [name for name in tables() if name != "5a"]
    assert [table.name for table in get_tables(["5a", "all", "3a"])] == ["5a", *others]


@pytest.mark.parametrize("table", [*tables().values()], ids=lambda table: table.name)
def test_a_table_comes_back_from_json_as_it_was(table):
    resolved = table.resolved(Config())
    back = from_dict(json.loads(json.dumps(resolved.to_dict(), allow_nan=False)))
    assert back.to_dict() == resolved.to_dict()
    assert [override(Config(), arm.changes) for arm in back.arms] == [
        override(Config(), arm.changes) for arm in resolved.arms
    ]


FULL = Arm("full")


@pytest.mark.parametrize(
    ("arms", "settings", "line"),
    [
        ((FULL, FULL), {}, "table t must name each arm once, got 'full' twice; rename one"),
        ((Arm("full", {}, {"VOC": 1.0}),), {}, r"values of t/full must stand under \(\), got {'VOC'}"),
        ((Arm("ful"),), {}, "table t must hold its reference arm, got 'full'; did you mean 'ful'?"),
        ((Arm("other"),), {}, "table t must hold its reference arm, got 'full'; add it"),
        ((FULL, Arm("no CSC")), {}, "arm of table 't' must have a name of letters, digits"),
        ((FULL,), {"name": "a/b"}, "table must have a name of letters, digits"),
        (
            (FULL, Arm("x", {"csc.weigth": 0.2})),
            {},
            "setting of arm x in table t must be .*, got 'csc.weigth'; did you mean 'csc.weight'?",
        ),
        (
            (FULL,),
            {"metrics": ("val/assignment/cpl_mious",)},
            "got 'val/assignment/cpl_mious'; did you mean 'val/assignment/cpl_miou'?",
        ),
        ((FULL,), {"metrics": ()}, "table t must show a metric, got none"),
        (
            (FULL,),
            {"components": ("CSS",)},
            "component in table t must be one that exists, got 'CSS'; did you",
        ),
        ((FULL,), {"settings": ("csc.tua",)}, "setting in table t .* got 'csc.tua'; did you mean 'csc.tau'?"),
        (
            (FULL,),
            {"columns": {"VOC": "val/assignment/seg_cmiou"}},
            "metric of a published column in table t must be one that exists, got 'val/assignment/seg_cmiou'",
        ),
    ],
)
def test_a_table_that_cannot_be_filled_is_refused_in_one_line(arms, settings, line):
    with pytest.raises(ValueError, match=line) as error:
        Table(**({"name": "t", "title": "", "arms": arms} | settings))
    assert "\n" not in str(error.value)
