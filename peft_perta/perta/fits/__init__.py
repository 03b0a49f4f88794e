"""Fits: an edit -> factors of the adapter's rank. One file per fit, one row each in ``FITS``.

To add a fit: its file, a row here, a row in tests/tables.py.
"""

from .fit import Fit, is_exact
from .kronecker import Kronecker
from .second_moment import SecondMoment
from .truncated import Truncated
from .weighted import Weighted

FITS: dict[str, Fit] = {fit.name: fit for fit in (Truncated(), Kronecker(), SecondMoment(), Weighted())}
__all__ = ["FITS", "Fit", "is_exact"]
