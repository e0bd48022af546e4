"""No equation of the training step reads a value back: on a GPU that would stop it once per call.

Fake tensors have shapes and no values, so whatever asks for a value (`.item()`, a boolean index, an `if`)
raises here, with or without a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from cosa.equations.cam import to_activation
from cosa.equations.losses import c2s_loss, cls_loss, csc_loss, s2c_loss
from cosa.equations.pseudo_labels import cam_pseudo_labels, max_activation, seg_pseudo_labels
from cosa.equations.reliability import perplexity, reliability_sum, reliability_weights
from cosa.equations.threshold import activation_histogram, make_threshold

CPU = torch.device("cpu")


def assign_and_learn(mode: str) -> Tensor:
    """Everything between AN's maps and the sum of the losses."""
    cam, seg_logits = torch.randn(2, 3, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8, requires_grad=True)
    labels, valid = torch.ones(2, 3), torch.ones(2, 8, 8, dtype=torch.bool)
    threshold = make_threshold(mode, 0.45, 3, 0.05, 0.0, CPU)
    with torch.no_grad():
        activation = to_activation(cam, labels, valid)
        nu = max_activation(activation)
        threshold.update(activation_histogram(nu, valid))
        cpl = cam_pseudo_labels(activation, threshold.value, valid)
        doubt = perplexity(nu, threshold.value, 0.8, 1.0)
        total, count = reliability_sum(doubt, valid).unbind()
        raw = reliability_weights(doubt, valid, total / count)
        spl = seg_pseudo_labels(seg_logits, labels, 0.01)
    loss = (
        cls_loss(cam.amax((-2, -1)), labels)
        + c2s_loss(seg_logits.log_softmax(1), cpl, raw)
        + s2c_loss(cam, spl, torch.arange(cam.shape[1]).expand(cam.shape[:2]), valid)
        + csc_loss(cam, cpl, doubt, 1.0, 0.5, torch.rand(2, 8, 8), 16)
    )
    loss.backward()
    return loss


@pytest.mark.parametrize("mode", ["dynamic", "fixed"])
def test_no_equation_reads_a_value_back(mode: str) -> None:
    with FakeTensorMode():
        loss = assign_and_learn(mode)

    assert loss.shape == ()


def test_a_fake_tensor_tells_when_its_value_is_asked_for() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.arange(3)[torch.randn(3).argmax()]
