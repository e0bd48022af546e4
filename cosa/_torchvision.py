"""Makes torchvision importable beside a torch build that its C++ operators do not fit.

timm imports torchvision. Some registries pair a CPU build of torch with a torchvision whose compiled
operators cannot load on it; `import torchvision` then fails on registering shapes for `torchvision::nms`.
Declaring the two operators lets the import pass; nothing here ever calls them. Where torchvision is
healthy, importing this module does nothing. Import it before timm.
"""

import importlib.util
import sys

import torch

_SCHEMAS = {
    "torchvision::nms": "(Tensor a, Tensor b, float c) -> Tensor",
    "torchvision::qnms": "(Tensor a, Tensor b, float c) -> Tensor",
}


def _operators_load() -> bool:
    """Whether torchvision's compiled operators load into this torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # nothing to mend
    extension = importlib.util.find_spec("torchvision._C") if "torchvision" in sys.modules else None
    folder = next(iter(spec.submodule_search_locations))
    path = extension.origin if extension else _extension_in(folder)
    if path is None:
        return False
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError):
        return False
    return True


def _extension_in(folder: str) -> str | None:
    from pathlib import Path

    return next((str(path) for path in sorted(Path(folder).glob("_C*.so"))), None)


if "torchvision" not in sys.modules and not _operators_load():
    for _name, _schema in _SCHEMAS.items():
        torch.library.define(_name, _schema)
