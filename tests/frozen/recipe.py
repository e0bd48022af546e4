"""What the kept fixtures and the tests that read them share: small runs, their commands, packing.

Fixtures were made by `make.py` from commit 25ac2bd. Commands run in a folder of their own in which the data
set lies as `shapes`. Kept folders are packed with the path of that folder replaced by PLACE, which has the
same length as every path that `roomy` makes: byte offsets that a file holds into another stay right.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from cosa.config import EARLIER
from tests.reading import ROOT

DATA = Path(__file__).with_name("data")
TRAIN_IMAGES, VAL_IMAGES = 24, 6
CLOCK = ("seconds", "time", "train/images_per_second")
"""What two runs of the same experiment may differ in."""
PATIENCE = 280.0  # seconds; a busy machine starts Ray slowly
NON_FINITE = "cosa.non_finite."
NEWER = ("cost/", "sweep/", "system/")
"""How metrics begin that came later."""
PLACE = "@PLACE@".ljust(160, "@")
"""Stands in a kept file for the folder that it was made in."""

SETTINGS = {
    "data.crop_size": "32",
    "data.loader_workers": "0",
    "network.encoder": "vit_tiny_patch16_224",
    "network.pretrained": "false",
    "network.patch_size": "4",
    "network.width": "16",
    "network.depth": "3",
    "network.heads": "2",
    "network.aux_block": "-2",
    "network.decoder_channels": "8",
    "network.decoder_dilation": "1",
    "cam.scales": "1.0,0.5",
    "threshold.queue": "6",
    "csc.max_anchors": "64",
    "ema.momentum": "0.9",
    "optim.lr_warmup": "4",
    "train.iterations": "24",
    "train.warmup": "12",
    "train.batch_size": "4",
    "train.log_every": "1",
    "train.checkpoint_every": "12",
    "evaluation.every": "12",
    "evaluation.size": "32",
    "evaluation.batch_size": "3",
    "evaluation.panel_images": "1",
    "evaluation.train_split": "train_aug",
}
"""CoSA with all of its terms, small enough for a few seconds."""

REPORT_SETTINGS = {
    **SETTINGS,
    "train.iterations": "16",
    "train.warmup": "8",
    "train.log_every": "4",
    "train.checkpoint_every": "8",
    "evaluation.every": "8",
    "evaluation.train_split": "",
}
"""Of the sweep whose store is kept for its report."""

SWEEP_SETTINGS = {
    **SETTINGS,
    "train.iterations": "60",
    "train.warmup": "16",
    "train.checkpoint_every": "10",
    "train.keep_checkpoints": "1",
    "train.log_every": "2",
    "evaluation.every": "30",
    "evaluation.train_split": "",
}
"""Of the sweep that was interrupted: long enough to be met in the middle of a trial."""


SWEEP_TABLES = ("4b", "5c")
"""One warm-up and five arms, one of which is in both."""


def train_command(out: str, *more: str) -> list[str]:
    """`cosa-train` of the small run."""
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name}", value)]
    program = "import sys; from cosa.cli import train; sys.exit(train())"
    return [sys.executable, "-c", program, "shapes", "--out", out, "--data.root", "shapes", *flags, *more]


def two_ranks_command(rank: int, config: str, out: str) -> list[str]:
    """One of two processes of gloo that train together."""
    program = str(Path(__file__).with_name("one_of_two.py"))
    return [sys.executable, program, str(rank), config, out]


def sweep_command(
    folder: Path, out: str, tables: Sequence[str], settings: Mapping[str, str], *more: str
) -> list[str]:
    """`sweeps/ablation.py` with its own store in `folder`."""
    return [
        *(sys.executable, str(ROOT / "sweeps/ablation.py"), "--preset", "shapes", "--tables", *tables),
        *("--out", out, "--tracking-uri", f"sqlite:///{folder}/mlflow.db", *more),
        *("--set", "data.root=shapes", *(f"{name}={value}" for name, value in settings.items())),
    ]


def report_command(folder: Path, sweep: str) -> list[str]:
    """`sweeps/report.py` of a store in `folder`."""
    return [
        *(sys.executable, str(ROOT / "sweeps/report.py"), "--sweep", sweep),
        *("--tracking-uri", f"sqlite:///{folder}/mlflow.db", "--out", f"{folder}/report"),
    ]


def start(command: Sequence[str], folder: Path, log: str = "log.txt") -> subprocess.Popen[bytes]:
    """A command in `folder`, with what it prints at the end of `log`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
    environment = {
        **clean,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (folder / log).open("ab") as output:
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, env=environment)


def finish(command: Sequence[str], folder: Path, log: str = "log.txt") -> str:
    """Run a command to its end, which must be a good one; returns what it printed."""
    process = start(command, folder, log)
    try:
        code = process.wait(PATIENCE)
    finally:
        process.kill()
    printed = (folder / log).read_text()
    assert code == 0, printed[-3000:]
    return printed


def roomy(folder: Path) -> Path:
    """An empty folder in `folder` whose path is as long as PLACE."""
    missing = len(PLACE) - len(str(folder)) - 1
    assert missing > 0, f"the temporary folder must have a shorter path, got {str(folder)!r}"
    path = folder / ("x" * missing)
    path.mkdir()
    return path


def write_data(folder: Path) -> None:
    """The data set of every run here, as `shapes` in `folder`; the same bytes each time."""
    from cosa.data.shapes import write_shapes

    write_shapes(folder / "shapes", train_images=TRAIN_IMAGES, val_images=VAL_IMAGES)


def made_on() -> dict[str, str]:
    """What bits depend on: where it is the same, results must be the same bit for bit."""
    packages = ("torch", "numpy", "timm", "albumentations", "opencv-python-headless", "pillow")
    return {
        **{name: version(name) for name in packages},
        "machine": platform.machine(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": _processor(),
    }


def _processor() -> str:
    """The processor's maker, family and model, where Linux tells: kernels are chosen by them, too."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    found = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    return " ".join(found.get(name, "") for name in ("vendor_id", "cpu family", "model"))


def journal(out: Path) -> list[dict[str, Any]]:
    """A run's metrics by step, times left out."""
    entries = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    metrics = [entry for entry in entries if "kind" not in entry]  # what else a tracked run was told has one
    return [{key: value for key, value in entry.items() if key not in CLOCK} for entry in metrics]


def last_step(out: Path) -> int:
    """The last step in a run's journal, 0 before there is one."""
    path = out / "journal.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((int(json.loads(line)["step"]) for line in lines if line.endswith("}")), default=0)


def pack(folder: Path, archive: Path, kept: Callable[[Path], bool]) -> None:
    """Keep the files of `folder` whose relative path is `kept`; databases as SQL, its own path as PLACE."""
    assert len(str(folder)) == len(PLACE)
    own = str(folder)
    with (
        archive.open("wb") as file,
        gzip.GzipFile("", "wb", 9, file, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_dir() or not kept(name):
                continue
            content = _packed(path, own)
            assert own.encode() not in content, f"{name} must not name its folder"
            entry = tarfile.TarInfo(f"{name}.sql" if path.suffix == ".db" else str(name))
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def _packed(path: Path, own: str) -> bytes:
    if path.suffix == ".db":
        connection = sqlite3.connect(path)
        try:
            return "\n".join(connection.iterdump()).replace(own, PLACE).encode()
        finally:
            connection.close()
    if path.suffix == ".pt":  # the settings in it name the data's folder
        return _checkpoint(path, own)
    if path.suffix == ".sha256":
        whole = hashlib.sha256(_checkpoint(path.with_suffix(""), own)).hexdigest()
        return f"{whole}  {path.stem}\n".encode()
    return path.read_bytes().replace(own.encode(), PLACE.encode())


def _checkpoint(path: Path, own: str) -> bytes:
    if own.encode() not in path.read_bytes():
        return path.read_bytes()
    data = io.BytesIO()
    torch.save(_renamed(torch.load(path, map_location="cpu", weights_only=True), own), data)
    return data.getvalue()


def _renamed(item: Any, own: str) -> Any:
    if isinstance(item, str):
        return item.replace(own, PLACE)
    if isinstance(item, list | tuple):
        return type(item)(_renamed(part, own) for part in item)
    if type(item) is dict:
        return {key: _renamed(value, own) for key, value in item.items()}
    return item


def unpack(archive: Path, folder: Path) -> None:
    """Lay out in `folder`, which `roomy` made, what `pack` kept."""
    assert len(str(folder)) == len(PLACE)
    with tarfile.open(archive) as tar:
        for entry in tar:
            member = tar.extractfile(entry)
            assert member is not None
            content, path = member.read(), folder / entry.name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".pt":  # nobody reads a folder's name there, and its hash is kept beside it
                path.write_bytes(content)
                continue
            content = content.replace(PLACE.encode(), str(folder).encode())
            if path.suffix != ".sql":
                path.write_bytes(content)
                continue
            connection = sqlite3.connect(path.with_suffix(""))
            connection.executescript(content.decode())
            connection.close()


def html_cells(text: str) -> list[list[list[str]]]:
    """The text of every cell of every row of every table of a page."""
    reader = _Cells()
    reader.feed(text)
    return reader.tables


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        if tag in {"td", "th"}:
            self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            cell = f"{self.tables[-1][-1][-1]} {data}"
            self.tables[-1][-1][-1] = " ".join(cell.split())


def names_in_store(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Names of parameters, metrics and tags of each run in the store of `folder`, by the run's name.

    A metric that was never finite leaves a tag instead; it counts as the metric, for numbers decide which.
    """
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = {}
    for run in _runs(client):
        key = f"{run.data.tags.get('cosa.kind', 'run')}: {run.info.run_name}"
        assert key not in found, f"run names must differ, got {key!r} twice"
        never_finite = {tag for tag in run.data.tags if tag.startswith(NON_FINITE)}
        metrics = run.data.metrics.keys() | {tag.removeprefix(NON_FINITE) for tag in never_finite}
        found[key] = {
            "params": sorted(run.data.params),
            "metrics": sorted(metrics),
            "tags": sorted(run.data.tags.keys() - never_finite),
        }
    return dict(sorted(found.items()))


def without_newer(
    names: Mapping[str, Mapping[str, list[str]]], *, tag: str = ""
) -> dict[str, dict[str, list[str]]]:
    """Names in a store but for what the kept version did not have: settings, and metrics of what a run took.

    It had no costs, no load of the machine and no progress of a sweep: a report read parameters from the size
    of a file, and MLflow's page of system metrics was empty. `tag` is one that these runs did not have.
    """
    return {
        run: {
            kind: [name for name in some if name not in {*EARLIER, tag} and not name.startswith(NEWER)]
            for kind, some in kinds.items()
        }
        for run, kinds in names.items()
    }


def steps_in_store(folder: Path) -> dict[str, list[int]]:
    """Steps of the total loss of each run in the store of `folder`, by the run's name."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return {
        run.info.run_name: [p.step for p in client.get_metric_history(run.info.run_id, "train/loss/total")]
        for run in _runs(client)
    }


def runs_of_arms(folder: Path, arms: set[str]) -> set[str]:
    """Ids of the runs of some arms in the store of `folder`."""
    from mlflow import MlflowClient

    runs = _runs(MlflowClient(f"sqlite:///{folder}/mlflow.db"))
    return {run.info.run_id for run in runs if run.data.tags.get("cosa.arm") in arms}


def _runs(client: Any) -> Iterator[Any]:
    for experiment in client.search_experiments():
        yield from client.search_runs([experiment.experiment_id], max_results=1000)


def read(name: str) -> Any:
    """A kept JSON file."""
    return json.loads((DATA / name).read_text())
