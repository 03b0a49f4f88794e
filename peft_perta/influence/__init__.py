"""LLMEraser: edit an adapter as if rows of its training set had been left out or changed, without training it again.

The edit solves one linear system in the curvature of the training loss.

Imports from: errors, data, model, gradients, evaluation, adapters.
"""

from .erase import correct_responses, erase_instances, modify_queries
from .result import InfluenceResult, check_difference
from .settings import CURVATURES, FACTORS, SOLVERS, InfluenceSettings

__all__ = [
    "CURVATURES",
    "FACTORS",
    "SOLVERS",
    "InfluenceResult",
    "InfluenceSettings",
    "check_difference",
    "correct_responses",
    "erase_instances",
    "modify_queries",
]
