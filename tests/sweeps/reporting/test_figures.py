"""The figures from recorded data: what they read, what they work out, and what they leave out."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import re
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cosa.evaluation.panels import panel_arrays
from sweeps.reporting import figures, plots, render
from sweeps.reporting.histories import merge_bins, quantile, read_bins
from sweeps.reporting.plots import Canvas, draw_line, styled
from sweeps.reporting.results import Results
from sweeps.tables import Arm, Table, get_table, get_tables
from tests.sweeps.made_up_sweep import (
    CLASSES,
    CONFIDENCE,
    STEPS,
    analysis,
    analysis_file,
    histogram,
    made_up,
    panel_rows,
)

TABLES = get_tables(["3a", "3b", "fig1", "fig9"])


def draw(histories):
    """Figures by the paper's number."""
    drawn = figures.draw_figures(histories)
    return {drawing.title.partition(":")[0].removeprefix("Figure "): drawing for drawing in drawn}


@pytest.fixture(scope="module")
def histories():
    return made_up(TABLES)[1]


@pytest.fixture(scope="module")
def drawn(histories):
    return draw(histories)


def bins(counts, edges, correct=None):
    return read_bins({"edges": list(edges), "count": counts, "correct": correct or [0] * len(counts)})


@pytest.mark.parametrize("share", [0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0])
def test_quantiles_from_bins_are_numpys_on_the_raw_values_to_a_bins_width(share):
    values = np.random.default_rng(0).beta(2, 3, 5_000)
    content = histogram(values, np.ones(5_000, bool), CONFIDENCE)
    assert quantile(read_bins(content), share) == pytest.approx(np.quantile(values, share), abs=1 / 50)


def test_a_quantile_lies_within_its_bin_as_far_as_its_share_of_it():
    # 4 in [0, 1), none in [1, 2), 4 in [2, 4): the first quarter ends in the middle of the first bin
    histogram_ = bins([4, 0, 4], [0, 1, 2, 4])
    assert [quantile(histogram_, q) for q in (0.25, 0.5, 0.75, 1.0)] == [0.5, 1.0, 3.0, 4.0]


def test_a_quantile_in_the_open_bin_is_its_lower_edge():
    assert quantile(bins([1, 3], [0, 5, None]), 0.9) == 5


def test_empty_first_bins_hold_no_quantile():
    assert quantile(bins([0, 0, 2], [0, 1, 2, 3]), 0.0) == 2


def test_nothing_has_no_quantile():
    assert math.isnan(quantile(bins([0, 0], [0, 1, 2]), 0.5))


def test_boxes_are_over_the_images_of_all_seeds():
    one, other = analysis(2000, seed=0), analysis(2000, seed=1)
    both = copy.deepcopy(one)
    for kind, content in both["networks"]["assignment"]["images"].items():
        more = other["networks"]["assignment"]["images"][kind]["count"]
        content["count"] = [count + more_ for count, more_ in zip(content["count"], more, strict=True)]
    one, other, both = (content["networks"]["assignment"] for content in (one, other, both))
    with styled():
        assert list(plots.boxes({"full": [one, other]})) == list(plots.boxes({"full": [both]}))
        assert list(plots.boxes({"full": [one, other]})) != list(plots.boxes({"full": [one]}))


def test_the_heat_map_is_correct_over_pixels_and_blank_where_there_are_none():
    row = plots.accuracy(bins([8, 0, 4], [0, 0.5, 0.75, 1], [2, 0, 0]))
    assert (row[0], row[2]) == (25.0, 0.0)
    assert math.isnan(row[1])


def test_a_line_is_the_mean_at_steps_that_all_seeds_have():
    with styled():
        axes = Canvas().axes
        seeds = [pd.Series({10: 0.2, 20: 0.5, 30: 0.9}), pd.Series({10: 0.4, 20: 0.5})]
        draw_line(axes, seeds, color="#000000")
    assert axes.lines[0].get_xdata().tolist() == [10, 20]
    assert axes.lines[0].get_ydata() == pytest.approx([30, 50])


def test_one_seed_has_a_line_and_no_band():
    with styled():
        axes = Canvas().axes
        draw_line(axes, [pd.Series({10: 0.2, 20: 0.5})], color="#000000")
    assert axes.lines[0].get_ydata().tolist() == [20.0, 50.0]
    assert not axes.collections


def test_a_band_reaches_one_deviation_up_and_down_in_percent():
    with styled():
        axes = Canvas().axes
        draw_line(axes, [pd.Series({1: 0.2, 2: 0.2}), pd.Series({1: 0.4, 2: 0.4})], color="#000000")
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((30 - 20 / math.sqrt(2), 30 + 20 / math.sqrt(2)))


def test_every_figure_is_drawn_in_the_papers_order(drawn):
    files = {number: [part.file for part in drawing.parts] for number, drawing in drawn.items()}
    assert files == {
        "1": ["fig1a.svg", "fig1b.svg", "fig1c.png"],
        "3": ["fig3a.svg", "fig3c.svg", "fig3e.svg"],
        "4": ["fig4a.svg", "fig4b.svg"],
        "6": ["fig6-spl.svg", "fig6-cpl.svg"],
        "7": ["fig7-left.svg", "fig7-right.svg"],
        "8": ["fig8.png"],
        "9": ["fig9-left.svg", "fig9-right.svg"],
        "10": ["fig10.png"],
    }
    assert not any(drawing.note for drawing in drawn.values())


def test_the_same_data_gives_the_same_bytes(histories, drawn):
    again = draw(histories)
    for number, drawing in drawn.items():
        assert [part.data for part in drawing.parts] == [part.data for part in again[number].parts]


def test_a_file_is_xml_and_its_inline_form_names_no_address(drawn):
    for drawing in drawn.values():
        for part in drawing.parts:
            if part.file.endswith(".svg"):
                assert ElementTree.fromstring(part.data).tag.endswith("svg")
                assert part.inline.startswith(f'<svg role="img" aria-label="{part.title}"')
                assert "http" not in part.inline


def test_a_point_of_a_curve_says_arm_value_and_step_under_the_mouse(histories, drawn):
    left = drawn["1"].parts[1]
    said = re.findall("<use [^>]*><title>([^<]*)</title></use>", left.data.decode())
    expected = [
        f"{name}: {100 * mean:.4g} at iteration {step}"
        for name in ("GT (oracle)", "SPL", "NO", "NS")
        for step, mean in pd.concat(
            histories.arm(figures.ARMS[name]).metric("val/assignment/cpl_miou"), axis="columns", join="inner"
        )
        .mean(axis="columns")
        .items()
    ]
    assert len(said) > 8
    assert said == expected


def test_pictures_of_one_page_share_no_name(drawn):
    pages = [part.inline for drawing in drawn.values() for part in drawing.parts if not part.wide]
    names = [set(re.findall(' id="([^"]+)"', page)) for page in pages]
    used = [set(re.findall(r'(?:"#|url\(#)([^")]+)', page)) for page in pages]
    assert sum(map(len, names)) == len(set().union(*names))
    assert all(own and own <= known for own, known in zip(used, names, strict=True))


def test_a_sweep_without_an_arm_has_no_figure_of_it():
    drawn = draw(made_up(get_tables(["fig9"]), (0,))[1])
    assert set(drawn) == {"3", "4", "9", "10"}


def test_an_arm_without_a_result_is_named_and_the_rest_is_drawn():
    drawn = draw(made_up(get_tables(["3b"]), missing={"no-SA"}, running={"no-RAW"})[1])
    assert drawn["6"].note == "no-SA has 0 of 2 seeds"
    assert drawn["7"].note == "no-RAW has 0 of 2 seeds"
    assert len(drawn["6"].parts) == len(drawn["7"].parts) == 2


def test_nothing_finished_draws_nothing():
    every_arm = {arm.name for table in TABLES for arm in table.arms}
    assert draw(made_up(TABLES, missing=every_arm)[1]) == {}


def test_old_runs_without_analysis_files_have_lines_alone():
    store, histories = made_up(get_tables(["3b"]), (0,))
    for files in store.files.values():
        for name in [name for name in files if name.startswith("analysis/")]:
            del files[name]
    drawn = draw(histories)
    assert "3" not in drawn
    assert [part.file for part in drawn["7"].parts] == ["fig7-right.svg"]


def test_a_forked_trial_begins_with_its_warm_ups_history(histories):
    history = histories.arm({}).metric("val/assignment/cpl_miou")[0]
    assert tuple(history.index) == STEPS


def test_an_arm_is_found_by_what_it_changes_whatever_its_table_calls_it(histories):
    # fig9's "xi" is 3b's no-DT; evaluation never changes what is trained
    changes = {"threshold.mode": "fixed", "evaluation.train_split": "train"}
    arm = histories.arm(changes)
    assert arm.planned
    assert [trial.seed for trial in arm.trials] == [0, 1]
    assert not histories.arm({"csc.weight": 0.3}).planned


def test_fixed_thresholds_are_found_with_their_values(histories):
    assert list(histories.fixed_thresholds()) == pytest.approx(np.arange(0.30, 0.66, 0.05))


def test_many_evaluations_are_thinned_before_they_are_downloaded():
    store, histories = made_up(get_tables(["fig9"]), (0,))
    (trial,) = histories.arm({}).trials
    files = store.files[trial.run_ids[-1]]
    for step in range(410, 2000, 10):
        files[f"analysis/step_{step:08d}.json"] = functools.partial(analysis_file, step, pixels=100)
    draw(histories)
    analyses = [path for _, path in store.downloads if path.startswith("analysis/")]
    assert len(analyses) == 12
    # the warm-up, whose threshold is not searched, is left out
    assert (analyses[0], analyses[-1]) == ("analysis/step_00000410.json", "analysis/step_00002000.json")


def test_one_evaluation_alone_still_makes_a_heat_map():
    store, histories = made_up(get_tables(["fig9"]), (0,))
    for files in store.files.values():
        for name in [n for n in files if n.startswith("analysis/") and "2000" not in n]:
            del files[name]
    assert len(draw(histories)["3"].parts) == 3


def test_a_table_without_the_full_model_shows_what_its_own_arms_see():
    arms = (
        Arm("weak", {"csc.weight": 0.2}),
        Arm("none", {"csc.weight": 0.0}),
    )
    drawn = draw(made_up([Table(name="mine", title="", reference="none", arms=arms)], (0,))[1])
    assert [part.title for part in drawn["10"].parts] == ["none and weak"]


def test_captions_say_which_images_a_panel_shows(drawn):
    assert "drawn at random with seed 0, the same for every arm, none picked by hand" in drawn["8"].caption


def test_captions_name_the_data(drawn):
    assert all("ours, made-up, val split" in drawing.caption for drawing in drawn.values())


def test_arms_are_beside_each_other_under_each_column():
    one, other = (panel_arrays(panel_rows(seed), CLASSES) for seed in (0, 1))
    image = np.asarray(figures.side_by_side({"a": one, "b": other}, ("M", "CPL")))
    columns = [image[44:172, left : left + 128] for left in range(6, image.shape[1], 134)]
    wanted = [one["tiles"][0, 0], one["tiles"][0, 1]]
    wanted += [panel["tiles"][0, place] for place in (2, 4) for panel in (one, other)]
    np.testing.assert_array_equal(columns, wanted)


def test_an_arm_whose_panel_shows_other_images_is_left_out():
    one, other = panel_arrays(panel_rows(), CLASSES), panel_arrays(panel_rows(rows=1), CLASSES)
    alone = figures.side_by_side({"a": one, "b": other}, ("M",))
    assert alone.size == figures.side_by_side({"a": one}, ("M",)).size


def test_old_runs_whose_panels_are_pictures_alone_show_them_as_they_are():
    store, histories = made_up(get_tables(["3b"]), (0,))
    for files in store.files.values():
        for name in [name for name in files if name.endswith(".npz")]:
            del files[name]
    parts = draw(histories)["8"].parts
    assert [(part.file, part.title) for part in parts] == [
        ("fig8-1.png", "no-CSC"),
        ("fig8-2.png", "full"),
    ]
    (trial,) = histories.arm({}).trials
    assert parts[1].data == store.files[trial.run_ids[-1]]["panels/step_00002000.png"]()


def test_small_bins_join_their_neighbours_from_the_left():
    # of 20 at least 5: 6 alone, 2 + 0 + 3, 5 alone; the 4 left over join the last, the empty first is gone
    merged = merge_bins(bins([0, 6, 2, 0, 3, 5, 4], range(8), [0, 6, 1, 0, 1, 5, 0]), 0.25)
    assert merged.to_numpy().tolist() == [[1, 2, 6, 6], [2, 5, 5, 2], [5, 7, 9, 5]]


def test_merging_loses_no_pixel_and_keeps_the_open_end():
    whole = read_bins(analysis(2000)["networks"]["assignment"]["cam"]["perplexity"])
    merged = merge_bins(whole, 0.01)
    assert merged["count"].sum() == whole["count"].sum()
    assert merged["count"].min() >= 0.01 * whole["count"].sum()
    assert math.isinf(merged["high"].iloc[-1])


def test_nothing_merges_into_one_empty_bin():
    assert merge_bins(bins([0, 0, 0], range(4)), 0.1)["count"].tolist() == [0]


def test_the_open_bin_is_drawn_at_its_lower_edge():
    assert plots.middles(bins([1, 1, 1], [0, 2, 4, None])).tolist() == [1, 3, 4]


@pytest.fixture(scope="module")
def results(drawn):
    return Results(
        sweep="small",
        preset="shapes",
        seeds=(0,),
        tables=(),
        full=None,
        provenance={"trials": "4 of 6 finished", "training": "1 hour"},
        figures=tuple(drawn.values()),
    )


def test_the_page_holds_every_figure_with_its_caption_and_needs_no_other_file(results, drawn):
    page = render.html(results, "")
    assert page.count('<svg role="img" aria-label="') == 13
    assert page.count('<img class="png" src="data:image/png;base64,') == 3
    assert all(drawing.title in page for drawing in drawn.values())
    assert "http" not in page


def test_the_page_says_which_arm_a_figure_lacks(results, drawn):
    lacking = dataclasses.replace(drawn["6"], note="no-SA has 0 of 2 seeds")
    page = render.html(dataclasses.replace(results, figures=(lacking,)), "")
    assert "Missing: no-SA has 0 of 2 seeds." in page


def test_each_picture_is_a_file_beside_the_page(results, tmp_path):
    files = render.write(results, tmp_path, "sqlite:///mlflow.db")
    names = [path.relative_to(tmp_path).as_posix() for path in files]
    assert "figures/fig3a.svg" in names
    assert (tmp_path / "figures/fig8.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_without_figures_has_no_section_of_them(results):
    assert "from these runs" not in render.html(dataclasses.replace(results, figures=()), "")


CURVES = Table(
    name="mine", title="", arms=(Arm("weak", {"csc.weight": 0.0}), Arm("full"), Arm("gone", {"csc.tau": 0.9}))
)


def test_every_arm_with_a_history_is_a_line_and_others_are_named():
    _, histories = made_up([CURVES], missing=("gone",))
    for runs in histories.arm({}).trials[0].client.metrics.values():
        runs["val/assignment/seg_miou"] = runs["val/assignment/seg_miou_labelled"]
    drawing = figures.draw_curves(histories)["mine"]
    assert drawing.note == "gone without a finished run"
    assert [part.file for part in drawing.parts] == ["curves-mine.svg"]
    assert "mean over up to 2 seeds" in drawing.caption


def test_a_table_without_any_history_has_no_drawing():
    _, histories = made_up([get_table("3b")])
    assert figures.draw_curves(histories) == {}  # nobody recorded label-free mIoU


WITHOUT_SA = {"cam.source": "online"}


def test_an_arm_without_an_assignment_network_shows_ons_history(histories):
    for changes, network in ((WITHOUT_SA, "online"), ({}, "assignment")):
        arm = histories.arm(changes)
        (run_id, *_) = reversed(arm.trials[0].run_ids)
        kept = dict(arm.trials[0].client.metrics[run_id][f"val/{network}/cpl_miou"])
        shown = arm.metric("val/assignment/cpl_miou")[0]
        assert shown[[*kept]].to_dict() == kept


def test_swapping_assignments_shows_both_networks_of_the_full_model_and_on_alone_without(
    histories, monkeypatch
):
    shown = {}

    def note(file, _title, _y, lines, *_rest, **_more):
        shown[file] = [look["label"] for _, look in lines]
        return iter(())

    monkeypatch.setattr(plots, "over_iterations", note)
    draw(histories)
    assert shown["fig6-cpl"] == ["AN, full", "ON, full", "ON, no-SA"]


def test_the_caption_says_which_arms_are_judged_on_on(drawn):
    assert "AN (ON of Base, without SA) unless it says ON" in drawn["10"].caption
    assert "AN unless it says ON" in drawn["8"].caption


@pytest.mark.parametrize(
    ("arrays", "columns"), [(True, ["Base", "full"]), (False, ["Base (AN)", "full"])], ids=["new", "earlier"]
)
def test_a_panel_of_an_earlier_version_is_called_ans_where_there_is_no_an(arrays, columns, monkeypatch):
    store, histories = made_up(get_tables(["3a"]), (0,))
    if not arrays:
        monkeypatch.setattr(figures, "PANEL_ARRAYS", "nothing.npz")
    for files in store.files.values():
        for name in [name for name in files if name.endswith(".png")] if arrays else []:
            del files[name]
    shown = []
    monkeypatch.setattr(
        figures, "side_by_side", lambda tiles, _: shown.extend(tiles) or Image.new("RGB", (2, 2))
    )
    parts = draw(histories)["10"].parts
    assert (shown or [part.title for part in parts]) == columns


def test_images_and_pixels_are_those_of_the_network_that_an_arm_is_judged_on(histories):
    content = analysis(2000)
    content["networks"]["online"] = {"cam": "of ON", "images": "of ON"}
    data = json.dumps(content).encode()
    assert figures._counts(histories.arm(WITHOUT_SA), data)["images"] == "of ON"
    assert figures._counts(histories.arm({}), data)["images"] != "of ON"
