"""Gradient ascent on the forget set."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .loss import ForwardPass, Loss
from .loss_inputs import LossInputs


def gradient_ascent(inputs: Mapping[ForwardPass, LossInputs], beta: float, margin: float) -> Tensor:
    """-mean_t NLL, [N]. It is unbounded below: a few steps too many ruin the model."""
    return -inputs[ForwardPass.MODEL].mean_losses()


GRADIENT_ASCENT = Loss(
    "gradient-ascent", "maximise the cross-entropy; unbounded, so too many steps ruin the model", gradient_ascent
)
