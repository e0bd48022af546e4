"""`cosa-import FILE.pth --out DIR`: the authors' released weights as a model's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cosa.cli.common import Parser
from cosa.storage.files import require_folder


def main(prog: str, arguments: Sequence[str]) -> int:
    """What `cosa-import` does; returns the exit code."""
    parser = Parser(
        prog=prog,
        description="Turn a checkpoint of the authors' release (voc_weights.pth, coco_weights.pth) into a "
        "model's folder, which cosa-evaluate, cosa-predict and cosa-export take as that of a run.",
    )
    parser.flag("file", "FILE", "the checkpoint", type=Path)
    parser.flag("--out", "DIR", "a folder that is not there yet", type=Path, required=True)
    parser.traceback()
    given = parser.parse_known(arguments)
    out = given.out.expanduser().absolute()
    if out.exists():
        raise FileExistsError(f"out must not exist yet, got {str(given.out)!r}; choose another folder")
    require_folder("--out", out)
    import torch

    from cosa.data import COCO_CLASSES, VOC_CLASSES
    from cosa.model import build_model
    from cosa.networks.published import pinned
    from cosa.networks.released import read_released
    from cosa.storage.model_files import Facts, StoredModel, save_model

    source = given.file.expanduser().absolute()
    released = read_released(source)
    config = pinned(released.config)
    classes = VOC_CLASSES if config.data.layout == "voc" else COCO_CLASSES
    facts = Facts(step=released.step, xi=released.xi, aux_xi=released.xi, data_fingerprint="")
    stored = StoredModel(
        config=config, classes=classes, facts=facts, weights=released.weights, folder=source.parent
    )
    model = build_model(stored, device=torch.device("cpu"))
    save_model(out, model.network, config, classes, facts=facts)
    print(f"the released {config.data.layout} network after {released.step} steps in {out}")
    return 0
