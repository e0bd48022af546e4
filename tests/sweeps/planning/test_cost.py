"""Hours are made of measured speeds alone, phase by phase, evaluations apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from cosa.config import Config, TrainConfig, override, to_json
from cosa.distributed.session import TrialResources
from cosa.tracking import costs
from sweeps.planning import cost
from sweeps.planning.cost import Speed
from sweeps.planning.plan import make_plan
from sweeps.tables import Arm, Table

BASE = override(Config(train=TrainConfig(iterations=100, warmup=40, batch_size=8)), {"evaluation.every": 30})
TABLE = Table(name="t", title="", reference="a", arms=(Arm("a"), Arm("b", {"csc.weight": 0.0})))
HOST = {"cosa.host.system": "Linux", "cosa.host.cpus": "2", "cosa.host.gpus": "none"}


class Store:
    """Answers for finished runs, newest first."""

    def __init__(self, *runs):
        self.runs = runs

    def search_runs(self, experiments, query, max_results):
        return list(self.runs)

    def download_artifacts(self, run_id, name, folder):
        files = next(run.files for run in self.runs if run.info.run_id == run_id)
        if name not in files:
            raise OSError
        path = Path(folder) / name
        path.write_text(files[name])
        return str(path)


def run(speed, *, config=BASE, seconds=None, number=0, **tags):
    result = {} if seconds is None else {"result.json": json.dumps({"seconds": seconds})}
    return SimpleNamespace(
        info=SimpleNamespace(run_id=f"run{number}"),
        data=SimpleNamespace(
            metrics={"train/images_per_second": speed},
            tags={**HOST, **{key.replace("_in_", "."): value for key, value in tags.items()}},
        ),
        files={"config.json": to_json(config), **result},
    )


def test_a_shared_warmup_and_its_forks_are_counted_once_each():
    trials = make_plan(BASE, [TABLE], [0]).trials
    hour = Speed(3600.0, 7200.0, 3600 * 15.0, runs=2, hardware="", on_gpu=False)
    training, evaluations = 40 * 1 + 2 * 60 * 2, (2 + 3 + 3) * 15  # after 30, 40 | 60, 90, 100 each
    assert cost.price(trials, hour, TrialResources()) == (
        f"about {training + evaluations:.2g} core-hours, evaluations {evaluations:.2g} of them"
    )


@pytest.mark.parametrize(
    ("first", "last", "count"), [(0, 100, 4), (40, 100, 3), (0, 90, 3), (0, 20, 1), (30, 60, 1)]
)
def test_there_is_always_an_evaluation_after_the_last_step(first, last, count):
    assert cost.evaluations_of(BASE, first, last) == count


def test_speeds_are_told_apart_by_phase():
    store = Store(
        run(8.0, number=0, cosa_in_kind="warmup"),
        run(4.0, number=1, cosa_in_forked_from="x"),
        run(2.0, number=2),
    )
    speed = cost.measured(store, "1", BASE)
    assert (speed.warmup, speed.cotraining, speed.runs) == (1.0, 2.0, 3)


def test_a_phase_that_nobody_ran_alone_has_the_mean_of_all():
    speed = cost.measured(Store(run(8.0, number=0, cosa_in_kind="warmup"), run(2.0, number=1)), "1", BASE)
    assert (speed.warmup, speed.cotraining) == (1.0, 2.5)


def test_what_an_evaluation_takes_is_the_rest_of_a_runs_time():
    speed = cost.measured(Store(run(8.0, seconds=140.0)), "1", BASE)
    assert speed.evaluation == pytest.approx((140 - 100) / 4)


def test_runs_that_evaluate_otherwise_say_nothing_of_evaluations():
    other = override(BASE, {"evaluation.size": 99})
    speed = cost.measured(Store(run(8.0, seconds=140.0, config=other)), "1", BASE)
    assert (speed.warmup, speed.evaluation) == (1.0, None)
    assert "evaluations not included" in cost.price(
        make_plan(BASE, [TABLE], [0]).trials, speed, TrialResources()
    )


@pytest.mark.parametrize(
    "change", [{"network.depth": 3}, {"cam.scales": (1.0, 0.5)}, {"train.precision": "bf16"}]
)
def test_runs_of_another_cost_do_not_count(change):
    assert cost.measured(Store(run(8.0, config=override(BASE, change))), "1", BASE) is None


def test_what_costs_nothing_may_differ():
    other = override(BASE, {"csc.weight": 0.0, "network.pretrained": False, "train.seed": 3})
    assert cost.measured(Store(run(8.0, config=other)), "1", BASE) is not None


def test_only_the_newest_runs_hardware_counts():
    store = Store(run(8.0, number=0), run(80.0, number=1, **{"cosa.host.gpus": "1 x H"}))
    speed = cost.measured(store, "1", BASE)
    assert (speed.warmup, speed.runs) == (1.0, 1)


def test_core_hours_count_the_cores_and_gpu_hours_the_gpus():
    trials = make_plan(BASE, [TABLE], [0]).trials
    slow = Speed(36.0, 36.0, 0.0, runs=1, hardware="x", on_gpu=False)  # 160 iterations: 1.6 hours
    assert "about 6.4 core-hours" in cost.price(trials, slow, TrialResources(cpus=4.0))
    half = TrialResources(cpus=4.0, gpus=0.5)
    assert "about 0.8 GPU-hours" in cost.price(trials, dataclasses.replace(slow, on_gpu=True), half)


def test_without_a_finished_run_nothing_is_said():
    assert cost.measured(Store(), "1", BASE) is None


GPU = {"cosa.host.gpus": "1 x H"}
MEASURED = {"cost/seconds": 3600.0, "cost/gpu_hours": 1.0, "cost/peak_memory_gib": 9.5}


def on_gpu(number=0, *, config=BASE, tags=GPU, **changes):
    found = run(8.0, number=number, config=config, **tags)
    found.data.metrics |= {**MEASURED, **{f"cost/{name}": value for name, value in changes.items()}}
    return found


def expected_gib(*runs, workers=1, config=BASE):
    return costs.expected_gib(config, workers, costs.runs_like(Store(*runs), "1", config))


def test_the_memory_of_a_trial_is_the_most_that_runs_like_it_took():
    assert expected_gib(on_gpu(), on_gpu(1, peak_memory_gib=11.0)) == (11.0, "the most of 2 finished like it")


@pytest.mark.parametrize(
    "other",
    [
        on_gpu(gpu_hours=2.0),  # half of the batch on each of two
        on_gpu(tags={**GPU, "cosa.kind": "warmup"}),
        on_gpu(tags={}, gpu_hours=0.0),  # a CPU's memory
        on_gpu(config=override(BASE, {"evaluation.batch_size": 2})),
        on_gpu(config=override(BASE, {"data.crop_size": 224})),
    ],
)
def test_where_nobody_measured_the_formula_tells_memory(other):
    gib, why = expected_gib(other)
    assert why.startswith("at most")
    assert gib == pytest.approx(1.72 + 8 * 11.14, abs=0.05)  # the paper: 1.72 and two images are 24


def test_the_formula_scales_with_pixels_and_with_the_network():
    parameters, each = costs.size_of(BASE)
    quarter, half = ({"data.crop_size": 224}, 1 / 4), ({"network.depth": 6, "network.pretrained": False}, 1)
    for changes, part in (quarter, half):  # maps in the size of the crop do not shrink with the network
        assert costs.size_of(override(BASE, changes))[1] == pytest.approx(each * part)
    assert costs.size_of(override(BASE, half[0]))[0] < parameters
    assert costs.images_on(24, parameters, each) == 2


def test_runs_tell_their_speed_and_what_of_it_the_loader_held_up():
    like = costs.runs_like(Store(on_gpu(loader_wait=0.25), on_gpu(1)), "1", BASE)
    assert costs.speed_text(like).startswith("8 images/s, 25% of the time waiting for the loader, mean of 2")
    assert costs.speed_text([]) == ""
