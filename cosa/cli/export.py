"""`cosa-export SOURCE --out DIR`: a trained network as a folder of its own, to keep or to pass on."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from cosa.cli.common import Parser, find_model
from cosa.storage.files import require_folder


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-export` does; returns the exit code."""
    parser = Parser(
        prog=prog,
        description="Write the assignment network of a run as safetensors and JSON: "
        "`cosa.model.load_model(DIR)` and the other commands take it.",
    )
    parser.source()
    parser.flag("--out", "DIR", "a folder that is not there yet", type=Path, required=True)
    parser.switch("--mlflow", "as an MLflow model, for mlflow.pyfunc.load_model(DIR)")
    parser.traceback()
    given = parser.parse_known(arguments)
    out = given.out.expanduser().absolute()
    if out.exists():
        raise FileExistsError(f"out must not exist yet, got {str(given.out)!r}; choose another folder")
    require_folder("--out", out)
    from cosa.model import build_model
    from cosa.storage.model_files import save_model
    from cosa.tracking import save_pyfunc

    model = build_model(find_model(given))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model" if given.mlflow else out
        save_model(folder, model.network, model.config, model.classes, facts=model.facts)
        if given.mlflow:
            save_pyfunc(folder, out)
    how = "mlflow.pyfunc.load_model" if given.mlflow else "cosa.model.load_model"
    print(f"the network after {model.facts.step} steps in {out}; {how}({str(out)!r}) loads it")
    return 0
