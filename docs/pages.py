"""Pages that the site has beside those of docs/: files of the checkout, and the reference of every room."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "cluster/README.md": "cluster.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def _moved(text: str, folder: Path) -> str:
    """A page's text with its links as they run from the site's root; to a file without a page, no link."""

    def target(found: re.Match[str]) -> str:
        path = (folder / found[1]).resolve().relative_to(ROOT)
        name = f"{path}/README.md" if (ROOT / path).is_dir() else str(path)
        return PAGES.get(name, name.removeprefix("docs/"))

    text = LINK.sub(target, text)
    known = {*PAGES.values(), *(path.name for path in (ROOT / "docs").iterdir())}
    return re.sub(
        r"(?<!!)\[([^\]]+)\]\(([^)#:\s]+)\)", lambda m: m[0] if m[2] in known else f"`{m[2]}`", text
    )


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs with the files of docs/."""
    for name, page in PAGES.items():
        text = _moved((ROOT / name).read_text(), (ROOT / name).parent)
        files.append(File.generated(config, page, content=text))
    reference = []
    for package in ("cosa", "sweeps"):
        for room in sorted((ROOT / package).iterdir()):
            names = sorted(room.glob("*.py")) if room.is_dir() else [room] if room.suffix == ".py" else []
            names = [path for path in names if not path.name.startswith("_")]
            if not names or room.name.startswith("_"):
                continue
            dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in names]
            title = f"{package}.{room.stem}"
            body = "\n\n".join(f"::: {name}" for name in dotted)
            files.append(File.generated(config, f"reference/{title}.md", content=f"# {title}\n\n{body}\n"))
            reference.append({title: f"reference/{title}.md"})
    config.nav.append({"Reference": reference})
    return files
