from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from cosa.equations.losses import cls_loss
from cosa.structures import Batch


def test_a_function_refuses_tensors_whose_shapes_do_not_fit_each_other() -> None:
    with pytest.raises(TypeCheckError, match="labels"):
        cls_loss(torch.zeros(2, 3), torch.zeros(2, 4))


def test_a_dataclass_refuses_tensors_whose_shapes_do_not_fit_each_other() -> None:
    views = torch.zeros(2, 3, 8, 8)

    with pytest.raises(TypeCheckError, match="valid"):
        Batch(weak=views, strong=views, labels=torch.zeros(2, 4), valid=torch.ones(2, 8, 9, dtype=torch.bool))
