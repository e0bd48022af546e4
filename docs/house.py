"""Draws the house from its source: `house.svg`, rooms and the way imports run, and the tables of `house.md`.

    python docs/house.py          # writes both; a test fails where they no longer show the source

A room is a folder of cosa or sweeps, or a module that stands alone. It lies above all rooms that it imports.
An arrow is left out where others lead there already.
"""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
BEGIN, END = "<!-- written by house.py -->", "<!-- end -->"
WIDTH, HEIGHT, GAP, RISE = 132, 44, 18, 82  # pixels of a room, and from one to the next
MARGIN, ASIDE, TOP = 20, 70, 64  # around all, between the packages, above the first room
COLOURS = {"cosa": "#dbe7f5", "sweeps": "#f7e6cf"}
TITLES = {"cosa": "one training run", "sweeps": "the experiments, on the public names of cosa"}

Graph = dict[str, set[str]]


def package_of(room: str) -> str:
    """`cosa.networks` is in `cosa`."""
    return room.partition(".")[0]


def room_of(module: str) -> str:
    """`cosa.networks.ema` is in `cosa.networks`."""
    return ".".join(module.split(".")[:2])


def modules() -> dict[str, ast.Module]:
    """Every module of cosa and sweeps, parsed, by its dotted name."""
    found = {}
    for package in COLOURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text())
    return found


def imported(tree: ast.Module, known: Mapping[str, object]) -> Iterator[str]:
    """Modules of ours that a module imports, late imports among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known or node.module in known:
                    yield full if full in known else node.module


def graph_of(trees: Mapping[str, ast.Module]) -> Graph:
    """The rooms, each with those it imports; the packages' own fronts are no rooms."""
    graph: Graph = {room_of(name): set() for name in trees if "." in name}
    for name, tree in trees.items():
        if room_of(name) in graph:
            others = {room_of(other) for other in imported(tree, trees)} & graph.keys()
            graph[room_of(name)] |= others - {room_of(name)}
    return graph


def levels(graph: Graph) -> dict[str, int]:
    """How high a room lies in its package: above all of it that it imports.

    Raises:
        graphlib.CycleError: Rooms import each other in a circle.
    """
    level: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(graph).static_order():
        beside = [level[other] + 1 for other in graph[room] if package_of(other) == package_of(room)]
        level[room] = max(beside, default=0)
    return level


def arrows(graph: Graph) -> Iterator[tuple[str, str]]:
    """Imports inside a package that no longer way shows already."""

    def reached(room: str) -> set[str]:
        return graph[room].union(*(reached(other) for other in graph[room]))

    for room, others in sorted(graph.items()):
        for other in sorted(others):
            beside = package_of(room) == package_of(other)
            if beside and not any(other in reached(via) for via in others - {other}):
                yield room, other


def places(graph: Graph) -> tuple[dict[str, tuple[float, float]], float, float]:
    """Where each room's left upper corner is, a package beside the other; then how large the picture is."""
    level, found, left = levels(graph), {}, float(MARGIN)
    bottom = TOP + max(level.values()) * RISE
    for package in COLOURS:
        rooms = sorted(room for room in graph if package_of(room) == package)
        rows = [[r for r in rooms if level[r] == n] for n in range(1 + max(level[r] for r in rooms))]
        wide = max(map(len, rows)) * (WIDTH + GAP) - GAP
        for height, row in enumerate(rows):
            start = left + (wide - len(row) * (WIDTH + GAP) + GAP) / 2
            for column, room in enumerate(row):
                found[room] = (start + column * (WIDTH + GAP), bottom - height * RISE)
        left += wide + ASIDE
    return found, left - ASIDE + MARGIN, bottom + HEIGHT + MARGIN


def drawing(graph: Graph, sizes: Mapping[str, int]) -> str:
    """The picture as SVG."""
    place, width, height = places(graph)
    lines = []
    for room, other in arrows(graph):
        (x, y), (to_x, to_y) = place[room], place[other]
        x, y, to_x, to_y = x + WIDTH / 2, y + HEIGHT, to_x + WIDTH / 2, to_y - 1
        bend = (to_y - y) / 2
        lines.append(
            f'<path d="M{x:g} {y:g}C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y:g}"/>'
        )
    boxes = []
    for room, (x, y) in place.items():
        count = f"{sizes[room]} modules" if sizes[room] > 1 else "1 module"
        middle, name = x + WIDTH / 2, room.partition(".")[2]
        boxes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="7" '
            f'fill="{COLOURS[package_of(room)]}" stroke="#5b6675"/>'
            f'<text x="{middle:g}" y="{y + 20:g}" font-size="13" font-weight="600">{name}</text>'
            f'<text x="{middle:g}" y="{y + 35:g}" font-size="10.5">{count}</text>'
        )
    for package, words in TITLES.items():
        inside = [place[room][0] for room in place if package_of(room) == package]
        middle = (min(inside) + max(inside) + WIDTH) / 2
        boxes.append(
            f'<text x="{middle:g}" y="26" font-size="16" font-weight="700">{package}</text>'
            f'<text x="{middle:g}" y="44" font-size="11">{words}</text>'
        )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}">
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">\
<path d="M0 0 8 4 0 8z" fill="#7a8594"/></marker></defs>
<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>
<g fill="none" stroke="#7a8594" stroke-width="1.2">
{chr(10).join(lines).replace("/>", ' marker-end="url(#tip)"/>')}
</g>
<g font-family="system-ui, sans-serif" text-anchor="middle" fill="#1d2733">
{chr(10).join(boxes)}
</g>
</svg>
"""


def first_line(tree: ast.Module) -> str:
    """The first sentence of a module's docstring, as Markdown in a table."""
    return (ast.get_docstring(tree) or "").partition("\n")[0].replace("|", "\\|")


def tables(trees: Mapping[str, ast.Module], graph: Graph) -> str:
    """A table per package: its rooms from the ground up, and what each module owns."""
    level, parts = levels(graph), []
    for package in COLOURS:
        rooms = sorted((r for r in graph if package_of(r) == package), key=lambda r: (level[r], r))
        for room in rooms:
            inside = [name for name in trees if room_of(name) == room and name != room]
            parts.append(f"\n### {room}\n\n{first_line(trees[room])}\n")
            if inside:
                parts.append("| module | owns |\n|---|---|")
                parts += [f"| `{name.rpartition('.')[2]}` | {first_line(trees[name])} |" for name in inside]
    return "\n".join(parts).strip() + "\n"


def _defines(tree: ast.Module) -> bool:
    """Whether a module holds more than a docstring and names from elsewhere."""
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If) for node in tree.body) or any(
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) != "__all__" for node in tree.body
    )


def written() -> dict[Path, str]:
    """The texts of both files as the source asks for them."""
    trees = modules()
    graph = graph_of(trees)
    sizes = {room: sum(room_of(n) == room and _defines(trees[n]) for n in trees) or 1 for room in graph}
    page = (DOCS / "house.md").read_text()
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    return {
        DOCS / "house.svg": drawing(graph, sizes),
        DOCS / "house.md": f"{head}{BEGIN}\n\n{tables(trees, graph)}\n{END}{tail}",
    }


def main() -> int:
    """Write both."""
    for path, text in written().items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
