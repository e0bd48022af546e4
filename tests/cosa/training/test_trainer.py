"""One training run: what it leaves, how it goes on, what it refuses, and that N workers are as one."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import pickle
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import multiprocessing

from cosa.config import Config, from_json, identity, override, to_json
from cosa.data import open_dataset, step_names
from cosa.data.shapes import write_shapes
from cosa.evaluation.panels import PanelRow, panel_rows
from cosa.networks.network import CosaNetwork
from cosa.networks.published import pinned
from cosa.storage import checkpoint
from cosa.storage.run_folder import read_metrics
from cosa.tracking import TrackingSpec
from cosa.training import state as steps_state
from cosa.training import step, swap, trainer, validation
from cosa.training.optim import learning_rate_scale
from cosa.training.step import TrainingState
from cosa.training.trainer import NonFiniteLossError, Result, RunSpec, TrainProgress
from tests.cosa.runs import (
    Recorder,
    differences,
    read_journal,
    saved_state,
    step_files,
    train,
    work,
)

STEPS, WARMUP = 7, 3


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu() -> Iterator[None]:
    """Bit for bit is a promise for the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    """Both phases, all that is random, and a padding in some of the images."""
    return override(
        tiny_config,
        {
            "data.scale_min": 0.3,
            "network.drop_path": 0.2,
            "cam.stride": 2,
            "threshold.queue": 3,
            "csc.max_anchors": 16,
            "train.iterations": STEPS,
            "train.warmup": WARMUP,
            "train.accumulate": 2,
            "train.checkpoint_every": 1,
            "train.keep_checkpoints": STEPS,
            "evaluation.every": 4,
            "evaluation.panel_images": 0,
        },
    )


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run that nothing disturbed; treat it as read-only."""
    return train(config, out=tmp_path_factory.mktemp("whole"))


@pytest.fixture
def short(tiny_config: Config) -> Config:
    """Two steps, one of them of warm-up."""
    return override(tiny_config, {"evaluation.panel_images": 0})


class StopError(Exception):
    """What interrupts a run in these tests."""


def stop_after(last: int) -> Callable[[TrainProgress], None]:
    def report(progress: TrainProgress) -> None:
        if progress.step == last:
            raise StopError

    return report


def as_text(result: Result) -> str:
    return json.dumps(dataclasses.asdict(result), default=str)  # in which NaN is NaN


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


# What a run leaves


def test_a_run_leaves_what_the_module_s_docstring_says(tiny_config: Config, tmp_path: Path) -> None:
    result = train(tiny_config, out=tmp_path)

    assert sorted(files(tmp_path)) == [
        "analysis/step_00000002.json",
        "checkpoints/step_00000001.pt",
        "checkpoints/step_00000001.pt.sha256",
        "checkpoints/step_00000002.pt",
        "checkpoints/step_00000002.pt.sha256",
        "config.json",
        "journal.jsonl",
        "model/config.json",
        "model/model.json",
        "model/model.safetensors",
        "panels/step_00000002.npz",
        "panels/step_00000002.png",
        "result.json",
    ]
    assert from_json((tmp_path / "config.json").read_text()) == pinned(tiny_config)
    assert result.checkpoint == tmp_path / "checkpoints/step_00000002.pt"
    assert (result.step, result.out, result.run_id) == (2, tmp_path, None)
    with Image.open(tmp_path / "panels/step_00000002.png") as panel:
        assert len(panel.getcolors(1_000_000)) > 50


def test_result_json_tells_what_the_call_hands_back(whole: Result, config: Config) -> None:
    told = json.loads((whole.out / "result.json").read_text())

    assert told["step"] == whole.step == STEPS
    assert told["identity"] == identity(config)
    assert repr(told["metrics"]) == repr(whole.metrics)
    assert told["data_fingerprint"] == open_dataset(config.data, "train_aug").fingerprint()


def test_result_json_holds_every_class_and_curve_of_both_networks(whole: Result) -> None:
    told = json.loads((whole.out / "result.json").read_text())

    for network in ("assignment", "online"):
        assert "background" in told[network]["per_class"]["seg_iou"]
        assert told[network]["curves"].keys() == {"cam", "aux_cam"}


def test_the_final_assignment_network_is_that_of_the_last_checkpoint(whole: Result) -> None:
    final = load_file(whole.out / "model/model.safetensors")

    kept = checkpoint.load(whole.checkpoint)["assignment"]
    assert final.keys() == kept.keys()
    assert all(torch.equal(final[name], kept[name]) for name in final)


def test_the_journal_has_every_metric_with_its_step(whole: Result) -> None:
    entries = read_journal(whole.out)

    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    warmup, cotraining = entries[0].keys(), entries[WARMUP].keys()
    assert {f"train/loss/{name}" for name in ("cls", "aux_cls", "total")} <= warmup
    assert {f"train/loss/{name}" for name in ("c2s", "aux_c2s", "s2c", "csc")} <= cotraining - warmup
    assert {"train/threshold", "train/aux_threshold"} <= cotraining - warmup
    assert [any(key.startswith("val/") for key in entry) for entry in entries] == [
        entry["step"] in {4, STEPS} for entry in entries
    ]


def test_the_total_is_the_objective_of_the_terms(whole: Result, config: Config) -> None:
    for entry in read_journal(whole.out):
        terms = {
            name: torch.tensor(entry[f"train/loss/{name}"])
            for name in step.TERMS
            if f"train/loss/{name}" in entry
        }
        assert entry["train/loss/total"] == pytest.approx(float(swap.objective(terms, config)))


def test_every_step_has_the_learning_rate_of_the_schedule(whole: Result, config: Config) -> None:
    rates = [entry["train/learning_rate"] for entry in read_journal(whole.out)]

    scales = [learning_rate_scale(number, STEPS, config.optim) for number in range(STEPS)]
    assert rates == pytest.approx([config.optim.lr * scale for scale in scales])


def test_a_run_in_bf16_trains_and_is_judged(tiny_config: Config, tmp_path: Path) -> None:
    result = train(override(tiny_config, {"train.precision": "bf16"}), out=tmp_path)

    assert 0 <= result.metrics["val/assignment/seg_miou"] < 1
    assert {tensor.dtype for tensor in load_file(tmp_path / "model/model.safetensors").values()} == {
        torch.float32
    }


@pytest.mark.parametrize(("precision", "warned"), [("bf16", True), ("fp32", False)])
def test_a_run_whose_bf16_is_emulated_says_so(
    tiny_config: Config,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    warned: bool,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")

    train(override(tiny_config, {"train.precision": precision}), out=tmp_path, stop_at=1)

    line = "train.precision bf16 is emulated on this cpu, many times slower: take fp32"
    assert (line in caplog.messages) is warned


def test_a_run_tells_what_it_took(short: Config, tmp_path: Path) -> None:
    tracker = Recorder()

    result = train(short, out=tmp_path, tracker=tracker)

    weights = load_file(tmp_path / "model/model.safetensors").values()
    assert tracker.costs["cost/parameters"] == sum(tensor.numel() for tensor in weights)
    assert tracker.costs["cost/seconds"] == result.seconds
    assert tracker.costs["cost/gpu_hours"] == 0
    assert 0.01 < tracker.costs["cost/peak_memory_gib"] < 100
    assert tracker.costs["cost/evaluation_images_per_second"] > 0
    assert 0 < tracker.costs["cost/loader_wait"] < 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the most of a process cannot be forgotten")
def test_the_most_memory_is_that_of_the_run_and_not_of_the_process(short: Config, tmp_path: Path) -> None:
    tracker, earlier = Recorder(), len(b"x" * 2**30)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    train(short, out=tmp_path, tracker=tracker)

    assert most > earlier
    assert tracker.costs["cost/peak_memory_gib"] * 2**30 < most - earlier / 2


def test_result_json_is_written_after_everything_else(
    short: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, really = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda old, new: (really(old, new), written.append(new.name))[0])

    train(short, out=tmp_path)

    assert written[-3:] == ["config.json", "model.json", "result.json"]
    assert written.count("result.json") == 1


def test_only_as_many_checkpoints_stay_as_are_to_be_kept(short: Config, tmp_path: Path) -> None:
    train(override(short, {"train.iterations": 4, "train.keep_checkpoints": 3}), out=tmp_path)

    assert step_files(tmp_path) == ["step_00000002.pt", "step_00000003.pt", "step_00000004.pt"]


def test_whoever_listens_hears_of_metrics_and_of_checkpoints_that_are_there(
    config: Config, tmp_path: Path
) -> None:
    heard = []

    def report(progress: TrainProgress) -> None:
        kept = progress.checkpoint is not None and progress.checkpoint.is_file()
        heard.append((progress.step, bool(progress.metrics), kept))
        assert progress.iterations == STEPS
        assert progress.images_per_second > 0
        assert progress.seconds_left >= 0

    rare = {"train.log_every": 2, "train.checkpoint_every": 3, "evaluation.every": 6}
    train(override(config, rare), out=tmp_path, report=report)

    assert heard == [
        (2, True, False),
        (3, False, True),
        (4, True, False),
        (6, True, True),
        (7, True, True),
    ]


def test_the_tracker_is_told_what_the_journal_holds_and_how_it_ended(
    tiny_config: Config, tmp_path: Path
) -> None:
    tracker = Recorder()

    result = train(tiny_config, out=tmp_path, tracker=tracker)

    first, second = read_metrics(tmp_path)
    assert tracker.calls == [
        ("start", 0),
        ("metrics", 1, tuple(first[1])),
        ("artifact", "analysis/step_00000002.json"),
        ("artifact", "panels/step_00000002.png"),
        ("artifact", "panels/step_00000002.npz"),
        ("metrics", 2, tuple(second[1])),
        ("artifact", "model/model.safetensors"),
        ("artifact", "model/config.json"),
        ("artifact", "model/model.json"),
        ("artifact", "result.json"),
        ("finish", "FINISHED"),
    ]
    assert result.run_id == "run-7"


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (StopError, "FAILED")]
)
def test_the_tracker_is_told_of_an_end_before_the_end(
    short: Config, tmp_path: Path, error: type[BaseException], status: str
) -> None:
    tracker = Recorder()

    def report(progress: TrainProgress) -> None:
        raise error

    with pytest.raises(error):
        train(short, out=tmp_path, tracker=tracker, report=report)

    assert tracker.calls[-1] == ("finish", status)
    assert not (tmp_path / "result.json").exists()


# Going on


@pytest.mark.parametrize("last", [1, WARMUP, 5])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(
    config: Config, whole: Result, tmp_path: Path, last: int
) -> None:
    """Interrupted in the warm-up, at the change of phases, and in co-training."""
    with pytest.raises(StopError):
        train(config, out=tmp_path, report=stop_after(last))
    assert step_files(tmp_path)[-1] == f"step_{last:08d}.pt"

    result = train(config, out=tmp_path)

    for number in range(1, STEPS + 1):
        assert differences(saved_state(tmp_path, number), saved_state(whole.out, number)) == []
    assert read_journal(tmp_path) == read_journal(whole.out)
    assert repr(result.metrics) == repr(whole.metrics)


def test_what_came_after_the_checkpoint_is_trained_again_and_told_once(
    config: Config, whole: Result, tmp_path: Path
) -> None:
    rare = override(config, {"train.checkpoint_every": 2})
    with pytest.raises(StopError):
        train(rare, out=tmp_path, report=stop_after(5))
    assert [entry["step"] for entry in read_journal(tmp_path)] == [1, 2, 3, 4, 5]
    with (tmp_path / "journal.jsonl").open("a") as journal:
        journal.write('{"step": 6, "train/lo')  # a line that was torn

    train(rare, out=tmp_path)

    assert read_journal(tmp_path) == read_journal(whole.out)
    assert differences(saved_state(tmp_path, STEPS), saved_state(whole.out, STEPS)) == ["/config"]


def test_the_tracker_is_told_where_a_resumed_run_goes_on(short: Config, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        train(short, out=tmp_path, report=stop_after(1))
    tracker = Recorder()

    train(short, out=tmp_path, tracker=tracker)

    assert tracker.calls[0] == ("start", 1)


def test_a_torn_newest_checkpoint_is_skipped_for_the_one_before_with_a_warning(
    config: Config, whole: Result, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StopError):
        train(config, out=tmp_path, report=stop_after(5))
    torn = checkpoint.checkpoint_path(tmp_path / "checkpoints", 5)
    torn.write_bytes(torn.read_bytes()[:1000])

    with caplog.at_level(logging.WARNING, "cosa"):
        train(config, out=tmp_path)

    (record,) = caplog.records
    assert str(torn) in record.getMessage()
    assert read_journal(tmp_path) == read_journal(whole.out)
    assert differences(saved_state(tmp_path, STEPS), saved_state(whole.out, STEPS)) == []


def test_seconds_count_all_sessions_of_a_run(short: Config, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        train(short, out=tmp_path, report=stop_after(1))
    first = checkpoint.load(tmp_path / "checkpoints/step_00000001.pt")["seconds"]

    result = train(short, out=tmp_path)

    assert result.seconds > first > 0


def test_a_finished_run_called_again_does_nothing_and_says_the_same(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(tiny_config, out=tmp_path)
    before = files(tmp_path)

    def forbidden(*arguments: Any, **more: Any) -> Any:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(trainer, "COTRAINING", dataclasses.replace(trainer.COTRAINING, step=forbidden))
    monkeypatch.setattr(trainer, "evaluate_networks", forbidden)
    again = train(tiny_config, out=tmp_path, report=forbidden)

    assert as_text(again) == as_text(first)
    assert files(tmp_path) == before


def test_a_run_that_stopped_between_its_last_checkpoint_and_its_end_ends_whole(
    config: Config, whole: Result, tmp_path: Path
) -> None:
    with pytest.raises(StopError):
        train(config, out=tmp_path, report=stop_after(STEPS))
    assert not (tmp_path / "result.json").exists()

    train(config, out=tmp_path)

    found, expected = (json.loads((out / "result.json").read_text()) for out in (tmp_path, whole.out))
    assert found.pop("seconds") > 0
    assert expected.pop("seconds") > 0
    assert repr(found) == repr(expected)


def test_a_run_that_goes_on_beyond_where_it_was_stopped_is_not_finished_meanwhile(
    short: Config, tmp_path: Path
) -> None:
    config = override(short, {"train.iterations": 3})
    train(config, out=tmp_path, stop_at=2)
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 2

    with pytest.raises(StopError):
        train(config, out=tmp_path, report=stop_after(3))

    assert not (tmp_path / "result.json").exists()
    train(config, out=tmp_path)
    assert json.loads((tmp_path / "result.json").read_text())["step"] == 3


def test_a_run_stopped_on_purpose_keeps_the_schedule_of_the_whole(
    config: Config, whole: Result, tmp_path: Path
) -> None:
    result = train(config, out=tmp_path, stop_at=WARMUP)

    assert result.step == WARMUP
    state, expected = saved_state(tmp_path, WARMUP), saved_state(whole.out, WARMUP)
    evaluated = [name for name in differences(state, expected) if "/metrics" in name or "/details" in name]
    assert differences(state, expected) == evaluated  # a stop is judged, the middle of a run is not


def test_other_data_than_the_run_began_with_are_told(
    short: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shapes(tmp_path / "other", train_images=5, val_images=2)
    with pytest.raises(StopError):
        train(short, out=tmp_path / "run", report=stop_after(1))

    with caplog.at_level(logging.WARNING, "cosa"):
        train(override(short, {"data.root": str(tmp_path / "other")}), out=tmp_path / "run")

    assert [record.getMessage() for record in caplog.records] == [
        "data.root holds other images, masks or labels than 1 steps were trained on"
    ]


@pytest.mark.parametrize("change", [lambda names: [*names[1:], names[0]], lambda names: [*names, "extra"]])
def test_a_run_is_not_gone_on_with_when_its_classes_are_others_or_in_another_order(
    short: Config, tmp_path: Path, change: Callable[[list[str]], list[str]]
) -> None:
    write_shapes(tmp_path / "other", train_images=5, val_images=2)
    with pytest.raises(StopError):
        train(short, out=tmp_path / "run", report=stop_after(1))
    names = (tmp_path / "other/classes.txt").read_text().split()
    (tmp_path / "other/classes.txt").write_text("\n".join(change(names)))

    with pytest.raises(ValueError, match=r"classes must be those that .*run' was trained on, got "):
        train(override(short, {"data.root": str(tmp_path / "other")}), out=tmp_path / "run")


# Forking


ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "base": {
        "cam.source": "online",
        "threshold.mode": "fixed",
        "raw.enabled": False,
        "s2c.weight": 0,
        "csc.weight": 0,
    },
    "without c2s": {"c2s.weight": 0},
    "another threshold": {"threshold.queue": 5, "threshold.min_activation": -1},
    "scales": {"cam.scales": (1.0, 0.5), "cam.flip": False, "cam.stride": 1},
}


@pytest.fixture(scope="module")
def warmup(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a warm-up trained on its own."""
    return train(config, out=tmp_path_factory.mktemp("warmup"), stop_at=WARMUP).checkpoint


@pytest.mark.parametrize("arm", ARMS)
def test_a_forked_arm_is_the_arm_trained_from_its_beginning_bit_for_bit(
    config: Config, warmup: Path, tmp_path: Path, arm: str
) -> None:
    changed = override(config, ARMS[arm])

    forked = train(changed, out=tmp_path / "forked", fork_from=warmup)

    scratch = train(changed, out=tmp_path / "scratch")
    for number in range(WARMUP + 1, STEPS + 1):
        states = [saved_state(tmp_path / kind, number) for kind in ("forked", "scratch")]
        assert differences(*states) == []
    assert read_journal(forked.out) == read_journal(scratch.out, after=WARMUP)
    assert repr(forked.metrics) == repr(scratch.metrics)


def test_one_warm_up_carries_an_assignment_network_for_each_momentum(config: Config, tmp_path: Path) -> None:
    """Forked arms are those trained from their beginning, bit for bit, also where the warm-up was resumed."""
    with pytest.raises(StopError):
        train(config, out=tmp_path / "warmup", stop_at=WARMUP, momenta=(0.5, 1.0), report=stop_after(2))
    carrying = train(config, out=tmp_path / "warmup", stop_at=WARMUP, momenta=(0.5, 1.0)).checkpoint

    for momentum in (0.5, 1.0, config.ema.momentum):
        changed = override(config, {"ema.momentum": momentum})
        forked = train(changed, out=tmp_path / f"forked-{momentum}", fork_from=carrying)
        scratch = train(changed, out=tmp_path / f"scratch-{momentum}")
        assert differences(saved_state(forked.out, STEPS), saved_state(scratch.out, STEPS)) == []


def test_a_momentum_that_the_warm_up_does_not_carry_is_refused(
    config: Config, warmup: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"warm-up must carry an AN of momentum 0\.8, got only its own"):
        train(override(config, {"ema.momentum": 0.8}), out=tmp_path, fork_from=warmup)


def test_only_a_warm_up_carries_several_assignment_networks(config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop_at must end a warm-up of several momenta by 3, got 7"):
        train(config, out=tmp_path, momenta=(0.5,))


def test_a_fork_has_an_account_of_its_own(config: Config, warmup: Path, tmp_path: Path) -> None:
    tracker = Recorder()
    kept = checkpoint.load(warmup)
    assert kept["metrics"]

    with pytest.raises(StopError):
        train(config, out=tmp_path, fork_from=warmup, tracker=tracker, report=stop_after(WARMUP + 1))

    assert tracker.calls[0] == ("start", WARMUP)
    assert read_journal(tmp_path)[0]["step"] == WARMUP + 1
    forked = checkpoint.load(tmp_path / f"checkpoints/step_{WARMUP + 1:08d}.pt")
    assert forked["run_id"] == "run-7"


def test_an_interrupted_fork_goes_on_from_its_own_checkpoint(
    config: Config, whole: Result, warmup: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "warmup.pt"
    shutil.copy(warmup, moved)
    shutil.copy(checkpoint.hash_path(warmup), checkpoint.hash_path(moved))
    with pytest.raises(StopError):
        train(config, out=tmp_path / "run", fork_from=moved, report=stop_after(5))
    moved.unlink()

    train(config, out=tmp_path / "run", fork_from=moved)

    assert differences(saved_state(tmp_path / "run", STEPS), saved_state(whole.out, STEPS)) == []


@pytest.mark.parametrize("changes", [{"train.seed": 1}, {"optim.lr": 2e-3}, {"train.iterations": STEPS + 1}])
def test_a_fork_from_another_warm_up_is_refused(
    config: Config, warmup: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="fork_from must be this run's own warm-up after 3 steps, got"):
        train(override(config, changes), out=tmp_path, fork_from=warmup)

    assert files(tmp_path) == {}


@pytest.mark.parametrize("number", [WARMUP - 1, WARMUP + 1])
def test_a_fork_from_another_step_is_refused(
    config: Config, whole: Result, tmp_path: Path, number: int
) -> None:
    early = checkpoint.checkpoint_path(whole.out / "checkpoints", number)

    with pytest.raises(ValueError, match=f"after 3 steps, got .+ after {number} steps of warm-up"):
        train(config, out=tmp_path, fork_from=early)


def test_a_fork_from_nothing_is_refused(config: Config, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint must exist"):
        train(config, out=tmp_path, fork_from=tmp_path / "step_00000003.pt")


def test_a_fork_from_a_torn_warm_up_is_refused_in_one_line(
    config: Config, warmup: Path, tmp_path: Path
) -> None:
    torn = tmp_path / warmup.name
    torn.write_bytes(warmup.read_bytes()[:1000])
    shutil.copy(checkpoint.hash_path(warmup), checkpoint.hash_path(torn))

    with pytest.raises(ValueError, match="checkpoint must be whole") as refusal:
        train(config, out=tmp_path / "run", fork_from=torn)

    assert str(torn) in str(refusal.value)
    assert "\n" not in str(refusal.value)


# What is refused


def test_a_folder_of_another_run_is_refused_with_what_differs(short: Config, tmp_path: Path) -> None:
    train(short, out=tmp_path)
    before = files(tmp_path)

    other = override(short, {"csc.weight": 0.2, "train.seed": 3, "train.log_every": 7})
    with pytest.raises(ValueError, match=r"out must be a new folder or hold this very run") as refused:
        train(other, out=tmp_path)

    assert "csc.weight 0.1 -> 0.2" in str(refused.value)
    assert "train.seed 0 -> 3" in str(refused.value)
    assert "train.log_every" not in str(refused.value)  # it may differ
    assert files(tmp_path) == before


def test_what_belongs_to_the_machine_may_change_when_a_run_goes_on(
    config: Config, whole: Result, tmp_path: Path
) -> None:
    with pytest.raises(StopError):
        train(config, out=tmp_path, report=stop_after(5))

    train(override(config, {"train.log_every": 5, "evaluation.batch_size": 1}), out=tmp_path)

    assert differences(saved_state(tmp_path, STEPS), saved_state(whole.out, STEPS)) == ["/config"]


@pytest.mark.parametrize("stop_at", [0, -1, 3])
def test_a_stop_outside_of_the_run_is_refused(short: Config, tmp_path: Path, stop_at: int) -> None:
    with pytest.raises(ValueError, match=rf"stop_at must lie in \[1, 2\], got {stop_at}"):
        train(short, out=tmp_path, stop_at=stop_at)


def test_a_stop_in_the_past_is_refused(short: Config, tmp_path: Path) -> None:
    train(short, out=tmp_path)

    with pytest.raises(ValueError, match=r"stop_at must be at least 2, the steps that .+ got 1"):
        train(short, out=tmp_path, stop_at=1)


def test_an_unknown_coexistence_class_is_refused_before_anything_is_trained(
    short: Config, tmp_path: Path
) -> None:
    config = override(short, {"evaluation.coexistence": ("trian",)})

    with pytest.raises(
        ValueError, match=r"evaluation.coexistence must .+, got 'trian'; did you mean 'train'"
    ):
        train(config, out=tmp_path / "run")

    assert not (tmp_path / "run").exists()


def test_an_out_that_is_a_file_is_refused_in_one_line(short: Config, tmp_path: Path) -> None:
    (tmp_path / "out").touch()

    with pytest.raises(OSError, match=r"cannot write '.*out/config.json'"):
        train(short, out=tmp_path / "out")


# Full disks


@pytest.mark.parametrize("as_torch_says_it", [False, True])
def test_a_full_disk_ends_a_run_in_one_line_and_what_was_written_stays_whole(
    config: Config,
    whole: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    as_torch_says_it: bool,
) -> None:
    really = torch.save

    def save(state: dict[str, Any], file: Any) -> None:
        if state["step"] < 5:
            really(state, file)
            return
        file.write(b"PK half a checkpoint")
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            if not as_torch_says_it:
                raise
            raise RuntimeError("[enforce fail at ...] . unexpected pos 704 vs 598")  # noqa: B904

    with monkeypatch.context() as full:
        full.setattr(torch, "save", save)
        with pytest.raises(OSError, match=r"step_00000005.pt': No space left on device; free some") as error:
            train(config, out=tmp_path)
    assert "\n" not in str(error.value)
    assert step_files(tmp_path) == [f"step_{number:08d}.pt" for number in range(1, 5)]

    train(config, out=tmp_path)

    assert differences(saved_state(tmp_path, STEPS), saved_state(whole.out, STEPS)) == []


@pytest.mark.parametrize("name", ["model.safetensors", "result.json", "config.json"])
def test_a_disk_that_is_full_for_any_file_is_told_and_the_run_ends_whole_later(
    short: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    really = {kind: getattr(Path, kind) for kind in ("write_text", "write_bytes")}

    def full(path: Path, content: Any, kind: str) -> int:
        if name in path.name:
            really["write_bytes"](path, b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(really[kind](path, content))

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", lambda path, content: full(path, content, "write_text"))
        disk.setattr(Path, "write_bytes", lambda path, content: full(path, content, "write_bytes"))
        with pytest.raises(OSError, match=rf"cannot write '.*{name}': No space left on device"):
            train(short, out=tmp_path)
    assert name not in files(tmp_path)
    assert not any(file.endswith(".part") for file in files(tmp_path))
    assert "result.json" not in files(tmp_path)

    train(short, out=tmp_path)

    assert "result.json" in files(tmp_path)


def test_a_journal_that_cannot_be_written_is_named(short: Config, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").mkdir()

    with pytest.raises(OSError, match=r"cannot write '.*journal.jsonl': Is a directory"):
        train(short, out=tmp_path)


# Losses that break


def break_contrast(monkeypatch: pytest.MonkeyPatch, at: int, value: float) -> None:
    """Make the contrastive term `value` at one step of co-training."""
    really, steps = swap.csc_loss, iter(range(WARMUP, STEPS))

    def broken(*arguments: Any, **more: Any) -> torch.Tensor:
        loss = really(*arguments, **more)
        return loss * value if next(steps) == at else loss

    monkeypatch.setattr(swap, "csc_loss", broken)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_breaks_stops_the_run_naming_term_step_and_images(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    config = override(config, {"train.accumulate": 1, "train.log_every": 6, "train.checkpoint_every": 2})
    break_contrast(monkeypatch, 4, value)

    with pytest.raises(
        NonFiniteLossError, match=r"loss term 'csc' must stay finite, .+ at step 4 on"
    ) as error:
        train(config, out=tmp_path)

    names = step_names(open_dataset(config.data, "train_aug"), config, 4)
    assert ", ".join(names) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_loss_that_breaks_leaves_the_last_good_checkpoint_and_nothing_of_its_own(
    config: Config, whole: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a panel: an evaluation is due at the very step that broke."""
    config = override(config, {"train.accumulate": 1, "evaluation.every": 5, "evaluation.panel_images": 1})
    tracker = Recorder()
    break_contrast(monkeypatch, 4, torch.nan)

    with pytest.raises(NonFiniteLossError):
        train(config, out=tmp_path, tracker=tracker)

    assert step_files(tmp_path)[-1] == "step_00000004.pt"
    last = checkpoint.load(tmp_path / "checkpoints/step_00000004.pt")
    assert all(torch.isfinite(tensor).all() for tensor in last["online"].values())
    assert [entry["step"] for entry in read_journal(tmp_path)] == [1, 2, 3, 4]
    assert not (tmp_path / "panels").exists()
    assert tracker.calls[-1] == ("finish", "FAILED")


def test_weights_that_break_under_finite_losses_are_not_kept_either(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = iter(range(STEPS))

    def overflow(online: torch.nn.Module, max_norm: float) -> None:
        if next(seen) == 4:
            next(online.parameters()).grad.fill_(torch.inf)

    monkeypatch.setattr(steps_state, "clip_gradients", overflow)

    with pytest.raises(NonFiniteLossError, match="weights must stay finite, got NaN or infinity by step 4"):
        train(config, out=tmp_path)

    assert step_files(tmp_path)[-1] == "step_00000004.pt"


# Several workers


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which the two workers leave their runs."""
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def alike(config: Config) -> Config:
    """A run that does not depend on who shares it: paths are dropped share by share."""
    return override(config, {"network.drop_path": 0.0, "train.accumulate": 1})


@pytest.fixture(scope="module")
def one_worker(alike: Config, shared: Path) -> Path:
    train(alike, out=shared / "alone")
    return shared / "alone"


@pytest.fixture(scope="module")
def two_workers(alike: Config, one_worker: Path, shared: Path) -> Path:
    """Several runs of two workers of gloo, all in one group: starting one costs as much as ten runs."""
    resumed = shared / "resumed"
    shutil.copytree(one_worker, resumed)
    (resumed / "result.json").unlink()
    for late in range(WARMUP + 2, STEPS + 1):
        checkpoint.checkpoint_path(resumed / "checkpoints", late).unlink()
    jobs = {
        "together": {"config": to_json(alike)},
        "in micro-batches": {"config": to_json(override(alike, {"train.accumulate": 2}))},
        "resumed": {"config": to_json(alike)},
        "without c2s": {"config": to_json(override(alike, {"c2s.weight": 0}))},
        "broken": {"config": to_json(alike), "broken_rank": 1, "broken_step": 4},
    }
    multiprocessing.spawn(work, (2, shared, jobs), nprocs=2)
    return shared


def assert_close(found: dict[str, Any], expected: dict[str, Any], absolute: float) -> None:
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=0, atol=absolute, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["together", "in micro-batches", "resumed"])
class TestTwoWorkersAndOne:
    """The same global batch, twice as many hands."""

    def test_end_with_the_same_weights(self, one_worker: Path, two_workers: Path, run: str) -> None:
        alone, shared = (saved_state(out, STEPS) for out in (one_worker, two_workers / run))

        networks = {name for name in alone if name.startswith(("/online", "/assignment"))}
        assert_close(shared, {name: alone[name] for name in networks}, 2e-4)

    def test_see_the_same_losses_at_every_step(self, one_worker: Path, two_workers: Path, run: str) -> None:
        alone, shared = read_journal(one_worker), read_journal(two_workers / run)

        assert [entry.keys() for entry in shared] == [entry.keys() for entry in alone]
        for found, expected in zip(shared, alone, strict=True):
            losses = {name: value for name, value in expected.items() if name.startswith("train/")}
            assert {name: found[name] for name in losses} == pytest.approx(losses, rel=1e-3, abs=1e-4)

    def test_have_the_same_activations_in_both_queues(
        self, one_worker: Path, two_workers: Path, run: str
    ) -> None:
        alone, shared = (saved_state(out, STEPS) for out in (one_worker, two_workers / run))

        for name in ("/threshold/queue", "/aux_threshold/queue"):
            pixels = int(alone[name].sum())
            assert int(shared[name].sum()) == pixels > 0
            assert int((shared[name] - alone[name]).abs().sum()) <= 0.002 * pixels  # next to a bin's edge

    def test_judge_their_networks_alike(self, one_worker: Path, two_workers: Path, run: str) -> None:
        alone, shared = (
            json.loads((out / "result.json").read_text()) for out in (one_worker, two_workers / run)
        )

        assert shared["metrics"] == pytest.approx(alone["metrics"], abs=0.01, nan_ok=True)


@pytest.mark.slow
def test_a_term_that_leaves_a_part_without_gradient_is_no_trouble_for_two_workers(two_workers: Path) -> None:
    assert (two_workers / "without c2s/result.json").is_file()


@pytest.mark.slow
def test_a_loss_that_breaks_on_one_worker_stops_both_and_neither_keeps_it(two_workers: Path) -> None:
    reasons = [(two_workers / f"broken.{rank}.txt").read_text() for rank in range(2)]

    assert reasons[0] == reasons[1]
    assert reasons[0].startswith("loss term 'csc' must stay finite, got NaN or infinity at step 4 on")
    assert step_files(two_workers / "broken")[-1] == "step_00000004.pt"


def test_a_batch_that_the_workers_cannot_share_is_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = trainer.Ranks(rank=0, world=3, device=torch.device("cpu"))
    monkeypatch.setattr(trainer.Ranks, "current", lambda: three)

    law = r"train.batch_size must be a multiple of workers x train.accumulate = 6, got 4"
    with pytest.raises(ValueError, match=law):
        train(config, out=tmp_path)


# Real images


@pytest.fixture
def real_voc(real_data: Path, tmp_path: Path) -> Path:
    """VOC with lists of a few images, so that few masks are read."""
    origin, root = real_data / "data/VOCdevkit/VOC2012", tmp_path / "VOC2012"
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    for folder in origin.iterdir():
        if folder.name != "ImageSets":
            (root / folder.name).symlink_to(folder, target_is_directory=True)
    for split, count in (("train_aug", 8), ("val", 4)):
        names = (origin / f"ImageSets/Segmentation/{split}.txt").read_text().split()
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names[:count]) + "\n")
    return root


@pytest.mark.slow
def test_real_images_with_real_weights_train_resume_and_are_judged(
    real_voc: Path, real_data: Path, tmp_path: Path
) -> None:
    weights = real_data / "weights/deit_tiny_patch16_224.safetensors"
    config = override(
        Config(),
        {
            "data.root": str(real_voc),
            "data.crop_size": 96,
            "data.loader_workers": 0,
            "network.encoder": "deit_tiny_patch16_224",
            "network.pretrained": False,
            "network.weights": str(weights),
            "network.decoder_channels": 64,
            "cam.scales": (1.0,),
            "cam.stride": 4,
            "train.iterations": 3,
            "train.warmup": 1,
            "train.log_every": 1,
            "train.checkpoint_every": 2,
            "evaluation.every": 3,
            "evaluation.size": 96,
            "evaluation.scales": (1.0, 0.5),
            "evaluation.panel_images": 2,
        },
    )
    with pytest.raises(StopError):
        train(config, out=tmp_path / "run", report=stop_after(2))

    result = train(config, out=tmp_path / "run")

    losses = read_journal(result.out)[-1]
    assert {f"train/loss/{name}" for name in step.TERMS} <= losses.keys()
    assert 0 <= result.metrics["val/assignment/seg_miou"] < 1
    assert 0 < result.metrics["val/assignment/cpl_miou"] < 1
    published = load_file(weights)
    final = load_file(result.out / "model/model.safetensors")
    name = "blocks.0.mlp.fc1.weight"
    torch.testing.assert_close(final[f"encoder.vit.{name}"], published[name], rtol=0, atol=1e-3)
    with Image.open(result.out / "panels/step_00000003.png") as panel:
        assert len(panel.convert("RGB").resize((256, 256)).getcolors(65_536)) > 2_000  # photographs


# What is judged


def test_training_images_are_judged_once_after_the_last_step(tiny_config: Config, tmp_path: Path) -> None:
    judged = override(
        tiny_config,
        {"evaluation.train_split": "train_aug", "evaluation.every": 1, "evaluation.max_images": 4},
    )

    result = train(judged, out=tmp_path)

    journal = read_journal(tmp_path)
    names = ["cpl_miou", "aux_cpl_miou", "ensemble_cpl_miou", "cls_precision"]
    assert all(f"train/assignment/{name}" in result.metrics for name in names)
    assert not any(key.startswith("train/assignment") for key in journal[0])
    told = json.loads((tmp_path / "result.json").read_text())
    assert set(told["assignment_train"]["per_class"]) == {"cpl_iou", "aux_cpl_iou"}


def test_without_an_assignment_network_on_is_judged_on_training_images_and_shown(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(network: CosaNetwork, *args: Any, **settings: Any) -> list[PanelRow]:
        shown.append(network)
        return panel_rows(network, *args, **settings)

    def evaluated(state: TrainingState, *args: Any) -> list[Path]:
        states.append(state)
        return validation.evaluate_networks(state, *args)

    shown: list[CosaNetwork] = []
    states: list[TrainingState] = []
    monkeypatch.setattr(validation, "panel_rows", rows)
    monkeypatch.setattr(trainer, "evaluate_networks", evaluated)
    alone = override(
        tiny_config,
        {"cam.source": "online", "evaluation.train_split": "train_aug", "evaluation.max_images": 4},
    )

    result = train(alone, out=tmp_path)

    assert "train/online/cpl_miou" in result.metrics
    assert not any(key.startswith("train/assignment") for key in result.metrics)
    assert "online_train" in json.loads((tmp_path / "result.json").read_text())
    assert shown
    assert all(network is states[0].online for network in shown)
    with np.load(max((tmp_path / "panels").glob("*.npz"))) as content:
        assert str(content["network"]) == "online"


def test_a_shared_warm_up_judges_no_training_images(tiny_config: Config, tmp_path: Path) -> None:
    judged = override(tiny_config, {"evaluation.train_split": "train_aug"})

    result = train(judged, out=tmp_path, stop_at=1)

    assert not any(key.startswith("train/assignment") for key in result.metrics)


def test_without_a_validation_split_nothing_is_evaluated(tiny_config: Config, tmp_path: Path) -> None:
    result = train(override(tiny_config, {"data.val_split": ""}), out=tmp_path)

    assert result.metrics == {}
    assert not (tmp_path / "panels").exists()
    assert (tmp_path / "model/model.json").is_file()


def test_analysis_counts_every_pixel_of_the_validation_masks(tiny_config: Config, tmp_path: Path) -> None:
    train(tiny_config, out=tmp_path)

    record = json.loads((tmp_path / "analysis/step_00000002.json").read_text())
    dataset = open_dataset(tiny_config.data, "val")
    pixels = sum(int((dataset.mask(i) != 255).sum()) for i in range(len(dataset)))
    assert (record["step"], record["epsilon"]) == (2, 1.0)
    for network in ("assignment", "online"):
        for head in ("cam", "aux_cam"):
            for kind in ("confidence", "perplexity"):
                assert sum(record["networks"][network][head][kind]["pixels"]) == pixels


def test_an_infinite_epsilon_is_kept_in_plain_json(tiny_config: Config, tmp_path: Path) -> None:
    train(override(tiny_config, {"csc.epsilon": float("inf")}), out=tmp_path)

    text = (tmp_path / "analysis/step_00000002.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["epsilon"] is None


# What a run is told


def test_a_spec_travels_to_another_process_and_stays_as_it_is(tiny_config: Config, tmp_path: Path) -> None:
    spec = RunSpec(
        config=tiny_config,
        out=tmp_path,
        fork_from=tmp_path / "step_00000001.pt",
        momenta=(0.5,),
        data_tags={"cosa.data_fingerprint": "f00"},
        tracking=TrackingSpec(uri="sqlite:///x.db", tags={"cosa.arm": "full"}),
    )

    assert pickle.loads(pickle.dumps(spec)) == spec
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.stop_at = 1  # type: ignore[misc]


def test_a_run_at_a_url_is_worked_on_where_its_spec_says(tiny_config: Config, tmp_path: Path) -> None:
    url = "s3://bucket/runs/one"
    below, elsewhere = (
        RunSpec(config=tiny_config, out=url, work_folder=folder).storage
        for folder in ("", str(tmp_path / "work"))
    )

    assert (below.url, elsewhere.url) == (url, url)
    assert below.folder == Path("runs/s3/bucket/runs/one").absolute()
    assert elsewhere.folder == tmp_path / "work"
