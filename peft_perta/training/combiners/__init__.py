"""Combiners of the forget gradient and the retain gradient into the one that the optimizer gets: pure functions.

To add one: a file here with a ``Combiner``, a row in ``COMBINERS``, a row in ``tests/tables.py``.
"""

from .combiner import Combiner, Gradients, inner
from .linear import NORMALISED, SUM
from .projection import PCGRAD, PCGRAD_GLOBAL
from .signs import SAGO, SAGO_PREFER_RETAIN, conflicting

COMBINERS: dict[str, Combiner] = {
    combiner.name: combiner for combiner in (SUM, PCGRAD, PCGRAD_GLOBAL, SAGO, SAGO_PREFER_RETAIN, NORMALISED)
}

__all__ = ["COMBINERS", "Combiner", "Gradients", "conflicting", "inner"]
