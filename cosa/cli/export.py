"""`cosa-export SOURCE --out DIR`: a trained network as a folder of its own, to keep or to pass on."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cosa.cli.common import Parser, find_model, store_of
from cosa.storage.files import require_folder

if TYPE_CHECKING:
    from cosa.storage.model_files import StoredModel

_EXAMPLE = 32
"""Pixels of the side of the picture that a registered model is shown with: it takes any size."""


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-export` does; returns the exit code."""
    parser = Parser(
        prog=prog,
        description="Write the assignment network of a run as safetensors and JSON: "
        "`cosa.model.load_model(DIR)` and the other commands take it.",
    )
    parser.source()
    parser.flag("--out", "DIR", "a folder that is not there yet", type=Path)
    parser.switch("--mlflow", "as an MLflow model, for mlflow.pyfunc.load_model(DIR)")
    text = "make it a version of this model in MLflow's registry, of the run that it is from; needs no --out"
    parser.flag("--register", "NAME", text, default="")
    parser.experiment()
    parser.traceback()
    given = parser.parse_known(arguments)
    if not (given.out or given.register):
        parser.error("--out DIR or --register NAME is missing")
    out = given.out.expanduser().absolute() if given.out else None
    if out is not None and out.exists():
        raise FileExistsError(f"out must not exist yet, got {str(given.out)!r}; choose another folder")
    if out is not None:
        require_folder("--out", out)
    from cosa.model import build_model
    from cosa.storage.model_files import save_model
    from cosa.tracking import save_pyfunc

    stored = find_model(given)
    model = build_model(stored)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        save_model(folder, model.network, model.config, model.classes, facts=model.facts)
        places = [("mlflow.pyfunc.load_model", _register(given, folder, stored))] if given.register else []
        if out is not None and given.mlflow:
            save_pyfunc(folder, out)
        elif out is not None:
            shutil.copytree(folder, out)
    if out is not None:
        places.append(("mlflow.pyfunc.load_model" if given.mlflow else "cosa.model.load_model", str(out)))
    for how, where in places:
        print(f"the network after {model.facts.step} steps in {where}; {how}({where!r}) loads it")
    return 0


def _register(given: argparse.Namespace, folder: Path, stored: StoredModel) -> str:
    """Register the model in `folder`; returns its URI there."""
    import numpy as np

    from cosa.tracking import read_run_id, register_model

    picture = np.arange(_EXAMPLE * _EXAMPLE * 3, dtype=np.uint8).reshape(1, _EXAMPLE, _EXAMPLE, 3)
    run_id = stored.facts.run_id or (read_run_id(stored.folder) if stored.folder else "")
    return register_model(
        folder,
        given.register,
        uri=store_of(given),
        experiment=given.experiment,
        run_id=run_id,
        step=stored.facts.step,
        example=picture,
    )
