"""Makes torchvision importable beside a torch build that its compiled operators do not fit.

timm imports torchvision. Where a CPU build of torch meets a torchvision compiled for another build, the
operators do not load and `import torchvision` stops at the first one it wants to describe; declaring
those lets the import pass, and nothing here ever calls them. Where torchvision is healthy or missing,
importing this module changes nothing. Import it before timm.
"""

from __future__ import annotations

import importlib

import torch

# Operators that torchvision describes on import even where it found that its library does not load.
_SCHEMAS = {
    "torchvision::nms": "(Tensor a, Tensor b, float c) -> Tensor",
    "torchvision::qnms": "(Tensor a, Tensor b, float c) -> Tensor",
}


def _import_or_mend() -> None:
    """Import torchvision; where its operators are missing, declare them and import it again."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name, schema in _SCHEMAS.items():
            torch.library.define(name, schema)
        importlib.import_module("torchvision")


_import_or_mend()
