"""Weightings: gradient magnitudes -> weights in [0, 1]. One row each in ``WEIGHTINGS``.

To add a weighting to the package: its file, a row here, a row in tests/tables.py. A weighting of your own needs no
change here: the config takes 'package.module:attribute' too.
"""

from .controls import at_own_mean, shuffled
from .ratio import EMPIRICAL_FISHER, FISHER, GRAD
from .uniform import UNIFORM
from .weighting import Weighting

_RATIOS = (GRAD, FISHER, EMPIRICAL_FISHER)

WEIGHTINGS: dict[str, Weighting] = {
    weighting.name: weighting for weighting in (UNIFORM, *_RATIOS, *map(shuffled, _RATIOS), *map(at_own_mean, _RATIOS))
}

__all__ = ["WEIGHTINGS", "Weighting"]
