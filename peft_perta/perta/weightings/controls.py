"""Controls: a weighting without its places, or without its spread.

The claim that weights per parameter help needs both controls: the weights shuffled within each matrix (the same values
in the wrong places), and each matrix's weights replaced by their mean (a strength per layer, nothing per parameter).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .weighting import Weighting


def shuffled(weighting: Weighting) -> Weighting:
    """The same weights in a random order, which is the same at every call."""

    def function(forget: Tensor, retain: Tensor, power: float) -> Tensor:
        weights = _weights(weighting, forget, retain, power)
        order = torch.randperm(weights.numel(), generator=torch.Generator().manual_seed(0)).to(weights.device)
        return weights.flatten()[order].reshape(weights.shape)

    return dataclasses.replace(
        weighting,
        name=f"{weighting.name}-shuffled",
        function=function,
        description=f"a control: the weights of {weighting.name!r}, shuffled within each matrix",
    )


def at_own_mean(weighting: Weighting) -> Weighting:
    """Each matrix's weights replaced by their mean."""

    def function(forget: Tensor, retain: Tensor, power: float) -> Tensor:
        weights = _weights(weighting, forget, retain, power)
        return weights.mean().expand_as(weights).clone()

    return dataclasses.replace(
        weighting,
        name=f"{weighting.name}-mean",
        function=function,
        description=f"a control: the weights of {weighting.name!r}, each matrix's replaced by their mean",
    )


def _weights(weighting: Weighting, forget: Tensor, retain: Tensor, power: float) -> Tensor:
    assert weighting.function is not None
    return weighting.function(forget, retain, power)
