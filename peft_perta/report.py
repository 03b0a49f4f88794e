"""What was done, as data: it becomes the provenance file, the model card and what ``peft-perta inspect`` prints."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 20


@dataclass
class WeightDistribution:
    """How one tensor of weights spreads over [0, 1]: mean, standard deviation, quantiles (``QUANTILES``), counts in
    ``BINS`` equal bins."""

    mean: float
    std: float
    quantiles: list[float]
    histogram: list[int]

    @classmethod
    def of(cls, weights: Tensor) -> WeightDistribution:
        values = weights.detach().flatten().cpu().double()
        # torch.quantile takes at most 2^24 values; order statistics of the sorted values have no such limit.
        ordered = values.sort().values
        quantiles = [float(ordered[round(q * (len(ordered) - 1))]) for q in QUANTILES]
        histogram = torch.histc(values.float(), bins=BINS, min=0.0, max=1.0).int().tolist()
        return cls(float(values.mean()), float(values.std(unbiased=False)), quantiles, histogram)


@dataclass
class LayerReport:
    """One layer: the rank that its edit was fitted at, the edit's norm, the share of its energy kept, its weights."""

    name: str
    kind: str
    shape: list[int]
    rank: int
    edit_norm: float
    energy_kept: float
    weights: dict[str, WeightDistribution]


@dataclass
class PerTAReport:
    """One unlearning run. Everything in it is JSON.

    Attributes:
        config: the PerTAConfig.
        base_model: name or path, revision, and quantisation of the base.
        forget_adapter: its name and the SHA-256 of its factors.
        task_adapter: the adapter that was on for gradients at theta_full, if any.
        data: per set, sample count and SHA-256 of its tokens.
        rank: the emitted, uniform rank.
        layers: in the model's order; only layers that the forget adapter touches.
        seconds: wall time of each stage.
        versions: of the packages that took part.
    """

    config: dict[str, Any]
    base_model: dict[str, Any]
    forget_adapter: dict[str, Any]
    task_adapter: str | None
    data: dict[str, dict[str, Any]]
    rank: int
    layers: list[LayerReport]
    seconds: dict[str, float]
    versions: dict[str, str]

    @property
    def energy_kept(self) -> float:
        """The share of the whole edit's energy that the adapter holds."""
        total = sum(layer.edit_norm**2 for layer in self.layers)
        kept = sum(layer.edit_norm**2 * layer.energy_kept for layer in self.layers)
        return kept / total if total else 1.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PerTAReport:
        """Raises TypeError or KeyError where the mapping is no report."""
        layers = [
            LayerReport(**{**layer, "weights": {k: WeightDistribution(**w) for k, w in layer["weights"].items()}})
            for layer in values["layers"]
        ]
        return cls(**{**values, "layers": layers})

    def __str__(self) -> str:
        sets = ", ".join(f"{entry['samples']} {name}" for name, entry in self.data.items()) or "no"
        return (
            f"negative adapter of rank {self.rank} on {len(self.layers)} layers: {self.config['weighting']} "
            f"weights per {self.config['granularity']}, strength {self.config['strength']:g}, from {sets} samples; "
            f"{self.energy_kept:.1%} of the edit's energy kept"
        )
