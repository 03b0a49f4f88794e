"""Granularities: what the weights multiply. One file per granularity, one row each in ``GRANULARITIES``.

To add a granularity: its file, a row here, a row in tests/tables.py.
"""

from .delta import Delta
from .factor import Factor
from .factor_delta import FactorDelta
from .granularity import Granularity
from .separable import Separable

GRANULARITIES: dict[str, Granularity] = {g.name: g for g in (Factor(), Delta(), Separable(), FactorDelta())}
__all__ = ["GRANULARITIES", "Granularity"]
