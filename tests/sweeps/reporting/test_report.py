"""The tables as printed: ours over seeds, differences to the full model, published values, gaps."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from types import SimpleNamespace

import pandas as pd
import pytest
import scipy.stats

from cosa.config import Config, TrainConfig
from sweeps import report
from sweeps.planning import plan as planning
from sweeps.planning.plan import make_plan
from sweeps.reporting import forms, grids, render
from sweeps.reporting.forms import Links
from sweeps.reporting.results import Results, Standing, class_means, fill, p_value, read_standing
from sweeps.tables import Arm, Table
from sweeps.tables.metrics import STANDARD

SEG_MIOU_LABELLED, SEG_MIOU = STANDARD[:2]
TABLE = Table(
    name="9z",
    title="A small one",
    columns={"VOC": SEG_MIOU_LABELLED, "COCO": SEG_MIOU_LABELLED},
    protocol="VOC and COCO val",
    components=("GC", "CSC"),
    arms=(
        Arm("none", {"s2c.source": "none", "csc.weight": 0.0}, {"VOC": 60.0, "COCO": 40.0}),
        Arm("no-CSC", {"csc.weight": 0.0}, {"VOC": 70.5}),
        Arm("full", {}, {"VOC": 76.25, "COCO": 51.0}),
    ),
)
PLAN = make_plan(Config(train=TrainConfig(iterations=10, warmup=4)), [TABLE], [0, 1])


def run_of(status="FINISHED", tags=None, run_id="0a1b2c", **metrics):
    values = {key: metrics.get(key.rpartition("/")[2], 0.5) for key in STANDARD}
    return SimpleNamespace(
        info=SimpleNamespace(status=status, run_id=run_id),
        data=SimpleNamespace(metrics=values, tags=tags or {}),
    )


def trial_of(arm, seed):
    return next(t for t in PLAN.trials if t.kind == "trial" and t.arm == arm and t.seed == seed)


def plan_content():
    import json

    return json.loads(planning.to_json(PLAN))


@pytest.fixture
def filled():
    """none has 0.30 and 0.40, full 0.50 and 0.52; no-CSC failed once and was never run once."""
    runs = {
        trial_of("none", 0).identity: run_of(seg_miou=0.30),
        trial_of("none", 1).identity: run_of(seg_miou=0.40),
        trial_of("full", 0).identity: run_of(seg_miou=0.50),
        trial_of("full", 1).identity: run_of(seg_miou=0.52),
    }
    failures = {trial_of("no-CSC", 0).name: "NonFiniteLossError: loss term 'c2s' must stay finite"}
    return fill(TABLE, plan_content(), runs, failures)


@pytest.fixture
def results(filled):
    return Results(
        sweep="small",
        preset="shapes",
        seeds=(0, 1),
        tables=(filled,),
        full=None,
        provenance={"trials": "4 of 6 finished", "training": "1 hour", "commit": "abc & def"},
    )


def row(filled, name):
    return next(row for row in filled.rows if row.arm.name == name)


def numbers(filled, name, key=SEG_MIOU):
    return filled.of(row(filled, name), key)


def test_values_are_tidy_a_line_for_each_number_of_a_run(filled):
    first = filled.values.iloc[0]
    assert first.to_dict() == {
        "table": "9z",
        "arm": "none",
        "seed": 0,
        "metric": SEG_MIOU_LABELLED,
        "value": 0.5,
        "run_id": "0a1b2c",
    }
    assert len(filled.values) == 4 * len(STANDARD)


def test_a_number_is_the_mean_and_sample_deviation_over_seeds(filled):
    found = numbers(filled, "none")
    assert (found["count"], found["mean"]) == (2, pytest.approx(0.35))
    assert found["std"] == pytest.approx(0.1 / math.sqrt(2))


def test_one_seed_has_a_mean_and_no_deviation():
    runs = {trial_of("full", 0).identity: run_of(seg_miou=0.3)}
    found = numbers(fill(TABLE, plan_content(), runs, {}), "full")
    assert (found["mean"], math.isnan(found["std"])) == (0.3, True)
    assert grids.spread(SEG_MIOU, found) == "30.0"


def test_no_seed_has_neither(filled):
    found = numbers(filled, "no-CSC")
    assert (found["count"], found["pairs"]) == (0, 0)
    assert grids.spread(SEG_MIOU, found) == "–"


def test_classes_that_a_report_was_asked_for_have_columns_of_their_own_name(filled, results):
    asked = dataclasses.replace(filled, classes=("cat", "dog"))
    assert [*grids.titles(asked).values()][-2:] == ["CPL mIoU", "CPL mIoU, chosen"]
    assert [*grids.titles(filled).values()][-1] == "CPL C-mIoU"
    assert "chosen: the mean over cat, dog" in grids.grid(asked, 2).remarks
    assert "our C-mIoU: the mean over bird, train, aeroplane, boat" in grids.grid(filled, 2).remarks
    assert not any("C-mIoU" in remark for remark in grids.grid(asked, 2).remarks)
    page = render.html(dataclasses.replace(results, tables=(asked,)), "mlflow ui")
    assert "<dt>CPL mIoU, chosen</dt><dd>CPL mIoU over cat, dog</dd>" in page


def test_the_mean_over_chosen_classes_is_that_of_their_iou():
    ious = {"background": 0.9, "cat": 0.5, "dog": 0.25, "car": 0.0}
    result = {"classes": ["cat", "dog", "car"], "online": {"per_class": {"cpl_iou": ious}}}
    assert class_means(result, ["background", "dog"]) == {"val/online/cpl_cmiou": pytest.approx(0.575)}
    with pytest.raises(ValueError, match="class must be one that was judged, got 'dogs'; did you mean 'dog'"):
        class_means(result, ["dogs"])


def test_differences_are_taken_seed_by_seed(filled):
    found = numbers(filled, "none")
    assert (found["pairs"], found["difference"]) == (2, pytest.approx(-0.16))
    assert found["difference_std"] == pytest.approx(0.08 / math.sqrt(2))


def test_differences_use_only_seeds_that_both_have():
    filled = over_three_seeds(none={0: 0.5, 1: 0.9}, full={0: 0.25, 2: 0.1})
    found = numbers(filled, "none")
    assert (found["count"], found["pairs"], found["difference"]) == (2, 1, 0.25)


def test_every_gap_says_which_seed_and_why(filled):
    assert row(filled, "no-CSC").gaps == (
        "seed 0: failed (NonFiniteLossError: loss term 'c2s' must stay finite)",
        "seed 1: not run yet",
    )
    assert row(filled, "full").gaps == ()


@pytest.mark.parametrize(
    ("run", "gap"),
    [
        (run_of("RUNNING"), "seed 0: still running"),
        (run_of("KILLED"), "seed 0: interrupted"),
        (run_of("FAILED"), "seed 0: failed"),
        (run_of("FAILED", {"cosa.failure": "OutOfMemoryError"}), "seed 0: failed (OutOfMemoryError)"),
    ],
)
def test_an_unfinished_run_is_a_gap_and_never_a_number(run, gap):
    found = row(fill(TABLE, plan_content(), {trial_of("full", 0).identity: run}, {}), "full")
    assert found.gaps[0] == gap
    assert not found.runs


def test_a_row_prints_ours_and_the_published_values(filled):
    table = grids.grid(filled, seeds=2)
    assert [column.title for column in table.columns] == [
        *("", "GC", "CSC", "labelled mIoU", "Δ full", "label-free mIoU", "Δ full", "CPL mIoU", "CPL C-mIoU"),
        *("VOC", "Δ full", "COCO", "Δ full"),
    ]
    assert table.lines[0].cells == (
        *("none", "", "", "50.0 ± 0.0", "0.0", "35.0 ± 7.1", "−16.0", "50.0 ± 0.0", "50.0 ± 0.0"),
        *("60.00", "−16.25", "40.00", "−11.00"),
    )
    assert table.lines[1].cells == ("no-CSC", "✓", "", *"––––––", "70.50", "−5.75", "–", "–")
    assert table.lines[2].cells[:7] == ("full", "✓", "✓", "50.0 ± 0.0", "", "51.0 ± 1.4", "")


def test_an_arm_with_fewer_seeds_says_so():
    runs = {trial_of("full", 1).identity: run_of()}
    table = grids.grid(fill(TABLE, plan_content(), runs, {}), seeds=2)
    assert table.lines[2].cells[0] == "full (n = 1)"


def test_the_terminals_columns_line_up(results):
    lines = forms.terminal(results).splitlines()
    none, no_csc, full = (
        next(line for line in lines if line.startswith(name)) for name in ("none", "no-", "full")
    )
    assert none.index("60.00") == no_csc.index("70.50") == full.index("76.25")
    assert "no-CSC, seed 1: not run yet" in lines


def test_markdown_is_a_table_that_every_reader_knows(results):
    lines = forms.markdown(results).splitlines()
    start = lines.index("### Table 9z: A small one") + 2
    assert {line.count("|") for line in lines[start : start + 5]} == {14}
    assert "http" not in forms.markdown(results)
    assert "- no-CSC, seed 1: not run yet" in lines


def test_the_head_of_the_page_in_mlflow_holds_what_fits_and_says_where_the_rest_is(results):
    import dataclasses

    outcome, title, table = forms.headline(results).split("\n\n")[:3]
    assert (outcome, title) == (render.lead(results), "### Table 9z: A small one")
    assert "GC" not in table.splitlines()[0]  # the page is narrow
    assert table.splitlines()[0].endswith("| VOC, published | COCO, published |")
    assert "`tags.cosa.sweep = 'small' and tags.cosa.kind = 'trial'`" in forms.headline(results)
    many = dataclasses.replace(results, tables=results.tables * 40)
    text = forms.headline(many)
    assert 7000 < len(text) <= 8000  # what MLflow keeps of a tag
    assert text.count("### Table 9z") < 40
    assert "Further tables are in the artifact report/tables.md." in text
    assert text.endswith("- commit: abc & def")


def test_the_head_of_the_page_in_mlflow_has_rules_that_it_knows_as_a_tables(results):
    (rule,) = [line for line in forms.headline(results).splitlines() if line.startswith("| :--")]
    assert all(cell.count("-") >= 2 for cell in rule.strip("| ").split(" | "))


def test_a_bar_in_a_name_ends_no_cell_of_markdown():
    table = grids.Grid("T", [grids.Column("", kind="name"), grids.Column("a|b")], [grids.Line(["c|d", "1"])])
    assert r"""|  | a\|b |
| :-- | --: |
| c\|d | 1 |""" in forms._markdown(table, Links())


def test_csv_holds_every_number(results):
    rows = list(csv.DictReader(io.StringIO(forms.as_csv(results))))
    none = rows[0]
    assert (none["table"], none["arm"], none["GC"], none["CSC"]) == ("9z", "none", "0", "0")
    assert (none["seg_miou_n"], none["seg_miou_mean"], none["seg_miou_minus_full"]) == (
        "2",
        "35.0000",
        "-16.0000",
    )
    assert rows[1]["seg_miou_mean"] == ""
    assert rows[1]["published_COCO"] == ""
    assert "not run yet" in rows[1]["missing"]


def test_the_page_holds_rows_gaps_pictures_and_provenance(results):
    page = render.html(results, "mlflow ui --backend-store-uri sqlite:////somewhere/mlflow.db")
    for text in (
        "35.0 ± 7.1",
        "no-CSC, seed 1: not run yet",
        "abc &amp; def",
        "mlflow ui --backend-store-uri sqlite:////somewhere/mlflow.db",
    ):
        assert text in page


def test_the_page_needs_no_other_file(results):
    page = render.html(results, "")
    assert "<script" not in page
    assert "<link" not in page
    assert "http" not in page


SERVER = "https://user:secret@mlflow.example:5000/"


def test_a_number_leads_to_its_run_and_one_over_seeds_to_their_comparison():
    links = Links(SERVER, "7")
    assert (
        links.runs(["abc"])
        == "https://mlflow.example:5000/#/experiments/7/runs/abc?workflowType=machine_learning"
    )
    both = links.runs(["def", "abc"])
    assert both.startswith("https://mlflow.example:5000/#/compare-runs?runs=%5B%22def%22%2C%22abc%22")
    assert links.runs([]) == ""


def test_a_server_shows_all_trials_of_a_sweep_side_by_side():
    address = Links(SERVER, "7").arms("small")
    assert address.startswith(
        "https://mlflow.example:5000/#/experiments/7/runs?workflowType=machine_learning&"
    )
    assert "searchFilter=tags.cosa.sweep%20%3D%20%27small%27%20and%20tags.cosa.kind" in address
    assert Links("sqlite:////mlflow.db", "7").arms("small") == ""


def test_a_store_without_a_server_has_no_addresses():
    assert Links("sqlite:////somewhere/mlflow.db", "7").runs(["abc"]) == ""


def test_every_form_with_a_server_leads_to_the_runs_and_keeps_its_password(results):
    for text in (render.html(results, "", SERVER), forms.markdown(results, SERVER)):
        assert text.count("https://mlflow.example:5000/#/compare-runs?") >= 8  # two arms, four metrics
        assert "secret" not in text


def test_the_page_of_a_store_in_a_file_shows_the_runs_ids(results):
    assert 'title="seed 0: run 0a1b2c, seed 1: run 0a1b2c">35.0 ± 7.1</span>' in render.html(results, "")


def test_the_csv_names_the_runs(results):
    rows = list(csv.DictReader(io.StringIO(forms.as_csv(results))))
    assert [row["runs"] for row in rows] == ["0:0a1b2c 1:0a1b2c", "", "0:0a1b2c 1:0a1b2c"]


def over_three_seeds(**values):
    """A filled table whose arms have these label-free mIoU, by seed."""
    plan = make_plan(Config(train=TrainConfig(iterations=10, warmup=4)), [TABLE], [0, 1, 2])
    runs = {
        trial.identity: run_of(seg_miou=values[trial.arm.replace("-", "_")][trial.seed])
        for trial in plan.trials
        if trial.kind == "trial" and trial.seed in values.get(trial.arm.replace("-", "_"), {})
    }
    import json

    return fill(TABLE, json.loads(planning.to_json(plan)), runs, {})


def test_a_difference_over_three_seeds_carries_its_p_value():
    filled = over_three_seeds(none={0: 0.40, 1: 0.41, 2: 0.45}, full={0: 0.50, 1: 0.52, 2: 0.54})
    # differences -0.10, -0.11, -0.09: t = -0.1 / (0.01 / sqrt 3) = -17.32, df 2
    assert grids.grid(filled, seeds=3).lines[0].cells[6] == "−10.0 (p 0.0033)"
    assert numbers(filled, "none")["p"] == pytest.approx(0.003317, rel=1e-3)


def test_too_few_common_seeds_are_told_where_others_have_enough():
    filled = over_three_seeds(none={0: 0.40, 1: 0.41}, full={0: 0.50, 1: 0.52, 2: 0.54})
    table = grids.grid(filled, seeds=3)
    assert (table.lines[0].cells[0], table.lines[0].cells[6]) == ("none (n = 2)", "−10.5 (n = 2, too small)")


def test_the_legend_tells_of_rows_with_fewer_seeds(results):
    full = {0: 0.50, 1: 0.52, 2: 0.54}
    for none, lacking in (({0: 0.40, 1: 0.41}, True), (full, False), ({}, False)):
        table = over_three_seeds(none=none, full=full)
        legend = forms.legend(dataclasses.replace(results, tables=(table,), seeds=(0, 1, 2)))
        assert ("over 3 seeds, over n of them where a row says so;" in legend) is lacking


def test_with_fewer_than_three_seeds_the_legend_says_why_there_is_no_test(results):
    assert "no p-values: n too small, a paired test wants 3 seeds or more" in forms.terminal(results)
    assert "(p" not in forms.terminal(results)


@pytest.mark.parametrize(("values", "p"), [((0.1, 0.1, 0.1), 0.0), ((0.0, 0.0, 0.0), 1.0)])
def test_differences_without_any_deviation_have_a_p_value_too(values, p):
    assert p_value(pd.Series(values)) == p


def test_too_few_differences_have_no_p_value():
    assert math.isnan(p_value(pd.Series([0.1, 0.2, math.nan])))


def test_the_p_value_is_that_of_a_paired_t_test():
    ours, theirs = pd.Series([0.3, 0.5, 0.45, 0.2]), pd.Series([0.32, 0.61, 0.44, 0.3])
    assert p_value(ours - theirs) == pytest.approx(scipy.stats.ttest_rel(ours, theirs).pvalue)


def test_latex_has_balanced_rows_and_environments_in_plain_ascii(results):
    text = forms.latex(results)
    assert text.isascii()
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    for name in ("table*", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1
    columns = text.partition(r"\begin{tabular}{")[2].partition("}")[0]
    assert columns == "lccrrrrrrrrrr"
    body = text.partition(r"\midrule")[2].partition(r"\bottomrule")[0].strip().splitlines()
    assert [line.count("&") for line in body] == [12, 12, 12]
    assert all(line.endswith(r" \\") for line in body)
    assert r"35.0 $\pm$ 7.1 & $-$16.0" in body[0]


def test_latex_rules_ours_and_the_published_columns_apart(results):
    text = forms.latex(results)
    assert r" & & & \multicolumn{6}{c}{ours} & \multicolumn{4}{c}{published} \\" in text
    assert r"\cmidrule(lr){4-9} \cmidrule(lr){10-13}" in text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b & 50%", r"a\_b \& 50\%"),
        ("M† ξ ≤ ∞", r"M$^\dagger$ $\xi$ $\leq$ $\infty$"),
        ("☃", "?"),
        ("\\", r"\textbackslash{}"),
        ("car|truck", "car$|$truck"),
        ("[b]", "{[}b]"),  # behind the end of a row it would be a length
    ],
)
def test_latex_escapes_what_it_would_misread(text, escaped):
    assert forms.escape(text) == escaped


def test_a_chart_spans_all_values_and_keeps_arms_without_any(filled):
    chart = render.chart(filled, SEG_MIOU)
    none, no_csc, full = chart["lines"]
    assert no_csc["mean"] is None
    assert min(none["dots"])[0] < full["mean"]
    assert none["dots"][0][1] == {0: "0a1b2c"}
    places = [x for x, _ in (*none["dots"], *full["dots"])]
    ticks = [x for x, _ in chart["ticks"]]
    assert min(ticks) <= min(places)
    assert max(places) <= max(ticks)


def test_a_chart_of_nothing_is_not_drawn():
    assert render.chart(fill(TABLE, plan_content(), {}, {}), SEG_MIOU) is None


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "+12.3"), (-0.1234, "−12.3"), (-0.0001, "0.0"), (math.nan, "–")]
)
def test_signed_percent_has_one_decimal_and_no_negative_zero(value, text):
    assert grids.number(SEG_MIOU, value, signed=True) == text


def test_all_five_forms_are_written(results, tmp_path):
    files = render.write(results, tmp_path / "out", "sqlite:////somewhere/mlflow.db")
    assert [path.name for path in files] == [
        *("report.html", "tables.md", "tables.csv", "tables.tex", "tables.txt")
    ]
    assert all(path.stat().st_size > 0 for path in files)


ORACLE = Table(
    name="8z",
    title="With an oracle",
    metrics=("train/assignment/cpl_miou", "val/assignment/cpl_perplexity"),
    settings=("s2c.source",),
    columns={"train": "train/assignment/cpl_miou"},
    protocol="VOC train",
    arms=(Arm("GT", {"s2c.source": "gt"}, {"train": 83.99}), Arm("NO", {"s2c.source": "none"}), Arm("full")),
)


@pytest.fixture
def with_oracle():
    """The oracle is far above the rest; NO is above the full model."""
    import json

    plan = json.loads(planning.to_json(make_plan(Config(), [ORACLE], [0])))
    values = {"GT": 0.9, "NO": 0.7, "full": 0.6}
    runs = {
        trial["identity"]: SimpleNamespace(
            info=SimpleNamespace(status="FINISHED", run_id="0a1b2c"),
            data=SimpleNamespace(metrics={ORACLE.metrics[0]: values[arm], ORACLE.metrics[1]: 1.25}, tags={}),
        )
        for trial in plan["trials"]
        for arm in [trial["arms"][0].partition("/")[2]]
        if trial["kind"] == "trial"
    }
    return fill(ORACLE, plan, runs, {})


def oracle_results(filled):
    return Results(
        sweep="s",
        preset="voc",
        seeds=(0,),
        tables=(filled,),
        full=None,
        provenance={"trials": "", "training": ""},
    )


def test_an_oracle_is_never_the_best(with_oracle):
    assert with_oracle.best.arm.name == "NO"


def test_a_run_tagged_as_oracle_is_one_whatever_its_arm_says(filled):
    runs = {trial_of("none", 0).identity: run_of(tags={"cosa.oracle": "gt"})}
    found = fill(TABLE, plan_content(), runs, {})
    assert [row.oracle for row in found.rows] == [True, False, False]


@pytest.mark.parametrize("form", [forms.terminal, forms.markdown, lambda results: render.html(results, "")])
def test_every_readable_form_names_the_oracle_and_says_what_it_is(with_oracle, form):
    text = form(oracle_results(with_oracle))
    assert "GT (oracle)" in text
    assert "its training saw ground-truth masks" in text
    assert "ighest train CPL mIoU of ours: NO, 70.0" in text
    assert "NO (oracle)" not in text


def test_the_csv_has_a_column_for_oracles_and_the_best(with_oracle):
    rows = list(csv.DictReader(io.StringIO(forms.as_csv(oracle_results(with_oracle)))))
    assert [(row["arm"], row["oracle"], row["best"]) for row in rows] == [
        ("GT", "1", "0"),
        ("NO", "0", "1"),
        ("full", "0", "0"),
    ]
    assert [row["s2c.source"] for row in rows] == ["gt", "none", "spl"]


def test_a_row_with_fewer_seeds_than_others_is_not_called_best(filled):
    runs = {
        trial_of("none", 0).identity: run_of(seg_miou_labelled=0.9),
        trial_of("no-CSC", 0).identity: run_of(seg_miou_labelled=0.3),
        trial_of("no-CSC", 1).identity: run_of(seg_miou_labelled=0.3),
        trial_of("full", 0).identity: run_of(seg_miou_labelled=0.4),
        trial_of("full", 1).identity: run_of(seg_miou_labelled=0.4),
    }
    assert fill(TABLE, plan_content(), runs, {}).best.arm.name == "full"


@pytest.mark.parametrize(("value", "best"), [(0.5004, None), (0.5006, "full")])
def test_of_two_rows_that_print_alike_none_is_called_best(value, best):
    runs = {
        trial_of("no-CSC", 0).identity: run_of(seg_miou_labelled=0.5),
        trial_of("full", 0).identity: run_of(seg_miou_labelled=value),
    }
    found = fill(TABLE, plan_content(), runs, {}).best
    assert (found.arm.name if found else None) == best


def test_one_row_alone_is_not_called_best():
    assert fill(TABLE, plan_content(), {trial_of("full", 0).identity: run_of()}, {}).best is None


def test_a_table_shows_its_own_metrics_and_what_each_row_was_trained_with(with_oracle):
    table = grids.grid(with_oracle, seeds=1)
    assert [column.title for column in table.columns] == [
        *("", "s2c.source", "train CPL mIoU", "Δ full", "val CPL perplexity", "Δ full", "train", "Δ full")
    ]
    assert table.lines[0].cells == ("GT (oracle)", "gt", "90.0", "+30.0", "1.25", "+0.00", "83.99", "–")
    assert table.lines[0].marked == "s2c.source gt"


WITHOUT_SA = Table(
    name="7z",
    title="Without an assignment network",
    metrics=(SEG_MIOU, "train/assignment/cpl_miou"),
    arms=(Arm("no-SA", {"cam.source": "online"}), Arm("full")),
)


@pytest.fixture
def without_sa():
    """ON is 0.4 in every run, AN 0.6; on training images only the network that assigns was measured."""
    import json

    plan = json.loads(planning.to_json(make_plan(Config(), [WITHOUT_SA], [0, 1, 2])))
    metrics = {"val/assignment/seg_miou": 0.6, "val/online/seg_miou": 0.4}
    runs = {}
    for trial in plan["trials"]:
        online = trial["arms"][0] == "7z/no-SA"
        own = {"train/online/cpl_miou": 0.3} if online else {"train/assignment/cpl_miou": 0.7}
        runs[trial["identity"]] = SimpleNamespace(
            info=SimpleNamespace(status="FINISHED", run_id="0a1b2c"),
            data=SimpleNamespace(metrics=metrics | own, tags={}),
        )
    filled = fill(WITHOUT_SA, plan, runs, {})
    return Results(
        sweep="s",
        preset="shapes",
        seeds=(0, 1, 2),
        tables=(filled,),
        full=None,
        provenance={"trials": "", "training": ""},
    )


def test_an_arm_without_an_assignment_network_is_judged_on_on(without_sa):
    table = grids.grid(without_sa.tables[0], seeds=3)
    assert table.lines[0].cells == (
        "no-SA",
        "40.0 ± 0.0",
        "−20.0 (p < 0.001)",
        "30.0 ± 0.0",
        "−40.0 (p < 0.001)",
    )
    assert table.lines[1].cells == ("full", "60.0 ± 0.0", "", "70.0 ± 0.0", "")
    assert without_sa.tables[0].best.arm.name == "full"


@pytest.mark.parametrize(
    "form", [forms.terminal, forms.markdown, lambda results: render.html(results, ""), forms.latex]
)
def test_every_readable_form_says_which_rows_are_judged_on_on(without_sa, filled, form):
    text = form(without_sa)
    assert "ours on shapes, AN, or ON where there is no AN, mean" in text
    assert "udged on ON, since they have no AN without SA: no-SA; all others on AN" in text
    alone = form(dataclasses.replace(without_sa, tables=(filled,)))
    assert "judged on ON" not in alone.partition("What is measured")[0]
    assert "ours on shapes, AN, mean" in alone


def test_the_csv_names_the_network_of_each_row_and_keeps_ons_of_all(without_sa):
    rows = list(csv.DictReader(io.StringIO(forms.as_csv(without_sa))))
    assert [(row["arm"], row["network"], row["seg_miou_mean"]) for row in rows] == [
        ("no-SA", "online", "40.0000"),
        ("full", "assignment", "60.0000"),
    ]
    assert [row["online_seg_miou_mean"] for row in rows] == ["40.0000", "40.0000"]


def test_the_charts_and_the_lead_are_of_the_network_that_a_row_is_judged_on(without_sa):
    lines = render.chart(without_sa.tables[0], SEG_MIOU)["lines"]
    assert lines[0]["mean"] < lines[1]["mean"]
    assert render.lead(without_sa) == "val label-free mIoU: full 60.0 ± 0.0 %, no-SA 40.0 ± 0.0 %"


def test_a_sweep_that_runs_is_reported_again_until_it_has_ended(results, tmp_path, monkeypatch, capsys):
    standing = Standing({"done": 3.0}, 0.0)
    found = [dataclasses.replace(results, standing=own) for own in (standing, standing, None)]
    left, waited = iter(found), []
    monkeypatch.setattr("sweeps.reporting.results.read_results", lambda *_, **__: next(left))
    monkeypatch.setattr(report, "find_sweep", lambda *_: "the run")
    monkeypatch.setattr(report.time, "sleep", waited.append)

    assert report.main(["--out", str(tmp_path / "out"), "--watch", "30"]) == 0

    assert waited == [30.0, 30.0]
    assert (tmp_path / "out/report.html").is_file()
    assert capsys.readouterr().out.count("3 done, as of ") == 2


def parent_of(status, **counts):
    told = {f"sweep/{name}": value for name, value in counts.items()}
    info = SimpleNamespace(status=status, run_id="p", start_time=0)
    return SimpleNamespace(info=info, data=SimpleNamespace(metrics={**told, "loss": 1.0}, tags={}))


def test_a_sweep_that_runs_says_what_is_done_how_long_the_rest_takes_and_when_that_was_said():
    info = SimpleNamespace(status="RUNNING", run_id="t", start_time=1, run_name="full, seed 0")
    params, tags = {"train.iterations": "60"}, {"cosa.kind": "trial", "cosa.resumed_at": "30"}
    trial = SimpleNamespace(
        info=info, data=SimpleNamespace(metrics={"train/loss/cls": 1.0}, params=params, tags=tags)
    )
    points = {"t": [SimpleNamespace(step=40, timestamp=0)], "p": [SimpleNamespace(step=3, timestamp=90_000)]}
    client = SimpleNamespace(get_metric_history=lambda run_id, _: points[run_id])

    found = read_standing(client, parent_of("RUNNING", done=3.0, hours_left=0.25), [trial])

    assert found == Standing({"done": 3.0, "hours_left": 0.25}, 90.0, (("full, seed 0", "t", 40, 60),))
    assert str(found).startswith("3 done, 15 min left, as of 1970-01-01 ")


def test_the_page_of_a_sweep_that_runs_shows_its_trials_and_is_read_again(results):
    counts = {"done": 3.0, "running": 1.0, "waiting": 2.0, "failed": 0.0}
    runs = dataclasses.replace(results, standing=Standing(counts, 0.0, (("full, seed 0", "t", 400, 1000),)))
    page = render.html(runs, "", again=30.0)
    assert '<meta http-equiv="refresh" content="30">' in page
    assert '<progress value="3" max="6"></progress><span>3 of 6</span>' in page
    assert '<progress value="400" max="1000"></progress><span>400 of 1,000 steps</span>' in page
    assert "<progress" not in render.html(results, "")
    assert "refresh" not in render.html(results, "")


def test_seeds_that_lack_for_one_reason_are_told_together():
    filled = fill(TABLE, plan_content(), {}, {})
    assert row(filled, "full").gaps == ("seeds 0, 1: not run yet",)
