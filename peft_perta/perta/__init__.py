"""PerTA, the method: a forget adapter, weighted by the gradients of both sets and negated, becomes a negative adapter.
Weightings, granularities and fits are its extension points. The room also refines any adapter along input directions.

Imports from: errors, data, model, gradients, evaluation, adapters.
"""

from .config import ALLOCATIONS, GRADIENTS_AT, PerTAConfig
from .edited_layers import gradient_job
from .fits import FITS
from .granularities import GRANULARITIES
from .layer import edit_layer
from .refine import RefinementSettings, refine_adapter, refinement_job
from .run import add_perta_adapter, get_perta_state_dict
from .task_vectors import task_vector
from .weighing import resolve_weighting
from .weightings import WEIGHTINGS, Weighting
from .weightings.ratio import ratio

__all__ = [
    "ALLOCATIONS",
    "FITS",
    "GRADIENTS_AT",
    "GRANULARITIES",
    "WEIGHTINGS",
    "PerTAConfig",
    "RefinementSettings",
    "Weighting",
    "add_perta_adapter",
    "edit_layer",
    "get_perta_state_dict",
    "gradient_job",
    "ratio",
    "refine_adapter",
    "refinement_job",
    "resolve_weighting",
    "task_vector",
]
