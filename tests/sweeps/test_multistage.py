"""The script of CoSA-MS: which rows it plans, from what, and what each of them waits for."""

from __future__ import annotations

import pytest

from cosa.config import Config, override, to_json
from cosa.config.presets import get_preset
from cosa.config.recipes import RECIPES, STANDALONE
from cosa.networks.published import pinned
from sweeps.multistage import NETWORKS, SUPERVISED, main, multistage_table
from sweeps.planning.plan import make_plan
from sweeps.running import driver
from sweeps.tuning import driver as search


def plan_of(preset, **changes):
    base = pinned(override(get_preset(preset), {"data.root": "elsewhere", **changes}))
    return make_plan(base, [multistage_table(base, supervised=True)], [3])


@pytest.mark.parametrize("preset", ["shapes", "voc", "voc_tiny", "coco", "coco_tiny"])
def test_each_network_is_what_its_recipe_makes_of_the_preset(preset):
    plan = plan_of(preset)
    found = {trial.arm: trial.config for trial in plan.trials if trial.kind == "trial"}

    recipe = {
        name: pinned(RECIPES[key](override(plan.base, {"train.seed": 3}))) for name, key in NETWORKS.items()
    }
    for name, config in recipe.items():
        own = override(config, {"data.mean": found[name].data.mean, "data.std": found[name].data.std})
        assert found[name] == own
        assert found[f"{name}-masks"].segmentation.supervision == "masks"
    assert found["CoSA"] == override(plan.base, {"train.seed": 3})
    assert {config.data.root for config in found.values()} == {"elsewhere"}


def test_a_network_s_own_colours_are_not_those_of_cosa_s_encoder():
    plan = plan_of("voc_tiny", **{"data.mean": (0.5, 0.5, 0.5), "data.std": (0.5, 0.5, 0.5)})
    taught = next(trial.config for trial in plan.trials if trial.arm == "R101")

    assert taught.data.mean == pinned(Config(network=taught.network)).data.mean != (0.5, 0.5, 0.5)


def test_supervised_rows_wait_for_nothing_and_are_oracles():
    plan = plan_of("shapes")
    bounds = [trial for trial in plan.trials if trial.arm.endswith("-masks")]

    assert {trial.arm.removesuffix("-masks") for trial in bounds} == SUPERVISED.keys()
    assert all(trial.config.oracle and trial.after is None for trial in bounds)
    taught = [trial for trial in plan.trials if trial.arm in NETWORKS]
    assert {trial.after for trial in taught} == {
        next(trial.name for trial in plan.trials if trial.kind == "labels")
    }


def test_without_the_switch_there_are_no_supervised_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    assert main(["--preset", "shapes", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "tables 2 x 1 seed: 4 rows, 4 distinct trials" in shown
    assert "oracle" not in shown
    assert "pseudo-labels, seed 0" in shown

    assert main(["--preset", "shapes", "--supervised", "--dry-run"]) == 0
    assert capsys.readouterr().out.count("(oracle: trains on ground-truth masks)") == 4
    assert [*tmp_path.iterdir()] == []


def test_one_network_s_settings_change_in_its_rows_alone():
    base = pinned(override(get_preset("shapes"), {"data.root": "elsewhere"}))
    table = multistage_table(base, supervised=True, settings={"SWIN": ["optim.lr=0.5", "train.iterations=7"]})
    found = {trial.arm: trial.config for trial in make_plan(base, [table], [0]).trials if trial.arm}
    plain = make_plan(base, [multistage_table(base, supervised=True)], [0])

    for trial in plain.trials:
        if trial.arm in ("SWIN", "SWIN-masks"):
            assert found[trial.arm] == override(trial.config, {"optim.lr": 0.5, "train.iterations": 7})
        elif trial.arm:
            assert found[trial.arm] == trial.config


@pytest.mark.parametrize("given", [["WR39", "optim.lr=1"], ["WR38"], ["CoSA", "optim.lr=1"]])
def test_settings_of_a_network_that_is_none_are_refused(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    assert main(["--set-network", *given, "--dry-run"]) == 2
    assert "--set-network must be one of R101, WR38, SWIN, ViT-B" in capsys.readouterr().err


def test_weights_that_a_later_stage_lacks_are_missed_before_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    full = ["--set-network", "WR38", "network.encoder=wideresnet38"]

    assert main([*full, "--dry-run"]) == 0
    assert "before training: network.weights must name a file" in capsys.readouterr().err
    assert main(full) == 2
    assert "network.weights must name a file" in capsys.readouterr().err
    assert main([*full, "network.weights=away.safetensors"]) == 2
    error = capsys.readouterr().err
    assert "network.weights must be a file" in error
    assert str(tmp_path / "away.safetensors") in error
    assert not (tmp_path / "runs/mlflow.db").exists()


def test_a_row_for_each_network_that_is_named_once():
    base = pinned(override(get_preset("shapes"), {"data.root": "elsewhere"}))
    table = multistage_table(base, networks=["ViT-B", "SWIN", "ViT-B"], supervised=False)

    assert [arm.name for arm in table.arms] == ["CoSA", "ViT-B", "SWIN"]


@pytest.mark.parametrize(
    "script", [lambda given: driver.main("ablation", "", ("3b",), given), main, search.main]
)
def test_settings_of_a_standalone_network_are_no_preset_of_a_sweep(script, tmp_path, capsys):
    (tmp_path / "taught.json").write_text(to_json(STANDALONE["shapes_upernet"]()))

    assert script(["--preset", "taught.json", "--dry-run"]) == 2

    error = capsys.readouterr().err
    assert "network.architecture must be cosa in a sweep's preset, got 'upernet'; standalone" in error
    assert error.count("\n") == 1
