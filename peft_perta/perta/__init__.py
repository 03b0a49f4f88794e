"""PerTA: the config, weightings, granularities, fits, input directions, and the run.

Imports from: every room above.
"""

from .config import ALLOCATIONS, FIT_NAMES, GRADIENTS_AT, GRANULARITY_NAMES, PerTAConfig
from .fits import FITS
from .granularities import GRANULARITIES
from .layer import collector_of, edit_copies, edit_layer, limits_of
from .run import add_perta_adapter, get_perta_state_dict
from .task_vectors import task_vector
from .weightings import WEIGHTINGS, resolve_weighting
from .weightings.ratio import ratio
from .weightings.weighting import Weighting

__all__ = [
    "ALLOCATIONS",
    "FITS",
    "FIT_NAMES",
    "GRADIENTS_AT",
    "GRANULARITIES",
    "GRANULARITY_NAMES",
    "WEIGHTINGS",
    "PerTAConfig",
    "Weighting",
    "add_perta_adapter",
    "collector_of",
    "edit_copies",
    "edit_layer",
    "get_perta_state_dict",
    "limits_of",
    "ratio",
    "resolve_weighting",
    "task_vector",
]
