"""Orders to save and to stop: heard as a signal or as a file, obeyed between two steps by all ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch.multiprocessing

from cosa.config import Config, override, to_json
from cosa.training.stop import StopFile, StoppedError, StopSignal, until_terminated
from tests.cosa.runs import differences, read_journal, saved_state, step_files, train, work

STEPS = 8


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Some steps of warm-up and of co-training; checkpoints only at the end."""
    changes = {"iterations": STEPS, "warmup": 3, "checkpoint_every": STEPS, "log_every": 4}
    return override(tiny_config, {f"train.{name}": value for name, value in changes.items()})


class Asked:
    """Gives one order, when it is asked for the n-th time."""

    def __init__(self, order: StopSignal, nth: int) -> None:
        self.order, self.nth, self.count = order, nth, 0

    def __call__(self) -> StopSignal:
        self.count += 1
        return self.order if self.count == self.nth else StopSignal.GO_ON


def test_a_stopped_run_goes_on_from_the_step_it_stopped_after_bit_for_bit(
    config: Config, tmp_path: Path
) -> None:
    whole = train(config, out=tmp_path / "whole")

    with pytest.raises(StoppedError, match=r"stopped after step 5 of 8, .*; the same command goes on"):
        train(config, out=tmp_path / "stopped", should_stop=Asked(StopSignal.STOP, 5))
    assert step_files(tmp_path / "stopped") == ["step_00000005.pt"]
    resumed = train(config, out=tmp_path / "stopped")

    assert differences(saved_state(whole.out, STEPS), saved_state(resumed.out, STEPS)) == []
    assert read_journal(resumed.out) == read_journal(whole.out)


def test_an_order_to_save_saves_once_and_the_run_goes_on(config: Config, tmp_path: Path) -> None:
    result = train(config, out=tmp_path / "run", should_stop=Asked(StopSignal.SAVE, 2))

    assert result.step == STEPS
    assert step_files(result.out) == ["step_00000002.pt", "step_00000008.pt"]


def test_a_run_told_to_stop_after_its_last_step_is_finished(config: Config, tmp_path: Path) -> None:
    assert train(config, out=tmp_path / "run", should_stop=Asked(StopSignal.STOP, STEPS)).step == STEPS


def test_ranks_stop_together_where_only_one_of_them_hears_it(config: Config, tmp_path: Path) -> None:
    seldom = override(config, {"evaluation.every": STEPS})
    jobs = {"run": {"config": to_json(seldom), "stop_rank": 1}}

    torch.multiprocessing.spawn(work, args=(2, tmp_path, jobs), nprocs=2)

    for rank in (0, 1):
        assert "stopped after step 4 of 8" in (tmp_path / f"run.{rank}.txt").read_text()
    assert step_files(tmp_path / "run") == ["step_00000004.pt"]


def test_the_first_sigterm_is_an_order_and_the_second_does_what_it_did() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with until_terminated() as should_stop:
            orders = [should_stop()]
            os.kill(os.getpid(), signal.SIGTERM)
            orders.append(should_stop())
            assert not heard
            os.kill(os.getpid(), signal.SIGTERM)
        assert orders == [StopSignal.GO_ON, StopSignal.STOP]
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stop_file_is_an_order_for_whoever_sees_it(tmp_path: Path) -> None:
    one, other = StopFile(tmp_path / "stop"), StopFile(tmp_path / "stop")

    assert one.check() == StopSignal.GO_ON
    one.give()

    assert other.check() == StopSignal.STOP


def test_a_stop_file_is_looked_for_once_a_second_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("cosa.training.stop.time.monotonic", lambda: now[0])
    file = StopFile(tmp_path / "stop")
    assert file.check() == StopSignal.GO_ON
    file.give()

    now[0] = 100.9
    assert file.check() == StopSignal.GO_ON
    now[0] = 101.0
    assert file.check() == StopSignal.STOP
