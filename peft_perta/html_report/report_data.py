"""The numbers and texts that an HTML report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..adapters import (
    PROVENANCE_NAME,
    FusedProvenance,
    PerTAProvenance,
    Provenance,
    load_provenance,
    read_provenance,
    versions,
)
from ..errors import DataError
from ..evaluation import AttackResult, Calibration

FULL, UNLEARNED, RETAIN_ONLY = MODELS = ("full", "unlearned", "retain-only")
SHOWN_ROWS = 10  # generations per set: more would quote more of the data than a reader checks


class Values(NamedTuple):
    """One metric of the three models; None where it was not measured."""

    full: float | None
    unlearned: float | None
    retain_only: float | None


@dataclass(frozen=True)
class ReportHeader:
    """What a report is about.

    Attributes:
        title: the heading of the page.
        base_model: name or path of the base model.
        adapters: names or paths of the adapters on the base model, in stacking order. The last one is the negative
            adapter: if its directory holds a provenance file, the report shows it.
        commands: the shell commands that produced the numbers.
    """

    title: str
    base_model: str
    adapters: Sequence[str] = ()
    commands: Sequence[str] = ()


@dataclass(frozen=True)
class ReportData:
    """What was done to a model, and what was measured. Every part except the header may be missing.

    Attributes:
        header: title, base model, adapters and commands.
        provenance: ``to_dict`` of the adapter's provenance; None if the adapter has none.
        models: label -> metric -> value. The page knows the labels ``full``, ``unlearned`` and ``retain-only``; it
            shows any other label in a column of its own.
        generations: split (``forget``, ``retain``) -> rows with the keys ``prompt``, ``expected`` and one key for each
            label in ``models``.
        attacks: results of the attacks on the forget rows.
        verdict: what an audit made of them: its name, a colon, and what decided it; empty without an audit.
        made_with: package -> version.
    """

    header: ReportHeader
    provenance: dict[str, Any] | None = None
    models: dict[str, dict[str, float]] = field(default_factory=dict)
    generations: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    attacks: Sequence[AttackResult] = ()
    verdict: str = ""
    made_with: dict[str, str] = field(default_factory=dict)

    def value(self, label: str, metric: str) -> float | None:
        """The value of a metric for one model, or None if it was not measured."""
        return self.models.get(label, {}).get(metric)

    def values(self, metric: str) -> Values:
        """The values of a metric for the three models."""
        return Values(*(self.value(label, metric) for label in MODELS))

    @property
    def has_retain_only(self) -> bool:
        """Whether the retain-only model was measured."""
        return bool(self.models.get(RETAIN_ONLY))

    def read_provenance(self) -> Provenance | None:
        """The adapter's provenance as an object.

        Raises:
            DataError: ``provenance`` is damaged.
        """
        if self.provenance is None:
            return None
        try:
            return read_provenance(self.provenance)
        except ValueError as error:
            raise DataError(
                f"the provenance in the report data is damaged ({error}); expected what "
                "PerTAProvenance.to_dict or another provenance's to_dict returns, or None"
            ) from error

    def read_calibration(self) -> Calibration | None:
        """The search for the strength that the provenance records.

        Raises:
            DataError: ``provenance`` is damaged.
        """
        provenance = self.read_provenance()
        return provenance.calibration if isinstance(provenance, (PerTAProvenance, FusedProvenance)) else None


def build_report_data(
    header: ReportHeader,
    models: dict[str, dict[str, float]],
    generations: dict[str, list[dict[str, str]]],
    attacks: Sequence[AttackResult] = (),
) -> ReportData:
    """Combine measurements with the provenance of the last adapter and the package versions."""
    provenance = None
    if header.adapters and (Path(header.adapters[-1]) / PROVENANCE_NAME).is_file():
        provenance = load_provenance(header.adapters[-1])[0].to_dict()
    return ReportData(header, provenance, models, generations, attacks, made_with=versions())
