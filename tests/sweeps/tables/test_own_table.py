"""A table of the user's own: the documented example works word for word, and each mistake is one line."""

from __future__ import annotations

import re

import pytest

from sweeps.planning.plan import make_plan
from sweeps.running.arguments import read_args
from sweeps.running.driver import main
from sweeps.tables import get_tables
from tests.reading import ROOT

PAGE = (ROOT / "docs" / "own-table.md").read_text()
EXAMPLE = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
TEN_LINES = 10


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a table file and returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="my_table.py"):
        (tmp_path / name).write_text(text)
        return name

    return write


def test_the_documented_table_has_about_ten_lines():
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= TEN_LINES


def test_the_documented_table_is_planned_beside_the_papers(own):
    args = read_args("ablation", "", (), ["--tables", "3b", own(EXAMPLE)])
    plan = make_plan(args.base, args.tables, args.seeds)
    rows = {row for trial in plan.trials if trial.kind == "trial" for row in trial.arms}
    assert {"tau/full", "tau/tau-0.1", "tau/tau-half", "3b/full"} <= rows
    full = next(trial for trial in plan.trials if "tau/full" in trial.arms)
    assert "3b/full" in full.arms


def test_a_file_in_the_tables_folder_is_found_by_its_name(own, monkeypatch, tmp_path):
    import sweeps.tables as package

    own(EXAMPLE)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    package.tables.cache_clear()
    try:
        assert get_tables(["tau"])[0].title == "Temperature of the SPL"
        assert "tau" in {table.name for table in get_tables(["all"])}
    finally:
        monkeypatch.undo()
        package.tables.cache_clear()


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ('"s2c.tau": 0.1', '"s2c.tua": 0.1', "got 's2c.tua'; did you mean 's2c.tau'?"),
        ('"tau-0.1"', '"full"', "must name each arm once, got 'full' twice; rename one"),
        ("title=", "titel=", "titel"),
        ("TABLE =", "TABEL =", "table file must hold TABLE = Table(...), got NoneType in"),
        ("(\n", "((\n", "table file must run, got SyntaxError"),
    ],
)
def test_a_mistake_in_a_table_file_is_one_line_that_names_it(own, capsys, before, after, line):
    assert before in EXAMPLE
    name = own(EXAMPLE.replace(before, after, 1))
    assert main("ablation", "", (), ["--dry-run", "--tables", name]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert "my_table.py" in error
    assert error.count("\n") == 1


def test_a_wrong_keyword_names_the_nearest_one(own, capsys):
    name = own(EXAMPLE.replace("title=", "titel=", 1))
    assert main("ablation", "", (), ["--dry-run", "--tables", name]) == 2
    assert re.search(r"did you mean '(Table\.)?title'", capsys.readouterr().err, re.IGNORECASE)


def test_two_files_with_tables_of_one_name_are_refused(own):
    first, second = own(EXAMPLE), own(EXAMPLE.replace("0.1", "0.2"), "other.py")
    with pytest.raises(ValueError, match="names of their own, got two called 'tau'"):
        get_tables([first, second])
