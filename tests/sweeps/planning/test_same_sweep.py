"""What the same folder may be asked for again, and what it refuses."""

from __future__ import annotations

import pytest

from cosa.config import Config, TrainConfig, override
from sweeps.planning.folder import read_plan, require_same_sweep, taken_before
from sweeps.planning.plan import make_plan, to_json
from sweeps.tables import Arm, Table, get_table, times

BASE = Config(train=TrainConfig(iterations=10, warmup=4))
TABLE = Table(name="mine", title="", arms=(Arm("full"), Arm("weak", {"csc.weight": 0.1})))


def begin(root, tables=(TABLE,), base=BASE, seeds=(0,), reused=None):
    plan = make_plan(base, tables, seeds)
    (root / "plan.json").write_text(to_json(plan, reused))
    return plan


def test_a_folder_without_a_plan_takes_any(tmp_path):
    require_same_sweep(tmp_path, make_plan(BASE, [TABLE], [0]))


@pytest.mark.parametrize(
    ("base", "tables", "seeds"),
    [
        (BASE, [TABLE], [0]),
        (BASE, [TABLE, get_table("3b")], [0, 1, 2]),
        (override(BASE, {"train.seed": 7}), [TABLE], [7]),
        (override(BASE, {"data.root": "/elsewhere", "train.log_every": 3}), [TABLE], [0]),
    ],
    ids=["the same", "more tables and seeds", "other seeds", "another place"],
)
def test_what_changes_no_trial_is_fine(tmp_path, base, tables, seeds):
    begin(tmp_path)
    require_same_sweep(tmp_path, make_plan(base, tables, seeds))


def test_a_weights_file_may_move_but_not_change(tmp_path):
    here, there, other = (
        override(BASE, {"network.pretrained": False, "network.weights": path})
        for path in ("/a/vit.pth", "/b/vit.pth", "/a/deit.pth")
    )
    begin(tmp_path, base=here)
    require_same_sweep(tmp_path, make_plan(there, [TABLE], [0]))
    with pytest.raises(ValueError, match=r"network.weights /a/vit.pth -> /a/deit.pth"):
        require_same_sweep(tmp_path, make_plan(other, [TABLE], [0]))


def test_other_settings_are_refused_with_each_difference(tmp_path):
    begin(tmp_path)
    changed = override(BASE, {"train.iterations": 20, "threshold.xi": 0.4})
    with pytest.raises(ValueError, match=r"got threshold.xi 0.45 -> 0.4; train.iterations 10 -> 20; go on"):
        require_same_sweep(tmp_path, make_plan(changed, [TABLE], [0]))


def test_a_row_that_changed_under_its_name_is_refused(tmp_path):
    begin(tmp_path)
    table = Table(name="mine", title="", arms=(Arm("full"), Arm("weak", {"csc.weight": 0.2})))
    with pytest.raises(ValueError, match=r"got row mine/weak: csc.weight 0.1 -> 0.2; go on"):
        require_same_sweep(tmp_path, make_plan(BASE, [table], [0]))


def test_a_new_row_of_a_known_table_is_fine(tmp_path):
    begin(tmp_path)
    table = Table(name="mine", title="", arms=(*TABLE.arms, Arm("strong", {"csc.weight": 0.5})))
    require_same_sweep(tmp_path, make_plan(BASE, [table], [0]))


def test_a_relative_value_is_compared_as_what_it_comes_to(tmp_path):
    relative = Table(name="mine", title="", arms=(Arm("full"), Arm("weak", {"csc.weight": times(1.0)})))
    begin(tmp_path, [relative])
    require_same_sweep(tmp_path, make_plan(BASE, [relative], [0]))


def test_trials_taken_from_earlier_runs_are_remembered(tmp_path):
    plan = begin(tmp_path, reused={})
    assert taken_before(tmp_path) == {}
    name = plan.trials[-1].name
    begin(tmp_path, reused={name: "abc"})
    assert taken_before(tmp_path) == {name: "abc"}


def test_a_torn_plan_counts_as_none(tmp_path):
    (tmp_path / "plan.json").write_text('{"config": ')
    assert read_plan(tmp_path) == {}
