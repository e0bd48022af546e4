"""Files that others made: a pickle that would run code is refused by every command that reads one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from cosa import cli
from cosa.cli import common
from cosa.config import Config, flatten
from cosa.config.presets import get_preset
from cosa.storage import checkpoint
from cosa.storage.files import digest
from tests.cosa.runs import train


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def plant(path: Path, mark: Path) -> Path:
    """A file of tensors, with a hash that is right, which also holds a payload; proven to be live."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {"weight": torch.ones(1), "extra": Payload(mark)}
    torch.save({"format": checkpoint.FORMAT, "step": 9, "online": weights, **weights}, path)
    torch.load(path, weights_only=False)
    mark.unlink()
    checkpoint.hash_path(path).write_text(f"{digest(path)}  {path.name}\n")
    return path


@pytest.fixture
def flags(tiny_config: Config) -> list[str]:
    """A run of a second or so, as flags on the `shapes` preset."""
    preset = flatten(get_preset("shapes"))
    changes = {name: value for name, value in flatten(tiny_config).items() if value != preset[name]}
    return [f"--{name}={common.as_text(value)}" for name, value in changes.items()]


def test_cosa_train_refuses_weights_that_hold_code(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = plant(tmp_path / "x.pt", tmp_path / "executed")

    code = cli.train(["shapes", *flags, f"--network.weights={path}", "--tracking-uri=none"])

    assert code == cli.MISTAKE
    assert not (tmp_path / "executed").exists()
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("cosa-train: error: weights file must hold nothing but tensors, got ")


def test_cosa_evaluate_refuses_a_checkpoint_that_holds_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = plant(tmp_path / "checkpoints/step_00000009.pt", tmp_path / "executed")

    code = cli.evaluate([str(path)])

    assert code == cli.MISTAKE
    assert not (tmp_path / "executed").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "cosa-evaluate: error: checkpoint must hold nothing but tensors and plain data, got "
    )


def test_a_run_never_resumes_from_a_checkpoint_that_holds_code(
    tiny_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = plant(tmp_path / "run/checkpoints/step_00000009.pt", tmp_path / "executed")

    result = train(tiny_config, out=tmp_path / "run")

    assert result.step == 2
    assert not (tmp_path / "executed").exists()
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
