from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import cosa

ROOT = Path(cosa.__file__).parents[1]

# Stands in for torch: keeps what was declared and, as torch does, refuses to describe an unknown operator.
TORCH = """
from types import SimpleNamespace
declared = []
library = SimpleNamespace(define=lambda name, schema: declared.append(name))
def describe(name):
    if name not in declared:
        raise RuntimeError(f"operator {name} does not exist")
"""

IMPORT = "import cosa.networks._torchvision, torch; print(*torch.declared)"


def _import_beside(folder: Path, torchvision: str | None) -> subprocess.CompletedProcess[str]:
    """Import the shim where torch and torchvision are the given stand-ins; prints what it declared."""
    (folder / "torch.py").write_text(TORCH)
    if torchvision is not None:
        (folder / "torchvision.py").write_text(torchvision)
    blocked = "import sys; sys.modules['torchvision'] = None\n" if torchvision is None else ""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(folder)!r}]\n{blocked}{IMPORT}"],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("torchvision", "declared"),
    [
        ("", ""),
        (
            "import torch; torch.describe('torchvision::nms'); torch.describe('torchvision::qnms')",
            "torchvision::nms torchvision::qnms",
        ),
        (None, ""),
    ],
    ids=["healthy", "operators missing", "not installed"],
)
def test_operators_are_declared_only_where_torchvision_lacks_them(
    torchvision: str | None, declared: str, tmp_path: Path
) -> None:
    done = _import_beside(tmp_path, torchvision)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == declared


@pytest.mark.parametrize(
    ("torchvision", "fault"),
    [
        ("raise RuntimeError('built for another CUDA')", "built for another CUDA"),
        ("import a_package_it_needs", "No module named 'a_package_it_needs'"),
    ],
)
def test_any_other_fault_of_torchvision_is_shown(torchvision: str, fault: str, tmp_path: Path) -> None:
    done = _import_beside(tmp_path, torchvision)

    assert done.returncode != 0
    assert fault in done.stderr


def test_timm_imports_beside_the_torch_that_is_installed_here() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import cosa.networks._torchvision, timm; print(timm.is_model('vit_tiny_patch16_224'))",
        ],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout.strip() == "True", done.stderr
