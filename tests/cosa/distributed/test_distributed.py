"""Ray Train around the trainer, on a Ray of its own: the same result as alone, also after a killed worker."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.exceptions
import ray.train
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from cosa.config import Config, override
from cosa.distributed import train as distributed
from cosa.distributed.session import ray_session
from cosa.distributed.train import WorkerError, fit
from cosa.storage.run_folder import read_metrics
from cosa.tracking import TrackingError, TrackingSpec
from cosa.training.stop import StoppedError
from cosa.training.trainer import NonFiniteLossError, Result, RunSpec, TrainProgress
from tests.cosa.runs import train

STEPS = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of this machine's CPUs, started once for the file and stopped with it."""
    if (psutil.cpu_count() or 1) < 2:
        pytest.skip("needs two CPUs")
    with ray_session():
        yield


@pytest.fixture
def config(tiny_config: Config) -> Config:
    """Some steps of warm-up and of co-training, with a checkpoint after each second one."""
    changes = {"iterations": STEPS, "warmup": 3, "checkpoint_every": 2, "log_every": 1}
    return override(tiny_config, {f"train.{name}": value for name, value in changes.items()})


def _journal(out: Path) -> list[dict[str, float]]:
    """What a run measured, step by step, without what depends on the clock."""
    clock = "train/images_per_second"
    return [
        {"step": step, **{k: v for k, v in metrics.items() if k != clock and not math.isnan(v)}}
        for step, metrics in read_metrics(out)
    ]


def _weights(result: Result) -> dict[str, torch.Tensor]:
    return load_file(result.out / "model/model.safetensors")


def _kill_a_worker_at(step: int) -> Callable[[TrainProgress], None]:
    """Kills one training process, once, as soon as the run is seen to be at `step`."""
    killed: list[int] = []

    def watch(progress: TrainProgress) -> None:
        if progress.step < step or killed:
            return
        children = psutil.Process().children(recursive=True)
        victims = [p for p in children if "RayTrainWorker" in " ".join(p.cmdline())]
        assert len(victims) == 2
        victims[1].kill()
        killed.append(victims[1].pid)

    return watch


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_end_as_one_process_does_and_outlive_a_kill(
    config: Config, tmp_path: Path, cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    alone = train(config, out=tmp_path / "alone")

    together = fit(RunSpec(config=config, out=tmp_path / "together"), workers=2)
    killed = fit(
        RunSpec(config=config, out=tmp_path / "killed", tracking=TrackingSpec(uri=uri)),
        workers=2,
        report=_kill_a_worker_at(5),
    )

    for one, two in zip(_journal(alone.out), _journal(together.out), strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=2e-3)
    for name, tensor in _weights(alone).items():
        torch.testing.assert_close(_weights(together)[name], tensor, rtol=1e-3, atol=1e-4)

    assert "all go on from the newest checkpoint" in caplog.text
    assert repr(sorted(killed.metrics.items())) == repr(sorted(together.metrics.items()))  # NaN is NaN
    assert _journal(killed.out) == _journal(together.out)
    assert all(torch.equal(_weights(killed)[name], t) for name, t in _weights(together).items())

    assert killed.run_id is not None
    client = MlflowClient(uri)
    history = client.get_metric_history(killed.run_id, "train/loss/total")
    assert [point.step for point in history] == [*range(1, STEPS + 1)]
    assert client.get_run(killed.run_id).info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_train_and_judge_a_standalone_network_with_batch_norm(
    config: Config, tmp_path: Path, cluster: None
) -> None:
    own = {"encoder": "resnet18", "patch_size": 0, "width": 0, "depth": 0, "heads": 0, "aux_head": False}
    changes = {f"network.{name}": value for name, value in own.items()}
    changes |= {"network.architecture": "deeplabv3plus", "segmentation.supervision": "masks"}
    seen: list[TrainProgress] = []

    spec = RunSpec(config=override(config, changes), out=tmp_path / "run")
    result = fit(spec, workers=2, report=seen.append)

    assert [entry["step"] for entry in _journal(result.out) if "train/loss/seg" in entry] == [
        *range(1, STEPS + 1)
    ]
    assert STEPS in {progress.step for progress in seen}
    assert 0 <= result.metrics["val/standalone/seg_miou"] <= 1
    statistics = [tensor for name, tensor in _weights(result).items() if name.endswith("running_mean")]
    assert statistics
    assert all(tensor.any() for tensor in statistics)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_mistake_in_a_worker_arrives_as_itself_and_is_made_once(
    config: Config, tmp_path: Path, cluster: None, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = override(config, {"data.layout": "voc", "data.root": str(tmp_path / "nowhere")})

    with pytest.raises(FileNotFoundError, match=r"data\.root must be a folder") as caught:
        fit(RunSpec(config=nowhere, out=tmp_path / "run"), workers=1)

    assert "all go on" not in caplog.text
    assert "trainer.py" in "".join(caught.value.__notes__)  # where it arose, for --traceback


def test_more_workers_than_the_cluster_has_are_refused_at_once(
    config: Config, tmp_path: Path, cluster: None
) -> None:
    with pytest.raises(
        ValueError, match=r"workers must be at most \d+, the CPUs of the Ray cluster, got 999"
    ):
        fit(RunSpec(config=config, out=tmp_path), workers=999)


def test_no_workers_are_refused(tiny_config: Config, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        fit(RunSpec(config=tiny_config, out=tmp_path), workers=0)


def test_an_unreachable_tracking_server_is_told_before_anything_starts(
    tiny_config: Config, tmp_path: Path
) -> None:
    with pytest.raises(TrackingError, match="must answer"):
        fit(
            RunSpec(config=tiny_config, out=tmp_path, tracking=TrackingSpec(uri="http://127.0.0.1:9")),
            workers=1,
        )


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (ValueError("a setting"), True),
        (KeyError("a bug"), True),
        (TrackingError("no store"), True),
        (NonFiniteLossError("a loss"), True),
        (StoppedError("an order"), True),
        (torch.OutOfMemoryError("a card"), True),
        (FileNotFoundError(errno.ENOENT, "a file"), True),
        (OSError(errno.ENOSPC, "a disk"), True),
        (RuntimeError("Connection closed by peer"), False),
        (ConnectionResetError(errno.ECONNRESET, "a peer"), False),
        (OSError(errno.ESTALE, "a network disk"), False),
        (ray.exceptions.RayActorError(), False),
    ],
)
def test_only_what_may_pass_is_tried_again(error: Exception, final: bool) -> None:
    assert distributed._is_final(error) is final


def test_a_failure_of_workers_is_one_line_that_names_the_worker() -> None:
    failures: dict[int, Exception] = {1: RuntimeError("peer gone\n  frame\n  frame"), 2: RuntimeError("too")}

    ended: Future[Any] = Future()
    ended.set_exception(ray.train.WorkerGroupError("many lines", failures))
    with pytest.raises(WorkerError) as error:
        distributed._result(ended)

    assert str(error.value) == "worker 1 failed: RuntimeError: peer gone"


def test_a_worker_that_does_not_share_the_folder_says_so(tmp_path: Path) -> None:
    distributed._mark_storage(tmp_path / "here/ray", "1234")

    with pytest.raises(ValueError, match="out must lie on storage that every worker reaches"):
        distributed._check_storage(tmp_path / "there/ray", "1234")


def test_a_worker_that_shares_the_folder_is_content(tmp_path: Path) -> None:
    distributed._mark_storage(tmp_path / "ray", "1234")

    distributed._check_storage(tmp_path / "ray", "1234")


def test_an_earlier_attempt_leaves_ray_no_notes(tmp_path: Path) -> None:
    (tmp_path / "ray" / "old").mkdir(parents=True)

    distributed._mark_storage(tmp_path / "ray", "1234")

    assert [path.name for path in (tmp_path / "ray").iterdir()] == ["1234"]
