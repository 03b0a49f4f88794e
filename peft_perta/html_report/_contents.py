"""What a page is made of; any part of it may be missing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..adapters import Provenance, read_provenance
from ..errors import DataError
from ..evaluation import Calibration


@dataclass
class ReportData:
    """What was done to a model and what was measured of it. Everything in it is JSON.

    Attributes:
        title: the page's heading.
        base_model: name or path.
        adapters: what is stacked on it, in order, as the user named it; empty for a model without adapters.
        report: as ``to_dict`` of the adapter's report gives it; None if the adapter is not ours.
        models: label -> metric -> value; the labels 'before', 'after' and 'reference' (a model that never saw the
            forget rows) are known, others are shown under their own name.
        calibration: of ``Calibration.to_dict``.
        generations: split ('forget', 'retain') -> rows {prompt, expected, before, after, reference}, the last optional.
        attacks: rows {attack, setting, unlearned, reference, full}, the last three of what is measured on the forget
            rows under the attack: 'loss' (nats per token), 'probability', 'rouge_l_recall'; two may be None.
        commands: as they were given.
        made_with: package -> version.
    """

    title: str
    base_model: str
    adapters: list[str] = field(default_factory=list)
    report: dict[str, Any] | None = None
    models: dict[str, dict[str, float]] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    generations: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    attacks: list[dict[str, Any]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    made_with: dict[str, str] = field(default_factory=dict)

    def value(self, label: str, metric: str) -> float | None:
        """None where it was not measured."""
        return self.models.get(label, {}).get(metric)

    @property
    def has_retain_only(self) -> bool:
        return bool(self.models.get("retain-only"))

    def read_provenance(self) -> Provenance | None:
        """Raises DataError where ``report`` is none."""
        if self.report is None:
            return None
        try:
            return read_provenance(self.report)
        except (LookupError, TypeError, AttributeError) as error:
            raise DataError(
                f"the evidence's report is damaged ({type(error).__name__}: {error}); expected what "
                "PerTAProvenance.to_dict or another report's gives, or None"
            ) from error

    def read_calibration(self) -> Calibration | None:
        """Raises DataError where ``calibration`` is none."""
        if self.calibration is None:
            return None
        try:
            return Calibration.from_dict(self.calibration)
        except TypeError as error:
            raise DataError(
                f"the evidence's calibration is damaged ({error}); expected what Calibration.to_dict gives, or None"
            ) from error
