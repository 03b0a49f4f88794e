"""One layer of a negative adapter: its edit, its error, and the distribution of its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from .shapes import Count, Norm, OnSets, Share

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

BINS = 20

_FINE_BINS = 10_000

_CHUNK = 2**18  # weights read at a time: they become about five float64 tensors


@dataclass
class WeightDistribution:
    """How the weights of one tensor are distributed over [0, 1].

    Attributes:
        mean: their mean.
        std: their standard deviation.
        quantiles: the quantiles at ``QUANTILES``.
        histogram: counts in ``BINS`` bins of equal width.
    """

    mean: Share
    std: Share
    quantiles: Annotated[list[Share], Field(min_length=len(QUANTILES), max_length=len(QUANTILES))]
    histogram: Annotated[list[Count], Field(min_length=BINS, max_length=BINS)]

    @classmethod
    def of(cls, weights: Tensor) -> WeightDistribution:
        """The distribution of a tensor's elements; quantiles are exact to 1e-4.

        Quantiles are read from a fine histogram, because sorting or copying the weights of a large layer would take too
        much memory.
        """
        counts = torch.zeros(_FINE_BINS, dtype=torch.long)
        total = squares = 0.0
        for part in weights.detach().flatten().split(_CHUNK):
            values = part.double()
            counts += torch.bincount((values * _FINE_BINS).long().clamp(0, _FINE_BINS - 1), minlength=_FINE_BINS).cpu()
            total += float(values.sum())
            squares += float(values.square().sum())
        size = weights.numel()
        mean = total / size
        ranks = torch.tensor([round(q * (size - 1)) for q in QUANTILES])
        quantiles = ((torch.searchsorted(counts.cumsum(0), ranks, right=True) + 0.5) / _FINE_BINS).tolist()
        return cls(mean, max(squares / size - mean**2, 0.0) ** 0.5, quantiles, counts.reshape(BINS, -1).sum(1).tolist())


@dataclass
class LayerProvenance:
    """One layer of a negative adapter.

    Attributes:
        name: the layer's path in the base model.
        kind: its layer kind.
        shape: [O, I] of its weight.
        rank: the rank that its edit was fitted at.
        edit_norm: the Frobenius norm of its edit.
        energy_kept: the share of the edit's squared norm that the factors hold, in [0, 1].
        weights: tensor -> the distribution of the weights that its edit was multiplied by.
        excess_error: the bound on the fit's excess squared error (see ``Factors``).
        metric_error: the share of the edit that the fit lost in its own measure (see ``Factors``).
        left_on_inputs: set -> the share of the edit's squared output that is left on the set's inputs once input
            directions are weighed; empty where they are not weighed.
    """

    name: str
    kind: str
    shape: list[Count]
    rank: int
    edit_norm: Norm
    energy_kept: Share
    weights: dict[str, WeightDistribution]
    excess_error: float = 0.0
    metric_error: float = 0.0
    left_on_inputs: OnSets | Annotated[dict[str, float], Field(max_length=0)] = field(default_factory=dict)
