"""A setting that nothing reads is a lie to whoever sets it: this finds them, from the source alone."""

from __future__ import annotations

import ast
import re

import pytest

from cosa.config import fields
from tests.reading import COSA

SECTIONS = {name.partition(".")[0] for name in fields()}


class _Reads(ast.NodeVisitor):
    """Settings that a module reads, as `config.csc.weight` or as `section.weight` where the section is known.

    A name is known to be a Config or a section by its annotation (`config: CscConfig`), by what it was
    assigned from (`csc = config.csc`), or, for a Config, by being called `config`. Attributes of `self` are
    known in the whole class, names in their function.
    """

    def __init__(self) -> None:
        self.found: set[str] = set()
        self._scopes: list[dict[str, str]] = [{}]
        self._attributes: dict[str, str] = {}

    def kind(self, node: ast.expr | None) -> str | None:
        """`Config`, a section's name, or None for anything else."""
        match node:
            case ast.Name() | ast.Attribute(value=ast.Name(id="self")):
                known = next((s[k] for s in reversed(self._scopes) if (k := ast.unparse(node)) in s), None)
                return known or ("Config" if ast.unparse(node).split(".")[-1] == "config" else None)
            case ast.Attribute(value=value, attr=attr):
                if attr == "config":
                    return "Config"
                return attr if attr in SECTIONS and self.kind(value) == "Config" else None
        return None

    def _learn(self, target: ast.expr, kind: str | None) -> None:
        if kind is None:
            return
        if isinstance(target, ast.Name):
            self._scopes[-1][target.id] = kind
        elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
            self._attributes[ast.unparse(target)] = kind

    @staticmethod
    def _annotated(annotation: ast.expr | None) -> str | None:
        name = ast.unparse(annotation).split(".")[-1] if annotation else ""
        if name == "Config":
            return name
        section = re.sub(r"Config$", "", name).lower()
        return section if name.endswith("Config") and section in SECTIONS else None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._attributes = self._attributes, {}
        self._scopes.append(self._attributes)
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and (kind := self._annotated(item.annotation)):
                self._attributes[f"self.{ast.unparse(item.target)}"] = kind
        for _ in range(2):  # a method may read what a later one sets
            self.generic_visit(node)
        self._scopes.pop()
        self._attributes = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        known = {a.arg: kind for a in arguments if (kind := self._annotated(a.annotation))}
        self._scopes.append(known)
        self.generic_visit(node)
        self._scopes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                self._learn(name, self.kind(value))
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._learn(node.target, self._annotated(node.annotation))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        section = self.kind(node.value)
        if isinstance(node.ctx, ast.Load) and section in SECTIONS:
            self.found.add(f"{section}.{node.attr}")
        self.generic_visit(node)


def _settings_read(source: str) -> set[str]:
    reads = _Reads()
    reads.visit(ast.parse(source))
    return reads.found


@pytest.fixture(scope="module")
def settings_read() -> set[str]:
    readers = [path for path in COSA if path.parent.name != "config"]
    return set().union(*(_settings_read(path.read_text()) for path in readers))


@pytest.mark.parametrize("name", fields())
def test_every_setting_is_read_by_somebody(name: str, settings_read: set[str]) -> None:
    assert name in settings_read, f"nothing in cosa reads {name}: use it or remove it"


def test_the_reading_of_settings_tells_sections_apart() -> None:
    source = """
class Judge:
    raw: RawConfig
    def __init__(self, config: Config, section: EvaluationConfig):
        self.settings, self.section = config, section
    def judge(self):
        return self.section.xi, self.settings.csc.tau, self.raw.beta
def plain(config: ThresholdConfig, data, whole):
    s2c = whole.config.s2c
    return config.queue, s2c.weight, data.root, whole.ema.momentum, config.csc
"""

    assert _settings_read(source) == {
        "evaluation.xi",
        "csc.tau",
        "raw.beta",
        "threshold.queue",
        "threshold.csc",
        "s2c.weight",
    }
