"""The benchmarks run: who is told of a ratio must be able to measure it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cosa.data.shapes import write_shapes
from tests.reading import ROOT

SMALL = {"network.patch_size": 8, "network.width": 16, "network.depth": 4, "network.heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks") / "shapes"
    write_shapes(root, train_images=8, val_images=4)
    return root


@pytest.mark.parametrize(
    ("script", "parts"),
    [
        ("step", set()),
        ("evaluation", {"encoder", "decoder", "counting CPL"}),
        ("loader", {"decoding", "views"}),
    ],
)
def test_a_benchmark_holds_two_sides_against_each_other(script: str, parts: set[str], data: Path) -> None:
    settings = SMALL | {
        "data.layout": "shapes",
        "data.root": data,
        "data.crop_size": 32,
        "evaluation.size": 32,
        "evaluation.coexistence": "boat",
    }
    command = [sys.executable, ROOT / f"tests/benchmarks/{script}.py", ROOT, "--pairs", "1"]
    command += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]

    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=data)

    assert done.returncode == 0, done.stderr
    assert re.search(r"here / other: time \d+\.\d+ \(", done.stdout)
    assert parts <= set(re.findall(r"^ +[\d.]+%  (.+)$", done.stdout, re.MULTILINE))
