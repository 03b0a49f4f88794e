"""Provenance: the record of how an adapter was made. Each kind of record has its own file.

A record is plain data. It is written to the provenance file, it fills the model card, and ``peft-perta inspect`` prints
it. Each kind knows its key in the file (``KEY``), its section of the model card and its one-line summary (``str``).
"""

from __future__ import annotations

from typing import Any

from .environment import describe_base, versions
from .fused import FusedProvenance
from .influence import InfluenceProvenance
from .layers import LayerProvenance, WeightDistribution
from .perta import PerTAProvenance
from .refined import RefinedProvenance
from .trained import TrainedProvenance

Provenance = PerTAProvenance | FusedProvenance | InfluenceProvenance | TrainedProvenance | RefinedProvenance

KINDS: tuple[type[Provenance], ...] = (
    PerTAProvenance,
    FusedProvenance,
    InfluenceProvenance,
    TrainedProvenance,
    RefinedProvenance,
)


def read_provenance(values: dict[str, Any]) -> Provenance:
    """The record that ``to_dict`` of its kind returned as ``values``.

    Raises:
        ValueError: ``values`` is not such a record.
    """
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, found a {type(values).__name__}")
    kind = next((kind for kind in KINDS if kind.KEY in values), PerTAProvenance)
    return kind.from_dict(values)


__all__ = [
    "FusedProvenance",
    "InfluenceProvenance",
    "LayerProvenance",
    "PerTAProvenance",
    "Provenance",
    "RefinedProvenance",
    "TrainedProvenance",
    "WeightDistribution",
    "describe_base",
    "read_provenance",
    "versions",
]
