"""TEMPORARY: what the settings' metadata and the tables' rows do not hold yet.

Delete this file and its two uses: in ``_settings.py``, once every field with a fixed set of values has ``choices`` in
its metadata; in ``_options.py``, once every row of WEIGHTINGS, GRANULARITIES and FITS has a ``description``.
"""

from typing import Any

from ..adapters import DTYPES
from ..influence import CURVATURES, FACTORS, SOLVERS
from ..perta import ALLOCATIONS, FIT_NAMES, GRADIENTS_AT, GRANULARITY_NAMES
from ..training import COMBINERS, FORGET_LOSSES, RETAIN_LOSSES

CHOICES = {
    "granularity": GRANULARITY_NAMES,
    "fit": FIT_NAMES,
    "allocation": ALLOCATIONS,
    "gradients_at": GRADIENTS_AT,
    "dtype": DTYPES,
    "curvature": CURVATURES,
    "solver": SOLVERS,
    "factors": FACTORS,
    "forget_loss": FORGET_LOSSES,
    "retain_loss": RETAIN_LOSSES,
    "combiner": COMBINERS,
}


def description(row: Any) -> str:
    """The description of a table's row, if it has one."""
    return getattr(row, "description", "")
