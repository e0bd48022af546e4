"""What a Ray job takes along, by Ray's own packing: the working tree, no data, results or secrets."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package

from tests.reading import ROOT

LEFT_BEHIND = (
    ".venv/bin/python",
    ".git/config",
    "data/shapes/a.png",
    "runs/x/checkpoints/10.pt",
    "runs/mlflow.db",
    "VOCdevkit/VOC2012/JPEGImages/a.jpg",
    "vit.safetensors",
    "cosa/__pycache__/trainer.cpython-311.pyc",
    ".mypy_cache/a.json",
    "cluster/my-aws.yaml",
    "cluster/tracking/.env",
    "big.tar.gz",
)


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of what Ray would upload of a checkout that has been worked in."""
    folder = tmp_path_factory.mktemp("upload") / "cosa"
    folder.mkdir()
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()
    if not names:
        pytest.skip("needs a git checkout to know which files are the project's")
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in LEFT_BEHIND:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not to be uploaded")
    (folder / "my_table.py").write_text("TABLE = None  # not committed")
    package = folder.parent / "package.zip"
    create_package(str(folder), package, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(package) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_all_code_is_taken_along(uploaded: set[str]) -> None:
    code = {
        str(path.relative_to(ROOT))
        for part in ("cosa", "sweeps")
        for path in (ROOT / part).rglob("*")
        if path.is_file() and path.suffix in {".py", ".j2", ".csv", ".html"}
    }

    assert {"pyproject.toml", "requirements.lock"} | code <= {Path(name).as_posix() for name in uploaded}


def test_what_is_not_committed_yet_is_taken_along(uploaded: set[str]) -> None:
    assert "my_table.py" in uploaded


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_environments_data_results_and_secrets_stay(uploaded: set[str], name: str) -> None:
    assert name not in uploaded


def test_tests_and_pages_stay(uploaded: set[str]) -> None:
    assert not [name for name in uploaded if name.startswith(("tests/", "docs/", ".ci/"))]
