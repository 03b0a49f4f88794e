"""How the gradients of both sets are taken: one file a mode, one row each in ``MODES``.

A mode is a generator (job, sets) -> (targets, both sets' sums), group after group, from the top down.
"""

from . import grouped, layerwise

MODES = {"grouped": grouped.run, "layerwise": layerwise.run}

__all__ = ["MODES"]
