"""Arms x seeds become distinct trials that share their warm-ups."""

from __future__ import annotations

import json

import pytest

from cosa.config import IMAGENET_MEAN, Config, TrainConfig, identity, override, warmup_identity
from sweeps.planning import plan as planning
from sweeps.planning.plan import make_plan
from sweeps.tables import Arm, Table, get_table

BASE = Config(train=TrainConfig(iterations=10, warmup=4))


def table_of(*changes, name="t"):
    arms = tuple(Arm(f"arm{i}", change) for i, change in enumerate(changes))
    return Table(name=name, title="", reference="arm0", arms=arms)


def test_table_3_over_three_seeds_is_33_trials_and_3_warmups():
    plan = make_plan(BASE, [get_table("3a"), get_table("3b")], [0, 1, 2])
    kinds = [trial.kind for trial in plan.trials]
    assert (kinds.count("trial"), kinds.count("warmup")) == (33, 3)


def test_equal_rows_of_two_tables_are_one_trial_that_names_both():
    plan = make_plan(BASE, [get_table("3a"), get_table("3b")], [0])
    full = [t for t in plan.trials if t.kind == "trial" and identity(t.config) == identity(BASE)]
    assert [trial.arms for trial in full] == [("3a/full", "3b/full")]


def test_arms_fork_from_a_warmup_that_is_their_own():
    plan = make_plan(BASE, [get_table("3a")], [0, 1])
    for trial in plan.trials:
        if trial.kind == "trial":
            warmup = plan.named(trial.warmup)
            assert warmup.seed == trial.seed
            assert warmup_identity(warmup.config) == warmup_identity(trial.config)


def test_a_warmup_comes_before_the_trials_that_fork_from_it():
    plan = make_plan(BASE, [get_table("3a")], [0, 1])
    seen = set()
    for trial in plan.trials:
        assert trial.warmup is None or trial.warmup in seen
        seen.add(trial.name)


def test_an_arm_that_changes_the_warmup_does_not_share_it():
    plan = make_plan(BASE, [table_of({}, {"csc.weight": 0.0}, {"optim.lr": 0.9})], [0])
    warmups = {trial.arms: trial.warmup for trial in plan.trials if trial.kind == "trial"}
    assert warmups["t/arm0",] is not None
    assert warmups["t/arm0",] == warmups["t/arm1",]
    assert warmups["t/arm2",] is None


def test_without_a_warmup_phase_nothing_is_shared():
    base = override(BASE, {"train.warmup": 0})
    plan = make_plan(base, [get_table("3a")], [0])
    assert {trial.kind for trial in plan.trials} == {"trial"}
    assert {trial.first_step for trial in plan.trials} == {0}


def test_iterations_are_counted_with_and_without_sharing():
    plan = make_plan(BASE, [table_of({}, {}, {"csc.weight": 0.0})], [0])
    # Three rows of 10 steps; two distinct; one warm-up of 4 and twice the 6 steps after it.
    assert (plan.row_iterations, plan.distinct_iterations, plan.iterations) == (30, 20, 16)


def test_names_do_not_depend_on_which_tables_are_asked_for():
    both = make_plan(BASE, [get_table("3a"), get_table("3b")], [0])
    alone = make_plan(BASE, [get_table("3b")], [0])
    assert {trial.name for trial in alone.trials} <= {trial.name for trial in both.trials}


def test_names_are_unique():
    plan = make_plan(BASE, [get_table("3a"), get_table("3b")], range(5))
    assert len({trial.name for trial in plan.trials}) == len(plan.trials)


def test_changed_settings_give_other_trials():
    names = {t.name for t in make_plan(BASE, [get_table("3b")], [0]).trials if t.kind == "trial"}
    changed = override(BASE, {"c2s.weight": 0.2})
    assert names.isdisjoint(t.name for t in make_plan(changed, [get_table("3b")], [0]).trials)


def test_changed_cotraining_settings_keep_the_warmup():
    def warmups(base):
        trials = make_plan(base, [get_table("3b")], [0]).trials[:1]
        return {(t.name, warmup_identity(t.config)) for t in trials}

    assert warmups(BASE) == warmups(override(BASE, {"c2s.weight": 0.2, "threshold.xi": 0.3}))


def test_one_warmup_carries_the_momenta_of_all_its_arms():
    arms = table_of({}, {"ema.momentum": 0.9}, {"ema.momentum": 0.5}, {"ema.momentum": 0.9, "csc.weight": 0})

    warmup, *trials = make_plan(BASE, [arms], [0]).trials

    assert warmup.momenta == (0.5, 0.9)
    assert warmup.config.ema == BASE.ema
    assert {trial.warmup for trial in trials} == {warmup.name}


def test_a_warmup_that_carries_other_momenta_has_another_folder():
    def warmup(*momenta):
        arms = table_of({}, *({"ema.momentum": m} for m in momenta))
        return make_plan(BASE, [arms], [0]).trials[0].name

    assert len({warmup(0.9), warmup(0.5), warmup(0.5, 0.9)}) == 3


def test_a_warmup_is_evaluated_at_the_settings_of_its_sweep():
    base = override(BASE, {"threshold.xi": 0.3, "csc.epsilon": 2.0})

    warmup = make_plan(base, [get_table("3b")], [0]).trials[0].config

    assert (warmup.threshold.xi, warmup.csc.epsilon) == (0.3, 2.0)


def test_finished_trials_and_warmups_nobody_needs_do_not_remain():
    plan = make_plan(BASE, [table_of({}, {"csc.weight": 0.0})], [0, 1])
    warmup0, first0, second0, warmup1, first1, second1 = plan.trials
    assert plan.remaining([]) == list(plan.trials)
    assert plan.remaining([warmup0.name, first0.name]) == [second0, warmup1, first1, second1]
    assert plan.remaining([first0.name, second0.name]) == [warmup1, first1, second1]


def test_the_tree_tells_earlier_runs_from_own_ones():
    plan = make_plan(BASE, [table_of({}, {"csc.weight": 0.0})], [0])
    first, second = (trial.name for trial in plan.trials[1:])
    tree = planning.draw_tree(plan, finished={first}, reused={second})
    assert "t/arm1  finished in an earlier run" in tree
    assert "finished already: 1; taken from earlier runs: 1; left to train: 0 trials, 0 iterations" in tree


def test_the_plan_as_json_names_the_earlier_runs():
    plan = make_plan(BASE, [table_of({}, {"csc.weight": 0.0})], [0])
    content = json.loads(planning.to_json(plan, {plan.trials[1].name: "abc"}))
    assert [trial.get("run") for trial in content["trials"]] == [None, "abc", None]


def test_the_tree_shows_every_trial_and_the_saving():
    plan = make_plan(BASE, [table_of({}, {}, {"csc.weight": 0.0})], [0])
    tree = planning.draw_tree(plan, finished={plan.trials[0].name})
    assert "3 rows, 2 distinct trials, 1 shared warm-up" in tree
    assert "30 for every row on its own, 20 with equal rows merged, 16 with shared warm-ups" in tree
    assert "finished already: 1; left to train: 2 trials, 12 iterations" in tree
    assert "t/arm0 t/arm1" in tree


def test_the_plan_as_json_names_rows_and_identities():
    plan = make_plan(BASE, [table_of({}, {"csc.weight": 0.0})], [3])
    content = json.loads(planning.to_json(plan))
    assert content["seeds"] == [3]
    assert [trial["kind"] for trial in content["trials"]] == ["warmup", "trial", "trial"]
    assert content["trials"][1]["identity"] == identity(plan.trials[1].config)


def test_an_arm_with_an_unknown_setting_names_the_nearest_one():
    with pytest.raises(ValueError, match=r"got 'csc\.weigth'; did you mean 'csc\.weight'"):
        make_plan(BASE, [table_of({"csc.weigth": 0.0})], [0])


def test_a_plan_names_the_weights_that_each_arm_starts_from():
    arms = table_of({}, {"network.encoder": "vit_tiny_patch16_224"}, {"network.encoder": "test_vit"})

    plan = make_plan(override(BASE, {"network.encoder": "deit_tiny_patch16_224"}), [arms], [0])

    starts = [(t.config.network.encoder, t.config.data.mean) for t in plan.trials]
    assert starts == [
        ("deit_tiny_patch16_224.fb_in1k", IMAGENET_MEAN),
        ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", (0.5, 0.5, 0.5)),
        ("test_vit.r160_in1k", (0.5, 0.5, 0.5)),
    ]
    assert plan.base == plan.trials[0].config


# Standalone networks

NETWORK = {
    "network.architecture": "deeplabv3plus",
    "network.encoder": "resnet18",
    "network.pretrained": False,
    "network.aux_head": False,
}
TAUGHT = table_of({}, NETWORK, {**NETWORK, "optim.lr": 0.9})


def test_standalone_networks_wait_for_the_pseudo_labels_of_their_seed_s_full_model():
    plan = make_plan(BASE, [TAUGHT], [0, 1])

    for seed in (0, 1):
        full, labels, *networks = [trial for trial in plan.trials if trial.seed == seed]
        assert [full.kind, labels.kind, *(t.kind for t in networks)] == ["trial", "labels", "trial", "trial"]
        assert (full.after, labels.after) == (None, full.name)
        assert [trial.after for trial in networks] == [labels.name] * 2
        assert labels.arms == ("t/arm1", "t/arm2")
        assert (labels.identity, labels.steps, labels.label) == (
            full.identity,
            0,
            f"pseudo-labels, seed {seed}",
        )


def test_pseudo_labels_are_of_the_model_without_changes_beside_others():
    plan = make_plan(BASE, [table_of({}, {"csc.weight": 0.0}, NETWORK)], [0])

    warmup, full, _, labels, network = plan.trials
    assert (full.warmup, full.config) == (warmup.name, override(plan.base, {"train.seed": 0}))
    assert (labels.source, network.source) == (full.name, labels.name)


def test_standalone_networks_without_the_model_that_teaches_them_are_refused():
    with pytest.raises(ValueError, match="must hold an arm without changes beside t/arm1, which learns"):
        make_plan(BASE, [table_of({"csc.weight": 0.0}, NETWORK)], [0])


def test_pseudo_labels_are_made_again_only_for_a_network_that_still_needs_them():
    plan = make_plan(BASE, [TAUGHT], [0])
    full, labels, one, other = (trial.name for trial in plan.trials)

    def left(*finished):
        return [trial.name for trial in plan.remaining(finished)]

    assert left() == [full, labels, one, other]
    assert left(full) == [labels, one, other]
    assert left(full, labels, one) == [other]
    assert left(full, one) == [labels, other]
    assert left(full, one, other) == []
    assert left(one, other) == [full]


def test_the_tree_shows_what_waits_for_what():
    tree = planning.draw_tree(make_plan(BASE, [TAUGHT], [0]))

    assert tree.splitlines()[1:5] == [
        "└─ arm0, seed 0                            10 iterations  t/arm0",
        "   └─ pseudo-labels, seed 0",
        "      ├─ arm1, seed 0                      10 iterations  t/arm1",
        "      └─ arm2, seed 0                      10 iterations  t/arm2",
    ]
