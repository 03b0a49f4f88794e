"""Edit -> factors of the adapter's rank: one file a fit, one row each in ``FITS``.

To add one: a file, a row here, its name in ``config.FIT_NAMES``, a row in tests/tables.py. Where the rank holds the
edit as it is, every fit passes it on exactly.
"""

from .fit import Fit, is_exact
from .kronecker import Kronecker
from .second_moment import SecondMoment
from .truncated import Truncated
from .weighted import Weighted

FITS: dict[str, Fit] = {fit.name: fit for fit in (Truncated(), Kronecker(), SecondMoment(), Weighted())}


__all__ = ["FITS", "Fit", "is_exact"]
