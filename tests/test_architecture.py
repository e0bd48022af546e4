"""The house's rules, checked from its source: who may import whom, and one home for each equation."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosa.config import Config, to_json
from tests.reading import COSA, MODULES, ROOT, SWEEPS, docstrings, imports, module_name, packages

# A room is a folder, or a module that stands alone. It imports only rooms from floors below its own.
FLOORS = (
    {"cosa", "cosa.config", "cosa.structures"},
    {"cosa.storage"},
    {"cosa.equations", "cosa.networks", "cosa.data"},
    {"cosa.tracking"},
    {"cosa.model"},
    {"cosa.evaluation"},
    {"cosa.training"},
    {"cosa.distributed"},
    {"cosa.cli"},
    {"sweeps", "sweeps.runs", "sweeps.tables", "sweeps.published"},
    {"sweeps.planning", "sweeps.reporting"},
    {"sweeps.running"},
    {"sweeps.tuning"},
    {"sweeps.ablation", "sweeps.hyperparameters", "sweeps.multistage", "sweeps.search", "sweeps.report"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_ENTRIES = 12


def _room(module: str) -> str:
    """The room of a module: `cosa.networks.ema` is in `cosa.networks`."""
    return ".".join(module.split(".")[:2])


def _ours(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports."""
    for name in imports(path.read_text()):
        if name.partition(".")[0] in {"cosa", "sweeps"}:
            yield name


def _ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*COSA, *SWEEPS], ids=_ids)
def test_imports_run_one_way(path: Path) -> None:
    room = _room(module_name(path))
    assert room in FLOOR_OF, f"{room} has no place in FLOORS yet: give it one"

    for name in _ours(path):
        other = _room(name)
        assert other == room or FLOOR_OF[other] < FLOOR_OF[room], f"{room} must not import {name}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module_name(path): {n for n in _ours(path) if n in MODULES} for path in [*COSA, *SWEEPS]}

    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("folder", sorted({path.parent for path in [*COSA, *SWEEPS]}), ids=_ids)
def test_a_folder_is_seen_at_a_glance(folder: Path) -> None:
    hidden = {"__init__.py", "__pycache__"}
    entries = {entry.name for entry in folder.iterdir()} - hidden

    assert len(entries) <= MOST_ENTRIES, sorted(entries)


@pytest.mark.parametrize("path", [p for p in COSA if _room(module_name(p)) == "cosa.equations"], ids=_ids)
def test_an_equation_needs_nothing_but_torch(path: Path) -> None:
    assert packages(path) <= sys.stdlib_module_names | {"torch", "jaxtyping", "cosa"}
    for name in _ours(path):
        assert _room(name) in {"cosa.equations", "cosa.structures"}, f"{name} is no equation's business"


@pytest.mark.parametrize(
    ("package", "rooms"),
    [
        ("mlflow", {"cosa.tracking"}),
        ("ray", {"cosa.distributed"}),
        ("pydensecrf", {"cosa.evaluation"}),
        ("optuna", set()),
        ("sweeps", set()),
    ],
)
def test_one_room_alone_knows_a_service(package: str, rooms: set[str]) -> None:
    assert {_room(module_name(path)) for path in COSA if package in packages(path)} <= rooms


def test_settings_and_presets_need_pydantic_alone() -> None:
    for path in (ROOT / "cosa" / "config").glob("*.py"):
        assert packages(path) <= sys.stdlib_module_names | {"pydantic", "cosa"}


@pytest.mark.parametrize("path", SWEEPS, ids=_ids)
def test_sweeps_use_the_public_names_of_cosa(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "cosa":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not any(name.startswith("_") for name in names), ast.unparse(node)


def test_the_reading_of_imports_sees_late_and_hidden_ones() -> None:
    source = """
from cosa import config
def late():
    import ray.train
    importlib.import_module("mlflow")
if TYPE_CHECKING:
    from optuna import Study
"""

    assert set(imports(source)) == {"cosa.config", "ray.train", "mlflow", "optuna"}


def _run(program: str, *, without: tuple[str, ...] = ()) -> str:
    """Standard output of a Python program in which some packages cannot be imported."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_cosa_imports_in_an_instant() -> None:
    program = "import cosa, cosa.config, cosa.config.presets; print(*sys.modules)"

    assert not {"torch", "numpy", "timm", "ray", "mlflow"} & set(_run(program).split())


def test_the_command_line_waits_for_no_heavy_import_before_it_answers() -> None:
    program = "import cosa.cli; print(*sys.modules)"

    assert not {"torch", "timm", "ray", "mlflow", "albumentations"} & set(_run(program).split())


def test_training_without_tracking_needs_neither_ray_nor_mlflow_nor_optuna(
    tiny_config: Config, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(to_json(tiny_config))
    program = f"""
from pathlib import Path
from cosa.config import from_json
from cosa.training.trainer import RunSpec, train
out = Path({str(tmp_path)!r})
train(RunSpec(config=from_json((out / "config.json").read_text()), out=out / "run"))
print((out / "run" / "result.json").exists())
"""

    assert _run(program, without=("ray", "mlflow", "optuna")).endswith("True")


def _citations(text: str) -> Iterator[int]:
    """Equation numbers of each `Paper: Eq. (n).`, also of `Paper: Eq. (9) and (10).`"""
    for numbers in re.findall(r"Paper: Eq\. ((?:\(\d+\)(?:, | and )?)+)", text):
        yield from map(int, re.findall(r"\d+", numbers))


@pytest.fixture(scope="module")
def homes() -> dict[int, list[str]]:
    """Modules whose docstrings cite an equation, by its number, once for each citation."""
    found: dict[int, list[str]] = {}
    for path in COSA:
        for text in docstrings(path):
            for equation in _citations(text):
                found.setdefault(equation, []).append(module_name(path))
    return found


@pytest.mark.parametrize("equation", range(1, 12))
def test_every_equation_of_the_paper_has_one_home(equation: int, homes: dict[int, list[str]]) -> None:
    found = homes.get(equation, [])

    assert len(found) == 1, f"`Paper: Eq. ({equation}).` must stand in one docstring, found in {found}"
