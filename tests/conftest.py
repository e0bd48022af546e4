"""What every test shares: a world of its own, shapes checked at run time, small data, real data if any.

A test's world is its temporary folder: that is where it starts, no MLflow or Ray of the user's is in its
environment, home is an empty folder, and what the checkout holds of data and results is out of bounds.

jaxtyping's hook must be in place before the first import of cosa: it has beartype check every annotated
argument, return value and dataclass field of cosa, tensor shapes among them. Production pays nothing for it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401  (jaxtyping asks for it by name)

ROOT = Path(__file__).parents[1]
OUT_OF_BOUNDS = tuple(str(ROOT / name) for name in ("data", "runs", "predictions", "mlruns"))
WATCHED = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.scandir", "sqlite3.connect"}


def _leave_the_checkouts_data_alone(event: str, args: tuple[object, ...]) -> None:
    """Fail whatever opens, lists or changes what a user's own commands left in this checkout."""
    if event in WATCHED and args and isinstance(args[0], str | bytes | os.PathLike):
        path = os.path.abspath(os.fsdecode(args[0]))  # noqa: PTH100 (of text or bytes, and fast)
        if path.startswith(OUT_OF_BOUNDS) and path.startswith(tuple(p + os.sep for p in OUT_OF_BOUNDS)):
            raise AssertionError(f"a test must not touch the checkout's own data and results, got {path}")


sys.addaudithook(_leave_the_checkouts_data_alone)

for name in [name for name in os.environ if name.startswith(("MLFLOW_", "RAY_"))]:
    del os.environ[name]
os.environ["HOME"] = tempfile.mkdtemp(prefix="cosa-tests-home-")
atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads on two busy cores are slower than one
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

install_import_hook(["cosa"], "tests.typecheck.checked")

import torch  # noqa: E402  (reads OMP_NUM_THREADS on import)

from cosa.config import Config, override  # noqa: E402  (after the hook)

torch.set_num_threads(1)
hypothesis.settings.register_profile("unhurried", deadline=None)  # the machine's load is no test's business
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts in a folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder that holds `data/` (VOCdevkit) and `weights/`; the test is skipped where there is none."""
    folder = os.environ.get("COSA_TEST_DATA")
    if not folder:
        pytest.skip("needs real images: set COSA_TEST_DATA to a folder holding data/ and weights/")
    path = Path(folder).absolute()
    if not (path / "data").is_dir() or not (path / "weights").is_dir():
        pytest.fail(f"COSA_TEST_DATA must name a folder holding data/ and weights/, got {folder!r}")
    return path


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `shapes` data set, written once for all tests; treat it as read-only."""
    from cosa.data.shapes import write_shapes

    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, train_images=24, val_images=6)
    return root


@pytest.fixture(scope="session")
def tiny_config(shapes_root: Path) -> Config:
    """A run of two steps, one of warm-up and one of co-training, that takes well under a second."""
    return override(
        Config(),
        {
            "data.layout": "shapes",
            "data.root": str(shapes_root),
            "data.crop_size": 32,
            "data.scale_min": 0.75,
            "data.scale_max": 1.5,
            "data.loader_workers": 0,
            "network.encoder": "vit_tiny_patch16_224",
            "network.pretrained": False,
            "network.patch_size": 4,
            "network.width": 32,
            "network.depth": 4,
            "network.heads": 2,
            "network.decoder_channels": 16,
            "network.decoder_dilation": 1,
            "cam.scales": (1.0,),
            "threshold.queue": 4,
            "csc.max_anchors": 32,
            "ema.momentum": 0.9,
            "optim.lr": 1e-3,
            "optim.lr_warmup": 0,
            "train.iterations": 2,
            "train.warmup": 1,
            "train.batch_size": 4,
            "train.log_every": 1,
            "train.checkpoint_every": 1,
            "evaluation.every": 2,
            "evaluation.size": 32,
            "evaluation.scales": (1.0,),
            "evaluation.flip": False,
            "evaluation.batch_size": 3,
            "evaluation.coexistence": ("train", "boat"),
            "evaluation.panel_images": 2,
        },
    )
