"""The record of a negative adapter."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import Field
from typing_extensions import TypedDict

from ...data import Holds
from ...evaluation import Calibration
from .layers import LayerProvenance
from .record import Record, data_table, named_hash, searched_on
from .shapes import Adapter, Base, DataSet, Rank


class _Config(TypedDict):
    weighting: str
    granularity: str
    gradients_at: str
    power: float | None
    strength: float
    fit: str | None
    dtype: str


@dataclass
class PerTAProvenance(Record):
    """How a negative adapter was made by PerTA.

    Attributes:
        config: the ``PerTAConfig``.
        base_model: name or path, revision, SHA-256 of the embeddings, and quantisation of the base model.
        forget_adapter: name of the forget adapter, and SHA-256 of its factors.
        task_adapter: the adapter that was on when gradients were taken at the full model; None without one.
        data: set -> number of samples and SHA-256 of their tokens.
        rank: the rank of the negative adapter, the same in every layer.
        layers: the layers that the forget adapter adapts, in forward order.
        versions: package -> version.
        calibration: the search for the strength; None where the strength was given.
        fit_kl: KL divergence of the adapter's next-token distributions from those of the edit at full rank, in nats,
            averaged over the tokens with a loss. 0 where the rank holds the edit exactly, None where it was not
            measured.
        seconds: stage -> wall time in seconds; not written to the file.
    """

    KEY: ClassVar[str | None] = None

    config: Annotated[dict[str, Any], Holds(_Config)]
    base_model: Base
    forget_adapter: Adapter
    task_adapter: str | None
    data: dict[str, DataSet]
    rank: Rank
    layers: Annotated[list[LayerProvenance], Field(min_length=1)]
    versions: dict[str, str]
    calibration: Calibration | None = None
    fit_kl: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def energy_kept(self) -> float:
        """The share of the whole edit's squared Frobenius norm that the adapter holds."""
        total = sum(layer.edit_norm**2 for layer in self.layers)
        kept = sum(layer.edit_norm**2 * layer.energy_kept for layer in self.layers)
        return kept / total if total else 1.0

    @property
    def metric_error(self) -> float:
        """The share of the edit that the fit lost in its own measure, averaged over layers."""
        return sum(layer.metric_error for layer in self.layers) / max(len(self.layers), 1)

    def scaled(self, factor: float) -> PerTAProvenance:
        """The record of the same adapter at ``factor`` times its strength."""
        layers = [dataclasses.replace(layer, edit_norm=layer.edit_norm * abs(factor)) for layer in self.layers]
        config = {**self.config, "strength": self.config["strength"] * factor}
        return dataclasses.replace(self, config=config, layers=layers)

    def __str__(self) -> str:
        sets = ", ".join(f"{entry['samples']} {name}" for name, entry in self.data.items()) or "no"
        return (
            f"negative adapter of rank {self.rank} on {len(self.layers)} layers: {self.config['weighting']} "
            f"weights per {self.config['granularity']}, strength {self.config['strength']:g}, from {sets} samples; "
            f"{self.energy_kept:.1%} of the edit's energy kept"
        )

    def card_section(self) -> list[str]:
        """The lines of the model card that say what was done."""
        config = self.config
        weighting = config["weighting"] + (f" (power {config['power']:g})" if config["power"] is not None else "")
        return [
            "# Negative adapter",
            "",
            f"A LoRA adapter for {self.base_code}. Stack it on the model to remove the knowledge of one forget set. "
            "It was made from a forget adapter: each parameter was weighted, and the result was negated (PerTA, arXiv "
            f"2601.22030). Made with peft_perta {self.versions.get('peft_perta', '')}.",
            "",
            "## How it was made",
            "",
            f"- weights: `{weighting}` per `{config['granularity']}`, gradients at `{config['gradients_at']}`",
            *self._input_directions(),
            f"- strength: {config['strength']:g}, already multiplied into B together with the minus sign",
            f"- rank: {self.rank} (`lora_alpha` is the same), {config['dtype']}, {len(self.layers)} layers edited",
            f"- energy of the edit kept at this rank: {self.energy_kept:.1%}; lost in the measure of the fit "
            f"(`{config['fit'] or 'default'}`): {self.metric_error:.1%}; {self._fit_kl()}",
            f"- forget adapter: {named_hash(self.forget_adapter)}",
            "",
            *([*data_table(self.data, "set"), ""] if self.data else []),
            *self._results(),
            "`perta_provenance.json` holds everything else, layer by layer.",
            "",
        ]

    def _input_directions(self) -> list[str]:
        shares = [layer.left_on_inputs for layer in self.layers if layer.left_on_inputs]
        if not shares:
            return []
        forget, retain = (sum(share[name] for share in shares) / len(shares) for name in ("forget", "retain"))
        return [
            f"- input directions were weighed: {forget:.0%} of the edit's squared output is left on the forget set's "
            f"inputs, {retain:.0%} on the retain set's (mean over layers)"
        ]

    def _fit_kl(self) -> str:
        if self.fit_kl is None:
            return "KL to the edit at full rank: not measured"
        return f"KL to the edit at full rank: {self.fit_kl:.2g} nats per token"

    def _results(self) -> list[str]:
        if self.calibration is None:
            return []
        off, on = self.calibration.points[0], self.calibration.losses
        return [
            "## Results",
            "",
            "Mean loss in nats per token, on the forget set and on held-out retain rows:",
            "",
            "| | forget | retain |",
            "|---|---|---|",
            f"| without this adapter | {off['forget']:.3f} | {off['retain']:.3f} |",
            f"| with it | {on['forget']:.3f} | {on['retain']:.3f} |",
            "",
            *searched_on(self.calibration),
            "`strength.json` holds the losses at every strength that was tried.",
            "",
        ]
