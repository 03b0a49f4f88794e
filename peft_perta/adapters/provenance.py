"""What was done, as data: it becomes the provenance file, the model card and what ``peft-perta inspect`` prints."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..model import base_model, base_name, hash_embeddings

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


BINS = 20


_FINE_BINS = 10_000


_CHUNK = 2**18  # weights that are looked at at once, as some five tensors of float64


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
        """Quantiles to 1e-4, from a fine histogram: the weights of a large layer are not sorted, nor copied whole."""
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
    """One layer: the rank that its edit was fitted at, the edit's norm, the share of its energy kept, the bound on the
    fit's excess squared error and the share lost in the fit's own measure (``factorize.Factors``), its weights, and
    what weighing input directions left of the edit's squared output on each set's inputs (empty where it was not)."""

    name: str
    kind: str
    shape: list[int]
    rank: int
    edit_norm: float
    energy_kept: float
    weights: dict[str, WeightDistribution]
    excess_error: float = 0.0
    metric_error: float = 0.0
    left_on_inputs: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerProvenance:
        weights = {key: WeightDistribution(**found) for key, found in values["weights"].items()}
        return cls(**{**values, "weights": weights})


@dataclass
class PerTAProvenance:
    """One unlearning run. Everything in it is JSON.

    Attributes:
        config: the PerTAConfig.
        base_model: name or path, revision, and quantisation of the base.
        forget_adapter: its name and the SHA-256 of its factors.
        task_adapter: the adapter that was on for gradients at theta_full, if any.
        data: per set, sample count and SHA-256 of its tokens.
        rank: the emitted, uniform rank.
        layers: in the model's order; only layers that the forget adapter touches.
        versions: of the packages that took part.
        calibration: the search for the strength (``calibration.Calibration``), where it was searched for.
        divergence: KL of the adapter's next-token distributions from those of the edit at full rank, mean over tokens
            with loss, nats; 0 where the rank holds the edit exactly, None where it was not measured.
        seconds: wall time of each stage; not written down, so that two runs of one thing write the same bytes.
    """

    config: dict[str, Any]
    base_model: dict[str, Any]
    forget_adapter: dict[str, Any]
    task_adapter: str | None
    data: dict[str, dict[str, Any]]
    rank: int
    layers: list[LayerProvenance]
    versions: dict[str, str]
    calibration: dict[str, Any] | None = None
    fit_kl: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def energy_kept(self) -> float:
        """The share of the whole edit's energy that the adapter holds."""
        total = sum(layer.edit_norm**2 for layer in self.layers)
        kept = sum(layer.edit_norm**2 * layer.energy_kept for layer in self.layers)
        return kept / total if total else 1.0

    @property
    def metric_error(self) -> float:
        """The share of the edit that the fit lost in its own measure, mean over layers."""
        return sum(layer.metric_error for layer in self.layers) / max(len(self.layers), 1)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["seconds"]
        return values

    def scaled(self, factor: float) -> PerTAProvenance:
        """That of the same adapter at ``factor`` times its strength."""
        layers = [dataclasses.replace(layer, edit_norm=layer.edit_norm * abs(factor)) for layer in self.layers]
        config = {**self.config, "strength": self.config["strength"] * factor}
        return dataclasses.replace(self, config=config, layers=layers)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PerTAProvenance:
        """Raises TypeError or KeyError where the mapping is no report."""
        return cls(**{**values, "layers": [LayerProvenance.from_dict(layer) for layer in values["layers"]]})

    def __str__(self) -> str:
        sets = ", ".join(f"{entry['samples']} {name}" for name, entry in self.data.items()) or "no"
        return (
            f"negative adapter of rank {self.rank} on {len(self.layers)} layers: {self.config['weighting']} "
            f"weights per {self.config['granularity']}, strength {self.config['strength']:g}, from {sets} samples; "
            f"{self.energy_kept:.1%} of the edit's energy kept"
        )


@dataclass
class FusedProvenance:
    """Several adapters as one.

    Attributes:
        base_model: its name.
        parts: name, strength and SHA-256 of the factors of each adapter that went in.
        rank: the emitted, uniform rank.
        energy_kept: the share of the sum's squared Frobenius norm that the adapter holds; 1 where nothing was cut.
        calibration: the search for the strengths (``calibration.Calibration``), where they were searched for.
    """

    base_model: dict[str, Any]
    parts: list[dict[str, Any]]
    rank: int
    energy_kept: float
    dtype: str = "float32"
    calibration: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"fused": dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FusedProvenance:
        return cls(**values["fused"])

    def __str__(self) -> str:
        names = " + ".join(f"{part['strength']:g} x {part['name']}" for part in self.parts)
        return f"{names} as one adapter of rank {self.rank}; {self.energy_kept:.1%} of the sum's energy kept"


@dataclass
class InfluenceProvenance:
    """Rows taken out of an adapter, or changed in it, by its curvature.

    Attributes:
        kind: the function: 'erase_instances', 'modify_queries' or 'correct_responses'.
        config: the InfluenceSettings.
        base_model: name or path, revision, and quantisation of the base.
        adapter: name, and SHA-256 of the factors, of the adapter that was edited.
        with_adapters: the same of those that were on beside it; losses and solution hold with them on.
        data: of 'training', 'changed' (rows of it that change), 'kept' (the others) and 'new' (what they become):
            sample count and SHA-256 of the tokens.
        damping: what was added to the curvature, as a number.
        residual: |b - (H + damping) D| / |b| of the solution D.
        iterations: products with the whole curvature.
        stopped: 'tolerance', 'iterations' or 'rounding'.
        losses: per set, mean loss before and after, nats per token.
        form: what is emitted: the 'edited' adapter, or the 'difference' that is stacked on the old one.
        rank: the emitted, uniform rank.
        seconds: wall time; not written down.
    """

    kind: str
    config: dict[str, Any]
    base_model: dict[str, Any]
    adapter: dict[str, Any]
    data: dict[str, dict[str, Any]]
    damping: float
    residual: float
    iterations: int
    stopped: str
    losses: dict[str, list[float]]
    versions: dict[str, str]
    with_adapters: list[dict[str, Any]] = field(default_factory=list)
    form: str = "difference"
    rank: int = 0
    dtype: str = "float32"
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["seconds"]
        return {"influence": values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InfluenceProvenance:
        return cls(**values["influence"])

    @property
    def stopping(self) -> str:
        """How far the system was solved, and why no further."""
        asked = f"{self.config['tolerance']:.1g}"
        why = {
            "tolerance": f"{asked} was asked for",
            "iterations": f"stopped early, at max_iterations; {asked} was asked for",
            "rounding": f"stopped early, where the model's precision allows no more; {asked} was asked for",
        }
        return f"residual {self.residual:.2g} after {self.iterations} products ({why[self.stopped]})"

    def __str__(self) -> str:
        done = {
            "erase_instances": "erased",
            "modify_queries": "with other queries",
            "correct_responses": "with other responses",
        }
        names = {"changed": "theirs", "kept": "the others'", "new": "the new ones'"}
        losses = ", ".join(f"{names[name]} {a:.3f} -> {b:.3f}" for name, (a, b) in self.losses.items())
        return (
            f"{self.data['changed']['samples']} of {self.data['training']['samples']} training rows of "
            f"{self.adapter['name']!r} {done[self.kind]}: {self.config['curvature']} curvature, damping "
            f"{self.damping:.2g}, {self.stopping}; loss: {losses}"
        )


@dataclass
class TrainedProvenance:
    """An adapter trained to forget.

    Attributes:
        settings: the UnlearningSettings.
        training: the optimiser's settings, and how many steps it took.
        base_model: name or path, revision, and quantisation of the base.
        start_adapter: name, and SHA-256 of the factors, of the adapter that it began as; None where it began at zero.
        task_adapter: the adapter that was on beside it, if any.
        data: per set, sample count and SHA-256 of its tokens.
        figures: the last ones logged: losses, cosines, share of conflicting elements.
        rank: the emitted, uniform rank.
        versions: of the packages that took part.
        seconds: wall time; not written down.
    """

    settings: dict[str, Any]
    training: dict[str, Any]
    base_model: dict[str, Any]
    start_adapter: dict[str, Any] | None
    task_adapter: str | None
    data: dict[str, dict[str, Any]]
    figures: dict[str, float]
    rank: int
    dtype: str
    versions: dict[str, str]
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["seconds"]
        return {"trained": values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainedProvenance:
        return cls(**values["trained"])

    def __str__(self) -> str:
        sets = ", ".join(f"{entry['samples']} {name}" for name, entry in self.data.items())
        start = f" from {self.start_adapter['name']!r}" if self.start_adapter else ""
        return (
            f"unlearning adapter of rank {self.rank}, trained{start} by {self.settings['forget_loss']} and "
            f"{self.settings['retain_loss']}, combined by {self.settings['combiner']}, in {self.training['steps']} "
            f"steps on {sets} samples"
        )


Provenance = PerTAProvenance | FusedProvenance | InfluenceProvenance | TrainedProvenance


def read_provenance(values: dict[str, Any]) -> Provenance:
    """What ``to_dict`` of one of them gave, as it was.

    Raises LookupError, TypeError or AttributeError where the mapping is no report.
    """
    kinds = {"fused": FusedProvenance, "influence": InfluenceProvenance, "trained": TrainedProvenance}
    return next((kind for name, kind in kinds.items() if name in values), PerTAProvenance).from_dict(values)


def describe_base(model: nn.Module) -> dict[str, Any]:
    """What a report says of the base: name, revision, hash of the embeddings, quantisation."""
    config = base_model(model).config
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return {
        "name": base_name(model),
        "revision": getattr(config, "_commit_hash", None),
        "embeddings_sha256": hash_embeddings(model),
        "quantization": quantization
        and {k: v for k, v in quantization.items() if isinstance(v, (str, int, float, bool))},
    }


def versions() -> dict[str, str]:
    """Of the packages that take part."""
    return {
        name.replace("-", "_"): importlib.metadata.version(name)
        for name in ("peft-perta", "torch", "transformers", "peft", "bitsandbytes")
    }
